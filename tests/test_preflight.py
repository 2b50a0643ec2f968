"""The preflight: what it looks at, what it refuses, and that a run with it is the run without it."""
import dataclasses
import json

import pytest
import torch

from nanochat.compute import Compute
from nanochat.engine import Engine
from nanochat.rl.preflight import check_rewards, preflight, refuse_without_signal, summarize_signal, too_long
from nanochat.rl.rollout import Sampler
from nanochat.tokenizer import get_tokenizer
from scripts import chat_grpo, chat_rl
from tasks.aqua import AQUA, LetterTask
from tasks.common import message_text
from tasks.problems import Problems, load_tasks
from tests.test_chat_grpo import TINY, equal, logged, make_model, sft, weights_of  # noqa: F401 (sft is a fixture)

CPU = Compute(torch.device("cpu"), torch.float32)


def text_of(conversation):
    return message_text(conversation["messages"][-1])


@pytest.fixture
def setting(base_directory):
    """-> run(**changes): the preflight of an untrained model on the embedded data."""
    tokenizer = get_tokenizer()
    model, reference = make_model(tokenizer), make_model(tokenizer).requires_grad_(False)
    problems = Problems(load_tasks({"AQUA": 1.0})[0], {"AQUA": 1.0}, 1)

    def run(problems=problems, reference=reference, is_same=True, groups=4, samples=4):
        sampler = Sampler(Engine(model, tokenizer), tokenizer, problems, CPU, samples, 12)
        return preflight(problems, text_of, sampler, reference, is_same, groups, 1.0, 1)

    return run


def test_a_run_with_the_preflight_is_the_run_without_it(sft, capsys):  # noqa: F811
    for script, config in ((chat_rl, chat_rl.Config(**TINY, max_steps=2)), (chat_grpo, chat_grpo.Config(**TINY, num_steps=2, grpo_epochs=2))):
        script.main(config)
        script.main(dataclasses.replace(config, output_tag="y", preflight=6))
        assert equal(weights_of(sft, "x"), weights_of(sft, "y"))
        with_it = logged(sft, "y")[0]
        assert with_it["preflight/groups"] == 6 and 0 < with_it["preflight/signal"] <= with_it["preflight/pass@group"] <= 1
        assert 0 < with_it["preflight/acc"] < 1 and with_it["preflight/AQUA/too_long"] > 0.9
        for tag in "xy":
            for path in (sft / "chatrl_checkpoints" / tag).iterdir():
                path.unlink()
    out = capsys.readouterr().out
    for line in ("preflight\n", "AQUA: reward of 128 reference answers, of an empty one", "1.1, 0", "AQUA: single tokens behind 'Answer:'", "ABCDE",
                 "KL to the reference per token", "groups with signal"):
        assert line in out, line
    tables = [record["text"]["preflight"] for record in map(json.loads, (sft / "runs" / "rl_y.jsonl").read_text().splitlines()) if "preflight" in record.get("text", {})]
    assert len(tables) == 1 and all(set(row) == {"check", "result"} for row in tables[0])


def test_a_model_that_solves_nothing_is_refused_with_the_numbers_and_the_way_out(setting, monkeypatch):
    monkeypatch.setattr(AQUA, "rewards", lambda self, conversation, text: {"correct": float(text == text_of(conversation) or text == f"Answer: {conversation['answer_letter']}")})
    with pytest.raises(ValueError, match=r"not one of 4 sampled groups of 4 held both .* 52.7% .* accuracy 0.0%, 0.0% of groups .*; the problems are too hard .*--preflight=-1 skips"):
        setting()


@pytest.mark.parametrize("signal, message", [
    ([(0, 8, False)] * 32, "fewer than 8.9% .* too hard"), ([(8, 8, False)] * 32, "too easy"), ([(0, 8, False)] * 16 + [(8, 8, False)] * 16, "raise --temperature")])
def test_too_hard_too_easy_and_too_alike_are_told_apart(setting, signal, message):
    metrics, _ = summarize_signal(signal)
    with pytest.raises(ValueError, match=message):
        refuse_without_signal(metrics, Sampler(None, None, None, CPU, 8, 12))


