"""Whole jobs with the real stages and tiny knobs, one after the other on one loopback Hub, each losing its machine once: pretraining, the pipeline from its
results, RL from the pipeline's. 20 minutes on two busy cores, so marked slow.
"""
import json
import re
import signal
import time

import pytest

from nanochat.cloud import run_files
from nanochat.common import sha256_of
from nanochat.run_logger import read_log
from tests.fakes.hub_jobs import ENDED, ROOT, JobsHub, can_mount, launched, read_until

BASE = ("HF_BASE_ITERATIONS=150", "HF_SYNC_MINUTES=1", "BASE_ARGS=--depth=2 --n-embd=64 --save-every=10 --eval-tokens=4096 --sample-every=-1 --compile=False")
EVAL = ("HF_RL_EVAL_EXAMPLES=16", "EVAL_ARGS=--max-problems=200 --control-problems=20")
RL = ("RL_STEPS=2", "HF_RL_EXAMPLES_PER_STEP=8", "HF_RL_NUM_SAMPLES=4")
PIPE = (*BASE, *EVAL, *RL, "HF_MID_ITERATIONS=4", "SFT_STEPS=4", "MID_ARGS=--eval-tokens=4096 --compile=False", "SFT_ARGS=--eval-metrics-every=-1 --compile=False",
        "RL_ARGS=--preflight=-1")


def order(script, name, *flags, variables):
    return f"--script={script}", "--flavor=cpu-basic", "--timeout=10h", f"--name={name}", *flags, "--env", *variables


def loses_its_machine(hub, flags, line, first=lambda job: None):
    """Start a job; when it has printed the line and `first(job)` is through, all of its processes and its disk are gone -> its output."""
    with launched(hub, ROOT, *flags, patience=3000) as process:
        output = read_until(process, line)
        job = hub.newest
        first(job)
        job.kill()
        output += process.stdout.read()
        assert process.wait(timeout=600) == 1 and "ERROR (killed)" in output, output
    assert not job.folder.exists() and not job.send(0)
    return output


def completes(hub, flags):
    with launched(hub, ROOT, *flags, patience=3000) as process:
        output = process.stdout.read()
        assert process.wait(timeout=600) == 0 and "COMPLETED" in output, output
    return output


def until(condition, seconds=900):
    ends = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < ends, f"not within {seconds} s"
        time.sleep(0.02)


def skipped(output):
    return re.findall(r"^== (.+): done before, skipped$", output, re.MULTILINE)


def checkpoints(folder):
    return {room: sorted(path.name for path in (folder / f"{room}_checkpoints/d4").glob("*")) for room in ("base", "mid", "chatsft", "chatrl")}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A Hub, and on it what a pretraining job left that lost its machine in the middle of its steps. `hub.first` and `hub.second` are the two jobs' outputs."""
    folder = tmp_path_factory.mktemp("whole")
    with JobsHub(folder / "repos") as hub:
        hub.home, hub.kept = folder / "home", folder / "repos/me/whole"

        def until_a_step_is_kept(job):
            """Training stands still from a moment behind its first checkpoint; the upload that happens every minute finds that one."""
            until(lambda: any((job.folder / "home/.cache/nanochat/base_checkpoints/d4").glob("meta_*.json")))
            assert job.send(signal.SIGSTOP, "scripts.base_train")
            uploads = len(hub.commits)
            until(lambda: len(hub.commits) > uploads and any((hub.kept / "base_checkpoints/d4").glob("meta_*.json")))
        flags = order("bootstrap_and_train_base.sh", "whole", variables=BASE)
        hub.first = loses_its_machine(hub, flags, "== train-base:", until_a_step_is_kept)
        hub.cut_at = int(re.search(r"meta_(\d+)", " ".join(checkpoints(hub.kept)["base"]))[1])
        hub.stamps = sorted(path.name for path in (hub.kept / "stages").iterdir())
        hub.second = completes(hub, flags)
        yield hub


