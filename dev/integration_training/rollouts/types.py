"""What the two loops pass around: packed rows for a pass, and a buffer that says which item comes next and can be told where it stood."""
from dataclasses import dataclass

import torch

from tasks.problems import Problem, draw_seed, order_of_epoch


@dataclass(frozen=True)
class Batch:
    """Rows of several conversations each, one after the other, for one forward and backward pass."""
    inputs: torch.Tensor                # (B, T) int64
    targets: torch.Tensor               # (B, T) int64: the same shifted by one inside each conversation, -1 = ignored
    documents: torch.Tensor             # (B, T) int64: which conversation a position belongs to, 0 = padding; it sees no other
    positions: torch.Tensor             # (B, T) int64: counted from 0 inside each conversation


def pack(conversations, batch_size, max_length, pad_id, device, pad_multiple=16):
    """[(ids, mask)] -> Batches of at most `batch_size` rows of at most `max_length` positions, the longest conversations first, each in the
    first row that has room. A conversation of n tokens takes n - 1 positions, as its last token only is a target."""
    rows, free = [], []
    for ids, mask in sorted(conversations, key=lambda one: -len(one[0])):
        length = len(ids) - 1
        assert 0 < length <= max_length, f"{length} positions do not fit {max_length}"
        place = next((place for place, left in enumerate(free) if left >= length), None)
        if place is None:
            place = len(rows)
            rows.append([])
            free.append(max_length)
        rows[place].append((ids, mask))
        free[place] -= length
    return [fill(rows[i:i + batch_size], max_length, pad_id, device, pad_multiple) for i in range(0, len(rows), batch_size)]


def fill(rows, max_length, pad_id, device, pad_multiple):
    longest = max(sum(len(ids) - 1 for ids, _ in row) for row in rows) if rows else 1
    width = min(-(-longest // pad_multiple) * pad_multiple, max_length)
    inputs = torch.full((max(1, len(rows)), width), pad_id)
    targets, documents, positions = torch.full_like(inputs, -1), torch.zeros_like(inputs), torch.zeros_like(inputs)
    for number, row in enumerate(rows):
        begin = 0
        for document, (ids, mask) in enumerate(row, start=1):
            place, ids = slice(begin, begin + len(ids) - 1), torch.tensor(ids)
            inputs[number, place] = ids[:-1]
            targets[number, place] = torch.where(torch.tensor(mask[1:], dtype=torch.bool), ids[1:], -1)
            documents[number, place] = document
            positions[number, place] = torch.arange(len(ids) - 1)
            begin = place.stop
        positions[number, begin:] = torch.arange(width - begin)
    return Batch(*(part.to(device) for part in (inputs, targets, documents, positions)))


def empty_batch(max_length, pad_id, device, pad_multiple=16):
    """A pass without a target: ranks that have run out of rows still take part in the collectives of the others' passes."""
    return fill([], max_length, pad_id, device, pad_multiple)


class DataBuffer:
    """Items of a task in an order of their own in each epoch, a pure function of the seed. Two numbers say where it stands."""

    def __init__(self, task, seed):
        self.task, self.seed, self.epoch_id, self.sample_offset = task, seed, 0, 0

    def place(self):
        """How many items have been taken since the beginning."""
        return self.epoch_id * len(self.task) + self.sample_offset

    def take(self, count):
        """The next places, as a range. A place is what `at` understands."""
        first = self.place()
        self.epoch_id, self.sample_offset = divmod(first + count, len(self.task))
        return range(first, first + count)

    def at(self, place, levels=None):
        epoch, offset = divmod(place, len(self.task))
        return Problem(place, draw_seed(self.seed, place), self.task[order_of_epoch(f"{self.seed}", epoch, len(self.task))[offset]])

    def rewards(self, conversation, completion):
        return self.task.rewards(conversation, completion)

    def save_state(self):
        return {"epoch_id": self.epoch_id, "sample_offset": self.sample_offset}

    def load_state(self, state):
        self.epoch_id, self.sample_offset = state["epoch_id"], state["sample_offset"]