def test_a_good_model_with_a_little_signal_left_is_not_refused():
    """pass@16 of 1 with one group in 32 that is not right throughout: RL can still learn from it."""
    metrics, rows = summarize_signal([(16, 16, False)] * 31 + [(15, 16, True)])
    refuse_without_signal(metrics, Sampler(None, None, None, CPU, 16, 12))
    assert metrics["preflight/pass@group"] == 1.0 and metrics["preflight/signal"] == 1 / 32 and rows[-1]["result"] == "3.1%"


def test_no_prompt_that_fits_is_an_error():
    with pytest.raises(ValueError, match="not one of the first prompts fits"):
        summarize_signal([])


@pytest.mark.parametrize("rewards, message", [
    (lambda conversation, text: {"correct": 0.0}, "the reference answer earns"),
    (lambda conversation, text: None, "the reference answer earns None"),
    (lambda conversation, text: {"correct": float(text == "" or conversation["answer_letter"] in text[-1:])}, "an empty completion earns"),
    (lambda conversation, text: {"correct": float("nswer: " in text)}, "earns .* where . is right")])
def test_a_judge_that_is_wrong_is_found_before_any_compute(setting, monkeypatch, rewards, message):
    monkeypatch.setattr(AQUA, "rewards", lambda self, *arguments: rewards(*arguments))
    monkeypatch.setattr(Engine, "generate", lambda *_: pytest.fail("something was sampled"))
    with pytest.raises(ValueError, match=message):
        setting()


def test_letters_of_two_tokens_are_found_before_any_compute(setting, monkeypatch):
    monkeypatch.setattr(Engine, "generate", lambda *_: pytest.fail("something was sampled"))
    monkeypatch.setattr("nanochat.tokenizer.Tokenizer.encode", lambda self, text, *rest: list(text.encode()))
    with pytest.raises(ValueError, match="'Answer: A' is 9 tokens, but it must be the 7 of 'Answer:' and one more"):
        setting()


def test_a_reference_that_is_not_the_policy_is_found(setting, monkeypatch):
    other = make_model(get_tokenizer()).requires_grad_(False)
    other.lm_head.weight += 0.01
    other.lm_head.weight[3] += 1.0
    monkeypatch.setattr(LetterTask, "rewards", lambda self, conversation, text: {"correct": float(text == text_of(conversation) or text == f"Answer: {conversation['answer_letter']}"
                                                                                                 or "Answer" not in text and text.count("e") % 2 == 1)})
    with pytest.raises(ValueError, match="the KL to the reference is .* not 0"):
        setting(reference=other)
    rows, metrics = setting(reference=other, is_same=False)  # on purpose another one
    assert any("another model" in row["result"] for row in rows)
    rows, metrics = setting()
    assert {row["check"]: row["result"] for row in rows}["KL to the reference per token"] == "0"
    assert metrics["preflight/groups"] == 4


def test_the_share_of_reference_answers_that_do_not_fit_counts_their_end_token(base_directory):
    tokenizer, task = get_tokenizer(), load_tasks({"AQUA": 1.0})[0]["AQUA"]
    asked = [task[i] for i in range(20)]
    lengths = [len(tokenizer.encode(text_of(conversation), append="<|assistant_end|>")) for conversation in asked]
    for limit in (min(lengths) - 1, sorted(lengths)[10], max(lengths)):
        share, longest = too_long(asked, tokenizer, limit)
        assert abs(share - sum(length > limit for length in lengths) / 20) <= 0.1 and abs(longest - max(lengths)) <= 1  # parts may join otherwise than the text
    assert too_long(asked, tokenizer, max(lengths) + 1)[0] == 0.0


def test_a_task_without_letters_passes_with_its_own_reference_answers():
    asked = [{"messages": [{"role": "user", "content": "1+1"}, {"role": "assistant", "content": "#### 2"}]}]
    rows = check_rewards("GSM8K", asked, lambda conversation, text: {"correct": float(text == "#### 2")}, text_of)
    assert [row["result"] for row in rows] == ["1, 0"]
