"""The job scripts' knobs, and the store where results outlive a job's disk. Names in brackets are faults of the seed's scripts that must not exist here;
test_hf_jobs_kept.py asks what is in it, test_hf_jobs_launch.py and test_hf_jobs_whole.py run jobs.
"""
import importlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from hf_jobs import store
from nanochat.checkpoint_manager import newest_whole, save_checkpoint, stage_dir
from nanochat.compute import compute_init
from nanochat.configurator import parse
from nanochat.training import LoopState
from tests.checkpoints import Config, noisy_model, small_tokenizer
from tests.fakes.hub_jobs import Driver, JobsHub

ROOT = Path(__file__).parents[1]
SCRIPTS = ("run_full_pipeline.sh", "bootstrap_and_train_base.sh", "bootstrap_and_train_rl.sh")
# the seed's table of knobs and its defaults
SEED_KNOBS = {"HF_TRAIN_GPUS": "8", "HF_RL_GPUS": "1", "HF_BASE_DEPTH": "20", "HF_BASE_ITERATIONS": "400", "HF_MID_ITERATIONS": "400", "HF_SFT_TRAIN_EXAMPLES": "80000",
              "HF_SFT_VAL_EXAMPLES": "254", "HF_RL_EXAMPLES_PER_STEP": "32", "HF_RL_NUM_SAMPLES": "16", "HF_RL_MAX_NEW_TOKENS": "128", "HF_RL_TEMPERATURE": "0.7",
              "HF_RL_SAVE_EVERY": "60", "HF_RL_EVAL_EVERY": "60", "HF_RL_EVAL_EXAMPLES": "512", "HF_DATASET_SHARDS": "24", "HF_INSTALL_BASE_PACKAGES": "1"}


# ---------------------------------------------------------------------------------------------------------------------
# Knobs: bash alone

@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """The files that look at knobs, apart from this checkout's .env."""
    folder = tmp_path_factory.mktemp("bare")
    for name in (*(f"hf_jobs/{script}" for script in SCRIPTS), "hf_jobs/common.sh", "scripts/bootstrap.sh", "scripts/pipeline.sh"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)
    return folder


def bash(folder, *command, **variables):
    """-> (status, output and errors) in an environment that holds only these variables."""
    done = subprocess.run(["bash", *command], cwd=folder, env={"PATH": os.environ["PATH"], "HOME": "/nowhere", "HF_JOB_GPUS": "0", **variables}, stdin=subprocess.DEVNULL,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120)
    return done.returncode, done.stdout


def table():
    """The knobs of common.sh: {name: (default, least, most, where)}."""
    text = re.search(r"^KNOBS='\n(.*?)^'", (ROOT / "hf_jobs/common.sh").read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)[1]
    return {row.split("|")[0]: tuple(row.split("|")[1:5]) for row in text.splitlines()}


def test_the_table_has_every_knob_of_the_seed_with_its_default_and_the_readme_shows_it():
    knobs, readme = table(), (ROOT / "hf_jobs/README.md").read_text(encoding="utf-8")
    assert {name: knobs[name][0] for name in SEED_KNOBS} == SEED_KNOBS
    shown = re.findall(r"^\| `(HF_\w+)` \| (\S+) \| (GPUs)? ?\|", readme, re.MULTILINE)
    assert [(name, default, bool(where)) for name, default, where in shown] == [(name, default, where == "gpu") for name, (default, _, _, where) in knobs.items()]
    for name in ("RUN", "NPROC_PER_NODE", "RL_ARGS", "BASE_ARGS", "WORKDIR", "REPO_URL", "GIT_REF", "WANDB_API_KEY", "NANOCHAT_CACHE_ROOT", "WANDB_RUN"):
        assert f"`{name}`" in readme


def test_the_files_that_the_readme_names_are_there():
    """[J12] .env.example is called .env.example."""
    text = (ROOT / "hf_jobs/README.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`([\w.]+\.(?:sh|py|example))`", text))
    assert {".env.example", *SCRIPTS, "run_rl_job_example.sh"} <= named
    for name in named:
        assert (ROOT / "hf_jobs" / name).is_file() or (ROOT / name).is_file(), name
    for line in (ROOT / "hf_jobs/.env.example").read_text(encoding="utf-8").splitlines():
        assert not line or line.startswith("#") or re.fullmatch(r"[A-Z_]+=", line), line  # no placeholder that could be taken for a value


