"""Jobs from end to end: the launcher, the real huggingface_hub client, a loopback Hub that runs what it is sent as a real process with a job's environment.
Names in brackets are faults of the seed's scripts that must not exist here. The stages are short ones; test_hf_jobs_whole.py has the real ones.
"""
import hashlib
import http.server
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from hf_jobs import jobs as hf_jobs, launch
from tests.fakes.hub_jobs import LAUNCH, ROOT, Driver, JobsHub, launched, read_until

WANDB_SECRET = "wandb-secret-5b1f0c77aa"
QUICK = ("HF_BASE_ITERATIONS=5", "HF_SYNC_MINUTES=0")


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub")
    with JobsHub(folder / "repos") as server, Driver(server, folder / "home") as run:
        server.run, server.home = run, folder / "home"
        yield server


# two stages in place of the pipeline's; the second can wait, or fail
PIPELINE = r"""set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"
source scripts/bootstrap.sh
source scripts/pipeline.sh
choose_places
echo "job $JOB_ID of $ACCELERATOR with $CPU_CORES cores; $(cat marker.txt); key $(printf %s "${WANDB_API_KEY:-}" | sha256sum | cut -c1-8); ${BASE_ARGS}"
mkdir -p "$NANOCHAT_BASE_DIR/report"
stage tokenizer bash -c 'echo "section by $JOB_ID" | tee $NANOCHAT_BASE_DIR/report/a.md'
if [ -n "${WAITING:-}" ]; then echo "now it waits"; while [ ! -e "$WAITING" ]; do sleep 0.2; done; fi
stage report bash -c '[ -z "${FAIL:-}" ] && echo "line with ünïcode"'
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A repository with the real scripts and packages, short stages, one change that is not committed, and a .env that must not travel."""
    folder = tmp_path_factory.mktemp("tree")
    for room in ("nanochat", "hf_jobs", "scripts", "tasks"):
        shutil.copytree(ROOT / room, folder / room, ignore=shutil.ignore_patterns("__pycache__", ".env", "*.so"))
    (folder / "run_aquarat_small.sh").write_text(PIPELINE)
    (folder / ".gitignore").write_text(".env\n")
    (folder / "marker.txt").write_text("committed")

    def git(*arguments):
        return subprocess.run(["git", "-C", str(folder), "-c", "user.name=t", "-c", "user.email=t@example.com", *arguments], check=True, capture_output=True, text=True).stdout
    git("init", "-q", "-b", "main")
    git("add", ".")
    git("commit", "-q", "-m", "first")
    git("tag", "v1")
    (folder / "marker.txt").write_text("changed here")
    (folder / "hf_jobs" / ".env").write_text(f"WANDB_API_KEY={WANDB_SECRET}\nSEED=7\nLAMBDA_API_KEY=stays-at-home\n")
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Refused before it costs anything

def test_hardware_is_listed_with_prices_per_hour(hub):
    status, error, output = hub.run(LAUNCH, "--hardware")
    assert (status, error) == (0, None)
    assert re.search(r"a100x8 +8 GPUs +\$20.00/h", output) and re.search(r"cpu-basic +0 GPUs +\$0.01/h", output)


FULL = ("--flavor=a100-large", "--name=x")


