"""The gradient pass of whole groups, each prompt computed once instead of once per sample, and nothing padded but attention.

The tokens of a batch stand in one flat row (1, N), prompts first, then completions. Everything in the model but attention treats
tokens one by one, so only attention has to know: a completion looks at its own prompt's keys and at its own past. `GPT.hidden`
takes the layout as it takes a key-value cache. Log-probabilities and gradient are those of the plain rows (tests/test_shared_prompt.py).

Shapes: P prompts, R rollouts (any number per prompt), W the longest completion, N tokens, H heads, D head dim.
"""
from dataclasses import dataclass

import torch

from nanochat.flash_attention import attend
from nanochat.rl.rollout import RolloutBatch


class SharedPrompts:
    """Where the tokens stand, and who sees whom; what `GPT.hidden` calls: positions, attend, advance."""
    is_compilable = True  # no state changes during the pass

    def __init__(self, prompt_lengths, completion_lengths, group_of, pad_multiple, device):
        """Tokens of each prompt (P,), of each rollout (R,), and the prompt of each rollout (R,): lists."""
        self.shape = len(prompt_lengths), padded(max(1, *prompt_lengths), pad_multiple), len(group_of), padded(max(completion_lengths), pad_multiple)
        P, prompt_width, R, W = self.shape
        self.group_of = torch.tensor(group_of, device=device)
        lengths = torch.tensor(prompt_lengths + completion_lengths, device=device)
        starts = lengths.cumsum(0) - lengths
        self.num_tokens = int(lengths.sum())
        first = torch.cat((torch.zeros(P, dtype=torch.int64, device=device), lengths[:P][self.group_of]))  # the position each begins at
        self.flat_positions = torch.zeros(1, padded(self.num_tokens, 8 * pad_multiple), dtype=torch.int64, device=device)
        # Rows for attention, (P, prompt_width) and (R, W), as places in the flat row; and from there back.
        is_asked, self.place_of, self.cell_of = None, [], torch.zeros(self.flat_positions.size(1), dtype=torch.int64, device=device)
        for rows, width, cells in ((slice(0, P), prompt_width, 0), (slice(P, P + R), W, P * prompt_width)):
            steps = torch.arange(width, device=device)
            is_real = steps < lengths[rows, None]
            places = torch.where(is_real, starts[rows, None] + steps, 0)  # padding repeats token 0: what comes of it goes nowhere
            self.flat_positions[0, places[is_real]] = (first[rows, None] + steps)[is_real]
            self.cell_of[places[is_real]] = cells + torch.arange(is_real.numel(), device=device).view_as(is_real)[is_real]
            self.place_of.append(places.view(-1))
            is_asked = is_asked if cells else is_real  # (P, prompt_width)
        own = torch.ones(W, W, dtype=torch.bool, device=device).tril()
        self.mask = torch.cat((is_asked[self.group_of][:, None].expand(-1, W, -1), own.expand(R, -1, -1)), dim=2)

    def positions(self, T):
        return self.flat_positions

    def attend(self, layer, q, k, v):
        """(1, N, H, D) -> the same."""
        P, prompt_width, R, W = self.shape
        asked = [part[0].index_select(0, self.place_of[0]).unflatten(0, (P, prompt_width)) for part in (q, k, v)]
        answered = [part[0].index_select(0, self.place_of[1]).unflatten(0, (R, W)) for part in (q, k, v)]
        keys, values = (torch.cat((prompt.index_select(0, self.group_of), own), dim=1) for prompt, own in zip(asked[1:], answered[1:]))
        y = torch.cat((attend(*asked, causal=True).flatten(0, 1), attend(answered[0], keys, values, self.mask).flatten(0, 1)))
        return y.index_select(0, self.cell_of)[None]

    def advance(self, T):
        pass


def padded(length, multiple):
    return -(-length // multiple) * multiple


@dataclass
class SharedBatch(RolloutBatch):
    """Whole groups for one forward and backward pass. `inputs` is the flat row (1, N); all else stands per rollout, (R, W)."""
    layout: SharedPrompts | None = None

    def hidden(self, model):
        """-> (R, W, C) after the last norm, at the completions alone."""
        return model.hidden(self.inputs, self.layout)[0].index_select(0, self.layout.place_of[1]).view(*self.targets.shape, -1)

    def logprobs(self, model, temperature=1.0):
        """-> (R, W) log p(target), 0 where the target is -1: what `model.logprobs` gives for the plain rows. Differentiable."""
        return model.logprobs_of_hidden(self.hidden(model), self.targets, temperature)


def make_shared_batches(rollouts, device_batch_size, pad_id, device, pad_multiple=16):
    """Rollouts, those of a group side by side -> SharedBatches of at most `device_batch_size` rollouts, groups of similar length together.

    A prompt goes in without its last token; that one begins every completion, so that each position predicts one token."""
    groups = {}
    for rollout in rollouts:
        if any(rollout.mask):
            groups.setdefault(tuple(rollout.prompt), []).append(rollout)
    pieces = [group[i:i + device_batch_size] for group in groups.values() for i in range(0, len(group), device_batch_size)]
    batches = []
    for piece in sorted(pieces, key=lambda piece: max(len(rollout.tokens) for rollout in piece)):
        if batches and sum(map(len, batches[-1])) + len(piece) <= device_batch_size:
            batches[-1].append(piece)
        else:
            batches.append([piece])
    return [to_shared_batch(batch, pad_id, device, pad_multiple) for batch in batches]


def to_shared_batch(groups, pad_id, device, pad_multiple):
    rollouts = [rollout for group in groups for rollout in group]
    prompts = [group[0].prompt[:-1] for group in groups]
    layout = SharedPrompts(list(map(len, prompts)), [len(rollout.tokens) for rollout in rollouts],
                           [index for index, group in enumerate(groups) for _ in group], pad_multiple, device)
    ids = sum(prompts, []) + [id for rollout in rollouts for id in (rollout.prompt[-1], *rollout.tokens[:-1])]
    flat = torch.tensor([ids + [pad_id] * (layout.flat_positions.size(1) - len(ids))], device=device)
    targets = torch.full((len(rollouts), layout.shape[3]), -1, dtype=torch.int64)
    sampler_logprobs = torch.zeros(targets.shape)
    for row, rollout in enumerate(rollouts):
        answer, sampled = slice(0, len(rollout.tokens)), torch.tensor(rollout.mask, dtype=torch.bool)
        targets[row, answer] = torch.where(sampled, torch.tensor(rollout.tokens), -1)
        sampler_logprobs[row, answer] = torch.where(sampled, torch.tensor(rollout.logprobs), 0.0)
    advantages = torch.tensor([rollout.advantage for rollout in rollouts])
    return SharedBatch(flat, *(part.to(device) for part in (targets, advantages, sampler_logprobs)), rollouts, layout=layout)
