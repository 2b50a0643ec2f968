"""Logits -> the next token of every row, each row with its own settings and its own random numbers.

A random number is a hash of (seed, sample, draw): it does not depend on which rows are drawn together, on which rank, or in
which order, so a completion is the same however the work was cut.
"""
import numpy as np
import torch

BLOCK = 256  # two-level search: sums of blocks first, then inside one block


def mixed(x):
    """uint64 array -> uint64 array: splitmix64's finalizer (Steele, Lea, Flood 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def stream_key(seed, sample):
    """Whole numbers -> the uint64 key of the random stream of this sample."""
    words = np.array([seed % 2**64, sample % 2**64], dtype=np.uint64)
    return mixed(mixed(words[:1] + np.uint64(0x9E3779B97F4A7C15)) + words[1:] * np.uint64(0xD1342543DE82EF95))[0]


def uniforms(keys, draws):
    """Keys (n,) uint64 and draw numbers (n,) -> (n,) float64 in [0, 1)."""
    counters = (draws.astype(np.uint64) + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    return (mixed(keys + counters) >> np.uint64(11)) * 2.0**-53


def pick(logits, uniform):
    """logits (n, m) in any order, uniform (n,) float64 -> index (n,) and its log-probability (n,) under softmax(logits).

    The inverse of the cumulative distribution. Overwrites `logits`.
    """
    n, m = logits.size()
    rows = torch.arange(n, device=logits.device)
    peak = logits.amax(dim=1, keepdim=True)
    weights = logits.sub_(peak).exp_()
    tail = m % BLOCK
    blocks = weights[:, :m - tail].view(n, -1, BLOCK).sum(dim=2) if m >= BLOCK else weights.new_zeros(n, 0)
    if tail:
        blocks = torch.cat((blocks, weights[:, m - tail:].sum(dim=1, keepdim=True)), dim=1)
    edges = blocks.double().cumsum(dim=1)
    target = uniform * edges[:, -1]
    block = (edges <= target[:, None]).sum(dim=1).clamp_(max=edges.size(1) - 1)
    target = target - edges[rows, block] + blocks[rows, block]
    places = block[:, None] * BLOCK + torch.arange(min(BLOCK, m), device=logits.device)
    inside = weights.gather(1, places.clamp(max=m - 1)).double().masked_fill_(places >= m, 0.0)
    # The last token with weight left is the bound: rounding must not pick a token of probability 0.
    offset = (inside.cumsum(dim=1) <= target[:, None]).sum(dim=1)
    offset = torch.minimum(offset, (inside > 0).long().mul(torch.arange(1, inside.size(1) + 1, device=logits.device)).amax(dim=1) - 1)
    index = block * BLOCK + offset
    logprobs = weights[rows, index].double().log() - edges[:, -1].log()
    return index, logprobs


class Sampler:
    """The (temperature, top_k, top_p) of n rows, sorted by kind once; then called at every step with (n, V) logits."""

    def __init__(self, settings, device):
        self.n, kinds = len(settings), {}
        for row, (temperature, top_k, top_p) in enumerate(settings):
            kind = "greedy" if temperature == 0 else "full" if top_k is None and top_p is None else "top"
            kinds.setdefault(kind, []).append(row)
        self.parts = []
        for kind, rows in kinds.items():
            temperature, top_k, top_p = zip(*(settings[row] for row in rows))
            index = None if len(rows) == self.n else torch.tensor(rows, device=device)
            scale = None if set(temperature) == {1.0} else torch.tensor(temperature, device=device)[:, None]
            self.parts.append((kind, index, scale, Truncation(top_k, top_p, device) if kind == "top" else None))

    def __call__(self, logits, uniform):
        """logits (n, V) float32, which may be overwritten; uniform (n,) -> tokens (n,), logprobs (n,) float64."""
        if len(self.parts) == 1:
            return self.draw(self.parts[0], logits, uniform)
        tokens = torch.empty(self.n, dtype=torch.int64, device=logits.device)
        logprobs = torch.empty(self.n, dtype=torch.float64, device=logits.device)
        for part in self.parts:
            tokens[part[1]], logprobs[part[1]] = self.draw(part, logits[part[1]], uniform[part[1]])
        return tokens, logprobs

    def draw(self, part, logits, uniform):
        kind, _, scale, truncation = part
        if kind == "greedy":
            return logits.argmax(dim=1), torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        if kind == "full":
            return pick(logits if scale is None else logits.div_(scale), uniform)
        logits, tokens = truncation.most_likely(logits)
        logits = truncation.cut(logits if scale is None else logits / scale)
        index, logprobs = pick(logits, uniform)
        return tokens.gather(1, index[:, None])[:, 0], logprobs


class Truncation:
    """Keep each row's top_k most likely tokens, then of those the fewest whose probabilities reach top_p (arXiv 1904.09751)."""

    def __init__(self, top_k, top_p, device):
        self.width = None if None in top_k else max(top_k)
        self.top_k = torch.tensor([k or 2**62 for k in top_k], device=device)[:, None] if len(set(top_k)) > 1 else None
        self.top_p = None
        if any(p is not None for p in top_p):
            self.top_p = torch.tensor([1.0 if p is None else p for p in top_p], device=device)[:, None]

    def most_likely(self, logits):
        """(n, V) -> the logits worth keeping in falling order and their tokens, each (n, width)."""
        if self.width is None or self.width >= logits.size(1):
            return logits.sort(dim=1, descending=True, stable=True)
        return logits.topk(self.width, dim=1)

    def cut(self, logits):
        """(n, width) in falling order, after the temperature -> -inf where a row keeps no more."""
        if self.top_k is not None:
            logits = logits.masked_fill(torch.arange(logits.size(1), device=logits.device) >= self.top_k, -torch.inf)
        if self.top_p is not None:
            probs = logits.softmax(dim=1)
            before = probs.cumsum(dim=1) - probs  # a token stays while those before it fall short of top_p
            logits = logits.masked_fill(before >= self.top_p, -torch.inf).where(self.top_p < 1, logits)
        return logits
