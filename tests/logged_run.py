"""One tiny run of every stage that logs, for the tests that look at what is logged. Run as a program, so that W&B starts and ends with it:

    python -m tests.logged_run        with NANOCHAT_BASE_DIR set to a folder with data and tokenizer; WANDB_MODE=offline
"""
import os
import shutil
import struct
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

from tests import pipeline

ROOT = Path(__file__).parents[1]


def main():
    """base, sft, rl and grpo, with all telemetry at every step. SFT goes on until some answers are right by chance: without them RL has no gradient
    to log."""
    watching = {"run": "names", "max_new_tokens": 32, "examples_per_step": 8, "num_samples": 8, "eval_every": 1, "eval_samples": 4, "kl_every": 1, "attn_every": 1, "rollouts_every": 1}
    pipeline.run_stage("base", num_iterations=4, run="names")
    pipeline.run_stage("sft", source="base", num_iterations=60, eval_every=-1, eval_metrics_every=-1, save_every=-1, run="names")
    pipeline.run_stage("rl", max_steps=2, **watching)
    pipeline.run_stage("grpo", num_steps=2, **watching)


@lru_cache
def logged_run(prepared, folder):
    """A base directory with data and tokenizer -> a copy of it in which `main` has run, W&B offline. Once per process."""
    shutil.copytree(prepared, folder)
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NANOCHAT_", "AQUA_"))}
    environment = {**kept, "NANOCHAT_BASE_DIR": str(folder), "HOME": str(folder), "WANDB_MODE": "offline", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    run = subprocess.run([sys.executable, "-m", "tests.logged_run"], cwd=ROOT, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-3000:]
    return folder


def read_wandb(path):
    """An offline run's .wandb file -> (its config's keys, {metric: [values as JSON texts]}; a table's or picture's
    values are its parts). LevelDB's log: after a header of 7 bytes, blocks of
    32 KiB, in them chunks of checksum (4 bytes), length (2), kind (1: whole, 2, 3, 4: first, middle, last part) and data, which is a Record."""
    from wandb.proto.wandb_internal_pb2 import Record
    data, position, parts, config, history = path.read_bytes(), 7, b"", set(), {}
    assert data[:4] == b":W&B", data[:7]
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:      # too little is left of the block for another chunk
            position += 32768 - position % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:                         # the rest of the file was never written
            break
        parts, position = parts + data[position + 7:position + 7 + length], position + 7 + length
        if kind in (1, 4):
            record = Record.FromString(parts)
            parts = b""
            config |= {item.key for item in record.config.update} | {item.key for item in record.run.config.update}
            for item in record.history.item:
                history.setdefault(item.key or item.nested_key[0], []).append(item.value_json)
    return config, history


if __name__ == "__main__":
    main()
