"""All stages in sequence on two layers; killed in the middle and resumed they end at the same bits; two ranks are one process."""
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from nanochat.checkpoint_manager import write_tensors
from nanochat.run_logger import RunLogger
from nanochat.training import GO_ON_LATER
from tests import pipeline

ROOT = Path(__file__).parents[1]


def checkpoint(folder, stage, step=6, tag="d2"):
    return torch.load(folder / pipeline.FOLDERS[stage] / tag / f"model_{step:06d}.pt", weights_only=True)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logged(folder, stage, key, tag="d2"):
    """{step: value} of a metric in the run's JSONL."""
    records = [json.loads(line) for line in (folder / "runs" / f"{stage}_{tag}.jsonl").read_text().splitlines()]
    return {record["step"]: record[key] for record in records if key in record}


def start(folder, stage, *flags, ranks=1):
    launcher = [sys.executable, "-m"] if ranks == 1 else [
        sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "-m"]
    environment = {**os.environ, "NANOCHAT_BASE_DIR": str(folder), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen([*launcher, "tests.pipeline", stage, *flags], cwd=ROOT, env=environment, start_new_session=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def finish(process):
    output, _ = process.communicate(timeout=900)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def walked(prepared, tmp_path_factory):
    """A base directory in which every stage ran to its end without a break."""
    folder = tmp_path_factory.mktemp("walked") / "base"
    shutil.copytree(prepared, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        for stage in pipeline.STAGES:
            pipeline.run_stage(stage)
    return folder


def test_every_stage_runs_and_leaves_checkpoint_metrics_and_report_section(walked):
    for stage in pipeline.STAGES:
        assert checkpoint(walked, stage)
        assert (walked / "runs" / f"{stage}_d2.jsonl").is_file()
        assert any(stage in path.name for path in (walked / "report").iterdir())
    losses = logged(walked, "base", "train/loss")
    assert list(losses) == list(range(6)) and losses[5] < losses[0]
    assert 0 <= logged(walked, "rl", "rl/acc")[0] <= 1
    for stage in ("base", "mid", "sft"):  # what the loader did with the data is counted and said
        epochs = logged(walked, stage, "data/epoch")
        assert epochs[0] == 0 <= epochs[6] and set(logged(walked, stage, "data/truncated")) == {0, 3, 6}


@pytest.mark.parametrize("stage", pipeline.STAGES)
def test_a_run_stopped_halfway_and_resumed_ends_at_the_same_bits(walked, tmp_path, monkeypatch, stage):
    folder = tmp_path / "base"
    shutil.copytree(walked, folder)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    for name in ("meta_000006.json", "model_000006.pt", "optim_000006_rank0.pt"):  # as if the kill had come after step 4
        (folder / pipeline.FOLDERS[stage] / "d2" / name).unlink()
    pipeline.run_stage(stage, resume=True)
    assert equal(checkpoint(folder, stage), checkpoint(walked, stage))
    key = "train/loss"
    assert logged(folder, stage, key) == logged(walked, stage, key)


@pytest.mark.parametrize("stage, name", [("base", "SIGTERM"), ("mid", "SIGUSR1"), ("sft", "SIGTERM"), ("rl", "SIGUSR1"), ("grpo", "SIGTERM")])
def test_a_run_asked_to_stop_saves_at_the_next_step_and_resumed_ends_at_the_same_bits(walked, tmp_path, monkeypatch, capsys, stage, name):
    folder, whole, (room, tag) = tmp_path / "base", walked, ("rl", "g2") if stage == "grpo" else (stage, "d2")
    shutil.copytree(walked, folder)
    if stage == "grpo":
        whole = tmp_path / "whole"
        shutil.copytree(walked, whole)
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(whole))
        pipeline.run_stage("grpo")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    handlers, log = [signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)], RunLogger.log

    def log_and_ask(self, step, metrics):
        log(self, step, metrics)
        if step == 4 and ("train/loss" in metrics or "num_tokens" in metrics):
            os.kill(os.getpid(), getattr(signal, name))

    monkeypatch.setattr(RunLogger, "log", log_and_ask)
    with pytest.raises(SystemExit) as stopped:
        pipeline.run_stage(stage, overwrite=True)
    assert stopped.value.code == GO_ON_LATER == 75
    assert f"stopped before step 5 of 6 as asked by {name}, and saved" in capsys.readouterr().out
    assert json.loads((folder / pipeline.FOLDERS[room] / tag / "meta_000005.json").read_text())["finished"] is False
    assert handlers == [signal.getsignal(signal.SIGUSR1), signal.getsignal(signal.SIGTERM)]
    pipeline.run_stage(stage, resume=True)
    assert equal(checkpoint(folder, room, tag=tag), checkpoint(whole, room, tag=tag))
    assert logged(folder, room, "train/loss", tag) == logged(whole, room, "train/loss", tag)


def test_two_ranks_stop_together_when_one_of_them_is_asked(walked, tmp_path):
    """The rank that hears the signal is not the one that saves."""
    folder = tmp_path / "base"
    shutil.copytree(walked, folder)
    log, place = folder / "runs" / "sft_d2.jsonl", folder / pipeline.FOLDERS["sft"] / "d2"
    log.unlink()
    process = start(folder, "sft", "overwrite=True", "num_iterations=100_000", "eval_every=-1", "eval_metrics_every=-1", "save_every=-1", ranks=2)
    while process.poll() is None and not (log.exists() and "train/loss" in log.read_text()):
        time.sleep(0.05)
    ranks = [child for child in psutil.Process(process.pid).children(recursive=True) if child.environ().get("RANK") == "1"]
    os.kill(ranks[0].pid, signal.SIGUSR1)
    output, _ = process.communicate(timeout=300)
    assert process.returncode != 0 and "of 100000 as asked by a signal to another rank, and saved" in output
    meta, = place.glob("meta_*.json")
    saved = json.loads(meta.read_text())
    assert saved["world_size"] == 2 and set(saved["files"]) == {path.name for path in place.glob("*.pt")} and len(saved["files"]) == 3


def test_a_run_never_replaces_the_checkpoint_it_starts_from(walked, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(walked))
    for stage in ("sft", "rl"):
        with pytest.raises(ValueError, match=f"starts from the {stage} checkpoint d2 and would replace it: give --output-tag"):
            pipeline.run_stage(stage, source=stage, overwrite=True)
        assert checkpoint(walked, stage)


def test_two_ranks_are_one_process(walked, tmp_path):
    """The same tokens, the same loss curve to 1e-4, the same weights to 1e-4 after the last step."""
    folder = tmp_path / "base"
    shutil.copytree(walked, folder)
    for stage in pipeline.STAGES:
        shutil.rmtree(folder / pipeline.FOLDERS[stage] / "d2")
        finish(start(folder, stage, ranks=2))
        for key, tolerance in (("train/loss", 1e-4), ("train/tokens", 0), ("num_tokens", 0), ("rl/acc", 0)):
            assert logged(folder, stage, key) == pytest.approx(logged(walked, stage, key), abs=tolerance), (stage, key)
        mine, theirs = checkpoint(folder, stage), checkpoint(walked, stage)
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-3, msg=lambda text: f"{stage} {name}: {text}")
        shutil.rmtree(folder / pipeline.FOLDERS[stage] / "d2")  # the next stage starts from the same parent as in one process
        shutil.copytree(walked / pipeline.FOLDERS[stage] / "d2", folder / pipeline.FOLDERS[stage] / "d2")


