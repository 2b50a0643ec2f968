"""A checkpoint as a Hugging Face folder that transformers, lm-evaluation-harness, vLLM and TRL load; and such folders as checkpoints.

    python -m scripts.export_to_hf -i rl -g d4 --output out/d4-rl            # then AutoModelForCausalLM.from_pretrained("out/d4-rl")
    python -m scripts.export_to_hf -i rl -g d4 --output out/d4-rl --push me/nanochat-d4
    python -m scripts.export_to_hf --import out/d4-rl -i sft -g theirs       # also folders and reference checkpoints that others trained

In float32 the logits are equal to the bit. A repository that --push makes is private unless --public.
"""
from dataclasses import dataclass

from nanochat.common import base_dir, print0
from nanochat.configurator import parse
from nanochat.huggingface.exporting import command_line, export_checkpoint
from nanochat.huggingface.hub import check_repo, push_folder
from nanochat.huggingface.importing import install, known_stage, known_tag, read_any


@dataclass(frozen=True)
class Config:
    """Export a checkpoint as a Hugging Face folder, or import one with --import."""
    source: str | None = None      # [-i] stage to export (None = rl), or to import as (None = as the folder says)
    model_tag: str | None = None   # [-g] folder of the checkpoint (None = the one saved last; on import as the folder says)
    step: int | None = None        # [-s] step of the checkpoint (None = the newest)
    output: str | None = None      # folder to write (None = hf_export/TAG_STAGE in the base directory)
    dtype: str = "float32"         # of the written weights: float32 is exact, bfloat16 half as large
    import_dir: str | None = None  # [--import] folder to import: Hugging Face's, a reference checkpoint (October 2025), or one of ours
    tokenizer: str | None = None   # on import: folder of the tokenizer, where it is not in or beside the imported folder
    overwrite: bool = False        # replace what is there: any folder at --output, or the checkpoints of that stage and tag
    push: str | None = None        # Hub repository (user/name) to upload the exported folder to
    public: bool = False           # make a new repository public; one that exists keeps its visibility
    dry_run: bool = False          # with --push: list what would be uploaded and send nothing


def main(config):
    if config.import_dir:
        return import_folder(config)
    if config.push:
        check_repo(config.push)                         # before the work, not after
    stage = config.source or "rl"
    output = config.output or base_dir() / "hf_export" / f"{{model_tag}}_{stage}"
    command = command_line("scripts.export_to_hf", config, without=("output", "overwrite", "push", "public", "dry_run"))
    output, meta = export_checkpoint(stage, config.model_tag, config.step, output, config.dtype, command,
                                     (config.push or "").partition("/")[2], overwrite=config.overwrite)
    if config.push:
        push_folder(output, config.push, f"{stage} {meta['model_tag']}, step {meta['step']}", not config.public, config.dry_run)
    return output


def import_folder(config):
    if config.push or config.output:
        raise ValueError("--import reads a folder into the base directory and takes neither --output nor --push: export in a second command")
    imported = read_any(config.import_dir, config.tokenizer, config.step)
    stage = known_stage(imported, config.source)
    tag = known_tag(imported, config.model_tag)
    folder = install(imported, stage, tag, config.overwrite)
    print0(f"{folder}: imported {config.import_dir} as {stage} {tag} at step {imported.meta.get('step', 0)}, "
           f"{sum(weight.numel() for weight in imported.weights.values()):,} parameters")
    return folder


if __name__ == "__main__":
    main(parse(Config))
