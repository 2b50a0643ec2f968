"""Dolci-Think: the reasoning data of Olmo 3's "Think SFT" (https://huggingface.co/datasets/allenai/Dolci-Think-SFT-7B).

    user       Which is heavier, a kilogram of iron or a kilogram of feathers?
    assistant  <think>
               Both are a kilogram.
               </think>

               Neither: both weigh the same.

About two million rows, so they are streamed and never all in memory. scripts/prepare_dolci_think.py makes a smaller file of them.
Every row has one of eight categories: its own, or else the one that `categorize` gives it.
"""
import fcntl
import json
import re
from collections import Counter
from contextlib import contextmanager
from pathlib import Path

from nanochat.common import base_dir, print0, write_atomic
from tasks.common import load_hub_dataset, register
from tasks.reasoning import JsonLines, ReasoningTask, in_mode, read_messages, split_trace

CATEGORIES = ("reasoning_math", "reasoning_science", "reasoning_logic", "reasoning_general", "coding", "chat", "safety", "short_reasoning")
FLUSH_ROWS = 1000                                       # rows of the source between two records of how far a stream has come


@register("DolciThink")
class DolciThink(ReasoningTask):
    """A local JSON-lines file, the Hub's data set, or with `streaming` its beginning, kept in the file `stream_cache`.

    Mode cot keeps <think>...</think>, answer_only drops it. `category_filter` names the categories wanted; `stop` counts the rows
    that pass it, and nothing is read beyond. Rows that cannot be used are counted by reason in `skipped`."""

    def __init__(self, split="train", dataset_id="allenai/Dolci-Think-SFT-7B", local_path=None, streaming=False, stream_cache=None,
                 mode="cot", category_filter=None, **kwargs):
        super().__init__(mode, **kwargs)
        self.categories = read_filter(category_filter)
        if local_path:
            if split != "train":
                raise ValueError(f"{local_path} is 1 split, train, and has no {split!r}: hold rows out by start and stop")
            if not Path(local_path).expanduser().is_file():
                raise ValueError(f"local_path={str(local_path)!r} is not a file, so there are 0 rows: write it by "
                                 "python -m scripts.prepare_dolci_think --output=FILE, or leave local_path out to use the Hub")
            self.use(JsonLines(local_path))
        elif streaming:
            name = f"{dataset_id.replace('/', '--')}.{split}.jsonl"
            cache = Path(stream_cache).expanduser() if stream_cache else base_dir() / "dolci_stream" / name
            skipped = fill_cache(cache, {"dataset_id": dataset_id, "split": split}, lambda row: self.read(row)[1] is None, self.stop,
                                 lambda start: stream_hub_dataset(dataset_id, split, start))
            self.use(JsonLines(cache))
            self.skipped.update(skipped)                # rows of the source that never reached the cache
        else:
            self.use(load_hub_dataset(dataset_id, None, split))

    def read(self, row):
        messages, reason = read_messages(row)
        if reason is None and self.categories is not None:
            category = categorize(row, messages)
            reason = None if category in self.categories else f"category {category}"
        if reason is None:
            messages, reason = in_mode(messages, self.mode, lambda text: split_trace(text)[1])
        return (None, reason) if reason else ({"messages": messages, "category": categorize(row, messages)}, None)


def read_filter(category_filter):
    """None, a name, or several -> None or a set of names. ValueError for one that is no category: it would silently match nothing."""
    if category_filter is None:
        return None
    names = {category_filter} if isinstance(category_filter, str) else set(category_filter)
    if not names or not names <= set(CATEGORIES):
        raise ValueError(f"category_filter={sorted(names)} is not among the {len(CATEGORIES)} categories {', '.join(CATEGORIES)}: "
                         "name at least one of them, or leave it out for all")
    return names


# ---------------------------------------------------------------------------------------------------------------------
# Categories

ORIGINS = ("source", "dataset", "dataset_source", "source_dataset", "subset", "domain", "topic", "task", "id")
# words in the name of a row's origin; the first line with a match decides
ORIGIN_WORDS = (("safety", r"safe|guard|jailbreak|refus|coconot|toxic|\bharm"), ("coding", r"cod(?:e|ing|ex)|python|program|swe|sql|algorithm"),
                ("reasoning_math", r"math|gsm|aime|numina|algebra|geometry"), ("reasoning_science", r"scien|sciriff|physics|chem|biolog|medic|\bstem\b"),
                ("reasoning_logic", r"logic|puzzle|zebra|knights"), ("chat", r"chat|wildchat|persona|instruct|tulu|oasst|aya|follow|\bif\b|-if-"))
PROMPT_WORDS = (("coding", r"```|\b(?:python|javascript|java|c\+\+|rust|sql|html|css|code|coding|function|script|regex|program|debug|compile[rs]?|api)\b"),
                ("reasoning_logic", r"\b(?:puzzles?|riddles?|deduce|logically|premises?|syllogism|knaves?|liars?|truth-tellers?)\b"),
                ("reasoning_science", r"\b(?:physics|chemi\w+|biolog\w+|molecul\w*|atoms?|cells?|proteins?|genes?|enzymes?|velocity|voltage|acids?|species|planets?)\b"),
                ("reasoning_math", r"\\(?:frac|sqrt|boxed|sum|int)|\$[^$]+\$|\b(?:solve|prove|equations?|integers?|polynomials?|triangles?|probability|"
                                   r"calculate|compute|how many|how much|percent|sum|product|derivative|matrix)\b|\d\s*[-+*/^=]\s*\d"),
                ("chat", r"^(?:hi|hello|hey|thanks)\b|\b(?:write|rewrite|draft|summari[sz]e|translate|compose|poem|story|essay|e-?mail|letter|recipe|"
                         r"recommend|advice|tell me about|act as|pretend|role-?play|brainstorm|suggest)\b"))
