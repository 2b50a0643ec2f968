"""A run reaches a bucket whole or says so, whatever fails on the way, and comes back the same. Against gcp-storage-emulator behind a proxy."""
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import requests

from nanochat.checkpoint_manager import load_model
from nanochat.cloud import gcs as gcs_module
from nanochat.cloud import here, run_files
from nanochat.cloud.market import Instance
from scripts import upload_to_gcs
from tests.checkpoints import save_small
from tests.fakes.gcs import FakeGCS
from tests.fakes.lambda_cloud import FakeLambda

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    """A base directory with two stages, logs, report and problems; not to be written to."""
    folder = tmp_path_factory.mktemp("run")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        save_small("base", "tiny")
        save_small("rl", "tiny")
    for name, text in {"report/report.md": "# Report\n", "aqua/train.jsonl": "{}\n" * 50, "stages/train-rl.done": "x\n", "base_data/shard_00000.parquet": "x" * 500,
                       "cloud/a/rental.json": "{}", "chat_history": "secret talk", "rl.log": "step 1\n", "runs/empty.jsonl": "", "identity_conversations.jsonl": "[]\n"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def base(run_folder, tmp_path, monkeypatch):
    shutil.copytree(run_folder, tmp_path / "base")
    for name in ("WANDB_RUN", "GCS_BUCKET", "GOOGLE_APPLICATION_CREDENTIALS", "LAMBDA_API_KEY", "HYPERBOLIC_API_KEY", "GCP_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return tmp_path / "base"


@pytest.fixture
def gcs(monkeypatch):
    with FakeGCS() as server:
        monkeypatch.setenv("STORAGE_EMULATOR_HOST", server.url)
        yield server


def run(**knobs):
    return upload_to_gcs.main(upload_to_gcs.Config(**{"bucket": "bucket", "run_name": "first", "patience_seconds": 60.0, **knobs}))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def sent_files(base):
    """What of a base directory belongs to a run."""
    return {name: content for name, content in contents(base).items()
            if not name.startswith(("base_data/", "cloud/", ".")) and name not in ("chat_history", run_files.ORIGIN)}


# -- there and back ---------------------------------------------------------------------------------------------------

def test_what_was_sent_comes_back_the_same_and_loads(base, gcs, tmp_path, monkeypatch, capsys):
    assert run() == 0
    said = capsys.readouterr().out
    assert "weights: base tiny, step 12" in said and "weights: rl tiny, step 12" in said and "all verified" in said
    assert run(download=True, output=str(tmp_path / "back")) == 0
    assert contents(tmp_path / "back") == sent_files(base)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "back"))
    model, _, meta = load_model("rl", model_tag="tiny")
    assert meta["step"] == 12 and model.num_params() > 0
    assert run(verify=True) == 0


def test_a_second_upload_sends_only_what_is_new(base, gcs, capsys):
    assert run() == 0
    before = len(gcs.uploads())
    (base / "report" / "report.md").write_text("# Another\n")
    assert run() == 0
    assert len(gcs.uploads()) - before == 2              # the report, the manifest
    assert "1 sent now" in capsys.readouterr().out


def test_the_manifest_names_commit_checkpoints_sizes_and_hashes(base, gcs):
    assert run(exclude_data=True) == 0
    bucket = gcs_module.Bucket("bucket", 30)
    listed = run_files.read_manifest(bucket.read("runs/first/manifest.json"), "it")
    assert [(one["stage"], one["model_tag"], one["step"]) for one in listed["checkpoints"]] == [("base", "tiny", 12), ("rl", "tiny", 12)]
    wanted = {name: content for name, content in sent_files(base).items() if not name.startswith("aqua/")}
    assert {name: (one["size"], one["sha256"]) for name, one in listed["files"].items()} == {
        name: (len(content), hashlib.sha256(content).hexdigest()) for name, content in wanted.items()}
    if (ROOT / ".git").exists():
        assert listed["code"].startswith("commit ")
    stored = bucket.list("runs/first/")
    assert set(stored) == {*wanted, "manifest.json"} and all(one.sha256 for one in stored.values())


def test_exclude_optimizer_leaves_out_shards_only(base, gcs, tmp_path):
    assert run(exclude_optimizer=True) == 0
    assert run(download=True, output=str(tmp_path / "back")) == 0
    assert set(sent_files(base)) - set(contents(tmp_path / "back")) == {f"{folder}_checkpoints/tiny/optim_000012_rank0.pt" for folder in ("base", "chatrl")}


