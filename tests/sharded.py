"""What tests/test_sharding.py asks of ranks, all in one start of torchrun: python -m tests.sharded FOLDER RESULT.json"""
import json
import os
import random
import shutil
import sys
from pathlib import Path

import torch

from nanochat.compute import compute_cleanup, compute_init
from nanochat.gpt import GPT, config_from_depth
from nanochat.optim import MuonAdamW
from nanochat.rl import update
from nanochat.rl.algorithm import ALGORITHMS
from nanochat.rl.rollout import Rollout
from nanochat.rl.update import Objective, gradient_pass, learn, prepare
from nanochat.sharding import load_tensors, place, refill, whole_model, whole_tensors
from tasks.aqua import LetterTask
from tests import pipeline
from tests.test_chat_grpo import lively_rewards

STEPS = 5


def train(compute, shard, micro_batches=1, dtype=torch.float32):
    """A few steps on sizes that 2 ranks do not divide -> what there is to compare."""
    model = GPT(config_from_depth(3, 61, 32, n_embd=64, head_dim=32), dtype)
    model.init_weights()
    model = place(model, compute, shard)
    optimizer = MuonAdamW(model, compute)
    generator, curve = torch.Generator().manual_seed(compute.rank), []
    for _ in range(STEPS):
        for _ in range(micro_batches):
            tokens = torch.randint(0, 61, (4, 33), generator=generator)
            loss = model(tokens[:, :-1], tokens[:, 1:])
            (loss / micro_batches).backward()
            curve.append(loss.item())
        with torch.no_grad():
            model(tokens[:, :-1], tokens[:, 1:])  # an evaluation between gradient and update leaves no whole weights behind
        held = weights_and_gradients(model)
        curve.append(optimizer.step(grad_clip=0.5))
        optimizer.zero_grad()
    return {"model": model, "curve": curve, "weights": whole_tensors(model), "state": optimizer.state_dict(), "bytes": held + state_of(optimizer)}


def weights_and_gradients(model):
    return bytes_here([*model.parameters(), *(weight.grad for weight in model.parameters() if weight.grad is not None)])


def state_of(optimizer):
    return bytes_here([value for bundle in optimizer.bundles for value in bundle.state.values() if isinstance(value, torch.Tensor)])


def bytes_here(tensors):
    """What this rank holds of them."""
    return sum(part.numel() * part.element_size() for part in (tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors))


def differences(one, other):
    """The largest ones in curve, weights, optimizer state."""
    states = [{(part["names"][0], key): torch.as_tensor(value, dtype=torch.float32) for part in run["state"]["bundles"] for key, value in part["state"].items()}
              for run in (one, other)]
    assert one["weights"].keys() == other["weights"].keys() and states[0].keys() == states[1].keys()
    return {"curve": max(abs(a - b) for a, b in zip(one["curve"], other["curve"], strict=True)),
            "weights": max(float((one["weights"][name] - other["weights"][name]).abs().max()) for name in one["weights"]),
            "state": max(float((states[0][key] - states[1][key]).abs().max()) for key in states[0])}


def steps_of_a_model(compute):
    none, full = (train(compute, shard) for shard in ("none", "full"))
    result = {"exact": differences(none, full), "accumulated": differences(train(compute, "none", 3), train(compute, "full", 3)),
              "bfloat16": differences(train(compute, "none", dtype=torch.bfloat16), train(compute, "full", dtype=torch.bfloat16))}
    result["bytes"] = {"none": none["bytes"], "full": full["bytes"], "parameters": 4 * none["model"].num_params()}
    model, tokens = full["model"], torch.arange(32)[None]
    copy = whole_model(model, compute)
    result["copy"] = max(float((copy(tokens) - model(tokens)).abs().max()), float((copy(tokens) - none["model"](tokens)).abs().max()))
    result["kept"] = [whole_model(model, compute, keep=False) is None, whole_tensors(model, keep=False) == {}, whole_model(none["model"], compute) is none["model"]]
    other = {name: weight + 1 for name, weight in none["weights"].items()}
    load_tensors(model, other)
    result["loaded"] = max(float((weight - other[name]).abs().max()) for name, weight in whole_tensors(model).items())
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Reinforcement learning

def judged_groups(teaching):
    """Six groups of four rollouts, the same on every rank; those at the places `teaching` hold right and wrong answers."""
    draw, groups = random.Random(0), []
    for where in range(6):
        prompt = [draw.randrange(61) for _ in range(draw.randint(2, 6))]
        answers = [[draw.randrange(61) for _ in range(draw.randint(1, 9))] for _ in range(4)]
        groups.append([Rollout(prompt, tokens, [1] * len(tokens), [-4.0] * len(tokens), "", "stop",
                               {"correct": float(where in teaching and i % 2), "format": 0.1 * (i == 2)}, place=where) for i, tokens in enumerate(answers)])
    return groups


