"""Pointer files: what a batch job leaves for the jobs behind it, so that none of them guesses which checkpoint is meant.

    python -m scripts.pointer --write=latest_sft.json --stage=sft --model-tag=d4      # the newest whole checkpoint, if its stage has ended
    python -m scripts.pointer --write=latest_rs.json --file=rs_cot.jsonl              # or a file
    python -m scripts.pointer --read=latest_sft.json                                  # prints "sft d4 60"

A pointer is JSON: stage, model_tag, step, checkpoint_dir, base_dir, and under `parent` where that checkpoint itself began. It is
written after its stage has ended and read with a look whether what it points to is still there and whole.
"""
import json
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint_manager import newest_whole, read_meta, stage_dir
from nanochat.common import base_dir, write_atomic
from nanochat.configurator import parse


@dataclass(frozen=True)
class Config:
    """Write a pointer to a finished stage's checkpoint or to a file, or read one."""
    write: str | None = None            # pointer file to write
    read: str | None = None             # pointer file to read: prints stage, model tag and step, or the file it points to
    stage: str | None = None            # write: stage of the checkpoint: base, mid, sft or rl
    model_tag: str | None = None        # write: its folder
    file: str | None = None             # write: a file instead of a checkpoint
    parent: bool = False                # read: the checkpoint that the one pointed to was trained from


def main(config):
    if (config.write is None) == (config.read is None):
        raise ValueError(f"write={config.write!r} and read={config.read!r}: give one of them")
    if config.read:
        print(*read_pointer(Path(config.read), config.parent))
    elif config.file:
        write_pointer(config.write, file_entry(Path(config.file)))
    elif config.stage and config.model_tag:
        write_pointer(config.write, checkpoint_entry(config.stage, config.model_tag))
    else:
        raise ValueError(f"stage={config.stage!r}, model_tag={config.model_tag!r}, file={config.file!r}: a pointer needs stage and model_tag, or a file")


def write_pointer(path, entry):
    write_atomic(path, json.dumps({**entry, "base_dir": str(base_dir())}, indent=1) + "\n")


def checkpoint_entry(stage, model_tag):
    """The newest whole checkpoint, with its parent. ValueError where there is none or where the stage has not ended."""
    folder = stage_dir(stage, model_tag)
    meta = newest_whole(folder)
    if meta is None:
        raise ValueError(f"there is no whole checkpoint in {folder}: run the {stage} stage first, or set NANOCHAT_BASE_DIR")
    if not meta["finished"]:
        raise ValueError(f"the newest checkpoint in {folder} is of step {meta['step']}, and the stage has not ended: let it go on with --resume")
    asked = meta["config"]
    parent = {"stage": asked.get("source", "base"), "model_tag": asked["model_tag"], "step": asked["step"]} if stage != "base" else None
    return {"stage": stage, "model_tag": model_tag, "step": meta["step"], "checkpoint_dir": str(folder), "parent": parent}


def file_entry(path):
    if not path.is_file() or path.stat().st_size == 0:
        raise ValueError(f"{path} is missing or empty: nothing points to it")
    return {"file": str(path.resolve())}


def read_pointer(path, parent=False):
    """-> (stage, model tag, step), or (file,). ValueError where the pointer or what it points to is missing, torn or of another base directory."""
    try:
        entry = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the pointer {path} cannot be read ({error}): the job that writes it has not ended, or another NANOCHAT_RUN_ID or "
                         "NANOCHAT_BASE_DIR was meant") from error
    if Path(entry["base_dir"]) != base_dir():
        raise ValueError(f"{path} belongs to the base directory {entry['base_dir']}, not to {base_dir()}: set NANOCHAT_BASE_DIR to the former")
    if "file" in entry:
        return (file_entry(Path(entry["file"]))["file"],)
    if parent:
        entry = entry["parent"]
        if entry is None:
            raise ValueError(f"{path} points to a base model, which has no parent: point to a later stage")
    read_meta(stage_dir(entry["stage"], entry["model_tag"]), entry["step"])
    return entry["stage"], entry["model_tag"], entry["step"]


if __name__ == "__main__":
    main(parse(Config))
