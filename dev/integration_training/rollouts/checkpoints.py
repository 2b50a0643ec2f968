"""Checkpoints of an experiment: <results>/checkpoints/<stage>/step_000100/, a folder that appears under its name only when it is whole.

It holds the policy as `open_policy` (or transformers) loads it, optimizer.pt with random states, and meta.json with the SHA-256 of every other file.
Tensors are whole, so the number of ranks may change between a run and its continuation.
"""
import json
import os
import shutil

from nanochat.checkpoint_manager import read_tensors, write_tensors
from nanochat.common import base_dir, print0, sha256_of, write_atomic
from nanochat.training import LoopState, rng_state, set_rng_state


def stage_folder(stage):
    return base_dir() / "checkpoints" / stage


def save(stage, state, finished, backend, compute):
    """All ranks call; rank 0 writes."""
    folder = stage_folder(stage) / f"step_{state.step:06d}"
    weights, optimizer = backend.get_weights(), backend.optimizer.state_dict()
    random_states = compute.gather_objects(rng_state())
    if compute.is_master:
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        backend.sampling.save(partial, weights)
        write_tensors(partial / "optimizer.pt", {"optimizer": optimizer, "rng": random_states})
        files = {str(path.relative_to(partial)): sha256_of(path) for path in sorted(partial.rglob("*")) if path.is_file()}
        write_atomic(partial / "meta.json", json.dumps({"stage": stage, "step": state.step, "finished": finished, "world_size": compute.world_size,
                                                        "state": state.to_dict(), "files": files}, indent=1))
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(partial, folder)
    compute.barrier()


def newest(stage):
    """-> (folder, meta) of the newest checkpoint that is whole, or None. Every torn one on the way is reported."""
    for folder in sorted(stage_folder(stage).glob("step_*"), reverse=True):
        problem = None
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            problem = next((f"{name} is missing or changed" for name, digest in meta["files"].items()
                            if not (folder / name).is_file() or sha256_of(folder / name) != digest), None)
        except (OSError, ValueError, KeyError, TypeError) as error:
            problem = f"meta.json cannot be read ({error})"
        if problem is None:
            return folder, meta
        print0(f"skipping checkpoint {folder}: {problem}")
    return None


def resume(stage, backend, compute):
    """-> LoopState: a new one, or that of the newest whole checkpoint, which the backend is then filled from."""
    found = newest(stage)
    steps = compute.gather_objects(found[1]["step"] if found else -1)
    if min(steps) < 0:
        return LoopState()
    if len(set(steps)) > 1:
        raise ValueError(f"the ranks find different newest checkpoints, steps {sorted(set(steps))}: save_dir must be a folder that all of them share")
    folder, meta = found
    saved = read_tensors(folder / "optimizer.pt")
    backend.load_weights(stored_weights(folder, backend))
    backend.optimizer.load_state_dict(saved["optimizer"])
    set_rng_state(saved["rng"][compute.rank % len(saved["rng"])])
    change = "" if meta["world_size"] == compute.world_size else f", saved by {meta['world_size']} ranks, on {compute.world_size}"
    print0(f"resuming {stage} at step {meta['step']}{change}")
    return LoopState(**meta["state"])


def stored_weights(folder, backend):
    """{name: tensor} of a checkpoint, by the policy's names."""
    if (folder / "model.pt").is_file():
        stored = read_tensors(folder / "model.pt")
    else:
        from safetensors.torch import load_file
        stored = {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
    return {f"model.{name}": tensor for name, tensor in stored.items()}
