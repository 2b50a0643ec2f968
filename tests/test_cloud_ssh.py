"""What reaches a rented machine and what comes back: a real sshd and tmux on loopback, and answers from the network that must not become commands."""
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.cloud import remote, session, shipping
from nanochat.cloud.signals import Interrupted, Signals
from nanochat.cloud.ssh import ConnectionLost, HostKeyChanged, Machine, NotAllowed, RemoteError, check_address, parse_ssh_command
from tests.cloud import ROOT, Eyes, tiny_repository
from tests.fakes.sshd import MISSING, Sshd

needs_sshd = pytest.mark.skipif(bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (apt-get install openssh-server tmux)")


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with Sshd(tmp_path_factory.mktemp("sshd with a space")) as machine:
        yield machine


@pytest.fixture
def signals():
    with Signals() as signals:
        yield signals


@pytest.fixture
def machine(server, signals, tmp_path):
    if server.process is None:
        server.start()
    return Machine("127.0.0.1", server.port, server.user, str(server.key), tmp_path / "known hosts %h", signals)


# Addresses come from the network

@pytest.mark.parametrize("text, expected", [
    ("ssh ubuntu@1.2.3.4 -p 31000", ("ubuntu", "1.2.3.4", 31000)), ("ssh -p 31000 ubuntu@node.example.com", ("ubuntu", "node.example.com", 31000)),
    ("ssh 1.2.3.4", ("me", "1.2.3.4", 22)), ("ssh root@2001:db8::1 -p22", ("root", "2001:db8::1", 22)), ("ubuntu@host", ("ubuntu", "host", 22)),
    ("ssh -l someone host -i ~/.ssh/key", ("someone", "host", 22)), ("", None), (None, None), ("   ", None)])
def test_an_ssh_command_is_read(text, expected):
    assert parse_ssh_command(text, "me") == expected


@pytest.mark.parametrize("text", ["ssh -oProxyCommand=touch${IFS}x host", "ssh -- -oProxyCommand=x", "ssh u@-host", "ssh 'u@h;id'", "ssh u@h -p 0", "ssh u@h -p 99999", "ssh u@h -p ٣",
                                  "ssh -u@host", "ssh u@h other", "ssh", "ssh u@h\nid", "ssh '", "ssh u@h -p", "ssh u@@h", "ssh u@h$(id)"])
def test_a_strange_ssh_command_is_refused(text):
    with pytest.raises(ValueError, match="no address for ssh|cannot be read|more than one host"):
        parse_ssh_command(text, "me")


@settings(deadline=None)
@given(st.text(max_size=60) | st.from_regex(r"ssh ([a-z-]{1,5}@)?[a-z0-9.:-]{1,12}( -p ?[0-9-]{1,6})?", fullmatch=True))
def test_whatever_is_read_is_a_safe_address(text):
    try:
        found = parse_ssh_command(text, "me")
    except ValueError:
        return
    if found:
        user, host, port = found
        check_address(user, host, port)
        assert not user.startswith("-") and not host.startswith("-") and not set(user + host) & set(" \n\t;$`'\"\\|&<>()") and 0 < port < 65536


# The connection

@needs_sshd
def test_arguments_and_stdin_arrive_as_they_are_and_noise_of_login_scripts_does_not(machine, server):
    (server.home / ".bashrc").write_text("echo a greeting on every login\n")
    nasty = ["plain", "two words", "", "$HOME `id` $(id)", "a'b\"c\\d", "new\nline", "*", "ünïcode", "-n", ";exit 3"]
    assert machine.run("printf '%s\\0' \"$@\"", *nasty).decode().split("\0")[:-1] == nasty
    data = bytes(range(256)) * 5000
    assert machine.run("cat", data=data) == data
    assert machine.run("sleep 1; cat", data=data) == data  # more than a pipe holds, and not read at once
    (server.folder / "payload").write_bytes(data)
    assert machine.run("cat", data=server.folder / "payload") == data
    (server.home / ".bashrc").unlink()


@needs_sshd
def test_a_failure_there_is_told_from_a_failure_of_the_connection(machine, server, signals, tmp_path):
    with pytest.raises(RemoteError, match="status 7: went wrong"):
        machine.run("echo went wrong >&2; exit 7")
    with pytest.raises(ConnectionLost, match="no end after"):
        machine.run("sleep 30", timeout=0.5)
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    with pytest.raises(NotAllowed):
        Machine("127.0.0.1", server.port, server.user, str(tmp_path / "other"), tmp_path / "kh", signals).run("true")
    with pytest.raises(ConnectionLost):
        Machine("127.0.0.1", 1, server.user, str(server.key), tmp_path / "kh", signals).run("true")


@needs_sshd
def test_the_first_host_key_is_pinned_and_no_other_gets_a_byte(machine, server):
    assert machine.run("echo hello") == b"hello\n" and "StrictHostKeyChecking=yes" in machine.options()
    pinned = machine.known_hosts.read_text()
    server.change_host_key()
    with pytest.raises(HostKeyChanged, match="another host key"):
        machine.run("cat > stolen", data=b"secret")
    assert not (server.home / "stolen").exists() and machine.known_hosts.read_text() == pinned


@needs_sshd
def test_a_signal_ends_a_waiting_ssh_and_its_child_with_it(machine):
    def interrupt():
        while not any("marked-for-the-test" in line for line in list(eyes.seen)):
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)
    with Eyes() as eyes, pytest.raises(Interrupted):
        threading.Thread(target=interrupt, daemon=True).start()
        machine.run("echo marked-for-the-test; sleep 600", timeout=300)
    ours = [line for line in Path("/proc").glob("[0-9]*/cmdline") if b"ssh\0" in (text := read(line)) and b"marked-for-the-test" in text]
    assert not ours


