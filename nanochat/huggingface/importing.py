"""Foreign checkpoints become ours: recognise a folder's layout, read and check it, save it as a stage of this base directory.

Three layouts: a Hugging Face folder (config.json); a reference checkpoint of October 2025 (model_*.pt, meta_*.json with model_config,
tokenizer.pkl and token_bytes.pt in it or beside it); a checkpoint of this project, as `scripts.fetch_checkpoint` brings it.
Nothing is unpickled but tensors (weights_only) and the tokenizer through an unpickler that knows one name.
"""
import dataclasses
import json
import re
from pathlib import Path

from nanochat.checkpoint_manager import FOLDERS, read_meta, read_tensors, saved_steps, stage_dir, write_tensors
from nanochat.common import base_dir, write_atomic
from nanochat.gpt import GPT
from nanochat.huggingface.folder import META, Imported, check_weights, checked_sizes, names, read_folder, read_json
from nanochat.tokenizer import FILE_NAME, Tokenizer


def read_any(folder, tokenizer_dir=None, step=None):
    """A folder in any of the three layouts -> Imported. ValueError where it has none of them or is damaged."""
    folder = Path(folder).expanduser()
    if not folder.is_dir():
        raise ValueError(f"there is no folder {folder}: name the one that holds config.json, or model_*.pt and meta_*.json")
    if (folder / "config.json").is_file() or (folder / META).is_file():
        return read_folder(folder)
    return read_checkpoint(folder, tokenizer_dir, step)


def read_checkpoint(folder, tokenizer_dir=None, step=None):
    """A folder of model_*.pt and meta_*.json -> Imported, of its newest step or of `step`."""
    steps = saved_steps(folder)
    if step is None and not steps:
        raise ValueError(f"{folder} has neither config.json nor a meta_*.json: it is no checkpoint")
    step = steps[-1] if step is None else step
    path = folder / f"meta_{step:06d}.json"
    meta = read_json(path)
    if "files" in meta:
        meta = read_meta(folder, step)                  # one of ours: its checksums must agree
    if not isinstance(meta.get("model_config"), dict):
        raise ValueError(f"{path} has no model_config, which tells the model's sizes: it is not the metadata of a checkpoint")
    config = checked_sizes(meta["model_config"], path)
    model_path = folder / f"model_{step:06d}.pt"
    found = read_tensors(model_path)
    if not isinstance(found, dict):
        raise ValueError(f"{model_path} holds a {type(found).__name__} instead of weights by name: it is not a checkpoint")
    found = {str(name).removeprefix("_orig_mod."): tensor for name, tensor in found.items()}  # torch.compile's prefix
    tokenizer = find_tokenizer(folder, tokenizer_dir)
    if "tokenizer" in meta and meta["tokenizer"] != tokenizer.fingerprint:
        raise ValueError(f"the tokenizer beside {folder} is {tokenizer.fingerprint[:12]}, but {path.name} names {str(meta['tokenizer'])[:12]}: "
                         "name the folder of the right one by --tokenizer")
    weights = check_weights({name: name for name in names(config.n_layer)}, found, config, tokenizer, model_path)
    kept = {name: value for name, value in meta.items() if name not in ("files", "model_config")}
    return Imported(config, weights, tokenizer, {"step": step, **kept} if "files" in meta else reference_meta(kept, config, step))


def reference_meta(meta, config, step):
    """The reference's metadata -> ours: its flags, with the length that later stages inherit, and the rest under "reference"."""
    flags = meta.get("user_config") if isinstance(meta.get("user_config"), dict) else {}
    known = {name: value for name, value in flags.items() if name in ("max_seq_len", "device_batch_size", "total_batch_size")}
    return {"step": step, "config": {"max_seq_len": config.sequence_len, "mask_documents": False, **known}, "reference": meta}


