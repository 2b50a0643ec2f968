"""Reinforcement learning on a task with checkable answers: REINFORCE with the group mean as baseline, on policy.

    python -m scripts.chat_rl --task=AQUA --max_steps=100
    torchrun --standalone --nproc_per_node=8 -m scripts.chat_rl -- --run=demo --temperature=1.0 --max_new_tokens=128

Each step samples `num_samples` completions for `examples_per_step` problems, judges them, and raises the probability of those
that did better than the mean of their own group. The distribution that is sampled is the one that is trained.
"""
import random
import time
from dataclasses import dataclass
from functools import lru_cache

import torch

from nanochat.checkpoint_manager import load_model, refuse_own_parent, save_checkpoint, start_or_resume
from nanochat.common import base_dir, compute_cleanup, compute_init, print0
from nanochat.configurator import config_dict, inherit, parse
from nanochat.engine import Engine
from nanochat.interpretability.attention_metrics import attention_metrics
from nanochat.interpretability.plots import save_attention_pictures
from nanochat.interpretability.rollout_log import log_rollouts
from nanochat.optim import MuonAdamW
from nanochat.report import add_section
from nanochat.rl.algorithm import group_advantages, groups_with_signal, reinforce_loss
from nanochat.rl.letter_metrics import letter_metrics
from nanochat.rl.metrics import rollout_metrics
from nanochat.rl.rollout import make_batches, sample_groups
from nanochat.run_logger import RunLogger
from nanochat.schedules import linear_decay
from nanochat.training import every, optimizer_step, seed_everything
from tasks.aqua import extract_answer
from tasks.common import get_task
from tasks.evaluation import quick_accuracy


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
    seed: int = 42                      # seed of the order of problems and of every draw
    data_dir: str | None = None         # folder of AQuA splits (None = NANOCHAT_AQUA_DIR, AQUA_DATA_DIR, the base directory, the Hub)
    permute_options: bool = True        # AQUA: options change places from sample to sample, so that no letter pays
    # Length
    num_epochs: int = 1                 # passes over the training split
    max_steps: int = -1                 # optimizer steps instead (-1 = off); the learning rate falls to 0 at the last one
    # Rollouts
    examples_per_step: int = 16         # problems per step over all ranks
    num_samples: int = 16               # completions per problem
    max_new_tokens: int = 256           # longest completion; 128 tokens hold 94 % of AQuA's own answers, 256 hold 99 %
    temperature: float = 1.0            # of sampling, and of the log-probabilities that are trained
    device_batch_size: int = 8          # rows per rank per forward pass of the gradient; does not change the result
    rows_in_flight: int = 256           # rows per rank that the engine decodes at once; does not change the result
    # Optimizer
    embedding_lr: float = 0.2           # AdamW learning rate of the embedding, at width 768
    unembedding_lr: float = 0.004       # AdamW learning rate of the head, at width 768
    matrix_lr: float = 0.02             # Muon learning rate of the matrices in the blocks
    init_lr_frac: float = 0.05          # factor on all learning rates at the first step
    weight_decay: float = 0.0           # decoupled weight decay
    grad_clip: float = 1.0              # largest gradient norm (0 = off)
    # Watching
    eval_every: int = 60                # steps between greedy accuracies on the validation split (-1 = off)
    eval_examples: int = 400            # problems per accuracy
    kl_every: int = 20                  # steps between KL to the starting model, letter margin, exact entropy (-1 = off)
    attn_every: int = 60                # steps between attention metrics and pictures (-1 = off)
    rollouts_every: int = 20            # steps between rollouts written to the run's log (-1 = off)
    save_every: int = 60                # steps between checkpoints (-1 = only the last)
    keep_last: int = 1                  # checkpoints kept (-1 = all)
    resume: bool = False                # go on from the newest whole checkpoint, if there is one
    overwrite: bool = False             # delete the checkpoints of an earlier run under this model tag


