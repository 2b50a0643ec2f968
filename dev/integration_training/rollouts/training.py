"""run_sft_training and run_rl_training: two plain loops over nanochat.training, for any Policy, on one process or many."""
import math
from dataclasses import asdict, dataclass

import torch

from nanochat.common import print0
from nanochat.rl.algorithm import denominator, policy_loss
from nanochat.rl.metrics import Clock, rollout_metrics
from nanochat.rl.rollout import Sampler, make_batches
from nanochat.rl.update import Objective, set_advantages
from nanochat.run_logger import RunLogger
from nanochat.schedules import cosine, linear_decay, warmup
from nanochat.statistics import Z, clustered_error
from nanochat.training import accumulate, every, optimizer_step
from tasks.aqua import extract_answer
from tasks.evaluation import Settings, evaluate
from tasks.metrics import score, summarize
from dev.integration_training.rollouts import checkpoints
from dev.integration_training.rollouts.backends import check_rates, make_backend
from dev.integration_training.rollouts.datasets import build_mixture
from dev.integration_training.rollouts.types import DataBuffer, empty_batch, pack


def run_sft_training(config, policy, compute):
    """Supervised fine-tuning: loss on the assistant's tokens, packed rows -> LoopState; the policy and `checkpoints.newest("sft")` are trained."""
    sft, data = config.sft, config.data
    task = build_mixture(data.sft_mixture, data.shuffle_seed)
    held_out = build_mixture(data.sft_eval_mixture, data.shuffle_seed) if sft.eval_every > 0 else None
    check_rates(policy, "sft", sft)
    backend = make_backend(policy, compute, sft, config.model.compile)
    state = checkpoints.resume("sft", backend, compute)
    buffer = DataBuffer(task, data.shuffle_seed)
    if state.loader:
        buffer.load_state(state.loader)
    num_steps, first = steps_of(sft, len(task), sft.target_examples_per_step), state.step
    print0(f"sft: {len(task):,} conversations, {num_steps} steps x {sft.target_examples_per_step}")
    logger, clock = open_logger("sft", config, compute, num_steps, first), Clock(compute)

    for step in range(first, num_steps + 1):  # the extra pass only evaluates and saves
        state.step = step
        if held_out is not None and every(sft.eval_every, step, num_steps):
            metrics = heldout_loss(held_out, backend, config, sft, compute)
            if not held_out.unjudged():
                metrics |= accuracy(held_out, backend, compute, sft.eval_steps, sft.eval_max_new_tokens, state)
            logger.log(step, metrics)
        if is_due(sft.checkpoint_every, step, first, num_steps):
            checkpoints.save("sft", state, step == num_steps, backend, compute)
        if step == num_steps:
            break
        clock.lap()
        places = buffer.take(sft.target_examples_per_step)[compute.rank::compute.world_size]
        batches = packed([buffer.at(place).conversation for place in places], backend, config, sft, compute)
        lr_mult = schedule(sft, step, num_steps)
        loss, tokens = accumulate(lambda batch: -logprobs_of(backend, batch).sum(), batches, compute)
        norm = optimizer_step(backend.optimizer, loss, step, lr_mult, sft.clip_grad)
        backend.sync()
        seconds = clock.lap()
        state.tokens, state.seconds, state.loader = state.tokens + tokens, state.seconds + seconds, buffer.save_state()
        if every(sft.log_every, step, num_steps - 1):
            logger.log(step, {"train/loss": loss, "train/grad_norm": norm, "train/lr_mult": lr_mult, "train/tokens": state.tokens, "data/epoch": buffer.epoch_id,
                              **dropped(policy.tokenizer, compute), "time/step_ms": 1000 * seconds, "train/tok_per_sec": tokens / seconds})
    logger.close()
    return state


