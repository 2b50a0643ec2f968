"""Reinforcement learning on a task with checkable answers: REINFORCE with the group mean as baseline, on policy.

    python -m scripts.chat_rl --task=AQUA --max_steps=100
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --run=demo --temperature=1.0 --max_new_tokens=128

Each step samples `num_samples` completions for `examples_per_step` problems, judges them, and raises the probability of those
that did better than the mean of their own group. The distribution that is sampled is the one that is trained. A run that is killed,
also between sampling and the update, and resumed ends at the same weights: all draws are functions of the seed and the step.
"""
from dataclasses import dataclass

from nanochat.checkpoint_manager import load_model, refuse_own_parent, save_checkpoint, start_or_resume
from nanochat.common import base_dir, print0
from nanochat.compute import compute_cleanup, compute_init
from nanochat.configurator import config_dict, inherit, parse
from nanochat.engine import Engine
from nanochat.interpretability.attention_metrics import attention_metrics
from nanochat.interpretability.plots import save_attention_pictures
from nanochat.interpretability.rollout_log import log_rollouts
from nanochat.optim import MuonAdamW
from nanochat.report import add_section
from nanochat.rl.letter_metrics import letter_metrics
from nanochat.rl.metrics import Clock, rollout_metrics
from nanochat.rl.preflight import preflight
from nanochat.rl.reference import load_reference
from nanochat.rl.rollout import Sampler, make_batches
from nanochat.rl.safety import batch_keeper, check_finite, check_sizes, count_silence, stop_if_silent, watch_entropy
from nanochat.rl.update import Objective, learn, prepare
from nanochat.run_logger import RunLogger
from nanochat.schedules import linear_decay, warmup
from nanochat.sharding import refill, whole_model
from nanochat.training import every, seed_everything, steps
from tasks.aqua import extract_answer
from tasks.common import message_text
from tasks.problems import Problems, accuracies, load_tasks


@dataclass(frozen=True)
class Config:
    """Reinforcement learning on a task with checkable answers: REINFORCE with a group baseline, on policy."""
    run: str = "dummy"                  # name of the wandb run ("dummy" = no wandb)
    task: str = "AQUA"                  # task to learn: AQUA or GSM8K, or any other whose answers can be checked
    source: str = "sft"                 # stage to start from: mid, sft or rl
    model_tag: str | None = None        # folder of the parent checkpoint (None = the one saved last)
    output_tag: str | None = None       # folder of the result (None = the parent's)
    step: int | None = None             # step of the parent checkpoint (None = the newest)
    device_type: str = ""               # cuda, mps or cpu ("" = the best there is)
    dtype: str = ""                     # float32 or bfloat16 ("" = bfloat16 where the hardware has it)
    shard: str = "none"                 # full: divide weights, gradients and optimizer over the ranks (FSDP2); each keeps a whole copy in `dtype` to sample with
    seed: int = 42                      # seed of the order of problems and of every draw
    data_dir: str | None = None         # folder of the task's splits (None = where the task looks by itself)
    permute_options: bool = True        # multiple choice: options stand in another order at every visit, the right letters balanced; a group shares one
    format_bonus: float = 0.1           # multiple choice: reward for any valid letter (0 = off); it never makes a group count as signal
    # Length
    num_epochs: int = 1                 # passes over the training split
    max_steps: int = -1                 # optimizer steps instead (-1 = off); the learning rate falls to 0 at the last one
    # Rollouts
    examples_per_step: int = 16         # problems per step over all ranks
    num_samples: int = 16               # completions per problem
    max_new_tokens: int = 256           # longest completion; 128 tokens hold 94 % of AQuA's own answers, 256 hold 99 %
    temperature: float = 1.0            # of sampling, and of the log-probabilities that are trained
    top_k: int | None = None            # sample among the likeliest tokens only, and train on them renormalised (None = all)
    device_batch_size: int = 8          # rows per rank per forward pass of the gradient; does not change the result
    rows_in_flight: int = 256           # rows per rank that the engine decodes at once; does not change the result
    # Optimizer
    embedding_lr: float = 0.2           # AdamW learning rate of the embedding, at width 768
    unembedding_lr: float = 0.004       # AdamW learning rate of the head, at width 768
    matrix_lr: float = 0.02             # Muon learning rate of the matrices in the blocks
    init_lr_frac: float = 0.05          # factor on all learning rates; falls linearly to 0 at the last step
    warmup_steps: int = 15              # steps over which it rises first, while the optimizer's averages fill (0 = off)
    weight_decay: float = 0.0           # decoupled weight decay
    grad_clip: float = 1.0              # largest gradient norm (0 = off)
    # Watching
    preflight: int = 32                 # groups sampled before the first step, to see whether there is anything to learn (-1 = no preflight)
    stop_without_signal: int = 50       # steps in a row without a group of right and wrong answers that end the run (-1 = never)
    eval_every: int = 60                # steps between accuracies on the validation split (-1 = off)
    eval_examples: int = 400            # problems per accuracy
    eval_samples: int = 1               # completions per problem: 1 = greedy; more are sampled at `temperature`, for pass@k and maj@k
    kl_every: int = 20                  # steps between KL to the starting model, letter margin, exact entropy (-1 = off)
    attn_every: int = 60                # steps between attention metrics and pictures (-1 = off)
    rollouts_every: int = 20            # steps between rollouts written to the run's log (-1 = off)
    save_every: int = 60                # steps between checkpoints (-1 = only the last)
    keep_last: int = 1                  # checkpoints kept (-1 = all)
    resume: bool = False                # go on from the newest whole checkpoint, if there is one: of this very run, or it is refused
    overwrite: bool = False             # delete the checkpoints of an earlier run under this model tag; with resume only where they are of another run


