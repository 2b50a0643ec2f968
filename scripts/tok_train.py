"""Train the tokenizer on the pretraining shards.

    python -m scripts.tok_train --vocab-size=65536 --max-chars=2000000000
    python -m scripts.tok_train --data-dir=texts --vocab-size=4096     # parquet files of your own
"""
import time
from dataclasses import dataclass

from nanochat.common import base_dir
from nanochat.configurator import config_dict, parse
from nanochat.dataset import iter_documents, list_shards
from nanochat.report import add_section
from nanochat.tokenizer import SPECIAL_TOKENS, Tokenizer, split_pattern


@dataclass(frozen=True)
class Config:
    """Train the tokenizer on the pretraining shards."""
    max_chars: int = 10_000_000_000  # characters to train on, at most
    doc_cap: int = 10_000            # characters of a document, at most: one long book must not decide the vocabulary
    vocab_size: int = 65536          # ids, the 256 bytes and the 9 special tokens included
    data_dir: str | None = None      # folder of parquet files (None = where the pretraining looks)
    digits: int = 2                  # digits that a token may hold together: 1, 2 or 3


def main(config):
    for name in ("max_chars", "doc_cap"):
        if getattr(config, name) < 1:
            raise ValueError(f"{name}={getattr(config, name)} leaves no text to train on: give 1 or more")
    pattern = split_pattern(config.digits)
    shards = list_shards("train", config.data_dir)
    read = {"documents": 0, "chars": 0, "bytes": 0}

    # Train: the trainer pulls the documents and counts them on all cores meanwhile
    began = time.perf_counter()
    tokenizer = Tokenizer.train(capped(iter_documents(shards), config, read), config.vocab_size, pattern)
    seconds = time.perf_counter() - began
    tokenizer.save(base_dir() / "tokenizer")

    # What came of it
    lengths = [len(token) for token in tokenizer.tokens[256:]]
    mean_length = sum(lengths) / len(lengths) if lengths else 0.0
    speed = read["bytes"] / seconds / 1e6
    print(f"{tokenizer.vocab_size:,} ids from {read['documents']:,} documents, {read['chars']:,} characters ({read['bytes'] / 1e6:.1f} MB) "
          f"in {seconds:.2f} s ({speed:.1f} MB/s, reading included)")
    if tokenizer.vocab_size < config.vocab_size:
        print(f"vocab_size={config.vocab_size}, but the text has no more pairs to merge: the vocabulary has {tokenizer.vocab_size}")
    print(f"merged tokens hold {mean_length:.2f} bytes on average, {max(lengths, default=0)} at most")
    print(f"saved in {base_dir() / 'tokenizer'}, fingerprint {tokenizer.fingerprint[:12]}")
    add_section("tok_train", f"Vocabulary of {tokenizer.vocab_size:,} ids ({len(SPECIAL_TOKENS)} of them special tokens) from {read['documents']:,} "
                f"documents with {read['chars']:,} characters in {seconds:.2f} s ({speed:.1f} MB/s). Merged tokens hold {mean_length:.2f} bytes on "
                f"average, {max(lengths, default=0)} at most.",
                {"config": config_dict(config), **read, "seconds": seconds, "mb_per_second": speed, "vocab_size": tokenizer.vocab_size,
                 "mean_token_bytes": mean_length, "max_token_bytes": max(lengths, default=0), "fingerprint": tokenizer.fingerprint})


def capped(documents, config, read):
    """Documents, each cut to doc_cap characters, until max_chars are reached; counts into `read` what it yields."""
    for text in documents:
        text = text[:min(config.doc_cap, config.max_chars - read["chars"])]
        read["documents"] += 1
        read["chars"] += len(text)
        read["bytes"] += len(text) if text.isascii() else len(text.encode())
        yield text
        if read["chars"] >= config.max_chars:
            return


if __name__ == "__main__":
    main(parse(Config))
