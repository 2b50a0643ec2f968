"""The shared steps of every training loop. The loops themselves stand in the scripts."""
import math
import random
import signal
import threading
import time
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field

import numpy as np
import torch

from nanochat.common import print0
from nanochat.hardware import peak_flops

GO_ON_LATER = 75  # the exit status of a run that was asked to stop and has saved: EX_TEMPFAIL, "try again later"


@dataclass
class LoopState:
    """All a loop must remember across a restart besides weights, optimizer and random-number generators. JSON-able."""
    step: int = 0
    tokens: int = 0                             # target tokens trained on, over all ranks
    seconds: float = 0.0                        # time in training steps, without evaluation and saving
    loader: dict = field(default_factory=dict)  # the data loader's position
    extra: dict = field(default_factory=dict)   # what one stage alone must remember

    def to_dict(self):
        return asdict(self)


def every(interval, step, last_step):
    """True at each multiple of `interval` and at the last step; never where interval is -1."""
    return interval > 0 and (step % interval == 0 or step == last_step)


def steps(state, last_step, compute, save):
    """Each step from state.step to last_step, which state.step follows. Where SIGTERM or SIGUSR1 has reached any rank (a batch system before
    the time limit, a cloud that takes its machine back), `save()` is called before the next step and the program ends with GO_ON_LATER."""
    with stop_signals() as received:
        for state.step in range(state.step, last_step + 1):
            if compute.sum(len(received)):  # the ranks hear of it at different steps and must leave at the same one
                save()
                print0(f"stopped before step {state.step} of {last_step} as asked by {received[0] if received else 'a signal to another rank'}, "
                       "and saved: --resume goes on from here")
                raise SystemExit(GO_ON_LATER)
            yield state.step


@contextmanager
def stop_signals():
    """Within it, the names of the stop signals that have arrived are collected in a list instead of ending the process."""
    received, before = [], {}
    if threading.current_thread() is threading.main_thread():  # only there can signals be handled
        for name in ("SIGTERM", "SIGUSR1"):
            if hasattr(signal, name):
                before[name] = signal.signal(getattr(signal, name), lambda number, frame: received.append(signal.Signals(number).name))
    try:
        yield received
    finally:
        for name, handler in before.items():
            signal.signal(getattr(signal, name), handler)


def num_micro_batches(total_batch_size, device_batch_size, sequence_len, compute):
    """How many passes each rank makes per optimizer step to see `total_batch_size` tokens. ValueError where they do not divide."""
    one_pass = device_batch_size * sequence_len * compute.world_size
    if total_batch_size <= 0 or total_batch_size % one_pass:
        nearest = max(1, round(total_batch_size / one_pass)) * one_pass
        raise ValueError(f"total_batch_size={total_batch_size} is not a multiple of the {one_pass} tokens in one pass "
                         f"({device_batch_size} sequences x {sequence_len} tokens x {compute.world_size} ranks): try {nearest}")
    return total_batch_size // one_pass


def take(loader, count):
    return [next(loader) for _ in range(count)]


def data_metrics(loader, compute):
    """What the loader had to do with the data so far, over all ranks: conversations cut to the limit, items without anything to
    train on, the share of target positions that are padding, and passes over the data."""
    counts = {name: int(compute.sum(count)) for name, count in loader.counts.items()}
    return {"data/truncated": counts["truncated"], "data/untrained": counts["skipped"],
            "data/padding_share": counts["padding"] / max(1, counts["positions"]), "data/epoch": loader.progress}


def accumulate(loss_sum, batches, compute):
    """Gradients of the mean loss over all target tokens of all micro-batches and ranks -> (that mean, number of tokens).

    `loss_sum(batch)` is a summed loss. The tokens are counted first, because a mean of means lets short answers shout.
    """
    count = compute.sum(sum(int((batch.targets != -1).sum()) for batch in batches))
    if count == 0:
        raise ValueError("a step without a single target token: check the data's masks and lengths")
    total = 0.0
    for batch in batches:
        loss = loss_sum(batch)
        # the optimizer averages over ranks, so each rank's share is divided by tokens per rank
        (loss * (compute.world_size / count)).backward()
        total += loss.detach()
    return float(compute.sum(total)) / count, count


def optimizer_step(optimizer, loss, step, lr_mult=1.0, grad_clip=1.0, momentum=0.95):
    """Update and clear the gradients -> the gradient norm. A non-finite loss or norm stops the run and names the step."""
    if not math.isfinite(loss):
        raise ValueError(f"the loss of step {step} is {loss}: nothing was updated; resume from the last checkpoint with a lower learning rate")
    norm = optimizer.step(lr_mult=lr_mult, grad_clip=grad_clip, momentum=momentum)
    optimizer.zero_grad()
    if not math.isfinite(norm):
        raise ValueError(f"the gradient norm of step {step} is {norm}: resume from the last checkpoint with a lower learning rate")
    return norm


class Throughput:
    """Tokens per second and model FLOPs utilisation since the last `tick`; the clock starts anew after evaluations."""

    def __init__(self, model, compute):
        self.flops_per_token, self.compute = model.flops_per_token(), compute
        name = torch.cuda.get_device_name(compute.device) if compute.device.type == "cuda" else ""
        self.peak = peak_flops(name)
        self.start()

    def start(self):
        self.compute.synchronize()
        self.since = time.perf_counter()

    def tick(self, tokens):
        """`tokens` over all ranks since `start` -> ({"time/step_ms", "train/tok_per_sec", maybe "train/mfu"}, seconds)."""
        self.compute.synchronize()
        seconds = time.perf_counter() - self.since
        self.start()
        metrics = {"time/step_ms": 1000 * seconds, "train/tok_per_sec": tokens / seconds}
        if self.peak:
            metrics["train/mfu"] = tokens / seconds * self.flops_per_token / (self.peak * self.compute.world_size)
        return metrics, seconds


def seed_everything(seed):
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def rng_state():
    """The state of every random-number generator in tensors and plain numbers, which load with weights_only."""
    version, words, gauss = random.getstate()
    name, keys, position, has_gauss, cached = np.random.get_state()
    return {"python": [version, list(words), gauss], "numpy": [name, keys.tolist(), int(position), int(has_gauss), float(cached)],
            "torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def set_rng_state(state):
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
