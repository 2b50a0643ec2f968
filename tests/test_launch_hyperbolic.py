"""The Hyperbolic launcher against a fake marketplace and a real sshd: cents, taken nodes, answers in three shapes, and nothing left behind."""
import time
from dataclasses import replace

import pytest

from nanochat.cloud import ledger, shipping
from nanochat.cloud.signals import Signals
from nanochat.configurator import parse
from scripts import launch_hyperbolic_training
from scripts.launch_hyperbolic_training import Config
from tests.cloud import QUICK, SCALE, SECRET, Eyes, texts_below, tiny_repository
from tests.fakes.hyperbolic import FakeHyperbolic, node
from tests.fakes.sshd import MISSING, Sshd

needs_sshd = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (apt-get install openssh-server tmux)")


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("HYPERBOLIC_API_KEY", "secret-api-key")
    for name in ("HYPERBOLIC_REGION", "HYPERBOLIC_MAX_PRICE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Signals, "scale", SCALE)
    monkeypatch.setattr(shipping, "ROOT", tiny_repository(tmp_path / "repository"))
    monkeypatch.chdir(shipping.ROOT)
    return tmp_path


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Sshd(tmp_path_factory.mktemp("sshd")) as machine:
        yield machine


@pytest.fixture
def cloud():
    with FakeHyperbolic(ssh_command="ssh nobody@127.0.0.1 -p 1") as fake:
        yield fake


def config_for(cloud, **changes):
    return replace(Config(api_url=cloud.url, run_script="run.sh", gpu_count=2), **{**QUICK, **changes})


def records():
    return ledger.read_records("hyperbolic")


@needs_sshd
@pytest.mark.parametrize("shape", ["instance_id", "instance_name", "nothing"])
def test_it_trains_there_fetches_and_terminates_whatever_the_answer_looks_like(shape, here, server, capsys):
    server.wipe()
    with Eyes() as eyes, FakeHyperbolic(ssh_command=f"ssh {server.user}@127.0.0.1 -p {server.port}", shape=shape) as cloud:
        config = config_for(cloud, ssh_key=str(server.key), tmux_socket=server.socket, auto_start=True, artifacts="report")
        assert launch_hyperbolic_training.main(config) == 0
    out = capsys.readouterr().out
    assert len(cloud.launched) == 1 and not cloud.left_running and cloud.all["someone-elses"]["status"] == "online"
    assert out.index("base step 2/4") < out.index("TRAINING RUNS") < out.index("terminated, verified")
    assert cloud.bodies("create") == [{"cluster_name": "cluster-cheap", "node_name": "cheap", "gpu_count": 2}]
    assert (records()[0].state, records()[0].cents_per_hour, records()[0].session) == ("terminated", 440, "training")
    assert (records()[0].folder / "artifacts" / "report" / "key.txt").exists()
    places = {"argv": "\n".join(eyes.seen), "output": out, **texts_below(here / "base")}
    assert not [place for place, text in places.items() if SECRET in text or "secret-api-key" in text]


FAILURES = {  # name -> (faults, options, exit status, how many may have been launched)
    "wrong key": ({"balance": [401]}, {}, 1, 0),
    "no capacity": ({"create": ["capacity"]}, {}, 1, 0),
    "create answer lost": ({"create": ["drop-after"]}, {}, 1, 1),
    "create answer lost, appears late": ({"create": ["drop-after"]}, {"unknown": 4}, 1, 1),
    "create answer lost, terminate fails at first": ({"create": ["drop-after"], "terminate": [500, "drop", 429, "garbage"]}, {}, 1, 1),
    "create dropped before it was done": ({"create": ["drop"]}, {}, 1, 0),
    "create 500": ({"create": [500]}, {}, 1, 0),
    "garbage": ({"create": ["garbage"]}, {}, 1, 0),
    "too many requests": ({"market": [429], "create": [429], "list": [429], "terminate": [429]}, {}, 1, 1),
    "never online": ({}, {"starting": 10**9}, 1, 1),
    "never known": ({}, {"unknown": 30}, 1, 1),
    "fails": ({}, {"after": "failed"}, 1, 1),
    "no one answers ssh": ({}, {}, 1, 1),
    "strange address": ({}, {"ssh_command": "ssh -oProxyCommand=id x"}, 1, 1),
    "an id that is not the list's": ({}, {"shape": "nothing"}, 1, 1),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_no_rental_is_left_when(failure, here):
    faults, options, status, most = FAILURES[failure]
    with FakeHyperbolic(**{"ssh_command": "ssh nobody@127.0.0.1 -p 1", **options}) as cloud:
        cloud.faults = {name: list(some) for name, some in faults.items()}
        assert launch_hyperbolic_training.main(config_for(cloud, auto_start=True, max_wait_minutes=1.5)) == status
    assert len(cloud.launched) <= most and len(cloud.bodies("create")) <= 1 + (failure == "too many requests"), cloud.names()
    assert not cloud.left_running and "someone-elses" not in cloud.terminated and cloud.all["someone-elses"]["status"] == "online"
    assert all(not record.is_open for record in records())


def test_what_cannot_be_told_from_another_rental_is_named_and_not_touched(here, capsys):
    """The answer is lost, and at the same moment someone else of the account rents on the same node."""
    with FakeHyperbolic() as cloud:
        cloud.faults["create"] = ["drop-after"]

        def on_call(name):
            if name == "create":
                cloud.stranger("a-colleagues", "cheap", looks=0)
                cloud.all["a-colleagues"].update(gpu_count=2, start="2099-01-01T00:00:00Z")
        cloud.on_call = on_call
        assert launch_hyperbolic_training.main(config_for(cloud, auto_start=True)) == 3
        out = capsys.readouterr().out
        assert cloud.terminated == [] and "MAY STILL BE RUNNING" in out and "a-colleagues" in out and cloud.launched[0] in out
        assert records()[0].is_open
        # the id that the user recognises is terminated by hand
        assert launch_hyperbolic_training.main(config_for(cloud, terminate=cloud.launched[0])) == 0
        assert cloud.terminated == cloud.launched


def test_a_rental_whose_create_was_never_answered_is_found_by_its_node_later(here, capsys):
    with FakeHyperbolic(unknown=0) as cloud:
        record = ledger.new_record("hyperbolic", cloud.url, "nanochat-train", kind="H100", node="cheap", gpus=2, cents_per_hour=440, known_before=["someone-elses"])
        record.save(state="requesting", pid=2**22 - 1, requested_at=time.time() - 60)
        cloud.do_create({"cluster_name": "cluster-cheap", "node_name": "cheap", "gpu_count": 2})
        assert launch_hyperbolic_training.main(config_for(cloud, status=True)) == 3
        out = capsys.readouterr().out
        assert "ORPHAN" in out and cloud.launched[0] in out and "someone-elses" in out and "not rented from here" in out
        assert launch_hyperbolic_training.main(config_for(cloud, terminate=record.name)) == 0
        assert cloud.terminated == cloud.launched and cloud.all["someone-elses"]["status"] == "online"


def test_the_list_needs_no_key_and_shows_dollars_for_the_whole_rental(here, cloud, capsys, monkeypatch):
    monkeypatch.delenv("HYPERBOLIC_API_KEY")
    cloud.nodes.append({"id": "no-price"})
    assert launch_hyperbolic_training.main(config_for(cloud, list=True, gpu_count=8)) == 0
    rows = {line.split("node ")[1].split()[0]: line.split() for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["cheap"][1:6] == ["8", "us-central-1", "17.60", "2.20", "yes"] and rows["cheap"][6:8] == ["80", "GB"]
    assert {name: row[5] for name, row in rows.items()} == {"cheap": "yes", "dear": "yes", "taken": "no", "down": "no", "full": "no"}
    with pytest.raises(ValueError, match="HYPERBOLIC_API_KEY is not set"):
        launch_hyperbolic_training.main(config_for(cloud))


def test_max_price_counts_dollars_an_hour_for_all_gpus_together(here, cloud, monkeypatch):
    assert launch_hyperbolic_training.main(config_for(cloud, max_price=4.5, dry_run=True)) == 0
    with pytest.raises(ValueError, match=r"max_price=\$4.39 an hour for the whole instance.*\$4.40"):
        launch_hyperbolic_training.main(config_for(cloud, max_price=4.39, dry_run=True))
    monkeypatch.setenv("HYPERBOLIC_MAX_PRICE", "1")
    with pytest.raises(ValueError, match=r"max_price=\$1.00"):
        launch_hyperbolic_training.main(config_for(cloud, dry_run=True))
    assert cloud.launched == []


@pytest.mark.parametrize("changes, chosen", [({}, "cheap"), ({"supplier": "other"}, "elsewhere"), ({"region": "eu-north-9"}, "elsewhere"), ({"gpu_model": "a100"}, "old"),
                                             ({"node_name": "dear"}, "dear"), ({"cluster_name": "cluster-dear"}, "dear"), ({"gpu_count": 8}, "cheap"),
                                             ({"region": "eu-north-9", "gpu_count": 8, "fallback_regions": ("any",)}, "cheap")])
def test_filters_choose_and_the_cheapest_wins(changes, chosen, here, cloud, capsys):
    cloud.nodes += [node("elsewhere", 500, gpus=4, free=4, region="eu-north-9", supplier="other"), node("old", 240, model="NVIDIA-A100")]
    assert launch_hyperbolic_training.main(config_for(cloud, skip_wait=True, **changes)) == 0
    assert [body["node_name"] for body in cloud.bodies("create")] == [chosen] and records()[0].node == chosen


@pytest.mark.parametrize("changes, words", [({"region": "us-east"}, "us-central-1"), ({"supplier": "nobody"}, "acme"), ({"gpu_model": "B200"}, "NVIDIA-H100"), ({"gpu_count": 0}, "at least 1")])
def test_a_name_that_does_not_exist_is_answered_with_those_that_do(changes, words, here, cloud):
    with pytest.raises(ValueError, match=words):
        launch_hyperbolic_training.main(config_for(cloud, **changes))


def test_an_account_without_credit_or_key_rents_nothing(here, cloud, capsys):
    cloud.credits = 0
    with pytest.raises(ValueError, match=r"balance is \$0.00"):
        launch_hyperbolic_training.main(config_for(cloud))
    cloud.credits, cloud.public_key = 880, ""
    with pytest.raises(ValueError, match="SSH public key"):
        launch_hyperbolic_training.main(config_for(cloud))
    cloud.public_key = "ssh-ed25519 AAAA"
    assert launch_hyperbolic_training.main(config_for(cloud, dry_run=True)) == 0
    assert "balance $8.80, enough for 2.0 h" in capsys.readouterr().out and cloud.launched == []


def test_the_seeds_flags_are_all_understood():
    flags = ("--gpu-count=8 --region=r --supplier=s --max-price=4.5 --list --auto-start --inject-env NAME --api-key=k --node-name=n --cluster-name=c --repo-url=https://h/o/r "
             "--branch=b --run-script=r.sh --repo-dir=d --tmux-session=t --ssh-user=u --ssh-key=k --no-deploy --env A=1 --poll-seconds=5 --max-wait-minutes=9 "
             "--dry-run --terminate=x --status --attach=y")
    config = parse(Config, flags.split())
    assert config.gpu_count == 8 and config.max_price == 4.5 and (Config().tmux_session, Config().ssh_user) == ("training", "ubuntu")
