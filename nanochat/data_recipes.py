"""Named training mixtures as plain data: (task name, arguments, epochs). Names, not classes: the core imports no task.

`tasks.common.build_mixture` makes tasks of them. A value may be a {placeholder} that the script fills in from its flags; with
{ot_stop|500000} the number is for flags left at None. Epochs is how often a task's rows are repeated.
"""
import re
from fractions import Fraction

PLACEHOLDER = re.compile(r"\{(\w+)(?:\|(\d+))?\}")
REST = "the rest"                                       # a share: what the other shares leave
IDENTITY = ("CustomJSON", {"path": "{base_dir}/identity_conversations.jsonl"}, 2)
REJECTION_SAMPLES = ("JsonlChat", {"path": "{rs_cot_path}", "stop": "{rs_cot_stop}"}, 1)
OPEN_THOUGHTS = {"dataset_id": "{ot_dataset}", "local_path": "{ot_path}", "split": "{ot_split}"}

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
    # the default with GSM8K in AQuA's place
    "gsm8k": [
        ("ARC-Easy", {"split": "train"}, 1),
        ("ARC-Challenge", {"split": "train"}, 1),
        ("GSM8K", {"split": "train", "stop": "{gsm8k_stop}"}, 1),
        ("SmolTalk", {"split": "train", "stop": 10_000}, 1),
    ],
    # R1 style, phase 1: long reasoning before any reinforcement learning (DeepSeek-R1, arXiv 2501.12948)
    "r1_ot": [
        ("OpenThoughts", {**OPEN_THOUGHTS, "mode": "cot", "stop": "{ot_stop|500000}"}, 1),
    ],
    "r1_ot_mixed": [
        ("OpenThoughts", {**OPEN_THOUGHTS, "mode": "cot", "stop": "{ot_stop|1000000}"}, 1),
        ("GSM8K", {"split": "train", "stop": "{gsm8k_stop}"}, 1),
    ],
    "dolci_hf": [
        ("DolciThink", {"streaming": "{dolci_streaming}", "stream_cache": "{dolci_stream_cache}", "mode": "cot", "stop": "{dolci_stop}"}, 1),
    ],
    "dolci_mid": [
        ("DolciThink", {"local_path": "{dolci_path}", "mode": "cot", "stop": "{dolci_stop}"}, 1),
    ],
    # R1 style, phase 3: what scripts.rs_generate kept of the reinforced model's own answers
    "r1_rs_sft": [REJECTION_SAMPLES],
    "dolci_rs_sft": [REJECTION_SAMPLES],
    "offline_rs_sft": [REJECTION_SAMPLES, IDENTITY],
}

# Conversation that makes up {chat_ratio} of the whole mixture beside the rows of SFT: (task name, arguments, share of the conversation).
SFT_CHAT = {
    "r1_ot_mixed": [
        ("SmolTalk", {"split": "train"}, REST),
    ],
    "r1_rs_sft": [
        ("SmolTalk", {"split": "train"}, REST),
        ("OpenThoughts", {**OPEN_THOUGHTS, "mode": "answer_only"}, "{chat_ot_answer_ratio}"),
        ("OpenThoughts", {**OPEN_THOUGHTS, "mode": "cot"}, "{chat_ot_trace_ratio}"),
    ],
    "dolci_rs_sft": [
        ("DolciThink", {"local_path": "{dolci_path}", "mode": "answer_only", "category_filter": ("short_reasoning", "chat")}, 0.50),
        ("SmolTalk", {"split": "train"}, REST),
        ("DolciThink", {"local_path": "{dolci_path}", "mode": "cot", "category_filter": ("reasoning_math", "coding")}, 0.10),
    ],
}

SMOLTALK_TEST = ("SmolTalk", {"split": "test", "stop": "{val_smoltalk_stop}"}, 1)
ARC_TEST = ("ARC-Challenge", {"split": "test", "stop": "{val_arc_stop}"}, 1)
AQUA_VALIDATION = ("AQUA", {"split": "validation", "stop": "{aqua_val_examples}"}, 1)

