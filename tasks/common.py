"""What a task is, the registry that scripts look names up in, and the ways to join tasks.

A task is a list of conversations that also knows how to judge an answer. This file knows no data set: `get_task` imports
the files of this folder when a name is asked for, so adding a task means adding one file.
"""
import bisect
import difflib
import gc
import importlib
import json
import pkgutil
import random
from collections import Counter
from contextlib import contextmanager

import tasks

NOT_TASKS = {"common", "evaluation", "problems", "rewards", "algebra_kinds"}  # files of this folder that register nothing
_registry = {}                                          # lower-case name -> (name, random_accuracy, factory, presets)


class Task:
    """A sliced, random-access list of conversations. Children write num_examples, get_example and is_correct.

    The last message of a conversation is the reference answer. `stop` beyond the data means "all there is"."""
    name = "task"
    eval_type = "generative"                            # or "categorical": compare the logits of the letters
    random_accuracy = 0.0                               # what guessing scores

    def __init__(self, start=0, stop=None, step=1):
        start, stop, step = start or 0, -1 if stop is None else stop, step or 1
        if start < 0 or step < 1 or stop < -1:
            raise ValueError(f"a task cannot be sliced [{start}:{stop}:{step}]: start must be >= 0, step >= 1, stop >= 0 "
                             "(or None or -1 for all)")
        self.start, self.stop, self.step = start, stop, step

    def num_examples(self):
        raise NotImplementedError(f"{type(self).__name__} must say how many examples it has")

    def get_example(self, index):
        raise NotImplementedError(f"{type(self).__name__} must give the conversation at an index")

    def _indices(self):
        """The indices of the examples inside the slice: a slice longer than the data is clamped, never an IndexError later."""
        total = self.num_examples()
        return range(min(self.start, total), total if self.stop == -1 else min(self.stop, total), self.step)

    def __len__(self):
        return len(self._indices())

    def __getitem__(self, index):
        return self.get_example(self._indices()[index])

    def __iter__(self):
        indices = self._indices()
        return (self.get_example(index) for index in indices)

    def question(self, conversation):
        """What is asked, without options and instructions: the text that must not turn up in training data."""
        users = [message for message in conversation["messages"] if message["role"] == "user"]
        return conversation.get("question") or message_text(users[-1])

    def find_answer(self, conversation, text):
        """The answer that a completion's text gives, in one spelling for equal ones; None if it gives none. Equal answers vote together."""
        return None

    def is_correct(self, conversation, completion):
        """True if the completion's text answers the conversation."""
        raise NotImplementedError(f"{self.name} has no right answers: it can be trained on, not scored")

    def rewards(self, conversation, completion):
        """The named parts of the reward; "correct" alone says whether the answer is right."""
        return {"correct": float(self.is_correct(conversation, completion))}

    def reward(self, conversation, completion):
        return sum(self.rewards(conversation, completion).values())


# ---------------------------------------------------------------------------------------------------------------------
# The registry

def register(name, random_accuracy=0.0, **presets):
    """A decorator that makes a Task class known as `name`; presets are constructor arguments that belong to the name."""
    def decorate(factory):
        known = _registry.get(name.lower())
        if known and (known[2].__module__, known[2].__qualname__) != (factory.__module__, factory.__qualname__):
            raise ValueError(f"the task name {name!r} is taken by {known[2].__module__}.{known[2].__qualname__}: "
                             f"give {factory.__module__}.{factory.__qualname__} another one")
        _registry[name.lower()] = (name, random_accuracy, factory, presets)
        if isinstance(factory, type):
            factory.name, factory.random_accuracy = name, random_accuracy
        return factory
    return decorate


def _import_all():
    for module in pkgutil.iter_modules(tasks.__path__):
        if module.name not in NOT_TASKS:
            importlib.import_module(f"tasks.{module.name}")


def task_names():
    """Every registered name, sorted."""
    _import_all()
    return sorted(entry[0] for entry in _registry.values())


def get_task(name, **kwargs):
    """The task called `name` (upper or lower case), built with kwargs; an unknown name is told the nearest ones."""
    if name.lower() not in _registry:
        # Most tasks live in the file of their own name: looking there first spares importing every other task.
        own_file = name.lower().replace("-", "_")
        if own_file.isidentifier() and own_file in {module.name for module in pkgutil.iter_modules(tasks.__path__)} - NOT_TASKS:
            importlib.import_module(f"tasks.{own_file}")
    if name.lower() not in _registry:
        _import_all()
    if name.lower() not in _registry:
        near = difflib.get_close_matches(name.lower(), _registry, n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(_registry[key][0] for key in near)}?" if near else "none is near it:"
        raise ValueError(f"there is no task {name!r}: {hint} The {len(_registry)} tasks are {', '.join(task_names())}")
    canonical, random_accuracy, factory, presets = _registry[name.lower()]
    task = factory(**{**presets, **kwargs})
    task.name, task.random_accuracy = canonical, random_accuracy
    return task


# ---------------------------------------------------------------------------------------------------------------------
# Several tasks as one

