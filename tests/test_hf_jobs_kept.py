"""What a job finds again when its disk is gone: every place in a base directory is kept or said not to be, no push is ever half done, and no stamp claims
what did not come back.
"""
import hashlib
import json
import re
import shutil
from fnmatch import fnmatchcase
from pathlib import Path

import pytest

from hf_jobs import store
from nanochat.checkpoint_manager import FOLDERS
from nanochat.cloud import run_files, session
from scripts import prepare_offline

ROOT = Path(__file__).parents[1]
LISTS = {name: getattr(run_files, name) for name in ("RECORDS", "LOOSE", "SMALL_DATA", "DATA", "NOT_KEPT")} | {"FOLDERS": tuple(FOLDERS.values())}


# ---------------------------------------------------------------------------------------------------------------------
# One list

def lists_with(name):
    return [key for key, patterns in LISTS.items() if run_files.is_at(name, patterns)]


def places_in_code():
    """{what the code appends to the base directory, up to the next / or a name that is only known when it runs: the file that does}."""
    python = re.compile(r"""\b(?:base_dir\(\)|base) / f?["']([^"'/{]+)""")
    shell = re.compile(r"\$\{?NANOCHAT_BASE_DIR\}?\"?/([\w.$-]+)")
    found = {}
    for room, ending, pattern in (*((room, "py", python) for room in ("nanochat", "tasks", "scripts", "hf_jobs")), *((room, "sh", shell) for room in (".", "scripts", "slurm", "hf_jobs"))):
        for path in sorted((ROOT / room).glob(f"*.{ending}") if room == "." else (ROOT / room).rglob(f"*.{ending}")):
            found |= {name: path.relative_to(ROOT).as_posix() for name in pattern.findall(path.read_text(encoding="utf-8"))}
    return found


def test_every_place_that_the_code_makes_in_a_base_directory_is_in_one_list():
    """Whoever adds a room decides whether a job's store and an upload keep it."""
    found = places_in_code()
    assert set(run_files.RECORDS) - {"logs"} <= found.keys() and {"base_data", "latest_$1_$RUN_ID.json", "rs_cot_$RUN_ID.jsonl", "run_name"} <= found.keys()
    config = prepare_offline.Config()
    found |= dict.fromkeys([*(name for part in prepare_offline.PARTS for name in prepare_offline.file_names(part, config)), prepare_offline.MANIFEST], "scripts/prepare_offline.py")
    wrong = {name: (path, lists_with(name)) for name, path in found.items() if len(lists_with(name)) != 1}
    assert not wrong, f"each belongs into exactly one list of nanochat/cloud/run_files.py: {wrong}"
    assert {lists_with(name)[0] for name in session.DATA_FOLDERS} == {"DATA", "NOT_KEPT"}


def test_no_name_is_in_two_lists():
    for key, patterns in LISTS.items():
        for other, names in LISTS.items():
            assert key == other or not [name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns)]


# ---------------------------------------------------------------------------------------------------------------------
# A folder as store

def write(base, files):
    for name, content in files.items():
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(content)


def checkpoint(base, step, finished, room="base_checkpoints"):
    """A whole checkpoint as checkpoint_manager lists it, of a few bytes, in place of the one before."""
    folder = base / room / "d4"
    shutil.rmtree(folder, ignore_errors=True)
    write(folder, {f"model_{step:06d}.pt": f"weights {step}", f"optim_{step:06d}_rank0.pt": f"moments {step}"})
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    write(folder, {f"meta_{step:06d}.json": json.dumps({"step": step, "finished": finished, "world_size": 1, "files": digests})})


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_text() for path in sorted(folder.rglob("*")) if path.is_file() and ".store" not in path.parts}


@pytest.fixture
def disk(tmp_path, monkeypatch):
    """push(base) -> what was said; pull() -> what a fresh disk holds then. The store is the folder tmp_path/kept."""
    class Disk:
        kept, base = tmp_path / "kept", tmp_path / "base"

        def push(self, base=tmp_path / "base"):
            monkeypatch.setenv("NANOCHAT_BASE_DIR", str(base))
            store.main(store.Config(folder=str(self.kept), push=True))

        def pull(self):
            fresh = tmp_path / "fresh"
            shutil.rmtree(fresh, ignore_errors=True)
            fresh.mkdir()
            monkeypatch.setenv("NANOCHAT_BASE_DIR", str(fresh))
            store.main(store.Config(folder=str(self.kept), pull=True))
            return contents(fresh)
    (tmp_path / "base").mkdir()
    return Disk()


def test_every_record_comes_back_and_what_does_not_is_named(disk, capsys):
    records = {f"{room}/sft_d4 [x=1], ü.json": room for room in run_files.RECORDS} | {"runs/rl_d4_attention/step_000060/layer_0.png": "p", "stages/leaks.done": "1"}
    records |= dict.fromkeys(("rs_cot.jsonl", "rs_cot_r7.jsonl", "latest_sft_r7.json", "run_name", "night.log", run_files.ORIGIN), "x")
    data = {"aqua/train.jsonl": "{}", "base_data/shard_val.parquet": "x", "offline_manifest.json": "{}", "identity_conversations.jsonl": "{}", "wandb/x": "x", "stages/data.done": "1",
            ".store/lock": "", "chat_history": "secret"}
    write(disk.base, records | data | {"my_notes/a.txt": "mine"})
    checkpoint(disk.base, 4, finished=True)
    disk.push()
    assert "only on this disk: my_notes\n" in capsys.readouterr().out
    assert disk.pull() == {name: content for name, content in contents(disk.base).items() if name in records or "_checkpoints" in name}


