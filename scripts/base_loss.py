"""Bits per byte of a base checkpoint on both splits, and a few samples of its text.

    python -m scripts.base_loss
    torchrun --standalone --nproc_per_node=8 -m scripts.base_loss -- --model-tag=d20
"""
from dataclasses import dataclass

from nanochat.checkpoint_manager import load_model
from nanochat.common import compute_cleanup, compute_init, print0
from nanochat.configurator import parse
from nanochat.dataloader import PretrainingLoader
from nanochat.dataset import list_shards
from nanochat.engine import Engine, Request
from nanochat.loss_eval import evaluate_bpb
from nanochat.report import add_section
from nanochat.training import take

PROMPTS = ("The capital of France is", "The chemical symbol of gold is", "If yesterday was Friday, then tomorrow will be",
           "The opposite of hot is", "If 5 x + 3 = 13 then x =")


@dataclass(frozen=True)
class Config:
    """Bits per byte of a base checkpoint on both splits, and a few samples of its text."""
    model_tag: str | None = None      # folder of the base checkpoint (None = the one saved last)
    model_step: int | None = None     # its step (None = the newest)
    device_type: str = ""             # cuda, mps or cpu ("" = the best there is)
    dtype: str = ""                   # float32 or bfloat16 ("" = bfloat16 where the hardware has it)
    device_batch_size: int = 32       # sequences per rank per forward pass
    split_tokens: int = 20 * 524288   # tokens per split
    max_new_tokens: int = 32          # length of a sample


def main(config):
    compute = compute_init(config.device_type, config.dtype)
    model, tokenizer, meta = load_model("base", compute, "eval", config.model_tag, config.model_step)
    seq_len = model.config.sequence_len
    num_batches = max(1, config.split_tokens // (config.device_batch_size * seq_len * compute.world_size))

    results = {}
    for split in ("train", "val"):
        with PretrainingLoader(tokenizer, list_shards(split), config.device_batch_size, seq_len, compute.rank, compute.world_size, compute.device) as batches:
            results[split] = evaluate_bpb(model, take(batches, num_batches), tokenizer.token_bytes(), compute)
        print0(f"{split}: {results[split]['bpb']:.4f} bits per byte over {results[split]['tokens']:,} tokens")

    samples = []
    if compute.is_master:
        engine = Engine(model, tokenizer, tools=False)
        greedy = [Request(tokenizer.encode(prompt, prepend=tokenizer.bos_id), max_new_tokens=config.max_new_tokens, temperature=0.0) for prompt in PROMPTS]
        free = Request([tokenizer.bos_id], num_samples=4, max_new_tokens=config.max_new_tokens, temperature=1.0, seed=42)
        *completed, unprompted = engine.generate([*greedy, free])
        samples = [prompt + tokenizer.decode(completion.tokens) for prompt, (completion,) in zip(PROMPTS, completed)]
        samples += [tokenizer.decode(completion.tokens) for completion in unprompted]
        print0("\n".join(f"> {sample}" for sample in samples))
        quoted = "\n".join(f"> {sample}" for sample in samples).replace("\n", "  \n")
        add_section("base_loss", f"Base model `{meta['model_tag']}` at step {meta['step']}: {results['train']['bpb']:.4f} bits per byte on training text, "
                    f"{results['val']['bpb']:.4f} on validation text.\n\n{quoted}",
                    {"train_bpb": results["train"]["bpb"], "val_bpb": results["val"]["bpb"], "samples": samples})
    compute.barrier()
    compute_cleanup()
    return results


if __name__ == "__main__":
    main(parse(Config))