def read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


def test_tolerated_signals_wait_and_one_more_does_not(signals):
    os.kill(os.getpid(), signal.SIGTERM)
    with pytest.raises(Interrupted, match="SIGTERM"):
        signals.sleep(10)
    signals.tolerate(1)
    os.kill(os.getpid(), signal.SIGINT)
    signals.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(Interrupted):
        signals.check()


def test_a_wait_that_is_not_interrupted_lasts_as_long_as_asked(signals):
    began = time.monotonic()
    signals.sleep(0.2)
    assert time.monotonic() - began >= 0.2


# The run

@needs_sshd
def test_a_window_of_the_same_name_is_left_alone(machine, server):
    machine.run(remote.PREPARE, "r1")
    (server.home / "repo").mkdir(exist_ok=True)
    (server.home / "repo" / "run.sh").write_text("true\n")
    server.tmux("new-session", "-d", "-s", "mine", "sleep 600")
    with pytest.raises(RemoteError, match="left alone"):
        machine.run(remote.START, "r1", "repo", "mine", server.socket, "run.sh", ".env", "source")
    assert server.tmux("has-session", "-t", "=mine").returncode == 0
    server.tmux("kill-server")


@needs_sshd
def test_each_piece_may_be_repeated_after_a_lost_connection(machine, server, tmp_path):
    repository = tiny_repository(tmp_path / "r")
    digest, source = shipping.pack(tmp_path / "tree.tar", root=repository)
    machine.run(remote.PREPARE, "r2")
    torn = tmp_path / "torn.tar"
    torn.write_bytes((tmp_path / "tree.tar").read_bytes()[:20000])
    with pytest.raises(RemoteError):
        machine.run(remote.UNPACK, "r2", "code", digest, data=torn)
    assert not (server.home / "code").exists()
    for _ in range(2):
        machine.run(remote.UNPACK, "r2", "code", digest, data=tmp_path / "tree.tar")
    (server.home / "code" / "run.sh").write_text('echo "base step 1/2 | $(pwd)" "${A-unset}"; exit 5\n')
    for _ in range(2):
        machine.run(remote.STORE_ENV, "code", ".env", data=shipping.write_env_file({"A": "$(id) `id` \"two words\" $HOME"}))
    for _ in range(2):
        machine.run(remote.START, "r2", "code", "train", server.socket, "run.sh", ".env", source)
    until = time.monotonic() + 60
    while (probe := remote.parse_probe(machine.run(remote.PROBE, "r2", "code", "train", server.socket, 0)))[0] == "running" and time.monotonic() < until:
        time.sleep(0.2)
    assert probe[:2] == ("ended", 5) and probe[4] == -1
    log = probe[6].decode()
    assert f"base step 1/2 | {server.home}/code $(id) `id` \"two words\" $HOME\n" in log and log.count("base step") == 1 and source in log
    assert remote.parse_probe(machine.run(remote.PROBE, "r2", "code", "train", server.socket, len(log)))[6] == b""
    with pytest.raises(RemoteError, match="exists on the machine already"):
        machine.run(remote.PREPARE, "r3")
        machine.run(remote.UNPACK, "r3", "code", digest, data=tmp_path / "tree.tar")
    server.tmux("kill-server")


