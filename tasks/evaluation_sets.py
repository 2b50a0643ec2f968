"""What is evaluated: the tasks of ChatCORE, the splits that belong to evaluation, and how a task is found on disk."""
from pathlib import Path

from tasks.common import Task, get_task, message_text

CHATCORE = ("ARC-Easy", "ARC-Challenge", "MMLU", "GSM8K", "HumanEval", "SpellingBee", "AQUA")
DEFAULT_SPLITS = {"AQUA": "validation", "ALGEBRA": "validation"}  # their test split is for the final number only; others: test
DATA_FOLDERS = ("aqua", "arc", "mmlu", "gsm8k", "humaneval", "math", "bbh", "mbpp", "smoltalk")  # what a task's name begins with, and its folder
HELD_OUT = {"AQUA": ("validation", "test"), "ALGEBRA": ("validation", "test"), "ARC-Easy": ("validation", "test"), "ARC-Challenge": ("validation", "test"),
            "MMLU": ("validation", "test"), "GSM8K": ("test",), "MATH": ("test",), "MATH-500": ("test",), "BBH": ("test",), "HumanEval": ("test",),
            "MBPP": ("validation", "test"), "MBPP-Sanitized": ("test",), "SpellingBee": ("test",), "SimpleSpelling": ("test",)}
RUNS_CODE = ("HumanEval", "MBPP", "MBPP-Sanitized")


def default_split(name):
    return DEFAULT_SPLITS.get(name.upper(), "test")


def load_evaluation(name, split, data_dir=None, **arguments):
    """A task by name; data_dir is its own folder, or one with aqua/, arc/, mmlu/, ... in it. The task knows its `split` afterwards."""
    folder = name.lower().partition("-")[0]
    if data_dir and folder in DATA_FOLDERS:             # the others make their problems themselves
        own = Path(data_dir).expanduser() / folder
        arguments["data_dir"] = own if own.is_dir() else data_dir
    task = get_task(name, split=split, **arguments)
    task.split = split
    return task


def check_judgement(task):
    """ValueError unless the task has problems, accepts its own reference answer to the first and refuses an empty one: asked before
    hours of writing, since a sandbox may be missing."""
    if len(task) == 0:
        raise ValueError(f"{task.name} {task.split} has 0 problems: check the split and --max-problems")
    if type(task).is_correct is Task.is_correct:
        raise ValueError(f"{task.name} has no right answers: it can be trained on, not scored; choose another task")
    reference = message_text(task[0]["messages"][-1])
    if not task.is_correct(task[0], reference) or task.is_correct(task[0], ""):
        raise ValueError(f"{task.name} {task.split} does not accept its own reference answer to problem 0, or accepts an empty one "
                         f"({reference[-80:]!r}): mend its data")
