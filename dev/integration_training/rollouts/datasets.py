"""DatasetSpec -> Task: rows of the Hub, of a local folder or file, made problems, or a task of this project, as conversations.

The shapes of a row, by its columns: messages; conversations (from, value); prompt + completion; instruction (+ input) + output; question + choices +
answerKey (ARC); question + choices + answer as a number (MMLU); question + options + rationale + correct (AQuA); question + answer. A row of none
of them is left out and counted; a data set without a single usable row is an error. An answer that ends with a letter's line or with
"#### number" is judged as tasks/aqua.py and tasks/gsm8k.py judge theirs, any other answer to a question by its last line, word for word.
"""
import hashlib
import inspect
import random
from collections import Counter
from pathlib import Path

from nanochat.common import print0
from tasks import common
from tasks.aqua import MAX_LETTERS, LetterTask, extract_answer, parse_row, build_conversation
from tasks.arc import PROMPT_END
from tasks.common import Task, TaskMixture, get_task, load_hub_dataset, load_jsonl, message_text, render_choices, task_names
from tasks.gsm8k import NumberTask, answer_parts, extract_number
from tasks.jsonl_chat import check_messages

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant", "system": "system"}


def build_mixture(specs, seed):
    """DatasetSpecs -> one shuffled Task of all their conversations, each repeated as often as its spec says."""
    parts, names = [], Counter()
    for spec in specs:
        task = build_task(spec, seed)
        names[task.name] += 1
        if names[task.name] > 1:                        # a mixture asks the task of this name to judge
            task.name = f"{task.name} #{names[task.name]}"
        parts += [task] * spec.repeat
    return Mixture(parts, seed)


class Mixture(TaskMixture):
    def find_answer(self, conversation, text):
        return self.leaves()[conversation["task"]].find_answer(conversation, text)

    def unjudged(self):
        """The names of the data sets with answers that cannot be checked."""
        return [name for name, task in self.leaves().items() if not getattr(task, "is_judged", type(task).is_correct is not Task.is_correct)]


def build_task(spec, seed):
    stop = {"stop": -1 if spec.max_samples is None else spec.max_samples}
    if spec.name == "synthetic":
        refuse(spec, filepath=spec.filepath)
        return Synthetic(spec.subset, spec.split, spec.size, seed, **stop)
    if spec.name.lower() in {name.lower() for name in task_names()}:
        return registered(spec, stop)
    refuse(spec, size=spec.size)
    if spec.name == "custom_json":
        refuse(spec, subset=spec.subset)
    return Rows(rows_of(spec), "/".join(filter(None, (spec.name if spec.name != "custom_json" else Path(spec.filepath).name, spec.subset))), **stop)


def refuse(spec, **given):
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{spec.name} has no use for {name}={value!r}: set it to None")


def registered(spec, stop):
    """A task of tasks/, its arguments taken from the spec's fields as far as it has such arguments."""
    factory = common._registry[spec.name.lower()][2]
    known = {name for kind in factory.__mro__ if "__init__" in vars(kind) for name in inspect.signature(kind.__init__).parameters}
    arguments = {"split": spec.split} if "split" in known else {}
    is_levels = spec.subset is not None and "levels" in known
    for name, value in (("levels" if is_levels else "subset", spec.subset), ("path" if "path" in known else "data_dir", spec.filepath), ("size", spec.size)):
        if value is not None:
            if name not in known:
                refuse(spec, **{"filepath" if name in ("path", "data_dir") else name: value})
            arguments[name] = tuple(map(int, value.split(","))) if is_levels and name == "levels" else value
    return get_task(spec.name, **arguments, **stop)


def rows_of(spec):
    """The rows of a Hub data set's split, of {split}.jsonl, .json or .parquet in a local folder (there in a folder of the subset's name, or
    with the subset in front), or of a local file."""
    if spec.filepath is None:
        return load_hub_dataset(spec.name, spec.subset, spec.split)
    path = Path(spec.filepath).expanduser()
    if path.is_dir():
        stems = [spec.split]
        if spec.subset is not None:
            stems = [f"{spec.subset}/{spec.split}", f"{spec.subset}_{spec.split}", f"{spec.subset.lower().replace('-', '_')}_{spec.split}"]
        names = [f"{stem}{ending}" for stem in stems for ending in (".jsonl", ".json", ".parquet")]
        found = next((path / name for name in names if (path / name).is_file()), None)
        if found is None:
            raise ValueError(f"{path} has none of the {len(names)} files {', '.join(names)}: put the split there under one of these names")
        path = found
    if not path.is_file():
        raise ValueError(f"filepath={spec.filepath!r} of {spec.name} is neither a file nor a folder: check the path")
    if path.suffix == ".parquet":
        import pyarrow.parquet
        return pyarrow.parquet.read_table(path).to_pylist()
    if path.suffix == ".json":
        import json
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, list) or not all(isinstance(row, dict) for row in content):
            raise ValueError(f"{path} holds {type(content).__name__}, not a list of objects: use one JSON object per line and the ending .jsonl")
        return content
    return load_jsonl(path)


# -- rows of any shape ------------------------------------------------------------------------------------------------

