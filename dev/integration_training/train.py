"""One configuration -> SFT, RL or both. `deploy.py` starts it: once on each rank, with the results' folder as NANOCHAT_BASE_DIR.

    <results>/config.json           all that decides the run
    <results>/runs/<stage>_*.jsonl  its metrics
    <results>/checkpoints/<stage>/  the policy at each step that was saved, always at the last
    <results>/summary.json          first and last evaluation of each stage with intervals, and whether their difference is beyond noise

Started again it goes on where it was: a finished stage is skipped, an unfinished one resumes from its newest whole checkpoint, to the same weights.
"""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from nanochat.common import base_dir, print0, write_atomic  # noqa: E402
from nanochat.compute import DTYPES, compute_cleanup, compute_init  # noqa: E402
from nanochat.statistics import accuracy_interval, compare, percent  # noqa: E402
from nanochat.training import seed_everything  # noqa: E402
from tasks.common import message_text  # noqa: E402
from dev.integration_training.base_config import load  # noqa: E402
from dev.integration_training.rollouts import checkpoints, run_rl_training, run_sft_training  # noqa: E402
from dev.integration_training.rollouts.backends import check_rates  # noqa: E402
from dev.integration_training.rollouts.datasets import build_mixture  # noqa: E402
from dev.integration_training.rollouts.models import TINY, make_tiny, open_policy  # noqa: E402
from dev.integration_training.rollouts.training import build_judged  # noqa: E402

TINY_TEXTS = 2000                                       # conversations that a tiny model's tokenizer is trained on


def main(config):
    compute = compute_init(config.target.device_type, config.model.dtype)
    if compute.world_size != len(config.target.gpu_ranks):
        raise ValueError(f"gpu_ranks={config.target.gpu_ranks} are {len(config.target.gpu_ranks)} ranks, but {compute.world_size} processes were started: "
                         "start it with deploy.py")
    seed_everything(config.data.shuffle_seed)
    stages, summary = config.output.mode.split("+"), {}
    start = starting_point(config, compute)
    check_all(config, stages, start, compute)
    for stage in stages:
        found = checkpoints.newest(stage)
        if not (found and found[1]["finished"]):
            policy = open_policy(parent_of(stage, config, start), DTYPES[config.model.dtype], compute, config.data.max_length)
            (run_sft_training if stage == "sft" else run_rl_training)(config, policy, compute)
            del policy
        summary[stage] = summarize(checkpoints.newest(stage)[1])
        print0(f"{stage}: {summary[stage]['verdict']}" if "verdict" in summary[stage] else f"{stage}: finished at step {summary[stage]['step']}")
    if compute.is_master:
        write_atomic(base_dir() / "summary.json", json.dumps(summary, indent=1) + "\n")
    compute_cleanup()


def starting_point(config, compute):
    """The model's name or folder; a tiny one is made first, once."""
    if config.model.name not in TINY:
        return config.model.name
    folder = base_dir() / "start"
    if compute.is_master and not (folder / "whole").is_file():
        task = build_mixture(config.data.sft_mixture, config.data.shuffle_seed)
        texts = [message_text(message) for place in range(min(TINY_TEXTS, len(task))) for message in task[place]["messages"]]
        make_tiny(config.model.name, texts, config.data.max_length, config.data.shuffle_seed, folder)
        write_atomic(folder / "whole", "")
    compute.barrier()
    return str(folder)


def parent_of(stage, config, start):
    """RL goes on from the newest SFT checkpoint here, unless the configuration names another."""
    trained_here = checkpoints.newest("sft") if stage == "rl" else None
    if config.output.source_checkpoint and not (stage == "rl" and "sft" in config.output.mode):
        return config.output.source_checkpoint
    return str(trained_here[0]) if trained_here else start


def check_all(config, stages, start, compute):
    """ValueErrors of every stage before the first one is paid for."""
    parent = parent_of(stages[0], config, start)
    policy = open_policy(parent, DTYPES[config.model.dtype], compute, config.data.max_length)
    for stage in stages:
        check_rates(policy, stage, getattr(config, stage))
        build = build_judged if stage == "rl" else lambda specs, seed, name: build_mixture(specs, seed)
        for name in [f"{stage}_mixture"] + [f"{stage}_eval_mixture"] * (getattr(config, stage).eval_every > 0):
            build(getattr(config.data, name), config.data.shuffle_seed, name)
    print0(f"{parent}: {sum(weight.numel() for weight in policy.parameters()):,} parameters, {config.target.device_type} x {compute.world_size}")


def summarize(meta):
    """A finished stage's state -> its first and last accuracy on the same problems, and the paired difference in words."""
    state = meta["state"]
    found = {"step": meta["step"], "tokens": state["tokens"], "seconds": round(state["seconds"], 1)}
    if "first_scores" in state["extra"]:
        first, last = state["extra"]["first_scores"], state["extra"]["last_scores"]
        paired = compare(first, last)
        both = [f"{percent(mean)} [{percent(low)}, {percent(high)}]" for mean, low, high in map(accuracy_interval, (first, last))]
        found |= {"first": accuracy_interval(first), "last": accuracy_interval(last), "difference": paired, "verdict": f"{both[0]} -> {both[1]}; {paired['verdict']}"}
    return found


if __name__ == "__main__":
    main(load(sys.argv[1]))
