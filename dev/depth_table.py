"""Depth -> parameters, memory, tokens, time and cost of pretraining, computed from a measured throughput.

    python -m dev.bench.train_step > bench.txt; python -m dev.depth_table --bench=bench.txt --price=2
    python -m dev.depth_table --tokens-per-second=400000 --at-depth=8 --depths 8 12 20      # train/tok_per_sec of a base_train run
    python -m dev.depth_table --flops=4e14 --devices=8 --price=24            # what one device is ASSUMED to reach, in FLOP/s

Parameters and FLOPs are counted on the real GPT, on torch's meta device; the number of tokens is base_train's own. What is an assumption is printed
under the table. The last line is JSON.
"""
import json
import math
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch

from nanochat.configurator import parse
from nanochat.gpt import GPT, GPTConfig, config_from_depth
from nanochat.vocab_loss import CHUNK_NUMBERS
from scripts import base_train

BYTES = {"float32": 4, "bfloat16": 2}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Config:
    """Compute size, memory, tokens, time and cost of pretraining by depth."""
    depths: tuple[int, ...] = (4, 8, 12, 16, 20, 24, 28, 32)  # layers; the width is 64 * depth
    # Speed: exactly one of the three
    bench: str | None = None         # file with the output of dev.bench.train_step
    tokens_per_second: float = -1    # measured by base_train (train/tok_per_sec) at --at-depth, over --measured-devices
    flops: float = -1                # FLOP/s that one device reaches in training: an assumption, unless you measured it
    at_depth: int = -1               # depth at which --tokens-per-second was measured, with the sizes below
    measured_devices: int = 1        # devices that reached --tokens-per-second together
    # What is to be trained
    devices: int = 1                 # devices that train
    scaling: float = 1.0             # share of its speed that a device keeps among the others
    price: float = -1                # dollars an hour for all devices together (-1 = no cost)
    ratio: float = 20                # training tokens per parameter (Chinchilla: 20)
    vocab_size: int = 65536          # rows of the embedding
    max_seq_len: int = 2048          # context length in tokens
    head_dim: int = 128              # size of an attention head
    device_batch_size: int = 32      # sequences per device per pass
    total_batch_size: int = 524288   # tokens per optimizer step
    dtype: str = "bfloat16"          # of the activations


def main(config):
    check(config)
    reached, source = flops_per_device(config)
    rows = [row(config, depth, reached) for depth in config.depths]
    print(f"{source}: {reached:.3g} FLOP/s per device; {config.devices} device{'s' * (config.devices != 1)}, {config.ratio:g} tokens per parameter, context "
          f"{config.max_seq_len}, vocabulary {config.vocab_size:,}\n")
    print("\n".join(markdown(rows)))
    print("\n" + "\n".join(f"- {line}" for line in assumptions(config)))
    print(json.dumps({"source": source, "flops_per_device": reached, "rows": rows}))
    return rows


def check(config):
    if sum((config.bench is not None, config.tokens_per_second > 0, config.flops > 0)) != 1:
        raise ValueError("give the speed in exactly one way: --bench=FILE, or --tokens-per-second=N with --at-depth=D, or --flops=F")
    if config.tokens_per_second > 0 and config.at_depth < 1:
        raise ValueError(f"--tokens-per-second={config.tokens_per_second:g} was measured at some depth: say which by --at-depth")
    if config.dtype not in BYTES:
        raise ValueError(f"dtype={config.dtype!r} is not one of {', '.join(BYTES)}")
    for knob in ("measured_devices", "devices", "scaling", "ratio", "vocab_size", "max_seq_len", "device_batch_size", "total_batch_size"):
        if getattr(config, knob) <= 0:
            raise ValueError(f"{knob}={getattr(config, knob)} must be more than 0")
    if min(config.depths, default=0) < 1:
        raise ValueError(f"depths={config.depths} must be at least one number, each at least 1")


def flops_per_device(config):
    """-> (FLOP/s that one device reaches, where that comes from)."""
    if config.flops > 0:
        return config.flops, "given by --flops"
    if config.tokens_per_second > 0:
        return config.tokens_per_second / config.measured_devices * model_of(config, config.at_depth).flops_per_token(), \
            f"{config.tokens_per_second:,.0f} tokens/s at depth {config.at_depth} on {config.measured_devices} device{'s' * (config.measured_devices != 1)}"
    try:
        bench = json.loads(Path(config.bench).read_text(encoding="utf-8").strip().splitlines()[-1])
        sizes, speed = bench["config"], float(bench["modes"][bench["default"]]["tok_per_sec"])
        with torch.device("meta"):
            model = GPT(config_from_depth(sizes["depth"], sizes["vocab_size"], sizes["seq_len"], sizes["n_embd"], sizes["head_dim"]))
    except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{config.bench} does not end with the JSON of dev.bench.train_step ({type(error).__name__}: {error}): run that and keep its output") from error
    return speed * model.flops_per_token(), f"measured on {bench['device']} ({bench['default']}, depth {sizes['depth']}, {speed:,.0f} tokens/s)"


def model_of(config, depth):
    """The real model, without storage."""
    with torch.device("meta"):
        return GPT(config_from_depth(depth, config.vocab_size, config.max_seq_len, head_dim=config.head_dim), DTYPES[config.dtype])


def row(config, depth, reached):
    model = model_of(config, depth)
    plan = replace(base_train.Config(), target_param_data_ratio=config.ratio, total_batch_size=config.total_batch_size)
    steps = int(base_train.count_steps(plan, model))
    tokens = steps * config.total_batch_size
    speed = reached / model.flops_per_token() * config.devices * (config.scaling if config.devices > 1 else 1.0)
    hours = tokens / speed / 3600
    return {"depth": depth, "width": model.config.n_embd, "parameters": model.num_params(), "memory": memory(config, model), "steps": steps, "tokens": tokens,
            "flops": tokens * model.flops_per_token(), "tokens_per_second": speed, "hours": hours, "dollars": hours * config.price if config.price >= 0 else None}


