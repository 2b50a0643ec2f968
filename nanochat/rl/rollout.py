"""Ask the engine for G completions per prompt, have them judged, put them into (B, T) rows for the gradient."""
from dataclasses import dataclass, field

import torch

from nanochat.engine import Request


@dataclass
class Rollout:
    """One judged completion. `mask` is 1 on sampled tokens; the sampled end token is one of them."""
    prompt: list[int]
    tokens: list[int]
    mask: list[int]
    logprobs: list[float]              # under the distribution that was sampled
    text: str
    finish_reason: str                 # "stop" or "length"
    rewards: dict                      # the named parts
    advantage: float = 0.0

    @property
    def reward(self):
        return sum(self.rewards.values())


@dataclass
class RolloutBatch:
    """Rows for one forward and backward pass."""
    inputs: torch.Tensor               # (B, T) int64
    targets: torch.Tensor              # (B, T) int64, -1 everywhere but on sampled completion tokens
    advantages: torch.Tensor           # (B,)
    sampler_logprobs: torch.Tensor = field(repr=False)  # (B, T), 0 where ignored


def sample_groups(engine, tokenizer, conversations, reward_fn, num_samples, max_new_tokens, temperature, seeds):
    """Conversations -> one group of `num_samples` judged rollouts each; all of them in flight together.

    `reward_fn(conversation, text)` returns the named parts of the reward. `seeds` has one number per conversation and decides
    every draw of its group, so that the rollouts do not depend on the other prompts or on the number of ranks.
    """
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    requests = [Request(prompt, num_samples=num_samples, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
                for prompt, seed in zip(prompts, seeds)]
    groups = []
    for conversation, prompt, completions in zip(conversations, prompts, engine.generate(requests)):
        groups.append([Rollout(prompt, c.tokens, c.mask, c.logprobs, c.text, c.finish_reason, reward_fn(conversation, c.text))
                       for c in completions])
    return groups


def make_batches(rollouts, device_batch_size, pad_id, device, pad_multiple=16):
    """Rollouts -> RolloutBatches of at most `device_batch_size` rows, similar lengths together so that little is padding."""
    ordered = sorted((rollout for rollout in rollouts if any(rollout.mask)), key=lambda r: len(r.prompt) + len(r.tokens))
    return [to_batch(ordered[i:i + device_batch_size], pad_id, device, pad_multiple)
            for i in range(0, len(ordered), device_batch_size)]


def to_batch(rollouts, pad_id, device, pad_multiple):
    longest = max(len(rollout.prompt) + len(rollout.tokens) for rollout in rollouts) - 1
    width = -(-longest // pad_multiple) * pad_multiple
    inputs = torch.full((len(rollouts), width), pad_id, dtype=torch.int64)
    targets = torch.full((len(rollouts), width), -1, dtype=torch.int64)
    sampler_logprobs = torch.zeros(len(rollouts), width)
    for row, rollout in enumerate(rollouts):
        ids = torch.tensor(rollout.prompt + rollout.tokens)
        inputs[row, :len(ids) - 1] = ids[:-1]
        answer = slice(len(rollout.prompt) - 1, len(ids) - 1)  # the positions that predict the completion
        sampled = torch.tensor(rollout.mask, dtype=torch.bool)
        targets[row, answer] = torch.where(sampled, ids[len(rollout.prompt):], -1)
        sampler_logprobs[row, answer] = torch.where(sampled, torch.tensor(rollout.logprobs), 0.0)
    advantages = torch.tensor([rollout.advantage for rollout in rollouts])
    return RolloutBatch(*(part.to(device) for part in (inputs, targets, advantages, sampler_logprobs)))
