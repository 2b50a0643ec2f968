"""What belongs to a run: its whole checkpoints, tokenizer, report, logs, evaluations and problems; and the manifest that lists them in a bucket.

    gs://BUCKET/runs/RUN/base_checkpoints/d4/model_000900.pt ...     the base directory's own layout
    gs://BUCKET/runs/RUN/manifest.json                               written last: what is in it is there, whole

The lists below are the only ones: scripts/upload_to_gcs.py and hf_jobs/store.py, which keeps what a job must find again, go by them.
The manifest of a stranger is read without trusting it.
"""
import json
import re
import secrets
import time
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from nanochat.checkpoint_manager import FOLDERS, META
from nanochat.common import base_dir, env, write_atomic
from nanochat.report import git_state

MANIFEST = "manifest.json"
ORIGIN = "run_origin"  # a file of the base directory with a random word: two runs under one name are told apart by it
SHARD = re.compile(r"optim_\d{6,}_rank\d+\.pt")

# What is at the top of a base directory, as names or patterns. Whatever a stage writes belongs into one of these (tests/test_hf_jobs_kept.py).
RECORDS = ("tokenizer", "report", "runs", "logs", "eval", "base_eval", "reasoning", "interpretability", "contamination", "stages")
LOOSE = ("rs_cot*", "latest_*.json", "run_name", "*.log")
SMALL_DATA = ("identity_conversations.jsonl", "offline_manifest.json")
DATA = ("aqua",)                          # what --exclude-data leaves out
NOT_KEPT = ("base_data", "eval_bundle", "eval_bundles", "dolci_stream", "dolci_think_800k.jsonl",  # large, and to be had where it came from
            "hf_export", "hf_release",    # made from a checkpoint at any time
            "wandb", "cloud", "chat_history", ".*")  # W&B's copy of runs/, rentals, what somebody typed; work in progress


@dataclass
class Plan:
    """`files` {name: path} in the order of sending: weights, then records. `expected` {name: SHA-256} of the files that a checkpoint vouches for."""
    files: dict = field(default_factory=dict)
    expected: dict = field(default_factory=dict)
    checkpoints: list = field(default_factory=list)   # {"stage", "model_tag", "step", "finished", "files"}
    torn: list = field(default_factory=list)          # what was left out, in words
    damaged: list = field(default_factory=list)       # checkpoints that name files which are not there

    @property
    def size(self):
        return sum(path.stat().st_size for path in self.files.values())


def plan(exclude_data=False, exclude_optimizer=False):
    """The base directory -> Plan."""
    base, found = base_dir(), Plan()
    for stage, folder in FOLDERS.items():
        for tag in sorted(path for path in (base / folder).glob("*") if path.is_dir()):
            add_checkpoints(found, base, stage, tag, exclude_optimizer)
    records, unfit = files_of(base, (*RECORDS, *(() if exclude_data else DATA), *LOOSE, *SMALL_DATA))
    found.files |= records
    found.torn += unfit
    return found


def add_checkpoints(found, base, stage, folder, exclude_optimizer):
    """A model tag's checkpoints -> into the plan, a checkpoint's meta file behind what it vouches for. What no meta file names is left out."""
    claimed = set()
    for meta_path in sorted(folder.glob("meta_*.json")):
        match = META.fullmatch(meta_path.name)
        try:
            meta = json.loads(meta_path.read_text(encoding="utf-8"))
            files = {str(name): str(sha256) for name, sha256 in meta["files"].items()}
            step, model = int(match[1]), f"model_{match[1]}.pt"
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            found.damaged.append(f"{meta_path.relative_to(base)} cannot be read ({type(error).__name__})")
            continue
        if exclude_optimizer:
            claimed |= {name for name in files if SHARD.fullmatch(name)}
            files = {name: sha256 for name, sha256 in files.items() if not SHARD.fullmatch(name)}
        claimed |= {*files, meta_path.name}
        missing = [name for name in files if not (folder / name).is_file()]
        if model not in files or model in missing:
            found.damaged.append(f"{meta_path.relative_to(base)} belongs to a model file that is not there")
            continue
        if missing:
            found.torn.append(f"{len(missing)} optimizer shards of {folder.relative_to(base)} at step {step} are not here: it can start a stage, not resume one")
        place = folder.relative_to(base).as_posix()
        names = [f"{place}/{name}" for name in sorted(files) if name not in missing] + [f"{place}/{meta_path.name}"]
        found.files |= {name: base / name for name in names}
        found.expected |= {f"{place}/{name}": sha256 for name, sha256 in files.items() if name not in missing}
        found.checkpoints.append({"stage": stage, "model_tag": folder.name, "step": step, "finished": bool(meta.get("finished")), "files": names})
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.name not in claimed and not is_partial(path):
            found.torn.append(f"{path.relative_to(base)} belongs to no whole checkpoint")


