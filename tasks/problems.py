"""The problems of a reinforcement-learning run: which tasks, how often each, which problem stands at which place.

Place 0, 1, 2, ... counts the problems a run asks. What stands at a place is a pure function of the weights, the seed and the levels
that are open, so a resumed run goes on where it stopped by remembering one number. No held-out row is ever trained on.
"""
import random
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from tasks.aqua import LetterTask, in_new_order
from tasks.common import get_task
from tasks.evaluation import quick_accuracy

HELD_OUT = 400                                          # last rows of a training split that serve as validation where there is none


def parse_weights(text):
    """"AQUA:0.5,GSM8K:0.3" -> {"AQUA": 0.625, "GSM8K": 0.375}: shares that sum to 1. A name without a number weighs 1."""
    weights = {}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, number = (part.strip() for part in entry.partition(":"))
        try:
            weight = float(number or 1)
        except ValueError:
            weight = -1.0
        if not name or not 0 <= weight < float("inf") or name in weights:
            raise ValueError(f"tasks={text!r}: {entry!r} is not NAME:WEIGHT with a weight of 0 or more and a name of its own: write AQUA:0.7,GSM8K:0.3")
        weights[name] = weight
    total = sum(weights.values())
    if total <= 0:
        raise ValueError(f"tasks={text!r} gives the {len(weights)} tasks a weight of {total} together: write AQUA:0.7,GSM8K:0.3")
    return {name: weight / total for name, weight in weights.items() if weight}


def load_tasks(weights, data_dir=None, format_bonus=0.1):
    """-> ({name: training task}, {name: held-out task}). data_dir: a task's own folder, or one that holds aqua/, gsm8k/, arc/, mmlu/."""
    pairs = {name: load_pair(name, data_dir) for name in weights}
    for pair in pairs.values():
        for task in pair:
            if isinstance(task, LetterTask):
                task.format_bonus = format_bonus
    return {name: pair[0] for name, pair in pairs.items()}, {name: pair[1] for name, pair in pairs.items()}


def load_pair(name, data_dir):
    """The training split, and the validation split; where a task has none, the end of the training split, which is then left out there."""
    split = "auxiliary_train" if name.upper() == "MMLU" else "train"
    arguments = {}
    if data_dir:
        own = Path(data_dir).expanduser() / name.lower().partition("-")[0]
        arguments = {"data_dir": str(own if own.is_dir() else data_dir)}
    try:
        try:
            train = get_task(name, split=split, **arguments)
        except TypeError:                               # made from a seed: there is no folder to look into
            arguments, train = {}, get_task(name, split=split)
    except TypeError as error:
        raise ValueError(f"{name} has no split to choose ({error}): reinforcement learning needs a task with a training split and checkable answers") from error
    try:
        return train, get_task(name, split="validation", **arguments)
    except ValueError as error:
        if "has no split" not in str(error):
            raise
    first = len(train) - min(HELD_OUT, len(train) // 5)
    if first == len(train):
        raise ValueError(f"{name} {split} has {len(train)} problems, too few to hold some out: give more data")
    return get_task(name, split=split, stop=first, **arguments), get_task(name, split=split, start=first, **arguments)


def accuracies(tasks, weights, engine, tokenizer, compute, max_problems, max_new_tokens, num_samples=1, temperature=1.0):
    """Accuracy on the held-out split of each task, greedy or of several samples; of a mixture also the mean by its weights."""
    temperature = temperature if num_samples > 1 else 0.0
    found = {name: quick_accuracy(task, engine, tokenizer, compute, max_problems, max_new_tokens, num_samples, temperature) for name, task in tasks.items()}
    if len(found) == 1:
        return next(iter(found.values()))
    of_each = {key.replace("eval/", f"eval/{name}/", 1): value for name, metrics in found.items() for key, value in metrics.items()}
    shared = [key for key in next(iter(found.values())) if key == "eval/accuracy" or "@" in key and all(key in metrics for metrics in found.values())]
    return {key: sum(weights[name] * metrics[key] for name, metrics in found.items()) for key in shared} | of_each


class Problem(NamedTuple):
    place: int
    seed: int           # decides all draws of the problem's group
    conversation: dict  # its "task" names the task that judges it


class Problems:
    """at(place) -> Problem. Tasks take turns so that after n places each has had its share of n, give or take one problem; a task's
    problems come in a fresh order at every pass; with `permute`, options stand in another order at every visit."""

    def __init__(self, tasks, weights, seed, permute=True):
        self.tasks, self.weights, self.seed, self.permute = tasks, weights, seed, permute
        self.turns, self.counts = [], dict.fromkeys(tasks, 0)   # place -> (name, how often that task came before); the counts after the last place
        self.variants = {}

    def __len__(self):
        return sum(len(task) for task in self.tasks.values())

    def turn(self, place):
        while len(self.turns) <= place:
            name = max(self.tasks, key=lambda name: self.weights[name] * (len(self.turns) + 1) - self.counts[name])
            self.turns.append((name, self.counts[name]))
            self.counts[name] += 1
        return self.turns[place]

    def at(self, place, levels=None):
        """`levels`: which levels are open, in tasks that have levels (None = all)."""
        name, visit = self.turn(place)
        task = self.tasks[name] if levels is None or not hasattr(self.tasks[name], "with_levels") else self.of_levels(name, tuple(levels))
        epoch, position = divmod(visit, len(task))
        conversation = task[order_of_epoch(f"{self.seed}|{name}", epoch, len(task))[position]]
        if self.permute and isinstance(task, LetterTask):
            conversation = in_new_order(conversation, visit, f"{self.seed}|{name}")
        return Problem(place, draw_seed(self.seed, place), {**conversation, "task": name})

    def of_levels(self, name, levels):
        if (name, levels) not in self.variants:
            self.variants[name, levels] = self.tasks[name].with_levels(levels)
        return self.variants[name, levels]

    def rewards(self, conversation, completion):
        return self.tasks[conversation["task"]].rewards(conversation, completion)


def draw_seed(seed, place):
    """The number that decides all draws of the group at a place."""
    return random.Random(f"rollout|{seed}|{place}").getrandbits(62)


@lru_cache(maxsize=8)
def order_of_epoch(seed, epoch, num_problems):
    order = list(range(num_problems))
    random.Random(f"problems|{seed}|{epoch}").shuffle(order)
    return order
