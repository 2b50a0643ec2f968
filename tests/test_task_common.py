"""Tasks as sliced lists, the registry, mixtures, and the pieces that task files share."""
import subprocess
import sys
from collections import Counter
from fractions import Fraction

import pytest

import tasks.common as common
from tasks.common import (Task, TaskMixture, TaskSequence, balanced, best_constant, build_mixture, get_task, load_hub_dataset, load_jsonl,
                          message_text, register, render_choices, task_names)
from tasks.rewards import last_number, linear_length_penalty, parse_number, same_number, soft_overlong_penalty


class Letters(Task):
    """`size` conversations that say which task and index they are; the completion must repeat it."""

    def __init__(self, tag="t", size=10, **slicing):
        super().__init__(**slicing)
        self.name, self.tag, self.size = f"letters-{tag}", tag, size

    def num_examples(self):
        return self.size

    def get_example(self, index):
        return {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": f"{self.tag}{index}"}],
                "answer_letter": "ABCDE"[index % 5]}

    def is_correct(self, conversation, completion):
        return completion == message_text(conversation["messages"][-1])


def answers(task):
    return [message_text(conversation["messages"][-1]) for conversation in task]


@pytest.fixture
def registry(monkeypatch):
    monkeypatch.setattr(common, "_registry", dict(common._registry))


# Slices

def test_a_stop_beyond_the_data_means_all_there_is():
    task = Letters(size=10, stop=1_000_000)
    assert len(task) == 10 and len(answers(task)) == 10
    assert task[len(task) - 1] == task[-1]


def test_slices_agree_with_those_of_a_list():
    everything = answers(Letters(size=10))
    for start in (0, 3, 9, 10, 50):
        for stop in (None, 0, 1, 9, 10, 99):
            for step in (1, 2, 7, 30):
                task = Letters(size=10, start=start, stop=stop, step=step)
                assert answers(task) == everything[start:stop:step], (start, stop, step)
                assert len(task) == len(everything[start:stop:step])


def test_minus_one_is_no_limit_and_other_negatives_are_refused():
    assert len(Letters(stop=-1)) == 10
    for slicing in ({"start": -1}, {"stop": -2}, {"step": -1}):
        with pytest.raises(ValueError, match="start must be >= 0"):
            Letters(**slicing)


def test_an_index_outside_the_slice_is_an_index_error():
    task = Letters(stop=4)
    for index in (4, 9, -5):
        with pytest.raises(IndexError):
            task[index]


def test_a_task_without_right_answers_says_so():
    class Chat(Task):
        name = "chat"
    with pytest.raises(NotImplementedError, match="chat has no right answers"):
        Chat().rewards({}, "hello")


def test_the_reward_is_the_sum_of_its_parts():
    task = Letters()
    assert task.rewards(task[3], "t3") == {"correct": 1.0} and task.reward(task[3], "t3") == 1.0 and task.reward(task[3], "") == 0.0


# The registry

def test_importing_the_registry_imports_no_task_and_no_datasets():
    code = "import sys, tasks.common; print([name for name in sys.modules if name.startswith('tasks.') or name in ('datasets', 'torch')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "['tasks.common']"


def test_names_are_found_in_upper_and_lower_case():
    for name in ("ALGEBRA", "algebra", "Algebra"):
        task = get_task(name, size=3)
        assert task.name == "ALGEBRA" and task.random_accuracy == 0.2 and len(task) == 3


def test_an_unknown_name_is_told_the_nearest_and_all_names():
    with pytest.raises(ValueError, match="did you mean ALGEBRA.*AQUA"):
        get_task("algebar")
    with pytest.raises(ValueError, match="there is no task"):
        get_task("common")


def test_presets_belong_to_the_name_and_arguments_win(registry):
    register("ten", random_accuracy=0.5, tag="x", size=10)(Letters)
    register("two", tag="y", size=2)(Letters)
    assert len(get_task("TEN")) == 10 and len(get_task("two")) == 2 and len(get_task("two", size=5)) == 5
    assert get_task("ten").random_accuracy == 0.5 and get_task("two").random_accuracy == 0.0 and get_task("ten").name == "ten"


def test_a_name_is_given_once(registry):
    register("mine")(Letters)
    register("Mine")(Letters)                            # the same class again, as in a reload
    with pytest.raises(ValueError, match="is taken by"):
        register("MINE")(Task)


def test_all_names_are_sorted_and_include_ours():
    names = task_names()
    assert names == sorted(names) and {"AQUA", "ALGEBRA"} <= set(names)


# Mixtures

def test_a_mixture_holds_every_example_once_in_an_order_that_the_seed_decides():
    tasks = [Letters("a", 30), Letters("b", 20), Letters("c", 5, stop=2)]
    one, again, other = (TaskMixture(tasks, seed=seed) for seed in (1, 1, 2))
    assert answers(one) == answers(again) != answers(other)
    assert sorted(answers(one)) == sorted(answers(other)) == sorted(sum((answers(task) for task in tasks), []))
    assert answers(one)[17] == message_text(one[17]["messages"][-1])


def test_repeating_a_task_weighs_it_more():
    counts = Counter(text[0] for text in answers(TaskMixture([Letters("a", 10)] * 3 + [Letters("b", 10)])))
    assert counts == {"a": 30, "b": 10}


def test_a_sequence_keeps_the_order_of_its_tasks():
    assert answers(TaskSequence([Letters("a", 2), Letters("b", 0), Letters("c", 2)])) == ["a0", "a1", "c0", "c1"]