def files_of(base, patterns):
    """The files of these places at the top of a base directory -> ({name: path}, in words those whose names cannot be sent)."""
    files, unfit = {}, []
    for place in (place for pattern in patterns for place in sorted(base.glob(pattern))):
        for path in [place] if place.is_file() else sorted(place.rglob("*")):
            name = path.relative_to(base).as_posix()
            if path.is_file() and not is_partial(path):
                if safe_name(name):
                    files[name] = path
                else:
                    unfit.append(f"{name!r} has a name that not every system can hold")
    return files, unfit


def is_at(name, patterns):
    """True for a name in one of these places."""
    return any(fnmatchcase(name.partition("/")[0], pattern) for pattern in patterns)


def unknown(base):
    """What is at the top of a base directory and in none of the lists: nobody has said whether it belongs to the run."""
    known = (*RECORDS, *FOLDERS.values(), *LOOSE, *SMALL_DATA, *DATA, *NOT_KEPT, ORIGIN)
    return sorted(path.name for path in base.iterdir() if not is_at(path.name, known))


def is_partial(path):
    return path.name.startswith(".") or path.name.endswith(".partial")


# -- names ------------------------------------------------------------------------------------------------------------

def check_bucket(name):
    """ValueError unless it can be a bucket's name; gs://NAME/ is taken too."""
    bare = (name or "").removeprefix("gs://").rstrip("/")
    if not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bare):
        raise ValueError(f"bucket={name!r} is no bucket's name: give --bucket or set GCS_BUCKET, lower-case letters, digits, - _ and .")
    return bare


def check_run(name):
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", name, re.ASCII):
        raise ValueError(f"run_name={name!r} is no folder's name: use letters, digits, - _ and .")
    return name


def default_run(checkpoints):
    """The run's name where none is given: WANDB_RUN, else the first stage's tag and tokenizer, which a later call finds again."""
    if (run := env("WANDB_RUN", "dummy")) != "dummy":
        return check_run(run)
    if not checkpoints:
        raise ValueError("the run has no name yet: give --run-name or set WANDB_RUN")
    first = checkpoints[0]
    meta = json.loads((base_dir() / first["files"][-1]).read_text(encoding="utf-8"))
    return check_run(f"{first['model_tag']}-{str(meta.get('tokenizer', ''))[:8]}")


# -- manifest ---------------------------------------------------------------------------------------------------------

def origin():
    """This base directory's random word, made at the first call. A download hands it on, so that a continued run keeps its name."""
    path = base_dir() / ORIGIN
    if not path.is_file():
        write_atomic(path, secrets.token_hex(8) + "\n")
    return path.read_text(encoding="utf-8").strip()


def manifest(run, found, digests):
    """What was sent {name: Digest} -> the manifest's text."""
    whole = [one for one in found.checkpoints if all(name in digests for name in one["files"])]
    return json.dumps({
        "run": run, "origin": origin(), "code": git_state(), "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "checkpoints": [{key: value for key, value in one.items() if key != "files"} for one in whole],
        "files": {name: {"size": one.size, "crc32c": one.crc32c, "sha256": one.sha256} for name, one in digests.items()}}, indent=1) + "\n"


def read_manifest(content, where):
    """A manifest's bytes -> its dict, every name a plain path below a folder. ValueError says what is wrong."""
    try:
        found = json.loads(content)
        files = {str(name): {"size": int(one["size"]), "crc32c": str(one["crc32c"]), "sha256": str(one["sha256"])} for name, one in found["files"].items()}
        checkpoints = [{key: one[key] for key in ("stage", "model_tag", "step")} for one in found["checkpoints"]]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{where} is damaged ({type(error).__name__}: {error}): upload the run again, with --overwrite") from error
    for name, one in files.items():
        if not safe_name(name) or one["size"] < 0 or not re.fullmatch(r"[0-9a-f]{64}", one["sha256"]):
            raise ValueError(f"{where} lists {name!r} with {one}, which no upload of ours writes: it is damaged or forged")
    return {"run": str(found.get("run", "")), "origin": str(found.get("origin", "")), "code": str(found.get("code", "")), "time": str(found.get("time", "")),
            "checkpoints": checkpoints, "files": files}


def safe_name(name):
    """True for a relative path of plain parts: it stays below whatever folder it is joined to, on any system."""
    parts = PurePosixPath(name).parts
    return bool(parts) and "/".join(parts) == name and not any(part in ("..", ".") or part.startswith(".") or re.search(r"[\x00-\x1f\\:]", part) for part in parts) \
        and not name.startswith("/") and name not in (MANIFEST, ORIGIN)


def inside(folder, name):
    """folder/name, unless a link on the way leads out of the folder: ValueError."""
    folder, path = Path(folder).resolve(), Path(folder).resolve() / name
    if not path.resolve().is_relative_to(folder):
        raise ValueError(f"{path} is reached through a link that leads out of {folder}: remove the link")
    return path