# -- memory -----------------------------------------------------------------------------------------------------------

def memory(config, model):
    """{part: bytes} on one device at the peak of a training step."""
    parts = fixed_memory(model, config.devices, BYTES[config.dtype])
    tokens = config.device_batch_size * config.max_seq_len
    parts["activations"] = round(tokens * activation_bytes(model.config, config.dtype))
    parts["loss"] = loss_memory(model.config, tokens, BYTES[config.dtype])
    step = 8 * sum(weight.numel() for weight in model.transformer.h.parameters())  # Muon's stacks, when the activations are gone
    return {**parts, "optimizer_step": step, "total": sum(parts.values()) + max(0, step - parts["activations"] - parts["loss"])}


def fixed_memory(model, devices, activation_size):
    """What does not depend on the batch: float32 weights and gradients; AdamW's two moments for embedding and head, Muon's one for the matrices, divided
    among the devices; and the matrices in the activations' dtype, which the backward pass needs."""
    total = model.num_params()
    matrices = sum(weight.numel() for weight in model.transformer.h.parameters())
    state = 4 * matrices + 8 * (total - matrices)
    return {"weights": 4 * total, "gradients": 4 * total, "optimizer": math.ceil(state / devices), "casts": activation_size * matrices if activation_size < 4 else 0}


def loss_memory(sizes, tokens, activation_size):
    """The chosen hidden states and their gradient, the head's gradient once more, and one chunk of logits, probabilities and their gradient."""
    chunk = CHUNK_NUMBERS["cuda"]
    return 2 * tokens * sizes.n_embd * activation_size + 4 * sizes.vocab_size * sizes.n_embd + min(chunk, tokens * sizes.vocab_size) * (2 * activation_size + 4)


def activation_bytes(sizes, dtype):
    """Bytes per token that the forward pass keeps for the backward pass. Every kept tensor is proportional to the width or to the number of heads, so
    four measurements of small models with heads of this size give the line."""
    head_dim = sizes.n_embd // sizes.n_head
    (one_narrow, one_wide), (two_narrow, two_wide) = ([kept_per_token(layers, heads, head_dim, dtype) for heads in (1, 2)] for layers in (1, 2))
    layer_narrow, layer_wide = two_narrow - one_narrow, two_wide - one_wide
    heads = sizes.n_embd / head_dim
    per_layer = layer_narrow + (heads - 1) * (layer_wide - layer_narrow)
    outside = (one_narrow - layer_narrow) + (heads - 1) * ((one_wide - layer_wide) - (one_narrow - layer_narrow))
    return sizes.n_layer * per_layer + outside


@lru_cache
def kept_per_token(layers, heads, head_dim, dtype, length=32):
    """Measured on a built model: the bytes kept for twice as many tokens, less those for as many, per token."""
    few, many = (kept_bytes(GPTConfig(2 * length, 64, layers, heads, heads, heads * head_dim), dtype, tokens) for tokens in (length, 2 * length))
    return (many - few) / length


def kept_bytes(sizes, dtype, tokens):
    """Bytes in all that one sequence's forward pass through the real model keeps for the backward pass, weights not counted."""
    model = GPT(sizes, DTYPES[dtype])
    model.init_weights()
    own, kept = {weight.untyped_storage().data_ptr() for weight in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)  # the tensor is held, so that no other takes its place
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.hidden(torch.zeros(1, tokens, dtype=torch.long))
    return sum(size for size, _ in kept.values())


# -- text -------------------------------------------------------------------------------------------------------------

def markdown(rows):
    priced = any(one["dollars"] is not None for one in rows)
    lines = ["| depth | width | parameters | memory per device | tokens | FLOPs | tokens/s | time |" + (" cost |" if priced else ""),
             "| ---: " * (9 if priced else 8) + "|"]
    for one in rows:
        cells = [str(one["depth"]), str(one["width"]), amount(one["parameters"]), f"{one['memory']['total'] / 2**30:.1f} GiB", amount(one["tokens"]), f"{one['flops']:.1e}",
                 f"{one['tokens_per_second']:,.0f}", duration(one["hours"])]
        lines.append(f"| {' | '.join(cells)} |" + (f" ${one['dollars']:,.2f} |" if priced else ""))
    return lines


def amount(number):
    return next((f"{number / size:.3g}{unit}" for size, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M")) if number >= size), f"{number:,}")


def duration(hours):
    return f"{hours / 24:.1f} days" if hours >= 48 else f"{hours:.1f} h" if hours >= 1 else f"{60 * hours:.1f} min"


def assumptions(config):
    return [line for line in (
        "ASSUMED: this speed; --flops was given, not measured." if config.flops > 0 else "",
        "Assumed: the FLOP/s are the same at every depth. Small models reach fewer, wide ones may reach more: measure at the depth you want.",
        f"Assumed: each of {config.devices} devices keeps {100 * config.scaling:g} % of its speed." if config.devices > 1 else "",
        "Counted: parameters, FLOPs and steps on the real model and by base_train's own rule; evaluation, saving and compilation are not in the time.",
        f"Memory is a sum for {config.device_batch_size} sequences per pass in eager mode and was not measured on a GPU: torch.compile keeps fewer activations; "
        "CUDA's own (about 1 GiB) and fragmentation come on top. A smaller --device-batch-size lowers it.",
        f"Assumed: {config.price:g} dollars an hour for everything, from the first step to the last." if config.price >= 0 else "") if line]


if __name__ == "__main__":
    main(parse(Config))
