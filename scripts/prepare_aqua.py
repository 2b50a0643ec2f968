"""Download AQuA-RAT, write it as conversations, and report what is wrong with it and what leaks between its splits.

    python -m scripts.prepare_aqua
    python -m scripts.prepare_aqua --source=raw_files --max-train=20000 --output-dir=data/aqua

Each line of {train,validation,test}.jsonl keeps the raw row {question, options, rationale, correct} and adds {messages, letters,
answer_letter}. counts.json says how many rows there are, which were skipped and why, and holds the report that is printed.
"""
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from nanochat.common import base_dir, print0, write_atomic
from nanochat.configurator import parse
from tasks.aqua import COUNTS_FILE, FILES, build_conversation, load_rows, parse_row
from tasks.common import load_hub_dataset, message_text
from tasks.contamination import GRAM, LONG_GRAM, SIMILAR, HeldOut, normalised

LENGTHS = (64, 128, 256)                                # tokens: candidates for max_new_tokens


@dataclass(frozen=True)
class Config:
    """Prepare AQuA-RAT: conversations, counts, and a leak and quality report."""
    output_dir: str | None = None  # where the three splits go (None = aqua/ in the base directory)
    source: str = "hub"            # "hub" = deepmind/aqua_rat, or a folder with raw or prepared files of any of the known names
    revision: str | None = None    # commit, tag or branch of the data set on the Hub (None = the newest)
    max_train: int = -1            # rows of train to keep, from the first on (-1 = all, 0 = do without the split)
    max_validation: int = -1       # rows of validation
    max_test: int = -1             # rows of test
    drop_leaks: bool = True        # leave out train rows that ask a validation or test question again, word for word


def main(config):
    folder = Path(config.output_dir).expanduser() if config.output_dir else base_dir() / "aqua"
    limits = {split: getattr(config, f"max_{split}") for split in FILES}
    if min(limits.values()) < -1 or not any(limits.values()):
        raise ValueError(f"the limits {limits} keep nothing or are below -1: -1 keeps all rows of a split, 0 leaves the split out")

    stale = [f"{split}.jsonl" for split in FILES if limits[split] == 0 and (folder / f"{split}.jsonl").exists()]
    if stale:
        raise ValueError(f"{folder} would keep {len(stale)} files of an earlier preparation ({', '.join(stale)}) beside the new splits: "
                         "remove them, or choose another --output-dir")

    # Held-out splits first: train is compared with all their rows, also with those beyond the limits
    splits, counts = {}, {"source": config.source if config.source == "hub" else "a folder", "revision": config.revision}
    for split in ("validation", "test", "train"):
        if limits[split] != 0:
            splits[split], counts[split] = read_split(split, config)
    held_out = {split: [row["question"] for row in splits[split]] for split in splits if split != "train"}
    if "train" in splits:
        questions = [row["question"] for row in splits["train"]]
        counts["leaks"], repeated = find_leaks(questions, held_out)
        counts["train"]["questions asked twice"] = len(questions) - len(set(map(normalised, questions)))
        if config.drop_leaks and repeated:
            splits["train"] = [row for index, row in enumerate(splits["train"]) if index not in repeated]
            counts["train"]["skipped"]["asks a validation or test question"] = len(repeated)

    files = {}
    for split, rows in splits.items():
        rows = rows if limits[split] == -1 else rows[:limits[split]]
        if not rows:
            raise ValueError(f"no row of {split} can be used ({counts[split]['skipped']}): look at the files of {config.source}")
        files[split] = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
        counts[split] |= {"rows": len(rows), "sha256": hashlib.sha256(files[split]).hexdigest(), **measure(rows)}
    # All is computed before anything is written, and the counts go last: a folder whose counts do not fit is refused by AQUA
    for split, data in files.items():
        write_atomic(folder / f"{split}.jsonl", data)
    write_atomic(folder / COUNTS_FILE, json.dumps(counts, indent=2) + "\n")
    print_report(folder, counts)
    return counts


