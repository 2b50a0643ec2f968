"""The reference's tokenizer files, read without trusting them: `tokenizer.pkl`, a pickled tiktoken.Encoding, and `token_bytes.pt`.

It knows no Tokenizer: what it returns is checked data, from which one is made.
"""
import pickle


def read_encoding(path):
    """A pickled tiktoken.Encoding -> its state: pat_str, mergeable_ranks, special_tokens, of the right types."""
    if not path.is_file():
        raise ValueError(f"there is no {path}: name a reference tokenizer.pkl or the folder that holds it")
    state = None
    try:
        with open(path, "rb") as file:
            state = getattr(EncodingUnpickler(file).load(), "state", None)
        problem = "it is not a pickled tiktoken.Encoding"
    except Exception as error:  # a hostile or torn pickle can raise anything at all
        problem = str(error) or type(error).__name__
    kinds = {"pat_str": None, "mergeable_ranks": bytes, "special_tokens": str}
    if isinstance(state, dict) and all(
            isinstance(state.get(name), str) if kind is None else isinstance(state.get(name), dict)
            and all(isinstance(key, kind) and type(value) is int for key, value in state[name].items()) for name, kind in kinds.items()):
        return state
    raise ValueError(f"{path} ({path.stat().st_size} bytes) cannot be read as a tokenizer: {problem}")


def check_token_bytes(path, expected):
    """ValueError unless the reference's `token_bytes.pt` (one byte count per id) says the same as the tokenizer."""
    import torch  # only here: text needs no tensors
    try:
        found = torch.load(path, map_location="cpu", weights_only=True).tolist()
    except Exception as error:
        raise ValueError(f"{path} ({path.stat().st_size} bytes) cannot be read as a tensor of byte counts: {error}") from error
    if found != expected:
        raise ValueError(f"{path} counts {len(found)} tokens of {sum(found)} bytes, the tokenizer beside it has {len(expected)} of "
                         f"{sum(expected)}: they belong to different tokenizers")


class EncodingState:
    """Stands in for tiktoken.Encoding while a reference pickle is read: keeps the state, runs nothing."""

    def __setstate__(self, state):
        self.state = state


class EncodingUnpickler(pickle.Unpickler):
    """Knows one name. A pickle that asks for another is refused before anything of it is called."""

    def find_class(self, module, name):
        if (module, name) != ("tiktoken.core", "Encoding"):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no tokenizer needs")
        return EncodingState