def test_a_large_file_goes_and_comes_in_pieces(base, gcs, tmp_path, monkeypatch):
    """Above the client's 8 MiB a resumable upload is used; the second piece is refused once and the first download breaks off."""
    monkeypatch.setattr(gcs_module, "CHUNK", 4 << 20)
    (base / "runs" / "large.jsonl").write_bytes(random.Random(1).randbytes(9_000_000))
    gcs.faults += [("PUT", "upload_id", "500"), ("GET", "large.jsonl.*alt=media", "hang-up")]
    assert run() == 0 and run(download=True, output=str(tmp_path / "back")) == 0
    assert not gcs.faults and (tmp_path / "back" / "runs" / "large.jsonl").read_bytes() == (base / "runs" / "large.jsonl").read_bytes()


# -- failures ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["500", "429", "drop", "drop-after", "cut", "flip"])
def test_a_passing_failure_is_repeated_until_the_content_is_right(base, gcs, tmp_path, kind):
    gcs.faults += [("POST", "/upload/", kind), ("POST", "/upload/", kind), ("GET", "alt=media.*|/o/.*model", kind), ("GET", "/o\\?", kind if kind.isdigit() else "drop")]
    assert run() == 0
    assert run(download=True, output=str(tmp_path / "back")) == 0
    assert contents(tmp_path / "back") == sent_files(base) and not gcs.faults


def test_a_server_that_always_damages_is_never_believed(base, gcs, capsys):
    gcs.faults += [("POST", "/upload/", "flip")] * 500
    assert run() == 1
    assert "all verified" not in capsys.readouterr().out


def test_without_permission_nothing_is_claimed_and_the_role_is_named(base, gcs, capsys):
    gcs.faults += [("POST", "/upload/", "403")] * 500
    assert run() == 1
    said = capsys.readouterr().out
    assert "objectUser" in said and "verified" not in said.replace("nor verify", "")
    assert run(bucket="nowhere") == 1 and "does not exist (404)" in capsys.readouterr().out


def test_content_that_changed_in_the_bucket_is_found_by_verify_and_mended(base, gcs, tmp_path, capsys):
    assert run() == 0
    gcs.change("runs/first/chatrl_checkpoints/tiny/model_000012.pt", b"other")
    assert run(verify=True) == 1 and "chatrl_checkpoints/tiny/model_000012.pt has 5 bytes" in capsys.readouterr().out
    assert run(download=True, output=str(tmp_path / "back")) == 1
    assert "NOT COMPLETE" in capsys.readouterr().out and not (tmp_path / "back/chatrl_checkpoints/tiny/meta_000012.json").exists()
    assert run() == 0 and run(verify=True) == 0


def test_a_torn_checkpoint_is_never_sent_nor_counted(base, gcs, capsys):
    (base / "chatrl_checkpoints/tiny/model_000012.pt").write_bytes(b"torn")
    (base / "base_checkpoints/tiny/model_000099.pt").write_bytes(b"no meta file")
    assert run() == 1
    said = capsys.readouterr().out
    assert "model_000012.pt does not have the SHA-256" in said and "left out: base_checkpoints/tiny/model_000099.pt" in said
    assert "weights: base" in said and "weights: rl" not in said
    stored = gcs_module.Bucket("bucket", 30).list("runs/first/")
    assert "base_checkpoints/tiny/model_000012.pt" in stored and "chatrl_checkpoints/tiny/model_000012.pt" not in stored and "base_checkpoints/tiny/model_000099.pt" not in stored


def test_no_weights_no_success(base, gcs, capsys):
    for folder in ("base_checkpoints", "chatrl_checkpoints"):
        shutil.rmtree(base / folder)
    assert run() == 1 and "0 whole checkpoints" in capsys.readouterr().out and not gcs.requests
    assert run(allow_no_weights=True) == 0


def test_a_meta_file_without_its_weights_is_a_failure(base, gcs, capsys):
    (base / "chatrl_checkpoints/tiny/model_000012.pt").unlink()
    assert run() == 1 and "DAMAGED: chatrl_checkpoints/tiny/meta_000012.json" in capsys.readouterr().out


def test_two_runs_are_not_mixed_under_one_name(base, gcs, capsys, monkeypatch, tmp_path):
    assert run() == 0
    (base / run_files.ORIGIN).unlink()                   # another base directory
    assert run() == 1 and "holds another run" in capsys.readouterr().out
    assert run(overwrite=True) == 0
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "new"))
    assert run(download=True) == 0 and run() == 0        # a run that goes on elsewhere is the same run


