"""Shards: the validation file has a fixed name, documents stream and resume, a broken download is noticed."""
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from nanochat import dataset
from nanochat.dataset import HUB_VAL_SHARD, LOCAL_VAL_SHARD, iter_documents, list_shards
from tests.fakes.hub import FakeHub

ROOT = Path(__file__).parent.parent


def write_shard(path, texts, row_group_size=4):
    pq.write_table(pa.table({"text": texts}), path, row_group_size=row_group_size)
    return path


def test_the_validation_shard_is_fixed_by_name_and_not_by_place(tmp_path):
    for name in ("aaa.parquet", LOCAL_VAL_SHARD, "zzz.parquet"):
        write_shard(tmp_path / name, ["text"])
    assert [path.name for path in list_shards("val", tmp_path)] == [LOCAL_VAL_SHARD]
    assert [path.name for path in list_shards("train", tmp_path)] == ["aaa.parquet", "zzz.parquet"]
    assert [path.name for path in list_shards("val", tmp_path, val_shard="aaa.parquet")] == ["aaa.parquet"]


def test_the_hub_validation_shard_stays_out_of_training(tmp_path):
    for name in ("shard_00000.parquet", HUB_VAL_SHARD):
        write_shard(tmp_path / name, ["text"])
    assert [path.name for path in list_shards("train", tmp_path)] == ["shard_00000.parquet"]
    assert [path.name for path in list_shards("val", tmp_path)] == [HUB_VAL_SHARD]


@pytest.mark.parametrize("names, message", [
    ([], "0 parquet files"),
    (["a.parquet"], "none of the 1 parquet files"),
    ([LOCAL_VAL_SHARD], "nothing to train on"),
    (["a.parquet", LOCAL_VAL_SHARD, HUB_VAL_SHARD], "2 validation shards"),
])
def test_a_folder_that_cannot_be_trained_on_says_why(tmp_path, names, message):
    for name in names:
        write_shard(tmp_path / name, ["text"])
    with pytest.raises(ValueError, match=message):
        list_shards("train", tmp_path)


def test_the_folder_comes_from_the_argument_then_the_variable_then_the_base_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("NANOCHAT_DATA_DIR", raising=False)
    assert dataset.shards_dir() == tmp_path / "base" / "base_data"
    monkeypatch.setenv("NANOCHAT_DATA_DIR", str(tmp_path / "own"))
    assert dataset.shards_dir() == tmp_path / "own"
    assert dataset.shards_dir(tmp_path / "flag") == tmp_path / "flag"


def test_documents_resume_at_every_position(tmp_path):
    shards = [write_shard(tmp_path / "a.parquet", [f"a{i}" for i in range(10)]),
              write_shard(tmp_path / "b.parquet", ["b0", None, "b2"])]
    texts = list(iter_documents(shards))
    assert texts == [f"a{i}" for i in range(10)] + ["b0", "", "b2"]
    for index, (position, text) in enumerate(iter_documents(shards, with_positions=True)):
        assert text == texts[index]
        assert list(iter_documents(shards, start=position)) == texts[index:]


def test_a_file_without_text_or_without_a_footer_is_refused_by_name(tmp_path):
    pq.write_table(pa.table({"content": ["x"]}), tmp_path / "wrong.parquet")
    with pytest.raises(ValueError, match="no string column `text`"):
        dataset.row_group_sizes(tmp_path / "wrong.parquet")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and then nothing")
    with pytest.raises(ValueError, match="21 bytes.*not a readable parquet file"):
        dataset.row_group_sizes(tmp_path / "cut.parquet")


# -- downloads, by the real client from a loopback Hub ------------------------------------------------------------------

@pytest.fixture
def published(tmp_path):
    folder = tmp_path / "published"
    folder.mkdir()
    for name in ("shard_00000.parquet", "shard_00001.parquet", HUB_VAL_SHARD):
        write_shard(folder / name, [f"{name} document {i} " * 20 for i in range(50)])
    return folder


def download(hub, tmp_path, *flags):
    env = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "NANOCHAT_"))}
    env |= hub.env(tmp_path / "hf_home") | {"NANOCHAT_BASE_DIR": str(tmp_path / "base"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-m", "nanochat.dataset", *flags], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    return run, tmp_path / "base" / "base_data"


def test_a_download_brings_the_shards_and_the_validation_shard_and_costs_nothing_twice(tmp_path, published):
    with FakeHub({f"datasets/{dataset.HUB_REPO}": published}) as hub:
        run, folder = download(hub, tmp_path, "-n", "2", "-w", "2")
        assert run.returncode == 0, run.stdout + run.stderr
        assert sorted(path.name for path in folder.iterdir()) == sorted(path.name for path in published.iterdir())
        for path in published.iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes()
        assert "2 training shards with 100 documents" in run.stdout
        seen = len(hub.requests)
        run, _ = download(hub, tmp_path, "-n", "2")
        assert run.returncode == 0 and len(hub.requests) == seen, "a second run asked the server again"


def test_cut_refused_and_corrupted_transfers_are_mended(tmp_path, published):
    faults = {"shard_00000.parquet": ["corrupt"], "shard_00001.parquet": ["cut"], HUB_VAL_SHARD: ["error"]}
    with FakeHub({f"datasets/{dataset.HUB_REPO}": published}, faults) as hub:
        run, folder = download(hub, tmp_path, "-n", "2")
        assert run.returncode == 0, run.stdout + run.stderr
        for path in published.iterdir():
            assert (folder / path.name).read_bytes() == path.read_bytes()
        assert "sha256" in run.stdout, run.stdout


def test_a_failed_download_fails_the_run_and_names_the_file(tmp_path, published):
    (published / "shard_00001.parquet").unlink()
    with FakeHub({f"datasets/{dataset.HUB_REPO}": published}) as hub:
        run, folder = download(hub, tmp_path, "-n", "2")
        assert run.returncode != 0
        assert "1 shards could not be downloaded: shard_00001.parquet" in run.stderr
        assert (folder / HUB_VAL_SHARD).exists(), "what could be fetched is kept"
        assert hub.count("HEAD", "shard_00001.parquet") == 1, "a missing file is not asked for again"


def test_an_impossible_number_of_shards_is_refused():
    with pytest.raises(ValueError, match="num_files=5000"):
        dataset.download_shards(5000)
