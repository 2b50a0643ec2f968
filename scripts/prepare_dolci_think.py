"""Dolci-Think -> a smaller file for a cold start: English, short enough, and mixed from five strata in fixed shares.

    python -m scripts.prepare_dolci_think --output=dolci_think_800k.jsonl --target_rows=800000 --max_tokens=1500
    python -m scripts.prepare_dolci_think --source=rows.jsonl --output=small.jsonl --target-rows=1000 --tokens-per-word=1.5
    python -m scripts.chat_sft --recipe=dolci_mid

40 % structured reasoning, 20 % coding, 15 % instruction and chat, 10 % safety, 15 % reasoning of one to three sentences. A row's rank is
a hash of its text and the seed, and each stratum keeps its lowest ranks: a fair sample, the same whatever the order of the source.
Memory holds ranks and positions, never texts: what may be kept waits in a file. {output}.report.json says why rows were dropped.
"""
import hashlib
import heapq
import json
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import base_dir, print0, write_atomic
from nanochat.configurator import config_dict, parse
from nanochat.tokenizer import get_tokenizer
from tasks.dolci_think import CATEGORIES, categorize, stream_hub_dataset
from tasks.reasoning import in_mode, parse_line, read_messages

# stratum -> (its share in percent, its categories)
STRATA = {"structured reasoning": (40, ("reasoning_math", "reasoning_science", "reasoning_logic", "reasoning_general")), "coding": (20, ("coding",)),
          "instruction and chat": (15, ("chat",)), "safety": (10, ("safety",)), "short reasoning": (15, ("short_reasoning",))}
STRATUM_OF = {category: stratum for stratum, (_, categories) in STRATA.items() for category in categories}


@dataclass(frozen=True)
class Config:
    """Dolci-Think -> a filtered, stratified JSON-lines file for the recipes dolci_mid and dolci_rs_sft."""
    source: str = "allenai/Dolci-Think-SFT-7B"  # data set on the Hub, which is streamed, or a local JSON-lines file
    split: str = "train"                # split of the data set on the Hub
    output: str | None = None           # the file to write (None = dolci_think_800k.jsonl in the base directory)
    target_rows: int = 800_000          # rows to keep; fewer where the source has fewer
    max_tokens: int = 1500              # longest conversation, in tokens
    tokens_per_word: float = 0.0        # guess the tokens from the words instead (1.5 fits English); 0 = count them with the trained tokenizer
    exact_mix: bool = False             # where a stratum has too few rows shrink the others too, so that the shares hold exactly
    max_source_rows: int = -1           # rows of the source to look at (-1 = all)
    seed: int = 42                      # decides which rows are kept, and their order


def main(config):
    if config.target_rows < 1 or config.max_tokens < 6 or config.tokens_per_word < 0:
        raise ValueError(f"target_rows={config.target_rows}, max_tokens={config.max_tokens}, tokens_per_word={config.tokens_per_word} are out of range: "
                         "use at least 1 row and 6 tokens, and no negative number")
    output = Path(config.output).expanduser() if config.output else base_dir() / "dolci_think_800k.jsonl"
    count_tokens = token_counter(config)
    output.parent.mkdir(parents=True, exist_ok=True)
    waiting = output.with_name(f".{output.name}.waiting")
    seen, dropped, samples = Seen(), Counter(), {name: Sample(size) for name, size in quotas(config.target_rows).items()}
    source_rows, usable = 0, Counter()

    try:
        # First pass: what a stratum may keep waits in a file
        with open(waiting, "w+b") as file:
            for row in source(config):
                source_rows += 1
                messages, category, reason = usable_row(row, count_tokens, config.max_tokens)
                line = b"" if reason else json.dumps({"messages": messages, "category": category}, ensure_ascii=False).encode() + b"\n"
                reason = reason or seen.is_known(messages)
                if reason:
                    dropped[reason] += 1
                else:
                    usable[category] += 1
                    sample = samples[STRATUM_OF[category]]
                    rank = rank_of(messages, config.seed)
                    if sample.wants(rank):
                        sample.add(rank, file.tell(), len(line), category)
                        file.write(line)
                if source_rows % 50_000 == 0:
                    print0(f"{source_rows:,} rows read, {usable.total():,} usable, {sum(map(len, samples.values())):,} kept so far")

            # Second pass: the kept lines in the order of their ranks, which is no order at all
            kept = shrink(samples, config)
            if not kept:
                raise ValueError(f"none of {source_rows:,} rows is kept ({dict(dropped)}; usable: {dict(usable)}): look at the source's columns"
                                 + (", or leave --exact-mix off, because a stratum is empty" if config.exact_mix else ""))
            partial = output.with_name(f".{output.name}.partial")
            digest = hashlib.sha256()
            with open(partial, "wb") as result:
                for _, position, length, _ in kept:
                    file.seek(position)
                    line = file.read(length)
                    result.write(line)
                    digest.update(line)
            partial.replace(output)
    finally:
        waiting.unlink(missing_ok=True)

    report = summarize(config, source_rows, usable, dropped, kept, digest.hexdigest())
    write_atomic(output.with_name(f"{output.name}.report.json"), json.dumps(report, indent=1))
    show(report, output)
    return report