def test_a_log_that_grows_while_it_is_sent_arrives_as_it_was_at_one_moment(base, gcs, tmp_path):
    log = base / "runs" / "rl_tiny.jsonl"

    def grow(method, path):
        with open(log, "a") as file:
            file.write('{"step": 13}\n')
    gcs.on_request = grow
    assert run() == 0
    gcs.on_request = lambda method, path: None
    assert run(download=True, output=str(tmp_path / "back")) == 0
    assert log.read_bytes().startswith((tmp_path / "back/runs/rl_tiny.jsonl").read_bytes())


def test_a_download_keeps_files_that_differ_unless_told_otherwise(base, gcs, capsys):
    assert run() == 0
    (base / "report/report.md").write_text("mine")
    assert run(download=True) == 1 and "report/report.md" in capsys.readouterr().out and (base / "report/report.md").read_text() == "mine"
    assert run(download=True, overwrite=True) == 0 and (base / "report/report.md").read_text() == "# Report\n"


COMMAND = [sys.executable, "-m", "scripts.upload_to_gcs", "--bucket=bucket", "--run-name=first", "--workers=1"]


def test_killed_in_the_middle_and_run_again_it_sends_the_rest(base, gcs, tmp_path):
    """A real process, ended by SIGKILL when its fifth file has arrived."""
    begun = {}

    def kill(method, path):
        if "/upload/" in path and len(gcs.uploads()) == 6:
            begun["process"].kill()
    gcs.on_request = kill
    begun["process"] = subprocess.Popen(COMMAND, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    begun["process"].communicate(timeout=300)
    assert begun["process"].returncode == -9
    assert run(verify=True) == 1                         # no manifest: it was never finished
    there = set(gcs_module.Bucket("bucket", 30).list("runs/first/"))
    gcs.on_request, before = lambda method, path: None, len(gcs.uploads())
    assert len(there) >= 5 and run() == 0
    assert len(gcs.uploads()) - before == len(sent_files(base)) - len(there) + 1
    assert run(download=True, output=str(tmp_path / "back")) == 0 and contents(tmp_path / "back") == sent_files(base)


def test_a_download_that_broke_off_goes_on_behind_what_arrived(base, gcs, tmp_path):
    large = random.Random(2).randbytes(3_000_000)
    (base / "runs" / "large.jsonl").write_bytes(large)
    assert run() == 0
    partial = tmp_path / "back" / "runs" / f".large.jsonl.{hashlib.sha256(large).hexdigest()[:12]}.partial"
    partial.parent.mkdir(parents=True)
    partial.write_bytes(large[:2_900_000])
    assert run(download=True, output=str(tmp_path / "back")) == 0
    assert (tmp_path / "back/runs/large.jsonl").read_bytes() == large and not partial.exists()


# -- what is read from a bucket is not trusted ------------------------------------------------------------------------

def forge(**changes):
    entry = {"size": 1, "crc32c": "AAAAAA==", "sha256": "0" * 64}
    return json.dumps({"run": "x", "origin": "x", "checkpoints": [], "files": {changes.pop("name", "a"): {**entry, **changes}}}).encode()


@pytest.mark.parametrize("name", ["../evil", "/etc/evil", "a/../../evil", "a//b", "./a", "", "a/", ".bashrc", "a\\b", "C:evil", "a\nb", "run_origin", "manifest.json", "a/./b"])
def test_a_manifest_cannot_name_a_file_outside(name):
    with pytest.raises(ValueError, match="lists"):
        run_files.read_manifest(forge(name=name), "it")


def test_whatever_a_manifest_holds_it_is_read_or_refused():
    random_source, whole = random.Random(5), forge()
    for _ in range(2000):
        content = bytearray(whole)
        for _ in range(random_source.randint(1, 6)):
            place = random_source.randrange(len(content))
            content[place:place + random_source.randint(0, 4)] = random_source.randbytes(random_source.randint(0, 4))
        try:
            found = run_files.read_manifest(bytes(content), "it")
        except ValueError:
            continue
        assert all(run_files.safe_name(name) for name in found["files"])
    for content in (b"[]", b"null", b"{}", b'{"files": []}', b'{"files": {}, "checkpoints": {"a": 1}}', b"[" * 100000):
        with pytest.raises(ValueError, match="damaged"):
            run_files.read_manifest(content, "it")


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "runs").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="leads out"):
        run_files.inside(tmp_path / "folder", "runs/x")


# -- the command ------------------------------------------------------------------------------------------------------

