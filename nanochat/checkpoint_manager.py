"""Save, find and load checkpoints; build the model that one describes. One folder per stage and model tag.

    <base_dir>/chatsft_checkpoints/d8/
        model_000400.pt          weights by name (torch.save, loaded with weights_only)
        optim_000400_rank0.pt    that rank's optimizer shard, random-number generators and position in the data
        meta_000400.json         sizes, config, loop state, tokenizer, the parent it was trained from, SHA-256 of the files above

The meta file is written last and names the others' checksums, so a checkpoint is whole exactly when its meta file is there and
agrees. Each file appears under its name only when complete. A torn checkpoint is skipped in favour of the newest whole one.
"""
import dataclasses
import hashlib
import io
import json
import re

import torch

from nanochat.common import base_dir, print0, sha256_of, write_atomic
from nanochat.compute import Compute, compute_init
from nanochat.configurator import config_dict
from nanochat.dataloader import merge_states
from nanochat.gpt import GPT, GPTConfig
from nanochat.sharding import load_tensors, place, whole_tensors
from nanochat.tokenizer import get_tokenizer
from nanochat.training import LoopState, rng_state, set_rng_state

FOLDERS = {"base": "base_checkpoints", "mid": "mid_checkpoints", "sft": "chatsft_checkpoints", "rl": "chatrl_checkpoints"}
META = re.compile(r"meta_(\d{6,})\.json")


def stage_dir(stage, model_tag):
    """The folder of one stage of one model. ValueError names the stages there are."""
    if stage not in FOLDERS:
        raise ValueError(f"there is no stage {stage!r}: choose one of {', '.join(FOLDERS)}")
    return base_dir() / FOLDERS[stage] / model_tag


def save_checkpoint(stage, model_tag, state, config, compute, model, optimizer, tokenizer, keep_last=1, finished=False, parent=None):
    """Every rank writes its optimizer shard, rank 0 weights and, once all shards are there, the meta file; then older checkpoints
    beyond `keep_last` (-1 = keep all) go. `finished` marks the end of the stage; `parent` is the meta of the checkpoint it began with."""
    folder = stage_dir(stage, model_tag)
    shard = {"optimizer": optimizer.state_dict(), "rng": rng_state(), "loader": state.loader}  # what differs between ranks
    shard_name = f"optim_{state.step:06d}_rank{compute.rank}.pt"
    files = {shard_name: write_tensors(folder / shard_name, shard)}
    weights = whole_tensors(model, keep=compute.is_master)
    if compute.is_master:
        model_name = f"model_{state.step:06d}.pt"
        files[model_name] = write_tensors(folder / model_name, weights)
    files = {name: digest for part in compute.gather_objects(files) for name, digest in part.items()}
    if compute.is_master:
        meta = {"stage": stage, "model_tag": model_tag, "step": state.step, "finished": finished,
                "model_config": dataclasses.asdict(model.config), "config": config_dict(config), "state": {**state.to_dict(), "loader": {}},
                "tokenizer": tokenizer.fingerprint, "parent": parent and lineage(parent), "world_size": compute.world_size, "files": files}
        write_atomic(folder / f"meta_{state.step:06d}.json", json.dumps(meta, indent=1))
        prune(folder, keep_last)
    compute.barrier()


def lineage(meta):
    """A checkpoint's meta -> what its children record of it."""
    return {"stage": meta["stage"], "model_tag": meta["model_tag"], "step": meta["step"], "model_sha256": meta["files"][f"model_{meta['step']:06d}.pt"]}