def find_tokenizer(folder, tokenizer_dir=None):
    """The tokenizer in the folder, in tokenizer/ inside it, or in tokenizer/ of the base directory that the folder belongs to."""
    places = [Path(tokenizer_dir).expanduser()] if tokenizer_dir else [folder, folder / "tokenizer", folder.absolute().parents[1] / "tokenizer"]
    for place in places:
        if (place / FILE_NAME).is_file():
            return Tokenizer.load(place)
        if (place / "tokenizer.pkl").is_file():
            return Tokenizer.from_reference_pickle(place)
    raise ValueError(f"there is no {FILE_NAME} and no tokenizer.pkl in {' or '.join(map(str, places))}: name their folder by --tokenizer")


def install(imported, stage, model_tag, overwrite=False):
    """Save as the newest checkpoint of a stage of this base directory -> its folder. The tokenizer is saved too; another one that is
    there is never replaced, since the checkpoints beside it need it."""
    if not re.fullmatch(r"[\w.-]+", model_tag) or model_tag.startswith("."):
        raise ValueError(f"model_tag={model_tag!r} is not a plain folder name: use letters, digits, - and _")
    folder, tokenizer_dir = stage_dir(stage, model_tag), base_dir() / "tokenizer"
    meta, step = imported.meta, imported.meta.get("step")
    step = step if type(step) is int and step >= 0 else 0
    if saved_steps(folder) and not overwrite:
        raise ValueError(f"{folder} already holds {stage} checkpoints up to step {saved_steps(folder)[-1]}: --overwrite deletes them, another --model-tag leaves them alone")
    if (tokenizer_dir / FILE_NAME).is_file():
        present = Tokenizer.load(tokenizer_dir)
        if present.fingerprint != imported.tokenizer.fingerprint:
            raise ValueError(f"{tokenizer_dir} holds the tokenizer {present.fingerprint[:12]}, the imported model needs {imported.tokenizer.fingerprint[:12]}: "
                             "import into a base directory of its own by NANOCHAT_BASE_DIR")
    else:
        imported.tokenizer.save(tokenizer_dir)
    model = GPT(imported.config)
    model.load_state_dict(imported.weights)             # the same object as a stage saves, so that the file has the same bytes
    name = f"model_{step:06d}.pt"
    digest = write_tensors(folder / name, model.state_dict())
    config = meta.get("config") if isinstance(meta.get("config"), dict) else {"max_seq_len": imported.config.sequence_len, "mask_documents": False}
    state = {"step": step, "tokens": 0, "seconds": 0.0, "loader": {}, "extra": {}, **(meta.get("state") if isinstance(meta.get("state"), dict) else {})}
    saved = {**meta, "stage": stage, "model_tag": model_tag, "step": step, "finished": meta.get("finished", True), "model_config": dataclasses.asdict(imported.config), "config": config,
             "state": state, "tokenizer": imported.tokenizer.fingerprint, "world_size": meta.get("world_size", 1), "files": {name: digest}}
    write_atomic(folder / f"meta_{step:06d}.json", json.dumps(saved, indent=1))
    for pattern in ("meta_*.json", "model_*.pt", "optim_*.pt"):  # what was there goes last, the meta files first
        for path in sorted(folder.glob(pattern)):
            if path.name not in (name, f"meta_{step:06d}.json"):
                path.unlink()
    return folder


def known_stage(imported, stage):
    """The stage asked for, else the one that the checkpoint's own metadata names. ValueError where neither does."""
    stage = stage or imported.meta.get("stage")
    if not isinstance(stage, str) or stage not in FOLDERS:
        raise ValueError(f"the folder does not say which stage it is ({stage!r}): give one of {', '.join(FOLDERS)} by --source")
    return stage


def known_tag(imported, model_tag):
    """The model tag asked for, else the one in the checkpoint's own metadata, else one made of its depth."""
    return model_tag or str(imported.meta.get("model_tag") or f"d{imported.config.n_layer}")
