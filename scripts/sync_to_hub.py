"""A release on the Hub: model, model card, report and any files beside them, in one folder and one commit.

    python -m nanochat.report generate
    python -m scripts.sync_to_hub --repo-id me/nanochat-aquarat -i rl -g d4
    python -m scripts.sync_to_hub --repo-id me/nanochat-aquarat --no-push       # only make the folder, to look at it first

The folder is made anew each time, so that nothing of an earlier release stays in it. A repository that is made now is private unless --public.
"""
from dataclasses import dataclass

from nanochat.common import base_dir, print0
from nanochat.configurator import parse
from nanochat.huggingface.exporting import command_line, export_checkpoint
from nanochat.huggingface.hub import check_repo, push_folder

REPORT_FILES = ("report.md", "report.html")


@dataclass(frozen=True)
class Config:
    """Make a release folder of a checkpoint and its report, and upload it."""
    repo_id: str                    # Hub repository (user/name)
    source: str = "rl"              # [-i] stage of the checkpoint: base, mid, sft or rl
    model_tag: str | None = None    # [-g] folder of the checkpoint (None = the one saved last)
    step: int | None = None         # [-s] step of the checkpoint (None = the newest)
    release_dir: str | None = None  # folder of the release (None = hf_release in the base directory)
    dtype: str = "float32"          # of the weights: float32 is exact, bfloat16 half as large
    extra: tuple[str, ...] = ()     # further files to release
    message: str | None = None      # of the commit (None = stage, tag and step)
    overwrite: bool = False         # replace a folder at --release-dir that no release made
    public: bool = False            # make a new repository public; one that exists keeps its visibility
    no_push: bool = False           # only make the folder
    dry_run: bool = False           # make the folder, list what would be uploaded and send nothing


def main(config):
    check_repo(config.repo_id)
    reports = [path for path in (base_dir() / "report" / name for name in REPORT_FILES) if path.is_file()]
    if len(reports) < len(REPORT_FILES):
        print0("the release has no report: `python -m nanochat.report generate` writes it")
    command = command_line("scripts.sync_to_hub", config, without=("release_dir", "extra", "message", "overwrite", "public", "no_push", "dry_run"))
    folder, meta = export_checkpoint(config.source, config.model_tag, config.step, config.release_dir or base_dir() / "hf_release", config.dtype, command,
                                     config.repo_id.partition("/")[2], [*reports, *config.extra], config.overwrite)
    if not config.no_push:
        message = config.message or f"{config.source} {meta['model_tag']}, step {meta['step']}"
        push_folder(folder, config.repo_id, message, not config.public, config.dry_run)
    return folder


if __name__ == "__main__":
    main(parse(Config))