def test_the_number_of_ranks_may_change_in_the_middle(walked, tmp_path):
    """One process up to step 4, then two; and two up to step 4, then one: both end where one process ends."""
    folder = tmp_path / "base"
    shutil.copytree(walked, folder)
    tag = folder / pipeline.FOLDERS["mid"] / "d2"

    def forget_the_end():
        for path in tag.glob("*_000006*"):
            path.unlink()

    for ranks in (2, 1):
        forget_the_end()
        output = finish(start(folder, "mid", "--resume", ranks=ranks))
        assert f"at step 4, saved by {3 - ranks} ranks, on {ranks}" in output
        assert logged(folder, "mid", "train/loss") == pytest.approx(logged(walked, "mid", "train/loss"), abs=1e-4)
        mine, theirs = checkpoint(folder, "mid"), checkpoint(walked, "mid")
        for name in theirs:
            torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-3)
        if ranks == 2:
            shutil.rmtree(tag)
            finish(start(folder, "mid", ranks=2))


def test_one_grpo_step_on_two_ranks_is_that_step_in_one_process(walked, tmp_path):
    """The same rollouts by their seeds, the same minibatches, updates and weights to 1e-6; and a run whose ranks often have no signal of
    their own ends: all reach the same collectives."""
    folder, alone = tmp_path / "two", tmp_path / "one"
    for place, ranks in ((folder, 2), (alone, 1)):
        shutil.copytree(walked, place)
        finish(start(place, "grpo", "num_steps=1", ranks=ranks))
    for key in ("num_tokens", "rl/acc", "train/rollouts", "train/updates", "rl/problems", "curriculum/level", "completions/max_length"):
        assert logged(folder, "rl", key, "g2") == logged(alone, "rl", key, "g2"), key
    assert logged(alone, "rl", "train/updates", "g2")[0] >= 2
    mine, theirs = (checkpoint(place, "rl", 1, "g2") for place in (folder, alone))
    start_of = checkpoint(walked, "sft")
    assert any(not torch.equal(theirs[name], start_of[name]) for name in theirs)
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=1e-6, msg=lambda text: f"{name}: {text}")
    finish(start(folder, "grpo", "overwrite=True", "examples_per_step=2", "dynamic_sampling=False", ranks=2))
    rollouts = logged(folder, "rl", "train/rollouts", "g2")
    assert set(logged(folder, "rl", "rl/groups", "g2").values()) == {2} and (6 in rollouts.values() or len(rollouts) < 6)  # one group taught, or none


PIPELINE = """
set -euo pipefail
source scripts/bootstrap.sh
source scripts/pipeline.sh
mkdir -p "$NANOCHAT_BASE_DIR/stages"
train() { if [ "$1" = "$DIES" ]; then return 137; fi; python -m tests.pipeline "$@"; }  # it dies before it has done anything
stage train-mid train mid seed=$MID_SEED
stage train-sft train sft num_iterations=$SFT_STEPS
"""


