"""The batch jobs: every knob reaches its flag, and on a real Slurm of two nodes on this machine jobs refuse, fail, requeue and end as they should."""
import importlib
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from torch.distributed.run import parse_args as torchrun_arguments

from nanochat.configurator import parse
from nanochat.run_logger import read_log
from scripts import pointer
from tests import pipeline
from tests.fakes import slurm

ROOT = Path(__file__).parents[1]
JOBS = sorted(path.name for path in (ROOT / "slurm").glob("*.sh") if path.name != "common.sh")
PHASES = ("ot_sft", "grpo", "rs_generate", "rs_sft", "eval")
needs_slurm = pytest.mark.skipif(bool(slurm.MISSING), reason=f"a real Slurm needs {', '.join(slurm.MISSING)} (Debian: slurm-wlm, munge)")


# ---------------------------------------------------------------------------------------------------------------------
# Knobs

# runs a job's script with Slurm, pointers and the step itself replaced: what is left is how knobs become a command line
HARNESS = r"""
source slurm/common.sh
begin() { if [ -z "$PHASE" ]; then PHASE=$1 RUN_ID=r7 NPROC=${RANKS:-1} WANDB_RUN=dummy SEED=42 NANOCHAT_BASE_DIR=/base; fi; }
run_step() { printf '%s\0' "$@" >&3; printf '\0' >&3; }
python() { case "$*" in *--read=*) echo "${POINTED:-mid d4 60}" ;; esac; }
source "slurm/$1"
"""


