"""The controls tell a model that computes in its rationale from one that knows beforehand, and from one that copies a letter."""
import json
import re
from types import SimpleNamespace

import pytest
import torch

from nanochat.engine import Completion
from nanochat.gpt import GPT, GPTConfig
from nanochat.tokenizer import Tokenizer
from scripts import reasoning_eval
from tasks import reasoning_controls
from tasks.common import get_task
from tasks.reasoning_controls import CONDITIONS, agreement, answer_under_controls, carried_over, rationales, summarize_controls, table_rows, verdict
from tests import pipeline

CPU = SimpleNamespace(rank=0, world_size=1, is_master=True, gather_objects=lambda value: [value])


@pytest.fixture(scope="module")
def tokenizer():
    lines = [f"so {a}={letter}\nAnswer: {letter} Reason, then end with the line\n- {a}={letter}\n" for letter in "ABCDE" for a in range(100)]
    return Tokenizer.train(lines * 4, 450)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = GPT(GPTConfig(sequence_len=512, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights()
    return model.eval()


def right_letter(prompt, task):
    return next(conversation["answer_letter"] for conversation in task if conversation["messages"][0]["content"].split("\n")[0] in prompt)


class Scripted:
    """An engine whose model computes the answer of a problem, and reasons in two lines of which the last names the option."""

    def __init__(self, model, tokenizer, task, reason=True):
        self.model, self.tokenizer, self.task, self.reason = model, tokenizer, task, reason
        self.values = {conversation["messages"][0]["content"].split("\n")[0]: re.search(rf"- (.*)={conversation['answer_letter']}\n", conversation["messages"][0]["content"])[1]
                       for conversation in task}

    def generate(self, requests, on_finish):
        for place, request in enumerate(requests):
            prompt = self.tokenizer.decode(request.tokens)
            value = next((value for question, value in self.values.items() if question in prompt), None)
            found = re.search(rf"- {re.escape(value)}=([A-E])", prompt) if value is not None else None
            letter = found[1] if found else "A"
            text = f"It is {value}\nso {value}={letter}\nAnswer: {letter}" if self.reason else f"Answer: {letter}"
            on_finish(place, 0, Completion(self.tokenizer.encode(text), [], [], "stop", text))


def reader(tokenizer, read):
    """letter_logprobs by a function of what stands behind the prompt's end, instead of a model."""
    def letter_logprobs(model, tokenizer, prompts, letters, batch_size=64, on_result=None):
        results = []
        for place, (prompt, options) in enumerate(zip(prompts, letters)):
            question, _, rationale = tokenizer.decode(prompt).rpartition("<|assistant_start|>")
            letter = read(question, rationale)
            results.append({option: -0.1 if option == letter else -3.0 for option in options})
            if on_result:
                on_result(place, results[-1])
        return results
    return letter_logprobs


@pytest.fixture
def run(model, tokenizer, monkeypatch):
    def answered(read, size=40, **settings):
        task = get_task("ALGEBRA", split="validation", stop=size)
        reads = reader(tokenizer, lambda question, rationale: read(question, rationale, task))
        monkeypatch.setattr(reasoning_controls, "letter_logprobs", reads)
        monkeypatch.setattr("tasks.evaluation.letter_logprobs", reads)
        reason = settings.pop("reason", True)
        records = answer_under_controls(task, Scripted(model, tokenizer, task, reason), tokenizer, CPU, **settings)
        return records, summarize_controls(records, 0.2)
    return answered


def copies_the_last_letter(question, rationale, task):
    """Reads the letter that the rationale names, else always A."""
    found = re.findall(r"=([A-E])", rationale)
    return found[-1] if found else "A"


def knows_beforehand(question, rationale, task):
    return right_letter(question, task)


def said(metrics):
    return " ".join(verdict(metrics))


# ---------------------------------------------------------------------------------------------------------------------
# Conditions

def test_a_model_that_copies_its_rationale_s_letter_is_found_out(run):
    records, metrics = run(copies_the_last_letter)
    accuracy = {name: found["accuracy"] for name, found in metrics["conditions"].items()}
    always_a = sum(record["gold"] == "A" for record in records) / len(records)
    assert tuple(accuracy) == CONDITIONS and accuracy["written"] == accuracy["own"] == 1.0
    assert accuracy["none"] == accuracy["own but the last line"] == accuracy["own 25 %"] == accuracy["own 50 %"] == always_a
    assert metrics["carried_over"]["share"] == 1.0 and accuracy["another's"] < 0.6
    text = said(metrics)
    assert "The reasoning matters: without it accuracy changes by" in text and "Even its first 75 % fall short" in text and "Its content is read" in text
    assert "the answer was this letter in 100.00 %" in text


def test_a_model_that_knows_beforehand_does_not_need_its_rationale(run):
    _, metrics = run(knows_beforehand)
    assert all(found["accuracy"] == 1.0 and found["same_answer"] == 1.0 for found in metrics["conditions"].values())
    assert metrics["carried_over"]["share"] == 0.0
    text = said(metrics)
    assert "No evidence that the reasoning matters" in text and "Its content is not read" in text and "The reasoning matters" not in text


def test_a_model_at_chance_has_nothing_to_explain(run):
    _, metrics = run(lambda question, rationale, task: "C")
    assert "there is nothing that reasoning could explain" in said(metrics) and "The reasoning matters" not in said(metrics)


def test_half_a_rationale_suffices_where_the_first_line_says_it(run):
    """This reader finds the value on the first line, and the option by itself."""
    def read(question, rationale, task):
        found = re.search(r"It is (\d+)\n", rationale)
        option = found and re.search(rf"- {found[1]}=([A-E])", question)
        return option[1] if option else "A"

    _, metrics = run(read)
    assert metrics["conditions"]["own but the last line"]["accuracy"] == 1.0
    assert re.search(r"The first (50|75) % of the rationale do as well as all of it", said(metrics))


def test_without_a_rationale_every_condition_of_its_own_is_none(run):
    records, metrics = run(knows_beforehand, reason=False, size=10)
    assert metrics["without_rationale"] == 10 and "another's" not in metrics["conditions"] and metrics["carried_over"] is None
    assert all(record["conditions"][name] == record["conditions"]["none"] for record in records for name in CONDITIONS if name.startswith("own"))


def test_the_parts_of_a_rationale(tokenizer):
    record = {"index": 3, "prompt": "p", "letters": list("ABCDE"), "gold": "B", "completions": [{"text": "one two three\nso 7=B\nAnswer: B", "answer": "B"}]}
    other = {"index": 4, "prompt": "q", "completions": [{"text": "other\nAnswer: C", "answer": "C"}]}
    found = {name: (tokenizer.decode(ids), origin) for name, ids, origin in rationales(record, [record, other], tokenizer, 1)}
    whole = tokenizer.encode("one two three\nso 7=B")
    for share in (75, 50, 25):
        assert found[f"own {share} %"] == (tokenizer.decode(whole[:len(whole) * share // 100]) + "\n", {})
    assert found["own but the last line"] == ("one two three\n", {}) and found["another's"] == ("other\n", {"of": 4, "said": "C"})
    alone = {"index": 0, "prompt": "p", "completions": [{"text": "so 7=B\nAnswer: B", "answer": "B"}]}
    assert dict((name, ids) for name, ids, _ in rationales(alone, [alone, record], tokenizer, 1))["own but the last line"] == []  # and the same question is no other
    assert "another's" not in [name for name, *_ in rationales(alone, [alone, record], tokenizer, 1)]


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

def controlled(choices, answer="A", letters="ABC"):
    prompt = "q" + "".join(f"\n- {text}={letter}" for text, letter in zip(("x", "y", "z"), letters))
    return {"index": 0, "prompt": prompt, "gold": "A", "letters": list(letters), "completions": [{"text": "", "answer": answer, "correct": answer == "A"}],
            "controls": {f"shift {i}": {"choice": choice, "correct": False} for i, choice in enumerate(choices, start=1)}}


@pytest.mark.parametrize("choices, answer, share", [(("x", "x"), "A", 1.0), (("x", "y"), "A", 1 / 3), (("y", "z"), "A", 0.0), ((None, None), None, 0.0), (("y", "y"), "A", 1 / 3)])
def test_agreement_is_the_share_of_pairs_of_orders_with_the_same_text(choices, answer, share):
    assert agreement(controlled(choices, answer)) == pytest.approx(share)


def test_a_letter_is_carried_over_only_where_it_is_wrong_and_on_offer():
    def record(answer, said, gold="B"):
        return {"gold": gold, "letters": list("ABCD"), "conditions": {"another's": {"answer": answer, "said": said}}}
    found = carried_over([record("A", "A"), record("C", "A"), record("B", "B"), record("A", None), record("A", "E"), record("D", "D")])
    assert found["share"] == pytest.approx(2 / 3) and found["n"] == 3
    assert carried_over([record("B", "B")]) is None and carried_over([{"conditions": {}}]) is None


def test_the_differences_are_paired(run):
    records, metrics = run(copies_the_last_letter)
    lost = metrics["conditions"]["none"]["against_own"]
    differs = [record["conditions"]["none"]["correct"] - record["conditions"]["own"]["correct"] for record in records]
    assert lost["difference"] == pytest.approx(sum(differs) / len(differs)) and lost["only_a"] == -sum(differs) and lost["only_b"] == 0
    assert lost["ci_low"] < lost["difference"] < lost["ci_high"] < 0 and lost["p"] < 1e-6
    assert metrics["orders"]["agreement"] == 1.0 and metrics["orders"]["accuracy"] == [1.0] * 5 and metrics["orders"]["by_chance"] == pytest.approx(0.2)


def test_the_table_has_every_condition_and_the_baselines(run):
    _, metrics = run(copies_the_last_letter)
    rows = table_rows(metrics)
    assert [row[0] for row in rows[:len(CONDITIONS)]] == list(CONDITIONS) and rows[1][3:6] == ("", "", "")
    assert rows[-3][0] == "options without the question" and rows[-2][0].startswith("always ") and rows[-1][:2] == ("guessing", "20.00 %")
    assert all(len(row) == len(reasoning_controls.HEAD) for row in rows)


# ---------------------------------------------------------------------------------------------------------------------
# For real

def two_ranks(number, parts):
    return SimpleNamespace(rank=number, world_size=2, is_master=number == 0, gather_objects=lambda value: parts(value))


def test_a_real_model_answers_the_same_in_any_batch(model, tokenizer):
    from nanochat.engine import Engine
    task = get_task("ALGEBRA", split="validation", stop=6)
    one, other = (answer_under_controls(task, Engine(model, tokenizer, max_rows=rows), tokenizer, CPU, max_new_tokens=8, orders=False, batch_size=rows)
                  for rows in (1, 16))
    assert [[record["conditions"][name]["answer"] for name in record["conditions"]] for record in one] == [
        [record["conditions"][name]["answer"] for name in record["conditions"]] for record in other]
    assert all("controls" not in record for record in one) and summarize_controls(one)["orders"] is None


def test_the_script_writes_table_answers_summary_and_report_section(base_directory, capsys):
    for stage in ("base", "sft"):
        pipeline.run_stage(stage, num_iterations=2, **({"source": "base"} if stage == "sft" else {}))
    capsys.readouterr()
    reasoning_eval.main(reasoning_eval.Config(source="sft", task_name="AQUA", max_problems=6, max_new_tokens=8, device_type="cpu", dtype="float32"))
    printed = capsys.readouterr().out
    folder = base_directory / "reasoning"
    summary = json.loads((folder / "sft_d2_AQUA_validation.json").read_text(encoding="utf-8"))
    answers = [json.loads(line) for line in (folder / "sft_d2_AQUA_validation_answers.jsonl").read_text(encoding="utf-8").splitlines()]
    section = json.loads((base_directory / "report" / "reasoning_sft.json").read_text(encoding="utf-8"))
    assert summary["n"] == len(answers) == 6 and {"own", "none"} <= set(answers[0]["conditions"]) and answers[0]["index"] == 0
    for name, found in summary["metrics"]["conditions"].items():
        assert found["accuracy"] == pytest.approx(sum(record["conditions"][name]["correct"] for record in answers) / 6)
    assert "Does the reasoning matter? sft d2 at step 2 on 6 problems of AQUA validation" in section["markdown"] and "| own |" in section["markdown"]
    assert "after which rationale" in printed and summary["verdict"][0] in printed


def test_a_task_without_letters_is_refused_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    with pytest.raises(ValueError, match="SpellingBee has no letters to force"):
        reasoning_eval.main(reasoning_eval.Config(task_name="SpellingBee", split="test", device_type="cpu"))
