"""A checkpoint as a folder that `AutoModelForCausalLM.from_pretrained` loads as NanoChatForCausalLM, and such a folder as a checkpoint.

    config.json generation_config.json model.safetensors      sizes, where an answer ends, weights
    tokenizer.json tokenizer_config.json chat_template.jinja  see tokenizer.py
    nanochat_meta.json                                        our checkpoint's own metadata: stage, step, config, checksums
    README.md                                                 the model card, see card.py

NanoChatForCausalLM is the October 2025 architecture and so is ours: each weight has one counterpart, nothing is transposed or fused.
"""
import dataclasses
import json
import os
import re
import shutil
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochat.common import sha256_of
from nanochat.gpt import GPT, GPTConfig
from nanochat.huggingface.tokenizer import CHAT_TEMPLATE, read_tokenizer, tokenizer_config, tokenizer_json
from nanochat.tokenizer import Tokenizer
from nanochat.vocab_loss import SOFTCAP

META = "nanochat_meta.json"
PARTS = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
         "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
# what NanoChatConfig leaves open and our architecture does not: name -> (value, what transformers takes where it is absent)
FIXED = {"model_type": ("nanochat", None), "hidden_act": ("relu2", "relu2"), "rms_norm_eps": (1e-6, 1e-6), "final_logit_softcapping": (SOFTCAP, SOFTCAP),
         "attention_bias": (False, False), "tie_word_embeddings": (False, False)}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# beyond these a damaged number would cost memory before it is noticed
LARGEST = {"sequence_len": 2**20, "vocab_size": 2**24, "n_layer": 2**12, "n_head": 2**12, "n_kv_head": 2**12, "n_embd": 2**16}


@dataclass(frozen=True)
class Imported:
    """A checkpoint that was read and checked: sizes, float32 weights under our names, tokenizer, and what its metadata said."""
    config: GPTConfig
    weights: dict
    tokenizer: Tokenizer
    meta: dict


def names(n_layer):
    """{our name: Hugging Face's name} of every weight."""
    inner = {f"transformer.h.{layer}.{ours}.weight": f"model.layers.{layer}.{theirs}.weight"
             for layer in range(n_layer) for ours, theirs in PARTS.items()}
    return {"transformer.wte.weight": "model.embed_tokens.weight", **inner, "lm_head.weight": "lm_head.weight"}


# -- writing ----------------------------------------------------------------------------------------------------------