def commands(script, **knobs):
    """What a job's script would run -> [(module's name, its Config)], and what it says."""
    done = subprocess.run(["bash", "-c", f"exec 3>&1 >&2\n{HARNESS}", "harness", script], cwd=ROOT, env={"PATH": os.environ["PATH"], "HOME": "/home", **knobs}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = []
    for command in filter(None, done.stdout.split("\0\0")):
        dash, module, *flags = command.split("\0")
        assert dash == "-m"
        found.append((module, parse(importlib.import_module(module).Config, flags)))
    return found, done.stderr


SFT = {"SFT_RECIPE": ("dolci_mid", "sft_recipe"), "DEVICE_BATCH_SIZE": ("2", "device_batch_size"), "TARGET_EXAMPLES_PER_STEP": ("64", "target_examples_per_step"),
       "SAVE_EVERY": ("7", "save_every"), "NUM_STEPS": ("30", "num_iterations"), "NUM_EPOCHS": ("2", "num_epochs"), "OT_DATASET": ("some/where", "ot_dataset"),
       "OT_PATH": ("ot file.jsonl", "ot_path"), "OT_SPLIT": ("test", "ot_split"), "OT_STOP": ("100000", "ot_stop"), "GSM8K_STOP": ("50", "gsm8k_stop"), "CHAT_RATIO": ("0.25", "chat_ratio"),
       "DOLCI_PATH": ("dolci.jsonl", "dolci_path"), "DOLCI_STOP": ("800000", "dolci_stop"), "DOLCI_STREAMING": ("1", "dolci_streaming"), "DOLCI_STREAM_CACHE": ("c.jsonl", "dolci_stream_cache"),
       "RS_COT_PATH": ("rs.jsonl", "rs_cot_path"), "RS_COT_STOP": ("900", "rs_cot_stop"), "DATA_DIR": ("data", "data_dir"), "SFT_SOURCE": ("rl", "source")}
RL = {"EXAMPLES_PER_STEP": ("6", "examples_per_step"), "DEVICE_BATCH_SIZE": ("2", "device_batch_size"), "NUM_SAMPLES": ("5", "num_samples"), "MAX_NEW_TOKENS": ("80", "max_new_tokens"),
      "TEMPERATURE": ("0.7", "temperature"), "SAVE_EVERY": ("7", "save_every"), "DATA_DIR": ("data", "data_dir"), "RL_SOURCE": ("mid", "source")}
GRPO = RL | {"RL_TASKS": ("GSM8K:1", "tasks"), "NUM_STEPS": ("30", "num_steps"), "MAX_PROMPT_TOKENS": ("90", "max_prompt_tokens"), "ALGORITHM": ("dr_grpo", "algorithm"),
             "CLIP_RATIO_LOW": ("0.1", "clip_ratio_low"), "CLIP_RATIO_HIGH": ("0.3", "clip_ratio_high"), "KL_COEF": ("0.02", "kl_coef"), "REWARD_MODE": ("task", "reward_mode"),
             "LR_SCHEDULE": ("linear", "lr_schedule"), "DYNAMIC_SAMPLING": ("1", "dynamic_sampling"), "LENGTH_PENALTY_MODE": ("linear", "length_penalty_mode"),
             "LENGTH_PENALTY_COEF": ("0.5", "length_penalty_coef"), "LENGTH_PENALTY_TARGET": ("33", "length_penalty_target")}
RS = {"RS_TASKS": ("GSM8K", "task"), "RS_PROBLEMS": ("70", "max_problems"), "RS_SAMPLES": ("3", "num_samples"), "RS_TEMPERATURE": ("0.9", "temperature"), "RS_MAX_PER_PROMPT": ("2", "max_per_prompt"),
      "RS_COT_PATH": ("rs.jsonl", "output"), "MAX_NEW_TOKENS": ("80", "max_new_tokens"), "DATA_DIR": ("data", "data_dir"), "RS_SOURCE": ("sft", "source")}
EVAL = {"TASKS": ("AQUA|GSM8K", "task_name"), "EVAL_SPLIT": ("test", "split"), "MAX_PROBLEMS": ("12", "max_problems"), "EVAL_SAMPLES": ("4", "num_samples"), "EVAL_TEMPERATURE": ("0.8", "temperature"),
        "EVAL_BATCH_SIZE": ("16", "batch_size"), "MAX_NEW_TOKENS": ("80", "max_new_tokens"), "DATA_DIR": ("data", "data_dir"), "EVAL_SOURCE": ("rl", "source")}
KNOBS = {
    "base_train.sh": {"DEPTH": ("3", "depth"), "MAX_SEQ_LEN": ("256", "max_seq_len"), "DEVICE_BATCH_SIZE": ("2", "device_batch_size"), "TOTAL_BATCH_SIZE": ("4096", "total_batch_size"),
                      "SAVE_EVERY": ("7", "save_every"), "NUM_STEPS": ("30", "num_iterations"), "TARGET_PARAM_DATA_RATIO": ("5", "target_param_data_ratio"), "MODEL_TAG": ("d9", "model_tag")},
    "mid_train.sh": {"MID_RECIPE": ("offline", "recipe"), "SAVE_EVERY": ("7", "save_every"), "NUM_STEPS": ("30", "num_iterations"), "DEVICE_BATCH_SIZE": ("2", "device_batch_size"),
                     "TOTAL_BATCH_SIZE": ("4096", "total_batch_size"), "DATA_DIR": ("data", "data_dir")},
    "chat_sft.sh": SFT, "itiger_r1_ot_sft.sh": SFT | {"SFT_STEPS": ("31", "num_iterations")}, "itiger_r1_rs_sft.sh": (SFT | {"RS_SFT_STEPS": ("32", "num_iterations"), "RS_SFT_RECIPE": ("dolci_rs_sft", "sft_recipe")}),
    "chat_rl.sh": RL | {"RL_TASK": ("GSM8K", "task"), "NUM_STEPS": ("30", "max_steps")},
    "chat_grpo.sh": GRPO, "itiger_r1_grpo.sh": GRPO | {"RL_STEPS": ("33", "num_steps")},
    "rs_generate.sh": RS, "itiger_r1_rs_generate.sh": RS,
    "chat_eval.sh": EVAL, "itiger_r1_eval.sh": EVAL,
}
KNOBS["itiger_r1_rs_sft.sh"].pop("SFT_RECIPE")          # that is the cold start's
PARENT = {"MODEL_TAG": ("d9", "model_tag"), "STEP": ("12", "step"), "OUTPUT_TAG": ("out", "output_tag"), "WANDB_RUN": ("dummy", "run")}
NUMBERED = {"SFT_STEPS", "RS_SFT_STEPS", "RL_STEPS"}    # these win over NUM_STEPS, so they are set alone


@pytest.mark.parametrize("script", KNOBS)
def test_every_knob_reaches_its_field(script):
    knobs = dict(KNOBS[script])
    if script != "base_train.sh":
        knobs |= {name: PARENT[name] for name in ("MODEL_TAG", "STEP")}
        if not re.search("rs_generate|eval", script):
            knobs["OUTPUT_TAG"] = PARENT["OUTPUT_TAG"]
    if script == "itiger_r1_rs_sft.sh":
        knobs["RS_SFT_FROM"] = ("grpo", "sft_recipe")
        del knobs["SFT_SOURCE"]                         # says where the cold start begins
    for group in ({name for name in knobs if name not in NUMBERED}, *({name} for name in NUMBERED & knobs.keys())):
        found, _ = commands(script, **{name: knobs[name][0] for name in group})
        config = found[0][1]
        for name in group - {"RS_SFT_FROM"}:
            value, field = knobs[name]
            if name == "RS_SFT_RECIPE" or field != "sft_recipe" or script != "itiger_r1_rs_sft.sh":
                given = getattr(config, field)
                assert given == type(given)(float(value) if isinstance(given, (bool, int, float)) else value), name


@pytest.mark.parametrize("script", KNOBS)
def test_every_flag_that_a_knob_gives_is_tried_above(script):
    text = (ROOT / "slurm" / script).read_text()
    assert set(re.findall(r"\$\{(\w+):\+--", text)) <= KNOBS[script].keys() | {"PARENT_STEP"}


@pytest.mark.parametrize("ranks", ["1", "3", "8"])
def test_sizes_divide_among_any_number_of_ranks(ranks):
    (_, sft), = commands("itiger_r1_ot_sft.sh", RANKS=ranks)[0]
    (_, grpo), = commands("itiger_r1_grpo.sh", RANKS=ranks)[0]
    (_, base), = commands("base_train.sh", RANKS=ranks)[0]
    assert sft.target_examples_per_step % (sft.device_batch_size * int(ranks)) == 0 and 16 <= sft.target_examples_per_step <= 48
    assert grpo.examples_per_step % int(ranks) == 0 and 8 <= grpo.examples_per_step <= 24
    assert base.total_batch_size % (base.device_batch_size * base.max_seq_len * int(ranks)) == 0 and base.total_batch_size >= 3 * 2**17


def test_the_seeds_own_command_means_what_it_says():
    """SFT_SOURCE=chatsft was no stage, and DOLCI_STOP was dropped beside dolci_mid."""
    found, said = commands("itiger_r1_ot_sft.sh", SFT_RECIPE="dolci_mid", SFT_SOURCE="chatsft", DOLCI_STOP="800000", MODEL_TAG="d32", STEP="20832")
    (_, config), = found
    assert (config.source, config.model_tag, config.step, config.output_tag) == ("sft", "d32", 20832, "d32-r7")
    assert (config.sft_recipe, config.dolci_stop) == ("dolci_mid", 800000)
    assert "note: stage chatsft is called sft here" in said


def test_a_phase_follows_the_pointer_unless_a_checkpoint_is_named():
    assert [(config.source, config.model_tag, config.step) for _, config in commands("itiger_r1_grpo.sh", POINTED="sft d4-r7 60")[0]] == [("sft", "d4-r7", 60)]
    evaluated, _ = commands("itiger_r1_eval.sh", EVAL_PHASES="ot_sft grpo", POINTED="rl d4-r7 500")
    assert [(config.source, config.model_tag, config.step) for _, config in evaluated] == [("rl", "d4-r7", 500)] * 2
    evaluated, _ = commands("itiger_r1_eval.sh", MODEL_TAG="d28", STEP="200", EVAL_SOURCE="chatrl")
    assert [(config.source, config.model_tag, config.step) for _, config in evaluated] == [("rl", "d28", 200)]
    (_, config), = commands("itiger_r1_rs_sft.sh", RS_COT_PATH="rs.jsonl", POINTED="mid d4 60")[0]
    assert (config.source, config.model_tag, config.output_tag) == ("mid", "d4", "d4-r7-rs")


def test_torchrun_leaves_our_flags_alone(tmp_path):
    """Without -- before the module it takes --run for a flag of its own and refuses; the launchers are asked what they would start."""
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "HOME": str(tmp_path), "PRESET": "gpu", "NPROC_PER_NODE": "2", "NPROC": "4", "SLURM_JOB_NUM_NODES": "2", "SLURM_NODEID": "1",
                   "SLURM_JOB_ID": "7", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    (tmp_path / "torchrun").write_text("#!/bin/sh\nprintf '%s\\0' \"$@\"\n")
    (tmp_path / "torchrun").chmod(0o755)
    for launch in ("source slurm/common.sh; on_node -m scripts.chat_sft --run=dummy --step=3", "source scripts/pipeline.sh; choose_hardware; $LAUNCH scripts.chat_sft --run=dummy --step=3"):
        done = subprocess.run(["bash", "-c", launch], cwd=ROOT, env=environment, capture_output=True, text=True)
        asked = torchrun_arguments(done.stdout.split("\0")[:-1])
        assert (asked.module, asked.training_script, asked.training_script_args, asked.nproc_per_node) == (True, "scripts.chat_sft", ["--run=dummy", "--step=3"], "2"), done.stderr


def test_the_base_directory_is_the_first_place_that_is_named(tmp_path):
    def chosen(**environment):
        done = subprocess.run(["bash", "-c", "source slurm/common.sh; choose_base_dir; echo \"$NANOCHAT_BASE_DIR\""], cwd=ROOT, env={"PATH": os.environ["PATH"], "HOME": "/home/me", **environment},
                              capture_output=True, text=True)
        return done.stdout.strip() or done.stderr
    assert chosen() == "/home/me/.cache/nanochat"
    assert chosen(SCRATCH="/s") == "/s/nanochat"
    assert chosen(SCRATCH="/s", PROJECT_CACHE_ROOT="/p") == "/p/nanochat"
    assert chosen(SCRATCH="/s", NANOCHAT_BASE_DIR="~/runs") == "/home/me/runs"
    assert "lies in SLURM_TMPDIR, which goes with the job" in chosen(SLURM_TMPDIR="/t", SCRATCH="/t/x")
    assert chosen(SLURM_TMPDIR="/t", SCRATCH="/t/x", ALLOW_SLURM_TMPDIR="1") == "/t/x/nanochat"


def test_nothing_is_hard_coded_to_one_cluster():
    for path in (ROOT / "slurm").glob("*.sh"):
        text = path.read_text()
        assert subprocess.run(["bash", "-n", path]).returncode == 0
        directives = " ".join(re.findall(r"^#SBATCH (.*)$", text, re.MULTILINE))
        assert set(re.findall(r"--([\w-]+)", directives)) <= {"job-name", "output", "open-mode", "requeue", "signal", "ntasks"}
        assert not re.search(r"--(nodelist|account|partition|qos|constraint|mem)\b|conda|module load|/(home|project|scratch|work)/", text), path.name


def test_the_readme_lists_every_knob():
    text = (ROOT / "slurm" / "README.md").read_text()
    listed = set(re.findall(r"`([A-Z][A-Z0-9_]+)`", text))
    used = {name for knobs in KNOBS.values() for name in knobs} | set(PARENT) | {"EVAL_PHASES", "RS_SFT_FROM"}
    assert not used - listed
    scripts = "\n".join(path.read_text() for path in [*(ROOT / "slurm").glob("*.sh"), *(ROOT / "scripts").glob("*.sh")])
    assert not [name for name in listed if not name.startswith("SBATCH_") and not re.search(rf"\b{name}\b", scripts)]
    assert {name for name in re.findall(r"`(\w+\.sh)`", text)} >= set(JOBS)


# ---------------------------------------------------------------------------------------------------------------------
# Pointers

def test_a_pointer_leads_to_a_finished_checkpoint_and_to_where_it_began(base_directory, tmp_path, capsys):
    pipeline.run_stage("base", num_iterations=2)
    pipeline.run_stage("sft", source="base", num_iterations=4, eval_every=-1, eval_metrics_every=-1)
    path = tmp_path / "latest_sft_r7.json"
    pointer.main(pointer.Config(write=str(path), stage="sft", model_tag="d2"))
    entry = json.loads(path.read_text())
    assert entry == {"stage": "sft", "model_tag": "d2", "step": 4, "checkpoint_dir": str(base_directory / "chatsft_checkpoints" / "d2"),
                     "parent": {"stage": "base", "model_tag": "d2", "step": 2}, "base_dir": str(base_directory)}
    capsys.readouterr()
    pointer.main(pointer.Config(read=str(path)))
    pointer.main(pointer.Config(read=str(path), parent=True))
    assert capsys.readouterr().out.splitlines() == ["sft d2 4", "base d2 2"]

    with open(base_directory / "chatsft_checkpoints" / "d2" / "model_000004.pt", "ab") as file:
        file.write(b"torn")
    with pytest.raises(ValueError, match="the file is torn or changed"):
        pointer.read_pointer(path)
    with pytest.raises(ValueError, match="is of step 2, and the stage has not ended"):  # the newest whole one is not the last
        pointer.main(pointer.Config(write=str(path), stage="sft", model_tag="d2"))


def test_a_pointer_that_leads_nowhere_says_so(base_directory, tmp_path):
    with pytest.raises(ValueError, match="the job that writes it has not ended"):
        pointer.read_pointer(tmp_path / "none.json")
    with pytest.raises(ValueError, match="run the sft stage first"):
        pointer.checkpoint_entry("sft", "d2")
    with pytest.raises(ValueError, match="missing or empty"):
        pointer.file_entry(tmp_path / "rows.jsonl")
    (tmp_path / "rows.jsonl").write_text("{}\n")
    pointer.main(pointer.Config(write=str(tmp_path / "rows.json"), file=str(tmp_path / "rows.jsonl")))
    assert pointer.read_pointer(tmp_path / "rows.json") == (str(tmp_path / "rows.jsonl"),)
    entry = json.loads((tmp_path / "rows.json").read_text())
    (tmp_path / "rows.json").write_text(json.dumps({**entry, "base_dir": "/elsewhere"}))
    with pytest.raises(ValueError, match="belongs to the base directory /elsewhere"):
        pointer.read_pointer(tmp_path / "rows.json")
    for config in (pointer.Config(), pointer.Config(write="a", read="b"), pointer.Config(write="a", stage="sft")):
        with pytest.raises(ValueError):
            pointer.main(config)


# ---------------------------------------------------------------------------------------------------------------------
# A real Slurm

@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slurm")
    with slurm.Slurm(folder, NANOCHAT_BASE_DIR=str(folder / "base")) as running:
        yield running


@needs_slurm
def test_slurm_takes_every_job(cluster):
    for script in JOBS:
        done = subprocess.run(["sbatch", "--test-only", f"slurm/{script}"], env=cluster.environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0 and "to start at" in done.stderr, done.stderr


@needs_slurm
def test_a_job_submitted_without_all_refuses_with_the_fix(cluster):
    knobs = "SFT_RECIPE=dolci_mid,SFT_SOURCE=chatsft,DOLCI_STOP=800000"
    bare = cluster.sbatch(f"--export={knobs}", "slurm/itiger_r1_ot_sft.sh")
    none = cluster.sbatch("--export=NONE", "slurm/itiger_r1_full_run.sh")
    assert cluster.finish(bare, none) == ["FAILED", "FAILED"]
    assert f"    sbatch --export=ALL,{knobs} slurm/itiger_r1_ot_sft.sh\n" in cluster.output(bare)
    assert "    sbatch --export=ALL slurm/itiger_r1_full_run.sh\n" in cluster.output(none)


@needs_slurm
def test_a_failed_phase_cancels_those_behind_it(cluster):
    """The cold start finds nothing to begin from. The submission itself is a job, too."""
    submission = cluster.sbatch("slurm/itiger_r1_full_run.sh", f"--output={cluster.folder}/%j.out", NANOCHAT_RUN_ID="r8")
    assert cluster.finish(submission) == ["COMPLETED"]
    run, *lines = cluster.output(submission).splitlines()
    jobs = dict(line.split() for line in lines)
    assert run == "run r8" and tuple(jobs) == PHASES
    assert cluster.finish(*jobs.values()) == ["FAILED", *["CANCELLED"] * 4]
    assert all("DependencyNeverSatisfied" in cluster.job(jobs[phase])["Reason"] for phase in PHASES[1:])
    assert "phase ot_sft needs the checkpoint of phase mid in run r8: run that first" in cluster.output(jobs["ot_sft"])


@needs_slurm
def test_a_refused_phase_takes_back_those_before_it(cluster):
    done = subprocess.run(["bash", "slurm/itiger_r1_full_run.sh", "--begin=now+1hour", "--nodelist=nowhere"], env=cluster.environment, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1 and "sbatch refused phase ot_sft; the phases submitted before it are cancelled: none" in done.stderr
    assert not cluster.ask("squeue", "-h").strip()


@needs_slurm
def test_a_job_asked_to_stop_before_it_has_anything_new_does_not_go_round_for_ever(cluster):
    """As one whose time limit is too short. The signal comes while Python still loads."""
    job = cluster.sbatch("--time=30", "slurm/chat_eval.sh", MODEL_TAG="none")
    cluster.wait(lambda: "== -m scripts.chat_eval" in cluster.output(job), "start of the evaluation", 900)
    cluster.ask("scancel", "--signal=USR1", "--batch", job)
    assert cluster.finish(job) == ["FAILED"]
    assert "phase eval was asked to stop before it had anything new to save: give the job more than 30:00" in cluster.output(job)


TINY = "--device-type=cpu --dtype=float32"
BASE = {"DEPTH": "2", "MAX_SEQ_LEN": "128", "DEVICE_BATCH_SIZE": "2", "BASE_ARGS": f"{TINY} --n-embd=64 --head-dim=32 --compile=False --eval-every=-1 --sample-every=-1"}


@pytest.fixture(scope="module")
def data(cluster, prepared):
    """The cluster's base directory, with data and tokenizer."""
    folder = Path(cluster.environment["NANOCHAT_BASE_DIR"])
    shutil.copytree(prepared, folder, dirs_exist_ok=True)
    return folder


def weights(base, room, tag):
    path, = (base / pipeline.FOLDERS[room] / tag).glob("model_*.pt")
    return torch.load(path, weights_only=True)


def assert_equal(one, other):
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def steps_logged(base, run):
    path = base / "runs" / f"{run}.jsonl"
    return [record["step"] for record in read_log(path) if "num_tokens" in record or "train/loss" in record] if path.exists() else []


def again(cluster, job):
    """The number of the start that runs now, from the job's own output."""
    return cluster.output(job).count(f"job {job} (start")


@needs_slurm
@pytest.mark.slow
def test_a_job_that_is_asked_requeued_and_loses_its_node_ends_as_if_never_stopped(cluster, data):
    """USR1, as before a time limit; SIGTERM by Slurm's own requeue; the node's power."""
    job = cluster.sbatch("slurm/base_train.sh", **BASE, MODEL_TAG="broken", NANOCHAT_RUN_ID="broken", TOTAL_BATCH_SIZE="512", NUM_STEPS="400", SAVE_EVERY="20")
    cluster.wait(lambda: len(steps_logged(data, "base_broken")) > 30, "steps of the first start", 900)
    cluster.ask("scancel", "--signal=USR1", "--batch", job)
    cluster.wait(lambda: again(cluster, job) == 2 and max(steps_logged(data, "base_broken")) > 80, "steps of the second start", 900)
    assert "as asked by SIGUSR1, and saved" in cluster.output(job) and "back to the queue" in cluster.output(job)
    cluster.ask("scontrol", "requeue", job)
    cluster.wait(lambda: again(cluster, job) == 3 and max(steps_logged(data, "base_broken")) > 140, "steps of the third start", 900)
    assert "as asked by SIGTERM, and saved" in cluster.output(job)
    node = cluster.job(job)["NodeList"]
    cluster.crash_node(node)
    reached = max(steps_logged(data, "base_broken"))
    cluster.wait(lambda: again(cluster, job) == 4, "fourth start", 900)
    assert cluster.job(job)["NodeList"] != node
    cluster.start_node(node)
    assert cluster.finish(job, timeout=1800) == ["COMPLETED"] and cluster.job(job)["Restarts"] == "3"
    resumed = [int(step) for step in re.findall("resuming base broken at step (\\d+)", cluster.output(job))]
    assert len(resumed) == 3 and resumed[2] % 20 == 0 and reached - 20 <= resumed[2] <= reached + 1 < 400
    whole = cluster.sbatch("slurm/base_train.sh", **BASE, MODEL_TAG="whole", NANOCHAT_RUN_ID="whole", TOTAL_BATCH_SIZE="512", NUM_STEPS="400", SAVE_EVERY="20")
    assert cluster.finish(whole, timeout=1800) == ["COMPLETED"]
    assert_equal(weights(data, "base", "broken"), weights(data, "base", "whole"))
    assert steps_logged(data, "base_broken") == list(range(400))


@needs_slurm
@pytest.mark.slow
def test_a_cancelled_job_saves_and_stays_cancelled(cluster, data):
    job = cluster.sbatch("slurm/base_train.sh", **BASE, MODEL_TAG="gone", NANOCHAT_RUN_ID="gone", TOTAL_BATCH_SIZE="512", NUM_STEPS="100000")
    cluster.wait(lambda: len(steps_logged(data, "base_gone")) > 5, "steps", 900)
    cluster.ask("scancel", job)
    cluster.wait(lambda: "as asked by SIGTERM, and saved" in cluster.output(job), "the last save", 900)
    assert cluster.finish(job) == ["CANCELLED"] and list((data / "base_checkpoints" / "gone").glob("meta_*.json"))


@needs_slurm
@pytest.mark.slow
def test_two_nodes_with_two_gpus_each_are_four_ranks_of_one_run(cluster, data):
    """The same batch in four ranks on two nodes, stopped and requeued on its way, and in one on one node: the same losses."""
    if not cluster.has_gpus:
        pytest.skip("the fake GPUs need mknod")
    sizes = {**BASE, "TOTAL_BATCH_SIZE": "1024", "NUM_STEPS": "80"}
    four = cluster.sbatch("--nodes=2", "--gres=gpu:2", "--cpus-per-task=2", "slurm/base_train.sh", **sizes, MODEL_TAG="four", NANOCHAT_RUN_ID="four")
    cluster.wait(lambda: len(steps_logged(data, "base_four")) > 5, "steps on two nodes", 900)
    cluster.ask("scancel", "--signal=USR1", "--batch", four)
    assert cluster.finish(four, timeout=1800) == ["COMPLETED"], cluster.output(four)
    one = cluster.sbatch("slurm/base_train.sh", **sizes, MODEL_TAG="one", NANOCHAT_RUN_ID="one")
    assert cluster.finish(one, timeout=1800) == ["COMPLETED"], cluster.output(one)
    said = cluster.output(four)
    assert "4 ranks on 2 nodes (n[1-2])" in said and "on 4 x cpu" in said and re.search(r"as asked by SIGUSR1(.*\n)*resuming base four at step", said)
    meta, = (data / "base_checkpoints" / "four").glob("meta_*.json")
    assert json.loads(meta.read_text())["world_size"] == 4 and cluster.job(four)["Restarts"] == "1"
    losses = [[record["train/loss"] for record in read_log(data / "runs" / f"base_{tag}.jsonl") if "train/loss" in record] for tag in ("four", "one")]
    assert len(losses[0]) == 80 and losses[0][:10] == pytest.approx(losses[1][:10], abs=1e-3) and losses[0] == pytest.approx(losses[1], abs=0.05)


@needs_slurm
@pytest.mark.slow
def test_the_whole_r1_chain_with_one_phase_stopped_in_its_middle(cluster, data):
    """base -> mid -> cold start -> GRPO -> rejection sampling -> SFT -> evaluation of the run's own three checkpoints. GRPO is asked to stop, requeued, and ends at the
    weights of the same command run without a break."""
    run = {"NANOCHAT_RUN_ID": "chain", "SAVE_EVERY": "100", "MID_RECIPE": "offline", "SFT_RECIPE": "offline", "RS_SFT_RECIPE": "offline_rs_sft", "SFT_STEPS": "60", "RL_STEPS": "12",
           "RS_SFT_STEPS": "4", "RL_TASKS": "AQUA", "RS_TASKS": "AQUA", "TASKS": "AQUA", "MAX_NEW_TOKENS": "32", "NUM_SAMPLES": "8", "EXAMPLES_PER_STEP": "8", "RS_PROBLEMS": "60",
           "MAX_PROBLEMS": "10", "MID_ARGS": f"{TINY} --compile=False --eval-every=-1", "SFT_ARGS": f"{TINY} --compile=False --init-lr-frac=0.5 --eval-every=-1 --eval-metrics-every=-1",
           "RL_ARGS": f"{TINY} --preflight=-1 --eval-every=-1 --kl-every=-1 --attn-every=-1", "RS_ARGS": TINY, "EVAL_ARGS": TINY}
    base = cluster.sbatch("slurm/base_train.sh", **{**BASE, **run}, MODEL_TAG="d2", TOTAL_BATCH_SIZE="512", NUM_STEPS="40")
    mid = cluster.sbatch(f"--dependency=afterok:{base}", "--kill-on-invalid-dep=yes", "slurm/mid_train.sh", **run, NUM_STEPS="10")
    submission = cluster.sbatch(f"--dependency=afterok:{mid}", "--kill-on-invalid-dep=yes", "slurm/itiger_r1_full_run.sh", f"--output={cluster.folder}/%j.out", **run)
    assert cluster.finish(submission, timeout=1800) == ["COMPLETED"], cluster.output(mid)
    jobs = dict(line.split() for line in cluster.output(submission).splitlines()[1:])
    cluster.wait(lambda: len(steps_logged(data, "rl_d2-chain")) >= 2, "steps of GRPO", 1800)
    cluster.ask("scancel", "--signal=USR1", "--batch", jobs["grpo"])
    assert cluster.finish(*jobs.values(), timeout=3600) == ["COMPLETED"] * 5, "\n".join(map(cluster.output, jobs.values()))

    assert [cluster.job(jobs[phase])["Restarts"] for phase in PHASES] == ["0", "1", "0", "0", "0"]
    assert re.search(r"stopped before step (\d+) of 12 as asked by SIGUSR1(.*\n)*.*resuming rl d2-chain at step \1\n", cluster.output(jobs["grpo"]))
    command, = set(re.findall(r"^== -m (scripts\.chat_grpo .*) --resume$", cluster.output(jobs["grpo"]), re.MULTILINE))
    subprocess.run(["python", "-m", *command.split(), "--output-tag=unbroken"], env=cluster.environment, cwd=ROOT, check=True, capture_output=True)
    assert_equal(weights(data, "rl", "d2-chain"), weights(data, "rl", "unbroken"))

    rows = [json.loads(line) for line in (data / "rs_cot_chain.jsonl").read_text().splitlines()]
    assert rows and {row["provenance"]["checkpoint"] for row in rows} == {"rl/d2-chain/12"}
    read = {phase: json.loads((data / f"latest_{phase}_chain.json").read_text()) for phase in ("ot_sft", "grpo", "rs_sft")}
    assert [(entry["stage"], entry["model_tag"], entry["step"]) for entry in read.values()] == [("sft", "d2-chain", 60), ("rl", "d2-chain", 12), ("sft", "d2-chain-rs", 4)]
    assert [entry["parent"]["stage"] for entry in read.values()] == ["mid", "sft", "mid"]
    for entry in read.values():                         # the run's own checkpoints, not some that were there
        assert json.loads((data / "eval" / f"{entry['stage']}_{entry['model_tag']}_AQUA.json").read_text())["step"] == entry["step"]
    assert (data / "report" / "report.html").is_file()
