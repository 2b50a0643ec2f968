"""Where this process computes and its place among the ranks: device, number format, process group. One process is a world of 1.

The only file besides `optim.py` and `sharding.py` that calls collectives. It knows no model.
"""
import atexit
import gc
import itertools
import json
import platform
import sys
import time
import uuid
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from nanochat.common import env


@dataclass(frozen=True)
class Compute:
    """Where and in which number format this process computes, and its place among the ranks. One process is a world of 1."""
    device: torch.device
    dtype: torch.dtype
    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    restarts: int = 0  # how often torchrun has started this job anew after a failure

    @property
    def is_master(self):
        return self.rank == 0

    def sum(self, value):
        """A number or tensor, summed over all ranks; the same type comes back."""
        if self.world_size == 1:
            return value
        if isinstance(value, torch.Tensor):
            total = value.clone()
            dist.all_reduce(total)
            return total
        total = torch.tensor(float(value), dtype=torch.float64, device=self.device)
        dist.all_reduce(total)
        return type(value)(total.item())

    def barrier(self):
        if self.world_size > 1:
            dist.barrier()

    def gather_objects(self, value):
        """Each rank's picklable `value` -> the list of all of them in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        gathered = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def synchronize(self):
        """Wait until the device has done what it was asked: a clock read before this tells nothing."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def native_dtype(device):
    """bfloat16 where the hardware multiplies it natively (CUDA SM80+, AVX-512-BF16, AMX), else float32."""
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    elif device.type == "cpu":
        fast = bool({"avx512_bf16", "amx_bf16"} & cpu_flags())
    else:
        fast = False
    return torch.bfloat16 if fast else torch.float32


def cpu_flags():
    """The processor's feature flags as the kernel lists them; empty where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return set()
    return next((set(line.split(":", 1)[1].split()) for line in lines if line.startswith("flags")), set())


def compute_init(device_type="", dtype=""):
    """Choose device and dtype ("" = the best this machine has), join torchrun's process group if there is one -> Compute."""
    atexit.register(gc.freeze)  # the end of a process would else search torch's half a million objects for garbage, for a third of a second
    rank, local_rank, world_size, restarts = (int(env(name, default)) for name, default in (
        ("RANK", "0"), ("LOCAL_RANK", "0"), ("WORLD_SIZE", "1"), ("TORCHELASTIC_RESTART_COUNT", "0")))
    if device_type not in ("", "cpu", "cuda", "mps"):
        raise ValueError(f"device_type={device_type!r} is not one of cuda, mps, cpu: leave it empty to choose the best there is")
    if dtype and dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}: leave it empty for bfloat16 where the hardware has it")
    if not device_type:
        device_type = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    device, failure = None, None
    try:
        device = choose_device(device_type, rank, local_rank)
    except ValueError as error:  # on this node alone, it may be: the others must not wait for it
        if world_size == 1 or dist.is_initialized():
            raise
        failure = error
    if world_size > 1 and not dist.is_initialized():
        sys.excepthook = report_failure
        timeout = timedelta(seconds=collective_timeout())
        store, _, _ = next(dist.rendezvous("env://", rank, world_size, timeout=timeout))
        start, restarts = meet(store, rank, world_size, next(meetings), restarts, failure)
        where = {"backend": "nccl", "device_id": device} if device_type == "cuda" else {"backend": "gloo"}
        dist.init_process_group(**where, store=dist.PrefixStore(start, store), rank=rank, world_size=world_size, timeout=timeout)
    return Compute(device, DTYPES[dtype] if dtype else native_dtype(device), rank, local_rank, world_size, restarts)


def choose_device(device_type, rank, local_rank):
    """-> torch.device, and on CUDA the process's own from now on. ValueError where there is none for this rank."""
    if device_type != "cuda":
        return torch.device(device_type)
    if not torch.cuda.is_available():
        raise ValueError("device_type='cuda', but torch sees 0 CUDA devices: use --device-type=cpu, or check the driver with nvidia-smi")
    if local_rank >= torch.cuda.device_count():
        raise ValueError(f"rank {rank} wants CUDA device {local_rank}, but there are {torch.cuda.device_count()}: "
                         "start torchrun with --nproc_per_node no larger than the number of GPUs")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 means float32; speed comes from bfloat16
    return device


def collective_timeout():
    """Seconds a rank waits for the others in a collective before it gives up, and with it the job: $NANOCHAT_TIMEOUT, else 600. Longer than
    what one rank does alone while the others wait: writing a checkpoint, the slowest answer of an evaluation."""
    given = env("NANOCHAT_TIMEOUT", "600")
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"NANOCHAT_TIMEOUT={given!r} is not a number of seconds: give a whole number such as 600, or leave it unset")
    return int(given)


meetings = itertools.count()  # of this process: a program may run several stages, each with a process group of its own


def meet(store, rank, world_size, number, restarts, failure=None):
    """The ranks of one start of a job find each other, for the `number`-th time -> (a name for this start, how often the job was started before).
    Where a rank brings a `failure`, all raise.

    torchrun keeps its store over restarts, with the addresses of processes that are gone: a rank that is started again and reads them
    waits for the dead. And each node counts only its own failures. So rank 0 announces the start under a new name, the others greet with a
    new word each, and what counts is rank 0's answer to that word."""
    word, announced = uuid.uuid4().hex, f"start-{number}"
    greeting = {"word": word, "restarts": restarts, "failure": failure and f"rank {rank} on {platform.node()} cannot start: {failure}"}
    if rank == 0:
        greeting["restarts"] = max(restarts, store.add(f"{announced}-count", 1) - 1)
        start = f"{announced}-{word}"
        store.set(announced, start)
        greetings = [greeting, *(json.loads(store.get(f"{start}/{other}")) for other in range(1, world_size))]
        answer = {"restarts": max(one["restarts"] for one in greetings), "failures": [one["failure"] for one in greetings if one["failure"]]}
        for one in greetings:
            store.set(f"{start}/{one['word']}", json.dumps(answer))
    else:
        start = None
        while start is None or not store.check([f"{start}/{word}"]):
            newest = store.get(announced).decode()
            if newest != start:
                start = newest
                store.set(f"{start}/{rank}", json.dumps(greeting))
            time.sleep(0.02)
        answer = json.loads(store.get(f"{start}/{word}"))
    if failure:
        raise failure
    if answer["failures"]:
        raise ValueError("; ".join(answer["failures"]))
    return start, answer["restarts"]


def report_failure(kind, error, trace):
    """The last word of a rank that dies of an exception: which rank, where, of what, for the console and for torchrun's summary."""
    sys.__excepthook__(kind, error, trace)
    print(f"rank {env('RANK')} of {env('WORLD_SIZE')} on {platform.node()} failed: {kind.__name__}: {error}", file=sys.stderr, flush=True)
    if env("TORCHELASTIC_ERROR_FILE"):
        get_error_handler().record_exception(error)


def compute_cleanup():
    if dist.is_initialized():
        dist.destroy_process_group()
