"""Mid-training: teach the base model the conversation format, multiple choice and tool use, with rows packed full.

    python -m scripts.mid_train --recipe=offline --num-iterations=200
    torchrun --standalone --nproc_per_node=8 -m scripts.mid_train -- --run=demo --num_iterations=200
"""
from dataclasses import dataclass

from nanochat.checkpoint_manager import load_model, save_checkpoint, start_or_resume
from nanochat.common import base_dir, print0
from nanochat.compute import compute_cleanup, compute_init
from nanochat.configurator import config_dict, inherit, parse
from nanochat.data_recipes import MID, recipe
from nanochat.dataloader import ConversationLoader
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import MuonAdamW
from nanochat.report import add_section
from nanochat.run_logger import RunLogger
from nanochat.schedules import muon_momentum, warmup_warmdown
from nanochat.training import Throughput, accumulate, data_metrics, every, num_micro_batches, optimizer_step, seed_everything, steps, take
from tasks.common import build_mixture, get_task


@dataclass(frozen=True)
class Config:
    """Mid-training: the conversation format, multiple choice and tool use, on rows packed full of conversations."""
    run: str = "dummy"                  # name of the wandb run ("dummy" = no wandb)
    model_tag: str | None = None        # folder of the base checkpoint (None = the one saved last)
    output_tag: str | None = None       # folder of the result (None = the parent's)
    step: int | None = None             # step of the base checkpoint (None = the newest)
    device_type: str = ""               # cuda, mps or cpu ("" = the best there is)
    dtype: str = ""                     # float32 or bfloat16 ("" = bfloat16 where the hardware has it)
    compile: bool = True                # fuse with torch.compile; costs half a minute once, pays from a few hundred steps on
    shard: str = "none"                 # full: divide weights, gradients and optimizer over the ranks (FSDP2), for models that do not fit one device
    seed: int = 42                      # seed of the data order
    recipe: str = "default"             # mixture from nanochat/data_recipes.py
    data_dir: str | None = None         # folder of AQuA splits (None = NANOCHAT_AQUA_DIR, AQUA_DATA_DIR, the base directory, the Hub)
    loss_on: str = "all"                # "all" tokens of a conversation, or only the "assistant" ones
    # Length
    num_iterations: int = -1            # optimizer steps (-1 = num_epochs of the mixture)
    num_epochs: int = 1                 # passes over the mixture
    # Batch: None = as the base model was trained
    max_seq_len: int | None = None      # context length in tokens
    device_batch_size: int | None = None  # sequences per rank per forward pass
    total_batch_size: int | None = None   # tokens per optimizer step over all ranks
    mask_documents: bool | None = None    # hide the conversations packed into a row from each other
    # Optimizer
    embedding_lr: float = 0.2           # AdamW learning rate of the embedding, at width 768
    unembedding_lr: float = 0.004       # AdamW learning rate of the head, at width 768
    matrix_lr: float = 0.02             # Muon learning rate of the matrices in the blocks
    init_lr_frac: float = 1.0           # factor on all learning rates
    weight_decay: float = 0.0           # decoupled weight decay
    grad_clip: float = 1.0              # largest gradient norm (0 = off)
    warmdown_ratio: float = 0.2         # share of the steps in which the learning rate falls to 0
    # Watching
    eval_every: int = 150               # steps between evaluations on held-out AQuA conversations (-1 = off)
    eval_tokens: int = 20 * 524288      # tokens per evaluation, at most one pass over the split
    save_every: int = -1                # steps between checkpoints (-1 = only the last)
    keep_last: int = 1                  # checkpoints kept (-1 = all)
    resume: bool = False                # go on from the newest whole checkpoint, if there is one: of this very run, or it is refused
    overwrite: bool = False             # delete the checkpoints of an earlier run under this model tag; with resume only where they are of another run