class TaskSequence(Task):
    """The tasks one after another, in the order given. Every conversation says in "task" which one judges it."""
    name = "sequence"

    def __init__(self, tasks, **slicing):
        super().__init__(**slicing)
        self.tasks = list(tasks)
        if not self.tasks:
            raise ValueError("a mixture of 0 tasks has nothing to learn: give at least one task")
        self.ends = []                                  # ends[i]: examples in tasks 0..i, so that bisect finds the task
        for task in self.tasks:
            self.ends.append((self.ends[-1] if self.ends else 0) + len(task))

    def num_examples(self):
        return self.ends[-1]

    def leaves(self):
        """The tasks that are not themselves mixtures, by name."""
        found = {}
        for task in self.tasks:
            found.update(task.leaves() if isinstance(task, TaskSequence) else {task.name: task})
        return found

    def get_example(self, index):
        which = bisect.bisect_right(self.ends, index)
        task = self.tasks[which]
        conversation = task[index - (self.ends[which - 1] if which else 0)]
        return conversation if isinstance(task, TaskSequence) else {**conversation, "task": task.name}

    def is_correct(self, conversation, completion):
        return self.leaves()[conversation["task"]].is_correct(conversation, completion)

    def rewards(self, conversation, completion):
        return self.leaves()[conversation["task"]].rewards(conversation, completion)


class TaskMixture(TaskSequence):
    """All examples of all tasks in one shuffled order that the seed decides. Repeat a task in the list to weigh it more."""
    name = "mixture"

    def __init__(self, tasks, seed=42, **slicing):
        super().__init__(tasks, **slicing)
        self.order = list(range(super().num_examples()))
        random.Random(seed).shuffle(self.order)

    def get_example(self, index):
        return super().get_example(self.order[index])


def build_mixture(recipe, extra=None, seed=42):
    """[(task name, arguments, epochs)] as in nanochat/data_recipes.py -> a TaskMixture; epochs repeats a task's rows, and
    extra {task name: arguments} adds to the recipe's arguments what only this run knows, a data folder for example."""
    extra = {name.lower(): arguments for name, arguments in (extra or {}).items()}
    repeated = []
    for name, arguments, epochs in recipe:
        if epochs < 1 or epochs != int(epochs):
            raise ValueError(f"{name} is asked for {epochs} epochs in the mixture: give a whole number from 1 on, or leave the line out")
        repeated += [get_task(name, **{**arguments, **extra.get(name.lower(), {})})] * int(epochs)
    return TaskMixture(repeated, seed=seed)


# ---------------------------------------------------------------------------------------------------------------------
# Pieces that task files share

def render_choices(question, letters, choices):
    """The question and one line `- choice=LETTER` for each choice.

    The letter comes after the choice: a small model that has just read the choice binds the letter that follows it
    better than a letter it read before."""
    assert len(letters) == len(choices), f"{len(letters)} letters for {len(choices)} choices"
    return question + "".join(f"\n- {choice}={letter}" for letter, choice in zip(letters, choices))


def message_text(message):
    """The text of a message, whether its content is a string or a list of parts."""
    content = message["content"]
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def balanced(values, index, *key):
    """One of the values, pseudo-random in (index, key), such that every len(values) consecutive indices from 0 take each once."""
    block, place = divmod(index, len(values))
    order = list(values)
    random.Random("|".join(map(str, (*key, block)))).shuffle(order)
    return order[place]


def best_constant(task):
    """(letter, share): the letter that is right most often, and the accuracy of always giving it. The score to beat."""
    counts = Counter(conversation["answer_letter"] for conversation in task)
    if not counts:
        raise ValueError(f"the task {task.name} has 0 examples, so no letter is the best: check its split, start and stop")
    letter = min(counts, key=lambda key: (-counts[key], key))
    return letter, counts[letter] / counts.total()


@contextmanager
def no_collection():
    """Garbage collection waits, as `with` or as a decorator: rows that are read are all kept, and walking them again and again for what
    could be freed is half the time of reading them."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


@no_collection()
def load_jsonl(path, skipped=None):
    """The rows of a JSON-lines file. With a Counter `skipped`, rows that are no JSON objects are counted there; without, an error."""
    rows = []
    with open(path, encoding="utf-8", errors="replace") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except (json.JSONDecodeError, RecursionError):
                row = None
            if isinstance(row, dict):
                rows.append(row)
            elif skipped is None:
                raise ValueError(f"line {number} of {path} is not a JSON object ({line.strip()[:60]!r}): "
                                 "the file must hold one object per line")
            else:
                skipped["not a JSON object"] += 1
    return rows


def load_hub_dataset(path, name, split, revision=None):
    """One split of a Hugging Face data set (cached by `datasets`); says what to do when there is no network or no such set."""
    import datasets                                     # takes seconds to import, and most runs read local files
    try:
        return datasets.load_dataset(path, name, split=split, revision=revision)
    except ConnectionError as error:
        raise ConnectionError(f"{path} ({name}, {split}) is not in the local cache and the Hugging Face Hub cannot be reached: "
                              "go online once, or prepare data without a network by `python -m scripts.prepare_offline`") from error
    except FileNotFoundError as error:
        raise ValueError(f"the Hugging Face Hub has no {path} ({name}, {split}, revision {revision}), or it needs a token: "
                         "check the name and HF_TOKEN") from error
