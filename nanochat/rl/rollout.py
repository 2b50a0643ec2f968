"""Ask the engine for G completions per prompt, have them judged, put them into (B, T) rows for the gradient."""
from dataclasses import dataclass, field

import torch

from nanochat.common import print0
from nanochat.engine import Request
from nanochat.rl.algorithm import groups_with_signal


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
    conversation: dict | None = field(default=None, repr=False)  # what was asked
    place: int | None = None           # of its group among all problems of the run

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
    rollouts: list = field(repr=False)  # B Rollouts
    old_logprobs: torch.Tensor | None = field(default=None, repr=False)  # (B, T) of the trainer before the step's first update
    ref_logprobs: torch.Tensor | None = field(default=None, repr=False)  # (B, T) of the reference

    @property
    def mask(self):
        return self.targets != -1

    def hidden(self, model):
        """-> (B, T, C) after the last norm, where `targets` stand."""
        return model.hidden(self.inputs)


def sample_groups(engine, tokenizer, conversations, reward_fn, num_samples, max_new_tokens, temperature, seeds, top_k=None):
    """Conversations -> one group of `num_samples` judged rollouts each; all of them in flight together.

    `reward_fn(conversation, text)` returns the named parts of the reward, or None where it cannot tell: such a rollout leaves its group,
    since counted as 0 it would pull the others' baseline down. `seeds` has one number per conversation and decides every draw of its
    group, so that the rollouts do not depend on the other prompts or on the number of ranks. What was cut off at max_new_tokens is
    judged by the text that is there, like any other.
    """
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    requests = [Request(prompt, num_samples=num_samples, max_new_tokens=max_new_tokens, temperature=temperature, top_k=top_k, seed=seed)
                for prompt, seed in zip(prompts, seeds)]
    groups = []
    for conversation, prompt, completions in zip(conversations, prompts, engine.generate(requests)):
        judged = [(c, reward_fn(conversation, c.text)) for c in completions]
        groups.append([Rollout(prompt, c.tokens, c.mask, c.logprobs, c.text, c.finish_reason, rewards, conversation=conversation)
                       for c, rewards in judged if rewards is not None])
    return groups


@dataclass
class Sampler:
    """Places of problems -> this rank's groups: all that sampling needs besides the temperature."""
    engine: object
    tokenizer: object
    problems: object                   # at(place, levels) -> (place, seed, conversation), and rewards(conversation, text)
    compute: object
    num_samples: int
    max_new_tokens: int
    top_k: int | None = None
    max_prompt_tokens: int = -1        # a longer prompt is left out, whole (-1 = as long as max_new_tokens, or half the context, stay free)
    has_warned: bool = False

    def sample(self, places, temperature, levels=None):
        """-> the groups of every world_size-th place. A prompt that is too long, and a group that cannot be judged, is left out."""
        problems = [self.problems.at(place, levels) for place in places[self.compute.rank::self.compute.world_size]]
        problems = [problem for problem in problems if len(self.tokenizer.render_for_completion(problem.conversation)) <= self.longest_prompt]
        groups = sample_groups(self.engine, self.tokenizer, [problem.conversation for problem in problems], self.problems.rewards, self.num_samples,
                               self.max_new_tokens, temperature, [problem.seed for problem in problems], self.top_k)
        for group, problem in zip(groups, problems):
            for rollout in group:
                rollout.place = problem.place
        return [group for group in groups if group]

    @property
    def longest_prompt(self):
        context = self.engine.model.config.sequence_len
        return self.max_prompt_tokens if self.max_prompt_tokens > 0 else context - min(self.max_new_tokens, context // 2)

    def sample_step(self, first, count, temperature, rounds=1, levels=None):
        """The groups of `count` problems from place `first` on -> (this rank's groups, the place after the last one asked).

        With more than one round it is DAPO's dynamic sampling (arXiv 2503.14476): as many new problems are asked as groups came back
        without signal, at most `rounds` times; then the step goes on with what there is. Every rank asks equally often."""
        groups, missing, begin = [], count, first
        for _ in range(rounds):
            groups += self.sample(range(first, first + missing), temperature, levels)
            first += missing
            missing = count - self.compute.sum(sum(map(has_signal, groups)))
            if missing <= 0:
                break
        if rounds > 1 and missing > 0 and not self.has_warned:
            self.has_warned = True
            print0(f"WARNING: {rounds} rounds of asking ({first - begin} problems) left {missing} of {count} groups without signal, and the step goes on with the others "
                   "(said once; rl/problems and frac_reward_zero_std tell of every step)")
        return groups, first


def has_signal(group):
    """True if the group holds right answers and wrong ones."""
    return bool(groups_with_signal(torch.tensor([[rollout.rewards["correct"] for rollout in group]]))[0])


def make_batches(rollouts, device_batch_size, pad_id, device, pad_multiple=16, context=None):
    """Rollouts -> RolloutBatches of at most `device_batch_size` rows, similar lengths together so that little is padding, which never
    reaches beyond `context` tokens."""
    ordered = sorted((rollout for rollout in rollouts if any(rollout.mask)), key=lambda r: len(r.prompt) + len(r.tokens))
    return [to_batch(ordered[i:i + device_batch_size], pad_id, device, pad_multiple, context)
            for i in range(0, len(ordered), device_batch_size)]


def to_batch(rollouts, pad_id, device, pad_multiple, context=None):
    longest = max(len(rollout.prompt) + len(rollout.tokens) for rollout in rollouts) - 1
    width = min(-(-longest // pad_multiple) * pad_multiple, context or float("inf"))
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
    return RolloutBatch(*(part.to(device) for part in (inputs, targets, advantages, sampler_logprobs)), rollouts)
