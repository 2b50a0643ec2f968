"""Items -> rows of tokens: how a lane of the data loader packs documents, or packs or pads conversations.

A feed is an endless numbered stream of items, item n being number n % num_items of epoch n // num_items, so one integer
says where a stream stands. A lane makes micro-batches of a feed's items. Neither knows ranks, threads or devices.
"""
import math
from collections import OrderedDict
from typing import NamedTuple

import numpy as np

from nanochat.dataset import read_row_group, row_group_sizes

MIN_LANES = 8                   # divisible by 1, 2, 4 and 8: these world sizes share one order, and one checkpoint
BUFFER_PIECES = 64              # pieces to choose from when a gap is to be filled
BLOCK_DOCUMENTS = 256           # consecutive documents that one lane reads
ENCODE_DOCUMENTS = 16           # documents tokenized at once: enough for several threads, too few to make anyone wait
CACHE_BYTES = 256 * 2**20       # row groups kept because the next lane wants the next block of the same one
WINDOW_BATCHES = 16             # padded batches are made of similar lengths within this many batches


def new_counts():
    return {"positions": 0, "padding": 0, "truncated": 0, "skipped": 0}


class PackedLane:
    """One lane's buffer of pieces [item, offset, tokens, trained], oldest first, and the rows made of them."""

    def __init__(self, feed, number, num_lanes, B, T, bos_id, split, saved):
        self.feed, self.num_lanes, self.B, self.T, self.bos_id, self.split = feed, num_lanes, B, T, bos_id, split
        self.next = feed.start_of_block(number) if saved is None else saved["next"]
        self.counts = new_counts() if saved is None else dict(saved["counts"])
        self.pieces = []
        if saved is not None and saved["pieces"]:
            items = sorted({item for item, _ in saved["pieces"]})
            encoded = dict(zip(items, feed.encode(items)))
            self.pieces = [[item, offset, encoded[item].tokens, encoded[item].trained] for item, offset in saved["pieces"]]

    def snapshot(self):
        """Where to go on: the next item, and the pieces by reference, which the feed can encode again."""
        return {"next": self.next, "pieces": [piece[:2] for piece in self.pieces], "counts": dict(self.counts)}

    def micro_batch(self, index):
        B, T = self.B, self.T
        rows = np.full((B, T + 1), self.bos_id, dtype=np.int64)
        trained = np.zeros((B, T + 1), dtype=bool)
        for row in range(B):
            used = self.fill(rows[row], trained[row])
            self.counts["padding"] += T + 1 - used
        self.counts["positions"] += B * T
        return rows[:, :-1].copy(), np.where(trained[:, 1:], rows[:, 1:], -1)

    def fill(self, row, trained):
        """Write pieces into one row of T + 1 tokens -> how many were written."""
        used = 0
        while used < len(row):
            self.refill()
            chosen = self.choose(len(row) - used, opening=used == 0)
            if chosen is None:
                break
            item, offset, tokens, mask = self.pieces.pop(chosen)
            count = min(len(tokens) - offset, len(row) - used - 1)
            row[used] = self.bos_id
            row[used + 1:used + 1 + count] = tokens[offset:offset + count]
            trained[used] = mask is None  # the end of what came before; a mask never trains on <|bos|>
            trained[used + 1:used + 1 + count] = True if mask is None else mask[offset:offset + count]
            used += 1 + count
            if offset + count < len(tokens):
                # to the back of the buffer: neighbouring rows of one long document would make a batch of one opinion
                self.pieces.append([item, offset + count, tokens, mask])
        return used

    def choose(self, room, opening):
        """The piece for the next `room` tokens: the oldest for a new row, so that none waits forever, else the largest that fits."""
        if opening:
            return 0
        best, best_size = None, 0
        for index, (_, offset, tokens, _) in enumerate(self.pieces):
            size = 1 + len(tokens) - offset
            if best_size < size <= room:
                best, best_size = index, size
        return 0 if best is None and self.split else best

    def refill(self):
        limit = self.next + 2 * self.num_lanes * self.feed.num_items
        while len(self.pieces) < BUFFER_PIECES:
            if not self.pieces and self.next > limit:
                raise ValueError(f"this lane read {self.feed.num_items} items twice and found 0 tokens: the texts are empty")
            last = min(self.next + ENCODE_DOCUMENTS, self.feed.end_of_block(self.next))
            for item, encoded in zip(range(self.next, last), self.feed.encode(range(self.next, last))):
                self.counts["truncated"] += encoded.truncated
                if len(encoded.tokens):
                    self.pieces.append([item, 0, encoded.tokens, encoded.trained])
                else:
                    self.counts["skipped"] += 1
            self.next = last if last < self.feed.end_of_block(last - 1) else self.feed.later_block(last - 1, self.num_lanes)


