"""Recipes are plain data whose every name and argument exists, and conversation makes up exactly the share it is given."""
import inspect
import json
from collections import Counter
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tasks.common as common
from nanochat.data_recipes import MID, SFT, SFT_CHAT, SFT_VALIDATION, chat_recipe, chat_total, fill, recipe
from tasks.common import TaskMixture, build_mixture, task_names

VALUES = {"base_dir": "/base", "aqua_train_examples": 20_000, "aqua_val_examples": 254, "ot_dataset": "open-thoughts/OpenThoughts3-1.2M", "ot_path": None,
          "ot_split": "train", "ot_stop": None, "gsm8k_stop": -1, "rs_cot_path": "/base/rs_cot.jsonl", "rs_cot_stop": 100_000,
          "dolci_path": "/base/dolci_think_800k.jsonl", "dolci_stop": 500_000, "dolci_streaming": False, "dolci_stream_cache": None,
          "chat_ratio": 0.30, "chat_ot_answer_ratio": 0.10, "chat_ot_trace_ratio": 0.05, "val_smoltalk_stop": 2000, "val_arc_stop": 400}


def counts(entries):
    """(task, mode) -> rows an entry asks for."""
    return {(task, arguments.get("mode")): arguments["stop"] - arguments.get("start", 0) for task, arguments, _ in entries}


# Names

def test_every_task_and_argument_of_every_recipe_exists():
    entries = [entry for recipes in (MID, SFT, SFT_CHAT, SFT_VALIDATION) for entries in recipes.values() for entry in entries]
    task_names()                                        # imports every task, so that the registry is full
    for task, arguments, _ in entries:
        factory = common._registry[task.lower()][2]
        known = set(inspect.signature(factory.__init__).parameters) | {"start", "stop", "step"}
        assert set(arguments) <= known, (task, arguments)


def test_every_recipe_has_a_validation_mixture_and_can_be_filled_in():
    assert set(SFT) == set(SFT_VALIDATION) and set(SFT_CHAT) <= set(SFT)
    for recipes in (MID, SFT, SFT_VALIDATION):
        for name in recipes:
            assert "{" not in repr([list(arguments.values()) for _, arguments, _ in recipe(recipes, name, **VALUES)])
    for name in SFT:
        assert "{" not in repr([list(arguments.values()) for _, arguments, _ in chat_recipe(name, 1000, **VALUES)])


def test_no_recipe_trains_on_a_held_out_split():
    for recipes in (MID, SFT, SFT_CHAT):
        for entries in recipes.values():
            assert all(arguments.get("split", "train") in ("train", "auxiliary_train", "{ot_split}") for _, arguments, _ in entries)


def test_an_unknown_recipe_names_the_others():
    with pytest.raises(ValueError, match="there is no recipe 'r1': choose one of default, offline, aqua"):
        recipe(SFT, "r1", **VALUES)


# Sizes

def test_sizes_of_the_r1_recipes():
    assert counts(recipe(SFT, "r1_ot", **VALUES)) == {("OpenThoughts", "cot"): 500_000}
    assert counts(recipe(SFT, "r1_ot", **{**VALUES, "ot_stop": -1})) == {("OpenThoughts", "cot"): -1}
    assert counts(recipe(SFT, "r1_ot_mixed", **VALUES)) == {("OpenThoughts", "cot"): 1_000_000, ("GSM8K", None): -1}
    assert counts(chat_recipe("r1_ot_mixed", 1_000_000, **VALUES)) == {("SmolTalk", None): 428_571}
    assert counts(recipe(SFT, "r1_rs_sft", **VALUES)) == {("JsonlChat", None): 100_000}
    assert counts(chat_recipe("r1_rs_sft", 100_000, **VALUES)) == {
        ("SmolTalk", None): 36_430, ("OpenThoughts", "answer_only"): 4_285, ("OpenThoughts", "cot"): 2_142}
    assert counts(chat_recipe("dolci_rs_sft", 100_000, **VALUES)) == {
        ("DolciThink", "answer_only"): 21_428, ("SmolTalk", None): 17_144, ("DolciThink", "cot"): 4_285}
    assert counts(recipe(SFT, "dolci_mid", **VALUES)) == counts(recipe(SFT, "dolci_hf", **VALUES)) == {("DolciThink", "cot"): 500_000}
    assert chat_recipe("dolci_mid", 100_000, **VALUES) == chat_recipe("offline_rs_sft", 100_000, **VALUES) == []


def test_sizes_of_the_validation_mixtures():
    assert counts(recipe(SFT_VALIDATION, "r1_ot", **VALUES)) == {("SmolTalk", None): 2000}
    for name in ("r1_ot_mixed", "r1_rs_sft", "dolci_hf", "dolci_mid", "dolci_rs_sft"):
        assert counts(recipe(SFT_VALIDATION, name, **VALUES)) == {("SmolTalk", None): 2000, ("ARC-Challenge", None): 400}
    assert counts(recipe(SFT_VALIDATION, "offline_rs_sft", **VALUES)) == {("AQUA", None): 254}