@pytest.mark.parametrize("script, variables, wrong", [
    ("run_full_pipeline.sh", {}, None),
    ("run_full_pipeline.sh", {"HF_JOB_GPUS": "8", "HF_TRAIN_GPUS": "8", "HF_RL_TEMPERATURE": "1.25", "HF_MID_ITERATIONS": "0010"}, None),
    ("run_full_pipeline.sh", {"HF_JOB_GPUS": "1"}, None),                                             # the default of 8 means no more than 8
    ("run_full_pipeline.sh", {"HF_JOB_GPUS": "1", "HF_TRAIN_GPUS": "8"}, "there are 1 GPUs"),         # [J9]
    ("run_full_pipeline.sh", {"HF_JOB_GPUS": "4", "HF_RL_GPUS": "3"}, "try 33"),
    ("run_full_pipeline.sh", {"HF_BASE_DEPTH": "20"}, "is for GPUs"),
    ("run_full_pipeline.sh", {"PRESET": "cpu", "HF_JOB_GPUS": "8", "HF_BASE_DEPTH": "20"}, "is for GPUs"),
    ("run_full_pipeline.sh", {"PRESET": "gpu"}, "there is no GPU here"),
    ("run_full_pipeline.sh", {"HF_BASE_ITERATIONS": "many"}, "is not a whole number"),
    ("run_full_pipeline.sh", {"HF_BASE_ITERATIONS": "0"}, "too small"),
    ("run_full_pipeline.sh", {"HF_RL_NUM_SAMPLES": "1"}, "too small"),
    ("run_full_pipeline.sh", {"HF_RL_TEMPERATURE": "0"}, "too small"),
    ("run_full_pipeline.sh", {"HF_RL_TEMPERATURE": "10.5"}, "too large"),
    ("run_full_pipeline.sh", {"HF_RL_TEMPERATURE": "$(touch x)"}, "is not a number"),
    ("run_full_pipeline.sh", {"HF_RL_NUM_SAMPLES": "a[$(touch x)]"}, "is not a whole number"),
    ("run_full_pipeline.sh", {"HF_SFT_TRAIN_EXAMPLES": "97468", "HF_JOB_GPUS": "1"}, "from 1 to 97467"),
    ("run_full_pipeline.sh", {"HF_RL_NUM_SAMPLE": "8"}, "there is no knob HF_RL_NUM_SAMPLE"),
    ("run_full_pipeline.sh", {"WANDB_RUN": "two words"}, "is no run's name"),
    ("run_full_pipeline.sh", {"JOB_ID": "1"}, "its results need a place"),                            # [J10]
    ("run_full_pipeline.sh", {"JOB_ID": "1", "HF_OUTPUT_REPO": "me/x"}, "needs the secret HF_TOKEN"),
    ("run_full_pipeline.sh", {"JOB_ID": "1", "HF_OUTPUT_REPO": "me/x", "HF_TOKEN": "t"}, None),
    ("run_full_pipeline.sh", {"HF_OUTPUT_REPO": "me", "HF_TOKEN": "t"}, "is no Hub repository"),
    ("run_full_pipeline.sh", {"HF_OUTPUT_REPO": "me/x", "HF_OUTPUT_DIR": "/x", "HF_TOKEN": "t"}, "choose one"),
    ("run_full_pipeline.sh", {"HF_OUTPUT_DIR": "../x y"}, "must be an absolute path"),
    ("bootstrap_and_train_base.sh", {"HF_JOB_GPUS": "2", "NPROC_PER_NODE": "8"}, "NPROC_PER_NODE=8, but there are 2"),
    ("bootstrap_and_train_base.sh", {"HF_JOB_GPUS": "2", "NPROC_PER_NODE": "2"}, None),
    ("bootstrap_and_train_rl.sh", {"HF_JOB_GPUS": "1"}, "SFT_REPO is not set"),                       # [J8]
    ("bootstrap_and_train_rl.sh", {"HF_JOB_GPUS": "4", "SFT_REPO": "me/x"}, None)])