class PowerCut(BaseException):
    pass


def test_a_push_that_is_cut_short_at_any_moment_has_happened_whole_or_not_at_all(disk, tmp_path, monkeypatch):
    """The old results are replaced by new ones under the same names, by others, and by none."""
    write(disk.base, {"stages/train-base.started": "1", "report/base.json": "old", "runs/base_d4.jsonl": "1\n", "run_name": "r"})
    checkpoint(disk.base, 4, finished=False)
    disk.push()
    old, before = disk.pull(), shutil.copytree(disk.kept, tmp_path / "before")
    write(disk.base, {"stages/train-base.done": "1", "report/base.json": "new", "runs/base_d4.jsonl": "1\n2\n", "eval/base.json": "{}"})
    checkpoint(disk.base, 8, finished=True)
    disk.push()
    new, seen = disk.pull(), []
    assert old != new and not old.keys() <= new.keys()

    for moment in range(1000):
        shutil.rmtree(disk.kept)
        shutil.copytree(before, disk.kept)
        with monkeypatch.context() as patch:
            left = [moment]

            def fragile(function, tear=None):
                def call(*arguments, **keywords):
                    left[0] -= 1
                    if left[0] < 0:
                        if tear:
                            tear(*arguments)
                        raise PowerCut
                    return function(*arguments, **keywords)
                return call
            patch.setattr(store.shutil, "copyfile", fragile(shutil.copyfile, lambda source, target: Path(target).write_bytes(Path(source).read_bytes()[:1])))
            patch.setattr(store.os, "replace", fragile(store.os.replace))
            patch.setattr(Path, "unlink", fragile(Path.unlink))
            try:
                disk.push()
            except PowerCut:
                pass
        whole = left[0] >= 0
        seen.append([old, new].index(disk.pull()))
        disk.push()
        assert disk.pull() == new and contents(disk.kept).keys() == {*new, store.MANIFEST}
        if whole:
            break
    assert seen == sorted(seen) and seen[0] == 0 and seen[-1] == 1 and len(seen) > 20


def test_a_bucket_that_fails_for_a_while_is_tried_again_and_one_that_refuses_or_is_damaged_is_not(disk, monkeypatch, capsys):
    write(disk.base, {"run_name": "r"})
    failures, copy, waits = [OSError(5, "Input/output error"), TimeoutError("timed out")], shutil.copyfile, []

    def copyfile(source, target):
        if Path(target).is_relative_to(disk.kept) and failures:
            raise failures.pop(0)
        return copy(source, target)
    monkeypatch.setattr(store.shutil, "copyfile", copyfile)
    monkeypatch.setattr(store.time, "sleep", waits.append)
    disk.push()
    assert waits == list(store.WAITS[:2]) and "Input/output error" in capsys.readouterr().out and disk.pull() == {"run_name": "r"}
    (disk.kept / store.MANIFEST).write_text("[")
    with pytest.raises(ValueError, match="is damaged"):
        disk.pull()
    (disk.kept / store.MANIFEST).unlink()
    failures.append(PermissionError(13, "Permission denied"))
    with pytest.raises(ValueError, match="may this job write there"):
        disk.push()
    assert len(waits) == 2


@pytest.mark.parametrize("lost, again", [
    ("base_checkpoints/d4/model_000004.pt", ["base-loss", "tokenizer", "train-base"]), ("mid_checkpoints/d4/model_000002.pt", ["base-loss", "tokenizer", "train-mid"]),
    ("tokenizer/tokenizer.json", ["base-loss", "tokenizer"]), ("report/base_loss.json", ["base-loss", "tokenizer"])])
@pytest.mark.parametrize("damage", [lambda path: path.unlink(), lambda path: path.write_text("x")], ids=["missing", "changed"])
def test_no_stamp_claims_what_did_not_come_back(disk, capsys, lost, again, damage):
    stages = ("tokenizer", "train-base", "base-loss", "train-mid")
    write(disk.base, {f"stages/{stage}.{ending}": "1" for stage in stages for ending in ("started", "done")} | {"tokenizer/tokenizer.json": "t", "report/base_loss.json": "b"})
    checkpoint(disk.base, 4, finished=True)
    checkpoint(disk.base, 2, finished=True, room="mid_checkpoints")
    disk.push()
    whole = disk.pull()
    damage(disk.kept / lost)
    assert whole.keys() - disk.pull().keys() == {lost, *(f"stages/{stage}.done" for stage in again)}
    assert f"{disk.kept / lost} is not there with the SHA-256" in capsys.readouterr().out


def test_a_run_that_starts_over_leaves_no_stamp_and_no_checkpoint_of_the_one_before_for_a_third(disk, tmp_path):
    """FRESH=1 fetches nothing and takes the stamps away; a stage whose command has changed empties its folder."""
    write(disk.base, {f"stages/train-{stage}.{ending}": "1" for stage in ("base", "mid") for ending in ("started", "done")} | {"report/mid.json": "m"})
    checkpoint(disk.base, 4, finished=True)
    checkpoint(disk.base, 2, finished=False, room="mid_checkpoints")
    disk.push()
    fresh = tmp_path / "over"
    write(fresh, {"stages/train-base.started": "2", "run_name": "r"})
    disk.push(fresh)
    back = disk.pull()
    assert {name for name in back if name.startswith(("stages/", "base_"))} == {"stages/train-base.started"} and back["stages/train-base.started"] == "2"
    assert "mid_checkpoints/d4/model_000002.pt" in back and back["report/mid.json"] == "m"  # not begun anew, so left alone