# What val/bpb is measured on.
SFT_VALIDATION = {
    "default": [AQUA_VALIDATION],
    "offline": [AQUA_VALIDATION],
    "aqua": [AQUA_VALIDATION],
    "gsm8k": [("SmolTalk", {"split": "test"}, 1)],
    "r1_ot": [SMOLTALK_TEST],
    "r1_ot_mixed": [SMOLTALK_TEST, ARC_TEST],
    "dolci_hf": [SMOLTALK_TEST, ARC_TEST],
    "dolci_mid": [SMOLTALK_TEST, ARC_TEST],
    "r1_rs_sft": [SMOLTALK_TEST, ARC_TEST],
    "dolci_rs_sft": [SMOLTALK_TEST, ARC_TEST],
    "offline_rs_sft": [AQUA_VALIDATION],
}


def recipe(recipes, name, **values):
    """A recipe with its {placeholders} filled in. ValueError names the recipes there are."""
    if name not in recipes:
        raise ValueError(f"there is no recipe {name!r}: choose one of {', '.join(recipes)}")
    return [(task, {key: fill(value, values) for key, value in arguments.items()}, epochs)
            for task, arguments, epochs in recipes[name]]


def chat_recipe(name, num_rows, **values):
    """The conversation to mix with the `num_rows` rows of a recipe: entries as in `recipe`, none where it takes none.

    Of two entries that differ in mode alone, the second goes on where the first ended: no question is seen in both."""
    entries = SFT_CHAT.get(name, [])
    total = chat_total(num_rows, values["chat_ratio"]) if entries else 0
    shares = [share if share is REST else Fraction(str(fill(share, values))) for _, _, share in entries]
    given = sum(share for share in shares if share is not REST)
    if not 0 <= given <= 1 or any(share is not REST and share < 0 for share in shares):
        raise ValueError(f"the shares of recipe {name!r} sum to {float(given)}, which leaves {float(1 - given)} for the rest of its conversation: "
                         "lower them until they sum to at most 1")
    rows = [None if share is REST else int(total * share) for share in shares]
    rows = [total - sum(filter(None, rows)) if count is None else count for count in rows]
    result, ends = [], {}
    for (task, arguments, _), count in zip(entries, rows):
        arguments = {key: fill(value, values) for key, value in arguments.items()}
        same_rows = repr((task, sorted((key, value) for key, value in arguments.items() if key != "mode")))
        start = ends.get(same_rows, 0)
        ends[same_rows] = start + count
        if count:
            result.append((task, {**arguments, "start": start, "stop": start + count}, 1))
    return result


def chat_total(num_rows, ratio):
    """The number of conversations that make up `ratio` of a mixture with `num_rows` other rows: N * ratio / (1 - ratio), rounded down."""
    if not 0 <= ratio < 1:
        raise ValueError(f"chat_ratio={ratio} is not a share below 1: 0 mixes in no conversation, 0.3 makes it 30 % of all rows")
    ratio = Fraction(str(ratio))                        # 0.3 means three tenths, not the double next to it
    return int(num_rows * ratio / (1 - ratio))


def fill(value, values):
    """"{stop}" alone becomes the value itself (a number stays a number); within a longer text it becomes text."""
    if not isinstance(value, str):
        return value
    missing = [name for name, _ in PLACEHOLDER.findall(value) if name not in values]
    if missing:
        raise ValueError(f"{value!r} needs {' and '.join(missing)}, and only {', '.join(sorted(values))} are known: pass what is missing")
    alone = PLACEHOLDER.fullmatch(value)
    if alone:
        name, default = alone.groups()
        return int(default) if values[name] is None and default else values[name]
    return PLACEHOLDER.sub(lambda match: str(values[match[1]]), value)
