"""Supervised fine-tuning: learn to answer. Loss on the assistant's tokens only, one conversation per row.

    python -m scripts.chat_sft --recipe=offline --num-iterations=200
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_sft -- --aqua_train_examples=20000 --aqua_val_examples=254
"""
from dataclasses import dataclass

from nanochat.checkpoint_manager import load_model, refuse_own_parent, save_checkpoint, start_or_resume
from nanochat.common import base_dir, print0
from nanochat.compute import compute_cleanup, compute_init
from nanochat.configurator import config_dict, inherit, parse
from nanochat.data_recipes import SFT, SFT_VALIDATION, chat_recipe, recipe
from nanochat.dataloader import PaddedLoader
from nanochat.engine import Engine
from nanochat.loss_eval import evaluate_bpb
from nanochat.optim import MuonAdamW
from nanochat.report import add_section
from nanochat.run_logger import RunLogger
from nanochat.schedules import linear_decay, muon_momentum
from nanochat.sharding import whole_model
from nanochat.training import Throughput, accumulate, data_metrics, every, optimizer_step, seed_everything, steps, take
from tasks.common import TaskMixture, best_constant, build_mixture
from tasks.evaluation import quick_accuracy


@dataclass(frozen=True)
class Config:
    """Supervised fine-tuning: loss on the assistant's tokens only, one conversation per row."""
    run: str = "dummy"                  # name of the wandb run ("dummy" = no wandb)
    source: str = "mid"                 # stage to start from: base, mid, sft or rl
    model_tag: str | None = None        # folder of the parent checkpoint (None = the one saved last)
    output_tag: str | None = None       # folder of the result (None = the parent's)
    step: int | None = None             # step of the parent checkpoint (None = the newest)
    device_type: str = ""               # cuda, mps or cpu ("" = the best there is)
    dtype: str = ""                     # float32 or bfloat16 ("" = bfloat16 where the hardware has it)
    compile: bool = True                # fuse with torch.compile; costs 10 to 30 s for each width of a batch, which short runs do not earn
    shard: str = "none"                 # full: divide weights, gradients and optimizer over the ranks (FSDP2), for models that do not fit one device
    seed: int = 42                      # seed of the data order
    sft_recipe: str = "default"         # [--recipe] mixture from nanochat/data_recipes.py
    data_dir: str | None = None         # folder of AQuA splits (None = NANOCHAT_AQUA_DIR, AQUA_DATA_DIR, the base directory, the Hub)
    aqua_train_examples: int = 20000    # rows of AQuA's train split in the mixture (-1 = all; more than there are = all)
    aqua_val_examples: int = 254        # rows of AQuA's validation split for val/bpb and the inline accuracy
    # R1-style recipes; a number of rows may be -1 = all
    ot_dataset: str = "open-thoughts/OpenThoughts3-1.2M"  # OpenThoughts on the Hub
    ot_path: str | None = None          # OpenThoughts as a local JSON-lines file instead
    ot_split: str = "train"             # split of OpenThoughts
    ot_stop: int | None = None          # rows of OpenThoughts (None = the recipe's: r1_ot 500,000, r1_ot_mixed 1,000,000)
    gsm8k_stop: int = -1                # rows of GSM8K
    rs_cot_path: str | None = None      # what scripts.rs_generate wrote (None = rs_cot.jsonl in the base directory)
    rs_cot_stop: int = 100_000          # rows of it
    dolci_path: str | None = None       # what scripts.prepare_dolci_think wrote (None = dolci_think_800k.jsonl in the base directory)
    dolci_stop: int = 500_000           # rows of Dolci-Think
    dolci_streaming: bool = False       # dolci_hf: read no more of the data set than dolci_stop rows, and keep them in a file
    dolci_stream_cache: str | None = None  # that file (None = dolci_stream/ in the base directory)
    chat_ratio: float = 0.30            # share of conversation in the whole mixture
    chat_ot_answer_ratio: float = 0.10  # r1_rs_sft: share of OpenThoughts without traces in that conversation
    chat_ot_trace_ratio: float = 0.05   # r1_rs_sft: share of OpenThoughts with traces
    val_smoltalk_stop: int = 2000       # rows of SmolTalk's test split for val/bpb
    val_arc_stop: int = 400             # rows of ARC-Challenge's test split for val/bpb
    # Length
    num_epochs: int = 1                 # passes over the mixture
    num_iterations: int = -1            # optimizer steps instead (-1 = off)
    # Batch
    max_seq_len: int | None = None      # longest conversation in tokens (None = the model's context)
    device_batch_size: int = 4          # conversations per rank per forward pass
    target_examples_per_step: int = 32  # conversations per optimizer step over all ranks
    # Optimizer
    embedding_lr: float = 0.2           # AdamW learning rate of the embedding, at width 768
    unembedding_lr: float = 0.004       # AdamW learning rate of the head, at width 768
    matrix_lr: float = 0.02             # Muon learning rate of the matrices in the blocks
    init_lr_frac: float = 0.02          # factor on all learning rates at the first step; falls linearly to 0
    weight_decay: float = 0.0           # decoupled weight decay
    grad_clip: float = 1.0              # largest gradient norm (0 = off)
    # Watching
    eval_every: int = 100               # steps between validation losses (-1 = off)
    eval_steps: int = 100               # batches per validation loss, at most one pass
    eval_metrics_every: int = 200       # steps between generative accuracies on AQuA's validation split (-1 = off)
    eval_metrics_max_problems: int = 1024  # problems per accuracy
    max_new_tokens: int = 256           # longest answer in that evaluation
    save_every: int = -1                # steps between checkpoints (-1 = only the last)
    keep_last: int = 1                  # checkpoints kept (-1 = all)
    resume: bool = False                # go on from the newest whole checkpoint, if there is one: of this very run, or it is refused
    overwrite: bool = False             # delete the checkpoints of an earlier run under this model tag; with resume only where they are of another run