def main(config):
    compute = compute_init(config.device_type, config.dtype)
    seed_everything(config.seed)

    # Model and optimizer: the base model's weights, a fresh optimizer
    model, tokenizer, parent = load_model("base", compute, "train", config.model_tag, config.step, shard=config.shard)
    config = inherit(config, {**parent["config"], "model_tag": parent["model_tag"], "output_tag": parent["model_tag"], "step": parent["step"]},
                     "model_tag", "output_tag", "step", "max_seq_len", "device_batch_size", "total_batch_size", "mask_documents")
    optimizer = MuonAdamW(model, compute, config.embedding_lr, config.unembedding_lr, config.matrix_lr, config.weight_decay)
    state = start_or_resume("mid", config.output_tag, config, compute, model, optimizer, tokenizer, parent)
    if config.compile:
        model.compile_for_training()

    # Data
    aqua_dir = {"data_dir": config.data_dir} if config.data_dir else {}
    train_task = build_mixture(recipe(MID, config.recipe, base_dir=base_dir()), {"AQUA": aqua_dir}, config.seed)
    val_task = get_task("AQUA", split="validation", **aqua_dir)
    train_batches = loader(train_task, tokenizer, config, compute, state.loader or None)
    micro_batches = num_micro_batches(config.total_batch_size, config.device_batch_size, config.max_seq_len, compute)
    num_steps = config.num_iterations
    if num_steps <= 0:
        num_steps = max(1, config.num_epochs * estimate_tokens(train_task, tokenizer, config.max_seq_len) // config.total_batch_size)
    print0(f"mid {config.model_tag}: {len(train_task):,} conversations, {num_steps} steps x {config.total_batch_size:,} tokens")

    logger = RunLogger("mid", config, compute, num_steps, resume_step=state.step - 1 if state.step else None, model_tag=config.output_tag)
    throughput = Throughput(model, compute)
    token_bytes = tokenizer.token_bytes()
    tokens_per_pass = config.device_batch_size * config.max_seq_len * compute.world_size
    eval_tokens = min(config.eval_tokens, estimate_tokens(val_task, tokenizer, config.max_seq_len))
    val_bpb = None

    def losses(inputs, targets, loss_reduction):
        documents = (inputs == tokenizer.bos_id).cumsum(dim=1) if config.mask_documents else None
        return model(inputs, targets, loss_reduction=loss_reduction, documents=documents)

    def save(finished=False):
        save_checkpoint("mid", config.output_tag, state, config, compute, model, optimizer, tokenizer, config.keep_last, finished, parent)

    for step in steps(state, num_steps, compute, save):  # the extra pass only evaluates and saves
        if every(config.eval_every, step, num_steps):
            val_batches = loader(val_task, tokenizer, config, compute)
            val = evaluate_bpb(losses, take(val_batches, max(1, eval_tokens // tokens_per_pass)), token_bytes, compute)
            val_batches.close()
            val_bpb = val["bpb"]
            logger.log(step, {"val/bpb": val_bpb, "val/loss": val["loss"], **data_metrics(train_batches, compute)})
        if step > 0 and every(config.save_every, step, num_steps) or step == num_steps:
            save(finished=step == num_steps)
        if step == num_steps:
            break
        throughput.start()
        lr_mult = config.init_lr_frac * warmup_warmdown(step, num_steps, 0.0, config.warmdown_ratio)
        loss, tokens = accumulate(lambda batch: losses(batch.inputs, batch.targets, "sum"), take(train_batches, micro_batches), compute)
        grad_norm = optimizer_step(optimizer, loss, step, lr_mult, config.grad_clip, muon_momentum(step))
        speed, seconds = throughput.tick(tokens)
        state.tokens += tokens
        state.seconds += seconds
        state.loader = train_batches.state()
        logger.log(step, {"train/loss": loss, "train/grad_norm": grad_norm, "train/lr_mult": lr_mult, "train/tokens": state.tokens, **speed})

    data = data_metrics(train_batches, compute)
    if compute.is_master:
        add_section("mid", f"Mid-training of `{config.model_tag}` on recipe `{config.recipe}`: {state.tokens:,} target tokens in "
                    f"{state.seconds:.0f} s; cut to {config.max_seq_len} tokens: {data['data/truncated']}.",
                    {"config": config_dict(config), "tokens": state.tokens, "seconds": state.seconds, "val_bpb": val_bpb,
                     "conversations": len(train_task), **data})
    train_batches.close()
    logger.close()
    compute_cleanup()


def loader(task, tokenizer, config, compute, state=None):
    return ConversationLoader(tokenizer, task, config.device_batch_size, config.max_seq_len, compute.rank, compute.world_size,
                              compute.device, state=state, train_on_all=config.loss_on == "all", seed=config.seed)


def estimate_tokens(task, tokenizer, max_tokens):
    """Tokens of one pass over a task, from 512 conversations spread evenly over it."""
    probes = range(0, len(task), max(1, len(task) // 512))
    return len(task) * sum(len(tokenizer.render_conversation(task[i], max_tokens)[0]) for i in probes) // len(probes)


if __name__ == "__main__":
    main(parse(Config))
