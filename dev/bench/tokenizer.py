"""How fast and how large the tokenizer's training is beside PyPI's rustbpe 0.1.0, and its encoding beside tiktoken.

    pip install --target peer rustbpe==0.1.0
    python dev/bench/tokenizer.py --peer peer --data DIR     # DIR: parquet files with a column `text`

Without --data it makes its own text, without --peer it measures ours alone. Every training runs in a process of its own that
reads the corpus from a file document by document, so that its peak memory is the trainer's. Contestants take turns, and the best
of --repeats counts: on a shared machine the mean measures the neighbours. The last line is JSON.
"""
import json
import os
import random
import struct
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))

from nanochat.common import env  # noqa: E402
from nanochat.configurator import parse  # noqa: E402
from nanochat.dataset import iter_documents  # noqa: E402
from nanochat.tokenizer import Tokenizer, split_pattern  # noqa: E402


@dataclass(frozen=True)
class Config:
    """Measure tokenizer training and encoding."""
    data: str = ""              # folder of parquet files ("" = text made here)
    peer: str = ""              # folder where PyPI's rustbpe 0.1.0 is installed ("" = NANOCHAT_PEER_RUSTBPE, or no peer)
    megabytes: float = 40.0     # size of the training text
    encode_megabytes: float = 10.0  # size of the text to encode, taken from the same place
    vocab_size: int = 32768     # tokens to train
    digits: int = 2             # digits in a piece at most
    repeats: int = 3            # runs of every contestant


def main(config):
    peer = config.peer or env("NANOCHAT_PEER_RUSTBPE", "")
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        megabytes = write_corpus(corpus, config)
        results = {"megabytes": round(megabytes, 1), "text": "real" if config.data else "made", "vocab_size": config.vocab_size}

        # Training: everybody in turn, on all cores and on one
        roles = ["ours", "peer"] if peer else ["ours"]
        for cores in ("all", "one"):
            runs = {role: [] for role in roles}
            for _ in range(config.repeats):
                for role in roles:
                    runs[role].append(train(role, corpus, config, peer, cores))
            for role in roles:
                results[f"train_{role}_{cores}_cores"] = {
                    "seconds": min(run["seconds"] for run in runs[role]), "cpu_seconds": min(run["cpu_seconds"] for run in runs[role]),
                    "peak_mb": min(run["peak_mb"] for run in runs[role]), "before_mb": min(run["before_mb"] for run in runs[role]), "merges": runs[role][0]["merges"]}
                print(f"training, {role}, {cores} cores: {results[f'train_{role}_{cores}_cores']}", flush=True)
        if peer:
            ours, theirs = results["train_ours_all_cores"], results["train_peer_all_cores"]
            results["train_speedup"] = round(theirs["seconds"] / ours["seconds"], 2)
            results["train_speedup_one_core"] = round(results["train_peer_one_cores"]["seconds"] / results["train_ours_one_cores"]["seconds"], 2)
            results["same_merges"] = ours["merges"] == theirs["merges"]

        # Encoding: tiktoken and ours in turn, on one thread and on two
        results.update(encode(corpus, config))
        print(f"encoding: {results['encode']}", flush=True)
    print(json.dumps(results))


# A training and its peak memory. VmHWM where the kernel has it: ru_maxrss would also count the parent that forked us.
TRAINING = """
import hashlib, json, resource, struct, sys, time
place, corpus, vocab_size, pattern = sys.argv[1:]
sys.path.insert(0, place)
import rustbpe

def documents():
    with open(corpus, "rb") as file:
        while header := file.read(8):
            yield file.read(struct.unpack("<Q", header)[0]).decode()

def peak_mb():
    try:
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

tokenizer, before = rustbpe.Tokenizer(), peak_mb()
began, cpu_began = time.perf_counter(), time.process_time()
tokenizer.train_from_iterator(documents(), int(vocab_size), pattern=pattern)
seconds, cpu_seconds, peak = time.perf_counter() - began, time.process_time() - cpu_began, peak_mb()
merges = hashlib.sha256(repr(tokenizer.get_mergeable_ranks()).encode()).hexdigest()[:12]
print(json.dumps({"seconds": round(seconds, 3), "cpu_seconds": round(cpu_seconds, 3), "peak_mb": round(peak, 1),
                  "before_mb": round(before, 1), "merges": merges, "file": rustbpe.__file__}))
"""