def main(config):
    compute = compute_init(config.device_type, config.dtype)
    seed_everything(config.seed)
    if config.examples_per_step % compute.world_size:
        raise ValueError(f"examples_per_step={config.examples_per_step} is not a multiple of the {compute.world_size} ranks: "
                         f"try {-(-config.examples_per_step // compute.world_size) * compute.world_size}")
    if config.num_samples < 2:
        raise ValueError(f"num_samples={config.num_samples}: a group of one has no mean to differ from; 8 to 16 work well")

    # Policy, optimizer, engine: one set of weights, which samples and is trained
    model, tokenizer, parent = load_model(config.source, compute, "train", config.model_tag, config.step)
    config = inherit(config, {"model_tag": parent["model_tag"], "output_tag": parent["model_tag"], "step": parent["step"]}, "model_tag", "output_tag", "step")
    optimizer = MuonAdamW(model, compute, config.embedding_lr, config.unembedding_lr, config.matrix_lr, config.weight_decay)
    refuse_own_parent("rl", config.source, config)
    state = start_or_resume("rl", config.output_tag, config, compute, model, optimizer)
    engine = Engine(model, tokenizer, max_rows=config.rows_in_flight)
    reference = None  # the model training starts from, also after a resume
    if config.kl_every > 0:
        reference = load_model(config.source, compute, "eval", config.model_tag, config.step)[0].requires_grad_(False)

    # Problems
    arguments = {"data_dir": config.data_dir} if config.data_dir else {}
    permuted = {"permute_options": config.permute_options} if config.task.upper() == "AQUA" else {}
    train_task = get_task(config.task, split="train", **arguments, **permuted)
    val_task = get_task(config.task, split="validation" if config.task.upper() in ("AQUA", "ALGEBRA") else "test", **arguments)
    num_steps = config.max_steps if config.max_steps > 0 else max(1, config.num_epochs * len(train_task) // config.examples_per_step)
    letters = train_task[0].get("letters", [])
    print0(f"rl {config.model_tag}: {len(train_task):,} problems of {config.task}, {num_steps} steps of {config.examples_per_step} problems x "
           f"{config.num_samples} samples")

    logger = RunLogger("rl", config, compute, num_steps, resume_step=state.step - 1 if state.step else None, model_tag=config.output_tag)
    accuracy = {}

    for step in range(state.step, num_steps + 1):  # the extra pass only evaluates and saves
        state.step = step
        if every(config.eval_every, step, num_steps):
            accuracy = quick_accuracy(val_task, engine, tokenizer, compute, config.eval_examples, config.max_new_tokens)
            logger.log(step, accuracy)
        if step > 0 and every(config.save_every, step, num_steps) or step == num_steps:
            save_checkpoint("rl", config.output_tag, state, config, compute, model, optimizer, tokenizer, config.keep_last, step == num_steps)
        if step == num_steps:
            break

        # Rollouts of this rank's share of the step's problems
        clock = Clock(compute)
        indices = problems_of_step(step, config, len(train_task))[compute.rank::compute.world_size]
        conversations = [train_task[index] for _, index in indices]
        seeds = [draw_seed(config.seed, step, place) for place, _ in indices]
        groups = sample_groups(engine, tokenizer, conversations, train_task.rewards, config.num_samples, config.max_new_tokens,
                               config.temperature, seeds)
        metrics = rollout_metrics(groups, compute, extract_answer, letters)
        metrics["time/generate_s"] = clock.lap()

        # Telemetry of the policy that sampled, before it moves
        if letters and every(config.kl_every, step, num_steps):
            metrics.update(letter_metrics(model, reference, tokenizer, groups, conversations, compute, config.device_batch_size, config.temperature))
            if step == 0 and metrics["rl/kl_sequence_mean"] != 0:
                raise ValueError(f"the KL to the reference is {metrics['rl/kl_sequence_mean']:.3g} before the first step, not 0: the reference is not "
                                 f"the model that training starts from (source={config.source}, step={config.step})")
        if letters and every(config.attn_every, step, num_steps) and compute.is_master:
            watched = [rollout for group in groups for rollout in group][:8]
            metrics.update(attention_metrics(model, tokenizer, [r.prompt + r.tokens for r in watched], [len(r.prompt) for r in watched]))
            folder = base_dir() / "runs" / f"rl_{config.output_tag}_attention" / f"step_{step:06d}"
            for path in save_attention_pictures(model, tokenizer, watched[0].prompt + watched[0].tokens, len(watched[0].prompt), folder):
                logger.log_image(step, f"attn/{path.stem}", path)
        metrics["time/watch_s"] = clock.lap()

        # Gradient on the groups that hold both right and wrong answers
        rewards = torch.tensor([[rollout.reward for rollout in group] for group in groups])
        outcomes = torch.tensor([[rollout.rewards["correct"] for rollout in group] for group in groups])
        for group, row in zip(groups, group_advantages(rewards).tolist()):
            for rollout, advantage in zip(group, row):
                rollout.advantage = advantage
        if every(config.rollouts_every, step, num_steps):
            log_rollouts(logger, step, groups[:2], conversations, extract_answer)
        taught = [rollout for group, signal in zip(groups, groups_with_signal(outcomes)) if signal for rollout in group]
        batches = make_batches(taught, config.device_batch_size, tokenizer.bos_id, compute.device)
        count = compute.sum(sum(int((batch.targets != -1).sum()) for batch in batches))
        total, largest, summed = 0.0, 0.0, 0.0
        for batch in batches:
            logprobs = model.logprobs(batch.inputs, batch.targets, config.temperature)
            loss = reinforce_loss(logprobs, batch.advantages, batch.targets != -1)
            (loss * (compute.world_size / count)).backward()
            difference = (logprobs.detach() - batch.sampler_logprobs).abs()
            total, largest, summed = total + loss.item(), max(largest, float(difference.max())), summed + float(difference.sum())
        if count:  # the same on every rank, so that all reach the optimizer's collectives or none does
            lr_mult = config.init_lr_frac * linear_decay(step, num_steps)
            mean_loss = compute.sum(total) / count
            metrics["grad_norm"] = optimizer_step(optimizer, mean_loss, step, lr_mult, config.grad_clip)
            engine.refresh()
            metrics.update({"train/loss": mean_loss, "train/lr_mult": lr_mult, "sampling/logp_difference/mean": compute.sum(summed) / count,
                            "sampling/logp_difference/max": max(compute.gather_objects(largest))})
        else:
            state.extra["steps_without_signal"] = state.extra.get("steps_without_signal", 0) + 1
        metrics["time/train_s"] = clock.lap()
        sampled = compute.sum(sum(len(rollout.tokens) for group in groups for rollout in group))
        metrics.update({"tokens_per_s/generate": sampled / metrics["time/generate_s"], "num_tokens": sampled,
                        "steps_without_signal": state.extra.get("steps_without_signal", 0)})
        state.tokens += count
        state.seconds += metrics["time/generate_s"] + metrics["time/train_s"]
        logger.log(step, metrics)

    if compute.is_master:
        add_section("rl", f"Reinforcement learning of `{config.model_tag}` on {config.task}: {num_steps} steps, {state.seconds:.0f} s, "
                    f"{state.extra.get('steps_without_signal', 0)} steps without signal.",
                    {"config": config_dict(config), "tokens": state.tokens, "seconds": state.seconds, **accuracy})
    logger.close()
    compute_cleanup()


def problems_of_step(step, config, num_problems):
    """[(place in the run, index of the problem), ...] of a step: a fresh order for every pass, a pure function of the step."""
    first = step * config.examples_per_step
    result = []
    for place in range(first, first + config.examples_per_step):
        epoch, position = divmod(place, num_problems)
        result.append((place, order_of_epoch(config.seed, epoch, num_problems)[position]))
    return result


def draw_seed(seed, step, place):
    """The number that decides all draws of one group."""
    return random.Random(f"rollout|{seed}|{step}|{place}").getrandbits(62)


@lru_cache(maxsize=2)
def order_of_epoch(seed, epoch, num_problems):
    order = list(range(num_problems))
    random.Random(f"problems|{seed}|{epoch}").shuffle(order)
    return order


class Clock:
    """Seconds between laps, the device's work included."""

    def __init__(self, compute):
        self.compute = compute
        self.lap()

    def lap(self):
        self.compute.synchronize()
        since, self.since = getattr(self, "since", 0.0), time.perf_counter()
        return self.since - since


if __name__ == "__main__":
    main(parse(Config))
