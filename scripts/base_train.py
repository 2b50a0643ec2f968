"""Pretrain a base model on the text shards.

    python -m scripts.base_train --depth=4 --max-seq-len=512 --device-batch-size=4 --total-batch-size=8192 --num-iterations=200
    torchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=20
"""
from dataclasses import dataclass

from nanochat.checkpoint_manager import save_checkpoint, start_or_resume
from nanochat.common import print0
from nanochat.compute import compute_cleanup, compute_init
from nanochat.configurator import config_dict, parse
from nanochat.dataloader import PretrainingLoader
from nanochat.dataset import list_shards
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT, config_from_depth
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import MuonAdamW
from nanochat.report import add_section
from nanochat.run_logger import RunLogger
from nanochat.schedules import muon_momentum, warmup_warmdown
from nanochat.sharding import place, whole_model
from nanochat.tokenizer import get_tokenizer
from nanochat.training import Throughput, accumulate, data_metrics, every, num_micro_batches, optimizer_step, seed_everything, steps, take

SAMPLE_PROMPTS = ("The capital of France is", "If 5 x + 3 = 13 then x =", "The opposite of hot is", "12 + 7 =")


@dataclass(frozen=True)
class Config:
    """Pretrain a base model on the text shards."""
    run: str = "dummy"                  # name of the wandb run ("dummy" = no wandb)
    model_tag: str = ""                 # folder of the checkpoints ("" = d<depth>)
    device_type: str = ""               # cuda, mps or cpu ("" = the best there is)
    dtype: str = ""                     # float32 or bfloat16 ("" = bfloat16 where the hardware has it)
    compile: bool = True                # fuse with torch.compile; costs half a minute once, pays from a few hundred steps on
    shard: str = "none"                 # full: divide weights, gradients and optimizer over the ranks (FSDP2), for models that do not fit one device
    seed: int = 42                      # seed of the initial weights
    # Model
    depth: int = 20                     # number of layers; width is 64 * depth
    n_embd: int = -1                    # width instead of 64 * depth (-1 = off)
    head_dim: int = 128                 # size of an attention head; 32 or 64 suit tiny models
    n_kv_head: int = -1                 # key/value heads, fewer than heads for grouped-query attention (-1 = as many)
    max_seq_len: int = 2048             # context length in tokens
    # Length: the first that is given decides
    num_iterations: int = -1            # optimizer steps (-1 = off)
    target_flops: float = -1            # training FLOPs (-1 = off)
    target_param_data_ratio: int = 20   # training tokens per parameter (Chinchilla: 20)
    # Batch
    device_batch_size: int = 32         # sequences per rank per forward pass; lower it if memory runs out
    total_batch_size: int = 524288      # tokens per optimizer step over all ranks
    mask_documents: bool = False        # hide the documents packed into a row from each other, at the price of the Flash kernel
    # Optimizer
    embedding_lr: float = 0.2           # AdamW learning rate of the embedding, at width 768
    unembedding_lr: float = 0.004       # AdamW learning rate of the head, at width 768
    matrix_lr: float = 0.02             # Muon learning rate of the matrices in the blocks
    weight_decay: float = 0.0           # decoupled weight decay of all of them
    grad_clip: float = 1.0              # largest gradient norm, taken after averaging over ranks (0 = off)
    warmup_ratio: float = 0.0           # share of the steps in which the learning rate rises
    warmdown_ratio: float = 0.2         # share of the steps in which it falls
    final_lr_frac: float = 0.0          # its last value, as a fraction
    # Watching
    eval_every: int = 250               # steps between evaluations of bits per byte (-1 = off)
    eval_tokens: int = 20 * 524288      # tokens per evaluation
    sample_every: int = 2000            # steps between samples of text (-1 = off)
    save_every: int = -1                # steps between checkpoints (-1 = only the last)
    keep_last: int = 1                  # checkpoints kept (-1 = all)
    resume: bool = False                # go on from the newest whole checkpoint, if there is one: of this very run, or it is refused
    overwrite: bool = False             # delete the checkpoints of an earlier run under this model tag; with resume only where they are of another run


