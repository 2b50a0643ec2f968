"""The answers of an evaluation on disk, one problem a line: written while they come, read again after a kill, found by name, compared."""
import json
from collections import Counter
from pathlib import Path

from nanochat.common import base_dir, write_atomic
from nanochat.statistics import compare
from tasks.common import load_jsonl
from tasks.metrics import score


class Answers:
    """{path}_answers.jsonl, one problem a line, and beside it, while an evaluation runs, each rank's file of the answers so far.

    A line counts as known if it bears this evaluation's key, whichever rank wrote it; of two about one problem the later counts."""

    def __init__(self, path, key, compute):
        self.path, self.key, self.compute = path, key, compute
        path.parent.mkdir(parents=True, exist_ok=True)
        self.known = {}
        for file in (self.final, *sorted(self.partials())):
            for record in read_lines(file):
                if record.pop("key", None) == key:
                    self.known[record["index"]] = {**self.known.get(record["index"], {}), **record}
        compute.barrier()                               # all have read before any writes
        self.file = open(path.with_name(f"{path.name}_answers.rank{compute.rank}.partial"), "a", encoding="utf-8")

    @property
    def final(self):
        return self.path.with_name(f"{self.path.name}_answers.jsonl")

    def partials(self):
        return self.path.parent.glob(f"{self.path.name}_answers.rank*.partial")

    def keep(self, record):
        # the newline stands first as well: a line torn by a kill must not swallow the next one
        self.file.write(f"\n{json.dumps({**record, 'key': self.key}, ensure_ascii=False)}\n")
        self.file.flush()

    def close(self, records):
        """All records into the final file; the ranks' files are no longer needed."""
        self.file.close()
        self.compute.barrier()
        if self.compute.is_master:
            write_atomic(self.final, "".join(json.dumps({**record, "key": self.key}, ensure_ascii=False) + "\n" for record in records))
            for file in self.partials():
                file.unlink()
        self.compute.barrier()


def read_lines(path):
    """The records of an answers file, without lines that a kill has torn."""
    if not path.is_file():
        return
    yield from (record for record in load_jsonl(path, skipped=Counter()) if isinstance(record.get("index"), int))


def find_answers(name):
    """A file, or the name of an evaluation (sft_d8_AQUA) -> the path of its answers."""
    for path in (Path(name).expanduser(), base_dir() / "eval" / name):
        answers = path.with_name(f"{evaluation_name(path)}_answers.jsonl")
        if answers.is_file():
            return answers
    there = sorted(evaluation_name(path) for path in (base_dir() / "eval").glob("*_answers.jsonl"))
    raise ValueError(f"{name} is neither a file of answers nor one of the {len(there)} evaluations under {base_dir() / 'eval'}: "
                     f"{', '.join(there) or 'run chat_eval first'}")


def evaluation_name(path):
    return path.name.removesuffix("_answers.jsonl").removesuffix(".json")


def compare_answers(path_a, path_b):
    """Two evaluations of the same problems -> the paired tests over the problems in both, and the sizes of the two."""
    runs = [{(record["index"], record["prompt"]): record for record in read_lines(path)} for path in (path_a, path_b)]
    shared = sorted(runs[0].keys() & runs[1].keys())
    if not shared:
        raise ValueError(f"{path_a.name} ({len(runs[0])} problems) and {path_b.name} ({len(runs[1])} problems) have 0 problems in common: "
                         "compare evaluations of the same task, split and order")
    result = compare([score(runs[0][key]) for key in shared], [score(runs[1][key]) for key in shared])
    return {"a": evaluation_name(path_a), "b": evaluation_name(path_b), "problems_a": len(runs[0]), "problems_b": len(runs[1]), **result}