def read_split(split, config):
    """-> (usable rows with their conversations, counts of what was skipped and flagged)."""
    skipped, flagged, rows, read = Counter(), Counter(), [], 0
    if config.source == "hub":
        raw = load_hub_dataset("deepmind/aqua_rat", "raw", split, config.revision)
    else:
        raw, _ = load_rows(split, config.source, skipped)
    for row in raw:
        read += 1
        parsed = parse_row(row)
        if isinstance(parsed, str):
            skipped[parsed] += 1
            continue
        flagged.update(parsed[-1])
        raw_fields = {key: value for key, value in row.items() if key not in ("messages", "letters", "answer_letter")}
        rows.append({**raw_fields, **build_conversation(*parsed[:-1])})
    facts = {"raw_rows": read + skipped["not a JSON object"], "skipped": dict(skipped), "flagged": dict(flagged)}
    # the file names on the Hub contain the commit that "newest" meant
    files = list(getattr(getattr(raw, "info", None), "download_checksums", None) or {})
    return rows, {**facts, **({"files": files} if files else {})}


# ---------------------------------------------------------------------------------------------------------------------
# Leaks between splits

def find_leaks(questions, held_out):
    """Train questions against {split: questions} -> ({split: overlap counts}, indices of train rows that repeat a held-out question).

    Each count is of held-out questions, since each is one question whose answer training may have seen."""
    index = HeldOut(held_out)
    repeated = {number for number, question in enumerate(questions) if index.see([question]) & {"exact", "normalised"}}
    return index.report(), repeated


# ---------------------------------------------------------------------------------------------------------------------
# Quality

def measure(rows):
    """Letters, the best constant answer, and how long the reference answers are."""
    letters = Counter(row["answer_letter"] for row in rows)
    best = min(letters, key=lambda letter: (-letters[letter], letter))
    answers = [message_text(row["messages"][-1]) for row in rows]
    lengths = sorted(len(answer.split()) for answer in answers)
    facts = {"letters": dict(sorted(letters.items())), "best_constant": [best, round(letters[best] / len(rows), 4)],
             "options": dict(sorted(Counter(str(len(row["letters"])) for row in rows).items())),
             "answer_words": {"median": lengths[len(lengths) // 2], "p90": lengths[int(0.9 * len(lengths))], "max": lengths[-1]}}
    if (base_dir() / "tokenizer").is_dir():
        from nanochat.tokenizer import get_tokenizer    # only here: the data can be prepared before there is a tokenizer
        tokens = [len(ids) for ids in get_tokenizer().encode(answers)]
        facts["answer_tokens_beyond"] = {str(limit): round(sum(n + 1 > limit for n in tokens) / len(tokens), 4) for limit in LENGTHS}
    return facts


def print_report(folder, counts):
    print0(f"AQuA-RAT in {folder}")
    for split in FILES:
        if split not in counts:
            continue
        facts = counts[split]
        letter, share = facts["best_constant"]
        print0(f"\n{split}: {facts['rows']} rows of {facts['raw_rows']}; letters {facts['letters']}; always {letter} scores {100 * share:.2f} %")
        print0(f"  words per answer: {facts['answer_words']}; options per question: {facts['options']}")
        if "answer_tokens_beyond" in facts:
            print0("  answers longer than " + ", ".join(f"{limit} tokens: {100 * part:.1f} %" for limit, part in facts["answer_tokens_beyond"].items()))
        for kind in ("skipped", "flagged"):
            for reason, number in sorted(facts[kind].items()):
                print0(f"  {kind}: {reason}: {number}")
        if facts.get("questions asked twice"):
            print0(f"  questions asked twice within the split: {facts['questions asked twice']}")
    for split, found in counts.get("leaks", {}).items():
        print0(f"\ntrain against {split}, of {found['questions']} questions: exact {found['exact']}, normalised {found['normalised']}, "
               f"with other numbers {found['number_blind']}, {GRAM}-gram Jaccard > {SIMILAR}: {found['jaccard']}, {LONG_GRAM} words in a row: {found['ngram']}")
        if "closest" in found:
            print0(f"  closest pair ({found['closest']['similarity']}): {found['closest'][split][:150]!r} / {found['closest']['train'][:150]!r}")


if __name__ == "__main__":
    main(parse(Config))
