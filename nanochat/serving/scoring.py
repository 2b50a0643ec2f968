"""How likely a model finds given tokens: what echo, logprobs and evaluation harnesses ask. Plain forward passes, no sampling.

Log-probabilities are the model's own, before temperature, top_k and top_p.
"""
from typing import NamedTuple

import torch

from nanochat.vocab_loss import chunks

PASS_TOKENS = {"cpu": 1024, "cuda": 8192}  # padded tokens in one pass: rows in flight wait for it


class Item(NamedTuple):
    """Tokens, the place of the first one to be scored, and how many alternatives are wanted at each."""
    tokens: list[int]
    first: int
    top: int


class Score(NamedTuple):
    """For each token from `first` on (None for place 0, which nothing precedes) its log-probability, and the `top` likeliest tokens
    there with theirs, likeliest first. `next` is the likeliest token behind the last one, scored like the others."""
    logprobs: list[float | None]
    top: list[list[tuple[int, float]] | None]
    next: tuple[int, float, list[tuple[int, float]]]


def batches(items, device_type):
    """Places of items -> lists of them to score together: at most half of a pass is padding, and it fits PASS_TOKENS."""
    result, most = [], PASS_TOKENS.get(device_type, 1024)
    for place in sorted(range(len(items)), key=lambda i: -len(items[i].tokens)):
        length = len(items[place].tokens)
        if result:
            longest = len(items[result[-1][0]].tokens)
            if 2 * length >= longest and longest * (len(result[-1]) + 1) <= most:
                result[-1].append(place)
                continue
        result.append([place])
    return result


@torch.inference_mode()
def score(model, items, vocab_size=None):
    """One pass over items -> a Score for each. The logits exist for a few positions at a time, so memory does not grow with T * V.

    Rows beyond `vocab_size` only pad the vocabulary: they count in the normalizer, and are never an alternative."""
    T, device = max(len(item.tokens) for item in items), model.device
    inputs = torch.tensor([item.tokens + [0] * (T - len(item.tokens)) for item in items], device=device)
    # position t predicts token t + 1; the last real one predicts what would come next, and has no target
    places = [(row, t) for row, item in enumerate(items) for t in range(max(item.first, 1) - 1, len(item.tokens))]
    rows, times = torch.tensor(places, device=device).T
    hidden = model.hidden(inputs)[rows, times]  # (N, C)
    targets = torch.tensor([item.tokens[t + 1] if t + 1 < len(item.tokens) else -1 for item in items
                            for t in range(max(item.first, 1) - 1, len(item.tokens))], device=device)
    vocab_size = vocab_size or model.config.vocab_size
    width = min(max(1, *(item.top for item in items)), vocab_size)
    found = []
    for part in chunks(hidden, model.config.vocab_size):
        logprobs = torch.log_softmax(model.logits(hidden[part]), dim=-1)
        wanted = targets[part]
        best = logprobs[:, :vocab_size].topk(width, dim=-1)
        of_target = logprobs.gather(1, wanted.clamp(min=0)[:, None])[:, 0]
        found += zip(of_target.tolist(), best.indices.tolist(), best.values.tolist())
    scores, start = [], 0
    for item in items:
        count = len(item.tokens) - max(item.first, 1) + 1
        lines = found[start:start + count]
        start += count
        tops = [list(zip(ids[:item.top], values[:item.top])) for _, ids, values in lines]
        _, ids, values = lines[-1]
        nothing = [None] if item.first == 0 else []
        scores.append(Score(nothing + [logprob for logprob, _, _ in lines[:-1]], nothing + tops[:-1], (ids[0], values[0], tops[-1])))
    return scores
