"""scripts.base_eval and base_loss: what it writes, resumed, sharded, on our checkpoint and its export alike; and how a bundle is fetched."""
import csv
import hashlib
import http.server
import io
import json
import math
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from nanochat import core_bundle
from nanochat.checkpoint_manager import load_model
from nanochat.configurator import parse
from nanochat.core_bundle import find_bundle, load_bundle
from nanochat.huggingface.folder import write_folder
from nanochat.statistics import wilson_interval
from scripts import base_eval, base_loss
from tests.checkpoints import save_small
from tests.fakes.hub import FakeHub
from tests.test_core_eval import write_bundle

ROOT = Path(__file__).parents[1]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A base directory with a checkpoint, and an eval bundle of three small tasks."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    save_small("base", "d2", padding=0, step=7, sequence_len=128)
    write_bundle(tmp_path / "base" / "eval_bundle", count=9)
    return tmp_path / "base"


def run(*flags):
    return base_eval.main(parse(base_eval.Config, ["--device-type=cpu", "--dtype=float32", *flags]))


def items_of(base, name="base_d2_000007"):
    return [json.loads(line) for line in (base / "base_eval" / f"{name}_items.jsonl").read_text().splitlines()]


def test_the_files_can_be_recomputed_from_the_items(base):
    summary = run("-g", "d2")
    assert summary == json.loads((base / "base_eval" / "base_d2_000007.json").read_text())
    records = items_of(base)
    assert len(records) == 27 and not list((base / "base_eval").glob("*.partial"))
    centred = []
    for label, one in summary["tasks"].items():
        mine = [record for record in records if record["task"] == label]
        right = sum(record["greedy"][0] if "choices" not in record and "contexts" not in record else
                    max(range(2), key=lambda i: record["logprobs"][i] / record["tokens"][i]) == record["gold"] for record in mine)
        guessing = 0.0 if label == "language_modeling" else 0.5
        assert (one["accuracy"], one["n"], one["random_baseline"]) == (right / 9, 9, guessing)
        assert (one["ci_low"], one["ci_high"]) == wilson_interval(right, 9)
        centred.append((right / 9 - guessing) / (1 - guessing))
    assert summary["core"]["value"] == pytest.approx(sum(centred) / 3) and summary["core"]["ci_low"] < summary["core"]["value"] < summary["core"]["ci_high"]
    assert summary["core"]["name"].startswith("mean of 3 centred scores (not CORE: 22 of its 22 tasks are missing")
    rows = list(csv.reader((base / "base_eval" / "base_d2_000007.csv").open()))
    assert rows[0][:3] == ["Task", "Accuracy", "Centered"] and [row[0] for row in rows[1:4]] == list(summary["tasks"])
    assert [float(row[2]) for row in rows[1:4]] == pytest.approx(centred, abs=1e-6) and float(rows[4][2]) == pytest.approx(sum(centred) / 3, abs=1e-6)
    section = json.loads((base / "report" / "base_eval.json").read_text())
    assert "not CORE" in section["markdown"] and section["data"]["schema"] == summary["tasks"]["schema"]["accuracy"]


def test_a_killed_evaluation_goes_on_where_it_was_and_scores_nothing_twice(base, monkeypatch):
    whole = run("-g", "d2")
    lines = (base / "base_eval" / "base_d2_000007_items.jsonl").read_text().splitlines()
    (base / "base_eval" / "base_d2_000007_items.jsonl").unlink()
    (base / "base_eval" / "base_d2_000007_items.rank5.partial").write_text("\n".join(lines[:15]) + "\n" + lines[15][:40])
    scored = []
    monkeypatch.setattr(base_eval, "evaluate_task", lambda task, *arguments: (scored.append((task.label, sorted(arguments[5]))), evaluate_task(task, *arguments))[1])
    evaluate_task = sys.modules["nanochat.core_eval"].evaluate_task
    again = run("-g", "d2")
    assert scored == [("multiple_choice", list(range(9))), ("schema", list(range(6))), ("language_modeling", [])]
    assert {**again, "seconds": 0, "time": 0} == {**whole, "seconds": 0, "time": 0}
    scored.clear()
    run("-g", "d2", "--example-delimiter=|")            # another prompt is another evaluation, where examples are shown
    assert [known for _, known in scored] == [[], [], []]


def test_a_hugging_face_folder_scores_as_the_checkpoint_it_came_from(base, tmp_path):
    ours = run("-g", "d2")
    model, tokenizer, meta = load_model("base", "cpu", "eval", "d2", dtype="float32")
    write_folder(tmp_path / "exported", model, tokenizer, meta)
    theirs = run(f"--hf-path={tmp_path / 'exported'}")
    assert theirs["core"]["value"] == ours["core"]["value"] and (base / "base_eval" / "hf_exported.csv").is_file()
    for one, other in zip(items_of(base), items_of(base, "hf_exported"), strict=True):
        assert one["logprobs"] == pytest.approx(other["logprobs"], rel=1e-5) and one["correct"] == other["correct"] and one["blind"] == other["blind"]
    with pytest.raises(ValueError, match="is no folder"):
        run("--hf-path=/nowhere/at/all")
    with pytest.raises(ValueError, match="cannot be loaded as a causal language model"):
        run(f"--hf-path={base / 'eval_bundle'}")