@settings(deadline=None)
@given(st.binary(max_size=80))
def test_any_answer_to_a_probe_is_read_or_refused(output):
    try:
        state = remote.parse_probe(output)[0]
    except ValueError:
        return
    assert state in ("none", "running", "lost", "ended")


# Variables

@settings(max_examples=20, deadline=None)
@given(st.dictionaries(st.from_regex(r"T_[A-Za-z0-9_]{1,8}", fullmatch=True),
                       st.text(st.characters(blacklist_characters="\n\0", blacklist_categories=("Cs",)), min_size=1, max_size=40), min_size=1, max_size=12))
def test_variables_are_the_same_here_and_in_bash(tmp_path_factory, values):
    folder = tmp_path_factory.mktemp("env")
    (folder / ".env").write_bytes(shipping.write_env_file(values))
    assert shipping.read_env_file(folder / ".env") == values
    done = subprocess.run(["bash", "-c", f'source {ROOT}/scripts/bootstrap.sh; read_env_file "$1"; shift; for name; do printf "%s\\0" "${{!name}}"; done', "x", folder / ".env", *values],
                          capture_output=True, check=True, env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"})
    assert done.stdout.decode().split("\0")[:-1] == list(values.values())


def test_a_handwritten_env_file_is_read_as_bash_reads_it(tmp_path):
    text = "# note\n\nA=1\nexport B=two words\nC=\"quoted\"\nD='single'\r\nE=\nE=later\nA=ignored\n  F=$(id)\nnot a line\n9X=1\nG=\"open\nH=\"\n"
    (tmp_path / ".env").write_text(text)
    expected = {"A": "1", "B": "two words", "C": "quoted", "D": "single", "E": "later", "F": "$(id)", "G": "\"open", "H": "\""}
    assert shipping.read_env_file(tmp_path / ".env") == expected
    done = subprocess.run(["bash", "-c", f'source {ROOT}/scripts/bootstrap.sh; read_env_file .env; for name in A B C D E F G H; do printf "%s\\0" "${{!name}}"; done'],
                          capture_output=True, check=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]})
    assert done.stdout.decode().split("\0")[:-1] == list(expected.values())


# Code

def test_a_commit_goes_over_exactly_and_the_tree_with_its_changes(tmp_path):
    repository = tiny_repository(tmp_path / "r")
    before = subprocess.run(["git", "-C", repository, "status", "--porcelain"], capture_output=True).stdout

    def unpacked(name, **options):
        digest, source = shipping.pack(tmp_path / f"{name}.tar", root=repository, **options)
        (tmp_path / name).mkdir()
        subprocess.run(["tar", "-x", "-f", tmp_path / f"{name}.tar", "-C", tmp_path / name], check=True)
        return {str(path.relative_to(tmp_path / name)) for path in (tmp_path / name).rglob("*") if path.is_file()}, source
    files, source = unpacked("commit", commit="HEAD")
    assert "new.txt" not in files and (tmp_path / "commit" / "committed.txt").read_text() == "old\n" and source.startswith("commit ")
    (repository / "run.sh").unlink()  # a file that is gone here is not missed
    files, source = unpacked("tree")
    assert files == {".gitignore", "committed.txt", "new.txt", "scripts/bootstrap.sh"} and source.endswith("with 3 changed files")
    subprocess.run(["git", "-C", repository, "checkout", "-q", "run.sh"], check=True)
    assert subprocess.run(["git", "-C", repository, "status", "--porcelain"], capture_output=True).stdout == before
    with pytest.raises(ValueError, match="use --repo-url"):
        shipping.pack(tmp_path / "x.tar", root=tmp_path)


