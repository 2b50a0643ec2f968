"""The JSONL is complete and readable whatever happens; the console stays short; W&B never stops a run."""
import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from nanochat import run_logger
from nanochat.compute import Compute
from nanochat.run_logger import RunLogger, read_log

ROOT = Path(__file__).parent.parent
MASTER = Compute(torch.device("cpu"), torch.float32)


@dataclass(frozen=True)
class Config:
    run: str = "dummy"
    model_tag: str | None = "d2"
    matrix_lr: float = 0.02


@pytest.fixture(autouse=True)
def base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    for name in ("WANDB_MODE", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def test_every_call_is_a_line_after_a_header_with_the_config(base):
    logger = RunLogger("sft", Config(), MASTER, total_steps=3)
    for step in range(3):
        logger.log(step, {"train/loss": torch.tensor(2.0 - step), "train/tokens": np.int64(7), "reward/letters": {"A": 0.5}})
    logger.close()
    header, *lines = read_log(base / "runs" / "sft_d2.jsonl")
    assert header["config"]["matrix_lr"] == 0.02 and header["total_steps"] == 3
    assert [line["step"] for line in lines] == [0, 1, 2]
    assert [line["train/loss"] for line in lines] == [2.0, 1.0, 0.0] and lines[0]["train/tokens"] == 7
    assert lines[0]["reward/letters"] == {"A": 0.5}


def test_what_is_not_finite_becomes_null_and_is_named(base):
    logger = RunLogger("sft", Config(), MASTER)
    logger.log(0, {"train/loss": float("nan"), "train/grad_norm": float("inf"), "good": 1.0, "many": [1.0, float("nan")]})
    logger.close()
    line = (base / "runs" / "sft_d2.jsonl").read_text().splitlines()[1]
    assert "NaN" not in line and "Infinity" not in line
    record = json.loads(line)
    assert record["non_finite"] == ["train/loss", "train/grad_norm", "many"]
    assert record["train/loss"] is None and record["good"] == 1.0


def test_resuming_drops_what_came_after_the_checkpoint_even_half_a_line(base):
    logger = RunLogger("base", Config(), MASTER)
    for step in range(10):
        logger.log(step, {"train/loss": float(step)})
    logger.close()
    path = base / "runs" / "base_d2.jsonl"
    with open(path, "a") as file:
        file.write('{"step": 10, "train/lo')
    logger = RunLogger("base", Config(), MASTER, resume_step=4)
    logger.log(5, {"train/loss": 0.5})
    logger.close()
    records = read_log(path)
    assert [(record["step"], record["train/loss"]) for record in records if "step" in record] == [(i, float(i)) for i in range(5)] + [(5, 0.5)]
    assert [record.get("resumed_at") for record in records if "config" in record] == [None, 4]


def test_a_new_run_starts_a_new_file_and_keeps_one_old_one(base):
    for loss in (1.0, 2.0):
        logger = RunLogger("base", Config(), MASTER)
        logger.log(0, {"train/loss": loss})
        logger.close()
    assert [record["train/loss"] for record in read_log(base / "runs" / "base_d2.jsonl")[1:]] == [2.0]
    assert [record["train/loss"] for record in read_log(base / "runs" / "base_d2.jsonl.1")[1:]] == [1.0]


def test_texts_tables_and_pictures_are_lines_too(base):
    logger = RunLogger("rl", Config(), MASTER)
    logger.log_text(1, "samples", "two\nlines")
    logger.log_text(2, "rollouts", [{"prompt": "1+1", "reward": 1.0}])
    logger.log_image(3, "attention", base / "map.png")
    logger.close()
    _, text, table, image = read_log(base / "runs" / "rl_d2.jsonl")
    assert text["text"] == {"samples": "two\nlines"} and table["text"]["rollouts"][0]["prompt"] == "1+1"
    assert image["image"]["attention"].endswith("map.png")


def test_what_a_model_wrote_cannot_steer_the_terminal(base, capsys):
    logger = RunLogger("base", Config(), MASTER)
    logger.log_text(0, "samples", "a\x1b[2Jb\x00\x9bc\n\td")
    logger.close()
    assert capsys.readouterr().out.endswith("a\u241b[2Jb\u2400\ufffdc\n\td\n")
    assert read_log(base / "runs" / "base_d2.jsonl")[1]["text"]["samples"] == "a\x1b[2Jb\x00\x9bc\n\td"


def test_other_ranks_write_and_print_nothing(base, capsys):
    logger = RunLogger("rl", Config(), Compute(torch.device("cpu"), torch.float32, rank=1, world_size=2))
    logger.log(0, {"train/loss": 1.0})
    logger.log_text(0, "samples", "text")
    logger.close()
    assert not (base / "runs").exists() and capsys.readouterr().out == ""


def test_a_base_model_without_a_tag_is_named_by_its_depth(base):
    @dataclass(frozen=True)
    class BaseConfig:
        depth: int = 7
        model_tag: str | None = None
    RunLogger("base", BaseConfig(), MASTER).close()
    assert (base / "runs" / "base_d7.jsonl").exists()


def test_plain_lines_are_few_and_never_leave_out_an_evaluation(base, capsys, monkeypatch):
    monkeypatch.setattr(run_logger, "PLAIN_SECONDS", 1e9)
    logger = RunLogger("sft", Config(), MASTER, total_steps=100)
    for step in range(100):
        logger.log(step, {"train/loss": 1.5, "train/tok_per_sec": 123456.7, **{f"train/m{i}": 1.0 for i in range(9)}})
        if step == 50:
            logger.log(step, {"val/bpb": 1.25})
    logger.close()
    first, evaluation, last = capsys.readouterr().out.splitlines()
    assert first.startswith("sft step 0/100 (0 %) | loss 1.5 | tok_per_sec 123,457") and "+4 in the file" in first
    assert evaluation.startswith("sft step 50/100 (50 %) | val/bpb 1.25 | 0:00 left")
    assert last.startswith("sft step 99/100")


def test_a_terminal_gets_a_bar(base, capsys, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    logger = RunLogger("sft", Config(), MASTER, total_steps=3)
    assert isinstance(logger.console, run_logger.Bar)
    for step in range(3):
        logger.log(step, {"train/loss": 1.5})
    logger.log(3, {"val/bpb": 1.25})
    logger.close()
    assert "val/bpb 1.25" in capsys.readouterr().out


FOUR_RUNS = """
import os
from dataclasses import dataclass
import torch
from nanochat.compute import Compute
from nanochat.run_logger import RunLogger
@dataclass(frozen=True)
class Config:
    run: str = "mine"
    model_tag: str = "d2"
for mode in ("nonsense", None, "offline", "disabled"):
    os.environ.pop("WANDB_MODE", None)
    os.environ |= {"WANDB_MODE": mode} if mode else {}
    print("mode", mode)
    logger = RunLogger("sft", Config(), Compute(torch.device("cpu"), torch.float32))
    print("project", logger.wandb and logger.wandb.project)
    logger.log(0, {"train/loss": 1.0})
    logger.log_text(0, "samples", [{"prompt": "1+1", "reward": 1.0}])
    logger.close()
"""


def test_wandb_without_a_key_or_by_wish_runs_offline_and_never_stops_a_run(base):
    env = {key: value for key, value in os.environ.items() if not key.startswith("WANDB_")}
    run = subprocess.run([sys.executable, "-c", FOUR_RUNS], cwd=ROOT, env={**env, "HOME": str(base / "home"), "OMP_NUM_THREADS": "1", "WANDB_PROJECT": "of-mine"},
                         capture_output=True, text=True, timeout=120, stdin=subprocess.DEVNULL)
    assert run.returncode == 0, run.stderr
    nonsense, no_key, offline, disabled = run.stdout.split("mode ")[1:]
    assert "goes on without W&B" in nonsense
    assert no_key.count("W&B:") == 1 and "there is no API key" in no_key and "recorded offline" in no_key
    assert "W&B" not in offline + disabled
    assert "project of-mine" in no_key and "project of-mine" in offline
    assert len(list((base / "wandb").glob("offline-run-*"))) == 2