class PaddedLane:
    """One conversation per row. A micro-batch depends on its index alone, so all there is to remember are the counts."""

    def __init__(self, feed, number, B, T, bos_id, pad_multiple, stop, saved):
        self.feed, self.B, self.T, self.bos_id, self.pad_multiple, self.stop = feed, B, T, bos_id, pad_multiple, stop
        self.next = number * B if saved is None else saved["next"]
        self.counts = new_counts() if saved is None else dict(saved["counts"])

    def snapshot(self):
        return {"next": self.next, "counts": dict(self.counts)}

    def micro_batch(self, index):
        self.next = (index + 1) * self.B
        window = self.feed.window(index // WINDOW_BATCHES, WINDOW_BATCHES, self.B, self.stop)
        place = index % WINDOW_BATCHES
        rows = self.feed.encode(window[place] if place < len(window) else [])
        longest = max([len(row.tokens) for row in rows], default=1)  # tokens lack <|bos|>, so this counts the targets
        T = min(self.T, self.pad_multiple * math.ceil(longest / self.pad_multiple))
        inputs = np.full((max(1, len(rows)), T), self.bos_id, dtype=np.int64)
        targets = np.full_like(inputs, -1)
        for row, (tokens, trained, truncated) in enumerate(rows):
            inputs[row, 1:len(tokens)] = tokens[:-1]
            targets[row, :len(tokens)] = np.where(trained, tokens, -1)
            self.counts["truncated"] += truncated
            self.counts["skipped"] += not trained.any()
        self.counts["positions"] += targets.size
        self.counts["padding"] += targets.size - sum(len(row.tokens) for row in rows)
        return inputs, targets


# -- feeds ------------------------------------------------------------------------------------------------------------

class Encoded(NamedTuple):
    tokens: np.ndarray            # without the leading <|bos|>
    trained: np.ndarray | None    # one boolean per token; None = all
    truncated: bool


class Feed:
    """The arithmetic of blocks: `block_size` items each, the last of an epoch shorter, numbered through all epochs."""

    def __init__(self, num_items, block_size):
        self.num_items, self.block_size, self.num_blocks = num_items, block_size, math.ceil(num_items / block_size)

    def start_of_block(self, block):
        epoch, block = divmod(block, self.num_blocks)
        return epoch * self.num_items + block * self.block_size

    def end_of_block(self, item):
        epoch, item = divmod(item, self.num_items)
        return epoch * self.num_items + min(self.num_items, (item // self.block_size + 1) * self.block_size)

    def later_block(self, item, distance):
        """First item of the block that comes `distance` blocks after the one `item` is in."""
        epoch, item = divmod(item, self.num_items)
        return self.start_of_block(epoch * self.num_blocks + item // self.block_size + distance)


class DocumentFeed(Feed):
    """The documents of parquet shards in file order, tokenized on request."""

    def __init__(self, tokenizer, shards, num_threads):
        self.tokenizer, self.num_threads = tokenizer, num_threads
        self.groups, sizes = [], []
        for shard in shards:
            for group, size in enumerate(row_group_sizes(shard)):
                self.groups.append((shard, group))
                sizes.append(size)
        self.ends = np.cumsum(sizes)
        num_items = int(sum(sizes))
        if not num_items:
            raise ValueError(f"the {len(shards)} shards hold 0 documents: give at least one with text")
        # few documents: smaller blocks, or the lanes of one step would read the same one in different epochs
        super().__init__(num_items, max(1, min(BLOCK_DOCUMENTS, num_items // (4 * MIN_LANES))))
        self.cache = OrderedDict()

    def encode(self, items):
        texts = [self.text(item % self.num_items) for item in items]
        return [Encoded(np.array(ids, dtype=np.int32), None, False)
                for ids in self.tokenizer.encode(texts, num_threads=self.num_threads)]

    def text(self, item):
        group = int(np.searchsorted(self.ends, item, side="right"))
        if group not in self.cache:
            self.cache[group] = read_row_group(*self.groups[group])
            while len(self.cache) > 1 and sum(column.nbytes for column in self.cache.values()) > CACHE_BYTES:
                self.cache.popitem(last=False)
        self.cache.move_to_end(group)
        column = self.cache[group]
        return column[item - int(self.ends[group]) + len(column)].as_py() or ""


class ConversationFeed(Feed):
    """The conversations of a task, each epoch in an order of its own, rendered on request."""

    def __init__(self, tokenizer, task, seq_len, seed, train_on_all):
        if not len(task):
            raise ValueError("the task has 0 conversations: check its split, its slice and its data folder")
        super().__init__(len(task), 1)
        self.tokenizer, self.task, self.seq_len, self.seed, self.train_on_all = tokenizer, task, seq_len, seed, train_on_all
        self.orders, self.windows = OrderedDict(), OrderedDict()

    def encode(self, items):
        return [self.render(self.conversation(item)) for item in items]

    def render(self, conversation):
        T = self.seq_len
        ids, mask = self.tokenizer.render_conversation(conversation, max_tokens=T + 2)  # one more than used shows a cut
        assert ids[0] == self.tokenizer.bos_id, ids[:4]
        trained = None if self.train_on_all else np.array(mask[1:T + 1], dtype=bool)
        return Encoded(np.array(ids[1:T + 1], dtype=np.int32), trained, len(ids) > T + 1)

    def conversation(self, item):
        epoch, item = divmod(item, self.num_items)
        order = remember(self.orders, epoch, lambda: np.random.default_rng([self.seed, epoch]).permutation(self.num_items))
        return self.task[int(order[item])]

    def window(self, number, num_batches, B, stop):
        """Window `number` -> its batches, each a list of items of similar length, in a random order."""
        def build():
            first = number * num_batches * B
            items = range(first, first + num_batches * B if stop is None else min(first + num_batches * B, stop))
            items = sorted(items, key=lambda item: num_characters(self.conversation(item)))  # stable: ties keep their order
            batches = [items[start:start + B] for start in range(0, len(items), B)]
            return [batches[index] for index in np.random.default_rng([self.seed, number, B]).permutation(len(batches))]

        return remember(self.windows, number, build)


def remember(cache, key, build, size=2):
    """cache[key], built when missing; only the last `size` entries are kept, since the stream moves forward."""
    if key not in cache:
        cache[key] = build()
        while len(cache) > size:
            cache.popitem(last=False)
    return cache[key]


def num_characters(conversation):
    """A conversation's length without tokenizing it: good enough to sort by."""
    contents = [message["content"] for message in conversation["messages"]]
    return sum(len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content) for content in contents)
