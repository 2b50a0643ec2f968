"""A prompt computed once for its whole group gives the log-probabilities and the gradient of the plain rows."""
import random

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.rl.rollout import Rollout, make_batches
from nanochat.rl.shared_prompt import make_shared_batches


def rollouts(groups, seed=0, vocab_size=96):
    """`groups`: [(prompt length, [completion lengths])]; one token in five is forced by a tool."""
    draw, result = random.Random(seed), []
    for prompt_length, lengths in groups:
        prompt = [draw.randrange(vocab_size) for _ in range(prompt_length)]
        for length in lengths:
            tokens = [draw.randrange(vocab_size) for _ in range(length)]
            mask = [int(draw.random() < 0.8) for _ in range(length)]
            result.append(Rollout(prompt, tokens, mask, [draw.random() for _ in tokens], "", "stop", {}, advantage=draw.gauss(0, 1)))
    return result


def model_of(n_kv_head):
    model = GPT(GPTConfig(sequence_len=64, vocab_size=96, n_layer=2, n_head=4, n_kv_head=n_kv_head, n_embd=32))
    model.init_weights(seed=1)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(2)))
    return model


def loss_and_gradient(model, batches, logprobs_of):
    model.zero_grad()
    total, logprobs, count = 0.0, {}, 0
    for batch in batches:
        found = logprobs_of(batch)
        loss = -(batch.advantages[:, None] * found * (batch.targets != -1)).sum()
        loss.backward()
        total += loss.item()
        for advantage, row, targets, sampled in zip(batch.advantages.tolist(), found.detach(), batch.targets, batch.sampler_logprobs):
            logprobs[advantage] = torch.stack((row[targets != -1], sampled[targets != -1]))
            count += 1
    return total, logprobs, [weight.grad.clone() for weight in model.parameters()], count


@pytest.mark.parametrize("n_kv_head", [4, 1])
@pytest.mark.parametrize("groups", [[(7, [9, 9, 9])], [(12, [1, 20, 5, 8]), (3, [17, 2]), (1, [6, 6, 6])]])
def test_log_probabilities_and_gradient_are_those_of_the_plain_rows(groups, n_kv_head):
    model, samples = model_of(n_kv_head), rollouts(groups)
    plain = loss_and_gradient(model, make_batches(samples, 4, 0, "cpu"), lambda batch: model.logprobs(batch.inputs, batch.targets, 0.8))
    for size in (2, 64):  # a group cut in two, and all groups at once
        shared = loss_and_gradient(model, make_shared_batches(samples, size, 0, "cpu"), lambda batch: batch.logprobs(model, 0.8))
        assert shared[0] == pytest.approx(plain[0], abs=1e-4) and shared[3] == plain[3]
        for advantage, expected in plain[1].items():
            torch.testing.assert_close(shared[1][advantage], expected, atol=1e-5, rtol=0)
        for one, other in zip(shared[2], plain[2]):
            torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


def test_a_batch_holds_no_more_rollouts_than_asked_and_none_is_lost():
    samples = rollouts([(5, [3] * 8), (9, [4] * 8), (2, [12] * 3)])
    batches = make_shared_batches(samples, 8, 0, "cpu")
    assert max(len(batch.targets) for batch in batches) <= 8
    assert sorted(a for batch in batches for a in batch.advantages.tolist()) == pytest.approx(sorted(r.advantage for r in samples if any(r.mask)))
    (batch,) = make_shared_batches(samples, 64, 0, "cpu")
    real = 4 + 8 + 1 + sum(len(rollout.tokens) for rollout in samples if any(rollout.mask))  # three prompts once, less their last tokens
    assert batch.layout.num_tokens == real and batch.inputs.numel() < real + 8 * 16


@pytest.mark.slow
def test_the_compiled_pass_is_the_plain_one():
    model, samples = model_of(2), rollouts([(12, [1, 20, 5, 8]), (3, [17, 2])])
    (batch,) = make_shared_batches(samples, 64, 0, "cpu")
    expected = batch.logprobs(model)
    model.compile_for_training()
    torch.testing.assert_close(batch.logprobs(model), expected, atol=1e-5, rtol=0)
