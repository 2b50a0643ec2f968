"""What tests/test_sharding.py asks of ranks, all in one start of torchrun: python -m tests.sharded FOLDER RESULT.json"""
import json
import os
import shutil
import sys
from pathlib import Path

import torch

from nanochat.common import compute_cleanup, compute_init
from nanochat.gpt import GPT, config_from_depth
from nanochat.optim import MuonAdamW
from nanochat.sharding import load_tensors, place, whole_model, whole_tensors
from tests import pipeline

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
        held = sum(numbers(weight) + numbers(weight.grad) for weight in model.parameters())
        curve.append(optimizer.step(grad_clip=0.5))
        optimizer.zero_grad()
    held += sum(value.numel() for bundle in optimizer.bundles for value in bundle.state.values() if isinstance(value, torch.Tensor))
    return {"model": model, "curve": curve, "weights": whole_tensors(model), "state": optimizer.state_dict(), "bytes": 4 * held}


def numbers(tensor):
    return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()


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


def stages(folder):
    """base, mid and SFT divided, from one folder; and base again that changes its way in the middle, both ways."""
    os.environ["NANOCHAT_BASE_DIR"] = str(folder)
    for stage, changes in (("base", {"model_tag": "full", "sample_every": 3}), ("mid", {"model_tag": "d2", "output_tag": "full"}),
                           ("sft", {"model_tag": "d2", "output_tag": "full"})):
        pipeline.run_stage(stage, shard="full", **changes)
    for first, then in (("full", "none"), ("none", "full"), ("full", "full")):
        place = folder / "base_checkpoints" / f"{first}-{then}"
        pipeline.run_stage("base", model_tag=place.name, shard=first)
        if os.environ["RANK"] == "0":
            shutil.move(place / "model_000006.pt", place / "kept.pt")  # as if a kill had come after step 4
            for path in place.glob("*_000006*"):
                path.unlink()
        compute = compute_init("cpu")
        compute.barrier()
        compute_cleanup()
        pipeline.run_stage("base", model_tag=place.name, shard=then, resume=True)


def main(folder, result):
    compute = compute_init("cpu", "float32")
    found = steps_of_a_model(compute)
    compute_cleanup()
    if compute.is_master:
        Path(result).write_text(json.dumps(found))
    stages(Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
