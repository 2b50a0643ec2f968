"""The Lambda launcher against a fake API and a real sshd and tmux: it trains, fetches and terminates, and no failure leaves an instance behind."""
import contextlib
import hashlib
import json
import multiprocessing
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from nanochat.cloud import api, launch, ledger, session, shipping
from nanochat.cloud.orders import bare_flags
from nanochat.cloud.signals import Signals
from nanochat.configurator import parse
from scripts import launch_lambda_training
from scripts.launch_lambda_training import Config
from tests.cloud import QUICK, ROOT, SCALE, SECRET, Eyes, texts_below, tiny_repository
from tests.fakes.lambda_cloud import FakeLambda, instance_type
from tests.fakes.sshd import MISSING, Sshd

needs_sshd = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (apt-get install openssh-server tmux)")


@pytest.fixture
def here(tmp_path, monkeypatch):
    """This machine: an empty ledger, a tiny repository, quick waits, the key in the environment."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("LAMBDA_API_KEY", "secret-api-key")
    monkeypatch.setattr(Signals, "scale", SCALE)
    monkeypatch.setattr(shipping, "ROOT", tiny_repository(tmp_path / "repository"))
    monkeypatch.chdir(shipping.ROOT)
    return tmp_path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Sshd(tmp_path_factory.mktemp("sshd")) as machine:
        yield machine


@pytest.fixture
def machine(server):
    server.wipe()
    if server.process is None:
        server.start()
    return server


@pytest.fixture
def cloud():
    with FakeLambda() as fake:
        yield fake


def config_for(cloud, machine=None, **changes):
    there = {} if machine is None else {"ssh_key": str(machine.key), "ssh_user": machine.user, "ssh_port": machine.port, "tmux_socket": machine.socket}
    return replace(Config(api_url=cloud.url, run_script="run.sh", ssh_key_name="laptop", ssh_port=1), **{**QUICK, **there, **changes})


def records():
    return ledger.read_records("lambda")


# The whole way

@needs_sshd
def test_it_trains_there_fetches_the_results_and_terminates(here, cloud, machine, capsys):
    with Eyes() as eyes:
        assert launch_lambda_training.main(config_for(cloud, machine, auto_start=True, env=("PAUSE=1",))) == 0
    out = capsys.readouterr().out
    assert cloud.launched == cloud.terminated and len(cloud.launched) == 1 and not cloud.left_running
    # the log is where the documentation says, it is followed here, and "runs" is said after the first training line
    assert "base step 4/4" in (machine.home / "nanochatAquaRat" / "training.log").read_text()
    assert out.index("== installing") < out.index("base step 2/4") < out.index("TRAINING RUNS") < out.index("the run ended with status 0") < out.index("terminated, verified")
    # the tree went over as it is here: with changes, without what git ignores
    assert (machine.home / "nanochatAquaRat" / "committed.txt").read_text() == "changed here\n"
    assert (machine.home / "nanochatAquaRat" / "new.txt").exists() and not (machine.home / "nanochatAquaRat" / "ignored").exists()
    # variables: the secret arrived, the cloud's key and this machine's folders stayed here
    env_file = machine.home / "nanochatAquaRat" / ".env"
    assert env_file.stat().st_mode & 0o777 == 0o600 and env_file.read_text() == f'WANDB_API_KEY="{SECRET}"\nPAUSE="1"\n'
    record = records()[0]
    fetched = record.folder / "artifacts"
    assert (fetched / "report" / "key.txt").read_text().strip() == hashlib.sha256(SECRET.encode()).hexdigest()
    assert sorted(path.name for path in (fetched / "base_checkpoints" / "d2").iterdir()) == ["meta_000004.json", "model_000004.pt"]
    theirs = machine.home / ".cache" / "nanochat" / "base_checkpoints" / "d2" / "model_000004.pt"
    assert (fetched / "base_checkpoints" / "d2" / "model_000004.pt").read_bytes() == theirs.read_bytes() and not (fetched / "base_data").exists()
    assert (fetched / "training.log").read_text() == (record.folder / "training.log").read_text()
    assert (record.state, record.kind, record.cents_per_hour, record.id) == ("terminated", "gpu_1x_a10", 75, cloud.launched[0]) and record.cost > 0
    # nobody can read a secret: not in command lines, not in the request, not in what is printed or kept
    places = {"argv": "\n".join(eyes.seen), "output": out, "request": json.dumps(cloud.calls), **texts_below(here / "base"), **texts_below(machine.home / ".nanochat-cloud")}
    assert any("tmux" in line for line in eyes.seen) and any("ssh " in line for line in eyes.seen)
    for secret in (SECRET, "secret-api-key"):
        assert not [place for place, text in places.items() if secret in text], secret
    assert (record.folder / "known_hosts").read_text().startswith(f"[127.0.0.1]:{machine.port} ssh-ed25519")
    body = cloud.bodies("launch")[0]
    assert body["name"] == record.name and body["ssh_key_names"] == ["laptop"] and body["user_data"].startswith("#cloud-config")


@needs_sshd
def test_a_detached_run_is_found_attached_to_watched_and_terminated(here, cloud, machine, capsys):
    assert launch_lambda_training.main(config_for(cloud, machine, auto_start=True, detach=True, env=("PAUSE=2",))) == 0
    out = capsys.readouterr().out
    assert "TRAINING RUNS" in out and "GOES ON at $0.75 an hour" in out and "--watch" in out and cloud.left_running == cloud.launched
    record = records()[0]
    assert record.state == "detached"
    assert launch_lambda_training.main(config_for(cloud, status=True)) == 0
    out = capsys.readouterr().out
    assert record.name in out and "detached" in out and "$0.75 an hour" in out
    attach = launch.machine_of(launch.Job(None, None, None, record)).attach_command(record.session, record.tmux_socket)
    assert attach[:2] == ["ssh", "-t"] and attach[-1] == f"tmux -L {machine.socket} attach -t =nanochat-train"
    assert launch_lambda_training.main(config_for(cloud, machine, watch="only")) == 0
    assert not cloud.left_running and (record.folder / "artifacts" / "report" / "key.txt").exists()
    assert "base step 4/4" in machine.tmux("capture-pane", "-p", "-t", "nanochat-train").stdout  # the window outlives the run


@needs_sshd
@pytest.mark.parametrize("branch", ["", "main", "v1", "commit"])
def test_a_url_is_cloned_at_a_branch_a_tag_or_a_commit(here, cloud, machine, branch, tmp_path):
    bare = tmp_path / "bare.git"
    subprocess.run(["git", "clone", "-q", "--bare", str(shipping.ROOT), str(bare)], check=True)
    subprocess.run(["git", "-C", str(bare), "tag", "v1"], check=True)
    commit = subprocess.run(["git", "-C", str(bare), "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
    config = config_for(cloud, machine, auto_start=True, repo_url=f"file://{bare}", branch=commit if branch == "commit" else branch, artifacts="none", detach=True)
    assert launch_lambda_training.main(config) == 0
    assert (machine.home / "nanochatAquaRat" / "committed.txt").read_text() == "old\n" and commit in records()[0].source
    assert launch_lambda_training.main(config_for(cloud, terminate="only")) == 0 and not cloud.left_running


# Whatever goes wrong there, the instance is terminated

def kill_the_window(cloud, machine):
    machine.tmux("kill-server")


def change_the_host_key(cloud, machine):
    machine.change_host_key()


def cut_the_network(cloud, machine):
    machine.stop()


def preempt(cloud, machine):
    cloud.after = "preempted"


def lose_the_instance(cloud, machine):
    next(iter(cloud.all.values()))["status"] = "gone"


def send_a_signal(number):
    def act(cloud, machine):
        os.kill(os.getpid(), number)
    return act


THERE = {  # name -> (changes of the config, what happens when training runs, exit status, a word of the output)
    "the run fails": ({"env": ("EXIT=7",)}, None, 7, "ended with status 7"),
    "the run fails before any training line": ({"env": ("EXIT=9", "SILENT=1")}, None, 9, "no training line"),
    "the window is killed": ({"env": ("PAUSE=300",)}, kill_the_window, 1, "has vanished"),
    "another host key": ({"env": ("PAUSE=300",)}, change_the_host_key, 1, "another host key"),
    "the network is cut": ({"env": ("PAUSE=300",)}, cut_the_network, 1, "no connection to the machine"),
    "preempted": ({"env": ("PAUSE=300",)}, preempt, 1, "is preempted"),
    "deadline": ({"env": ("PAUSE=300",), "max_hours": 0.04}, None, 1, "deadline"),
    "idle": ({"env": ("PAUSE=300",), "idle_minutes": 1}, None, 1, "idle for"),
    "no training line": ({"env": ("SILENT=1", "PAUSE=300"), "start_minutes": 1.5}, None, 1, "no training line within"),
    "no such script": ({"repo_url": "HERE", "run_script": "other.sh"}, None, 1, "does not exist"),
    "no such branch": ({"repo_url": "HERE", "branch": "nowhere"}, None, 1, "could not clone"),
    "terminal closed": ({"env": ("PAUSE=300",)}, send_a_signal(signal.SIGHUP), 129, "interrupted by SIGHUP"),
    "Ctrl-C": ({"env": ("PAUSE=300",)}, send_a_signal(signal.SIGINT), 130, "interrupted by SIGINT"),
}


@needs_sshd
@pytest.mark.parametrize("failure", THERE)
def test_an_instance_is_terminated_when(failure, here, cloud, machine, capsys, monkeypatch):
    changes, event, status, words = THERE[failure]
    if changes.get("repo_url"):
        changes = {**changes, "repo_url": f"file://{shipping.ROOT}"}
    if event:
        plain = session.say

        def say(text=""):
            plain(text)
            if text.startswith("TRAINING RUNS"):
                event(cloud, machine)
        monkeypatch.setattr(session, "say", say)
    assert launch_lambda_training.main(config_for(cloud, machine, auto_start=True, **{"artifacts": "report", **changes})) == status
    out = capsys.readouterr().out
    assert words in out and len(cloud.launched) == 1 and not cloud.left_running and records()[0].state == "terminated"
    if failure in ("the run fails", "idle", "Ctrl-C"):
        assert (records()[0].folder / "artifacts" / "training.log").exists()


@needs_sshd
def test_an_instance_that_vanished_is_not_waited_for(here, cloud, machine, capsys, monkeypatch):
    plain = session.say
    monkeypatch.setattr(session, "say", lambda text="": (plain(text), text.startswith("TRAINING RUNS") and lose_the_instance(cloud, machine)))
    assert launch_lambda_training.main(config_for(cloud, machine, auto_start=True, env=("PAUSE=300",), artifacts="none")) == 1
    assert "is no longer in lambda's list" in capsys.readouterr().out


@needs_sshd
def test_a_short_loss_of_the_network_is_survived(here, cloud, machine, capsys, monkeypatch):
    plain, events = session.say, []

    def say(text=""):
        plain(text)
        if text.startswith("TRAINING RUNS"):
            machine.stop()
            events.append("cut")
            cloud.faults["list"] = [500, "drop", 429, "garbage"]
        elif text.startswith("no contact") and events == ["cut"]:
            events.append("back")
            machine.start()
    monkeypatch.setattr(session, "say", say)
    assert launch_lambda_training.main(config_for(cloud, machine, auto_start=True, env=("PAUSE=1",), artifacts="report")) == 0
    assert events == ["cut", "back"] and not cloud.left_running and "base step 4/4" in capsys.readouterr().out


# Whatever goes wrong at the API

HERE = {  # name -> (faults, options of the cloud, exit status, how many may have been launched)
    "wrong key": ({"types": [401]}, {}, 1, 0),
    "launch refused": ({"launch": [403]}, {}, 1, 0),
    "no capacity anywhere": ({"launch": ["capacity"] * 9}, {}, 1, 0),
    "types fail for good": ({"types": [500] * 99}, {}, 1, 0),
    "launch answer lost": ({"launch": ["drop-after"]}, {}, 1, 1),
    "launch answer lost, and the instance appears late": ({"launch": ["drop-after"]}, {"unknown": 4}, 1, 1),
    "launch answer is garbage": ({"launch": ["garbage"]}, {}, 1, 1),
    "launch dropped before it was done": ({"launch": ["drop"]}, {}, 1, 1),
    "launch 500": ({"launch": [500]}, {}, 1, 1),
    "launch 409 internal error": ({"launch": [409]}, {}, 1, 1),
    "launch dropped three times": ({"launch": ["drop"] * 3}, {}, 1, 0),
    "launch answer lost, terminate fails at first": ({"launch": ["drop-after"], "terminate": [500, "drop", 429, "garbage", "drop-after"]}, {}, 1, 1),
    "too many requests": ({"types": [429], "launch": [429, 429], "list": [429, 429], "terminate": [429]}, {}, 1, 1),
    "lists fail": ({"list": [500, "drop", "garbage", 503]}, {}, 1, 1),
    "unhealthy": ({}, {"after": "unhealthy"}, 1, 1),
    "preempted": ({}, {"after": "preempted"}, 1, 1),
    "never known": ({}, {"unknown": 30}, 1, 1),
    "never active": ({}, {"booting": 10**9}, 1, 1),
    "no one answers ssh": ({}, {}, 1, 1),
}


@pytest.mark.parametrize("failure", HERE)
def test_no_instance_is_left_when(failure, here, capsys):
    faults, options, status, most = HERE[failure]
    with FakeLambda(**options) as cloud:
        cloud.faults = {name: list(some) for name, some in faults.items()}
        assert launch_lambda_training.main(config_for(cloud, auto_start=True, max_wait_minutes=1.5)) == status
    assert len(cloud.launched) <= most and not cloud.left_running, cloud.names()
    assert all(record.state in ("terminated", "refused", "planned") for record in records())
    assert "secret-api-key" not in capsys.readouterr().out
    names = {body["name"] for body in cloud.bodies("launch")}
    assert len(names) <= 1  # asked again only under the name by which the first would be found


def test_an_instance_that_cannot_be_terminated_is_named_loudly_and_found_later(here, capsys):
    with FakeLambda(after="unhealthy") as cloud:
        cloud.faults = {"terminate": [500] * 1000}
        assert launch_lambda_training.main(config_for(cloud, auto_start=True, terminate_minutes=1)) == 3
        out = capsys.readouterr().out
        id = cloud.launched[0]
        line = next(line for line in out.splitlines() if line.startswith("terminate it:"))
        assert "MAY STILL BE RUNNING AND BILLING" in out and f"--terminate {id}" in line and records()[0].state == "rented"
        # the printed command works once the API does
        cloud.faults = {}
        assert launch_lambda_training.main(parse(Config, line.split("launch_lambda_training")[1].split() + ["--settle-seconds=20", "--poll-seconds=8"])) == 0
        assert not cloud.left_running and records()[0].state == "terminated"


def test_an_id_that_the_api_gave_out_and_never_lists_is_not_called_terminated(here, capsys):
    with FakeLambda(unknown=10**9) as cloud:
        assert launch_lambda_training.main(config_for(cloud, auto_start=True, max_wait_minutes=1.5, terminate_minutes=1)) == 3
        assert f"--terminate {cloud.launched[0]}" in capsys.readouterr().out and records()[0].is_open


def test_a_refused_key_ends_the_terminating_at_once_with_the_command(here, capsys):
    with FakeLambda() as cloud:
        cloud.on_call = lambda name: name == "launch" and cloud.faults.update(list=[401] * 1000, terminate=[401] * 1000)
        assert launch_lambda_training.main(config_for(cloud, auto_start=True)) == 3
        assert cloud.names().count("list") <= 3 and f"--terminate {cloud.launched[0]}" in capsys.readouterr().out


def test_an_orphan_of_a_killed_launcher_is_found_by_its_name(here, cloud, capsys):
    """Killed between the request and its answer: the record holds a name and no id."""
    record = ledger.new_record("lambda", cloud.url, "nanochat-train", kind="gpu_1x_a10", region="us-west-1", cents_per_hour=75)
    record.save(state="requesting", pid=2**22 - 1, requested_at=time.time() - 3600)
    cloud.do_launch({"region_name": "us-west-1", "instance_type_name": "gpu_1x_a10", "ssh_key_names": ["laptop"], "name": record.name})
    cloud.do_launch({"region_name": "us-west-1", "instance_type_name": "gpu_1x_a10", "ssh_key_names": ["laptop"], "name": "a colleague's"})
    cloud.age(), cloud.age()
    assert launch_lambda_training.main(config_for(cloud, status=True)) == 3
    out = capsys.readouterr().out
    assert "ORPHAN" in out and "about $0.75" in out and "a colleague's" in out and "not rented from here" in out
    assert launch_lambda_training.main(config_for(cloud, terminate="all")) == 0
    assert cloud.terminated == cloud.launched[:1]  # the colleague's goes on
    assert launch_lambda_training.main(config_for(cloud, status=True)) == 0
    # a request of a minute ago that the list does not show yet is no proof of anything
    ledger.new_record("lambda", cloud.url, "young").save(state="requesting", pid=2**22 - 1)
    assert launch_lambda_training.main(config_for(cloud, status=True)) == 3
    ledger.new_record("lambda", cloud.url, "old").save(state="requesting", pid=2**22 - 1, requested_at=time.time() - 7200)
    assert launch_lambda_training.main(config_for(cloud, status=True)) == 3
    assert [record.state for record in records()] == ["terminated", "terminated", "requesting"]


@needs_sshd
def test_a_second_instance_under_our_name_is_terminated_too(here, cloud, machine, monkeypatch):
    plain = session.say

    def say(text=""):
        plain(text)
        if text.startswith("TRAINING RUNS"):  # the first request, which seemed lost, is carried out after all
            cloud.do_launch({**cloud.bodies("launch")[0]})
    monkeypatch.setattr(session, "say", say)
    assert launch_lambda_training.main(config_for(cloud, machine, auto_start=True, env=("PAUSE=2",), artifacts="none")) == 0
    assert len(cloud.launched) == 2 and not cloud.left_running


def test_a_ledger_that_cannot_be_written_rents_nothing(here, cloud, monkeypatch):
    monkeypatch.setattr(ledger, "write_atomic", lambda *arguments: (_ for _ in ()).throw(OSError("No space left on device")))
    assert launch_lambda_training.main(config_for(cloud, auto_start=True)) == 1
    assert cloud.launched == []


def test_the_record_is_on_disk_before_the_request_and_a_full_disk_after_it_is_no_leak(here, cloud, monkeypatch):
    seen, write = [], ledger.write_atomic

    def on_call(name):
        if name == "launch":
            seen.append(records()[0].state)
            monkeypatch.setattr(ledger, "write_atomic", lambda *arguments: (_ for _ in ()).throw(OSError("No space left on device")))
    cloud.on_call = on_call
    assert launch_lambda_training.main(config_for(cloud, auto_start=True)) == 1
    monkeypatch.setattr(ledger, "write_atomic", write)
    assert seen == ["requesting"] and len(cloud.launched) == 1 and not cloud.left_running


# Ctrl-C at any moment

@pytest.fixture
def importable(monkeypatch):
    """The server that forks the launchers finds our packages, although it starts in another folder."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]))