class Rows(Task):
    """The usable ones of some rows. `judged` of a conversation says how its answer is: letter, number, text, or not at all."""

    def __init__(self, rows, name, **slicing):
        super().__init__(**slicing)
        self.name, self.conversations, skipped = name, [], Counter()
        for row in rows:
            if self.stop != -1 and len(self.conversations) == self.stop:
                break
            found = conversation_of(row)
            if isinstance(found, str):
                skipped[found] += 1
            else:
                self.conversations.append(found)
        if not self.conversations:
            raise ValueError(f"none of the {skipped.total()} rows of {name} can be used ({dict(skipped)}): see rollouts/datasets.py for the shapes that are known")
        if skipped:
            print0(f"{name}: {skipped.total()} rows are left out: {dict(skipped)}")
        self.is_judged = all(conversation["judged"] for conversation in self.conversations)

    def num_examples(self):
        return len(self.conversations)

    def get_example(self, index):
        return self.conversations[index]

    def find_answer(self, conversation, text):
        kind = conversation["judged"]
        if kind in ("letter", "number"):
            return {"letter": LetterTask, "number": NumberTask}[kind].find_answer(self, conversation, text)
        return last_line(text)

    def is_correct(self, conversation, completion):
        kind = conversation["judged"]
        if kind == "letter":
            return extract_answer(completion, conversation["letters"]) == conversation["answer_letter"]
        if kind == "number":
            return NumberTask.is_correct(self, conversation, completion)
        if kind == "text":
            return last_line(completion) == last_line(message_text(conversation["messages"][-1])) is not None
        return super().is_correct(conversation, completion)


def last_line(text):
    """The last line that is not empty, its blanks evened out; None if there is none."""
    return " ".join(text.rstrip().rpartition("\n")[2].split()) or None


def conversation_of(row):
    """A row -> its conversation, or why it is left out."""
    if "messages" in row or "conversations" in row:
        turns = row.get("conversations") if isinstance(row.get("conversations"), list) else []
        messages = row.get("messages") or [{"role": ROLES.get(str(turn.get("from") or turn.get("role"))), "content": turn.get("value") or turn.get("content")}
                                           for turn in turns if isinstance(turn, dict)]
        reason = check_messages(messages)
        return reason or {"messages": messages, "judged": None}
    if "options" in row and "correct" in row:
        parsed = parse_row(row)
        return parsed if isinstance(parsed, str) else {**build_conversation(*parsed[:4]), "judged": "letter"}
    if "choices" in row and "question" in row:
        return multiple_choice(row)
    for asked, answered, judged in (("prompt", "completion", None), ("instruction", "output", None), ("question", "answer", "text")):
        if asked in row and answered in row:
            question, answer = row[asked], row[answered]
            if not all(isinstance(text, str) and text.strip() for text in (question, answer)):
                return f"{asked} or {answered} has no text"
            if asked == "instruction" and isinstance(row.get("input"), str) and row["input"].strip():
                question = f"{question}\n\n{row['input']}"
            if judged and extract_number(answer) is not None:
                answer, judged = answer_parts(answer), "number"
            return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], "judged": judged}
    return f"no known shape among the columns {', '.join(sorted(row))}"


def multiple_choice(row):
    """ARC's {choices: {text, label}, answerKey} and MMLU's {choices: [...], answer: 0}."""
    choices, key = row["choices"], row.get("answerKey", row.get("answer"))
    texts, labels = (choices.get("text"), choices.get("label")) if isinstance(choices, dict) else (choices, list(range(len(MAX_LETTERS))))
    are_lists = isinstance(texts, list) and isinstance(labels, list)
    if not are_lists or not isinstance(row["question"], str) or key not in labels[:len(texts)] or not 2 <= len(texts) <= len(MAX_LETTERS):
        return f"no question with 2 to {len(MAX_LETTERS)} choices and a key among their labels"
    letters = list(MAX_LETTERS[:len(texts)])
    letter = letters[labels.index(key)]
    prompt = render_choices(row["question"].strip(), letters, [" ".join(str(text).split()) for text in texts])
    return {"messages": [{"role": "user", "content": f"{prompt}\n{PROMPT_END}"}, {"role": "assistant", "content": f"Answer: {letter}"}],
            "letters": letters, "answer_letter": letter, "judged": "letter"}


# -- made problems ----------------------------------------------------------------------------------------------------

def sorting(r):
    digits = [r.randrange(10) for _ in range(5)]
    return f"Sort {' '.join(map(str, digits))}", " ".join(map(str, sorted(digits)))


def reversing(r):
    digits = [r.randrange(10) for _ in range(5)]
    return f"Reverse {' '.join(map(str, digits))}", " ".join(map(str, reversed(digits)))


def addition(r):
    one, other = r.randrange(10, 100), r.randrange(10, 100)
    return f"{one} + {other} = ?", f"#### {one + other}"


KINDS = {"sorting": sorting, "reversing": reversing, "addition": addition}


class Synthetic(Rows):
    """`size` problems of a kind, made from the seed. A problem's text decides the only split in which it may stand, so none is held out and trained on."""

    def __init__(self, kind, split, size, seed, **slicing):
        if kind not in KINDS or split not in ("train", "validation", "test"):
            raise ValueError(f"synthetic has no subset {kind!r} with the split {split!r}: the kinds are {', '.join(KINDS)}, the splits train, validation, test")
        r, rows = random.Random(f"{kind}|{split}|{seed}"), []
        while len(rows) < size:
            question, answer = KINDS[kind](r)
            if split_of(question) == split:
                rows.append({"question": question, "answer": answer})
        super().__init__(rows, f"synthetic {kind}", **slicing)


def split_of(question):
    """8 of 10 problems are train."""
    return {0: "validation", 1: "test"}.get(hashlib.blake2b(question.encode(), digest_size=8).digest()[0] % 10, "train")
