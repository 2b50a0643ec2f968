"""Logits -> the next token of every row, each row with its own settings and its own random numbers.

A random number is a hash of (seed, sample, draw): it does not depend on which rows are drawn together, on which rank, or in
which order, so a completion is the same however the work was cut.
"""
import numpy as np
import torch

GREEDY = 1e-6  # temperatures below it are: dividing by them would leave what float32 can hold
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


def largest(logits):
    """(n, V) -> the place of each row's maximum (n,): blocks first, since PyTorch finds a maximum ten times as fast as its place."""
    n, V = logits.size()
    if V % BLOCK or V == BLOCK:
        return logits.argmax(dim=1)
    blocks = logits.view(n, -1, BLOCK)
    block = blocks.amax(dim=2).argmax(dim=1)
    return block * BLOCK + blocks[torch.arange(n, device=logits.device), block].argmax(dim=1)


class Sampler:
    """The (temperature, top_k, top_p) of n rows, sorted by kind once; then called at every step with (n, V) logits.

    `cap`, a rising function of the logits that may work in place, is applied to those that matter: a soft-cap keeps the order, so that
    greedy rows do without it and top_k rows need it for k numbers only.
    """

    def __init__(self, settings, device, cap=lambda logits: logits):
        self.n, kinds = len(settings), {}
        for row, (temperature, top_k, top_p) in enumerate(settings):
            is_nucleus = top_p is not None and top_p < 1
            kind = "greedy" if temperature < GREEDY else "top_k" if top_k is not None else "nucleus" if is_nucleus else "full"
            kinds.setdefault(kind, []).append(row)
        self.is_greedy = set(kinds) == {"greedy"}
        self.parts = [Part(kind, rows if len(rows) < self.n else None, [settings[row] for row in rows], device, cap) for kind, rows in kinds.items()]

    def __call__(self, logits, uniform):
        """logits (n, V) float32, which may be overwritten; uniform (n,) -> tokens (n,), logprobs (n,) float64."""
        if len(self.parts) == 1:
            return self.parts[0].draw(logits, uniform)
        tokens = torch.empty(self.n, dtype=torch.int64, device=logits.device)
        logprobs = torch.empty(self.n, dtype=torch.float64, device=logits.device)
        for part in self.parts:
            tokens[part.rows], logprobs[part.rows] = part.draw(logits[part.rows], uniform[part.rows])
        return tokens, logprobs


class TorchSampler(Sampler):
    """The same from (n, V) logits that may be overwritten and an array of n random numbers to lists: one wait for the device."""

    def __init__(self, settings, device, cap=None):
        super().__init__(settings, device, *((cap,) if cap else ()))
        self.device = device

    def __call__(self, logits, uniform):
        if self.is_greedy:
            return largest(logits).tolist(), [0.0] * self.n
        tokens, logprobs = torch.stack([part.double() for part in super().__call__(logits, torch.from_numpy(uniform).to(self.device))]).tolist()
        return list(map(int, tokens)), logprobs


class Part:
    """Rows of one kind: greedy; full (the whole vocabulary); top_k (and top_p of those); nucleus (top_p alone, arXiv 1904.09751)."""

    def __init__(self, kind, rows, settings, device, cap):
        temperature, top_k, top_p = zip(*settings)
        self.kind, self.cap, self.rows = kind, cap, None if rows is None else torch.tensor(rows, device=device)
        self.scale = None if set(temperature) == {1.0} else torch.tensor(temperature, device=device)[:, None]
        self.width = max(top_k) if kind == "top_k" else None
        self.top_k = torch.tensor(top_k, device=device)[:, None] if kind == "top_k" and len(set(top_k)) > 1 else None
        limits = [2.0 if p is None or p == 1 else max(p, 1e-30) for p in top_p]  # 2 = what no probability reaches: keep all; float32 must not make 0 of p
        self.top_p = torch.tensor(limits, device=device)[:, None] if min(limits) < 2 else None

    def draw(self, logits, uniform):
        if self.kind == "greedy":
            return largest(logits), torch.zeros(len(logits), dtype=torch.float64, device=logits.device)
        if self.kind == "full":
            return pick(self.scaled(logits), uniform)
        kept, tokens = self.most_likely(logits) if self.kind == "top_k" else self.nucleus(self.scaled(logits))
        index, logprobs = pick(kept, uniform)
        return tokens.gather(1, index[:, None])[:, 0], logprobs

    def scaled(self, logits):
        logits = self.cap(logits)
        return logits if self.scale is None else logits.div_(self.scale)

    def most_likely(self, logits):
        """(n, V) -> the top_k logits of each row in falling order, cut after top_p of their mass, and their tokens (n, width)."""
        kept, tokens = logits.topk(min(self.width, logits.size(1)), dim=1)
        kept = self.scaled(kept)
        if self.top_k is not None:
            kept = kept.masked_fill_(torch.arange(kept.size(1), device=kept.device) >= self.top_k, -torch.inf)
        if self.top_p is not None:
            kept = cut(kept, kept.softmax(dim=1), self.top_p)
        return kept, tokens

    def nucleus(self, logits):
        """The same with all the vocabulary to choose from. A nucleus nearly always fits a few hundred tokens: look there first,
        since sorting 8,192 takes 20 times as long."""
        total = logits.logsumexp(dim=1, keepdim=True)
        for width in (256, logits.size(1)) if logits.size(1) > 256 else (logits.size(1),):
            kept, tokens = logits.topk(width, dim=1)
            probs = (kept - total).exp()
            if width == logits.size(1) or (probs.sum(dim=1, keepdim=True) >= self.top_p).all():
                return cut(kept, probs, self.top_p), tokens


def cut(logits, probs, top_p):
    """(n, width) in falling order -> -inf where the tokens before already reach top_p."""
    return logits.masked_fill(probs.cumsum(dim=1) - probs >= top_p, -torch.inf)