REFUSAL = re.compile(r"(?:I['’]m sorry|I am sorry|Sorry|I apologi[sz]e)[,.]?\s+(?:but\s+)?I\s|I\s+(?:can['’]?t|cannot|can not|won['’]t|will not|am not able to|am unable to)\s+"
                     r"(?:help|assist|provide|comply|support|do that|fulfil|create|share)", re.IGNORECASE)
SENTENCE = re.compile(r"[^\s.!?][^.!?]*(?:[.!?](?!\s)[^.!?]*)*[.!?]*")
SHORT_SENTENCES, SHORT_CHARS = 3, 500


def categorize(row, messages):
    """A row's category: the one it names, else by the name of its origin, else by the words of its question.

    A refusal is safety wherever it comes from; a trace of one to three sentences is short_reasoning unless safety or code."""
    named = row.get("category")
    if named in CATEGORIES:
        return named
    question = next(message["content"] for message in messages if message["role"] == "user")
    reasoning, answer = split_trace(messages[-1]["content"]) or ("", "")
    origin = " ".join(str(row[name]) for name in ("category", *ORIGINS) if isinstance(row.get(name), str)).lower()
    found = next((category for category, words in ORIGIN_WORDS if re.search(words, origin)), None)
    if found == "safety" or REFUSAL.match(answer):
        return "safety"
    # what a question is about stands at its beginning or its end
    excerpt = question if len(question) < 4000 else f"{question[:2000]}\n{question[-2000:]}"
    found = found or next((category for category, words in PROMPT_WORDS if re.search(words, excerpt, re.IGNORECASE)), "reasoning_general")
    if found != "coding" and is_short(reasoning):
        return "short_reasoning"
    return found


def is_short(reasoning):
    """True for a trace of one to three sentences."""
    return 0 < len(reasoning) <= SHORT_CHARS and len(SENTENCE.findall(reasoning)) <= SHORT_SENTENCES


# ---------------------------------------------------------------------------------------------------------------------
# Streams

def stream_hub_dataset(dataset_id, split, start=0):
    """An iterator over the rows of a split on the Hub, from row `start` on, a few at a time in memory."""
    import datasets                                     # takes seconds to import, and most runs read local files
    try:
        rows = datasets.load_dataset(dataset_id, split=split, streaming=True)
    except ConnectionError as error:
        raise ConnectionError(f"{dataset_id} cannot be streamed because the Hugging Face Hub cannot be reached: go online, or give a local file") from error
    except FileNotFoundError as error:
        raise ValueError(f"the Hugging Face Hub has no {dataset_id}, or it needs a token: check the name and HF_TOKEN") from error
    return iter(rows.skip(start) if start else rows)


def fill_cache(path, origin, is_wanted, count, open_source):
    """Let the file at `path` hold the source's usable rows up to the `count`-th wanted one (-1 = all) -> {reason: rows left out}.

    One line is {"messages", "category"}, whatever the category, so that every filter can use the file. A second file beside it says
    how many rows of the source these are: an interrupted stream goes on after the last row recorded there, a longer one extends it.
    Of several processes one writes and the others wait."""
    path.parent.mkdir(parents=True, exist_ok=True)
    record = path.with_name(f"{path.name}.progress.json")
    with locked(path.with_name(f"{path.name}.lock")):
        progress = {**origin, "source_rows": 0, "bytes": 0, "skipped": {}, "is_complete": False}
        if record.is_file():
            progress = json.loads(record.read_text(encoding="utf-8"))
            if any(progress[name] != value for name, value in origin.items()) or not path.is_file() or path.stat().st_size < progress["bytes"]:
                raise ValueError(f"{path} is not what {record.name} beside it describes ({progress['bytes']} bytes of {progress['dataset_id']} "
                                 f"{progress['split']}): delete both, or choose another stream cache")
        elif path.exists():
            raise ValueError(f"{path} has {path.stat().st_size} bytes and was not written by a stream, which would replace it: "
                             "read it as local_path, or choose another stream cache")
        with open(path, "ab") as file:
            file.truncate(progress["bytes"])            # what came after the last record is read again
        cached = JsonLines(path)
        found = sum(is_wanted(cached[index]) for index in range(len(cached))) if count != -1 else 0
        if progress["is_complete"] or count != -1 and found >= count:
            return progress["skipped"]
        skipped = Counter(progress["skipped"])
        with open(path, "ab") as file:
            def write_progress(is_complete=False):
                file.flush()
                progress.update(bytes=file.tell(), skipped=dict(skipped), is_complete=is_complete)
                write_atomic(record, json.dumps(progress, indent=1))

            write_progress()
            for row in open_source(progress["source_rows"]):
                progress["source_rows"] += 1
                messages, reason = read_messages(row)
                if reason:
                    skipped[reason] += 1
                else:
                    kept = {"messages": messages, "category": categorize(row, messages)}
                    file.write(json.dumps(kept, ensure_ascii=False).encode("utf-8", errors="replace") + b"\n")
                    found += is_wanted(kept)
                if progress["source_rows"] % FLUSH_ROWS == 0:
                    write_progress()
                    print0(f"{progress['source_rows']:,} rows of {origin['dataset_id']} read, {found:,} of them wanted")
                if count != -1 and found >= count:
                    break
            else:
                write_progress(is_complete=True)
                return dict(skipped)
            write_progress()
            return dict(skipped)


@contextmanager
def locked(path):
    """Only one process at a time is inside; a process that dies lets go."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