# ---------------------------------------------------------------------------------------------------------------------
# Which rows can be used

def source(config):
    """The rows, one after another: of a local file, line by line, or of the Hub."""
    path = Path(config.source).expanduser()
    if path.suffix in (".jsonl", ".json") or path.is_file():
        if not path.is_file():
            raise ValueError(f"source={config.source!r} is not a file, so there are 0 rows: give a JSON-lines file, or the name of a data set on the Hub")
        rows = local_rows(path)
    else:
        rows = stream_hub_dataset(config.source, config.split)
    for number, row in enumerate(rows):
        if number == config.max_source_rows:
            return
        yield row


def local_rows(path):
    with open(path, "rb") as lines:
        for line in lines:
            if line.strip():
                yield parse_line(line)


def usable_row(row, count_tokens, max_tokens):
    """A row -> (messages, category, None) or (messages or None, None, the reason to drop it). The cheap tests come first."""
    messages, reason = read_messages(row)
    if reason is None:
        messages, reason = in_mode(messages, "cot", None)
    if reason is None and not is_english(messages):
        reason = "not English"
    if reason is None and count_tokens(messages) > max_tokens:
        reason = "longer than max_tokens"
    return messages, None if reason else categorize(row, messages), reason


CODE_OR_FORMULA = re.compile(r"```.*?(?:```|\Z)|\$\$.*?\$\$|\$[^$\n]*\$|\\\[.*?\\\]|\\\(.*?\\\)|`[^`\n]*`", re.DOTALL)
# frequent in any English prose, and rare or absent in other languages written with the same letters
ENGLISH = frozenset("the and of that this with are you have not which from what can how will would should because there their then when if it its by but so we my your".split())
# frequent in Spanish, Portuguese, French, Italian, German, Dutch; what is an English word too counts little beside the words above
FOREIGN = frozenset("de la el que los las una por para como un en del se les des est une pour dans qui et le che di il della per sono do da uma com "
                    "und der die das ist nicht ein eine mit den wie een het van dat op".split())
MIN_WORDS, MIN_SHARE, MIN_ASCII, EXCERPT = 20, 0.06, 0.95, 4000


def is_english(messages):
    """A heuristic, asked of all questions together and of all answers together, code and formulas left out: at least 95 % of the letters
    are a-z; of 20 words and more at least 6 % are frequent English ones; and these are no fewer than two frequent words of other
    languages. Long texts are judged by their first 4,000 characters."""
    for role in ("user", "assistant"):
        text = CODE_OR_FORMULA.sub(" ", "\n".join(message["content"][:EXCERPT] for message in messages if message["role"] == role))
        words = re.findall(r"[^\W\d_]+", text.lower())
        letters, ascii_letters = sum(map(len, words)), len("".join(words).encode("ascii", "ignore"))
        english, foreign = (sum(word in known for word in words) for known in (ENGLISH, FOREIGN))
        if ascii_letters < MIN_ASCII * letters or len(words) >= MIN_WORDS and english < MIN_SHARE * len(words) or foreign > max(1, english):
            return False
    return True