@given(st.integers(0, 10**7), st.integers(0, 99))
def test_conversation_is_its_share_of_the_whole_mixture(num_rows, percent):
    total = chat_total(num_rows, percent / 100)
    share = Fraction(percent, 100)
    assert total <= share * (num_rows + total) and total + 1 > share * (num_rows + total + 1)


@pytest.mark.parametrize("num_rows, ratio, total", [(1_000_000, 0.3, 428_571), (100_000, 0.3, 42_857), (7, 0.3, 3), (9, 0.1, 1), (5, 0.5, 5), (10, 0.0, 0), (0, 0.3, 0)])
def test_chat_totals(num_rows, ratio, total):
    assert chat_total(num_rows, ratio) == total


@pytest.mark.parametrize("ratio", [-0.1, 1.0, 30])
def test_a_ratio_that_is_no_share_is_refused(ratio):
    with pytest.raises(ValueError, match="not a share below 1"):
        chat_total(10, ratio)


@given(st.integers(0, 10**6), st.integers(0, 100), st.integers(0, 100))
def test_shares_of_the_conversation_sum_to_all_of_it(num_rows, answers, traces):
    values = {**VALUES, "chat_ot_answer_ratio": answers / 100, "chat_ot_trace_ratio": traces / 100}
    if answers + traces > 100:
        with pytest.raises(ValueError, match="sum to at most 1"):
            chat_recipe("r1_rs_sft", num_rows, **values)
    else:
        assert sum(counts(chat_recipe("r1_rs_sft", num_rows, **values)).values()) == chat_total(num_rows, 0.3)


def test_no_question_is_seen_both_with_its_trace_and_without():
    entries = {arguments["mode"]: arguments for task, arguments, _ in chat_recipe("r1_rs_sft", 100_000, **VALUES) if task == "OpenThoughts"}
    assert (entries["answer_only"]["start"], entries["answer_only"]["stop"]) == (0, 4_285)
    assert (entries["cot"]["start"], entries["cot"]["stop"]) == (4_285, 6_427)
    # other categories are other rows already
    assert all(arguments["start"] == 0 for _, arguments, _ in chat_recipe("dolci_rs_sft", 100_000, **VALUES))


def test_what_would_have_no_rows_is_not_loaded():
    assert [task for task, _, _ in chat_recipe("r1_rs_sft", 3, **VALUES)] == ["SmolTalk"]
    assert chat_recipe("r1_rs_sft", 3, **{**VALUES, "chat_ratio": 0}) == []


# Placeholders

def test_a_placeholder_alone_keeps_its_type_and_a_default_stands_for_none():
    assert fill("{stop}", {"stop": 3}) == 3 and fill("{stop}", {"stop": None}) is None and fill("{stop|7}", {"stop": None}) == 7
    assert fill("{stop|7}", {"stop": -1}) == -1 and fill("{a}/x_{b}", {"a": "y", "b": 2}) == "y/x_2" and fill(("coding",), {}) == ("coding",)
    with pytest.raises(ValueError, match="needs stop, and only start are known"):
        fill("{stop}", {"start": 1})


# The whole thing on small files

def write(path, rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def talk(question, answer, **fields):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **fields}


def test_mixtures_of_local_files_have_the_recipes_shares(tmp_path):
    categories = ["short_reasoning", "chat", "reasoning_math", "coding"]
    values = {**VALUES, "ot_path": write(tmp_path / "ot.jsonl", [talk(f"ot {i}", f"<think>\n{i}\n</think>\n\nAnswer: {i}") for i in range(100)]),
              "rs_cot_path": write(tmp_path / "rs.jsonl", [talk(f"rs {i}", "r") for i in range(140)]),
              "dolci_path": write(tmp_path / "d.jsonl", [talk(f"d {i}", "<think>t</think>a", category=categories[i % 4]) for i in range(200)])}
    write(tmp_path / "smoltalk" / "train.jsonl", [talk(f"st {i}", "s") for i in range(1000)])
    extra = {"SmolTalk": {"data_dir": tmp_path / "smoltalk"}}
    for name, expected in (("r1_rs_sft", {"JsonlChat": 140, "SmolTalk": 51, "OpenThoughts": 6 + 3}), ("dolci_rs_sft", {"JsonlChat": 140, "SmolTalk": 24, "DolciThink": 30 + 6})):
        core = build_mixture(recipe(SFT, name, **values), extra)
        chat = build_mixture(chat_recipe(name, len(core), **values), extra)
        task = TaskMixture([core, chat])
        kinds = Counter(conversation["task"] for conversation in task)
        assert kinds == expected and len(chat) == chat_total(140, 0.3) == 60
        asked = [conversation["messages"][0]["content"] for conversation in task]
        assert len(set(asked)) == len(asked) == 200
        assert asked == [conversation["messages"][0]["content"] for conversation in TaskMixture([core, chat])]