def reinforce(compute, shard, objectives, teaching, device_batch_size=100, minibatches=1, dtype=torch.float32):
    """A step of RL for each objective, on every second group -> what there is to compare."""
    model = GPT(config_from_depth(2, 61, 32, n_embd=32, head_dim=16), dtype)
    model.init_weights()
    generator = torch.Generator().manual_seed(1)
    for name, weight in model.named_parameters():
        if not weight.any():  # else half of the model has no gradient at first
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
    reference = GPT(model.config, dtype)
    reference.load_state_dict(model.state_dict())
    model = place(model, compute, shard)
    optimizer, policy = MuonAdamW(model, compute), whole_model(model, compute)
    groups, curve, passes = judged_groups(teaching)[compute.rank::2], [], []
    for step, objective in enumerate(objectives):
        parts = prepare(groups, objective, policy, reference, compute, device_batch_size, 0, minibatches, str(step))
        learned = learn(model, optimizer, parts, objective, compute, step, 0.05, 1.0, 2, reference)
        assert learned["train/updates"] == 2 * minibatches, learned
        curve += [learned[name] for name in sorted(learned)]
        passes += [len(part) for part in parts]
        refill(policy, model)
    gradient_pass(model, parts[0], objective, compute, reference)
    return {"model": model, "policy": policy, "curve": curve, "weights": whole_tensors(model), "state": optimizer.state_dict(),
            "bytes": weights_and_gradients(model) + state_of(optimizer), "passes": compute.gather_objects(passes)}


def both_ways(*settings):
    none, full = (reinforce(settings[0], shard, *settings[1:]) for shard in ("none", "full"))
    copies = max(float((full["policy"].state_dict()[name] - weight.to(full["policy"].compute_dtype)).abs().max()) for name, weight in full["weights"].items())
    return {**differences(none, full), "passes": full["passes"], "copy": copies, "bytes": {"none": none["bytes"], "full": full["bytes"]}}


def steps_of_a_policy(compute):
    """{case: both_ways}; the ranks hold the groups at even and at odd places."""
    unequal = (0, 1, 2, 4)
    every = [*(Objective(1.0, algorithm, max_new_tokens=9) for algorithm in ALGORITHMS), Objective(1.0, top_k=7)]
    kl = [Objective(1.0, "grpo", kl_coef=0.1, kl_mode=mode) for mode in update.KL_MODES]
    return {"every algorithm": both_ways(compute, every, (0, 1)), "a silent rank": both_ways(compute, kl, (0, 2, 4), 100, 2),
            "unequal passes": both_ways(compute, kl, unequal, 3, 2), "bfloat16": both_ways(compute, kl[1:2], unequal, 3, 2, torch.bfloat16)}


def reinforcement(folder):
    """chat_rl and chat_grpo on two ranks, whole and divided, with a reward that an untrained model meets now and then; their last steps again,
    resumed in the other way and in the same; and one step of many passes -> how many this rank made of itself in each update of these two runs."""
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    LetterTask.rewards = lively_rewards
    passes = []

    def counted(model, batches, *rest):
        passes.append(len(batches))
        return gradient_pass(model, batches, *rest)

    def run(stage, tag, shard, **changes):
        pipeline.run_stage(stage, model_tag="d2", output_tag=tag, shard=shard, **changes)

    rl = {"device_batch_size": 64, "kl_every": 2, "preflight": 4, "attn_every": -1}  # one pass per update: the same bits
    grpo = {"device_batch_size": 64, "num_steps": 2, "save_every": 1}
    for way in ("none", "full"):
        run("rl", f"rl-{way}", way, **rl)
        run("grpo", f"grpo-{way}", way, **grpo)
    run("rl", "half-full", "full", **{**rl, "dtype": "bfloat16", "max_steps": 1, "attn_every": 1})
    for stage, knobs, last, first, then in (("rl", rl, 6, "full", "full"), ("rl", rl, 6, "full", "none"), ("rl", rl, 6, "none", "full"), ("grpo", grpo, 2, "full", "full")):
        forget_the_end(folder / "chatrl_checkpoints" / f"{stage}-{first}", last)
        run(stage, f"{stage}-{first}", then, resume=True, **knobs)
    update.gradient_pass = counted
    for way in ("none", "full"):
        run("grpo", f"passes-{way}", way, num_steps=1, device_batch_size=3, examples_per_step=4, dynamic_sampling=False, kl_mode="exact")
    return passes


# ---------------------------------------------------------------------------------------------------------------------
# Whole stages

def forget_the_end(place, step):
    """As if a kill had come before this step was saved; its weights stay as kept0.pt, kept1.pt, ..."""
    if os.environ["RANK"] == "0":
        shutil.move(place / f"model_{step:06d}.pt", place / f"kept{len(list(place.glob('kept*.pt')))}.pt")
        for path in place.glob(f"*_{step:06d}*"):
            path.unlink()
    compute = compute_init("cpu")
    compute.barrier()
    compute_cleanup()


def stages(folder):
    """base, mid and SFT divided, from one folder; and base again that changes its way in the middle, both ways."""
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    for stage, changes in (("base", {"model_tag": "full", "sample_every": 3}), ("mid", {"model_tag": "d2", "output_tag": "full"}),
                           ("sft", {"model_tag": "d2", "output_tag": "full"})):
        pipeline.run_stage(stage, shard="full", **changes)
    for first, then in (("full", "none"), ("none", "full"), ("full", "full")):
        place = folder / "base_checkpoints" / f"{first}-{then}"
        pipeline.run_stage("base", model_tag=place.name, shard=first)
        forget_the_end(place, 6)
        pipeline.run_stage("base", model_tag=place.name, shard=then, resume=True)


def main(folder, result):
    compute = compute_init("cpu", "float32")
    found = steps_of_a_model(compute) | {"policy": steps_of_a_policy(compute)}
    compute_cleanup()
    stages(Path(folder))
    passes = reinforcement(Path(folder))
    compute = compute_init("cpu", "float32")
    found["passes"] = compute.gather_objects(passes)
    compute_cleanup()
    if compute.is_master:
        Path(result).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