def main(config):
    compute = compute_init(config.device_type, config.dtype)
    seed_everything(config.seed)
    check_sizes(config, compute)

    # Policy, optimizer, engine: one set of weights, which samples and is trained; divided over the ranks, it is trained, and its whole copy samples
    model, tokenizer, parent = load_model(config.source, compute, "train", config.model_tag, config.step, shard=config.shard)
    config = inherit(config, {"model_tag": parent["model_tag"], "output_tag": parent["model_tag"], "step": parent["step"]}, "model_tag", "output_tag", "step")
    optimizer = MuonAdamW(model, compute, config.embedding_lr, config.unembedding_lr, config.matrix_lr, config.weight_decay)
    refuse_own_parent("rl", config.source, config)
    state = start_or_resume("rl", config.output_tag, config, compute, model, optimizer, tokenizer, parent)
    policy = whole_model(model, compute)
    engine = Engine(policy, tokenizer, max_rows=config.rows_in_flight)
    reference = None  # the model training starts from, also after a resume
    if config.kl_every > 0:
        reference, _ = load_reference((None, None, None), (config.source, config.model_tag, config.step), compute)

    # Problems
    weights = {config.task: 1.0}
    train_tasks, val_tasks = load_tasks(weights, config.data_dir, config.format_bonus)
    problems = Problems(train_tasks, weights, config.seed, config.permute_options)
    letters = problems.at(0).conversation.get("letters", [])
    sampler = Sampler(engine, tokenizer, problems, compute, config.num_samples, config.max_new_tokens, config.top_k)
    objective = Objective(config.temperature, "reinforce", config.top_k)
    num_steps = config.max_steps if config.max_steps > 0 else max(1, config.num_epochs * len(problems) // config.examples_per_step)
    print0(f"rl {config.model_tag}: {len(problems):,} problems of {config.task}, {num_steps} steps of {config.examples_per_step} problems x "
           f"{config.num_samples} samples")

    logger = RunLogger("rl", config, compute, num_steps, resume_step=state.step - 1 if state.step else None, model_tag=config.output_tag)
    if config.preflight > 0 and state.step == 0:
        rows, metrics = preflight(problems, lambda conversation: message_text(conversation["messages"][-1]), sampler, reference, True,
                                  config.preflight, config.temperature, config.seed, config.device_batch_size)
        logger.log_text(0, "preflight", rows)
        logger.log(0, metrics)
    accuracy = {}

    def save(finished=False):
        save_checkpoint("rl", config.output_tag, state, config, compute, model, optimizer, tokenizer, config.keep_last, finished, parent)

    for step in steps(state, num_steps, compute, save):  # the extra pass only evaluates and saves
        clock = Clock(compute)
        if every(config.eval_every, step, num_steps):
            accuracy = accuracies(val_tasks, weights, engine, tokenizer, compute, config.eval_examples, config.max_new_tokens, config.eval_samples, config.temperature)
            logger.log(step, {**accuracy, "time/eval_s": clock.lap()})
        if step > 0 and every(config.save_every, step, num_steps) or step == num_steps:
            save(finished=step == num_steps)
        if step == num_steps:
            break

        # Rollouts of this rank's share of the step's problems
        clock.lap()
        groups, _ = sampler.sample_step(step * config.examples_per_step, config.examples_per_step, config.temperature)
        metrics = rollout_metrics(groups, compute, extract_answer, letters, config.num_samples)
        metrics |= {"rl/temperature": config.temperature, "rl/group_size": config.num_samples, "time/generate_s": clock.lap()}
        keep = batch_keeper("rl", config.output_tag, step, compute, tokenizer)
        conversations = [group[0].conversation for group in groups]

        # Telemetry of the policy that sampled, before it moves
        if every(config.kl_every, step, num_steps):
            watched = letter_metrics(policy, reference, tokenizer, groups, conversations, compute, config.device_batch_size, config.temperature)
            check_finite(step, watched, lambda: make_batches(sum(groups, []), config.device_batch_size, tokenizer.bos_id, compute.device), keep)
            if step == 0 and watched.get("kl", 0) != 0:
                raise ValueError(f"the KL to the reference is {watched['kl']:.3g} before the first step, not 0: the reference is not "
                                 f"the model that training starts from (source={config.source}, step={config.step})")
            watch_entropy(state, watched)
            metrics |= watched
        if every(config.attn_every, step, num_steps) and compute.is_master and groups:
            some = sum(groups, [])[:8]
            metrics |= attention_metrics(policy, tokenizer, [rollout.prompt + rollout.tokens for rollout in some], [len(rollout.prompt) for rollout in some])
            folder = base_dir() / "runs" / f"rl_{config.output_tag}_attention" / f"step_{step:06d}"
            for path in save_attention_pictures(policy, tokenizer, some[0].prompt + some[0].tokens, len(some[0].prompt), folder):
                logger.log_image(step, f"attn/{path.stem}", path)
        metrics["time/watch_s"] = clock.lap()

        # Gradient on the groups that hold both right and wrong answers
        minibatches = prepare(groups, objective, policy, reference, compute, config.device_batch_size, tokenizer.bos_id)
        if every(config.rollouts_every, step, num_steps):
            log_rollouts(logger, step, groups[:2], conversations[:2], extract_answer)
        lr_mult = config.init_lr_frac * warmup(step, config.warmup_steps) * linear_decay(step, num_steps)
        learned = learn(model, optimizer, minibatches, objective, compute, step, lr_mult, config.grad_clip, keep=keep)
        refill(policy, model)
        engine.refresh()
        metrics |= {**learned, "time/train_s": clock.lap()}
        sampled = compute.sum(sum(len(rollout.tokens) for group in groups for rollout in group))
        state.tokens += learned.get("train/tokens", 0)
        state.seconds += metrics["time/generate_s"] + metrics["time/train_s"]
        silent = count_silence(state, bool(learned))
        metrics |= {"num_tokens": sampled, "tokens_per_s/generate": sampled / metrics["time/generate_s"], **silent,
                    "tokens_per_s/train": learned.get("train/tokens", 0) / metrics["time/train_s"]}
        logger.log(step, metrics)
        stop_if_silent(state, config.stop_without_signal)

    if compute.is_master:
        add_section("rl", f"Reinforcement learning of `{config.model_tag}` on {config.task}: {num_steps} steps, {state.seconds:.0f} s, "
                    f"{state.extra.get('steps_without_signal', 0)} steps without signal.",
                    {"config": config_dict(config), "tokens": state.tokens, "seconds": state.seconds, **accuracy})
    logger.close()
    compute_cleanup()


if __name__ == "__main__":
    main(parse(Config))