@pytest.mark.parametrize("flags, wrong", [
    ((), "flavor is not given"),
    (("--flavor=a100x16",), r"no flavor 'a100x16' among the 4.*'a100x8'"),                                        # [J13]
    (("--flavor=a100-large", "--gpus=8"), r"a100-large \(.*1 GPU,.*has 1: choose a100x8"),                        # [J9]
    ((*FULL, "--env", "HF_TRAIN_GPUS=8"), "HF_TRAIN_GPUS=8, but there are 1 GPUs"),                               # [J9]
    ((*FULL, "--env", "NPROC_PER_NODE=8", "--script=bootstrap_and_train_base.sh"), "NPROC_PER_NODE=8, but there are 1"),
    ((*FULL, "--max-price=2"), "costs more"),
    ((*FULL, "--timeout=12"), "write a number with its unit"),                                                    # [J4]
    ((*FULL, "--timeout=0h"), "write a number with its unit"),
    ((*FULL, "--env", "WANDB_API_KEY=abc"), "would be seen in the process list"),                                 # [J5]
    ((*FULL, "--secrets", "OPENAI_KEY"), "--secrets OPENAI_KEY: the variable is not set here"),                   # [J14]
    ((*FULL, "--env", "HF_RL_NUM_SAMPLE=3"), "there is no knob HF_RL_NUM_SAMPLE"),
    ((*FULL, "--env", "RL_ARGS=--num-sampels=3"), "scripts/chat_rl.py does not take"),
    ((*FULL, "--env", "EVAL_ARGS=--max-problem=3"), "scripts/chat_eval.py does not take"),
    ((*FULL, "--script=bootstrap_and_train_rl.sh"), "SFT_REPO is not set"),                                       # [J8]
    ((*FULL, "--script=train.sh"), "script='train.sh' is not one of"),
    ((*FULL, "--repo-url=git@github.com:me/x.git"), "needs an SSH key"),
    (("--flavor=a100-large", "--name=a b"), "is no name of a repository"),
    ((*FULL, "--bucket=me/b", "--output-repo=me/x"), "results go to one place")])
def test_what_is_wrong_is_refused_before_anything_is_sent(hub, flags, wrong):
    before = len(hub.jobs), len(hub.commits), sum(method == "POST" for method, _ in hub.requests)
    _, error, output = hub.run(LAUNCH, *flags)
    assert error and re.search(wrong, error, re.DOTALL), (error, output)
    assert before == (len(hub.jobs), len(hub.commits), sum(method == "POST" for method, _ in hub.requests))


def test_a_dry_run_tells_machine_price_code_and_names_of_secrets_and_sends_nothing(hub, tree):
    before = len(hub.jobs), len(hub.commits)
    status, error, output = hub.run(LAUNCH, "--flavor=a100x8", "--timeout=90m", "--gpus=8", "--env", "HF_TRAIN_GPUS=8", "--dry-run", root=tree)
    assert (status, error) == (0, None)
    assert "8x Nvidia A100, 8 GPUs" in output and "after 1.5 hours" in output and "at most $30.00" in output
    assert "with 1 changed files" in output and "secrets: HF_TOKEN, WANDB_API_KEY" in output and "SEED=7" in output
    assert WANDB_SECRET not in output and "hf_fake" not in output and "stays-at-home" not in output
    assert before == (len(hub.jobs), len(hub.commits))


def test_a_secret_never_stands_where_it_could_be_read():
    """[J5]"""
    order = {"image": "x", "command": ["bash"], "env": {"NOTE": f"key is {WANDB_SECRET}"}, "flavor": "a", "timeout": 60, "name": "n", "namespace": "me", "volumes": None}
    with pytest.raises(ValueError, match="WANDB_API_KEY also stands in"):
        hf_jobs.submit(SimpleNamespace(run_job=None), order, {"WANDB_API_KEY": WANDB_SECRET})


def test_older_clients_get_the_name_as_a_label_or_not_at_all_and_never_as_the_image():
    """[J3]"""
    def api(function):
        return SimpleNamespace(run_job=function)
    order = {"image": "i", "command": ["c"], "env": {}, "flavor": "f", "timeout": 60, "name": "n", "namespace": "me", "volumes": None}
    new = hf_jobs.submit(api(lambda *, image, command, env, secrets, flavor, timeout, name, labels=None, volumes, namespace: locals()), dict(order), {"HF_TOKEN": "t" * 9})
    assert new["name"] == "n" and new["labels"] is None and new["image"] == "i"
    middle = hf_jobs.submit(api(lambda *, image, command, env, secrets, flavor, timeout, labels=None, namespace: locals()), dict(order), {})
    assert middle["labels"] == {"name": "n"} and middle["image"] == "i" and middle["secrets"] is None
    old = hf_jobs.submit(api(lambda *, image, command, env, secrets, flavor, timeout, namespace: locals()), dict(order), {})
    assert old["timeout"] == 60 and "labels" not in old
    with pytest.raises(ValueError, match="has no volumes for run_job: pip install -U"):
        hf_jobs.submit(api(lambda *, image, command, env, secrets, flavor, timeout, namespace: locals()), {**order, "volumes": ["v"]}, {})
    with pytest.raises(ValueError, match="has no list_jobs_hardware"):
        hf_jobs.flavors(SimpleNamespace())