def test_a_stage_of_the_pipeline_that_died_before_it_cleared_the_old_run_starts_over_when_it_is_run_again(walked, tmp_path, monkeypatch):
    """Where the stage before it was trained anew, which its own flags do not show; and where its own command changed."""
    folder, alone = tmp_path / "base", tmp_path / "alone"

    def run(**variables):
        environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "NANOCHAT_BASE_DIR": str(folder), "OMP_NUM_THREADS": "1",
                       "HF_HUB_OFFLINE": "1", "DIES": "", "MID_SEED": "7", "SFT_STEPS": "6", **variables}
        done = subprocess.run(["bash", "-c", PIPELINE], cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                              timeout=900)
        assert (done.returncode == 0) == (not environment["DIES"]), done.stdout
        return done.stdout

    for place in (folder, alone):
        shutil.copytree(walked, place)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(alone))
    pipeline.run_stage("mid", seed=7, overwrite=True)
    with pytest.raises(ValueError, match="step 6 was trained from mid d2 of step 6 with SHA-256 .* now there is mid d2 of step 6"):
        pipeline.run_stage("sft", resume=True)
    pipeline.run_stage("sft", overwrite=True)
    assert not equal(checkpoint(alone, "sft"), checkpoint(walked, "sft"))

    assert "stage train-sft failed" in run(DIES="sft")
    assert equal(checkpoint(folder, "mid"), checkpoint(alone, "mid")) and equal(checkpoint(folder, "sft"), checkpoint(walked, "sft"))
    output = run()
    assert "train-mid: done before, skipped" in output and "starting sft d2 over: step 6 was trained from mid d2 of step 6" in output
    assert equal(checkpoint(folder, "sft"), checkpoint(alone, "sft"))

    assert "stage train-sft failed" in run(DIES="sft", SFT_STEPS="2")
    assert "starting sft d2 over: step 6 was trained with num_iterations=6, now asked for num_iterations=2" in run(SFT_STEPS="2")
    place = folder / pipeline.FOLDERS["sft"] / "d2"
    assert sorted(path.name for path in place.iterdir()) == ["meta_000002.json", "model_000002.pt", "optim_000002_rank0.pt"]
    assert "skipped" in run(SFT_STEPS="2").split("train-sft")[-1]


def test_two_ranks_start_over_together_from_another_parent_of_the_same_step(walked, tmp_path):
    folder = tmp_path / "base"
    shutil.copytree(walked, folder)
    place, parent = (folder / pipeline.FOLDERS[stage] / "d2" for stage in ("sft", "mid"))
    metas = [json.loads((one / "meta_000006.json").read_text()) for one in (place, parent)]
    assert metas[0]["parent"] == {"stage": "mid", "model_tag": "d2", "step": 6, "model_sha256": metas[1]["files"]["model_000006.pt"]}
    digest = write_tensors(parent / "model_000006.pt", {name: 1.01 * weight for name, weight in checkpoint(walked, "mid").items()})
    (parent / "meta_000006.json").write_text(json.dumps({**metas[1], "files": {"model_000006.pt": digest}}))
    output = finish(start(folder, "sft", "--resume", "--overwrite", ranks=2))
    assert "starting sft d2 over: step 6 was trained from mid d2 of step 6" in output and "resuming" not in output
    assert json.loads((place / "meta_000006.json").read_text())["parent"] == {**metas[0]["parent"], "model_sha256": digest}
    assert list(logged(folder, "sft", "train/loss")) == list(range(6))


@pytest.mark.slow
def test_kill_9_at_random_moments_never_changes_the_end(walked, tmp_path):
    """5 kills in base, mid and SFT, 10 in chat_rl and 10 in chat_grpo; each time the stage is started again with --resume until it ends.
    The moment is a random line of the run's log and a random part of a second behind it, so that it lies within the run however busy the
    machine is: between sampling and the update, between two inner epochs, during a save."""
    rng = random.Random(0)
    folder = tmp_path / "base"
    shutil.copytree(walked, folder)
    for stage, kills in (("base", 5), ("mid", 5), ("sft", 5), ("rl", 10), ("grpo", 10)):
        tag, room = ("g2", "rl") if stage == "grpo" else ("d2", stage)
        place, log = folder / pipeline.FOLDERS[room] / tag, folder / "runs" / f"{room}_{tag}.jsonl"
        shutil.rmtree(place, ignore_errors=True)
        finish(start(folder, stage))
        whole, lines = checkpoint(folder, room, tag=tag), len(log.read_text().splitlines())
        assert stage == "grpo" or equal(whole, checkpoint(walked, stage))
        for _ in range(kills):
            shutil.rmtree(place)
            log.unlink()
            process, line = start(folder, stage, "--resume"), rng.randrange(lines)
            while process.poll() is None and (not log.exists() or len(log.read_text().splitlines()) <= line):
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.5))
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
            finish(start(folder, stage, "--resume"))
            assert equal(checkpoint(folder, room, tag=tag), whole), stage