def test_a_mixture_can_be_sliced_and_clamps():
    assert len(TaskMixture([Letters("a", 10)], stop=99)) == 10 and len(TaskMixture([Letters("a", 10)], start=4, stop=6)) == 2


def test_each_example_of_nested_mixtures_is_judged_by_its_own_task():
    class Strange(Letters):
        def is_correct(self, conversation, completion):
            return completion == "strange"
    strange = Strange("s", 4)
    mixture = TaskMixture([TaskMixture([Letters("a", 4), strange]), Letters("b", 4)])
    for conversation in mixture:
        right = "strange" if conversation["task"] == strange.name else message_text(conversation["messages"][-1])
        assert mixture.reward(conversation, right) == 1.0 and not mixture.is_correct(conversation, "wrong")


def test_a_mixture_of_nothing_is_refused():
    with pytest.raises(ValueError, match="0 tasks"):
        TaskMixture([])


def test_a_recipe_becomes_a_mixture_with_repeated_epochs():
    mixture = build_mixture([("ALGEBRA", {"size": 10, "levels": 1}, 2), ("algebra", {"size": 3, "split": "test"}, 1)], seed=3)
    assert len(mixture) == 23 and answers(mixture) == answers(build_mixture([("ALGEBRA", {"size": 10, "levels": 1}, 2),
                                                                           ("algebra", {"size": 3, "split": "test"}, 1)], seed=3))
    assert len(build_mixture([("ALGEBRA", {"size": 10}, 1)], {"algebra": {"size": 4}, "AQUA": {"data_dir": "nowhere"}})) == 4
    with pytest.raises(ValueError, match="0.5 epochs"):
        build_mixture([("ALGEBRA", {}, 0.5)])


# Shared pieces

def test_choices_are_rendered_with_the_letter_behind():
    assert render_choices("Which?", ["A", "B"], ["one", "two=2"]) == "Which?\n- one=A\n- two=2=B"


def test_message_text_joins_parts():
    assert message_text({"content": "a"}) == "a"
    assert message_text({"content": [{"type": "text", "text": "a"}, {"type": "text", "text": "\nb"}]}) == "a\nb"


def test_balanced_takes_every_value_once_per_block():
    for block in range(50):
        assert sorted(balanced("ABCDE", 5 * block + i, 42, "x") for i in range(5)) == list("ABCDE")
    orders = {tuple(balanced("ABCDE", 5 * block + i, 42) for i in range(5)) for block in range(50)}
    assert len(orders) > 20
    assert [balanced("ABCDE", i, 1) for i in range(50)] != [balanced("ABCDE", i, 2) for i in range(50)]


def test_the_best_constant_letter_and_its_share():
    assert best_constant(Letters(size=6)) == ("A", 2 / 6)
    assert best_constant(Letters(size=10)) == ("A", 2 / 10)  # the first of equals
    with pytest.raises(ValueError, match="0 examples"):
        best_constant(Letters(size=0))


def test_jsonl_rows_that_are_no_objects_are_counted_or_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\n\n[1, 2]\n{"cut": \n{"b": "\xff"}\n' + b"[" * 100_000 + b"\n")
    skipped = Counter()
    assert load_jsonl(path, skipped) == [{"a": 1}, {"b": "\ufffd"}] and skipped.total() == 3
    with pytest.raises(ValueError, match="line 3 of"):
        load_jsonl(path)


def test_an_unreachable_hub_is_explained(monkeypatch):
    class Offline:
        error = ConnectionError("no route")

        @classmethod
        def load_dataset(cls, path, name, split, revision):
            raise cls.error
    monkeypatch.setitem(sys.modules, "datasets", Offline)
    with pytest.raises(ConnectionError, match="prepare_offline"):
        load_hub_dataset("some/set", "raw", "train")
    Offline.error = FileNotFoundError("404")
    with pytest.raises(ValueError, match="no some/set"):
        load_hub_dataset("some/set", "raw", "train")


@pytest.mark.parametrize("text, value", [
    ("42", 42), (" 1,234 ", 1234), ("$1,234.50", Fraction("1234.5")), ("-7", -7), ("+7", 7), ("3/4", Fraction(3, 4)), ("60%", 60), ("12.", 12),
    ("1,23", None), ("1/0", None), ("", None), ("x", None), ("1 2", None), ("1.2.3", None), ("1e5", None), ("٣", None), ("9" * 50, None), ("--3", None),
])
def test_numbers_are_read_strictly(text, value):
    assert parse_number(text) == value


@pytest.mark.parametrize("text, value", [
    ("so 3 apples and 5 pears", 5), ("7-3=4.", 4), ("x = -4", -4), ("(2)-(3)", 3), ("it is 1,000", 1000), ("ratio 3/4 of it", Fraction(3, 4)),
    ("no digits", None), ("", None), ("half: 1/0", None), ("version v2", None),
])
def test_the_last_number_of_a_text(text, value):
    assert last_number(text) == value


def test_equal_values_are_the_same_number_and_noise_is_none():
    assert same_number("1,000", "1000.0") and same_number("50%", "50") and not same_number("", "") and not same_number("a", "a")


def test_length_penalties_start_where_they_say():
    assert [linear_length_penalty(n, 10, 0.5) for n in (0, 10, 12)] == [0, 0, -1.0]
    assert linear_length_penalty(100, 10, 0.5, floor=2.0) == -2.0
    assert [soft_overlong_penalty(n, 100, 20) for n in (0, 80, 90, 100, 500)] == [0, 0, -0.5, -1, -1]
    with pytest.raises(ValueError, match="buffer"):
        soft_overlong_penalty(1, 10, 0)
