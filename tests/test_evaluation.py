"""The statistics on cases solved by hand and by brute force; problems answered, read, shared among ranks, interrupted, compared."""
import itertools
import json
import math
import os
import random
import re
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.compute import Compute
from nanochat.configurator import parse
from nanochat.engine import Completion, Engine
from nanochat.gpt import GPT, GPTConfig
from nanochat.statistics import (accuracy_interval, centred, clustered_error, compare, confusion, majority_at_k, majority_share, mcnemar, most_common,
                                 paired_bootstrap, paired_permutation, pass_at_k, percent, powers_of_two, verdict, wilson_interval)
from nanochat.tokenizer import Tokenizer
from nanochat.training import LoopState
from scripts import chat_eval
from tasks.aqua import split_choices
from tasks.common import get_task, message_text
from tasks.evaluation import Settings, answer_tokens, evaluate, letter_logprobs, quick_accuracy, variants
from tasks.metrics import summarize
from tests import recompute

ROOT = Path(__file__).parents[1]
DATA = Path(os.environ.get("NANOCHAT_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
CPU = Compute(torch.device("cpu"), torch.float32)


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

@pytest.mark.parametrize("correct, n", [(69, 254), (0, 40), (40, 40), (1, 3), (20.5, 100)])
def test_wilson_holds_the_shares_from_which_the_count_is_not_surprising(correct, n):
    low, high = wilson_interval(correct, n)
    share = correct / n
    surprise = [abs(share - true) / math.sqrt(true * (1 - true) / n) for true in (low, high) if 0 < true < 1]
    assert all(math.isclose(value, 1.959963984540054, rel_tol=1e-9) for value in surprise) and surprise
    assert 0 <= low <= share <= high <= 1


def test_always_a_on_254_problems_is_uncertain_by_five_points():
    low, high = wilson_interval(69, 254)
    assert (round(100 * low, 1), round(100 * high, 1)) == (22.1, 32.9)
    with pytest.raises(ValueError, match="no share"):
        wilson_interval(3, 2)


def test_pass_at_k_is_the_share_of_subsets_that_hold_a_right_one():
    for n in range(1, 8):
        for correct, k in itertools.product(range(n + 1), range(1, n + 1)):
            subsets = list(itertools.combinations([True] * correct + [False] * (n - correct), k))
            assert math.isclose(pass_at_k(n, correct, k), sum(map(any, subsets)) / len(subsets), abs_tol=1e-12)
    with pytest.raises(ValueError, match="pass@5"):
        pass_at_k(4, 1, 5)


def test_a_majority_shares_its_place_and_none_never_votes():
    assert majority_share(["A", "B", "A"], "A") == 1 and majority_share(["A", "B", "A"], "B") == 0
    assert majority_share(["A", "B"], "B") == 0.5 and majority_share([None, None, "C"], "C") == 1
    assert majority_share([None, None], "A") == 0 and majority_share([], "A") == 0
    assert majority_at_k(["A", "B", "B", "B"], "B", 2) == 0.75 and majority_at_k(["A", "B", "B", "B"], "B", 1) == 0.75
    assert majority_at_k(["A", "A", "B"], "A", 2) == 1 and majority_at_k(["A", "B", "B"], "B", 3) == 1
    assert powers_of_two(6) == [1, 2, 4, 6] and powers_of_two(8) == [1, 2, 4, 8] and powers_of_two(1) == [1]


def test_mcnemar_is_a_coin_thrown_for_each_problem_that_only_one_solves():
    for only_first, only_second in itertools.product(range(6), range(6)):
        first = [1] * only_first + [0] * only_second + [1, 0]
        second = [0] * only_first + [1] * only_second + [1, 0]
        n = only_first + only_second
        tosses = [abs(2 * sum(toss) - n) for toss in itertools.product((0, 1), repeat=n)]
        expected = sum(toss >= abs(only_first - only_second) for toss in tosses) / len(tosses)
        assert math.isclose(mcnemar(first, second), expected)
        assert math.isclose(paired_permutation(first, second), expected)
    assert mcnemar([1] + [0] * 5, [0] + [1] * 5) == 2 * (1 + 6) / 64
    assert mcnemar([0] * 5000, [1] * 5000) == pytest.approx(0, abs=1e-300)      # no overflow


def test_sampled_permutations_come_near_the_exact_ones():
    r = random.Random(0)
    first = [r.random() for _ in range(15)]
    second = [value + r.gauss(0.15, 0.4) for value in first]
    exact = paired_permutation(first, second)
    observed = abs(sum(second) - sum(first))
    brute = np.mean([abs(sum(sign * (b - a) for sign, a, b in zip(signs, first, second))) >= observed - 1e-9 for signs in itertools.product((1, -1), repeat=15)])
    assert exact == brute
    sampled = paired_permutation([*first, *first], [*second, *second])          # 30 differences: sampled
    assert 0 < sampled < exact and sampled == paired_permutation([*first, *first], [*second, *second])


def test_the_bootstrap_interval_is_that_of_a_normal_mean():
    r = np.random.default_rng(1)
    first, noise = r.normal(size=400), r.normal(size=400)
    difference, low, high = paired_bootstrap(first, first + 0.1 + noise)
    error = np.std(noise) / math.sqrt(400)
    assert math.isclose(difference, 0.1 + noise.mean())
    assert low == pytest.approx(difference - 1.96 * error, abs=0.01) and high == pytest.approx(difference + 1.96 * error, abs=0.01)
    assert paired_bootstrap([1, 0, 1], [1, 0, 1]) == (0, 0, 0)


def test_samples_of_a_problem_are_no_problems():
    shares = [1.0] * 30 + [0.0] * 70
    assert clustered_error(shares) == pytest.approx(math.sqrt(0.3 * 0.7 / 99))
    assert accuracy_interval(shares) == (0.3, *wilson_interval(30, 100))        # K equal samples change nothing
    r = np.random.default_rng(0)
    many = r.binomial(16, 0.3, size=100) / 16                                   # 16 independent samples do
    mean, low, high = accuracy_interval(many)
    assert (high - low) == pytest.approx(2 * 1.96 * math.sqrt(0.3 * 0.7 / 1600), rel=0.2)
    assert accuracy_interval([0.0] * 50) == (0.0, *wilson_interval(0, 50)) and accuracy_interval([1.0]) == (1.0, *wilson_interval(1, 1))


def test_counts_of_letters():
    assert most_common(["B", "A", None, "B", "A"]) == ("A", 0.4) and most_common([None]) == (None, 0.0)
    assert confusion("AABB", ["A", None, "A", "B"]) == {"A": {"A": 1, "none": 1}, "B": {"A": 1, "B": 1}}
    assert centred(0.2, 0.2) == 0 and centred(1, 0.25) == 1 and centred(0, 0.2) == -0.25


def metrics_of(correct, n, constant=0.27, random_accuracy=0.2):
    accuracy, low, high = accuracy_interval([1.0] * correct + [0.0] * (n - correct))
    return {"accuracy": accuracy, "ci_low": low, "ci_high": high, "best_constant": {"letter": "A", "share": constant}, "random_accuracy": random_accuracy}


def test_the_verdict_is_above_only_if_the_whole_interval_is():
    assert "no evidence that the questions are understood" in verdict(metrics_of(69, 254))
    assert "is above the best constant answer (A, 27.00 %)" in verdict(metrics_of(150, 254))
    assert "is below the best constant answer" in verdict(metrics_of(20, 254))
    assert "above guessing (20.00 %)" in verdict(metrics_of(150, 254, constant=0.1))
    assert "could be chance (p = 0.3)" in verdict({**metrics_of(150, 254), "p_against_constant": 0.3})
    assert "score nothing" in verdict({**metrics_of(10, 20, 0.0, 0.0), "best_constant": None})


def test_b_beats_a_only_beyond_noise():
    solved = [1] * 50 + [0] * 50
    better = compare(solved, [1] * 70 + [0] * 30)
    assert better["verdict"].startswith("B beats A beyond noise: B - A = +20.00 points [") and "exact McNemar" in better["verdict"]
    assert better["effect"] == "Cohen's g" and better["effect_size"] == 0.5 and compare(solved, solved)["effect_size"] is None
    means = compare([0.0, 0.5, 0.5, 1.0], [0.5, 0.5, 1.0, 1.0])
    assert means["effect"] == "Cohen's d_z" and means["effect_size"] == pytest.approx(0.25 / np.std([0.5, 0, 0.5, 0], ddof=1)) and "d_z = +0.87" in means["verdict"]
    assert better["ci_low"] > 0 and (better["only_a"], better["only_b"]) == (0, 20)
    assert compare([1] * 70 + [0] * 30, solved)["verdict"].startswith("A beats B beyond noise")
    assert compare(solved, [1] * 53 + [0] * 47)["verdict"].startswith("no difference beyond noise: B - A = +3.00")
    assert compare(solved, solved)["p"] == 1 and compare([0.25, 0.5], [0.5, 0.5])["test"] == "paired permutation"


# ---------------------------------------------------------------------------------------------------------------------
# Answering

@pytest.fixture(scope="module")
def tokenizer():
    lines = [f"{question}\nAnswer: {letter}\nAnswer: {letter} - 12={letter} Reason, then end with the line" for letter in "ABCDE" for question in ("one", "two")]
    return Tokenizer.train(lines * 20, 400)


@pytest.fixture(scope="module")
def model(tokenizer):
    model = GPT(GPTConfig(sequence_len=2048, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights()
    torch.nn.init.normal_(model.lm_head.weight, std=0.5, generator=torch.Generator().manual_seed(0))  # it starts at 0, where all letters are equal
    for block in model.transformer.h:                                           # so do these: without them every prompt reads the same
        torch.nn.init.normal_(block.attn.c_proj.weight, std=0.3, generator=torch.Generator().manual_seed(1))
    return model.eval()


class ScriptedEngine:
    """Answers each prompt by a function of its text, and counts what it was asked."""

    def __init__(self, model, tokenizer, answer, stop_after=None):
        self.model, self.tokenizer, self.answer, self.stop_after, self.asked = model, tokenizer, answer, stop_after, []

    def generate(self, requests, on_finish=None):
        for place, request in enumerate(requests):
            if self.stop_after is not None and len(self.asked) >= self.stop_after:
                raise KeyboardInterrupt
            prompt = self.tokenizer.decode(request.tokens)
            self.asked.append(prompt)
            for sample in range(request.num_samples):
                text = self.answer(prompt, sample)
                on_finish(place, sample, Completion(self.tokenizer.encode(text), [0] * text.count("<|output_end|>"), [], "stop", text))


def always(letter):
    return lambda prompt, sample: f"Because.\nAnswer: {letter}"


def choice_of(text):
    """An answer that finds the letter behind the choice with this text."""
    def answer(prompt, sample):
        found = re.search(rf"- {re.escape(text(prompt))}=([A-E])", prompt)
        return f"It is.\nAnswer: {found[1]}" if found else "I do not know."
    return answer


def algebra(size=30):
    return get_task("ALGEBRA", split="validation", stop=size)


def run(task, engine, tokenizer, compute=CPU, **settings):
    return evaluate(task, engine, tokenizer, compute, Settings(**{"letters": False, **settings}))


def test_always_a_scores_the_share_of_a_and_the_verdict_says_so(model, tokenizer):
    records = run(algebra(), ScriptedEngine(model, tokenizer, always("A")), tokenizer)
    metrics = summarize(records, 0.2)
    assert metrics["accuracy"] == 0.2 and metrics["random_accuracy"] == pytest.approx(0.2)
    assert metrics["letters_pred"] == {"A": 30, "B": 0, "C": 0, "D": 0, "E": 0, "none": 0} and metrics["letters_gold"] == dict.fromkeys("ABCDE", 6)
    assert metrics["best_constant"] == {"letter": "A", "share": 0.2} and metrics["p_against_constant"] == 1 and metrics["parse_failures"] == 0
    assert "no evidence" in verdict(metrics)


def test_always_a_on_aqua_is_the_best_constant_at_27_17(model, tokenizer):
    if not (DATA / "aqua" / "validation.jsonl").is_file():
        pytest.skip("the real data is not here")
    task = get_task("AQUA", split="validation", data_dir=DATA / "aqua")
    metrics = summarize(run(task, ScriptedEngine(model, tokenizer, always("A")), tokenizer), task.random_accuracy)
    assert metrics["best_constant"]["letter"] == "A" and percent(metrics["best_constant"]["share"]) == "27.17 %" == percent(metrics["accuracy"])
    assert metrics["letters_gold"] == {"A": 69, "B": 66, "C": 43, "D": 50, "E": 26} and "no evidence" in verdict(metrics)


def test_controls_tell_reading_from_letters(model, tokenizer):
    task = algebra(20)
    rights = {conversation["messages"][0]["content"].split("\n- ")[0]: conversation for conversation in task}

    def right_text(prompt):
        question = next((question for question in rights if question in prompt), None)
        if question is None:
            return "?"                                  # blind: nothing to go by
        _, choices, _ = split_choices(rights[question]["messages"][0]["content"], rights[question]["letters"])
        return choices[rights[question]["letters"].index(rights[question]["answer_letter"])]

    engine = ScriptedEngine(model, tokenizer, choice_of(right_text))
    metrics = summarize(run(task, engine, tokenizer, controls=True))
    assert len(engine.asked) == 20 * 6
    assert metrics["accuracy"] == 1 and metrics["shift_accuracy"] == [1.0] * 5 and metrics["shift_agreement"] == 1
    assert metrics["question_blind"]["accuracy"] == 0 and metrics["controlled"] == 20
    few = ScriptedEngine(model, tokenizer, choice_of(right_text))
    metrics = summarize(run(task, few, tokenizer, controls=True, control_problems=7))
    assert len(few.asked) == 20 + 7 * 5 and metrics["controlled"] == 7 and metrics["accuracy"] == 1
    metrics = summarize(run(task, ScriptedEngine(model, tokenizer, always("B")), tokenizer, controls=True))
    assert metrics["shift_agreement"] == 0 and metrics["shift_accuracy"] == [0.2] * 5 and metrics["question_blind"]["accuracy"] == 0.2


def test_the_blind_prompt_has_the_options_and_nothing_of_the_question():
    conversation = algebra()[0]
    blind = message_text(variants(conversation, True)["blind"]["messages"][0])
    question, choices, after = split_choices(message_text(conversation["messages"][0]), conversation["letters"])
    assert blind.startswith(f"- {choices[0]}=A\n") and blind.endswith(after) and question not in blind
    assert list(variants(conversation, True)) == ["given", "blind", "shift 1", "shift 2", "shift 3", "shift 4"] and list(variants(conversation, False)) == ["given"]


def test_samples_give_pass_and_majority(model, tokenizer):
    engine = ScriptedEngine(model, tokenizer, lambda prompt, sample: "Answer: A" if sample < 3 else "who knows")
    metrics = summarize(run(algebra(), engine, tokenizer, num_samples=4, temperature=1.0))
    assert metrics["accuracy"] == pytest.approx(0.15) and metrics["parse_failures"] == 0.25
    assert metrics["pass@k"] == {"1": pytest.approx(0.15), "2": pytest.approx(0.2), "4": pytest.approx(0.2)}
    assert metrics["maj@k"]["4"] == pytest.approx(0.2) and metrics["standard_error"] == pytest.approx(0.3 / math.sqrt(29))


def test_answers_in_which_the_calculator_spoke_are_counted(model, tokenizer):
    engine = ScriptedEngine(model, tokenizer, lambda prompt, sample: "<|python_start|>1+1<|python_end|><|output_start|>2<|output_end|>\nAnswer: A" if sample == 0 else "Answer: A")
    records = run(algebra(), engine, tokenizer, num_samples=4, temperature=1.0)
    metrics = summarize(records)
    assert metrics["tool_use"] == 0.25 and "the calculator answered in 25.00 % of the completions" in chat_eval.details({"metrics": metrics, "n": len(records)})
    assert "tool_use" not in summarize(run(algebra(), ScriptedEngine(model, tokenizer, always("A")), tokenizer))


def test_settings_that_make_no_sense_say_so():
    with pytest.raises(ValueError, match="4 equal answers"):
        Settings(num_samples=4)
    with pytest.raises(ValueError, match="generative or categorical"):
        Settings(mode="neither")
    with pytest.raises(ValueError, match="at least 1"):
        Settings(max_new_tokens=0)


class Rank(Compute):
    """A rank whose gather is done by hand afterwards."""

    def gather_objects(self, value):
        return [value]


@pytest.mark.parametrize("world_size", [2, 3])
def test_any_number_of_ranks_gives_the_same_answers(model, tokenizer, world_size):
    settings = Settings(temperature=1.0, num_samples=2, max_new_tokens=12)
    task = algebra(8)
    alone = evaluate(task, Engine(model, tokenizer, max_rows=5), tokenizer, CPU, settings)
    parts = [evaluate(task, Engine(model, tokenizer), tokenizer, Rank(CPU.device, CPU.dtype, rank, rank, world_size), settings) for rank in range(world_size)]
    together = sorted(itertools.chain(*parts), key=lambda record: record["index"])
    assert [record["completions"] for record in together] == [record["completions"] for record in alone]
    for one, other in zip(together, alone):
        assert one["no_reasoning"]["logprobs"] == pytest.approx(other["no_reasoning"]["logprobs"], abs=2e-4)
    assert len({completion["text"] for record in alone for completion in record["completions"]}) > 8      # they do differ


def test_an_interrupted_evaluation_asks_only_for_what_is_missing(model, tokenizer):
    task, kept = algebra(10), {}

    def keep(record):
        kept[record["index"]] = json.loads(json.dumps(record))

    whole = run(task, ScriptedEngine(model, tokenizer, always("C")), tokenizer, controls=True)
    with pytest.raises(KeyboardInterrupt):
        evaluate(task, ScriptedEngine(model, tokenizer, always("C"), stop_after=23), tokenizer, CPU, Settings(letters=False, controls=True), {}, keep)
    rest = ScriptedEngine(model, tokenizer, always("C"))
    assert evaluate(task, rest, tokenizer, CPU, Settings(letters=False, controls=True), kept) == whole
    assert len(rest.asked) == 60 - 23
    kept[3]["prompt"] = "another problem"                                       # the data changed meanwhile
    assert evaluate(task, rest, tokenizer, CPU, Settings(letters=False, controls=True), kept) == whole


def test_a_prompt_that_fills_the_context_counts_as_wrong(model, tokenizer, tmp_path):
    rows = [{"question": "one " * length, "options": ["A)1", "B)2", "C)3"], "rationale": "", "correct": "B"} for length in (3, 2100)]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = get_task("AQUA", split="test", data_dir=tmp_path)
    for mode in ("generative", "categorical"):
        records = run(task, ScriptedEngine(model, tokenizer, always("B")), tokenizer, mode=mode, letters=True, controls=True)
        metrics = summarize(records)
        assert metrics["too_long"] == 1 and metrics["accuracy"] <= 0.5 and metrics["no_reasoning_n"] == 1
    assert metrics["random_accuracy"] == pytest.approx(1 / 3)


def test_the_log_of_a_training_run_gets_a_small_accuracy(model, tokenizer):
    engine = ScriptedEngine(model, tokenizer, always("A"))
    metrics = quick_accuracy(algebra(), engine, tokenizer, CPU, 10, 16)
    assert len(engine.asked) == 10 and metrics["eval/accuracy"] == 0.2 and metrics["eval/parse_failures"] == 0
    assert all(name.startswith("eval/") and isinstance(value, float) for name, value in metrics.items())


# ---------------------------------------------------------------------------------------------------------------------
# Reading letters

def test_letters_read_in_batches_are_those_read_alone(model, tokenizer):
    task = algebra(9)
    prompts = [tokenizer.render_for_completion(conversation) for conversation in task]
    letters = [["A", "B", "C", "D", "E"][:2 + i % 4] for i in range(9)]
    batched = letter_logprobs(model, tokenizer, prompts, letters, batch_size=4)
    for prompt, names, logprobs in zip(prompts, letters, batched):
        ids = prompt + tokenizer.encode("Answer: A")
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]]))[0, -1].float()
        expected = torch.log_softmax(torch.stack([logits[tokenizer.encode(f"Answer: {name}")[-1]] for name in names]), 0)
        assert list(logprobs) == names and list(logprobs.values()) == pytest.approx(expected.tolist(), abs=1e-4)
    assert len({max(logprobs, key=logprobs.get) for logprobs in batched}) > 1


