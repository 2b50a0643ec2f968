"""How likely a model finds given text: many sequences at once, their common beginnings computed once.

An item is a list of sequences that mostly share their beginning, such as a question with each of its answers. They stand side by side
in one row: the shared tokens, then each sequence's rest, which looks at the shared part and at itself only. That is one pass over the
question instead of one per answer. Rows of similar length go together, and logits exist only where a token is scored.

A scorer knows one model: `GPTScorer` here, `hf_model.HFScorer` for Hugging Face. It has `sequence_len`, `packs` (whether it takes several
sequences in a row), `bos` (the ids in front of every text), `start` (those in front of nothing), `encode(texts)`, and `read(rows)`.
"""
import os
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanochat.engine import cast_copy
from nanochat.flash_attention import attend
from nanochat.vocab_loss import chunks


class Sequence(NamedTuple):
    """Token ids, of which those from `start` on are scored, each given all before it. start >= 1."""
    tokens: list[int]
    start: int


class Score(NamedTuple):
    logprob: float      # sum over the scored tokens, in nats
    num_tokens: int
    is_greedy: bool     # each scored token is the model's likeliest

    @property
    def mean(self):
        return self.logprob / self.num_tokens


@dataclass(frozen=True)
class Row:
    """Sequences packed for one pass. A token's branch is 0 in the shared beginning, 1, 2, ... in the rests."""
    tokens: list[int]
    positions: list[int]
    branches: list[int]
    columns: list[list[int]]    # for each sequence, where each of its scored tokens is predicted
    targets: list[list[int]]    # and which token it is

    @property
    def has_branches(self):
        return max(self.branches) > 0


def pack(sequences):
    """Sequences -> one Row. Equal rests stand there once, and the last token of a sequence, which predicts nothing, not at all."""
    inputs = [sequence.tokens[:-1] for sequence in sequences]
    shared = len(os.path.commonprefix(inputs))
    tokens, positions, branches = list(inputs[0][:shared]), list(range(shared)), [0] * shared
    begins, columns = {(): shared}, []
    for line, sequence in zip(inputs, sequences):
        rest = tuple(line[shared:])
        if rest not in begins:
            begins[rest] = len(tokens)
            branches += [len(begins) - 1] * len(rest)
            tokens += rest
            positions += range(shared, len(line))
        offset = begins[rest] - shared
        columns.append([place if place < shared else place + offset for place in range(sequence.start - 1, len(line))])
    return Row(tokens, positions, branches, columns, [sequence.tokens[sequence.start:] for sequence in sequences])


def check(item, sequence_len):
    for tokens, start in item:
        if not 1 <= start < len(tokens):
            raise ValueError(f"a sequence of {len(tokens)} tokens is to be scored from token {start} on: at least one token must stand before, "
                             "and at least one be scored")
        if len(tokens) > sequence_len + 1:
            raise ValueError(f"a sequence of {len(tokens)} tokens does not fit the model's {sequence_len} (and one more to predict): crop it first")


@torch.inference_mode()
def score(scorer, items, batch_tokens=16384, on_result=None):
    """Lists of Sequences -> for each list, its Scores. `on_result(place, scores)` is called as soon as an item is done.

    At most `batch_tokens` tokens, padding included, are in one pass, but always one row."""
    rows = []                                           # (row, item, the sequences in it)
    for place, item in enumerate(items):
        check(item, scorer.sequence_len)
        groups = [range(len(item))] if scorer.packs else same_inputs(item)
        rows += [(pack([item[index] for index in group]), place, group) for group in groups]
    rows.sort(key=lambda entry: (entry[0].has_branches, -len(entry[0].tokens)))  # rows without branches need no mask
    results = [[None] * len(item) for item in items]
    begin = 0
    while begin < len(rows):
        first = rows[begin][0]                          # the longest of its kind
        size = max(1, batch_tokens // len(first.tokens))
        batch = [entry for entry in rows[begin:begin + size] if entry[0].has_branches == first.has_branches]
        begin += len(batch)
        logprobs, greedy = (values.tolist() for values in scorer.read([row for row, _, _ in batch]))
        used = 0
        for row, place, group in batch:
            for index, targets in zip(group, row.targets):
                reach = used + len(targets)
                results[place][index] = Score(sum(logprobs[used:reach]), len(targets), all(greedy[used:reach]))
                used = reach
            if on_result is not None and all(results[place]):
                on_result(place, results[place])
    return results


def same_inputs(item):
    """Groups of the item's sequences that differ in nothing but their last token: they are read in one row by any model."""
    groups = {}
    for index, sequence in enumerate(item):
        groups.setdefault(tuple(sequence.tokens[:-1]), []).append(index)
    return list(groups.values())


def padded(rows, values, fill):
    """A list of ints per row -> (B, T) int64, padded on the right, where no real token looks."""
    width = max(len(row.tokens) for row in rows)
    return torch.tensor([value + [fill] * (width - len(value)) for value in values])


def places(rows):
    """Rows -> (row numbers, columns, targets), each (N,): where the scored tokens are predicted, in the order of rows and sequences."""
    number = [index for index, row in enumerate(rows) for columns in row.columns for _ in columns]
    column = [column for row in rows for columns in row.columns for column in columns]
    target = [target for row in rows for targets in row.targets for target in targets]
    return torch.tensor(number), torch.tensor(column), torch.tensor(target)


def target_scores(logits, targets):
    """logits (N, V), targets (N,) -> log p of each target, and whether no token is likelier."""
    logprobs = torch.log_softmax(logits, dim=-1)
    return logprobs.gather(1, targets[:, None])[:, 0], logits.argmax(dim=-1) == targets


class PackedAttention:
    """What GPT.hidden asks of a cache, for rows with branches: every token's own position, and who may look at whom."""

    def __init__(self, positions, branches):
        self.given = positions                          # (B, T)
        self.mask = None
        if branches.any():
            T = branches.size(1)
            causal = torch.ones(T, T, dtype=torch.bool, device=branches.device).tril()
            own = branches[:, :, None] == branches[:, None, :]
            self.mask = causal & (own | (branches[:, None, :] == 0))  # (B, T, T)

    def positions(self, T):
        return self.given

    def attend(self, layer, q, k, v):
        return attend(q, k, v, self.mask, causal=self.mask is None)

    def advance(self, T):
        pass


class GPTScorer:
    """Our model and its tokenizer."""
    packs = True

    def __init__(self, model, tokenizer):
        self.model, self.tokenizer = cast_copy(model), tokenizer
        self.sequence_len = model.config.sequence_len
        self.bos = self.start = [tokenizer.bos_id]

    def encode(self, texts):
        return self.tokenizer.encode(list(texts))

    def read(self, rows):
        """Rows -> (log p (N,), whether it is the likeliest token (N,)) of all their scored tokens, on the CPU."""
        model, device = self.model, self.model.device
        inputs, positions = (padded(rows, values, 0).to(device) for values in ([row.tokens for row in rows], [row.positions for row in rows]))
        branches = padded(rows, [row.branches for row in rows], 0).to(device)  # padding counts as shared: nobody stands behind it
        number, column, targets = (values.to(device) for values in places(rows))
        hidden = model.hidden(inputs, PackedAttention(positions, branches))[number, column]  # (N, C)
        parts = [target_scores(model.logits(hidden[some]), targets[some]) for some in chunks(hidden, model.config.vocab_size)]
        return tuple(torch.cat(values).cpu() for values in zip(*parts))
