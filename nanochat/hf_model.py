"""A Hugging Face causal language model behind the interface of `likelihood.GPTScorer`. Needs the dev dependency transformers.

Rows are plain and padded on the right, so that any decoder can read them: no mask, no positions of our own. Tokens are made as
lm-evaluation-harness makes them, so that the scores are the same.
"""
import hashlib
import inspect
from pathlib import Path

import torch

from nanochat.common import sha256_of
from nanochat.likelihood import padded, places, target_scores

LENGTH_NAMES = ("max_position_embeddings", "n_positions", "n_ctx", "max_sequence_length", "seq_length")
UNKNOWN_LENGTH = 2048                                   # of a model whose config names none
MAX_LOGITS = 2**28                                      # numbers at once: a gigabyte of float32


def load_hf(path, compute):
    """A folder (or a name on the Hub) -> (model in eval mode, tokenizer). ValueError says what is missing."""
    try:
        from transformers import AutoModelForCausalLM, AutoTokenizer
    except ImportError as error:
        raise ValueError("a Hugging Face model needs the package transformers, which is not installed: "
                         "install this project's dev dependencies with `uv sync --extra dev`") from error
    if not Path(path).expanduser().is_dir() and (str(path).count("/") > 1 or str(path).startswith((".", "/", "~"))):
        raise ValueError(f"{path} is no folder: give the folder that holds config.json, or the name of a model on the Hub")
    path = Path(path).expanduser() if Path(path).expanduser().is_dir() else path
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=compute.dtype)
        tokenizer = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{path} cannot be loaded as a causal language model ({type(error).__name__}: {str(error).strip().splitlines()[0]}): "
                         "it must hold config.json, the weights and the tokenizer") from error
    return model.to(compute.device).eval(), tokenizer


def folder_fingerprint(path):
    """SHA-256 over the files of a model's folder that decide its scores; of a name on the Hub, the name."""
    folder, digest = Path(path).expanduser(), hashlib.sha256(str(Path(path).name).encode())
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            if file.suffix in (".safetensors", ".bin", ".json", ".model", ".txt"):
                digest.update(f"{file.name} {sha256_of(file)}\n".encode())
    return digest.hexdigest()


def context_length(model, tokenizer):
    """The number of tokens the model reads, as its config (or else its tokenizer) says."""
    for config in (model.config, getattr(model.config, "text_config", None)):
        for name in LENGTH_NAMES:
            if isinstance(getattr(config, name, None), int):
                return getattr(config, name)
    return tokenizer.model_max_length if tokenizer.model_max_length < 10**9 else UNKNOWN_LENGTH


class HFScorer:
    """`add_bos` None puts a BOS token in front where the model's tokenizer does, and in front of a NanoChat, which has seen no text without."""
    packs = False

    def __init__(self, model, tokenizer, add_bos=None):
        self.model, self.tokenizer = model, tokenizer
        self.sequence_len = context_length(model, tokenizer)
        self.keeps_some = "logits_to_keep" in inspect.signature(model.forward).parameters
        if add_bos is None:
            with_special = tokenizer("x")["input_ids"]
            add_bos = model.config.model_type == "nanochat" or tokenizer.bos_token_id is not None and with_special[:1] == [tokenizer.bos_token_id]
        if add_bos and tokenizer.bos_token_id is None:
            raise ValueError("a BOS token is asked for, but the model's tokenizer has none: leave add_bos off")
        self.bos = [tokenizer.bos_token_id] if add_bos else []
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise ValueError("the model's tokenizer has neither a BOS nor an EOS token, so a text without context cannot be scored: name one in its config")
        self.start = [first]

    def encode(self, texts):
        return self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]

    def read(self, rows):
        """Rows without branches -> (log p (N,), whether it is the likeliest token (N,)) of all their scored tokens, on the CPU."""
        inputs = padded(rows, [row.tokens for row in rows], 0).to(self.model.device)
        number, column, targets = (values.to(self.model.device) for values in places(rows))
        kept, column_kept = torch.unique(column, return_inverse=True)
        width = kept.numel() if self.keeps_some else inputs.size(1)
        if len(rows) > 1 and len(rows) * width * self.model.config.vocab_size > MAX_LOGITS:
            half = len(rows) // 2
            return tuple(torch.cat(parts) for parts in zip(self.read(rows[:half]), self.read(rows[half:])))
        if self.keeps_some:                             # logits only in the columns that some row needs
            logits, column = self.model(input_ids=inputs, use_cache=False, logits_to_keep=kept).logits, column_kept
        else:
            logits = self.model(input_ids=inputs, use_cache=False).logits
        logits = logits[number, column]                 # (N, V)
        logprobs, greedy = target_scores(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets)
        return logprobs.cpu(), greedy.cpu()