def write_tensors(path, content):
    """torch.save, atomically -> the file's SHA-256."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    data = buffer.getbuffer()
    write_atomic(path, data)
    return hashlib.sha256(data).hexdigest()


def prune(folder, keep_last):
    """Remove all but the newest `keep_last` checkpoints: the meta file first, so that no torn checkpoint is ever seen as whole.
    Files of a step without a meta file, left by a kill, go too."""
    if keep_last < 1:
        return
    kept = set(saved_steps(folder)[-keep_last:])
    for step in saved_steps(folder):
        if step not in kept:
            (folder / f"meta_{step:06d}.json").unlink()
    for path in folder.iterdir():
        numbered = re.fullmatch(r"(?:model|optim)_(\d{6,})(?:_rank\d+)?\.pt", path.name)
        if (numbered and int(numbered[1]) not in kept) or path.name.endswith(".partial"):
            path.unlink(missing_ok=True)


def saved_steps(folder):
    """The steps with a meta file, ascending."""
    found = (META.fullmatch(path.name) for path in folder.iterdir()) if folder.is_dir() else ()
    return sorted(int(match[1]) for match in found if match)


def read_meta(folder, step, shards_for=None):
    """The meta file of a step; its model file, and the shards that a Compute needs to go on, checked against the checksums.
    ValueError says what is wrong."""
    path = folder / f"meta_{step:06d}.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} cannot be read ({error}): delete it, the next older checkpoint will be used") from error
    if "files" not in meta:
        raise ValueError(f"{path} lists no files, so it is not a checkpoint of this project: import it with scripts.export_to_hf --import")
    for name in [f"model_{step:06d}.pt"] + ([] if shards_for is None else shard_names(meta, shards_for)):
        if name not in meta["files"]:
            raise ValueError(f"{path} does not list {name}: it is not a checkpoint of this project, or was edited")
        if not (folder / name).is_file():
            raise ValueError(f"{folder / name} is missing although {path.name} lists it: the checkpoint is not whole")
        digest = sha256_of(folder / name)
        if digest != meta["files"][name]:
            raise ValueError(f"{folder / name} does not have the SHA-256 that {path.name} records "
                             f"({digest[:12]}, not {meta['files'][name][:12]}): the file is torn or changed")
    return meta


def shard_names(meta, compute):
    """The shards this rank needs: its own, or where the number of ranks has changed those of all the old ranks."""
    ranks = [compute.rank] if meta["world_size"] == compute.world_size else range(meta["world_size"])
    return [f"optim_{meta['step']:06d}_rank{rank}.pt" for rank in ranks]


def newest_whole(folder, shards_for=None):
    """The meta of the newest checkpoint that is whole, or None. Every torn one on the way is reported."""
    for step in reversed(saved_steps(folder)):
        try:
            return read_meta(folder, step, shards_for)
        except ValueError as error:
            print0(f"skipping checkpoint {step}: {error}")
    return None


def find_model_tag(stage):
    """The tag used last at this stage. ValueError where there is none."""
    parent = base_dir() / FOLDERS[stage]
    tags = [(max(path.stat().st_mtime for path in folder.glob("meta_*.json")), folder.name)
            for folder in (parent.iterdir() if parent.is_dir() else ()) if any(folder.glob("meta_*.json"))]
    if not tags:
        raise ValueError(f"there is no {stage} checkpoint under {parent}: run the {stage} stage first, or set NANOCHAT_BASE_DIR")
    return max(tags)[1]


def load_model(stage, device="cpu", phase="eval", model_tag=None, step=None, dtype="", shard="none"):
    """-> (model, tokenizer, meta): the model of the newest whole checkpoint (or of `step`), in eval or train mode.

    `device` is a Compute, a torch.device or a name; `shard` divides the model over the ranks of a Compute. `model_tag` None = the one
    saved last. ValueError where nothing whole is found or where the tokenizer on disk is not the one the model was trained with.
    """
    if phase not in ("eval", "train"):
        raise ValueError(f"phase={phase!r} is neither 'eval' nor 'train'")
    if isinstance(device, Compute):
        compute = device
    else:
        found = compute_init(torch.device(device).type, dtype)
        compute = dataclasses.replace(found, device=torch.device(device))
    stage_dir(stage, "")
    model_tag = model_tag or find_model_tag(stage)
    folder = stage_dir(stage, model_tag)
    meta = newest_whole(folder) if step is None else read_meta(folder, step)
    if meta is None:
        raise ValueError(f"there is no whole checkpoint in {folder}: run the {stage} stage first")
    tokenizer = get_tokenizer()
    check_tokenizer(tokenizer, meta, folder)
    model = GPT(GPTConfig(**meta["model_config"]), compute.dtype)
    model.load_state_dict(read_tensors(folder / f"model_{meta['step']:06d}.pt"))
    model = place(model, compute, shard)
    model.train(phase == "train")
    return model, tokenizer, meta


def read_tensors(path):
    """The content of a torch file, read with weights_only. ValueError for a torn or foreign file."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a torn or hostile file makes torch's unpickler raise anything: IndexError, AssertionError, struct.error
        raise ValueError(f"{path} is torn, or holds something other than tensors, and was not loaded ({type(error).__name__}: {error})") from error


def check_tokenizer(tokenizer, meta, folder):
    if tokenizer.fingerprint != meta["tokenizer"]:
        raise ValueError(f"the model in {folder} was trained with tokenizer {meta['tokenizer'][:12]}, but {base_dir() / 'tokenizer'} holds "
                         f"{tokenizer.fingerprint[:12]}: its ids would mean other words; restore that tokenizer or retrain")


