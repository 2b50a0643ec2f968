"""Rollouts: the sampled end token is trained, draws of a group are independent, sampler and trainer agree on every log-probability."""
import pytest
import torch

from nanochat.compute import Compute
from nanochat.engine import Engine
from nanochat.gpt import GPT, config_from_depth
from nanochat.rl.metrics import rollout_metrics
from nanochat.rl.rollout import Rollout, make_batches, sample_groups
from tasks.aqua import extract_answer

CPU = Compute(torch.device("cpu"), torch.float32)


@pytest.fixture
def policy(base_directory):
    from nanochat.tokenizer import get_tokenizer
    tokenizer = get_tokenizer()
    model = GPT(config_from_depth(2, tokenizer.vocab_size, 192, n_embd=64, head_dim=32))
    model.init_weights()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return model, tokenizer


def conversation(question):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Answer: A"}]}


def sample(policy, questions, temperature=1.0, num_samples=4, seeds=None):
    model, tokenizer = policy
    return sample_groups(Engine(model, tokenizer), tokenizer, [conversation(question) for question in questions], lambda _, text: {"correct": float("a" in text)},
                         num_samples, 24, temperature, seeds or list(range(len(questions))))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_sampler_and_trainer_give_every_token_the_same_logprob(policy, temperature):
    model, tokenizer = policy
    groups = sample(policy, ["2+2", "How many cups has Tom?"], temperature)
    for batch in make_batches([rollout for group in groups for rollout in group], 3, tokenizer.bos_id, "cpu"):
        trained = batch.targets != -1
        with torch.no_grad():
            logprobs = model.logprobs(batch.inputs, batch.targets, temperature)
        assert float((logprobs - batch.sampler_logprobs)[trained].abs().max()) <= 1e-5
        assert float(batch.sampler_logprobs[~trained].abs().max()) == 0.0


def test_the_sampled_end_token_is_trained_and_has_a_gradient(policy):
    model, tokenizer = policy
    end = tokenizer.encode_special("<|assistant_end|>")
    rollout = Rollout(prompt=[tokenizer.bos_id, 5, 6], tokens=[7, end], mask=[1, 1], logprobs=[-1.0, -1.0], text="x", finish_reason="stop",
                      rewards={"correct": 1.0}, advantage=1.0)
    batch, = make_batches([rollout], 4, tokenizer.bos_id, "cpu")
    assert batch.inputs[0, :4].tolist() == [tokenizer.bos_id, 5, 6, 7]
    assert batch.targets[0].tolist()[:5] == [-1, -1, 7, end, -1]
    model.logprobs(batch.inputs, batch.targets)[0, 3].backward()
    assert float(model.lm_head.weight.grad[end].abs().sum()) > 0


def test_tokens_that_a_tool_forced_are_not_trained(policy):
    _, tokenizer = policy
    rollout = Rollout([1, 2], [3, 4, 5], [1, 0, 1], [-0.1, 0.0, -0.2], "x", "length", {"correct": 0.0})
    batch, = make_batches([rollout], 1, tokenizer.bos_id, "cpu")
    assert batch.targets[0].tolist()[:5] == [-1, 3, -1, 5, -1]
    assert batch.sampler_logprobs[0].tolist()[:4] == pytest.approx([0, -0.1, 0, -0.2])


def test_a_group_does_not_share_its_first_token_and_does_not_depend_on_its_neighbours(policy):
    alone, = sample(policy, ["How many?"], num_samples=8, seeds=[5])
    among = sample(policy, ["x+1", "How many?", "A longer question about pens and cups"], num_samples=8, seeds=[1, 5, 2])[1]
    assert len({rollout.tokens[0] for rollout in alone}) > 1
    assert [rollout.tokens for rollout in alone] == [rollout.tokens for rollout in among]


def test_batches_hold_every_rollout_once_whatever_their_size(policy):
    _, tokenizer = policy
    rollouts = [rollout for group in sample(policy, ["1", "2+3", "x=4"]) for rollout in group]
    for size in (1, 5, 100):
        batches = make_batches(rollouts, size, tokenizer.bos_id, "cpu")
        assert sum(len(batch.inputs) for batch in batches) == 12
        assert sum(int((batch.targets != -1).sum()) for batch in batches) == sum(sum(rollout.mask) for rollout in rollouts)
    assert make_batches([], 4, tokenizer.bos_id, "cpu") == []


def test_metrics_count_what_happened():
    def rollout(text, correct, reason="stop"):
        return Rollout([1], [2] * len(text), [1] * len(text), [0.0] * len(text), text, reason, {"correct": correct, "format": 0.1})
    groups = [[rollout("Answer: A", 1.0), rollout("Answer: B", 0.0)], [rollout("no", 0.0, "length"), rollout("Answer: B", 0.0)]]
    metrics = rollout_metrics(groups, CPU, extract_answer, "ABCDE")
    assert metrics["rl/acc"] == 0.25 and metrics["rl/mean_reward"] == pytest.approx(0.35)
    assert metrics["frac_reward_zero_std"] == 0.5 and metrics["completions/clipped_ratio"] == 0.25
    assert [metrics[f"rl/letter_pred_counts/{letter}"] for letter in "ABC"] + [metrics["rl/letter_pred_counts/none"]] == [1, 2, 0, 1]
    assert (metrics["completions/min_length"], metrics["completions/max_length"]) == (2, 9)