def write_folder(folder, model, tokenizer, meta, card="", dtype=torch.float32, overwrite=False, add=None):
    """Write the whole folder, or nothing; `add(folder)` may put more into it. A folder that is there is replaced only if an export
    made it, or with overwrite."""
    from safetensors.torch import save_file
    with replaced_folder(folder, marker=META, overwrite=overwrite) as partial:
        state = model.state_dict()
        tensors = {theirs: state[ours].to("cpu", dtype).contiguous() for ours, theirs in names(model.config.n_layer).items()}
        save_file(tensors, partial / "model.safetensors", metadata={"format": "pt"})
        os.chmod(partial / "model.safetensors", 0o644)  # safetensors lets only the owner read it
        contents = {
            "config.json": model_config(model.config, tokenizer, dtype),
            "generation_config.json": generation_config(tokenizer),
            "tokenizer.json": tokenizer_json(tokenizer),
            "tokenizer_config.json": tokenizer_config(tokenizer, model.config.sequence_len),
        }
        for name, content in contents.items():
            (partial / name).write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        (partial / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
        if card:
            (partial / "README.md").write_text(card, encoding="utf-8")
        kept = {name: value for name, value in meta.items() if name not in ("files", "model_config")}
        kept["files"] = {name: sha256_of(partial / name) for name in ("model.safetensors", "tokenizer.json", "config.json")}
        (partial / META).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        if add:
            add(partial)


@contextmanager
def replaced_folder(folder, marker, overwrite=False):
    """An empty folder to fill, which takes `folder`'s place when the block ends well and vanishes when it does not. A kill between
    the two renames leaves the old content in .NAME.old, and the next export puts it back."""
    folder = Path(folder).expanduser().absolute()
    if folder.is_file() or (folder.is_dir() and any(folder.iterdir()) and not (folder / marker).is_file() and not overwrite):
        raise ValueError(f"{folder} exists and was not made by an export (it has no {marker}): choose another --output, or --overwrite to replace it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial, old = folder.with_name(f".{folder.name}.{os.getpid()}.partial"), folder.with_name(f".{folder.name}.old")
    if old.exists() and not folder.exists():            # an earlier export was killed between the two renames
        old.rename(folder)
    for path in (partial, old):
        shutil.rmtree(path, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            folder.rename(old)
        partial.rename(folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def model_config(config, tokenizer, dtype):
    """GPTConfig -> the content of config.json. vocab_size counts the rows of the checkpoint, which may be padded beyond the tokenizer's."""
    return {"architectures": ["NanoChatForCausalLM"], "vocab_size": config.vocab_size, "hidden_size": config.n_embd, "intermediate_size": 4 * config.n_embd,
            "num_hidden_layers": config.n_layer, "num_attention_heads": config.n_head, "num_key_value_heads": config.n_kv_head,
            "max_position_embeddings": config.sequence_len, **{name: value for name, (value, _) in FIXED.items()}, "rope_parameters": ROPE,
            "rope_theta": ROPE["rope_theta"], "attention_dropout": 0.0, "initializer_range": 0.02, "use_cache": True, "dtype": str(dtype).removeprefix("torch."),
            **special_ids(tokenizer)}


def generation_config(tokenizer):
    """Greedy, until the assistant ends; <|bos|> would begin another document, so it ends an answer too, as in our engine. No length: a
    max_new_tokens here would silently overrule the max_length that lm-evaluation-harness and others pass."""
    ids = special_ids(tokenizer)
    return {**ids, "eos_token_id": [ids["eos_token_id"], ids["bos_token_id"]], "do_sample": False}


def special_ids(tokenizer):
    return {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.special_ids["<|assistant_end|>"], "pad_token_id": tokenizer.bos_id}


# -- reading ----------------------------------------------------------------------------------------------------------

def read_folder(folder):
    """A folder of NanoChatForCausalLM, exported here or trained elsewhere -> Imported. ValueError names the file or the key that
    is torn, missing, or beyond this architecture."""
    folder = Path(folder)
    meta = read_json(folder / META) if (folder / META).is_file() else {}
    checksums = meta.get("files", {})
    if not isinstance(checksums, dict):
        raise ValueError(f"{folder / META} is damaged: export or fetch the folder again, or delete that file")
    for name, digest in checksums.items():
        if not (folder / name).is_file() or sha256_of(folder / name) != digest:
            raise ValueError(f"{folder / name} is missing or does not have the SHA-256 that {META} records: the folder is torn or changed, "
                             f"export or fetch it again (delete {META} to import a folder that was changed on purpose)")
    config = read_config(folder / "config.json")
    tokenizer = read_tokenizer(folder / "tokenizer.json")
    weights = check_weights({ours: theirs for ours, theirs in names(config.n_layer).items()}, read_safetensors(folder), config, tokenizer, folder)
    if meta and meta.get("tokenizer") != tokenizer.fingerprint:
        raise ValueError(f"{folder / 'tokenizer.json'} is not the tokenizer that {META} names: the folder is mixed from two models")
    return Imported(config, weights, tokenizer, {name: value for name, value in meta.items() if name != "files"})


def read_json(path):
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read ({type(error).__name__}: {error}): restore it, or fetch the folder again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds no JSON object: restore it, or fetch the folder again")
    return content


def read_config(path):
    """config.json -> GPTConfig. transformers 4 wrote rope_theta, 5 writes rope_parameters; both are read."""
    content = read_json(path)
    for name, (value, default) in FIXED.items():
        if content.get(name, default) != value:
            raise ValueError(f"{path} has {name}={content.get(name)!r}, and this architecture {value!r}: it cannot be imported")
    rope = content.get("rope_parameters") or content.get("rope_scaling") or {}
    if not isinstance(rope, dict) or rope.get("rope_type", "default") != "default" or rope.get("rope_theta", content.get("rope_theta", 10000.0)) != 10000.0:
        raise ValueError(f"{path} has the rotary positions {rope or content.get('rope_theta')}, and this architecture {ROPE}: it cannot be imported")
    fields = {"sequence_len": "max_position_embeddings", "vocab_size": "vocab_size", "n_layer": "num_hidden_layers", "n_head": "num_attention_heads",
              "n_embd": "hidden_size"}
    sizes = {ours: content.get(theirs) for ours, theirs in fields.items()}
    sizes["n_kv_head"] = content.get("num_key_value_heads") or sizes["n_head"]
    config = checked_sizes(sizes, path)
    for name, value in (("intermediate_size", 4 * config.n_embd), ("head_dim", config.n_embd // config.n_head)):
        if content.get(name, value) != value:
            raise ValueError(f"{path} has {name}={content[name]!r}, and this architecture {value} at hidden_size={config.n_embd}: it cannot be imported")
    return config


def checked_sizes(sizes, path):
    """{name: number} -> GPTConfig, unless a size is missing, not a positive number, unknown, or beyond any machine."""
    known = {field.name for field in dataclasses.fields(GPTConfig)}
    if set(sizes) != known:
        odd = sorted(set(sizes) ^ known)
        raise ValueError(f"{path} describes the sizes {', '.join(sorted(sizes))}; {', '.join(odd)} {'is' if len(odd) == 1 else 'are'} missing or beyond "
                         "the October 2025 architecture: it cannot be imported")
    for name, value in sizes.items():
        if type(value) is not int or not 1 <= value <= LARGEST[name]:
            raise ValueError(f"{path} has {name}={value!r} instead of a positive number up to {LARGEST[name]}: restore it, or fetch the folder again")
    try:
        return GPTConfig(**sizes)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_safetensors(folder):
    """All tensors of model.safetensors, or of the shards that model.safetensors.index.json lists."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    if (folder / "model.safetensors").is_file():
        files = ["model.safetensors"]
    elif (folder / "model.safetensors.index.json").is_file():
        index = read_json(folder / "model.safetensors.index.json").get("weight_map")
        files = sorted({str(name) for name in index.values()}) if isinstance(index, dict) else []
        if not files or not all(re.fullmatch(r"[\w.-]+\.safetensors", name) for name in files):
            raise ValueError(f"{folder / 'model.safetensors.index.json'} lists no .safetensors files of this folder: fetch the folder again")
    else:
        raise ValueError(f"there is no model.safetensors in {folder}: export it with safe_serialization, the pickled formats are not read")
    tensors = {}
    for name in files:
        try:
            tensors |= load_file(folder / name)
        except (SafetensorError, OSError, ValueError, KeyError, RuntimeError, MemoryError) as error:
            raise ValueError(f"{folder / name} is torn or no safetensors file ({type(error).__name__}: {error}): fetch it again") from error
    return tensors


def check_weights(wanted, found, config, tokenizer, source):
    """{our name: name in `found`} -> {our name: float32 tensor}. ValueError for a key too many or too few, or a wrong shape."""
    beyond = sorted(set(found) - set(wanted.values()))
    missing = sorted(set(wanted.values()) - set(found))
    if beyond:
        raise ValueError(f"{source} has {len(beyond)} weights that the October 2025 architecture does not know, {beyond[0]!r} the first of them: "
                         "a newer nanochat (value embeddings, residual scales, smear ...) computes another function and cannot be imported")
    if missing:
        raise ValueError(f"{source} lacks {len(missing)} of {len(wanted)} weights, {missing[0]!r} the first of them: it is torn or describes other sizes")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(f"{source} has {config.vocab_size} vocabulary rows for a tokenizer of {tokenizer.vocab_size} ids: they belong to different models")
    with torch.device("meta"):
        shapes = {name: tuple(tensor.shape) for name, tensor in GPT(config).state_dict().items()}
    weights = {}
    for ours, theirs in wanted.items():
        tensor = found[theirs]
        if not isinstance(tensor, torch.Tensor) or tuple(tensor.shape) != shapes[ours] or not tensor.is_floating_point():
            shape = f"{tensor.dtype} {tuple(tensor.shape)}" if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{source} has {theirs!r} as {shape} instead of floating-point {shapes[ours]}: it is torn or describes other sizes")
        weights[ours] = tensor.to(torch.float32)        # exact: every bfloat16 and float16 number is a float32 number
    return weights