def token_counter(config):
    """-> a function from messages to their number of tokens: exact with the trained tokenizer, or guessed from the words."""
    if config.tokens_per_word:
        return lambda messages: int(config.tokens_per_word * sum(len(message["content"].split()) for message in messages))
    try:
        tokenizer = get_tokenizer()
    except (ValueError, OSError) as error:
        raise ValueError(f"max_tokens={config.max_tokens} cannot be counted without a tokenizer ({error}): "
                         "train one by python -m scripts.tok_train, or guess by --tokens-per-word=1.5") from error

    def count(messages):
        # no tokenizer puts 40 characters into the average token: such a text need not be encoded to be refused
        if sum(len(message["content"]) for message in messages) > 40 * config.max_tokens:
            return config.max_tokens + 1
        return len(tokenizer.render_conversation({"messages": messages}, max_tokens=10**9)[0])
    return count


class Seen:
    """Which conversations there were, 8 bytes of hash for each."""

    def __init__(self):
        self.digests = set()

    def is_known(self, messages):
        digest = rank_of(messages, "seen")
        if digest in self.digests:
            return "duplicate"
        self.digests.add(digest)
        return None


def rank_of(messages, seed):
    """A whole number below 2^64 that the seed and the text decide."""
    text = json.dumps([[message["role"], " ".join(message["content"].split())] for message in messages])
    return int.from_bytes(hashlib.blake2b(f"{seed}|{text}".encode(), digest_size=8).digest(), "big")


# ---------------------------------------------------------------------------------------------------------------------
# Strata

def quotas(target_rows):
    """The rows of each stratum: its share, and what rounding leaves goes to the largest remainders."""
    rows = {stratum: target_rows * percent // 100 for stratum, (percent, _) in STRATA.items()}
    largest = sorted(STRATA, key=lambda stratum: -(target_rows * STRATA[stratum][0] % 100))
    for stratum in largest[:target_rows - sum(rows.values())]:
        rows[stratum] += 1
    return rows


class Sample:
    """The `size` lowest ranks of all that were offered, with the places of their lines."""

    def __init__(self, size):
        self.size, self.heap = size, []                 # the heap's first is the highest rank: ranks are stored negated

    def __len__(self):
        return len(self.heap)

    def wants(self, rank):
        return len(self.heap) < self.size or self.size > 0 and rank < -self.heap[0][0]

    def add(self, rank, position, length, category):
        entry = (-rank, position, length, category)
        if len(self.heap) < self.size:
            heapq.heappush(self.heap, entry)
        else:
            heapq.heapreplace(self.heap, entry)

    def lowest(self, count):
        return sorted((-negated, position, length, category) for negated, position, length, category in self.heap)[:count]


def shrink(samples, config):
    """Strata -> what is kept, [(rank, position, length, category)] by rank; with exact_mix all strata shrink to the scarcest's scale."""
    rows = {name: len(sample) for name, sample in samples.items()}
    if config.exact_mix:
        scale = min(rows[name] * 100 // STRATA[name][0] for name in samples)  # the largest total that every stratum can serve
        rows = {name: min(count, rows[name]) for name, count in quotas(min(scale, config.target_rows)).items()}
    return sorted(entry for name, sample in samples.items() for entry in sample.lowest(rows[name]))


# ---------------------------------------------------------------------------------------------------------------------
# The report

def summarize(config, source_rows, usable, dropped, kept, digest):
    kept_categories = Counter(category for _, _, _, category in kept)
    strata, target = {}, quotas(config.target_rows)
    for stratum, (percent, categories) in STRATA.items():
        rows = sum(kept_categories[category] for category in categories)
        strata[stratum] = {"wanted_rows": target[stratum], "rows": rows, "wanted_percent": percent, "percent": round(100 * rows / len(kept), 3)}
    return {"source_rows": source_rows, "usable_rows": usable.total(), "rows": len(kept), "sha256": digest, "strata": strata,
            "categories": {category: {"usable": usable[category], "rows": kept_categories[category]} for category in CATEGORIES},
            "dropped": {**dict(dropped.most_common()), "usable, but not in the sample": usable.total() - len(kept)}, "config": config_dict(config)}


def show(report, output):
    print0(f"{report['rows']:,} of {report['source_rows']:,} rows in {output}")
    for stratum, facts in report["strata"].items():
        short = "" if facts["rows"] >= facts["wanted_rows"] else f": {facts['wanted_rows'] - facts['rows']:,} rows fewer than wanted"
        print0(f"  {stratum:<22}{facts['rows']:>10,}  {facts['percent']:6.2f} % (wanted {facts['wanted_percent']} %){short}")
    for reason, count in report["dropped"].items():
        print0(f"  dropped: {count:,} {reason}")


if __name__ == "__main__":
    main(parse(Config))