# ---------------------------------------------------------------------------------------------------------------------
# Real jobs

def test_a_job_that_fails_names_its_stage_and_one_that_is_started_again_goes_on(hub, tree):
    """[J1] [J2] [J3] [J4] [J5] [J10]"""
    hub.cut_logs = 1
    status, error, output = hub.run(LAUNCH, "--flavor=cpu-basic", "--timeout=1h", "--name=first", "--env", "FAIL=1", *QUICK, root=tree)
    assert (status, error) == (1, None), (error, output)
    job = hub.newest
    assert "stage report failed" in output and "status 1; start the same job again" in output and f"job {job.id}: ERROR" in output
    assert f"job {job.id} of none with 2 cores; changed here; key {hashlib.sha256(WANDB_SECRET.encode()).hexdigest()[:8]};  --num-iterations=5" in output
    assert output.count(f"section by {job.id}\n") == 1                # a log that broke off is gone on with, and no line is shown twice
    asked = job.asked
    assert asked["timeoutSeconds"] == 3600 and asked["labels"]["name"] == "first" and asked["flavor"] == "cpu-basic"
    assert asked["dockerImage"] == "pytorch/pytorch:2.6.0-cuda12.4-cudnn9-devel" and asked["command"][:2] == ["bash", "-c"]
    assert asked["secrets"] == {"HF_TOKEN": "hf_fake", "WANDB_API_KEY": WANDB_SECRET}
    told = json.dumps({name: value for name, value in asked.items() if name != "secrets"})
    assert WANDB_SECRET not in told and "hf_fake" not in told and "stays-at-home" not in told and WANDB_SECRET not in output
    assert hub.private["me/nanochat-jobs-code"] is True and hub.private["me/first"] is True
    kept = hub.root / "me" / "first"
    stamps = {path.name for path in (kept / "stages").iterdir()}
    assert "tokenizer.done" in stamps and "report.done" not in stamps
    name = (kept / "run_name").read_text().strip()
    assert re.fullmatch(r"aquarat-hf-\d{8}-\d{6}", name)

    status, error, output = hub.run(LAUNCH, "--flavor=cpu-basic", "--timeout=1h", "--name=first", "--env", *QUICK, root=tree)
    assert (status, error) == (0, None), (error, output)
    assert "tokenizer: done before, skipped" in output and "ünïcode" in output and "COMPLETED" in output
    assert (kept / "report/a.md").read_text() == f"section by {job.id}\n" and (kept / "run_name").read_text().strip() == name
    assert (kept / "stages/report.done").is_file() and [summary for repo, summary in hub.commits if repo == "me/first"] == [
        "after tokenizer", "after the-end", "after report", "after the-end"]


def test_ctrl_c_tells_how_to_cancel_or_cancels_and_a_second_job_with_the_same_results_is_refused(hub, tree, tmp_path):
    waiting = ("--flavor=cpu-basic", "--timeout=1h", "--name=long", "--env", f"WAITING={tmp_path / 'go'}", *QUICK)
    with launched(hub, tree, *waiting) as process:
        read_until(process, "now it waits")
        process.send_signal(signal.SIGINT)
        output = process.stdout.read()
        assert process.wait(timeout=600) == 130
    job = hub.newest
    assert "goes on and bills" in output and f"--cancel={job.id}" in output and "Traceback" not in output and job.stage == "RUNNING"
    _, error, _ = hub.run(LAUNCH, *waiting, root=tree)
    assert error and f"job {job.id} runs and keeps its results in me/long too" in error
    _, _, output = hub.run(LAUNCH, "--status")
    assert re.search(rf"{job.id}  RUNNING +long  cpu-basic, .*about \$0\.00", output) and "1 of the jobs of me run and bill" in output
    with launched(hub, tree, f"--logs={job.id}", "--cancel-on-interrupt") as process:
        read_until(process, "now it waits")
        process.send_signal(signal.SIGINT)
        output = process.stdout.read()
        assert process.wait(timeout=600) == 130
    assert "cancel was asked for, it is CANCELED" in output and job.stage == "CANCELED"
    status, _, _ = hub.run(LAUNCH, f"--logs={job.id}")
    assert status == 3
    _, error, _ = hub.run(LAUNCH, "--cancel=only")
    assert "0 jobs of me are running" in error


