"""One checkpoint -> one folder: weights, tokenizer, model card, and whatever else a release holds beside them."""
import dataclasses
import shlex
import shutil
from pathlib import Path

from nanochat.checkpoint_manager import load_model
from nanochat.common import print0
from nanochat.compute import DTYPES
from nanochat.huggingface.card import model_card
from nanochat.huggingface.folder import write_folder


def export_checkpoint(stage, model_tag, step, output, dtype, command, name="", extras=(), overwrite=False, finish=None):
    """Load a checkpoint and write it as a Hugging Face folder, with copies of the files `extras` -> (the folder, its metadata).
    `finish(folder, meta)` may add to what is there before the folder takes its place.
    "{model_tag}" in `output` stands for the tag that is found."""
    if dtype not in DTYPES:
        raise ValueError(f"dtype={dtype!r} is not one of {', '.join(DTYPES)}: leave it out for float32, which is exact")
    for path in extras:
        if not Path(path).is_file():
            raise ValueError(f"{path} is to be released and is no file: check its name")
    model, tokenizer, meta = load_model(stage, "cpu", "eval", model_tag, step, dtype="float32")
    output = Path(str(output).replace("{model_tag}", meta["model_tag"]))

    def add_extras(folder):
        for path in extras:
            if (folder / Path(path).name).exists():
                raise ValueError(f"{path} would replace the release's own {Path(path).name}: give it another name")
            shutil.copyfile(path, folder / Path(path).name)
        if finish:
            finish(folder, meta)

    write_folder(output, model, tokenizer, meta, model_card(meta, model.num_params(), command, name, dtype), DTYPES[dtype],
                 overwrite, add_extras)
    print0(f"{output}: {stage} {meta['model_tag']} at step {meta['step']}, {model.num_params():,} parameters in {dtype}")
    return output, meta


def command_line(module, config, without):
    """The command that has this configuration, without the fields that only say where on this machine or what to do afterwards."""
    flags = [f"--{field.name.replace('_', '-')}={shlex.quote(str(getattr(config, field.name)))}" for field in dataclasses.fields(config)
             if field.name not in without and getattr(config, field.name) != field.default]
    return " ".join([f"python -m {module}", *flags])