def test_letters_of_more_than_one_token_are_refused_before_anything_is_written(model):
    plain = Tokenizer.train(["nothing here but small words"] * 10, 290)
    assert answer_tokens(plain, ["A"])[1]               # alone it could be told
    texts = ["Answer: A"] * 50
    uneven = Tokenizer.train(texts, 280)                # " A" became one token, " B" stayed two
    with pytest.raises(ValueError, match="cannot be compared by one probability"):
        answer_tokens(uneven, ["A", "B"])
    engine = ScriptedEngine(model, uneven, always("A"))
    with pytest.raises(ValueError, match="train the tokenizer"):
        run(algebra(3), engine, uneven, letters=True)
    assert engine.asked == []


def test_the_letter_is_read_without_and_after_the_models_own_reasoning(model, tokenizer):
    engine = ScriptedEngine(model, tokenizer, lambda prompt, sample: ("one two\nAnswer: B", "Answer: C", "cut off in the")[len(prompt) % 3])
    records = run(algebra(12), engine, tokenizer, letters=True)
    for record in records:
        text = record["completions"][0]["text"]
        assert set(record["no_reasoning"]["logprobs"]) == set("ABCDE")
        assert ("after_reasoning" in record) == (text != "Answer: C")           # nothing was said before that answer
    sample = next(record for record in records if record["completions"][0]["text"].startswith("one"))
    conversation = algebra(12)[sample["index"]]
    prompt = tokenizer.render_for_completion(conversation) + tokenizer.encode("one two\n")
    (expected,) = letter_logprobs(model, tokenizer, [prompt], [conversation["letters"]])
    assert sample["after_reasoning"]["logprobs"] == pytest.approx(expected, abs=1e-4)
    metrics = summarize(records)
    assert metrics["no_reasoning_n"] == 12 and 0 < metrics["after_reasoning_n"] < 12 and metrics["no_reasoning_margin"] > 0


