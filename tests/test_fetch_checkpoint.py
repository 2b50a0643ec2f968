"""A checkpoint goes to the Hub and comes back bit-equal; one that was changed on the way is refused; nothing that is there is lost."""
import json
import shutil
import subprocess
from pathlib import Path

import pytest

from nanochat.checkpoint_manager import load_model, stage_dir
from scripts.fetch_checkpoint import Config, choose
from tests.checkpoints import save_small
from tests.fakes.hub_upload import Commands, UploadHub

ROOT = Path(__file__).parents[1]
FETCH = "scripts.fetch_checkpoint"


@pytest.fixture
def hub(tmp_path):
    with UploadHub(tmp_path / "repos") as server, Commands(server, tmp_path / "home") as run:
        server.run = run
        yield server


def test_a_checkpoint_comes_back_bit_equal_and_damage_on_the_way_is_refused(hub, tmp_path, monkeypatch):
    home, away = tmp_path / "home_base", tmp_path / "away_base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    save_small("sft")
    error, output = hub.run(home, FETCH, "--repo", "me/ckpt", "--upload", "--dry-run")
    assert error is None and "nothing was sent" in output and hub.requests == []
    error, output = hub.run(home, FETCH, "--repo", "me/ckpt", "--upload")
    assert error is None, error
    sent = tmp_path / "repos" / "me" / "ckpt"
    names = ["chatsft_checkpoints/tiny/meta_000012.json", "chatsft_checkpoints/tiny/model_000012.pt", "tokenizer/tokenizer.json"]
    assert sorted(str(path.relative_to(sent)) for path in sent.rglob("*") if path.is_file()) == names and hub.private["me/ckpt"] is True

    hub.faults["chatsft_checkpoints/tiny/model_000012.pt"] = ["corrupt"]
    error, _ = hub.run(away, FETCH, "--repo", "me/ckpt")
    assert "SHA-256" in error and not list(away.glob("chatsft_checkpoints/**/*.pt")) and not list(away.glob("tokenizer/*"))
    error, output = hub.run(away, FETCH, "--repo", "me/ckpt")
    assert error is None, error
    for name in names:
        before, after = (home / name).read_bytes(), (away / name).read_bytes()
        if name.endswith("meta_000012.json"):
            before, after = ({**json.loads(text), "files": None} for text in (before, after))
        assert before == after, name
    assert not list((away / ".fetched").iterdir())
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(away))
    assert load_model("sft", "cpu", dtype="float32")[2]["model_tag"] == "tiny"

    error, _ = hub.run(away, FETCH, "--repo", "me/ckpt")
    assert "already holds sft checkpoints up to step 12" in error
    error, _ = hub.run(away, FETCH, "--repo", "me/ckpt", "--overwrite")
    assert error is None and (away / names[1]).read_bytes() == (home / names[1]).read_bytes()
    error, _ = hub.run(away, FETCH, "--repo", "me/ckpt", "--save-as", "d8")
    assert error is None and (away / "chatsft_checkpoints/d8/model_000012.pt").read_bytes() == (home / names[1]).read_bytes()
    error, _ = hub.run(away, FETCH, "--repo", "me/ckpt", "-i", "rl")
    assert "no rl checkpoint among its 3 files" in error
    error, _ = hub.run(away, FETCH, "--repo", "me/nothing")
    assert "no repository me/nothing" in error and "HF_TOKEN" in error
    error, _ = hub.run(away, FETCH, "--repo", "../me")
    assert "user/name" in error

    shutil.copytree(stage_dir("sft", "tiny"), sent / "chatsft_checkpoints" / "other")  # a second tag: which one is meant?
    error, _ = hub.run(away, FETCH, "--repo", "me/ckpt", "--overwrite")
    assert "other, tiny" in error and "--model-tag" in error


def test_a_repository_in_hugging_faces_layout_is_fetched_as_a_checkpoint(hub, tmp_path, monkeypatch):
    from scripts import export_to_hf
    home, away = tmp_path / "home_base", tmp_path / "away_base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    save_small("sft")
    hub.repos["models/them/export"] = export_to_hf.main(export_to_hf.Config(source="sft"))
    error, _ = hub.run(away, FETCH, "--repo", "them/export", "-i", "sft", "-g", "theirs")
    assert error is None, error
    assert (away / "chatsft_checkpoints/theirs/model_000012.pt").read_bytes() == (home / "chatsft_checkpoints/tiny/model_000012.pt").read_bytes()


def test_the_newest_step_of_the_asked_stage_is_chosen():
    there = ["chatsft_checkpoints/d4/meta_000060.json", "chatsft_checkpoints/d4/meta_000100.json", "chatrl_checkpoints/d4/meta_000120.json", "../meta_000001.json",
             "chatsft_checkpoints/../meta_000900.json", "tokenizer/tokenizer.json"]
    place, files = choose(there, Config("me/x"))
    assert place == "chatsft_checkpoints/d4" and files[0].endswith("model_000100.pt")
    assert choose(there, Config("me/x", step=60))[1][0].endswith("model_000060.pt")
    with pytest.raises(ValueError, match="no mid checkpoint"):
        choose(there, Config("me/x", source="mid"))


def test_the_lite_script_fetches_before_it_starts():
    text = (ROOT / "run_aquarat_lite.sh").read_text(encoding="utf-8")
    assert "scripts.fetch_checkpoint" in text and "SFT_REPO" in text
    assert subprocess.run(["bash", "-n", str(ROOT / "run_aquarat_lite.sh")]).returncode == 0
