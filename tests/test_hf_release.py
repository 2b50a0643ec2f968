"""A release: the author's words are in the card, the author's files beside it, nothing of the author's is deleted, and the Hub gets all of it."""
import json
import shutil
from pathlib import Path

import pytest
import yaml

from nanochat.huggingface import release
from nanochat.huggingface.folder import read_folder
from scripts import sync_to_hub
from tests.checkpoints import save_small
from tests.fakes.hub_upload import Commands, UploadHub

ROOT = Path(__file__).parents[1]
CARD = """title = "A small solver"
summary = "It was made on a *Sunday*."
tags = ["math", "reinforcement-learning"]
datasets = ["me/my-problems"]
[links]
Curves = "https://wandb.ai/me/x"
"""


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("release")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        save_small("rl")
    log = folder / "runs" / "rl_tiny.jsonl"
    log.write_text(log.read_text() + "".join(json.dumps({"step": step, "rl/mean_reward": 0.5 + step / 100, "train/loss": 1.0}) + "\n" for step in range(13, 20)))
    (folder / "report").mkdir()
    for name in ("report.md", "report.html"):
        (folder / "report" / name).write_text("numbers")
    return folder


@pytest.fixture
def base(run_folder, tmp_path, monkeypatch):
    shutil.copytree(run_folder, tmp_path / "base")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    return tmp_path / "base"


@pytest.fixture
def docs(tmp_path):
    folder = tmp_path / "docs"
    (folder / "pictures").mkdir(parents=True)
    for name, text in {"card.toml": CARD, "README.md": "notes to myself", "PAPER.md": "# Paper\n", "pictures/a.txt": "a", ".secret": "no"}.items():
        (folder / name).write_text(text)
    return folder


def make(**knobs):
    return sync_to_hub.main(sync_to_hub.Config(no_push=True, **knobs))


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in Path(folder).rglob("*") if path.is_file()}


def test_the_release_holds_model_card_report_plots_and_the_authors_files(base, docs):
    before = contents(docs)
    folder = make(docs=str(docs))
    names = set(contents(folder))
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "report.html", "PAPER.md", "pictures/a.txt", "release.json"} <= names
    assert ".secret" not in names and "card.toml" not in names and contents(docs) == before
    read_folder(folder)                                  # the model's own checksums agree
    listing = json.loads((folder / "release.json").read_text())
    assert set(listing["files"]) == names - {"release.json"} and listing["step"] == 12 and listing["stage"] == "rl"
    plots = [name for name in names if name.startswith("plots/")]
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert plots and all(f"]({name})" in card and (folder / name).read_text().startswith("<svg") for name in plots)


def test_the_card_has_the_authors_words_in_their_places_and_keeps_its_own(base, docs):
    text = (make(docs=str(docs)) / "README.md").read_text(encoding="utf-8")
    front, body = yaml.safe_load(text.split("---\n")[1]), text.split("---\n", 2)[2]
    assert body.startswith("\n# A small solver\n\nIt was made on a *Sunday*.\n\n[Curves](https://wandb.ai/me/x)\n\nA language model of")
    assert front["tags"] == ["nanochat", "conversational", "rl", "reinforcement-learning", "math"] and "me/my-problems" in front["datasets"]
    assert "45.7 %" in text and "## What it cannot do" in text and "nanochat-aquarat" not in body.split("\n## ")[0].split("\n\nA language")[0]
    from huggingface_hub import ModelCard
    assert ModelCard(text).data.to_dict()["license"] == "mit"


def test_the_folder_in_the_repository_is_one(base):
    folder = make()
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "# nanochat-aquarat\n" in card and (folder / "REPRODUCE.md").is_file() and "What a release on the Hub holds" not in card
    assert str(base) not in card and str(Path.home()) + "/" not in card


def test_a_second_release_replaces_the_first_and_leaves_nothing_of_it(base, docs):
    folder = make(docs=str(docs))
    (docs / "PAPER.md").unlink()
    assert make(docs=str(docs)) == folder and not (folder / "PAPER.md").exists() and (folder / "pictures/a.txt").exists()


@pytest.mark.parametrize("touch", ["mine.md", "README.md", "plots/mine.svg", "nanochat_meta.json"])
def test_a_file_that_the_author_put_or_changed_there_is_never_deleted(base, docs, touch):
    folder = make(docs=str(docs))
    (folder / touch).write_text("my own words")
    before = contents(folder)
    with pytest.raises(ValueError, match=touch.replace(".", r"\.")):
        make(docs=str(docs))
    assert contents(folder) == before
    make(docs=str(docs), overwrite=True)
    assert (folder / touch).exists() == (touch in ("README.md", "nanochat_meta.json"))


def test_a_strangers_folder_is_left_alone(base, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis/chapter.tex").write_text("x")
    with pytest.raises(ValueError, match="not a release"):
        make(release_dir=str(tmp_path / "thesis"))
    assert (tmp_path / "thesis/chapter.tex").read_text() == "x"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "release.json", "report.md", "nanochat_meta.json"])
def test_no_document_replaces_a_part_of_the_model(base, docs, name):
    (docs / name).write_text("x")
    if name == "release.json":
        folder = make(docs=str(docs))
        assert json.loads((folder / name).read_text())["step"] == 12
    else:
        with pytest.raises(ValueError, match="give it another name"):
            make(docs=str(docs))
        assert not (base / "hf_release").exists()


@pytest.mark.parametrize("text, problem", [
    ("tittle = 'x'", "did you mean 'title'"), ("title = 3", "must be a text"), ("tags = [1]", "must be texts"), ("tags = 'math'", "must be texts"),
    ("[links]\na = 'javascript:alert(1)'", "must begin with https"), ("[links]\na = 'https://x) [y'", "must begin with https"), ("datasets = ['x']", "owner/name"),
    ("title = 'a\\nb'\n[", "no TOML"), ('title = "a\\nb"', "one line")])
def test_a_card_file_that_no_card_can_say_is_refused(tmp_path, text, problem):
    (tmp_path / "card.toml").write_text(text)
    with pytest.raises(ValueError, match=problem):
        release.read_release(tmp_path)


def test_the_hub_gets_every_file_under_the_token_owners_name_and_loses_none(base, docs, tmp_path):
    with UploadHub(tmp_path / "repos") as hub, Commands(hub, tmp_path / "home") as run:
        error, output = run(base, "scripts.sync_to_hub", "-i", "rl", "--docs", str(docs), "--dry-run")
        assert error is None and "nothing was sent" in output and hub.requests == []
        error, output = run(base, "scripts.sync_to_hub", "-i", "rl", "--docs", str(docs))
        assert error is None, error
        there = tmp_path / "repos" / "me" / "nanochat-aquarat"
        assert hub.private == {"me/nanochat-aquarat": True} and all(hub.validated) and hub.validated
        assert contents(there) == contents(base / "hf_release")
        (docs / "PAPER.md").unlink()
        error, _ = run(base, "scripts.sync_to_hub", "-i", "rl", "--docs", str(docs), "--repo-id", "me/nanochat-aquarat")
        assert error is None and (there / "PAPER.md").is_file() and hub.commits == [("me/nanochat-aquarat", "rl tiny, step 12")] * 2
        error, output = run(base, "scripts.sync_to_hub", "-i", "rl", "--docs", str(docs), "--repo-id", "me/other", token="hf_wrong")
        assert "hf auth login" in error and "hf_wrong" not in error + output
