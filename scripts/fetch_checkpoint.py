"""Bring a checkpoint from a Hub repository into the base directory, checked by its SHA-256; or take one there.

    python -m scripts.fetch_checkpoint --repo me/nanochat-checkpoints -i sft           # then: bash run_aquarat_lite.sh
    python -m scripts.fetch_checkpoint --repo me/nanochat-checkpoints -i sft -g d4 --upload

A repository holds checkpoints as the base directory does: chatsft_checkpoints/d4/{model_000060.pt, meta_000060.json} and
tokenizer/tokenizer.json. Optimizer shards stay at home: a fetched checkpoint starts a stage, it does not resume one. Repositories in
Hugging Face's layout, or with a reference checkpoint at the top, are fetched as well and imported.
"""
import re
import shutil
from dataclasses import dataclass

from nanochat.checkpoint_manager import FOLDERS, check_tokenizer, find_model_tag, newest_whole, read_meta, stage_dir
from nanochat.common import base_dir, print0
from nanochat.configurator import parse
from nanochat.huggingface.hub import check_repo, download, list_files, push_folder
from nanochat.huggingface.importing import install, known_stage, known_tag, read_any
from nanochat.tokenizer import get_tokenizer

FOREIGN = re.compile(r"(config|generation_config|tokenizer|nanochat_meta|model\.safetensors\.index|meta_\d{6,})\.json"
                     r"|model[\w.-]*\.safetensors|model_\d{6,}\.pt|tokenizer\.pkl|token_bytes\.pt")


@dataclass(frozen=True)
class Config:
    """Fetch a checkpoint from the Hub into the base directory, or upload one."""
    repo: str                       # Hub repository (user/name)
    source: str = "sft"             # [-i] stage of the checkpoint: base, mid, sft or rl
    model_tag: str | None = None    # [-g] folder of the checkpoint (None = the only one there; on upload the one saved last)
    step: int | None = None         # [-s] step of the checkpoint (None = the newest)
    save_as: str | None = None      # model tag to save it under here (None = the one it has there)
    revision: str | None = None     # branch, tag or commit of the repository to fetch from (None = main)
    overwrite: bool = False         # delete the checkpoints that this stage and tag have here
    upload: bool = False            # take the checkpoint to the repository instead
    public: bool = False            # on upload: make a new repository public; one that exists keeps its visibility
    dry_run: bool = False           # list what would be transferred and transfer nothing


def main(config):
    check_repo(config.repo)
    stage_dir(config.source, "")
    return upload(config) if config.upload else fetch(config)


def upload(config):
    """The newest whole checkpoint of a stage -> the repository, without its optimizer shards. Returns the names of its files."""
    tag = config.model_tag or find_model_tag(config.source)
    folder = stage_dir(config.source, tag)
    meta = newest_whole(folder) if config.step is None else read_meta(folder, config.step)
    if meta is None:
        raise ValueError(f"there is no whole checkpoint in {folder}: run the {config.source} stage first")
    check_tokenizer(get_tokenizer(), meta, folder)
    place = f"{FOLDERS[config.source]}/{tag}"
    files = [f"{place}/model_{meta['step']:06d}.pt", f"{place}/meta_{meta['step']:06d}.json", "tokenizer/tokenizer.json"]
    push_folder(base_dir(), config.repo, f"{config.source} {tag}, step {meta['step']}", not config.public, config.dry_run, patterns=files)
    return files


def fetch(config):
    there = list_files(config.repo, config.revision)
    inside, files = choose(there, config)
    if config.dry_run:
        print0("\n".join(["dry run: would fetch", *files]))
        return None
    cache = base_dir() / ".fetched" / config.repo.replace("/", "--")  # an interrupted download goes on here
    download(config.repo, files, cache, config.revision)
    try:
        imported = read_any(cache / inside, step=config.step)  # checks every SHA-256
    except ValueError:
        shutil.rmtree(cache)                            # what arrived damaged must not be taken for what is there already
        raise
    stage = known_stage(imported, config.source)
    tag = known_tag(imported, config.save_as or config.model_tag)
    folder = install(imported, stage, tag, config.overwrite)
    shutil.rmtree(cache)
    print0(f"{folder}: {stage} {tag} at step {imported.meta.get('step', 0)}, fetched from {config.repo}")
    return folder


def choose(there, config):
    """The names of a repository's files -> (folder of the checkpoint in it, names of the files to fetch)."""
    pattern = re.compile(rf"{FOLDERS[config.source]}/((?!\.)[\w.-]+)/meta_(\d{{6,}})\.json")
    found = [(match[1], int(match[2])) for match in map(pattern.fullmatch, there) if match]
    found = [(tag, step) for tag, step in found if config.model_tag in (None, tag) and config.step in (None, step)]
    if found:
        tags = sorted({tag for tag, _ in found})
        if len(tags) > 1:
            raise ValueError(f"{config.repo} has {len(tags)} {config.source} checkpoints, {', '.join(tags)}: choose one by --model-tag")
        step = max(step for _, step in found)
        place = f"{FOLDERS[config.source]}/{tags[0]}"
        return place, [f"{place}/model_{step:06d}.pt", f"{place}/meta_{step:06d}.json", "tokenizer/tokenizer.json"]
    foreign = [name for name in there if FOREIGN.fullmatch(name)]
    if "config.json" in foreign or any(name.startswith("meta_") for name in foreign):
        return ".", foreign
    raise ValueError(f"{config.repo} has no {config.source} checkpoint{f' {config.model_tag}' if config.model_tag else ''} among its {len(there)} files: it would be "
                     f"{FOLDERS[config.source]}/TAG/meta_STEP.json, or config.json with model.safetensors at the top")


if __name__ == "__main__":
    main(parse(Config))