def test_a_sample_of_items_is_the_same_whoever_asks(base):
    summary = run("-g", "d2", "-x", "4", "-a", "multiple_choice|schema")
    first = [(record["task"], record["index"]) for record in items_of(base)]
    assert len(first) == 8 and "the tasks are sampled" in summary["core"]["name"]
    run("-g", "d2", "-x", "4", "-a", "schema")
    assert [(record["task"], record["index"]) for record in items_of(base)] == first[4:]
    with pytest.raises(ValueError, match="may be 0"):
        run("-x", "0")


@pytest.mark.slow
def test_two_ranks_of_torchrun_say_what_one_process_says(base):
    alone, items = run("-g", "d2"), items_of(base)
    (base / "base_eval" / "base_d2_000007_items.jsonl").unlink()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "-m", "scripts.base_eval", "--", "-g", "d2",
               "--device-type=cpu", "--dtype=float32"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr
    for one, other in zip(items_of(base), items, strict=True):
        assert one["logprobs"] == pytest.approx(other["logprobs"], rel=1e-5) and {**one, "logprobs": 0} == {**other, "logprobs": 0}
    both = json.loads((base / "base_eval" / "base_d2_000007.json").read_text())
    assert both["core"] == alone["core"] and both["tasks"] == alone["tasks"] and not list((base / "base_eval").glob("*.partial"))


# ---------------------------------------------------------------------------------------------------------------------
# Fetching

class Files:
    """A loopback server of a few files; the first `faults` answers are broken in the given ways."""

    def __init__(self, files, faults=()):
        outer = self
        self.requests, self.faults = [], list(faults)

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                outer.requests.append(self.path)
                fault = outer.faults.pop(0) if outer.faults else None
                data = files.get(self.path)
                if data is None or fault == "error":
                    self.send_error(404 if data is None else 503)
                    return
                self.send_response(200)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data[:len(data) // 2] if fault == "cut" else data)

            def log_message(self, *arguments):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.server.shutdown()
        self.server.server_close()


def zip_of(folder, prefix="eval_bundle/", extra=()):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, prefix + str(path.relative_to(folder)))
        for name, content, mode in extra:
            member = zipfile.ZipInfo(name)
            member.external_attr = mode << 16
            archive.writestr(member, content)
    return buffer.getvalue()


@pytest.fixture
def empty_base(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


def left_behind(base):
    return sorted(str(path.relative_to(base)) for path in base.rglob("*") if path.is_file()) if base.is_dir() else []


def test_the_published_zip_is_fetched_once_through_broken_connections(tmp_path, empty_base, monkeypatch):
    data = zip_of(write_bundle(tmp_path / "made"))
    with Files({"/eval_bundle.zip": data}, faults=["cut", "error"]) as server:
        monkeypatch.setattr(core_bundle, "PUBLISHED_URL", f"{server.url}/eval_bundle.zip")
        folder = find_bundle(sha256=hashlib.sha256(data).hexdigest())
        assert folder == empty_base / "eval_bundle" and len(load_bundle(folder)) == 3 and len(server.requests) == 3
        assert find_bundle() == folder and len(server.requests) == 3
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest
    assert sorted(path.name for path in empty_base.iterdir()) == ["eval_bundle"]


def test_what_cannot_be_fetched_says_so_and_leaves_nothing(tmp_path, empty_base):
    data = zip_of(write_bundle(tmp_path / "made"))
    with Files({"/b.zip": data, "/page.zip": b"<html>not a zip</html>"}, faults=["error"] * 3) as server:
        with pytest.raises(ValueError, match="could not be fetched in 3 attempts.*503"):
            find_bundle(f"{server.url}/b.zip")
        with pytest.raises(ValueError, match="could not be fetched in 1 attempts.*404"):
            find_bundle(f"{server.url}/none.zip")
        with pytest.raises(ValueError, match="cannot be unpacked"):
            find_bundle(f"{server.url}/page.zip")
        with pytest.raises(ValueError, match="has the SHA-256 .*, not 00"):
            find_bundle(f"{server.url}/b.zip", sha256="00")
        assert left_behind(empty_base) == []
        assert len(load_bundle(find_bundle(f"{server.url}/b.zip"))) == 3


@pytest.mark.parametrize("name, mode", [("../evil.txt", 0o644), ("eval_bundle/../../evil.txt", 0o644), ("/evil.txt", 0o644), ("a\\..\\evil.txt", 0o644), ("eval_bundle/link", 0o120777)])
def test_a_zip_that_leads_out_of_its_folder_is_refused(tmp_path, empty_base, name, mode):
    (tmp_path / "evil.zip").write_bytes(zip_of(write_bundle(tmp_path / "made"), extra=[(name, "/etc/passwd", mode)]))
    with pytest.raises(ValueError, match="leads out of its folder"):
        find_bundle(str(tmp_path / "evil.zip"))
    assert left_behind(empty_base) == [] and not (tmp_path / "evil.txt").exists()


def test_bombs_foreign_zips_and_torn_zips_are_refused(tmp_path, empty_base, monkeypatch):
    good, path = zip_of(write_bundle(tmp_path / "made"), prefix=""), tmp_path / "b.zip"
    for data, said in ((zip_of(tmp_path / "made" / "eval_data"), "0 files core.yaml"), (good[:-30], "cannot be unpacked")):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=said):
            find_bundle(str(path))
    for place in range(60, 120, 20):                    # a torn stream of bits, or a wrong CRC
        path.write_bytes(good[:place] + bytes([good[place] ^ 255]) + good[place + 1:])
        with pytest.raises(ValueError, match="cannot be unpacked"):
            find_bundle(str(path))
    path.write_bytes(good)
    monkeypatch.setattr(core_bundle, "MAX_UNPACKED", 100)
    with pytest.raises(ValueError, match="more than 100"):
        find_bundle(str(path))
    assert left_behind(empty_base) == []


