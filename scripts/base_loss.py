"""Bits per byte of a base checkpoint on both splits, beside what a file compressor needs, and a few samples of its text.

    python -m scripts.base_loss
    python -m scripts.base_loss --hf-path=models/gpt2                # a Hugging Face model on the same documents
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss -- --model-tag=d20
"""
import math
import zlib
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.common import print0
from nanochat.compute import compute_cleanup, compute_init
from nanochat.configurator import parse
from nanochat.dataloader import PretrainingLoader
from nanochat.dataset import iter_documents, list_shards
from nanochat.engine import Engine, Request
from nanochat.hf_model import HFScorer, load_hf
from nanochat.likelihood import Sequence, score
from nanochat.loss_eval import evaluate_bpb
from nanochat.report import add_section

PROMPTS = ("The capital of France is", "The chemical symbol of gold is", "If yesterday was Friday, then tomorrow will be",
           "The opposite of hot is", "If 5 x + 3 = 13 then x =")
SPLITS = ("train", "val")
ZLIB_BYTES = 2**22                    # of each split through the compressor: its window is 32 kB, more changes nothing


@dataclass(frozen=True)
class Config:
    """Bits per byte of a base checkpoint on both splits, and a few samples of its text."""
    model_tag: str | None = None      # [-g] folder of the base checkpoint (None = the one saved last)
    model_step: int | None = None     # [-s] its step (None = the newest)
    hf_path: str | None = None        # measure this Hugging Face folder (or name on the Hub) instead
    device_type: str = ""             # cuda, mps or cpu ("" = the best there is)
    dtype: str = ""                   # [-d] float32 or bfloat16 ("" = bfloat16 where the hardware has it)
    device_batch_size: int = 32       # [-b] sequences per rank per forward pass
    split_tokens: int = 20 * 524288   # tokens per split; at most as many as the split has
    max_new_tokens: int = 32          # length of a sample


def main(config):
    compute = compute_init(config.device_type, config.dtype)
    if config.hf_path:
        model, tokenizer = load_hf(config.hf_path, compute)
        name, scorer = f"Hugging Face model `{Path(config.hf_path).name}`", HFScorer(model, tokenizer)
    else:
        model, tokenizer, meta = load_model("base", compute, "eval", config.model_tag, config.model_step)
        name = f"Base model `{meta['model_tag']}` at step {meta['step']}"

    results = {}
    for split in SPLITS:
        shards = list_shards(split)
        results[split] = hf_bpb(scorer, shards, config, compute) if config.hf_path else packed_bpb(model, tokenizer, shards, config, compute)
        results[split]["zlib_bpb"] = zlib_bpb(shards)
        print0("{}: {bpb:.4f} bits per byte over {tokens:,} tokens ({bytes:,} bytes); zlib needs {zlib_bpb:.4f}".format(split, **results[split]))

    if compute.is_master:
        samples = hf_samples(model, tokenizer, config) if config.hf_path else our_samples(model, tokenizer, config)
        print0("\n".join(f"> {sample}" for sample in samples))
        quoted = "\n".join(f"> {sample}" for sample in samples).replace("\n", "  \n")
        lines = [f"{results[split]['bpb']:.4f} bits per byte on {text} ({results[split]['bytes']:,} bytes; zlib -9 needs {results[split]['zlib_bpb']:.4f})"
                 for split, text in zip(SPLITS, ("training text", "validation text"))]
        add_section("base_loss_hf" if config.hf_path else "base_loss", f"{name}: {', '.join(lines)}.\n\n{quoted}",
                    {"train_bpb": results["train"]["bpb"], "val_bpb": results["val"]["bpb"], "train_zlib_bpb": results["train"]["zlib_bpb"],
                     "val_zlib_bpb": results["val"]["zlib_bpb"], "samples": samples})
    compute.barrier()
    compute_cleanup()
    return results