@pytest.mark.slow
def test_pretraining_that_loses_its_machine_between_two_steps_goes_on_from_what_is_kept(pretrained):
    hub = pretrained
    assert hub.stamps == ["tokenizer.done", "tokenizer.started", "train-base.started"] and 0 < hub.cut_at < 150
    assert "within a stage" in [summary for repo, summary in hub.commits if repo == "me/whole"]
    assert skipped(hub.second) == ["tokenizer"] and f"resuming base d4 at step {hub.cut_at}\n" in hub.second and "== base-loss:" in hub.second
    assert "train-mid" not in hub.second and not (hub.kept / "mid_checkpoints").exists()
    assert checkpoints(hub.kept)["base"] == ["meta_000150.json", "model_000150.pt"]            # the optimizer's part goes when the stage is done
    steps = [record["step"] for record in read_log(hub.kept / "runs/base_d4.jsonl") if "train/loss" in record]
    assert steps == sorted(set(steps)) and steps[0] == 0 and steps[-1] == 149                  # one curve, of both machines
    assert json.loads((hub.kept / "report/base_loss.json").read_text())["data"] and (hub.kept / "run_name").read_text() == "hf-jobs-base\n"


@pytest.fixture(scope="module")
def whole(pretrained):
    """The same Hub with the whole pipeline's results. `hub.third` and `hub.fourth` are the outputs of the job that loses its machine and of the one after it."""
    hub, flags = pretrained, order("run_full_pipeline.sh", "whole", variables=PIPE)
    hub.third = loses_its_machine(hub, flags, "== train-mid:")
    hub.fourth = completes(hub, flags)
    return hub


@pytest.mark.slow
def test_the_full_pipeline_survives_the_loss_of_its_machine(whole):
    """The real run_aquarat_small.sh with tiny knobs, from what a pretraining job of that name left; it is killed with its disk in mid training."""
    kept, base = whole.kept, whole.newest.folder / "home/.cache/nanochat"
    assert skipped(whole.third) == skipped(whole.fourth) == ["tokenizer", "train-base", "base-loss"] and "== data: python" in whole.fourth
    assert checkpoints(kept) == {room: [f"meta_{step:06d}.json", f"model_{step:06d}.pt"] for room, step in (("base", 150), ("mid", 4), ("chatsft", 4), ("chatrl", 2))}
    assert "rl" in (kept / "report/report.md").read_text(encoding="utf-8") and (kept / "report/report.html").stat().st_size > 10_000
    assert len(list((kept / "eval").glob("*_AQUA_test.json"))) == 4

    # all that its disk holds is in the store, or is data, or is said not to be kept
    assert run_files.unknown(base) == []
    made, _ = run_files.files_of(base, (*run_files.RECORDS, *run_files.LOOSE))
    stages = {name.split("/")[1].split(".")[0] for name in made if name.startswith("stages/")}
    assert stages == set(re.findall(r"^== ([\w-]+): \d+ s$", whole.fourth, re.MULTILINE)) | set(skipped(whole.fourth)) and "data" in stages
    assert {name for name in made if not (kept / name).is_file()} == {"stages/data.started", "stages/data.done"}
    assert {"reasoning", "contamination"} <= {name.split("/")[0] for name in made}
    assert all((kept / name).read_bytes() == path.read_bytes() for name, path in made.items() if "stages/data" not in name)


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason="a mounted bucket needs bubblewrap and namespaces (Debian: bubblewrap)")
def test_rl_starts_from_the_pipelines_result_and_its_own_in_a_mounted_bucket_outlive_its_disk(whole):
    hub, kept = whole, whole.root.parent / "buckets/me/results/rl"
    variables = ("SFT_REPO=me/whole", "STOP_AFTER=compare", *EVAL, *RL, "RL_ARGS=--preflight=-1 --device-batch-size=16")
    flags = order("bootstrap_and_train_rl.sh", "rl", "--bucket=me/results", variables=variables)
    first = loses_its_machine(hub, flags, "== eval-rl:")
    assert "chatsft_checkpoints/d4: sft d4 at step 4, fetched from me/whole" in first and not any(repo == "me/rl" for repo, _ in hub.commits)
    trained = (kept / "chatrl_checkpoints/d4/model_000002.pt").read_bytes()
    second = completes(hub, flags)
    assert "files fetched from /store/rl; done before: eval-sft, train-rl\n" in second and skipped(second) == ["train-rl", "eval-sft"] and "from me/whole" not in second
    assert (kept / "chatrl_checkpoints/d4/model_000002.pt").read_bytes() == trained and (kept / "eval/rl_d4_AQUA_test.json").is_file()
    assert (kept / "chatsft_checkpoints/d4/model_000004.pt").read_bytes() == (hub.kept / "chatsft_checkpoints/d4/model_000004.pt").read_bytes()
    listed = json.loads((kept / "store.json").read_text())
    assert listed == {path.relative_to(kept).as_posix(): sha256_of(path) for path in kept.rglob("*") if path.is_file() and path.name != "store.json"}
    assert all(job.stage in ENDED for job in hub.jobs.values())
