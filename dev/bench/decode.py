"""Tokens per second of our engine beside Hugging Face's `generate`, on the same weights in the same process.

    python dev/bench/decode.py --device=cpu --threads=2

Three loads: "equal" prompts of `--prompt-tokens`; "ragged" ones between a quarter of that and twice as many; and "uneven", ragged
prompts whose answers also end at different places, as answers do (an eighth of `--new-tokens` to all of them; Hugging Face computes
until the longest is done, and only wanted tokens count). Greedy for both, unless `--sample`. Hugging Face pads on the left. The runs
are taken in turns, so that a busy machine hurts both; a ratio is the median over the turns, a speed the best of them. The last line is JSON.
"""
import json
import os
import random
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch  # noqa: E402

from nanochat.compute import Compute, compute_init  # noqa: E402
from nanochat.configurator import parse  # noqa: E402
from nanochat.engine import Engine, Request  # noqa: E402
from nanochat.gpt import GPT, config_from_depth  # noqa: E402

MARKERS = ("bos", "user_start", "user_end", "assistant_start", "assistant_end", "python_start", "python_end", "output_start", "output_end")


@dataclass(frozen=True)
class Config:
    """Measure decoding."""
    device: str = ""                          # cuda or cpu ("" = the best there is)
    depth: int = 4                            # layers; the width is 64 times as many
    vocab_size: int = 8192                    # rows of the head
    batches: tuple[int, ...] = (1, 16, 32, 128)  # rows at once
    dtypes: tuple[str, ...] = ("float32", "")  # number formats ("" = the machine's default)
    prompt_tokens: int = 64                   # length of the equal prompts
    new_tokens: int = 128                     # tokens to generate per row
    repeats: int = 5                          # runs of each, taken in turns
    threads: int = 2                          # of a CPU
    clock: str = "wall"                       # wall, or cpu: seconds of processor time, for a CPU that others use too (with threads=1)
    sample: bool = False                      # both sample at temperature 1 instead of greedily
    peer: bool = True                         # measure Hugging Face too


class Numbers:
    """What the engine asks of a tokenizer, for a model that has never seen text."""

    def __init__(self, vocab_size):
        self.vocab_size, self.first, self.bos_id = vocab_size, vocab_size - len(MARKERS), vocab_size - len(MARKERS)

    def encode_special(self, name):
        return self.first + MARKERS.index(name[2:-2])

    def decode(self, ids):
        return ""


def build(config, dtype, device):
    """-> (our model, Hugging Face's) with equal random weights. The special tokens' logits are far down, so that no row stops early."""
    torch.manual_seed(0)
    model = GPT(config_from_depth(config.depth, config.vocab_size, 2048), compute_dtype=dtype).eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.02 if name == "lm_head.weight" else 0.05)
    model.lm_head.weight[-len(MARKERS):] = 0
    model.to(device, dtype)
    model.fill_rotary_table()
    if not config.peer:
        return model, None
    from transformers import NanoChatConfig, NanoChatForCausalLM
    sizes = model.config
    peer = NanoChatForCausalLM(NanoChatConfig(
        vocab_size=sizes.vocab_size, hidden_size=sizes.n_embd, intermediate_size=4 * sizes.n_embd, num_hidden_layers=sizes.n_layer,
        num_attention_heads=sizes.n_head, num_key_value_heads=sizes.n_kv_head, max_position_embeddings=sizes.sequence_len,
        final_logit_softcapping=15.0, bos_token_id=None, eos_token_id=None, pad_token_id=0))
    names = {"transformer.wte.weight": "model.embed_tokens.weight", "lm_head.weight": "lm_head.weight"}
    for layer in range(sizes.n_layer):
        ours, theirs = f"transformer.h.{layer}", f"model.layers.{layer}"
        for one, other in (("attn.c_q", "self_attn.q_proj"), ("attn.c_k", "self_attn.k_proj"), ("attn.c_v", "self_attn.v_proj"),
                           ("attn.c_proj", "self_attn.o_proj"), ("mlp.c_fc", "mlp.fc1"), ("mlp.c_proj", "mlp.fc2")):
            names[f"{ours}.{one}.weight"] = f"{theirs}.{other}.weight"
    missing, unexpected = peer.load_state_dict({names[name]: weight for name, weight in model.state_dict().items()}, strict=False)
    assert not missing and not unexpected, (missing, unexpected)
    return model, peer.to(device, dtype).eval()


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def timed(run, compute, clock):
    compute.synchronize()
    start = CLOCKS[clock]()
    tokens = run()
    compute.synchronize()
    return tokens / (CLOCKS[clock]() - start)