def main(config):
    compute = compute_init(config.device_type, config.dtype)
    seed_everything(config.seed)

    # Model and optimizer
    tokenizer = get_tokenizer()
    model_tag = config.model_tag or f"d{config.depth}"
    model = GPT(config_from_depth(config.depth, tokenizer.vocab_size, config.max_seq_len, config.n_embd, config.head_dim,
                                  config.n_kv_head), compute.dtype)
    model.init_weights(config.seed)
    model = place(model, compute, config.shard)
    optimizer = MuonAdamW(model, compute, config.embedding_lr, config.unembedding_lr, config.matrix_lr, config.weight_decay)
    state = start_or_resume("base", model_tag, config, compute, model, optimizer, tokenizer)
    if config.compile:
        model.compile_for_training()

    # How long, how much at a time
    micro_batches = num_micro_batches(config.total_batch_size, config.device_batch_size, config.max_seq_len, compute)
    num_steps = count_steps(config, model)
    eval_batches = max(1, config.eval_tokens // (config.device_batch_size * config.max_seq_len * compute.world_size))
    print0(f"base {model_tag}: {model.num_params():,} parameters, {num_steps} steps x {config.total_batch_size:,} tokens "
           f"= {num_steps * config.total_batch_size / model.num_params():.1f} tokens per parameter; {compute.dtype} on "
           f"{compute.world_size} x {compute.device.type}")

    # Data
    sizes = tokenizer, config.device_batch_size, config.max_seq_len, compute
    train_batches = pretraining_loader(*sizes, list_shards("train"), state.loader or None)

    logger = RunLogger("base", config, compute, num_steps, resume_step=state.step - 1 if state.step else None, model_tag=model_tag)
    throughput = Throughput(model, compute)
    token_bytes = tokenizer.token_bytes()
    val_bpb = None

    def losses(inputs, targets, loss_reduction):
        documents = (inputs == tokenizer.bos_id).cumsum(dim=1) if config.mask_documents else None
        return model(inputs, targets, loss_reduction=loss_reduction, documents=documents)

    def save(finished=False):
        save_checkpoint("base", model_tag, state, config, compute, model, optimizer, tokenizer, config.keep_last, finished)

    for step in steps(state, num_steps, compute, save):  # the extra pass only evaluates and saves
        if every(config.eval_every, step, num_steps):
            val_batches = pretraining_loader(*sizes, list_shards("val"))
            val = evaluate_bpb(losses, take(val_batches, eval_batches), token_bytes, compute)
            val_batches.close()
            val_bpb = val["bpb"]
            logger.log(step, {"val/bpb": val_bpb, "val/loss": val["loss"], **data_metrics(train_batches, compute)})
        if every(config.sample_every, step, num_steps):
            sampler = whole_model(model, compute, keep=compute.is_master)
            if compute.is_master:
                logger.log_text(step, "samples", "\n".join(sample_texts(sampler, tokenizer)))
        if step > 0 and every(config.save_every, step, num_steps) or step == num_steps:
            save(finished=step == num_steps)
        if step == num_steps:
            break
        throughput.start()
        lr_mult = warmup_warmdown(step, num_steps, config.warmup_ratio, config.warmdown_ratio, config.final_lr_frac)
        loss, tokens = accumulate(lambda batch: losses(batch.inputs, batch.targets, "sum"), take(train_batches, micro_batches), compute)
        grad_norm = optimizer_step(optimizer, loss, step, lr_mult, config.grad_clip, muon_momentum(step))
        speed, seconds = throughput.tick(tokens)
        state.tokens += tokens
        state.seconds += seconds
        state.loader = train_batches.state()
        logger.log(step, {"train/loss": loss, "train/grad_norm": grad_norm, "train/lr_mult": lr_mult, "train/tokens": state.tokens, **speed})

    if compute.is_master:
        add_section("base", f"Base model `{model_tag}`: {model.num_params():,} parameters, {state.tokens:,} tokens in "
                    f"{state.seconds:.0f} s, validation bits per byte {val_bpb if val_bpb is None else round(val_bpb, 4)}.",
                    {"config": config_dict(config), "parameters": model.num_params(), "tokens": state.tokens,
                     "seconds": state.seconds, "val_bpb": val_bpb, "flops": state.tokens * model.flops_per_token()})
    train_batches.close()
    logger.close()
    compute_cleanup()


def pretraining_loader(tokenizer, device_batch_size, seq_len, compute, shards, state=None):
    return PretrainingLoader(tokenizer, shards, device_batch_size, seq_len, compute.rank, compute.world_size, compute.device, state=state)


def count_steps(config, model):
    """Optimizer steps from the first of num_iterations, target_flops, target_param_data_ratio that is given."""
    if config.num_iterations > 0:
        return config.num_iterations
    if config.target_flops > 0:
        return max(1, round(config.target_flops / (model.flops_per_token() * config.total_batch_size)))
    if config.target_param_data_ratio > 0:
        return max(1, config.target_param_data_ratio * model.num_params() // config.total_batch_size)
    raise ValueError("num_iterations, target_flops and target_param_data_ratio are all -1: give one of them")


def sample_texts(model, tokenizer):
    """A greedy continuation of each prompt."""
    bos = tokenizer.bos_id
    requests = [Request(tokenizer.encode(prompt, prepend=bos), max_new_tokens=16, temperature=0.0) for prompt in SAMPLE_PROMPTS]
    answers = Engine(model, tokenizer, tools=False).generate(requests)
    return [prompt + tokenizer.decode(completion.tokens) for prompt, (completion,) in zip(SAMPLE_PROMPTS, answers)]


if __name__ == "__main__":
    main(parse(Config))