def test_a_wrong_knob_is_refused_before_anything_is_installed(bare, script, variables, wrong):
    status, output = bash(bare, f"hf_jobs/{script}", "--check", **variables)
    assert (status, wrong is None or wrong in output) == (2 if wrong else 0, True), output
    assert not (bare / "x").exists()


def test_all_wrong_knobs_are_told_at_once(bare):
    status, output = bash(bare, "hf_jobs/run_full_pipeline.sh", HF_BASE_ITERATIONS="x", HF_RL_EVAL_EVERY="-1", HF_SYNC_MINUTES="2.5")
    assert status == 2 and output.count("ERROR:") == 3


def test_every_flag_that_a_knob_becomes_is_one_of_its_script(bare):
    """[J7] and no bare -- in front of them."""
    values = {name: default for name, (default, *_) in table().items()}
    lines = "\n".join((ROOT / "hf_jobs" / name).read_text(encoding="utf-8") for name in SCRIPTS)
    for arguments, module in (("BASE_ARGS", "base_train"), ("MID_ARGS", "mid_train"), ("SFT_ARGS", "chat_sft"), ("RL_ARGS", "chat_rl")):
        value = re.search(rf'{arguments}="([^"]*)"', lines)[1]
        status, output = bash(bare, "-c", f'source hf_jobs/common.sh; echo "{value}"', **values)
        assert status == 0 and output.strip() and " -- " not in output, output
        parse(importlib.import_module(f"scripts.{module}").Config, output.split())
    assert not re.search(r"-m scripts\.\w+ +-- ", lines)


def test_missing_system_packages_are_installed_and_nothing_else(bare, tmp_path):
    """apt-get is asked for what is not there; not at all where nothing is missing or it is forbidden. [J6] nothing is hidden by `|| true`."""
    stand_in = tmp_path / "bin"
    stand_in.mkdir()
    for tool in ("bash", "curl", "cc", "grep", "sed"):
        (stand_in / tool).symlink_to(shutil.which(tool) or "/bin/true")
    (stand_in / "apt-get").write_text(f"#!/bin/bash\necho \"$@\" >> {tmp_path}/asked\nexit ${{APT:-0}}\n")
    (stand_in / "apt-get").chmod(0o755)
    asked = tmp_path / "asked"

    def install(**variables):
        asked.write_text("")
        return *bash(bare, "-c", "source hf_jobs/common.sh; install_system_packages", **{"PATH": str(stand_in), "HF_INSTALL_BASE_PACKAGES": "1", **variables}), asked.read_text()
    status, _, calls = install()
    assert status == 0 and re.search(r"install .* git pkg-config ", calls) and "curl" not in calls and "build-essential" not in calls
    status, output, calls = install(HF_INSTALL_BASE_PACKAGES="0")
    assert status == 0 and "not installed: git pkg-config" in output and not calls
    status, output, _ = install(APT="100")
    assert status == 1 and "stage packages failed" in output
    for tool in ("git", "pkg-config"):
        (stand_in / tool).symlink_to("/bin/true")
    assert install()[::2] == (0, "")


