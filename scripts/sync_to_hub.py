"""A release on the Hub: model, model card, report, plots and your own documents, in one folder and one commit.

    python -m nanochat.report generate
    python -m scripts.sync_to_hub -i rl -g d4                                # to nanochat-aquarat of the account whose token is in force
    python -m scripts.sync_to_hub --repo-id me/nanochat-aquarat -i rl -g d4
    python -m scripts.sync_to_hub -i rl --no-push                            # only make the folder, to look at it first

hf_release/ of the repository says what goes into the card and what else is published; it is only read. The folder that is made is replaced by the
next release, unless a file of yours is in it. A repository that is made now is private unless --public; nothing on the Hub is deleted.
"""
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import base_dir, print0
from nanochat.configurator import parse
from nanochat.huggingface.exporting import command_line, export_checkpoint
from nanochat.huggingface.hub import check_repo, own_repo, push_folder
from nanochat.huggingface.release import add_files, complete_card, read_release, refuse_to_delete, write_listing, write_plots

REPORT_FILES = ("report.md", "report.html")
NAME = "nanochat-aquarat"


@dataclass(frozen=True)
class Config:
    """Make a release folder of a checkpoint, its report and your documents, and upload it."""
    repo_id: str | None = None      # Hub repository, user/name (None = nanochat-aquarat of the account whose token is in force)
    source: str = "rl"              # [-i] stage of the checkpoint: base, mid, sft or rl
    model_tag: str | None = None    # [-g] folder of the checkpoint (None = the one saved last)
    step: int | None = None         # [-s] step of the checkpoint (None = the newest)
    docs: str | None = None         # folder with card.toml and your documents (None = hf_release of the repository)
    release_dir: str | None = None  # folder to make (None = hf_release in the base directory)
    dtype: str = "float32"          # of the weights: float32 is exact, bfloat16 half as large
    extra: tuple[str, ...] = ()     # further files to release
    message: str | None = None      # of the commit (None = stage, tag and step)
    overwrite: bool = False         # replace what is at --release-dir, files of yours included
    public: bool = False            # make a new repository public; one that exists keeps its visibility
    no_push: bool = False           # only make the folder
    dry_run: bool = False           # make the folder, list what would be uploaded and send nothing


def main(config):
    repo = config.repo_id and check_repo(config.repo_id)
    if config.docs and not Path(config.docs).is_dir():
        raise ValueError(f"docs={config.docs!r} is no folder: give one with card.toml and your documents, or leave it out")
    release = read_release(config.docs or Path(__file__).parents[1] / "hf_release")
    output = Path(config.release_dir or base_dir() / "hf_release").expanduser()
    if not config.overwrite:
        refuse_to_delete(output)
    if not repo and not config.no_push and not config.dry_run:
        repo = own_repo(NAME)                           # before the work, not after
    reports = [path for path in (base_dir() / "report" / name for name in REPORT_FILES) if path.is_file()]
    if len(reports) < len(REPORT_FILES):
        print0("the release has no report: `python -m nanochat.report generate` writes it")
    command = command_line("scripts.sync_to_hub", config, without=("docs", "release_dir", "extra", "message", "overwrite", "public", "no_push", "dry_run"))

    def finish(folder, meta):
        card = folder / "README.md"
        card.write_text(complete_card(card.read_text(encoding="utf-8"), release.card, write_plots(folder, meta["model_tag"])), encoding="utf-8")
        add_files(folder, release.files)
        write_listing(folder, meta)

    folder, meta = export_checkpoint(config.source, config.model_tag, config.step, output, config.dtype, command, (repo or NAME).rpartition("/")[2],
                                     [*reports, *config.extra], config.overwrite, finish)
    if not config.no_push:
        message = config.message or f"{config.source} {meta['model_tag']}, step {meta['step']}"
        push_folder(folder, repo or f"YOU/{NAME}", message, not config.public, config.dry_run)
    return folder


if __name__ == "__main__":
    main(parse(Config))
