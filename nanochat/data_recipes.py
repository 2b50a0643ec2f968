"""Named training mixtures as plain data: (task name, arguments, epochs). Names, not classes: the core imports no task.

`tasks.common.build_mixture` makes tasks of them. A path may say {base_dir}; epochs is how often a task's rows are repeated.
"""

IDENTITY = ("CustomJSON", {"path": "{base_dir}/identity_conversations.jsonl"}, 2)

MID = {
    # the seeds' mid-training: general conversation, multiple choice, arithmetic with a calculator, and 50,000 rows of AQuA
    "default": [
        ("SmolTalk", {"split": "train"}, 1),
        ("MMLU", {"split": "auxiliary_train"}, 1),
        ("GSM8K", {"split": "train"}, 1),
        ("AQUA", {"split": "train", "stop": 50_000}, 1),
        ("SimpleSpelling", {"split": "train", "stop": 20_000}, 1),
        ("SpellingBee", {"split": "train", "stop": 8_000}, 1),
        IDENTITY,
    ],
    # what scripts.prepare_offline writes, and nothing from a network; AQUA here is the embedded algebra
    "offline": [
        ("AQUA", {"split": "train"}, 1),
        IDENTITY,
    ],
}

SFT = {
    # AQuA takes the place that GSM8K has upstream; {aqua_train_examples} is the script's flag
    "default": [
        ("ARC-Easy", {"split": "train"}, 1),
        ("ARC-Challenge", {"split": "train"}, 1),
        ("AQUA", {"split": "train", "stop": "{aqua_train_examples}"}, 1),
        ("SmolTalk", {"split": "train", "stop": 10_000}, 1),
        IDENTITY,
    ],
    "offline": [
        ("AQUA", {"split": "train", "stop": "{aqua_train_examples}"}, 1),
        IDENTITY,
    ],
    # AQuA alone: nothing else needs to be on the machine
    "aqua": [
        ("AQUA", {"split": "train", "stop": "{aqua_train_examples}"}, 1),
    ],
}


def recipe(recipes, name, **values):
    """A recipe with its {placeholders} filled in. ValueError names the recipes there are."""
    if name not in recipes:
        raise ValueError(f"there is no recipe {name!r}: choose one of {', '.join(recipes)}")
    return [(task, {key: fill(value, values) for key, value in arguments.items()}, epochs)
            for task, arguments, epochs in recipes[name]]


def fill(value, values):
    """"{stop}" alone becomes the value itself (a number stays a number); within a longer text it becomes text."""
    if not isinstance(value, str):
        return value
    if value.startswith("{") and value.endswith("}") and value[1:-1] in values:
        return values[value[1:-1]]
    return value.format(**values)