def test_term_is_passed_on_and_the_job_ends_with_the_status_of_what_it_ran(bare):
    inner = 'trap "echo last words; exit 5" TERM; echo up; while :; do sleep 0.1; done'
    process = subprocess.Popen(["bash", "-c", f"set -euo pipefail; source hf_jobs/common.sh; run bash -c '{inner}'"], cwd=bare, text=True, stdin=subprocess.DEVNULL,
                               env={"PATH": os.environ["PATH"], "HOME": "/nowhere"}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert process.stdout.readline() == "up\n"
    process.terminate()
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 5 and "last words" in output and "ended with status 5; start the same job again" in output


@pytest.mark.parametrize("status", [0, 3])
def test_a_last_upload_that_fails_is_a_failure_and_hides_no_other(bare, tmp_path, status):
    (tmp_path / "store").write_text(f"#!/bin/bash\necho \"$@\" >> {tmp_path}/asked; exit 1\n")
    code, output = bash(bare, "-c", f"source hf_jobs/common.sh; STORE=(bash {tmp_path}/store) HF_SYNC_MINUTES=0; run bash -c 'exit {status}'", HF_OUTPUT_DIR="/kept")
    assert code == (status or 1) and "the last upload failed" in output and (tmp_path / "asked").read_text() == "--push --after=the-end\n"


def test_a_stage_runs_again_for_another_command_and_not_for_another_number_of_gpus(bare, tmp_path):
    def run(*command, **variables):
        words = " ".join(command)
        return bash(bare, "-c", f"source scripts/bootstrap.sh; source scripts/pipeline.sh; mkdir -p $NANOCHAT_BASE_DIR/stages; stage one {words}; stage two echo ran two; echo end",
                    NANOCHAT_BASE_DIR=str(tmp_path), **variables)
    assert "skipped" not in run("echo", "--nproc_per_node=8", "a")[1]
    assert run("echo", "--nproc_per_node=1", "a")[1].count("skipped") == 2
    assert "skipped" not in run("echo", "--nproc_per_node=1", "b")[1]                       # what comes after depends on it
    status, output = run("echo", "c", STOP_AFTER="one")
    assert status == 0 and "ran two" not in output and "end" not in output.splitlines()
    status, output = run("echo", "d", AFTER_STAGE="echo carried")
    assert output.count("carried one") == output.count("carried two") == 1
    status, output = run("echo", "e", AFTER_STAGE="false")
    assert status == 1 and "stage one is done, but what is run after it failed" in output
    assert "stage one failed" in run("false")[1]


def test_no_script_hides_a_failure_or_carries_a_secret():
    """[J5] [J6] [J11]"""
    for path in sorted((ROOT / "hf_jobs").glob("*.sh")):
        text = path.read_text(encoding="utf-8")
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
        assert path.name == "common.sh" or "set -euo pipefail" in text
        assert "pip install" not in text                                # the image's own packages stay as they are: uv makes an environment
        assert not re.search(r"(checkout|clone|run|torchrun|python\d?) [^\n]*\|\| true", text), path.name
        assert not re.search(r"-e \w*(KEY|TOKEN)|--env \w*(KEY|TOKEN)", text), path.name


# ---------------------------------------------------------------------------------------------------------------------
# The store

def lay_out(base, step, finished, stage="base"):
    """A base directory as a run has it at that step: two checkpoints, stamps, logs, and data that is not kept."""
    model, tokenizer = noisy_model(400, seed=step), small_tokenizer()
    tokenizer.save(base / "tokenizer")
    for number in (step - 1, step):
        save_checkpoint(stage, "tiny", LoopState(step=number), Config("tiny"), compute_init("cpu", "float32"), model, torch.optim.SGD(model.parameters(), lr=0.1),
                        tokenizer, keep_last=2, finished=finished and number == step)
    for name, text in {"stages/data.done": "1", "stages/data.started": "1", f"stages/train-{stage}.started": "2", "report/report.md": f"step {step}", "run_name": "r",
                       f"runs/{stage}_tiny.jsonl": "{}\n", "eval/x.json": "{}", "base_data/shard.parquet": "text", "runs/.x.partial": "", "wandb/key": "secret"}.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(text)
    if finished:
        (base / f"stages/train-{stage}.done").write_text("2")


def files_below(folder):
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file() and ".store" not in path.parts)