def test_a_tree_that_is_too_large_names_its_largest_files(tmp_path, monkeypatch):
    repository = tiny_repository(tmp_path / "r")
    (repository / "huge.bin").write_bytes(b"x" * 20000)
    monkeypatch.setattr(shipping, "MAX_BYTES", 10000)
    with pytest.raises(ValueError, match="huge.bin"):
        shipping.pack(tmp_path / "x.tar", root=repository)


# Results

@pytest.mark.parametrize("name", ["../escape", "/etc/passwd", "a/../../b", "a\nb"])
def test_a_machine_cannot_write_outside_the_folder(name):
    with pytest.raises(session.Failed, match="outside"):
        session.parse_listing(b"5\tgood\x00" + f"5\t{name}".encode() + b"\0")


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_listing_leads_outside(output):
    try:
        files = session.parse_listing(output)
    except session.Failed:
        return
    assert all(not os.path.isabs(name) and ".." not in name.split("/") for _, name in files)


def test_the_newest_model_of_each_folder_is_chosen_and_no_data():
    names = ["report/report.md", "runs/base_d4.jsonl", "base_data/shard.parquet", "tokenizer/tokenizer.pkl", "wandb/x"] + [
        f"{folder}_checkpoints/d4/{kind}" for folder in ("base", "chatrl") for kind in ("model_000100.pt", "meta_000100.json", "optim_000100_rank0.pt", "model_000020.pt", "meta_000020.json")]
    files = [(1, name) for name in names]
    report = {"report/report.md", "runs/base_d4.jsonl", "tokenizer/tokenizer.pkl"}
    assert {name for _, name in session.chosen(files, "report")} == report
    weights = session.chosen(files, "weights")
    assert {name for _, name in weights} - report == {f"{folder}_checkpoints/d4/{kind}_000100.{end}" for folder in ("base", "chatrl") for kind, end in (("model", "pt"), ("meta", "json"))}
    assert {name for _, name in weights[:3]} == report  # the small and irreplaceable first
    assert len(session.chosen(files, "all")) == len(report) + 10


@needs_sshd
def test_a_file_is_fetched_in_pieces_resumed_and_checked(machine, server, tmp_path, monkeypatch):
    content = os.urandom(250_000)
    (server.home / "results" / "deep").mkdir(parents=True)
    (server.home / "results" / "deep" / "a file").write_bytes(content + b"it grows meanwhile")
    monkeypatch.setattr(session, "PIECE", 100_000)
    pieces, run = [], machine.run

    def watched(script, *arguments, **options):
        if script is remote.READ_FILE:
            pieces.append(arguments[2:])
            if len(pieces) == 2:
                raise ConnectionLost("on order")
        return run(script, *arguments, **options)
    monkeypatch.setattr(machine, "run", watched)
    target, until = tmp_path / "artifacts" / "deep" / "a file", time.monotonic() + 100
    with pytest.raises(ConnectionLost):
        session.fetch_file(machine, "results", "deep/a file", len(content), target, until)
    assert not target.exists()
    session.fetch_file(machine, "results", "deep/a file", len(content), target, until)
    assert target.read_bytes() == content and [offset for offset, _ in pieces] == [0, 100_000, 100_000, 200_000]
    # a damaged beginning is noticed and fetched again
    target.unlink()
    target.with_name(".a file.partial").write_bytes(b"x" * 100_000)
    session.fetch_file(machine, "results", "deep/a file", len(content), target, until)
    assert target.read_bytes() == content
