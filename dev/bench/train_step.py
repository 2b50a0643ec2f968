"""Training tokens per second of our default beside our own eager float32, and memory of the loss against the vocabulary.

    python -m dev.bench.train_step                            # CPU: depth 4, width 256, vocabulary 8192, 4 x 512 tokens
    python -m dev.bench.train_step --depth=12 --n-embd=-1 --head-dim=128 --vocab-size=65536 --batch-size=32 --seq-len=2048

The modes take turns in one run, so that a noisy machine slows them alike. The last line is JSON.
"""
import gc
import json
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace

import torch

from nanochat.compute import compute_init
from nanochat.configurator import parse
from nanochat.gpt import GPT, config_from_depth
from nanochat.hardware import peak_flops
from nanochat.optim import MuonAdamW
from nanochat.vocab_loss import summed_loss


@dataclass(frozen=True)
class Config:
    """Training tokens per second of our default beside our own eager float32."""
    device_type: str = ""     # cuda or cpu ("" = the best there is)
    depth: int = 4            # layers
    n_embd: int = 256         # width (-1 = 64 * depth)
    head_dim: int = 64        # size of an attention head
    vocab_size: int = 8192    # vocabulary
    batch_size: int = 4       # sequences per step
    seq_len: int = 512        # tokens per sequence
    rounds: int = 8           # turns of every mode
    memory_of: int = -1       # for the script itself: print the peak memory of one loss at this vocabulary and stop


def main(config):
    compute = compute_init(config.device_type)
    if config.memory_of > 0:
        print(peak_of_loss(config.memory_of, compute))
        return
    modes = {"eager float32": (torch.float32, False), f"compiled {compute.dtype}".replace("torch.", ""): (compute.dtype, True)}
    if compute.device.type == "cpu":
        modes["compiled float32"] = (torch.float32, True)
    steps = {name: make_step(config, replace(compute, dtype=dtype), compiled) for name, (dtype, compiled) in modes.items()}
    seconds = {name: [] for name in steps}
    for step in steps.values():
        for _ in range(3):  # compiles, fills caches
            step()
    for _ in range(config.rounds):
        for name, step in steps.items():
            seconds[name].append(timed(step, compute))
    tokens = config.batch_size * config.seq_len
    flops = make_model(config, compute).flops_per_token()
    peak = peak_flops(torch.cuda.get_device_name()) if compute.device.type == "cuda" else None
    results = {}
    for name, times in seconds.items():
        best = min(times)
        results[name] = {"ms_min": 1000 * best, "ms_median": 1000 * statistics.median(times), "tok_per_sec": tokens / best,
                         **({"mfu": tokens / best * flops / peak} if peak else {})}
        print(f"{name:20s} {1000 * best:8.1f} ms at best, {1000 * statistics.median(times):8.1f} median, {tokens / best:10,.0f} tok/s")
    default = next(name for name in modes if name.startswith("compiled"))
    ratio = statistics.median(slow / fast for slow, fast in zip(seconds["eager float32"], seconds[default]))
    memory = loss_memory(config, compute)
    print(f"default / eager float32: {ratio:.2f} x; peak memory of one loss, MB by vocabulary: {memory}")
    print(json.dumps({"config": config.__dict__, "device": compute.device.type, "threads": torch.get_num_threads(), "modes": results,
                      "default": default, "ratio_default_to_eager_float32": ratio, "loss_peak_mb_by_vocabulary": memory}))


def make_model(config, compute):
    model = GPT(config_from_depth(config.depth, config.vocab_size, config.seq_len, config.n_embd, config.head_dim), compute.dtype)
    model.init_weights()
    return model.to(compute.device)


def make_step(config, compute, compiled):
    model = make_model(config, compute)
    optimizer = MuonAdamW(model, compute)
    if compiled:
        model.compile_for_training()
    ids = torch.randint(0, config.vocab_size, (config.batch_size, config.seq_len + 1), device=compute.device)

    def step():
        model(ids[:, :-1], ids[:, 1:]).backward()
        optimizer.step(grad_clip=1.0)
        optimizer.zero_grad()
    return step


def timed(step, compute):
    compute.synchronize()
    began = time.perf_counter()
    step()
    compute.synchronize()
    return time.perf_counter() - began


def loss_memory(config, compute):
    """{vocabulary: peak MB of the loss of 4096 rows of width 64, beyond weights and their gradient}, each in a fresh process."""
    result = {}
    for vocab_size in (8192, 32768, 131072):
        command = [sys.executable, "-m", "dev.bench.train_step", f"--memory-of={vocab_size}", f"--device-type={compute.device.type}"]
        result[vocab_size] = round(float(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]), 1)
    return result


def peak_of_loss(vocab_size, compute, rows=4096, width=64):
    hidden = torch.randn(rows, width, device=compute.device, requires_grad=True)
    weight = torch.randn(vocab_size, width, device=compute.device, requires_grad=True)
    targets = torch.randint(0, vocab_size, (rows,), device=compute.device)
    sizes = 4 * 3 * weight.numel()  # the weight, its gradient, and the buffer in which that is summed
    if compute.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        summed_loss(hidden, weight, targets).backward()
        return (torch.cuda.max_memory_allocated() - sizes) / 1e6
    before, peak = resident(), 0
    gc.collect()
    stop = threading.Event()

    def watch():
        nonlocal peak
        while not stop.is_set():
            peak = max(peak, resident())
            time.sleep(0.0005)
    watcher = threading.Thread(target=watch)
    watcher.start()
    summed_loss(hidden, weight, targets).backward()
    stop.set()
    watcher.join()
    return (peak - before - (sizes - 4 * weight.numel())) / 1e6


def resident():
    """Bytes of this process in memory, from the kernel."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


if __name__ == "__main__":
    main(parse(Config))
