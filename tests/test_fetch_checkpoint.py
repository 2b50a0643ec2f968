"""A checkpoint goes to the Hub and comes back bit-equal; one that was changed on the way is refused; nothing that is there is lost."""
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from nanochat.checkpoint_manager import load_model, stage_dir
from scripts.fetch_checkpoint import Config, choose
from tests.checkpoints import save_small
from tests.fakes.hub_upload import UploadHub

ROOT = Path(__file__).parents[1]
# One process for many commands, since importing torch takes longer than all of them: argv lists in, (error or None, output) out.
DRIVER = """
import contextlib, io, json, os, sys
from nanochat.configurator import parse
from scripts import fetch_checkpoint
for line in sys.stdin:
    base, argv = json.loads(line)
    os.environ["NANOCHAT_BASE_DIR"] = base
    error, output = None, io.StringIO()
    try:
        with contextlib.redirect_stdout(output):
            fetch_checkpoint.main(parse(fetch_checkpoint.Config, argv))
    except ValueError as problem:
        error = str(problem)
    print(json.dumps([error, output.getvalue()]), flush=True)
"""


@pytest.fixture
def hub(tmp_path):
    with UploadHub(tmp_path / "repos") as server:
        process = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=ROOT, env={**os.environ, **server.env(tmp_path / "home")}, stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, text=True)

        def run(base, *argv):
            process.stdin.write(json.dumps([str(base), list(argv)]) + "\n")
            process.stdin.flush()
            return json.loads(process.stdout.readline())

        server.run = run
        yield server
        process.stdin.close()
        process.wait(timeout=60)


def test_a_checkpoint_comes_back_bit_equal_and_damage_on_the_way_is_refused(hub, tmp_path, monkeypatch):
    home, away = tmp_path / "home_base", tmp_path / "away_base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    save_small("sft")
    error, output = hub.run(home, "--repo", "me/ckpt", "--upload", "--dry-run")
    assert error is None and "nothing was sent" in output and hub.requests == []
    error, output = hub.run(home, "--repo", "me/ckpt", "--upload")
    assert error is None, error
    sent = tmp_path / "repos" / "me" / "ckpt"
    names = ["chatsft_checkpoints/tiny/meta_000012.json", "chatsft_checkpoints/tiny/model_000012.pt", "tokenizer/tokenizer.json"]
    assert sorted(str(path.relative_to(sent)) for path in sent.rglob("*") if path.is_file()) == names and hub.private["me/ckpt"] is True

    hub.faults["chatsft_checkpoints/tiny/model_000012.pt"] = ["corrupt"]
    error, _ = hub.run(away, "--repo", "me/ckpt")
    assert "SHA-256" in error and not list(away.glob("chatsft_checkpoints/**/*.pt")) and not list(away.glob("tokenizer/*"))
    error, output = hub.run(away, "--repo", "me/ckpt")
    assert error is None, error
    for name in names:
        before, after = (home / name).read_bytes(), (away / name).read_bytes()
        if name.endswith("meta_000012.json"):
            before, after = ({**json.loads(text), "files": None} for text in (before, after))
        assert before == after, name
    assert not list((away / ".fetched").iterdir())
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(away))
    assert load_model("sft", "cpu", dtype="float32")[2]["model_tag"] == "tiny"

    error, _ = hub.run(away, "--repo", "me/ckpt")
    assert "already holds sft checkpoints up to step 12" in error
    error, _ = hub.run(away, "--repo", "me/ckpt", "--overwrite")
    assert error is None and (away / names[1]).read_bytes() == (home / names[1]).read_bytes()
    error, _ = hub.run(away, "--repo", "me/ckpt", "--save-as", "d8")
    assert error is None and (away / "chatsft_checkpoints/d8/model_000012.pt").read_bytes() == (home / names[1]).read_bytes()
    error, _ = hub.run(away, "--repo", "me/ckpt", "-i", "rl")
    assert "no rl checkpoint among its 3 files" in error
    error, _ = hub.run(away, "--repo", "me/nothing")
    assert "no repository me/nothing" in error and "HF_TOKEN" in error
    error, _ = hub.run(away, "--repo", "../me")
    assert "user/name" in error

    shutil.copytree(stage_dir("sft", "tiny"), sent / "chatsft_checkpoints" / "other")  # a second tag: which one is meant?
    error, _ = hub.run(away, "--repo", "me/ckpt", "--overwrite")
    assert "other, tiny" in error and "--model-tag" in error


def test_a_repository_in_hugging_faces_layout_is_fetched_as_a_checkpoint(hub, tmp_path, monkeypatch):
    from scripts import export_to_hf
    home, away = tmp_path / "home_base", tmp_path / "away_base"
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(home))
    save_small("sft")
    hub.repos["models/them/export"] = export_to_hf.main(export_to_hf.Config(source="sft"))
    error, _ = hub.run(away, "--repo", "them/export", "-i", "sft", "-g", "theirs")
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