def start_or_resume(stage, model_tag, config, compute, model, optimizer, tokenizer, parent=None):
    """-> LoopState: a new one, or with config.resume that of the newest checkpoint whole on all ranks, with model, optimizer and
    random-number generators filled from it. The number of ranks may have changed: optimizer and loader are divided anew.

    Only the run that a checkpoint belongs to goes on from it: the same config in all that decides what is learned, the same
    tokenizer, the same `parent` weights (the meta of the checkpoint this run starts from). What another run left in the folder is a
    ValueError, or with config.overwrite deleted, and the run starts over. Without config.resume whatever is in the folder counts as
    another run's; a process that torchrun has restarted after a failure resumes in any case. All ranks decide alike.
    """
    folder, tag_flag = stage_dir(stage, model_tag), "--model-tag" if parent is None else "--output-tag"
    if not config.resume and not compute.restarts:
        steps = saved_steps(folder)
        if steps and not config.overwrite:
            raise ValueError(f"{folder} already holds {stage} checkpoints up to step {steps[-1]}: --resume goes on from there, "
                             f"--overwrite deletes them, another {tag_flag} leaves them alone")
        return start_over(folder, compute)
    mine = newest_whole(folder, compute)
    steps = compute.gather_objects(mine["step"] if mine else -1)
    if min(steps) < 0 <= max(steps):
        raise ValueError(f"rank 0 finds {stage} checkpoint {steps[0]} in {folder}, rank {steps.index(min(steps))} {min(steps)} (-1 = none whole): all nodes must "
                         "share one NANOCHAT_BASE_DIR; where they do, the checkpoint is damaged and --overwrite without --resume begins anew")
    if mine:
        meta = mine if mine["step"] == min(steps) else read_meta(folder, min(steps), compute)
        obstacle = other_run(meta, config, tokenizer, parent)
    else:
        obstacle = "it holds checkpoints, but for the reasons above none to go on from" if saved_steps(folder) else None
    obstacle = next(filter(None, compute.gather_objects(obstacle)), None)  # nobody reads the folder any more when one rank clears it
    if obstacle and not config.overwrite:
        raise ValueError(f"{folder} cannot be resumed: {obstacle}; restore what was to go on, --overwrite starts over, another {tag_flag} leaves it alone")
    if obstacle:
        print0(f"starting {stage} {model_tag} over: {obstacle}")
    if obstacle or not mine:
        return start_over(folder, compute)
    load_tensors(model, read_tensors(folder / f"model_{meta['step']:06d}.pt"))
    shards = [read_tensors(folder / name) for name in shard_names(meta, compute)]
    optimizer.load_state_dict(*(shard["optimizer"] for shard in shards))
    set_rng_state(shards[0]["rng"])
    loader = shards[0]["loader"] if len(shards) == 1 else merge_states([shard["loader"] for shard in shards])
    change = "" if meta["world_size"] == compute.world_size else f", saved by {meta['world_size']} ranks, on {compute.world_size}"
    print0(f"resuming {stage} {model_tag} at step {meta['step']}{change}")
    return LoopState(**{**meta["state"], "loader": loader})


def refuse_own_parent(stage, source, config):
    """ValueError where a run would write into the folder of the checkpoint that it starts from, and in the end delete it."""
    if source == stage and config.output_tag == config.model_tag:
        raise ValueError(f"this run starts from the {stage} checkpoint {config.model_tag} and would replace it: give --output-tag, "
                         f"for example --output-tag={config.model_tag}-2")


def start_over(folder, compute):
    """An empty folder and a new LoopState. All ranks call, rank 0 deletes."""
    compute.barrier()  # every rank has looked before
    if compute.is_master:
        clear(folder)
    compute.barrier()
    return LoopState()


def clear(folder):
    """Delete a folder's checkpoints, the meta files first, so that nothing torn is ever seen as whole."""
    for pattern in ("meta_*.json", "model_*.pt", "optim_*.pt"):
        for path in sorted(folder.glob(pattern)):
            path.unlink()


# fields that may change between a run and its continuation, because they only say how to watch it
FREE_FIELDS = {"run", "resume", "overwrite", "save_every", "eval_every", "sample_every", "log_every", "keep_last", "device_type", "compile", "preflight", "shard"}


def other_run(meta, config, tokenizer, parent):
    """In which way a checkpoint belongs to another run than that of this config, tokenizer and parent meta; None where it is the same run.
    What it does not record, because it is older than the knob or the field, is taken for the knob's default, or not compared."""
    given, saved = json.loads(json.dumps(config_dict(config))), meta["config"]
    if saved.keys() <= given.keys():  # else it is another script's
        saved = {field.name: field.default for field in dataclasses.fields(config)} | saved
    changed = [name for name in given if name not in FREE_FIELDS and saved.get(name) != given[name]]
    if changed:
        return (f"step {meta['step']} was trained with {', '.join(f'{name}={saved.get(name)}' for name in changed)}, now asked for "
                f"{', '.join(f'{name}={given[name]}' for name in changed)}")
    if meta.get("tokenizer", tokenizer.fingerprint) != tokenizer.fingerprint:
        return f"step {meta['step']} was trained with tokenizer {meta['tokenizer'][:12]}, but {base_dir() / 'tokenizer'} holds {tokenizer.fingerprint[:12]}"
    was, now = meta.get("parent"), parent and lineage(parent)
    if was and now and was["model_sha256"] != now["model_sha256"]:
        before, after = (f"{one['stage']} {one['model_tag']} of step {one['step']} with SHA-256 {one['model_sha256'][:12]}" for one in (was, now))
        return f"step {meta['step']} was trained from {before}, but now there is {after}"
    return None