def train(role, corpus, config, peer, cores):
    """One training in a process of its own -> what it measured."""
    place = str(ROOT if role == "ours" else Path(peer).resolve())
    pinned = ["taskset", "-c", str(min(os.sched_getaffinity(0)))] if cores == "one" else []
    command = [*pinned, sys.executable, "-I", "-c", TRAINING, place, str(corpus), str(config.vocab_size), split_pattern(config.digits)]
    run = json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)
    assert role == "ours" or run["file"].startswith(place), run
    return run


def encode(corpus, config):
    """Both encoders on the same documents with the same vocabulary -> MB/s of each; ValueError where the ids differ."""
    tokenizer = Tokenizer.train(read_corpus(corpus), config.vocab_size, split_pattern(config.digits))
    texts, size = [], 0
    for text in read_corpus(corpus, skip=3):  # documents 0, 3, 6, ...: from all over the corpus
        texts.append(text)
        size += len(text.encode())
        if size >= config.encode_megabytes * 1e6:
            break
    best, reference = {}, tokenizer.tiktoken
    contestants = {"tiktoken_1": lambda: reference.encode_ordinary_batch(texts, num_threads=1), "ours_1": lambda: tokenizer.encode(texts),
                   "tiktoken_2": lambda: reference.encode_ordinary_batch(texts, num_threads=2), "ours_2": lambda: tokenizer.encode(texts, num_threads=2)}
    expected = [reference.encode_ordinary(text) for text in texts]
    for _ in range(config.repeats):
        for name, run in contestants.items():
            began = time.perf_counter()
            ids = run()
            seconds = time.perf_counter() - began
            if ids != expected:
                raise ValueError(f"{name} encodes {len(texts)} documents otherwise than tiktoken does: this is a bug")
            best[name] = max(best.get(name, 0.0), round(size / seconds / 1e6, 1))
    return {"encode": {"megabytes": round(size / 1e6, 1), "mb_per_second": best, "same_ids": True, "bytes_per_token": round(size / sum(map(len, expected)), 3)},
            "encode_speedup_1": round(best["ours_1"] / best["tiktoken_1"], 2), "encode_speedup_2": round(best["ours_2"] / best["tiktoken_2"], 2)}


# -- the corpus: a file of documents, each behind its length

def write_corpus(path, config):
    """Writes at least config.megabytes of text -> how much it was."""
    size, documents = 0, parquet_documents(config.data) if config.data else made_documents()
    with open(path, "wb") as file:
        for text in documents:
            data = text.encode()
            file.write(struct.pack("<Q", len(data)) + data)
            size += len(data)
            if size >= config.megabytes * 1e6:
                return size / 1e6
    raise ValueError(f"the text in {config.data} has only {size / 1e6:.1f} MB of the {config.megabytes} asked for: lower --megabytes")


def read_corpus(path, skip=1):
    with open(path, "rb") as file:
        number = 0
        while header := file.read(8):
            data = file.read(struct.unpack("<Q", header)[0])
            if number % skip == 0:
                yield data.decode()
            number += 1


def parquet_documents(folder):
    """The documents of all parquet files, the files taken in turn, so that a part of them is a mixture."""
    streams = [iter_documents([path]) for path in sorted(Path(folder).glob("*.parquet"))]
    while streams:
        for stream in list(streams):
            text = next(stream, None)
            if text is None:
                streams.remove(stream)
            else:
                yield text


def made_documents(seed=0):
    """Endless documents of invented words whose frequencies follow Zipf's law, with numbers and punctuation between."""
    rng = random.Random(seed)
    syllables = [a + b + c for a in ("", "b", "d", "f", "k", "l", "m", "p", "r", "s", "t", "st", "tr") for b in "aeiou" for c in ("", "n", "r", "s", "ng")]
    words = ["".join(rng.choices(syllables, k=rng.choice((1, 1, 2, 2, 3, 4)))) for _ in range(150_000)]
    while True:
        ranks = [int(150_000 ** rng.random()) - 1 for _ in range(600)]
        pieces = [words[rank] if rng.random() < 0.9 else rng.choice((str(rng.randrange(3000)), words[rank].capitalize(), words[rank] + ".", words[rank] + ",\n"))
                  for rank in ranks]
        yield " ".join(pieces)


if __name__ == "__main__":
    main(parse(Config))
