"""BIG-Bench Hard: 27 tasks on which language models once did worse than people (Suzgun et al. 2022, https://arxiv.org/abs/2210.09261).

    user       Is the following sentence plausible? "Bam Adebayo scored a reverse layup in the Western Conference Finals."
               End with the line "Answer: <yes or no>".
    assistant  Answer: yes

On the Hub it is lukaemon/bbh, one configuration and one split, test, for each task (6,511 rows; MIT, as suzgunmirac/BIG-Bench-Hard). The
question stands as published, options included. Each kind of answer has its own rule of equality; see KINDS.
"""
import json
import re
from collections import Counter
from pathlib import Path

from tasks.aqua import extract_answer
from tasks.common import Task, load_hub_dataset, load_jsonl, message_text, register
from tasks.rewards import parse_number

KINDS = {
    "letter": ("date_understanding", "disambiguation_qa", "geometric_shapes", "hyperbaton", "logical_deduction_five_objects",
               "logical_deduction_seven_objects", "logical_deduction_three_objects", "movie_recommendation", "penguins_in_a_table",
               "reasoning_about_colored_objects", "ruin_names", "salient_translation_error_detection", "snarks", "temporal_sequences",
               "tracking_shuffled_objects_five_objects", "tracking_shuffled_objects_seven_objects", "tracking_shuffled_objects_three_objects"),
    "yes or no": ("causal_judgement", "navigate", "sports_understanding", "web_of_lies"),
    "True or False": ("boolean_expressions",),
    "valid or invalid": ("formal_fallacies",),
    "number": ("multistep_arithmetic_two", "object_counting"),
    "closing brackets": ("dyck_languages",),
    "sorted words": ("word_sorting",),
}
SUBTASKS = {subtask: kind for kind, subtasks in KINDS.items() for subtask in subtasks}
OPTION = re.compile(r"^\(([A-Z])\)[ \t]*(.*)$", re.MULTILINE)
ANSWER = re.compile(r"(?:\*\*)?answer:(?:\*\*)?[ \t]*(.*)", re.IGNORECASE | re.ASCII)


def options_of(question):
    """{letter: text} of the lines "(A) text" behind the last "Options:"."""
    _, found, block = question.rpartition("Options:")
    return dict(OPTION.findall(block)) if found else {}


def extract(text, kind, letters=()):
    """What the last non-empty line "Answer: ..." answers, in the one spelling of its kind; None if it is not of that kind."""
    if kind == "letter":
        return extract_answer(text, letters)
    found = ANSWER.fullmatch(text.rstrip().rpartition("\n")[2].strip())
    answer = found[1].strip("*` \t").removesuffix(".").strip() if found else ""
    if " or " in kind:
        return next((word for word in kind.split(" or ") if word.lower() == answer.lower()), None)
    if kind == "number":
        value = parse_number(answer)
        return None if value is None else str(value)
    if kind == "closing brackets":
        brackets = "".join(found[1].split()).strip("*`.") if found else ""
        return brackets if brackets and set(brackets) <= set(")]}>") else None
    words = re.split(r"[\s,]+", answer.lower()) if kind == "sorted words" else [answer]
    return " ".join(filter(None, words)) or None


@register("BBH", random_accuracy=0.26)
class BBH(Task):
    """Rows of all 27 tasks or of `subtasks`, from data_dir/{subtask}.json (the original release) or .jsonl, or from the Hub.

    With few_shot=k the first k rows of each task are shown as earlier turns, answers included, and not asked. Each conversation
    holds its "chance": what guessing among its answers scores, 0 where the answer is free."""

    def __init__(self, split="test", subtasks=None, few_shot=0, data_dir=None, **slicing):
        super().__init__(**slicing)
        subtasks = list(SUBTASKS) if subtasks is None else [subtasks] if isinstance(subtasks, str) else list(subtasks)
        unknown = [subtask for subtask in subtasks if subtask not in SUBTASKS]
        if split != "test" or unknown or few_shot < 0:
            raise ValueError(f"BBH has the one split test, not {split!r}, {len(SUBTASKS)} subtasks, among which are not {unknown}, and few_shot={few_shot} "
                             f"must be at least 0; the subtasks are {', '.join(SUBTASKS)}")
        self.rows, self.shots, self.few_shot = [], {}, few_shot
        for subtask in subtasks:
            rows = [(subtask, row["input"], str(row["target"]).strip()) for row in load_subtask(subtask, data_dir)]
            self.shots[subtask] = rows[:few_shot]
            self.rows += rows[few_shot:]

    def num_examples(self):
        return len(self.rows)

    def get_example(self, index):
        subtask, question, target = self.rows[index]
        kind, letters, target = read_target(subtask, question, target)
        turns = [message for shot in self.shots[subtask] for message in turn(*shot)]
        chance = 1 / len(letters) if kind == "letter" else 0.5 if " or " in kind else 0.0
        return {"messages": [*turns, *turn(subtask, question, target)], "question": question, "subtask": subtask, "kind": kind, "options": letters, "chance": chance}

    def find_answer(self, conversation, text):
        return extract(text, conversation["kind"], conversation["options"])

    def is_correct(self, conversation, completion):
        answer = self.find_answer(conversation, completion)
        return answer is not None and answer == self.find_answer(conversation, message_text(conversation["messages"][-1]))


def read_target(subtask, question, target):
    """-> (kind, letters, target). A few published targets spell an option out, or are none: those are judged by their text."""
    kind, options = SUBTASKS[subtask], options_of(question)
    if kind == "letter":
        letter = target.strip("()")
        if letter not in options:
            letter = next((key for key, text in options.items() if text.strip().lower() == target.lower()), None)
        kind, target = ("letter", letter) if letter else ("text", target)
    return kind, sorted(options), target


def turn(subtask, question, target):
    kind, _, target = read_target(subtask, question, target)
    return [{"role": "user", "content": f'{question.strip()}\nEnd with the line "Answer: <{kind}>".'}, {"role": "assistant", "content": f"Answer: {target}"}]


def load_subtask(subtask, data_dir):
    if data_dir is None:
        return load_hub_dataset("lukaemon/bbh", subtask, "test")
    folder = Path(data_dir).expanduser()
    if (folder / f"{subtask}.json").is_file():
        return json.loads((folder / f"{subtask}.json").read_text(encoding="utf-8"))["examples"]
    if (folder / f"{subtask}.jsonl").is_file():
        return load_jsonl(folder / f"{subtask}.jsonl")
    there = Counter(path.stem for path in folder.glob("*.json*"))
    raise ValueError(f"{folder} has neither {subtask}.json nor {subtask}.jsonl; it holds {len(there)} JSON files {sorted(there)[:8]}: "
                     "put the 27 files of BIG-Bench-Hard there, name those that are there by subtasks, or leave data_dir out to fetch them from the Hub")