ALWAYS = ["eval/x.json", "report/report.md", "run_name", "runs/base_tiny.jsonl", "stages/train-base.started", "tokenizer/tokenizer.json"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with JobsHub(folder / "repos") as server, Driver(server, folder / "home") as run:
        server.run = run
        yield server


@pytest.mark.parametrize("kind", ["repo", "folder"])
def test_a_store_gives_back_what_a_fresh_disk_needs_to_go_on(hub, tmp_path, monkeypatch, kind):
    base, kept, fresh = tmp_path / "base", tmp_path / "kept", tmp_path / "fresh"
    where = f"--repo=me/{tmp_path.name}" if kind == "repo" else f"--folder={kept}"
    kept = hub.root / "me" / tmp_path.name if kind == "repo" else kept
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))

    def run(place, *flags):
        _, error, output = hub.run("hf_jobs.store", where, *flags, NANOCHAT_BASE_DIR=str(place))
        assert error is None, error
        return output
    assert "0 files fetched" in run(base, "--pull")                      # an empty store is no error, and it is made
    lay_out(base, 8, finished=False)
    run(base, "--push", "--after=half")
    cut_short = [f"base_checkpoints/tiny/{name}_000008{ending}" for name, ending in (("meta", ".json"), ("model", ".pt"), ("optim", "_rank0.pt"))]
    assert [name for name in files_below(kept) if name != store.MANIFEST] == sorted([*cut_short, *ALWAYS])
    run(fresh, "--pull")
    assert files_below(fresh) == sorted([*cut_short, *ALWAYS])
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(fresh))
    assert newest_whole(stage_dir("base", "tiny"), compute_init("cpu", "float32"))["step"] == 8   # with its optimizer: a stage that was cut short resumes
    assert "holds a run already" in run(fresh, "--pull")

    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    lay_out(base, 12, finished=True)
    run(base, "--push", "--after=train-base")
    done = [name.replace("000008", "000012") for name in cut_short[:2]] + ["stages/train-base.done"]
    assert [name for name in files_below(kept) if name != store.MANIFEST] == sorted([*done, *ALWAYS])   # the older one has gone, so have the optimizer's shards
    shutil.rmtree(fresh)
    assert "done before: train-base" in run(fresh, "--pull")
    for name in (*done, *ALWAYS):
        assert (fresh / name).read_bytes() == (base / name).read_bytes(), name
    (base / "stages/train-base.done").unlink()                           # the stage's command has changed: it is run anew
    run(base, "--push")
    assert "stages/train-base.done" not in files_below(kept)
    if kind == "repo":
        assert hub.private[f"me/{tmp_path.name}"] is True
    assert not (base / ".store/snapshot").exists() and not (fresh / ".store/arrived").exists()


def test_a_damaged_file_of_a_bucket_is_left_out(tmp_path, monkeypatch, capsys):
    base, kept, fresh = tmp_path / "base", tmp_path / "kept", tmp_path / "fresh"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    lay_out(base, 4, finished=True)
    store.main(store.Config(folder=str(kept), push=True))
    model = kept / "base_checkpoints/tiny/model_000004.pt"
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    manifest = json.loads((kept / store.MANIFEST).read_text())
    (tmp_path / "outside").write_text("x")
    (kept / store.MANIFEST).write_text(json.dumps({**manifest, "../outside": "0" * 64, "stages/../../outside": "0" * 64, "/etc/passwd": "0" * 64}))
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(fresh))
    store.main(store.Config(folder=str(kept), pull=True))
    assert "is not there with the SHA-256" in capsys.readouterr().out and "passwd" not in " ".join(files_below(tmp_path))
    assert files_below(fresh) == sorted(name for name in manifest if "model_" not in name and name != "stages/train-base.done")
    (kept / store.MANIFEST).write_text("[")
    with pytest.raises(ValueError, match="is damaged"):
        store.FolderStore(kept).fetch(fresh)


def test_results_are_kept_while_a_stage_runs_and_the_watching_ends_with_the_job(tmp_path, monkeypatch):
    base, kept = tmp_path / "base", tmp_path / "kept"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
    lay_out(base, 4, finished=False)
    parents = iter([1, 1, 1, 2])                                         # the parent lives for two looks, then it is another
    monkeypatch.setattr(store.os, "getppid", lambda: next(parents))
    store.watch(store.FolderStore(kept), 0.01)
    assert (kept / "base_checkpoints/tiny/optim_000004_rank0.pt").is_file()


def test_a_store_that_cannot_be_written_is_found_out_at_once(hub, tmp_path):
    for flags, wrong in ((("--repo=me/x", "--pull"), "401"), (("--repo=me", "--push"), "user/name"), (("--push",), "give one of them"), (("--repo=me/x",), "give one of --push")):
        _, error, _ = hub.run("hf_jobs.store", *flags, NANOCHAT_BASE_DIR=str(tmp_path), HF_TOKEN="hf_other")
        assert wrong in error, error