@pytest.mark.parametrize("answer, cancels", [("y", 1), ("", 0), (EOFError(), 0), (KeyboardInterrupt(), 0)])
def test_in_a_terminal_ctrl_c_asks(monkeypatch, capsys, answer, cancels):
    asked = []

    def reply(question):
        asked.append(question)
        if isinstance(answer, BaseException):
            raise answer
        return answer
    monkeypatch.setattr("builtins.input", reply)
    monkeypatch.setattr(launch.sys, "stdin", SimpleNamespace(isatty=lambda: True))
    monkeypatch.setattr(launch.sys.stdout, "isatty", lambda: True, raising=False)
    calls = []
    api = SimpleNamespace(cancel_job=lambda *, job_id, namespace: calls.append(job_id),
                          inspect_job=lambda *, job_id, namespace: SimpleNamespace(status=SimpleNamespace(stage="CANCELED")))
    assert launch.interrupted(api, launch.Config(), "me", "j1") == 130
    assert len(asked) == 1 and calls == ["j1"] * cancels and ("goes on and bills" in capsys.readouterr().out) == (not cancels)


def test_a_detached_job_is_left_alone_and_can_be_cancelled(hub, tree, tmp_path):
    status, error, output = hub.run(LAUNCH, "--flavor=cpu-basic", "--name=loose", "--env", f"WAITING={tmp_path / 'go'}", "--detach", root=tree)
    job = hub.newest
    assert (status, error) == (0, None) and f"--logs={job.id}" in output
    status, _, output = hub.run(LAUNCH, "--cancel=loose")
    assert status == 0 and job.stage == "CANCELED"


def test_a_bucket_is_mounted_and_a_refusal_of_the_hub_is_told(hub, tree):
    hub.refusal = (402, "Payment required: your balance is 0")
    try:
        before = len(hub.jobs)
        _, error, _ = hub.run(LAUNCH, "--flavor=cpu-basic", "--name=poor", "--bucket=me/results", root=tree)
        assert "402" in error and "me/results" in hub.buckets and len(hub.jobs) == before
    finally:
        hub.refusal = None
    hub.private["me/nanochat-jobs-code"] = False
    _, error, _ = hub.run(LAUNCH, "--flavor=cpu-basic", "--name=open", root=tree)
    hub.private["me/nanochat-jobs-code"] = True
    assert "is public" in error