def main(config):
    compute = compute_init(config.device_type, config.dtype)
    seed_everything(config.seed)

    # Model and optimizer: the parent's weights, a fresh optimizer
    model, tokenizer, parent = load_model(config.source, compute, "train", config.model_tag, config.step, shard=config.shard)
    config = inherit(config, {"model_tag": parent["model_tag"], "output_tag": parent["model_tag"], "step": parent["step"], "max_seq_len": model.config.sequence_len},
                     "model_tag", "output_tag", "step", "max_seq_len")
    optimizer = MuonAdamW(model, compute, config.embedding_lr, config.unembedding_lr, config.matrix_lr, config.weight_decay)
    refuse_own_parent("sft", config.source, config)
    state = start_or_resume("sft", config.output_tag, config, compute, model, optimizer, tokenizer, parent)

    # Data: the recipe's rows, conversation at its share of the whole, and what val/bpb is measured on
    extra = {"AQUA": {"data_dir": config.data_dir}} if config.data_dir else {}
    values = {**config_dict(config), "base_dir": base_dir(), "rs_cot_path": config.rs_cot_path or base_dir() / "rs_cot.jsonl",
              "dolci_path": config.dolci_path or base_dir() / "dolci_think_800k.jsonl"}
    train_task = build_mixture(recipe(SFT, config.sft_recipe, **values), extra, config.seed)
    chat = chat_recipe(config.sft_recipe, len(train_task), **values)
    if chat:
        train_task = TaskMixture([train_task, build_mixture(chat, extra, config.seed)], config.seed)
    val_task = build_mixture(recipe(SFT_VALIDATION, config.sft_recipe, **values), extra, config.seed)
    judged_task = val_task.leaves().get("AQUA")  # the inline accuracy needs a task whose answers can be checked
    train_batches = loader(train_task, tokenizer, config, compute, state.loader or None)
    examples_per_pass = config.device_batch_size * compute.world_size
    if config.target_examples_per_step % examples_per_pass:
        raise ValueError(f"target_examples_per_step={config.target_examples_per_step} is not a multiple of the {examples_per_pass} conversations "
                         f"in one pass ({config.device_batch_size} x {compute.world_size} ranks): try {-(-config.target_examples_per_step // examples_per_pass) * examples_per_pass}")
    micro_batches = config.target_examples_per_step // examples_per_pass
    num_steps = config.num_iterations if config.num_iterations > 0 else max(1, config.num_epochs * len(train_task) // config.target_examples_per_step)
    print0(f"sft {config.model_tag}: {len(train_task):,} conversations, {num_steps} steps x {config.target_examples_per_step}")
    if judged_task:
        letter, share = best_constant(judged_task)
        print0(f"on the {len(judged_task)} validation rows of AQUA always-{letter} scores {share:.2%}")

    if config.compile:
        model.compile_for_training()
    logger = RunLogger("sft", config, compute, num_steps, resume_step=state.step - 1 if state.step else None, model_tag=config.output_tag)
    throughput = Throughput(model, compute)
    token_bytes = tokenizer.token_bytes()
    metrics = {}

    def save(finished=False):
        save_checkpoint("sft", config.output_tag, state, config, compute, model, optimizer, tokenizer, config.keep_last, finished, parent)

    for step in steps(state, num_steps, compute, save):  # the extra pass only evaluates and saves
        if every(config.eval_every, step, num_steps):
            val_batches = loader(val_task, tokenizer, config, compute)
            one_pass = -(-len(val_task) // examples_per_pass)
            val = evaluate_bpb(model, take(val_batches, min(config.eval_steps, one_pass)), token_bytes, compute)
            val_batches.close()
            metrics.update({"val/bpb": val["bpb"], "val/loss": val["loss"]})
            logger.log(step, {"val/bpb": val["bpb"], "val/loss": val["loss"], **data_metrics(train_batches, compute)})
        if judged_task and every(config.eval_metrics_every, step, num_steps):
            engine = Engine(whole_model(model, compute), tokenizer)
            accuracy = quick_accuracy(judged_task, engine, tokenizer, compute, config.eval_metrics_max_problems, config.max_new_tokens)
            metrics.update(accuracy)
            logger.log(step, {**accuracy, "eval/best_constant": share})
        if step > 0 and every(config.save_every, step, num_steps) or step == num_steps:
            save(finished=step == num_steps)
        if step == num_steps:
            break
        throughput.start()
        lr_mult = config.init_lr_frac * linear_decay(step, num_steps)
        loss, tokens = accumulate(lambda batch: model(batch.inputs, batch.targets, loss_reduction="sum"),
                                  take(train_batches, micro_batches), compute)
        grad_norm = optimizer_step(optimizer, loss, step, lr_mult, config.grad_clip, muon_momentum(step))
        speed, seconds = throughput.tick(tokens)
        state.tokens += tokens
        state.seconds += seconds
        state.loader = train_batches.state()
        logger.log(step, {"train/loss": loss, "train/grad_norm": grad_norm, "train/lr_mult": lr_mult, "train/tokens": state.tokens, **speed})

    data = data_metrics(train_batches, compute)
    if compute.is_master:
        add_section("sft", f"Supervised fine-tuning of `{config.model_tag}` from {config.source} on recipe `{config.sft_recipe}`: "
                    f"{num_steps * config.target_examples_per_step:,} conversations in {state.seconds:.0f} s; "
                    f"cut to {config.max_seq_len} tokens: {data['data/truncated']}, without a trained token: {data['data/untrained']}.",
                    {"config": config_dict(config), "tokens": state.tokens, "seconds": state.seconds, **metrics, **data})
    train_batches.close()
    logger.close()
    compute_cleanup()


def loader(task, tokenizer, config, compute, state=None):
    return PaddedLoader(tokenizer, task, config.device_batch_size, config.max_seq_len, compute.rank, compute.world_size,
                        compute.device, state=state, seed=config.seed)


if __name__ == "__main__":
    main(parse(Config))