def test_a_categorical_task_is_answered_without_writing(model, tokenizer, tmp_path):
    rows = [{"question": f"Which of {i}?", "choices": {"text": ["one", "two", "12"], "label": ["A", "B", "C"]}, "answerKey": "ABC"[i % 3]} for i in range(9)]
    (tmp_path / "arc_easy_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = ScriptedEngine(model, tokenizer, always("A"))
    records = run(get_task("ARC-Easy", split="test", data_dir=tmp_path), engine, tokenizer, controls=True)
    metrics = summarize(records, 0.25)
    assert engine.asked == [] and metrics["accuracy"] == metrics["no_reasoning"] and metrics["mean_tokens"] is None and metrics["parse_failures"] is None
    assert len(metrics["shift_accuracy"]) == 3 and metrics["random_accuracy"] == pytest.approx(1 / 3) and sum(metrics["letters_pred"].values()) == 9
    with pytest.raises(ValueError, match="no letters to compare"):
        run(get_task("SpellingBee", split="test", stop=3), engine, tokenizer, mode="categorical")


def test_multiple_choice_is_answered_both_ways_and_scored_as_the_task_says(model, tokenizer, tmp_path):
    rows = [{"question": f"Which of {i}?", "choices": {"text": ["one", "two", "12"], "label": ["A", "B", "C"]}, "answerKey": "ABC"[i % 3]} for i in range(9)]
    (tmp_path / "arc_easy_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    engine = ScriptedEngine(model, tokenizer, always("A"))
    records = run(get_task("ARC-Easy", split="test", data_dir=tmp_path), engine, tokenizer, mode="both", controls=True)
    metrics = summarize(records, 0.25)
    assert len(engine.asked) == 9                       # the controls are read, as the score is
    assert metrics["generative"]["accuracy"] == pytest.approx(1 / 3) and metrics["categorical"]["accuracy"] == metrics["accuracy"] == metrics["no_reasoning"]
    assert metrics["letters_pred"]["A"] == sum(record["no_reasoning"]["answer"] == "A" for record in records) and metrics["mean_tokens"] > 0
    records = run(algebra(5), ScriptedEngine(model, tokenizer, always("A")), tokenizer, mode="both", letters=True)
    metrics = summarize(records, 0.2)
    assert metrics["accuracy"] == metrics["generative"]["accuracy"] == 0.2 and "categorical" in metrics and "scored" not in records[0]


def test_a_group_of_problems_has_its_own_accuracy(model, tokenizer):
    metrics = summarize(run(algebra(30), ScriptedEngine(model, tokenizer, always("A")), tokenizer), 0.2)
    assert sum(group["n"] for group in metrics["by_level"].values()) == 30 and set(metrics["by_level"]) <= set("1234")
    assert sum(group["n"] * group["accuracy"] for group in metrics["by_level"].values()) == pytest.approx(6)


def test_equal_answers_vote_as_one_and_chance_is_that_of_the_problem(model, tokenizer, tmp_path):
    row = {"problem": "Half?", "level": "Level 1", "type": "Algebra", "solution": r"$\boxed{x+\frac{1}{2}}$"}
    (tmp_path / "test.jsonl").write_text(json.dumps(row))
    task = get_task("MATH", split="test", data_dir=tmp_path)
    texts = (r"\boxed{0.5+x}", r"\boxed{x + 1/2}", r"\boxed{7}", "none")
    (record,) = run(task, ScriptedEngine(model, tokenizer, lambda prompt, sample: texts[sample]), tokenizer, num_samples=4, temperature=1.0)
    assert [completion["answer"] for completion in record["completions"]] == [record["gold"], record["gold"], "7", None]
    assert summarize([record])["maj@k"]["4"] == 1 and summarize([record])["pass@k"]["1"] == 0.5
    assert summarize([{**record, "chance": 0.5}, {**record, "chance": 0.0}])["random_accuracy"] == 0.25


def test_progress_reaches_the_end_of_both_parts(model, tokenizer):
    seen = []
    evaluate(algebra(4), ScriptedEngine(model, tokenizer, always("A")), tokenizer, CPU, Settings(), progress=lambda *news: seen.append(news))
    assert seen[:4] == [("answers written", i, 4) for i in range(1, 5)] and seen[-1] == ("letters read", 8, 8)  # before and after reasoning


# ---------------------------------------------------------------------------------------------------------------------
# The script

@dataclass(frozen=True)
class AnyConfig:
    seed: int = 1


class NoOptimizer:
    def state_dict(self):
        return {}


@pytest.fixture
def base(tmp_path, monkeypatch, model, tokenizer):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    for name in ("AQUA_DATA_DIR", "NANOCHAT_AQUA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    tokenizer.save(tmp_path / "base" / "tokenizer")
    for stage in ("sft", "rl"):
        save_checkpoint(stage, "d2", LoopState(step=7), AnyConfig(), CPU, model, NoOptimizer(), tokenizer)
    return tmp_path / "base"


def arguments(*flags):
    return parse(chat_eval.Config, ["--device-type=cpu", "--dtype=float32", "-m", "12", *flags])


def test_flags_have_the_short_names_the_long_ones_and_a_bare_dash_dash():
    short = parse(chat_eval.Config, "-- -i rl -a AQUA -d float32 -t 0.5 -m 9 -n 3 -k 7 -b 2 -g d8 -s 60 -x 5 --device-type cpu".split())
    long = parse(chat_eval.Config, ("--source=rl --task-name=AQUA --dtype=float32 --temperature=0.5 --max_new_tokens=9 --num-samples=3 --top-k=7 --batch-size=2 "
                                    "--model-tag=d8 --step=60 --max-problems=5 --device_type=cpu").split())
    assert short == long and short.source == "rl" and short.top_k == 7 and short.step == 60
    assert parse(chat_eval.Config, ["--compare", "a", "b"]).compare == ("a", "b")


def test_the_script_writes_summary_answers_and_report_section_and_repeats_nothing(base, capsys, monkeypatch):
    flags = ("-i", "sft", "-a", "ALGEBRA|SpellingBee", "-x", "6", "-n", "2", "-t", "1.0", "--controls")
    chat_eval.main(arguments(*flags))
    summary = json.loads((base / "eval" / "sft_d2_ALGEBRA.json").read_text())
    assert {"stage", "model_tag", "step", "task", "split", "n", "metrics", "settings", "verdict", "samples", "time"} <= set(summary)
    assert (summary["stage"], summary["model_tag"], summary["step"], summary["split"], summary["n"]) == ("sft", "d2", 7, "validation", 6)
    assert {"accuracy", "ci_low", "ci_high", "best_constant", "random_accuracy", "no_reasoning", "parse_failures", "letters_pred", "letters_gold", "mean_tokens",
            "pass@k", "maj@k", "question_blind", "shift_accuracy"} <= set(summary["metrics"])
    answers = [json.loads(line) for line in (base / "eval" / "sft_d2_ALGEBRA_answers.jsonl").read_text().splitlines()]
    assert [record["index"] for record in answers] == list(range(6)) and all(len(record["completions"]) == 2 for record in answers)
    assert "ALGEBRA validation" in json.loads((base / "report" / "chat_eval_sft.json").read_text())["markdown"]
    output = capsys.readouterr().out
    assert "best constant" in output and "mean of 2 centred accuracies" in output and not list((base / "eval").glob("*.partial"))

    asked = []
    monkeypatch.setattr(Engine, "generate", lambda self, requests, on_finish=None: asked.extend(requests))
    chat_eval.main(arguments(*flags))
    assert asked == []
    repeated = json.loads((base / "eval" / "sft_d2_ALGEBRA.json").read_text())
    assert repeated["metrics"] == summary["metrics"]


def test_a_killed_evaluation_goes_on_and_ends_the_same(base, monkeypatch):
    flags = ("-i", "sft", "-a", "ALGEBRA", "-x", "8")
    whole = chat_eval.main(arguments(*flags))
    answers = (base / "eval" / "sft_d2_ALGEBRA_answers.jsonl").read_text()
    (base / "eval" / "sft_d2_ALGEBRA_answers.jsonl").unlink()
    real, asked = Engine.generate, []

    def dies(self, requests, on_finish):
        real(self, requests[:5], on_finish)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Engine, "generate", dies)
        chat_eval.main(arguments(*flags))
    (partial,) = (base / "eval").glob("*.partial")
    with open(partial, "a") as file:
        file.write('{"index": 7, "torn')
    monkeypatch.setattr(Engine, "generate", lambda self, requests, on_finish: (asked.extend(requests), real(self, requests, on_finish)))
    again = chat_eval.main(arguments(*flags))
    assert len(asked) == 3 and again[0]["metrics"] == whole[0]["metrics"]
    assert (base / "eval" / "sft_d2_ALGEBRA_answers.jsonl").read_text() == answers
    chat_eval.main(arguments(*flags, "--seed", "1"))
    assert len(asked) == 3 + 8                          # other settings: nothing old counts


def test_two_evaluations_are_compared_by_problem(base, capsys):
    for stage in ("sft", "rl"):
        chat_eval.main(arguments("-i", stage, "-a", "ALGEBRA", "-x", "6"))
    result = chat_eval.main(arguments("--compare", "sft_d2_ALGEBRA", str(base / "eval" / "rl_d2_ALGEBRA.json")))
    assert result["n"] == 6 and result["difference"] == 0 and result["p"] == 1
    assert "no difference beyond noise" in capsys.readouterr().out
    chat_eval.main(arguments("-i", "rl", "-a", "SpellingBee", "-x", "6"))
    with pytest.raises(ValueError, match="0 problems in common"):
        chat_eval.main(arguments("--compare", "sft_d2_ALGEBRA", "rl_d2_SpellingBee"))
    with pytest.raises(ValueError, match="neither a file of answers nor one of the 3 evaluations"):
        chat_eval.main(arguments("--compare", "sft_d2_ALGEBRA", "sft_d9_ALGEBRA"))


def test_of_the_default_tasks_those_without_data_are_named_and_left_out(base, capsys, tmp_path):
    (tmp_path / "data" / "arc").mkdir(parents=True)
    row = {"question": "Which?", "choices": {"text": ["one", "two"], "label": ["A", "B"]}, "answerKey": "B"}
    (tmp_path / "data" / "arc" / "arc_easy_test.jsonl").write_text(json.dumps(row) + "\n")
    summaries = chat_eval.main(arguments("-x", "3", "--data-dir", str(tmp_path / "data")))
    assert {"ARC-Easy", "SpellingBee"} == {summary["task"] for summary in summaries}
    output = capsys.readouterr().out
    assert all(f"{name} is left out: " in output for name in ("ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "AQUA"))
    assert "mean of 2 centred accuracies (ChatCORE needs all of its 7 tasks)" in output
    with pytest.raises(ValueError, match="test.jsonl is not there"):
        chat_eval.main(arguments("-a", "GSM8K", "--data-dir", str(tmp_path / "data")))
    with pytest.raises(ValueError, match="there is no stage 'stf'"):
        chat_eval.main(arguments("-i", "stf", "-a", "SpellingBee"))


def test_chatcore_is_the_mean_over_all_seven_whole_tasks():
    summaries = [{"task": name, "metrics": {"accuracy": 0.6, "random_accuracy": 0.2}} for name in chat_eval.CHATCORE]
    assert chat_eval.mean_centred(summaries, True) == {"name": "ChatCORE", "value": pytest.approx(0.5)}
    assert chat_eval.mean_centred(summaries, False)["name"].startswith("mean of 7")
    assert chat_eval.mean_centred(summaries[1:], True)["name"].startswith("mean of 6") and "AQUA" in chat_eval.CHATCORE


# ---------------------------------------------------------------------------------------------------------------------
# The whole, as a user runs it

@pytest.mark.parametrize("flags", [("-a", "ALGEBRA|SpellingBee|ARC-Easy", "-x", "20", "--controls", "--control-problems=12"), ("-a", "ALGEBRA|SpellingBee", "-x", "9", "-n", "5", "-t", "1.0")])
def test_an_independent_script_finds_every_number_of_the_summary_in_the_answers(base, flags, tmp_path):
    (tmp_path / "data" / "arc").mkdir(parents=True)
    rows = [{"question": f"Which of {i}?", "choices": {"text": ["one", "two", "12"][:2 + i % 2], "label": ["A", "B", "C"][:2 + i % 2]}, "answerKey": "AB"[i % 2]} for i in range(12)]
    (tmp_path / "data" / "arc" / "arc_easy_test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for summary in chat_eval.main(arguments(*flags, "--data-dir", str(tmp_path / "data"))):
        lines, count = recompute.check(base / "eval" / f"sft_d2_{summary['task']}.json")
        assert lines == [] and count >= 9
    path = base / "eval" / "sft_d2_ALGEBRA.json"
    altered = json.loads(path.read_text())
    altered["metrics"]["ci_high"] += 0.001
    altered["metrics"]["new"] = 1
    path.write_text(json.dumps(altered))
    assert len(recompute.check(path)[0]) == 2           # it does look


def command(*flags):
    return [sys.executable, "-m", "scripts.chat_eval", "--device-type=cpu", "--dtype=float32", "-m", "12", *flags]


def test_an_evaluation_killed_by_signal_9_repeats_no_answer(base):
    flags = ("-a", "ALGEBRA", "-x", "60", "-b", "4", "--controls")
    with open(base / "log", "w") as log, subprocess.Popen(command(*flags), cwd=ROOT, stdout=log, stderr=log) as process:
        partial, deadline = base / "eval" / "sft_d2_ALGEBRA_answers.rank0.partial", time.monotonic() + 600
        while (not partial.exists() or partial.read_text().count("\n\n") < 40) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.kill()
    assert process.returncode == -9, (base / "log").read_text()
    kept = [json.loads(line) for line in partial.read_text().split("\n") if line.endswith("}")]
    done = {record["index"]: record for record in kept}  # of each problem the last line holds most
    written = sum(("completions" in record) + len(record.get("controls", {})) for record in done.values())
    assert 30 < written < 60 * 6 and not (base / "eval" / "sft_d2_ALGEBRA.json").exists()
    asked, real = [], Engine.generate
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Engine, "generate", lambda self, requests, on_finish: (asked.extend(requests), real(self, requests, on_finish)))
        chat_eval.main(arguments(*flags))
    assert len(asked) == 60 * 6 - written
    final = [json.loads(line) for line in (base / "eval" / "sft_d2_ALGEBRA_answers.jsonl").read_text().splitlines()]
    assert [record["index"] for record in final] == list(range(60)) and not partial.exists()
    assert all(final[index]["completions"] == record["completions"] for index, record in done.items() if "completions" in record)
    assert recompute.check(base / "eval" / "sft_d2_ALGEBRA.json")[0] == []


@pytest.mark.slow
def test_two_ranks_of_torchrun_say_what_one_process_says(base):
    flags = ("-a", "ALGEBRA|SpellingBee", "-x", "14", "-n", "2", "-t", "0.8", "--controls")
    chat_eval.main(arguments(*flags))
    paths = [base / "eval" / f"sft_d2_{task}{ending}" for task in ("ALGEBRA", "SpellingBee") for ending in ("_answers.jsonl", ".json")]
    alone = [path.read_text() for path in paths]
    for path in paths:
        path.unlink()
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts.chat_eval", "--"]
    result = subprocess.run([*launcher, *command(*flags)[3:]], cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    for path, text in zip(paths, alone):
        if path.suffix == ".jsonl":
            for one, other in zip(map(json.loads, path.read_text().splitlines()), map(json.loads, text.splitlines()), strict=True):
                assert one["completions"] == other["completions"] and one.get("controls") == other.get("controls")
        else:
            assert json.loads(path.read_text())["metrics"]["accuracy"] == json.loads(text)["metrics"]["accuracy"]
    assert not list((base / "eval").glob("*.partial")) and result.stdout.count("ALGEBRA validation: 14 problems") == 1
