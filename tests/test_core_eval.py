"""Likelihood scoring against one sequence at a time, CORE's prompts and numbers on cases solved by hand, bundles good and bad."""
import json
import math
import os
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanochat.common import Compute
from nanochat.core_bundle import CORE_LABELS, CoreTask, Item, load_bundle
from nanochat.core_eval import core_score, crop, draw_examples, evaluate_task, render, render_blind, task_numbers, to_record, tokenize
from nanochat.gpt import GPT, GPTConfig
from nanochat.likelihood import GPTScorer, Score, Sequence, pack, score
from nanochat.tokenizer import Tokenizer

DATA = Path(os.environ.get("NANOCHAT_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
CPU = Compute(torch.device("cpu"), torch.float32)
WORDS = "the cat sat on a mat and Question: Which is right? Answer: A B C D yes no\n".split(" ")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([" ".join(WORDS)] * 20, 300)


def random_model(vocab_size, sequence_len=256, dtype=torch.float32):
    model = GPT(GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, n_layer=2, n_head=4, n_kv_head=2, n_embd=32), dtype)
    model.init_weights()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("c_proj.weight") or name == "lm_head.weight":  # they start at zero, where all tokens are equally likely
            torch.nn.init.normal_(weight, std=0.4, generator=generator)
    model.fill_rotary_table()
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def scorer(tokenizer):
    return GPTScorer(random_model(tokenizer.vocab_size), tokenizer)


def alone(model, sequence):
    """One sequence by one plain pass of the whole model."""
    logits = model(torch.tensor([sequence.tokens[:-1]])).double()
    targets = torch.tensor(sequence.tokens[sequence.start:])
    logits = logits[0, sequence.start - 1:]
    return Score(-F.cross_entropy(logits, targets, reduction="sum").item(), len(targets), bool((logits.argmax(-1) == targets).all()))


def random_item(draw, vocab_size, longest):
    """Sequences with a common beginning of any length, with equal rests, one-token rests and scored tokens inside the beginning."""
    shared = [draw.randrange(vocab_size) for _ in range(draw.randint(1, longest // 2))]
    rests = [[draw.randrange(3) for _ in range(draw.randint(1, draw.choice((1, 4, longest // 2))))] for _ in range(draw.randint(1, 5))]
    start = draw.randint(1, len(shared))
    return [Sequence(shared + rest, start if draw.random() < 0.3 else len(shared)) for rest in rests]


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood

@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_packed_in_batches_scores_as_one_at_a_time(scorer, batch_tokens):
    draw = random.Random(batch_tokens)
    items = [random_item(draw, scorer.model.config.vocab_size, 60) for _ in range(25)]
    finished = {}
    results = score(scorer, items, batch_tokens, finished.__setitem__)
    assert finished == dict(enumerate(results)) and list(map(len, results)) == list(map(len, items))
    for sequences, scores in zip(items, results):
        for sequence, got in zip(sequences, scores):
            expected = alone(scorer.model, sequence)
            assert got.logprob == pytest.approx(expected.logprob, abs=1e-4, rel=1e-6) and got[1:] == expected[1:]


def test_in_float64_packed_and_alone_agree_to_a_billionth(tokenizer):
    scorer = GPTScorer(random_model(tokenizer.vocab_size, dtype=torch.float64), tokenizer)
    draw = random.Random(1)
    items = [random_item(draw, tokenizer.vocab_size, 60) for _ in range(10)]
    for sequences, scores in zip(items, score(scorer, items)):
        assert [one.logprob for one in scores] == pytest.approx([alone(scorer.model, sequence).logprob for sequence in sequences], abs=1e-9)


def test_a_row_holds_the_shared_tokens_and_equal_rests_once():
    row = pack([Sequence([1, 2, 3, 7, 9], 3), Sequence([1, 2, 3, 8], 3), Sequence([1, 2, 3, 7, 5], 3), Sequence([1, 2, 3], 1)])
    assert row.tokens == [1, 2, 3, 7, 3] and row.positions == [0, 1, 2, 3, 2] and row.branches == [0, 0, 1, 1, 2]
    assert row.columns == [[2, 3], [4], [2, 3], [0, 1]] and row.targets == [[7, 9], [8], [7, 5], [2, 3]]
    letters = pack([Sequence([1, 2, 3, letter], 3) for letter in (7, 8, 9)])
    assert letters.tokens == [1, 2, 3] and letters.columns == [[2]] * 3 and letters.targets == [[7], [8], [9]] and not letters.has_branches
    answers = pack([Sequence([1, 2, 3, 4, 5], 3), Sequence([1, 2, 3, 6, 7, 8], 3)])
    assert answers.tokens == [1, 2, 3, 4, 6, 7] and answers.positions == [0, 1, 2, 3, 3, 4] and answers.branches == [0, 0, 0, 1, 2, 2]
    assert answers.columns == [[2, 3], [2, 4, 5]] and answers.targets == [[4, 5], [6, 7, 8]]


def test_a_sequence_that_cannot_be_scored_is_refused(scorer):
    for sequence, said in ((Sequence([1, 2], 0), "at least one"), (Sequence([1, 2], 2), "at least one"), (Sequence([1] * 258, 5), "does not fit the model's 256")):
        with pytest.raises(ValueError, match=said):
            score(scorer, [[sequence]])
