"""Facts about this process: its environment, its folders, its files; device, rank and number format are in `compute.py`.

The only file that reads `os.environ`. It imports nothing that is slow.
"""
import hashlib
import os
from pathlib import Path


def env(name, default=None):
    """The value of an environment variable, or `default` where it is unset or empty: places and secrets only, never hyperparameters.

    Read by this project: NANOCHAT_BASE_DIR, NANOCHAT_DATA_DIR, NANOCHAT_AQUA_DIR, AQUA_DATA_DIR, HF_TOKEN, HF_ENDPOINT,
    WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE, WANDB_API_KEY, LAMBDA_API_KEY, HYPERBOLIC_API_KEY, HYPERBOLIC_REGION, HYPERBOLIC_MAX_PRICE,
    GCS_BUCKET, GCP_PROJECT_ID,
    NANOCHAT_TEST_DATA, NANOCHAT_PEER_RUSTBPE, NANOCHAT_TIMEOUT, and torchrun's RANK, LOCAL_RANK, WORLD_SIZE,
    TORCHELASTIC_RESTART_COUNT.
    """
    return os.environ.get(name) or default


def base_dir():
    """The folder of everything a run leaves behind: $NANOCHAT_BASE_DIR, else ~/.cache/nanochat. Made where it is missing."""
    path = Path(env("NANOCHAT_BASE_DIR", "~/.cache/nanochat")).expanduser()
    path.mkdir(parents=True, exist_ok=True)
    return path


def sha256_of(path):
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path, data):
    """Write bytes or text so that `path` holds either its old content or all of the new, whatever happens meanwhile."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    with open(partial, "wb") as file:
        file.write(data.encode("utf-8") if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def print0(*args, **kwargs):
    """`print`, on rank 0 alone, and at once: a run's log is watched while it grows."""
    if int(env("RANK", "0")) == 0:
        print(*args, **{"flush": True, **kwargs})