def run_rl_training(config, policy, compute):
    """Reinforcement learning on policy: each problem's rollouts against their own group -> LoopState."""
    rl, data = config.rl, config.data
    task = build_judged(data.rl_mixture, data.shuffle_seed, "rl_mixture")
    held_out = build_judged(data.rl_eval_mixture, data.shuffle_seed, "rl_eval_mixture") if rl.eval_every > 0 else None
    check_rates(policy, "rl", rl)
    objective = Objective(rl.temperature, rl.algorithm, rl.top_k, max_new_tokens=rl.max_new_tokens)
    backend = make_backend(policy, compute, rl, config.model.compile)
    state = checkpoints.resume("rl", backend, compute)
    buffer = DataBuffer(task, data.shuffle_seed)
    if state.loader:
        buffer.load_state(state.loader)
    sampler = Sampler(backend.engine, policy.tokenizer, buffer, compute, rl.num_samples, rl.max_new_tokens, rl.top_k, data.max_length - rl.max_new_tokens)
    num_steps, first = steps_of(rl, len(task), rl.examples_per_step), state.step
    print0(f"rl: {len(task):,} problems, {num_steps} steps of {rl.examples_per_step} problems x {rl.num_samples} samples")
    logger, clock = open_logger("rl", config, compute, num_steps, first), Clock(compute)

    for step in range(first, num_steps + 1):
        state.step = step
        if held_out is not None and every(rl.eval_every, step, num_steps):
            logger.log(step, accuracy(held_out, backend, compute, rl.eval_examples, rl.max_new_tokens, state))
        if is_due(rl.save_every, step, first, num_steps):
            checkpoints.save("rl", state, step == num_steps, backend, compute)
        if step == num_steps:
            break
        clock.lap()
        groups = sampler.sample(buffer.take(rl.examples_per_step), rl.temperature)
        metrics = rollout_metrics(groups, compute, extract_answer, [], rl.num_samples)
        metrics |= {"data/prompts_too_long": rl.examples_per_step - int(compute.sum(len(groups))), "time/generate_s": clock.lap()}
        taught = set_advantages(groups, objective)
        batches = make_batches(taught, rl.batch_size, policy.tokenizer.bos_id, compute.device, pad_multiple(config), data.max_length)
        lr_mult = schedule(rl, step, num_steps)
        loss, tokens, difference = policy_gradient(backend, batches, objective, config, compute)
        if tokens:
            norm = optimizer_step(backend.optimizer, loss, step, lr_mult, rl.clip_grad)
            metrics |= {"train/loss": loss, "train/grad_norm": norm, "train/lr_mult": lr_mult, "sampling/logp_difference/mean": difference}
            backend.sync()
        metrics |= {"train/tokens": tokens, "time/train_s": clock.lap()}
        state.tokens, state.loader = state.tokens + tokens, buffer.save_state()
        state.seconds += metrics["time/generate_s"] + metrics["time/train_s"]
        if every(rl.log_every, step, num_steps - 1):
            logger.log(step, metrics)
            if config.output.log_level == "debug":
                logger.log_text(step, "rollouts", [{"place": rollout.place, "completion": rollout.text, "reward": rollout.reward, "advantage": rollout.advantage}
                                                   for group in groups for rollout in group])
    logger.close()
    return state


# -- the steps --------------------------------------------------------------------------------------------------------

def logprobs_of(backend, batch):
    return backend.policy(batch.inputs, batch.targets, batch.documents, batch.positions)


def packed(conversations, backend, config, training, compute):
    """Conversations -> this rank's Batches, as many as every other rank has: FSDP's collectives wait for each other."""
    tokenizer, data = backend.sampling.tokenizer, config.data
    rendered = [tokenizer.render_conversation(conversation, data.max_length) for conversation in conversations]
    arguments = data.max_length, tokenizer.bos_id, compute.device, pad_multiple(config)
    batches = pack([(ids, mask) for ids, mask in rendered if any(mask[1:])], training.batch_size, *arguments)
    return batches + [empty_batch(*arguments)] * (max(compute.gather_objects(len(batches))) - len(batches))


def pad_multiple(config):
    """Compiled blocks want one width; others as little padding as there is."""
    return config.data.max_length if config.model.compile else 16


def policy_gradient(backend, batches, objective, config, compute):
    """Adds the gradient of the step's loss over all ranks -> (loss, tokens it is of, how far the trainer's log-probabilities are from the sampler's). On
    policy: the ratio is 1, its gradient is REINFORCE's."""
    mine = torch.tensor([sum(int(batch.mask.sum()) for batch in batches), sum(len(batch.rollouts) for batch in batches)], device=compute.device)
    tokens, rollouts = compute.sum(mine).tolist()
    if not tokens:
        return 0.0, 0, 0.0
    fillers = max(compute.gather_objects(len(batches))) - len(batches)  # asked before the passes, whose collectives must meet their like
    divisor, total, difference = denominator(objective.algorithm, tokens, rollouts, objective.max_new_tokens), 0.0, 0.0
    for batch in batches:
        logprobs = backend.policy(batch.inputs, batch.targets, None, None, objective.temperature, objective.top_k)
        loss = policy_loss(objective.algorithm, logprobs, logprobs.detach(), batch.advantages, batch.mask) / divisor
        (loss * compute.world_size).backward()          # FSDP averages over ranks
        total += loss.item()
        difference += float((logprobs.detach() - batch.sampler_logprobs).abs().sum())
    for _ in range(fillers):
        filler = empty_batch(config.data.max_length, backend.sampling.tokenizer.bos_id, compute.device)
        logprobs_of(backend, filler).sum().backward()
    return float(compute.sum(total)), tokens, float(compute.sum(difference)) / tokens