def test_a_folder_is_taken_as_it_is(tmp_path, empty_base):
    write_bundle(tmp_path / "outer" / "eval_bundle")
    assert find_bundle(str(tmp_path / "outer")) == tmp_path / "outer" / "eval_bundle" == find_bundle(str(tmp_path / "outer" / "eval_bundle"))
    with pytest.raises(ValueError, match="neither a folder nor a zip"):
        find_bundle(str(tmp_path / "none"))
    (tmp_path / "hollow").mkdir()
    with pytest.raises(ValueError, match="0 files core.yaml"):
        find_bundle(str(tmp_path / "hollow"))


def test_a_bundle_on_the_hub_is_fetched_by_the_real_client(tmp_path):
    write_bundle(tmp_path / "repo")
    code = ("from nanochat.core_bundle import find_bundle, load_bundle\nprint(len(load_bundle(find_bundle('hub:me/core'))), flush=True)\n"
            "find_bundle('hub:me/none')")
    with FakeHub({"datasets/me/core": tmp_path / "repo"}) as hub:
        env = {**os.environ, **hub.env(tmp_path / "home"), "NANOCHAT_BASE_DIR": str(tmp_path / "base")}
        found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True, timeout=500)
    assert found.stdout.strip() == "3" and "ValueError: the data set me/none cannot be fetched from the Hub" in found.stderr, found.stderr


# ---------------------------------------------------------------------------------------------------------------------
# Bits per byte

def test_base_loss_stands_beside_zlib_reads_no_text_twice_and_measures_the_export_too(base, tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "texts"))
    (tmp_path / "texts").mkdir()
    texts = [f"{number} plus {number + 3} is {2 * number + 3}. The cat sat on the mat." for number in range(60)]
    for name, part in (("shard_00000.parquet", texts[:40]), ("shard_val.parquet", texts[40:])):
        pq.write_table(pa.table({"text": part}), tmp_path / "texts" / name)
    flags = ["--device-type=cpu", "--dtype=float32", "-b", "1", "--max-new-tokens=4"]
    ours = base_loss.main(parse(base_loss.Config, [*flags, "-g", "d2", "--split-tokens=1000000"]))
    num_bytes = {"train": sum(map(len, texts[:40])), "val": sum(map(len, texts[40:]))}
    for split, result in ours.items():
        assert 0 < result["bytes"] <= num_bytes[split] and 0 < result["zlib_bpb"] < 3 < result["bpb"]
    section = json.loads((base / "report" / "base_loss.json").read_text())
    assert "zlib -9 needs" in section["markdown"] and len(section["data"]["samples"]) == 9
    model, tokenizer, meta = load_model("base", "cpu", "eval", "d2", dtype="float32")
    write_folder(tmp_path / "exported", model, tokenizer, meta)
    theirs = base_loss.main(parse(base_loss.Config, [*flags, f"--hf-path={tmp_path / 'exported'}", "--split-tokens=1000000"]))
    assert {split: result["bytes"] for split, result in theirs.items()} == num_bytes
    ids = [[tokenizer.bos_id, *tokenizer.encode(text)] for text in texts[40:]]
    nats = sum(-model.logprobs(torch.tensor([row[:-1]]), torch.tensor([row[1:]])).sum().item() for row in ids)
    assert theirs["val"]["bpb"] == pytest.approx(nats / math.log(2) / num_bytes["val"], rel=1e-4)
    assert theirs["val"]["bpb"] == pytest.approx(ours["val"]["bpb"], rel=0.1)