def ours(engine, prompts, wanted, config):
    requests = [Request(prompt, max_new_tokens=wanted[i], temperature=float(config.sample), seed=i) for i, prompt in enumerate(prompts)]
    return sum(len(completion.tokens) for (completion,) in engine.generate(requests))


@torch.inference_mode()
def theirs(peer, prompts, wanted, config, device):
    longest = max(map(len, prompts))
    inputs = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
    mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=device)
    settings = {"do_sample": True, "top_k": 0} if config.sample else {"do_sample": False}
    output = peer.generate(inputs, attention_mask=mask, max_new_tokens=max(wanted), min_new_tokens=max(wanted), use_cache=True, **settings)
    assert output.size(1) == longest + max(wanted)
    return sum(wanted)


def main(config):
    torch.set_num_threads(config.threads)
    results = []
    for dtype_name in config.dtypes:
        compute = compute_init(config.device, dtype_name)
        if any(result["dtype"] == str(compute.dtype)[6:] for result in results):
            continue  # the default is one of those already measured
        model, peer = build(config, compute.dtype, compute.device)
        for batch in config.batches:
            for kind in ("equal", "ragged", "uneven"):
                results.append(measure(config, compute, model, peer, batch, kind))
                print({name: value for name, value in results[-1].items() if name != "runs"}, flush=True)
    print(json.dumps({"depth": config.depth, "vocab_size": config.vocab_size, "device": str(compute.device), "threads": config.threads,
                      "clock": config.clock, "torch": torch.__version__, "results": results}))


def measure(config, compute: Compute, model, peer, batch, kind):
    """One line of the table."""
    draw = random.Random(batch)
    lengths = [config.prompt_tokens if kind == "equal" else draw.randint(config.prompt_tokens // 4, 2 * config.prompt_tokens) for _ in range(batch)]
    prompts = [[draw.randrange(1, config.vocab_size - len(MARKERS)) for _ in range(length)] for length in lengths]
    wanted = [draw.randint(config.new_tokens // 8, config.new_tokens) if kind == "uneven" else config.new_tokens for _ in range(batch)]
    engine = Engine(model, Numbers(config.vocab_size), max_rows=batch)
    runs = {"ours": lambda: ours(engine, prompts, wanted, config)}
    if peer is not None:
        runs["transformers"] = lambda: theirs(peer, prompts, wanted, config, compute.device)
    speeds = {name: [] for name in runs}
    for _ in range(config.repeats + 1):
        for name, run in runs.items():
            speeds[name].append(timed(run, compute, config.clock))
    speeds = {name: values[1:] for name, values in speeds.items()}  # the first run warms up
    result = {"dtype": str(compute.dtype)[6:], "batch": batch, "lengths": kind, **{name: round(max(values)) for name, values in speeds.items()}}
    if peer is not None:
        result["ratio"] = round(statistics.median(one / other for one, other in zip(speeds["ours"], speeds["transformers"])), 2)
    return {**result, "load": round(os.getloadavg()[0], 1), "runs": {name: [round(value) for value in values] for name, values in speeds.items()}}


if __name__ == "__main__":
    main(parse(Config))