def test_the_example_launches_one_rl_job_with_all_its_variables(hub, tree):
    done = subprocess.run(["bash", "hf_jobs/run_rl_job_example.sh", "--dry-run"], cwd=tree, capture_output=True, text=True, timeout=600,
                          env={**os.environ, **hub.env(hub.home), "SFT_REPO": "me/run", "FLAVOR": "a100x8", "NPROC_PER_NODE": "8", "RUN": "mine", "TIMEOUT": "2h",
                               "RL_ARGS": "--top-k=50 --seed=3", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"})
    assert done.returncode == 0, done.stderr
    for part in ("a100x8", "NPROC_PER_NODE=8", "RUN=mine", "SFT_REPO=me/run", "RL_ARGS=--top-k=50 --seed=3", "results: me/mine", "after 2 hours", "nothing was sent"):
        assert part in done.stdout


# ---------------------------------------------------------------------------------------------------------------------
# How the code arrives

def start(folder, script="run_full_pipeline.sh", **variables):
    done = subprocess.run(["bash", "-c", (ROOT / "hf_jobs/start.sh").read_text(encoding="utf-8"), "start", script], cwd=folder, stdin=subprocess.DEVNULL,
                          env={"PATH": os.environ["PATH"], "HOME": str(folder), "WORKDIR": str(folder / "work"), **variables},
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=300)
    return done.returncode, done.stdout


def test_code_is_cloned_at_the_commit_that_was_asked_for_or_not_at_all(tree, tmp_path):
    """[J2] the text that clones travels in the command. A ref that does not exist does not become another one."""
    bad_knob = {"HF_BASE_ITERATIONS": "x", "HF_JOB_GPUS": "0"}  # the script is reached, and goes no further
    for ref in ("v1", "main", ""):
        status, output = start(tmp_path, REPO_URL=f"file://{tree}", GIT_REF=ref, **bad_knob)
        assert status == 2 and "HF_BASE_ITERATIONS=x is not a whole number" in output and re.search(r"code: file://\S+ at [0-9a-f]{40}", output)
    assert (tmp_path / "work/code/marker.txt").read_text() == "committed"
    for variables, wrong in (({"REPO_URL": f"file://{tree}", "GIT_REF": "v2"}, "no branch, tag or commit"), ({"REPO_URL": f"file://{tmp_path}/none"}, "cannot be cloned"),
                             ({"REPO_URL": "--upload-pack=x"}, "do not begin with -"), ({}, "this container has no code")):
        status, output = start(tmp_path, **variables)
        assert status == 1 and wrong in output, output
    for script in ("../evil.sh", "", "nothing_here.sh"):
        assert start(tmp_path, script, REPO_URL=f"file://{tree}")[0] == 1


class Storage(http.server.BaseHTTPRequestHandler):
    """A Hub that redirects to a storage on another port, as the real one does."""
    seen, content, elsewhere = [], b"", 0

    def do_GET(self):
        self.seen.append((self.server.server_port, self.headers.get("Authorization")))
        if self.server.server_port != self.elsewhere:
            self.send_response(302)
            self.send_header("Location", f"http://127.0.0.1:{self.elsewhere}/blob")
            self.end_headers()
            return
        self.send_response(200)
        self.send_header("Content-Length", str(len(self.content)))
        self.end_headers()
        self.wfile.write(self.content)

    def log_message(self, *arguments):
        pass


def test_packed_code_is_checked_and_the_token_goes_to_the_hub_alone(tree, tmp_path):
    subprocess.run(["git", "-C", str(tree), "archive", "--format=tar", "-o", str(tmp_path / "code.tar"), "v1"], check=True)
    servers = [http.server.ThreadingHTTPServer(("127.0.0.1", 0), Storage) for _ in range(2)]
    Storage.content, Storage.elsewhere = (tmp_path / "code.tar").read_bytes(), servers[1].server_port
    for server in servers:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
    try:
        where = {"HF_ENDPOINT": f"http://127.0.0.1:{servers[0].server_port}", "CODE_REPO": "me/code", "CODE_FILE": "x.tar", "HF_TOKEN": "hf_fake", "HF_JOB_GPUS": "0",
                 "NO_PROXY": "127.0.0.1"}
        status, output = start(tmp_path, CODE_SHA256=hashlib.sha256(Storage.content).hexdigest(), HF_BASE_ITERATIONS="x", **where)
        assert status == 2 and "HF_BASE_ITERATIONS=x" in output
        assert Storage.seen == [(servers[0].server_port, "Bearer hf_fake"), (servers[1].server_port, None)]
        patient = {**where, "PATH": f"{instant_sleep(tmp_path)}:{os.environ['PATH']}"}
        status, output = start(tmp_path, CODE_SHA256="0" * 64, **patient)
        assert status == 1 and "another SHA-256" in output and "could not be fetched" in output
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def instant_sleep(folder):
    """A python3 whose time.sleep does not wait."""
    (folder / "bin").mkdir()
    (folder / "bin/python3").write_text(f"#!/bin/bash\n{{ echo 'import time; time.sleep = lambda seconds: None'; cat; }} | exec {sys.executable} -\n")
    (folder / "bin/python3").chmod(0o755)
    return folder / "bin"