def run_in_child(config, root, base, output):
    """The launcher as a process of its own, quick, its output in a file."""
    os.environ.update(NANOCHAT_BASE_DIR=base, LAMBDA_API_KEY="secret-api-key")
    os.chdir(root)
    Signals.scale, shipping.ROOT = SCALE, Path(root)
    with open(output, "w", buffering=1) as file:
        sys.stdout = file
        sys.exit(launch_lambda_training.main(config))


def interrupt_after(delay, here, machine, signals, terminate_works=True):
    """Start a launch, send it `signals` after `delay` seconds -> (the fake, exit status, output)."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["scripts.launch_lambda_training", "tests.test_launch_lambda"])
    machine.wipe()
    output = here / "output.txt"
    output.write_text("")
    with FakeLambda(unknown=2) as cloud:
        if not terminate_works:
            cloud.faults["terminate"] = [500] * 10_000
        config = config_for(cloud, machine, auto_start=True, env=("PAUSE=300",), artifacts="report", terminate_minutes=10 if terminate_works else 0.7)
        child = context.Process(target=run_in_child, args=(config, str(shipping.ROOT), str(here / "base"), str(output)))
        child.start()
        began = time.monotonic()
        while "its record" not in output.read_text() and time.monotonic() - began < 300 and child.is_alive():
            time.sleep(0.01)
        time.sleep(delay)
        for number in signals:
            with contextlib.suppress(ProcessLookupError):  # it was quick to end
                os.kill(child.pid, number)
            time.sleep(0.05)
        child.join(300)
        if child.is_alive():
            child.kill()
        assert child.exitcode is not None, output.read_text()
    return cloud, child.exitcode, output.read_text()


def assert_nothing_is_left(cloud, status, out):
    """Terminated, or on record with the command printed. Who stops the terminating itself is told so even where it had worked already."""
    open_records = {record.id or record.name for record in records() if record.is_open and record.api_url == cloud.url}
    assert set(cloud.left_running) <= open_records and all(f"--terminate {name}" in out for name in open_records), out
    assert status == (3 if open_records else 130), out


@needs_sshd
def test_ctrl_c_at_random_moments_leaves_nothing_behind(here, machine, importable):
    moments = random.Random(2026)
    for _ in range(8):
        cloud, status, out = interrupt_after(moments.uniform(0, 4) ** 1.5 / 4, here, machine, [signal.SIGINT])
        assert not cloud.left_running, out
        assert_nothing_is_left(cloud, status, out)
    for _ in range(2):
        assert_nothing_is_left(*interrupt_after(moments.uniform(0, 3), here, machine, [signal.SIGINT], terminate_works=False))


@needs_sshd
@pytest.mark.slow
def test_ctrl_c_and_impatience_at_many_moments_leave_nothing_unsaid(here, machine, importable):
    moments = random.Random(7)
    for turn in range(60):
        signals = [signal.SIGINT] * moments.choice([1, 1, 2, 5])
        assert_nothing_is_left(*interrupt_after(moments.uniform(0, 4), here, machine, signals, terminate_works=turn % 4 > 0))


# Choosing

def test_the_list_shows_prices_in_dollars_and_where_there_is_capacity(here, cloud, capsys):
    assert launch_lambda_training.main(config_for(cloud, list=True)) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["gpu_1x_a10", "1", "us-west-1", "0.75", "0.75", "yes"] in [line[:6] for line in lines]
    assert ["gpu_8x_h100_sxm5", "8", "us-south-1", "23.92", "2.99", "yes"] in [line[:6] for line in lines]
    assert ["gpu_8x_a100", "8", "-", "10.32", "1.29", "no"] in [line[:6] for line in lines]


def test_a_dry_run_names_price_code_and_variables_and_rents_nothing(here, cloud, capsys):
    assert launch_lambda_training.main(config_for(cloud, dry_run=True, auto_start=True, max_hours=10)) == 0
    out = capsys.readouterr().out
    assert "$0.75 an hour" in out and "at most $7.50" in out and "PAUSE, WANDB_API_KEY" in out and "changed files" in out and SECRET not in out
    assert set(cloud.names()) == {"types", "keys"} and records() == []


def test_a_price_above_the_limit_is_refused_with_both_numbers(here, cloud):
    with pytest.raises(ValueError, match=r"max_price=\$0.74 an hour for the whole instance.*\$0.75 an hour"):
        launch_lambda_training.main(config_for(cloud, max_price=0.74))
    assert launch_lambda_training.main(config_for(cloud, max_price=0.75, dry_run=True)) == 0


def test_regions_are_tried_in_order_and_capacity_is_waited_for(here, cloud, capsys):
    cloud.types["gpu_1x_a10"] = instance_type("gpu_1x_a10", 75, 1, ["us-west-1", "us-east-1", "asia-south-1"])
    cloud.faults["launch"] = ["capacity", "capacity"]
    assert launch_lambda_training.main(config_for(cloud, region="us-east-1", fallback_regions=("us-west-1", "any"), skip_wait=True)) == 0
    assert [body["region_name"] for body in cloud.bodies("launch")] == ["us-east-1", "us-west-1", "asia-south-1"]
    assert cloud.left_running == cloud.launched and "GOES ON" in capsys.readouterr().out and records()[0].state == "detached"
    looks = []

    def on_call(name):
        looks.append(name)
        if looks.count("types") == 3:
            cloud.types["gpu_8x_a100"] = instance_type("gpu_8x_a100", 1032, 8, ["us-west-1"])
    cloud.on_call = on_call
    assert launch_lambda_training.main(config_for(cloud, instance_type="gpu_8x_a100", capacity_minutes=5, skip_wait=True)) == 0
    assert cloud.bodies("launch")[-1]["instance_type_name"] == "gpu_8x_a100"


@pytest.mark.parametrize("changes, words", [
    ({"quantity": 2}, "one instance"), ({"image_id": "a", "image_family": "b"}, "one of them"), ({"instance_type": "gpu_9x"}, "not one of the 3 types"),
    ({"ssh_key_name": "other"}, "laptop"), ({"repo_url": "git@github.com:me/mine.git"}, "https://github.com/me/mine.git"),
    ({"repo_url": "https://token@github.com/me/mine.git"}, "process lists"), ({"repo_dir": "x; rm -rf ~"}, "repo_dir"), ({"repo_dir": "../x"}, "repo_dir"),
    ({"run_script": "$(id)"}, "run_script"), ({"tmux_session": "a b"}, "tmux_session"), ({"inject_env": ("NOT_SET_ANYWHERE",)}, "NOT_SET_ANYWHERE"),
    ({"env": ("A=1\nB=2",)}, "several lines"), ({"run_script": "missing.sh", "auto_start": True}, "does not exist"), ({"max_hours": 0}, "max_hours"),
    ({"api_url": "http://example.com"}, "https"), ({"commit": "nonsense"}, "git rev-parse"), ({"artifacts": "some"}, "none, report, weights, all"),
    ({"ssh_key": "no/such/file"}, "does not exist"), ({"start_pattern": "("}, "regular expression"), ({"branch": "--upload-pack=x"}, "branch")])
def test_what_is_wrong_is_said_before_anything_is_rented(changes, words, here, cloud):
    with pytest.raises(ValueError, match=words):
        launch_lambda_training.main(config_for(cloud, **changes))
    assert cloud.launched == []


def test_without_a_key_the_launcher_says_where_to_get_one(here, cloud, monkeypatch):
    monkeypatch.delenv("LAMBDA_API_KEY")
    assert launch_lambda_training.main(config_for(cloud, list=True)) == 0  # .env has one
    Path(".env").unlink()
    with pytest.raises(ValueError, match="LAMBDA_API_KEY is not set"):
        launch_lambda_training.main(config_for(cloud, list=True))


def test_user_data_is_plain_cloud_config_without_secrets(capsys):
    import yaml
    assert launch_lambda_training.main(Config(print_user_data=True)) == 0
    out = capsys.readouterr().out
    assert out.startswith("#cloud-config\n") and set(yaml.safe_load(out)) == {"package_update", "packages"}


def test_terminate_without_a_value_means_the_only_rental(here, cloud):
    assert bare_flags(["--terminate", "--api-url", "x"], "--terminate") == ["--terminate=only", "--api-url", "x"]
    assert bare_flags(["--attach"], "--attach") == ["--attach=only"] and bare_flags(["--terminate", "abc"], "--terminate") == ["--terminate", "abc"]
    assert launch_lambda_training.main(config_for(cloud, terminate="only")) == 1
    assert launch_lambda_training.main(config_for(cloud, terminate="nonsense")) == 1


def test_the_seeds_flags_are_all_understood():
    flags = ("--ssh-key-name=a --instance-type=b --region=c --auto-start --inject-env NAME --api-key=k --quantity=1 --name=n --repo-url=https://h/o/r --branch=b --repo-dir=d "
             "--run-script=r.sh --tmux-session=t --env A=1 --env B=2 --env-file-name=.env --image-id=i --image-family=f --max-wait-minutes=25 --poll-seconds=20 --skip-wait "
             "--no-user-data --print-user-data --list --dry-run --max-price=2 --terminate=x --status --attach=y")
    config = parse(Config, flags.split())
    assert config.inject_env == ("NAME",) and config.env == ("A=1", "B=2") and (Config().max_wait_minutes, Config().poll_seconds) == (25, 20)
    assert parse(Config, ["--env=A=1", "--env=B=2"]).env == ("A=1", "B=2")


def test_the_short_form_starts_by_itself_with_one_key(here, cloud, monkeypatch, capsys):
    sys.path.insert(0, str(ROOT))
    import launch_lambda
    seen = []
    monkeypatch.setattr(launch_lambda.launch_lambda_training, "carry_out", lambda Cloud, config, key: seen.append(config) or 0)
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    assert launch_lambda.main(parse(launch_lambda.Config, ["--instance-type", "gpu_8x_h100_sxm5", "--region", "us-west-1", "--name", "n"])) == 0
    assert launch_lambda.main(parse(launch_lambda.Config, ["--no-deploy", "--list-types"])) == 0
    assert seen[0].auto_start and seen[0].inject_env == ("WANDB_API_KEY",) and seen[0].region == "us-west-1" and seen[0].ssh_key_name == ""
    assert seen[1].list and not seen[1].auto_start and seen[1].no_deploy


def test_a_training_line_is_what_our_logger_prints_and_a_stage_announced_is_not(capsys):
    from nanochat.run_logger import PlainLines
    PlainLines("base", 900).show(0, {"train/loss": 6.9})
    pattern = re.compile(Config().start_pattern, re.MULTILINE)
    assert pattern.search("\n== train-base\n" + capsys.readouterr().out)
    assert not pattern.search("\n== train-base: python -m scripts.base_train --depth=4\n== tokenizer: 3 s\nstep by step\n")


# The client

@pytest.fixture
def client(cloud, monkeypatch):
    monkeypatch.setattr(Signals, "scale", SCALE)
    with Signals() as signals:
        yield api.Api(cloud.url, cloud.key, signals)


@pytest.mark.parametrize("faults", [[429], [500, 503], ["drop", "drop"], ["garbage"], [409]])
def test_a_passing_failure_is_repeated_and_a_renting_request_is_not(faults, client, cloud):
    cloud.faults["list"] = list(faults)
    assert client.call("GET", "/api/v1/instances") == {"data": []} and cloud.names().count("list") == len(faults) + 1
    body = {"region_name": "us-west-1", "instance_type_name": "gpu_1x_a10", "ssh_key_names": ["laptop"], "name": "n"}
    cloud.faults["launch"] = list(faults)
    if faults == [429]:  # which says for certain that nothing was done
        assert client.call("POST", "/api/v1/instance-operations/launch", body, once=True)["data"]["instance_ids"]
    else:
        with pytest.raises(api.NoAnswer):
            client.call("POST", "/api/v1/instance-operations/launch", body, once=True)
        assert cloud.names().count("launch") == 1 and cloud.launched == []


def test_a_refusal_carries_its_code_and_no_key(client, cloud):
    cloud.faults["list"] = [403]
    with pytest.raises(api.Refused) as caught:
        client.call("GET", "/api/v1/instances")
    assert (caught.value.status, caught.value.code) == (403, "global/account-inactive") and cloud.key not in str(caught.value) and "***" in str(caught.value)


def test_a_server_that_is_not_there_is_asked_again_even_for_renting(monkeypatch):
    monkeypatch.setattr(Signals, "scale", 0.001)
    with Signals() as signals:
        with pytest.raises(api.NoAnswer, match=r"attempt ([2-9]|\d\d)"):
            api.Api("http://127.0.0.1:9", "k", signals).call("POST", "/x", {}, once=True)


@pytest.mark.parametrize("url", ["http://cloud.lambda.ai", "ftp://127.0.0.1", "cloud.lambda.ai", "https://", "http://127.0.0.1.example.com"])
def test_the_key_never_travels_in_the_open(url):
    with pytest.raises(ValueError, match="in the open"):
        api.checked_url(url)


def test_a_netrc_cannot_replace_the_key(client, cloud, tmp_path, monkeypatch):
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login other password other\n")
    (tmp_path / ".netrc").chmod(0o600)
    monkeypatch.setenv("NETRC", str(tmp_path / ".netrc"))
    assert client.call("GET", "/api/v1/instances") == {"data": []}


def test_each_command_of_the_guide_is_understood():
    text = (ROOT / "LAMBDA_MANUAL_SETUP.md").read_text(encoding="utf-8")
    commands = [shlex.split(line.strip(), comments=True) for line in text.splitlines() if line.strip().startswith("python -m scripts.launch_lambda_training")]
    assert len(commands) >= 8
    for command in commands:
        parse(Config, bare_flags(command[3:], "--terminate", "--attach", "--watch"))
    for flag, default in re.findall(r"`--([a-z-]+-(?:minutes|hours))=(\d+)`", text):
        assert getattr(Config(), flag.replace("-", "_")) == int(default), flag
    assert Config().repo_dir == "nanochatAquaRat" and f"tmux attach -t {Config().tmux_session}" in text and f"tail -f ~/{Config().repo_dir}/training.log" in text