def test_a_dry_run_needs_neither_credentials_nor_network_and_the_shell_script_passes_its_flags_on(base, tmp_path):
    """With a PATH and a HOME that hold nothing of Google's, and an address where nobody answers."""
    environment = {**os.environ, "HOME": str(tmp_path), "STORAGE_EMULATOR_HOST": "http://127.0.0.1:9", "GCS_BUCKET": "from-env",
                   "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    done = subprocess.run(["bash", "scripts/upload_to_gcs.sh", "--run-name", "first", "--exclude-data", "--dry-run", "--auto-terminate"], cwd=ROOT, env=environment,
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 whole checkpoints for gs://from-env/runs/first" in done.stdout and "chatrl_checkpoints/tiny/model_000012.pt" in done.stdout
    assert "aqua/" not in done.stdout and "shard_00000" not in done.stdout and "nothing was sent" in done.stdout


def test_without_credentials_the_message_says_what_to_do(base, tmp_path, monkeypatch, capsys):
    for name in ("STORAGE_EMULATOR_HOST", "GOOGLE_CLOUD_PROJECT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", str(tmp_path / "missing.json"))
    assert run() == 1
    assert "set GOOGLE_APPLICATION_CREDENTIALS" in capsys.readouterr().out


def test_names_and_knobs_are_checked(base, monkeypatch, capsys):
    assert run(bucket="") == 1 and "set GCS_BUCKET" in capsys.readouterr().out
    assert run(bucket="Has Spaces") == 1 and run(run_name="../up") == 1
    with pytest.raises(ValueError, match="choose one"):
        run(verify=True, download=True)
    with pytest.raises(ValueError, match="workers=0"):
        run(workers=0)
    monkeypatch.setenv("WANDB_RUN", "dummy")
    assert run_files.check_bucket("gs://my-bucket/") == "my-bucket"
    assert run_files.default_run(run_files.plan().checkpoints).startswith("tiny-")
    monkeypatch.setenv("WANDB_RUN", "night")
    assert run_files.default_run([]) == "night"


def test_without_the_library_the_message_says_how_to_install_it(base, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "google.cloud.storage", None)
    assert run(dry_run=True) == 0
    assert run() == 1 and "--extra gcs" in capsys.readouterr().out


# -- ending the machine -----------------------------------------------------------------------------------------------

def test_only_the_instance_that_is_certainly_this_machine_counts():
    mine = Instance("i-1", "running", name="nanochat-train-1", host="203.0.113.7")
    assert here.is_this_machine(mine, "", ["nanochat-train-1"], "other") and here.is_this_machine(mine, "", [], "203-0-113-7") and here.is_this_machine(mine, "i-1", [], "other")
    assert not here.is_this_machine(mine, "", ["nanochat-train-2"], "other") and not here.is_this_machine(mine, "i-2", ["nanochat-train-1"], "203-0-113-7")
    assert not here.is_this_machine(Instance("i-1", "running"), "", [""], "")


@pytest.fixture
def rented(tmp_path, monkeypatch):
    """A fake Lambda with two instances: one carries the name in this machine's home folder."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home/.nanochat-cloud/mine").mkdir(parents=True)
    monkeypatch.setattr(here.Signals, "scale", 0.02)
    with FakeLambda(host="127.0.0.1") as cloud:
        for name in ("mine", "theirs"):
            requests.post(f"{cloud.url}/api/v1/instance-operations/launch", headers={"Authorization": f"Bearer {cloud.key}"}, timeout=60,
                          json={"region_name": "us-west-1", "instance_type_name": "gpu_1x_a10", "ssh_key_names": ["laptop"], "name": name})
        yield cloud


def test_auto_terminate_ends_this_machine_and_no_other_and_only_after_the_upload(base, gcs, rented, monkeypatch, capsys):
    monkeypatch.setenv("LAMBDA_API_KEY", rented.key)
    gcs.faults += [("POST", "/upload/", "403")] * 500
    assert run(auto_terminate=True, api_url=rented.url) == 1 and not rented.terminated and "GOES ON BILLING" in capsys.readouterr().out
    gcs.faults.clear()
    for _ in range(4):                                   # until both are in the list
        assert run(auto_terminate=True, api_url=rented.url) in (0, 3)
        if rented.terminated:
            break
    assert rented.terminated == rented.launched[:1] and "terminated, verified in lambda's list" in capsys.readouterr().out


def test_where_the_machine_cannot_be_ended_the_command_is_printed_loudly(base, gcs, rented, monkeypatch, capsys):
    assert run(auto_terminate=True) == 3
    said = capsys.readouterr().out
    assert "python -m scripts.launch_lambda_training --terminate=mine" in said and "does not end the bill" in said
    monkeypatch.setenv("LAMBDA_API_KEY", "wrong")
    assert run(auto_terminate=True, api_url=rented.url) == 3 and not rented.terminated and "wrong" not in capsys.readouterr().out.replace("--terminate=", "")
