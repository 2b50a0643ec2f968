"""What stops a run, or warns, before it wastes a night: no signal, numbers that are not finite, entropy that is gone."""
import json
import math

import torch

from nanochat.checkpoint_manager import write_tensors
from nanochat.common import base_dir, print0, write_atomic

ENTROPY_LEFT = 0.1      # most of the entropy goes in the first tenth of a run (arXiv 2505.22617); below this share of the start it is worth a warning


def check_sizes(config, compute):
    """ValueError for sizes that no step can have."""
    if config.examples_per_step % compute.world_size:
        raise ValueError(f"examples_per_step={config.examples_per_step} is not a multiple of the {compute.world_size} ranks: "
                         f"try {-(-config.examples_per_step // compute.world_size) * compute.world_size}")
    if config.num_samples < 2:
        raise ValueError(f"num_samples={config.num_samples}: a group of one has no mean to differ from; 8 to 16 work well")


def count_silence(state, has_learned):
    """Counts the steps that taught nothing, in all and in a row -> metrics."""
    state.extra["silent_in_a_row"] = 0 if has_learned else state.extra.get("silent_in_a_row", 0) + 1
    state.extra["steps_without_signal"] = state.extra.get("steps_without_signal", 0) + (not has_learned)
    return {name: state.extra[name] for name in ("steps_without_signal", "silent_in_a_row")}


def stop_if_silent(state, limit):
    """ValueError after `limit` steps in a row that taught nothing (-1 = never). The same on every rank."""
    silent = state.extra.get("silent_in_a_row", 0)
    if 0 < limit <= silent:
        raise ValueError(f"{silent} steps in a row, up to step {state.step}, had no group with both right and wrong answers, so nothing was learned: look at rl/acc. "
                         "Near 0 the problems are too hard (more SFT, an easier task, a larger --num-samples), near 1 too easy; "
                         "--stop-without-signal=-1 goes on regardless")


def watch_entropy(state, metrics):
    """Warns once when the exact entropy falls under a tenth of the first one measured."""
    if "entropy" not in metrics:
        return
    first = state.extra.setdefault("first_entropy", metrics["entropy"])
    if metrics["entropy"] < ENTROPY_LEFT * first and not state.extra.get("entropy_warned"):
        state.extra["entropy_warned"] = True
        print0(f"WARNING: at step {state.step} the policy's entropy is {metrics['entropy']:.3g} nats per token, under {ENTROPY_LEFT:.0%} of the {first:.3g} "
               "it began with: it hardly explores any more; lower the learning rate, raise --temperature, or stop here")


def warn_of_kl(step, metrics, threshold):
    if metrics.get("kl/max_token", 0.0) > threshold:
        print0(f"WARNING: at step {step} a token's log-probability is {metrics['kl/max_token']:.1f} nats from the reference's, more than {threshold}: "
               "the policy says what the reference never would; raise --kl-coef or lower the learning rate")


def check_finite(step, metrics, batches, keep):
    """ValueError, after the batches are kept, where a number of the step's telemetry is not finite. Nothing has been updated yet."""
    broken = [name for name, value in metrics.items() if isinstance(value, float) and not math.isfinite(value)]
    if broken:
        keep(batches())
        raise ValueError(f"at step {step} {', '.join(f'{name} is {metrics[name]}' for name in broken)}: nothing was updated; "
                         "resume from the last checkpoint with a lower learning rate")


def batch_keeper(stage, model_tag, step, compute, tokenizer):
    """-> keep(batches): writes what a failing step was about to learn from to the run's folder, as JSON to read and tensors to compute with."""
    folder = base_dir() / "runs" / f"{stage}_{model_tag}_failed"

    def keep(batches):
        name = f"step_{step:06d}_rank{compute.rank}"
        rows = [{"place": rollout.place, "prompt": tokenizer.decode(rollout.prompt), "completion": rollout.text, "finish": rollout.finish_reason,
                 "rewards": readable(rollout.rewards), "advantage": readable(rollout.advantage), "tokens": rollout.tokens,
                 "sampler_logprobs": readable(rollout.logprobs)} for batch in batches for rollout in batch.rollouts]
        write_atomic(folder / f"{name}.json", json.dumps(rows, ensure_ascii=False, indent=1))
        fields = ("inputs", "targets", "advantages", "sampler_logprobs", "old_logprobs", "ref_logprobs")
        write_tensors(folder / f"{name}.pt", [{field: getattr(batch, field).cpu() for field in fields if isinstance(getattr(batch, field), torch.Tensor)}
                                              for batch in batches])
        print(f"rank {compute.rank}: the batch of step {step} is kept as {folder / name}.json and .pt", flush=True)

    return keep


def readable(value):
    """Numbers for JSON, which knows no NaN."""
    if isinstance(value, dict):
        return {key: readable(item) for key, item in value.items()}
    if isinstance(value, list):
        return [readable(item) for item in value]
    return value if abs(value) < float("inf") else str(value)