def packed_bpb(model, tokenizer, shards, config, compute):
    """Our model on rows as in training: as many tokens as asked for, but not more than the split has, since repeated text is no evidence."""
    seq_len, num_tokens = model.config.sequence_len, count_tokens(tokenizer, shards, config.split_tokens)
    num_batches = max(1, num_tokens // (config.device_batch_size * seq_len * compute.world_size))
    with PretrainingLoader(tokenizer, shards, config.device_batch_size, seq_len, compute.rank, compute.world_size, compute.device) as batches:
        return evaluate_bpb(model, islice(batches, num_batches), tokenizer.token_bytes(), compute)


def count_tokens(tokenizer, shards, most):
    """The tokens of the shards' documents, or `most` if there are more: then it stops counting."""
    texts, total = iter_documents(shards), 0
    while total < most and (some := list(islice(texts, 64))):
        total += sum(map(len, tokenizer.encode(some, prepend=tokenizer.bos_id)))
    return min(total, most)


def hf_bpb(scorer, shards, config, compute):
    """Another model on the same documents, each cut into windows of its context, as evaluate_bpb's dict.

    Every window begins anew, so at a document's later windows it knows less than it could: the number is an upper bound."""
    width, nats, num_tokens, num_bytes = scorer.sequence_len - len(scorer.start), 0.0, 0, 0
    texts = (text for number, text in enumerate(iter_documents(shards)) if text and number % compute.world_size == compute.rank)
    while num_tokens * compute.world_size < config.split_tokens and (some := list(islice(texts, 16))):
        rows = [tokens[begin:begin + width] for tokens in scorer.encode(some) for begin in range(0, len(tokens), width)]
        windows = [[Sequence(scorer.start + row, len(scorer.start))] for row in rows]
        nats -= sum(one.logprob for (one,) in score(scorer, windows, config.device_batch_size * scorer.sequence_len))
        num_tokens, num_bytes = num_tokens + sum(map(len, rows)), num_bytes + sum(len(text.encode("utf-8", "replace")) for text in some)
    nats, num_tokens, num_bytes = compute.sum(nats), compute.sum(num_tokens), compute.sum(num_bytes)
    if num_bytes == 0:
        raise ValueError(f"{shards[0].parent} holds 0 bytes of text: check the shards")
    return {"bpb": nats / (math.log(2) * num_bytes), "loss": nats / num_tokens, "tokens": num_tokens, "bytes": num_bytes}


def zlib_bpb(shards):
    """What a compressor that knows no language needs for the beginning of the split: a model above it has learnt nothing
    (compression and prediction are one, arXiv 2309.10668)."""
    data, size = [], 0
    for text in iter_documents(shards):
        data.append(text.encode("utf-8", "replace"))
        size += len(data[-1])
        if size > ZLIB_BYTES:
            break
    return 8 * len(zlib.compress(b"\n".join(data), 9)) / max(1, size)


def our_samples(model, tokenizer, config):
    """Greedy continuations of PROMPTS, then four texts from nothing."""
    engine = Engine(model, tokenizer, tools=False)
    greedy = [Request(tokenizer.encode(prompt, prepend=tokenizer.bos_id), max_new_tokens=config.max_new_tokens, temperature=0.0) for prompt in PROMPTS]
    free = Request([tokenizer.bos_id], num_samples=4, max_new_tokens=config.max_new_tokens, temperature=1.0, seed=42)
    *completed, unprompted = engine.generate([*greedy, free])
    samples = [prompt + tokenizer.decode(completion.tokens) for prompt, (completion,) in zip(PROMPTS, completed)]
    return samples + [tokenizer.decode(completion.tokens) for completion in unprompted]


@torch.inference_mode()
def hf_samples(model, tokenizer, config):
    """Greedy continuations of PROMPTS."""
    bos, samples = HFScorer(model, tokenizer).bos, []
    for prompt in PROMPTS:
        ids = torch.tensor([bos + tokenizer(prompt, add_special_tokens=False)["input_ids"]], device=model.device)
        output = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=config.max_new_tokens, do_sample=False, pad_token_id=0)
        samples.append(prompt + tokenizer.decode(output[0, ids.size(1):]))
    return samples


if __name__ == "__main__":
    main(parse(Config))
