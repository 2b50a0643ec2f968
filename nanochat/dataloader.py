"""Documents or conversations -> (inputs, targets) micro-batches of (B, T), in an order that no world size changes.

All micro-batches of a run form one sequence 0, 1, 2, ...; rank r of W takes r, r + W, r + 2W, ... Micro-batch j is filled
by lane j % num_lanes, and each lane reads blocks of its own, so a rank needs only its own lanes, and one rank with two
micro-batches in a step sees what two ranks with one see. A thread works ahead; the state is that of the last batch handed out.
"""
import math
import queue
import threading
import time
import weakref
from typing import NamedTuple

import torch

from nanochat.packing import MIN_LANES, ConversationFeed, DocumentFeed, PackedLane, PaddedLane, new_counts


class Batch(NamedTuple):
    inputs: torch.Tensor   # (B, T) int64
    targets: torch.Tensor  # (B, T) int64, -1 = ignored


class Loader:
    """An iterator of this rank's batches, made ahead of time by one thread. Its children decide what the lanes are."""

    def __init__(self, make_lane, data, rank, world_size, device, state, max_batches, prefetch):
        """`make_lane(number, saved)` builds a lane, `data` names what a state belongs to, `max_batches` counts from the stream's start."""
        if not 0 <= rank < world_size:
            raise ValueError(f"rank={rank} does not exist in a world of {world_size}: ranks are 0 to {world_size - 1}")
        self.device = torch.device(device)
        self.num_lanes = world_size * math.ceil(MIN_LANES / world_size)
        self.data = {"num_lanes": self.num_lanes, **data}
        self.world_size = world_size
        self.wait_seconds = 0.0
        self.num_micro_batches = 0 if state is None else state["num_micro_batches"]  # yielded by all ranks together
        first = self.num_micro_batches + rank
        numbers = sorted({(first + turn * world_size) % self.num_lanes for turn in range(self.num_lanes)})
        if state is not None:
            check_state(state, self.data, numbers)
        lanes = {number: make_lane(number, state and state["lanes"][str(number)]) for number in numbers}
        self.saved = {str(number): lane.snapshot() for number, lane in lanes.items()}
        rounds = None if max_batches is None else max(0, max_batches - self.num_micro_batches // world_size)
        self.queue, self.stop, self.thread = queue.Queue(maxsize=prefetch), threading.Event(), None
        self.work = (lanes, first, world_size, rounds, self.device, self.queue, self.stop)
        weakref.finalize(self, self.stop.set)  # the thread holds the lanes, not the loader, so a forgotten loader ends it

    def __iter__(self):
        return self

    def __next__(self):
        if self.stop.is_set():
            raise StopIteration
        if self.thread is None:
            self.thread = threading.Thread(target=work_ahead, args=self.work, name="dataloader", daemon=True)
            self.thread.start()
        began = time.perf_counter()
        item = self.queue.get()
        self.wait_seconds += time.perf_counter() - began
        if isinstance(item, BaseException):
            self.close()
            raise item
        batch, lane, snapshot = item
        self.num_micro_batches += self.world_size
        self.saved[lane] = snapshot
        return Batch(*(part.to(self.device, non_blocking=True) for part in batch))

    def state(self):
        """JSON-able position after the last batch handed out; `merge_states` makes one of all ranks' states."""
        return {"num_micro_batches": self.num_micro_batches, "data": self.data, "lanes": dict(self.saved)}

    @property
    def counts(self):
        """{"positions", "padding", "truncated", "skipped"} of this rank so far: target positions, those without a token, ..."""
        return {name: sum(lane["counts"][name] for lane in self.saved.values()) for name in new_counts()}

    @property
    def progress(self):
        """Epochs handed out, as a fraction: 1.25 is a quarter into the second. What waits in a buffer does not count; ranks differ a little."""
        waiting = {number: self.num_lanes * len(lane.get("pieces", ())) for number, lane in self.saved.items()}
        return max(0, min(lane["next"] - waiting[number] for number, lane in self.saved.items())) / self.data["num_items"]

    @property
    def epoch(self):
        return int(self.progress)

    def close(self):
        """End the thread. The state stays readable; there are no more batches."""
        self.stop.set()
        if self.thread is not None:
            self.thread.join()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


class PretrainingLoader(Loader):
    """Documents packed into full rows: each row and each piece begins with <|bos|>, and every token is a target exactly once.

    A gap takes the largest piece that fits, else the head of the oldest, whose tail becomes a new piece. Cropping instead
    would throw away half of the text at T=512.
    """

    def __init__(self, tokenizer, shards, device_batch_size, seq_len, rank=0, world_size=1, device="cpu", state=None,
                 num_threads=1, max_batches=None, prefetch=8):
        check_sizes(device_batch_size, seq_len)
        feed = DocumentFeed(tokenizer, shards, num_threads)

        def make_lane(number, saved):
            return PackedLane(feed, number, self.num_lanes, device_batch_size, seq_len, tokenizer.bos_id, True, saved)

        super().__init__(make_lane, {"num_items": feed.num_items, "seed": None}, rank, world_size, device, state, max_batches, prefetch)


class ConversationLoader(Loader):
    """Whole conversations packed into rows; what no conversation fills is padding. `train_on_all` ignores the mask.

    `task` is anything with a length whose items are conversations; each epoch walks it in a new order drawn from `seed`.
    """

    def __init__(self, tokenizer, task, device_batch_size, seq_len, rank=0, world_size=1, device="cpu", state=None,
                 train_on_all=False, seed=42, max_batches=None, prefetch=8):
        check_sizes(device_batch_size, seq_len)
        feed = ConversationFeed(tokenizer, task, seq_len, seed, train_on_all)

        def make_lane(number, saved):
            return PackedLane(feed, number, self.num_lanes, device_batch_size, seq_len, tokenizer.bos_id, False, saved)

        super().__init__(make_lane, {"num_items": feed.num_items, "seed": seed}, rank, world_size, device, state, max_batches, prefetch)


class PaddedLoader(Loader):
    """One conversation per row, padded to a multiple of `pad_multiple`, at most T long; targets only where the mask is 1.

    Micro-batch j is always the same conversations, grouped by length within a window. `num_epochs` ends the stream there:
    the last batch may have fewer rows, and a rank that comes too late for it gets one ignored row, so ranks stay in step.
    `len` is the number of this rank's micro-batches in num_epochs, or in one epoch of an endless stream.
    """

    def __init__(self, tokenizer, task, device_batch_size, seq_len, rank=0, world_size=1, device="cpu", state=None,
                 seed=42, pad_multiple=32, num_epochs=None, max_batches=None, prefetch=8):
        check_sizes(device_batch_size, seq_len)
        feed = ConversationFeed(tokenizer, task, seq_len, seed, train_on_all=False)
        stop = None if num_epochs is None else num_epochs * feed.num_items
        self.num_batches = math.ceil((stop or feed.num_items) / (device_batch_size * world_size))
        if stop is not None:
            max_batches = min(max_batches or self.num_batches, self.num_batches)

        def make_lane(number, saved):
            return PaddedLane(feed, number, device_batch_size, seq_len, tokenizer.bos_id, pad_multiple, stop, saved)

        super().__init__(make_lane, {"num_items": feed.num_items, "seed": seed}, rank, world_size, device, state, max_batches, prefetch)

    def __len__(self):
        return self.num_batches


def merge_states(states):
    """The states of all ranks after the same step -> one state from which 1, 2, 4 or 8 ranks can go on. A stage without a loader
    has empty states, which stay empty."""
    if not any(states):
        return {}
    assert len({state["num_micro_batches"] for state in states}) == 1, [state["num_micro_batches"] for state in states]
    return {**states[0], "lanes": {number: lane for state in states for number, lane in state["lanes"].items()}}


def check_state(state, data, numbers):
    different = {name: (state["data"].get(name), value) for name, value in data.items() if state["data"].get(name) != value}
    if different:
        raise ValueError("this state belongs to other data: " + ", ".join(f"{name} was {was} and is {now}" for name, (was, now)
                         in different.items()) + ": go on with the same data and seed, and a world size with the same num_lanes, or start anew")
    missing = [number for number in numbers if str(number) not in state["lanes"]]
    if missing:
        raise ValueError(f"this state has lanes {', '.join(state['lanes'])}, but this rank also needs {missing}: "
                         "give it the state of the same rank, or merge_states of all ranks")


def check_sizes(device_batch_size, seq_len):
    if device_batch_size < 1 or seq_len < 1:
        raise ValueError(f"device_batch_size={device_batch_size} and seq_len={seq_len} must both be at least 1")


# -- the thread -------------------------------------------------------------------------------------------------------

def work_ahead(lanes, first, world_size, rounds, device, batches, stop):
    """Fill the queue with (batch, lane, snapshot) until `rounds` are done or `stop` is set; an exception goes to the consumer."""
    def put(item):
        while not stop.is_set():
            try:
                return batches.put(item, timeout=0.1)
            except queue.Full:
                continue

    try:
        pin = device.type == "cuda"
        if pin and device.index is not None:
            torch.cuda.set_device(device)  # a new thread stands on GPU 0, and pinning there would open a context for every rank
        turn, num_lanes = 0, len(lanes) * world_size
        while not stop.is_set() and (rounds is None or turn < rounds):
            index = first + turn * world_size
            lane = lanes[index % num_lanes]
            batch = [torch.from_numpy(part) for part in lane.micro_batch(index)]
            put(([part.pin_memory() for part in batch] if pin else batch, str(index % num_lanes), lane.snapshot()))
            turn += 1
        put(StopIteration())
    except BaseException as error:  # whatever it is, the consumer must not wait forever
        put(error)