def steps_of(training, num_items, per_step):
    return training.num_iterations if training.num_iterations > 0 else max(1, training.num_epochs * num_items // per_step)


def schedule(training, step, num_steps):
    """Factor on all learning rates."""
    decay = {"linear": linear_decay, "cosine": cosine, "constant": lambda step, num_steps: 1.0}[training.lr_decay_style]
    return training.init_lr_frac * warmup(step, math.ceil(training.warmup_ratio * num_steps)) * decay(step, num_steps)


def is_due(interval, step, first, num_steps):
    """Checkpoints: at each multiple of the interval but the one the run begins with, and always the last."""
    return step == num_steps or step > first and interval > 0 and step % interval == 0


def dropped(tokenizer, compute):
    return {"data/truncated": int(compute.sum(tokenizer.truncated)), "data/untrained": int(compute.sum(tokenizer.untrained))}


# -- evaluation -------------------------------------------------------------------------------------------------------

@torch.no_grad()
def heldout_loss(task, backend, config, sft, compute):
    """The loss per target token of the first conversations, with a 95 % interval over conversations."""
    tokenizer, data, counts = backend.sampling.tokenizer, config.data, []
    backend.policy.eval()
    mine = range(compute.rank, min(sft.eval_steps, len(task)), compute.world_size)
    before = tokenizer.truncated, tokenizer.untrained
    rendered = [tokenizer.render_conversation(task[place], data.max_length) for place in mine]
    tokenizer.truncated, tokenizer.untrained = before
    rendered = [one for one in rendered if any(one[1][1:])]
    batches = pack(rendered, sft.batch_size, data.max_length, tokenizer.bos_id, compute.device, pad_multiple(config))
    for batch in batches + [empty_batch(data.max_length, tokenizer.bos_id, compute.device)] * (max(compute.gather_objects(len(batches))) - len(batches)):
        logprobs = logprobs_of(backend, batch)
        for row in range(len(logprobs)):
            for document in range(1, int(batch.documents[row].max()) + 1):
                places = batch.documents[row] == document
                counts.append((-float(logprobs[row, places].sum()), int((batch.targets[row, places] != -1).sum())))
    backend.policy.train()
    counts = [one for part in compute.gather_objects(counts) for one in part]
    if not counts:
        raise ValueError(f"none of the {min(sft.eval_steps, len(task))} held-out conversations has a trained token within max_length={data.max_length}: raise it")
    losses, tokens = zip(*counts)
    loss, per_conversation = sum(losses) / sum(tokens), sum(tokens) / len(tokens)
    error = clustered_error([(one - loss * count) / per_conversation for one, count in counts])  # of a ratio of two sums, linearised
    return {"val/loss": loss, "val/loss_ci_low": loss - Z * error, "val/loss_ci_high": loss + Z * error, "val/conversations": len(counts)}


def accuracy(task, backend, compute, max_problems, max_new_tokens, state):
    """Greedy answers to the first problems -> metrics with a 95 % interval. The scores of each problem, at first and now, stay in the state."""
    settings = Settings(mode="generative", letters=False, max_new_tokens=max_new_tokens)
    records = evaluate(task, backend.engine, backend.sampling.tokenizer, compute, settings, max_problems=max_problems)
    found, scores = summarize(records), [score(record) for record in records]
    state.extra.setdefault("first_scores", scores)
    state.extra["last_scores"] = scores
    names = ("accuracy", "ci_low", "ci_high", "parse_failures", "truncated", "mean_tokens")
    return {f"eval/{name}": found[name] for name in names if found.get(name) is not None} | {"eval/problems": len(records)}


def build_judged(specs, seed, name):
    task = build_mixture(specs, seed)
    if task.unjudged():
        raise ValueError(f"data.{name} holds {', '.join(task.unjudged())}, whose answers cannot be checked, so there is no reward: use questions with an answer")
    return task


# -- the log ----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Run:
    """What RunLogger asks a configuration for."""
    run: str
    model_tag: str
    experiment: dict


class Silent:
    """A console that shows nothing."""

    def show(self, step, metrics):
        pass

    def say(self, text):
        pass

    def close(self):
        pass


def open_logger(stage, config, compute, num_steps, first):
    output = config.output
    run = Run(output.experiment_name if output.use_wandb else "dummy", output.experiment_name, asdict(config))
    logger = RunLogger(stage, run, compute, num_steps, resume_step=first - 1 if first else None)
    if output.log_level == "warning" and compute.is_master:
        logger.console = Silent()
    return logger
