"""How fast the pretraining loader makes tokens, and how long a consumer of a given speed would wait for it.

    python dev/bench/loader.py --data DIR --consume 200000      # DIR: parquet files with a column `text`

Two parts: the loader alone, taken as fast as it goes; then a consumer that spends the time a model of `--consume`
tokens/s would. Both begin after one batch of each lane: the buffers fill once, and that time is told apart.
Every parquet file of the folder is read, whatever its name. The last line is JSON.
"""
import json
import sys
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from nanochat.common import base_dir  # noqa: E402
from nanochat.configurator import parse  # noqa: E402
from nanochat.dataloader import PretrainingLoader  # noqa: E402
from nanochat.dataset import iter_documents, shards_dir  # noqa: E402
from nanochat.tokenizer import Tokenizer, get_tokenizer  # noqa: E402
from nanochat.training import take  # noqa: E402


@dataclass(frozen=True)
class Config:
    """Measure the pretraining loader."""
    data: str = ""                # folder of parquet files ("" = where training would look)
    consume: float = 100_000.0    # tokens/s of the simulated consumer
    seconds: float = 10.0         # length of each of the two parts
    device_batch_size: int = 8    # rows
    seq_len: int = 1024           # tokens per row
    num_threads: int = 1          # tokenizer threads
    vocab_size: int = 16384       # of a tokenizer trained here and now where the base directory has none


def main(config):
    shards = sorted(shards_dir(config.data).glob("*.parquet"))
    if not shards:
        raise ValueError(f"{shards_dir(config.data)} holds 0 parquet files: name a folder with --data")
    tokenizer = load_or_train(shards, config.vocab_size)
    tokens = config.device_batch_size * config.seq_len

    def new_loader():
        return PretrainingLoader(tokenizer, shards, config.device_batch_size, config.seq_len, num_threads=config.num_threads)

    with new_loader() as loader:
        began = time.perf_counter()
        take(loader, loader.num_lanes)
        start_seconds = time.perf_counter() - began
        began, count = time.perf_counter(), 0
        while time.perf_counter() - began < config.seconds:
            next(loader)
            count += 1
        rate = count * tokens / (time.perf_counter() - began)
        state_bytes = len(json.dumps(loader.state()))
    print(f"loader alone: {rate:,.0f} tokens/s; {start_seconds:.2f} s to begin; state {state_bytes:,} bytes")

    with new_loader() as loader:
        take(loader, loader.num_lanes)
        loader.wait_seconds, began, longest = 0.0, time.perf_counter(), 0.0
        for _ in range(max(1, int(config.seconds * config.consume / tokens))):
            before = loader.wait_seconds
            next(loader)
            longest = max(longest, loader.wait_seconds - before)
            time.sleep(tokens / config.consume)
        share = loader.wait_seconds / (time.perf_counter() - began)
    print(f"a consumer of {config.consume:,.0f} tokens/s waits {100 * share:.2f} % of its time, {1000 * longest:.0f} ms at most")
    print(json.dumps({"bench": "loader", "tokens_per_s": rate, "threads": config.num_threads, "start_s": start_seconds, "state_bytes": state_bytes,
                      "consumer_tokens_per_s": config.consume, "wait_share": share, "longest_wait_s": longest, "batch": config.device_batch_size,
                      "seq_len": config.seq_len, "vocab_size": tokenizer.vocab_size}))


def load_or_train(shards, vocab_size):
    """The tokenizer of the base directory, else one of `vocab_size` from the first 2,000 documents."""
    if (base_dir() / "tokenizer").exists():
        return get_tokenizer()
    print(f"no tokenizer under {base_dir()}: training one of {vocab_size:,} tokens")
    return Tokenizer.train(islice(iter_documents(shards), 2000), vocab_size)


if __name__ == "__main__":
    main(parse(Config))
