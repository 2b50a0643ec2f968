"""Generated problems: right, short, disjoint between splits, without a giveaway; and the embedded data made of them."""
import json
import random
import re
import subprocess
import sys
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from nanochat.dataset import iter_documents, list_shards
from nanochat.workers import workers
from scripts import prepare_offline
from tasks.algebra import SIZES, Algebra, choose_options, draw, make_problem, split_of
from tasks.algebra_kinds import KINDS, LARGEST, LEVELS
from tasks.aqua import AQUA, build_conversation, extract_answer, parse_row, permuted
from tasks.common import best_constant, get_task, message_text

STEP = re.compile(r"(\d+)([-+*/])(\d+)=(\d+)")


@pytest.fixture(scope="module")
def problems():
    """2,000 problems of each level of train."""
    return [make_problem("train", index, level) for level in LEVELS for index in range(2_000)]


def integers(text):
    return [int(number) for number in re.findall(r"\d+", text)]


def values(problem):
    return [int(option[2:]) for option in problem["options"]]


def gold(problem):
    return values(problem)["ABCDE".index(problem["correct"])]


# ---------------------------------------------------------------------------------------------------------------------
# Right and short

def test_every_kind_occurs_at_its_level(problems):
    assert {(problem["kind"], problem["level"]) for problem in problems} == {(kind, level) for kind, (level, _) in KINDS.items()}


def test_every_number_everywhere_has_at_most_two_digits(problems):
    for problem in problems:
        text = " ".join((problem["question"], *problem["options"], problem["rationale"]))
        assert max(integers(text)) <= LARGEST and not re.search(r"(?<![\dx)])-\d|\.\d|\d{3}|\b0\d", text), text


def test_every_step_is_one_correct_operation_and_the_last_value_is_the_answer(problems):
    for problem in problems:
        *steps, line = problem["rationale"].split(" so ")
        assert line == f"{gold(problem)}={problem['correct']}", problem  # it ends with the right option's line in the prompt
        for step in steps:
            found = STEP.findall(step)
            assert len(found) == 1 and step.endswith("".join(found[0][:3]) + "=" + found[0][3]), problem
            a, sign, b, c = int(found[0][0]), found[0][1], int(found[0][2]), int(found[0][3])
            assert {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b != 0 and a == b * c}[sign], problem
        assert integers(steps[-1])[-1] == gold(problem)


def test_the_level_is_the_number_of_steps(problems):
    for problem in problems:
        steps = len(problem["rationale"].split(" so ")) - 1  # the last part is the option's line
        assert steps == problem["level"] or (problem["level"] == 4 and 3 <= steps <= 5), problem


def test_every_value_in_a_step_was_given_or_computed_before(problems):
    """No step takes a number out of the air, apart from the constants of averages, percentages, ages and doubled unknowns."""
    allowed = {"average_two": {2}, "average_three": {3}, "average_missing": {3}, "percent": {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, "ages_later": {1},
               "percent_left": {1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, "system_sum": {2}, "two_sides": {1}}
    for problem in problems:
        known = set(integers(problem["question"])) | allowed.get(problem["kind"], set())
        for a, _, b, c in STEP.findall(problem["rationale"]):
            assert {int(a), int(b)} <= known, problem
            known.add(int(c))


def solutions(equation):
    """All x in 0..99 that solve an equation like 3(x+2)+4=x+30, by trying each."""
    code = re.sub(r"(\d)(x|\()", r"\1*\2", equation).replace("=", "==")
    return [x for x in range(LARGEST + 1) if eval(code, {"x": x})]


def test_equations_have_the_answer_as_their_only_solution(problems):
    checked = Counter()
    for problem in problems:
        equations = re.findall(r"[\dx()+\-*/]+=[\dx()+\-*/]+", problem["question"])
        if len(equations) == 1 and "y" not in problem["question"]:
            assert solutions(equations[0]) == [gold(problem)], problem
            checked[problem["kind"]] += 1
    assert set(checked) == {kind for kind in KINDS if kind.startswith(("equation", "linear", "bracket", "two_sides"))}


def in_order(problem):
    """The answer from the numbers of the question in the order they stand there, for the kinds whose wordings keep one order."""
    n = integers(problem["question"])
    return {
        "gain": lambda: n[0] + n[1], "loss": lambda: n[0] - n[1], "product": lambda: n[0] * n[1], "gain_loss": lambda: n[0] + n[1] - n[2],
        "age_sum": lambda: 2 * n[0] + n[1], "average_two": lambda: (n[0] + n[1]) / 2, "average_three": lambda: sum(n) / 3,
        "sequence": lambda: 2 * n[3] - n[2], "percent": lambda: n[0] * n[1] / 100, "ages_later": lambda: n[1] / (n[0] + 1) * n[0] + n[2],
        "two_prices": lambda: n[0] * n[1] + n[2] * n[3], "think_back": lambda: (n[3] * n[2] - n[1]) / n[0],
        "average_missing": lambda: 3 * n[-1] - n[0] - n[1], "ratio_difference": lambda: n[2] / (n[0] - n[1]) * (n[0] + n[1]),
        "shop_change": lambda: n[0] - n[1] * n[2] - n[3] * n[4], "rate": lambda: max(n[0] / n[1], n[1] / n[0]) * n[2],
        "change": lambda: n[0] - n[1] * n[2], "share": lambda: max(n) / min(n),
        "ratio_share": lambda: n[0] / (n[1] + n[2]) * n[1] if problem["question"][0] != "T" or "share" in problem["question"] else n[2] / (n[0] + n[1]) * n[0],
        "percent_left": lambda: n[0] * (100 + n[1] * (1 if "more" in problem["question"] or "goes up" in problem["question"] else -1)) / 100,
    }.get(problem["kind"], lambda: None)()


def test_word_problems_agree_with_a_second_solution(problems):
    checked = Counter()
    for problem in problems:
        answer = in_order(problem)
        if answer is not None:
            assert abs(answer - gold(problem)) < 1e-9, problem
            checked[problem["kind"]] += 1
        if problem["kind"].startswith("system") and "x+y=" in problem["question"]:
            assert abs(solve_system(problem["question"]) - gold(problem)) < 1e-9, problem
            checked[problem["kind"]] += 1
    assert len(checked) == 22


def solve_system(question):
    """The value asked for, by Cramer's rule from the two equations ax+by=c in the text."""
    (a, b, c), (d, e, f) = ((coefficient(x), coefficient(y), int(right)) for x, y, right in re.findall(r"(\d*)x([+-]\d*)y=(\d+)", question))
    x, y = (c * e - b * f) / (a * e - b * d), (a * f - c * d) / (a * e - b * d)
    asked = re.sub(r"(\d)([xy])", r"\1*\2", re.search(r"(?:what is|find) ([\dxy+]+)[?.]", question)[1])
    return eval(asked, {"x": x, "y": y})


def coefficient(text):
    return int(text + "1") if text in ("", "+", "-") else int(text)


def test_five_different_options_hold_the_answer_once(problems):
    for problem in problems:
        assert [option[:2] for option in problem["options"]] == ["A)", "B)", "C)", "D)", "E)"] and len(set(values(problem))) == 5


def test_problems_are_short(problems):
    """In pieces of a word, a number or a sign, which is what a tokenizer trained on the embedded text makes of them."""
    lengths = []
    for problem in problems:
        conversation = build_conversation(*parse_row(problem)[:4])
        lengths.append(len(re.findall(r" ?[A-Za-z]+|\d+|[^\w]", " ".join(message_text(message) for message in conversation["messages"]))))
    assert sum(lengths) / len(lengths) < 90 and max(lengths) < 125, (sum(lengths) / len(lengths), max(lengths))


# ---------------------------------------------------------------------------------------------------------------------
# Random access, splits, balance

def test_a_problem_depends_on_its_arguments_alone():
    code = "from tasks.algebra import make_problem as m; import json; print(json.dumps([m(s, i, seed=7) for s in ('test', 'train') for i in (9, 0, 123456)]))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1], env={"PYTHONHASHSEED": "1"})
    assert json.loads(run.stdout) == [make_problem(split, index, seed=7) for split in ("test", "train") for index in (9, 0, 123456)]
    assert make_problem("train", 5) != make_problem("train", 5, seed=43) and make_problem("train", 5) != make_problem("train", 6)


def normalised(problem):
    return re.sub(r"[^a-z0-9+*/=%():-]+", " ", problem["question"].lower()).strip()


def test_train_and_held_out_problems_never_meet():
    train, kinds_and_numbers = set(), set()
    for seed in (42, 1):                                  # the seed never moves a problem to another split
        for index in range(11_000):
            problem = make_problem("train", index, seed=seed)
            train.add(normalised(problem))
            kinds_and_numbers.add((problem["kind"], *sorted(integers(problem["question"]))))
    held_out = {split: [make_problem(split, index) for index in range(1_000)] for split in ("validation", "test")}
    for problem in held_out["validation"] + held_out["test"]:
        assert normalised(problem) not in train
        assert (problem["kind"], *sorted(integers(problem["question"]))) not in kinds_and_numbers
    one, two = ({normalised(problem) for problem in held_out[split]} for split in held_out)
    assert not one & two and len(one) > 850 and len(two) > 850


def test_order_and_seed_do_not_change_a_problems_split():
    for kind in KINDS:
        assert split_of(kind, (3, 5, 20)) == split_of(kind, (20, 3, 5))
    shares = Counter(split_of("k", (a, b)) for a in range(100) for b in range(a, 100))
    assert 0.88 < shares["train"] / shares.total() < 0.92 and 0.04 < shares["test"] / shares.total() < 0.06


def test_every_kind_has_problems_in_every_split():
    """Else make_problem would look for one for ever."""
    for kind in KINDS:
        r, found = random.Random(kind), defaultdict(set)
        for _ in range(4_000):
            drawn = draw(r, kind)
            if drawn:
                found[split_of(kind, drawn[0])].add(tuple(sorted(drawn[0])))
        assert set(found) == set(SIZES) and len(found["train"]) > 80, (kind, {split: len(numbers) for split, numbers in found.items()})


@pytest.mark.parametrize("split", SIZES)
def test_each_letter_is_right_once_in_five_indices(split):
    letters = [make_problem(split, index)["correct"] for index in range(100)]
    assert all(sorted(letters[i:i + 5]) == list("ABCDE") for i in range(0, 100, 5))
    assert best_constant(Algebra(split, size=100))[1] == 0.2


def test_options_alone_do_not_tell_the_answer(problems):
    """What a model that cannot see the question could try. The share that chance finds is 0.2."""
    def neighbours(distances):
        return lambda options: max(options, key=lambda value: sum(abs(value - other) in distances for other in options))
    guesses = {"smallest": min, "largest": max, "median": lambda options: sorted(options)[2], "second": lambda options: sorted(options)[1],
               "nearest to all": lambda options: min(options, key=lambda value: sum(abs(value - other) for other in options)),
               "most near misses": neighbours((1, 2, 3, 5, 10)), "ten apart": neighbours((10,)), "one apart": neighbours((1,)),
               "most alone": lambda options: max(options, key=lambda value: min(abs(value - other) for other in options if other != value)),
               "first even": lambda options: next((value for value in options if value % 2 == 0), options[0])}
    for name, guess in guesses.items():
        share = sum(guess(values(problem)) == gold(problem) for problem in problems) / len(problems)
        assert 0.15 < share < 0.25, (name, share)


def test_options_are_found_for_every_answer():
    r = random.Random(0)
    for answer in range(LARGEST + 1):
        for wrong in ((), (answer,), (-5, 200), (0, 99, 1, 98), (answer + 1, answer - 1, answer + 10)):
            found = choose_options(r, answer, wrong)
            assert len({answer, *found}) == 5 and all(0 <= value <= LARGEST for value in found)


# ---------------------------------------------------------------------------------------------------------------------
# The task

def test_the_task_is_random_access_and_holds_its_levels():
    task = Algebra("validation", levels=(2, 4), size=200)
    assert Counter(conversation["level"] for conversation in task) == {2: 100, 4: 100} and task[150] == list(task)[150]
    assert {Algebra(levels=3)[i]["level"] for i in range(10)} == {3} and len(Algebra("test", stop=5)) == 5 and len(Algebra("test", stop=99_999)) == 1_000


def test_gold_answers_earn_full_reward_and_silence_none():
    task = get_task("algebra", split="validation")
    for conversation in task:
        text = message_text(conversation["messages"][-1])
        assert task.rewards(conversation, text) == {"correct": 1.0, "format": 0.1} and task.reward(conversation, "") == 0.0
        wrong = "ABCDE"[("ABCDE".index(conversation["answer_letter"]) + 1) % 5]
        assert task.rewards(conversation, f"Answer: {wrong}") == {"correct": 0.0, "format": 0.1}


def test_cleaning_a_raw_row_takes_off_the_letter_and_nothing_else(problems):
    for problem in problems:
        question, choices, rationale, letter, flags = parse_row(problem)
        assert (question, f"{rationale}={letter}", letter, flags) == (problem["question"], problem["rationale"], problem["correct"], [])
        assert [f"{letter}){choice}" for letter, choice in zip("ABCDE", choices)] == problem["options"]


def test_the_option_line_of_a_solution_moves_with_the_options():
    task = Algebra("train", size=50)
    for conversation in task:
        for shift in range(5):
            moved = permuted(conversation, shift)
            value, letter = message_text(moved["messages"][-1]).split("\n")[0].rsplit(" so ", 1)[1].split("=")
            assert letter == moved["answer_letter"] and f"- {value}={letter}\n" in moved["messages"][0]["content"]


def test_the_text_begins_with_lookup_lists_alone(offline):
    folder, _ = offline
    first = [text for text in iter_documents(list_shards("train", folder / "base_data"))][:300]
    assert all(re.fullmatch(r"(- \d+=[A-E]\n)+(.*\n)?(\d+=[A-E]\n?)+(Answer: [A-E])?", text) for text in first)


def test_wrong_arguments_are_explained():
    for call in (lambda: Algebra("dev"), lambda: make_problem("dev", 0)):
        with pytest.raises(ValueError, match="train, validation, test"):
            call()
    for levels in ((), (0,), (1, 5), 7):
        with pytest.raises(ValueError, match="are not all among"):
            Algebra(levels=levels)


# ---------------------------------------------------------------------------------------------------------------------
# The embedded data

SMALL = {"text_chars": 300_000, "train_rows": 400, "validation_rows": 60, "test_rows": 60, "identity_rows": 50}


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    folder = tmp_path_factory.mktemp("offline")
    return folder, prepare_offline.main(prepare_offline.Config(**SMALL, output_dir=str(folder)))


def snapshot(folder):
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.rglob("*") if path.is_file()}


def texts(folder):
    return [text for split in ("train", "val") for text in iter_documents(list_shards(split, folder / "base_data"))]


def test_everything_the_pipeline_needs_is_written(offline, capsys):
    folder, files = offline
    assert {"base_data/shard_00000.parquet", "base_data/shard_val.parquet", "identity_conversations.jsonl", "aqua/counts.json"} < set(files)
    for split, count in (("train", 400), ("validation", 60), ("test", 60)):
        task = AQUA(split, data_dir=folder / "aqua")
        assert len(task) == count and not task.skipped and not task.flagged and {"level", "kind"} <= set(task[0])
    assert abs(sum(map(len, texts(folder))) - 320_000) < 5_000 and min(map(len, texts(folder))) > 25
    conversations = [json.loads(line)["messages"] for line in (folder / "identity_conversations.jsonl").read_text().splitlines()]
    assert len(conversations) == 50 and all([m["role"] for m in c] == ["user", "assistant"] * (len(c) // 2) for c in conversations)
    assert any("nanochat" in c[1]["content"] for c in conversations)


def test_a_second_run_does_nothing(offline, capsys):
    folder, files = offline
    before = snapshot(folder)
    assert prepare_offline.main(prepare_offline.Config(**SMALL, output_dir=str(folder))) == files
    assert snapshot(folder) == before and "nothing to do" in capsys.readouterr().out


def test_no_held_out_problem_is_in_the_text_or_in_train(offline):
    folder, _ = offline
    rows = {split: [json.loads(line) for line in (folder / "aqua" / f"{split}.jsonl").read_text().splitlines()] for split in SIZES}
    everything = normalised({"question": " ".join(texts(folder))}) + " ".join(map(normalised, rows["train"]))
    held_out = rows["validation"] + rows["test"]
    assert len({row["question"] for row in held_out}) == 120
    assert normalised(rows["train"][0]) in everything
    for row in held_out:
        assert normalised(row) not in everything, row
    for equation in {equation for row in held_out for equation in re.findall(r"[\dxy()+\-*/]+=[\dxy()+\-*/]+", row["question"])}:
        if "y" not in equation:                           # half of a system of two may belong to many systems
            assert f" {equation}" not in " ".join(texts(folder)), equation


def test_the_text_has_no_chat_format_and_no_options_with_problems(offline):
    for text in texts(offline[0]):
        assert "<|" not in text and not ("Answer:" in text and re.search(r"\bx=|How many", text))
        assert all(number <= 100 for number in integers(text))


def test_every_sum_and_product_in_the_text_is_right(offline):
    checked = 0
    for text in texts(offline[0]):
        for a, sign, b, c in re.findall(r"(?<![\dx)+\-*/])(\d+)([-+*/])(\d+)=(\d+)(?![\dx(+\-*/])", text):
            a, b, c = int(a), int(b), int(c)
            assert {"+": a + b == c, "-": a - b == c, "*": a * b == c, "/": b and a == b * c}[sign], text
            checked += 1
        for thing, label in re.findall(r"The letter of (\w+) is ([A-H])", text):
            assert f"- {thing}={label}\n" in text
    assert checked > 3_000


def test_another_seed_gives_other_text_and_the_same_seed_the_same(offline, tmp_path):
    folder, files = offline
    again = prepare_offline.main(prepare_offline.Config(**SMALL, output_dir=str(tmp_path)))
    assert again == files
    other = prepare_offline.main(prepare_offline.Config(**SMALL, seed=7, output_dir=str(tmp_path)))  # replaces the first
    assert all(other[name]["sha256"] != facts["sha256"] for name, facts in files.items())
    fewer = prepare_offline.main(prepare_offline.Config(**{**SMALL, "train_rows": 10}, output_dir=str(tmp_path)))
    assert all(fewer[name] == files[name] for name in files if "aqua" not in name)
    assert fewer["aqua/train.jsonl"]["rows"] == 10 and len(AQUA("train", data_dir=tmp_path / "aqua")) == 10


def test_several_processes_make_the_same_files(offline, tmp_path, monkeypatch):
    folder, files = offline
    monkeypatch.setattr(prepare_offline, "workers", lambda count: workers(2))
    monkeypatch.setattr(prepare_offline, "ROWS_AT_ONCE", 150)  # 400 rows in three pieces
    assert prepare_offline.main(prepare_offline.Config(**SMALL, output_dir=str(tmp_path))) == files
    assert {name: content for name, (content, _) in snapshot(tmp_path).items()} == {name: content for name, (content, _) in snapshot(folder).items()}


def test_a_killed_run_is_taken_up_again(tmp_path, monkeypatch):
    config = prepare_offline.Config(**SMALL, output_dir=str(tmp_path))
    real, calls = prepare_offline.write_atomic, []

    def dies(path, data):
        calls.append(path)
        if len(calls) == 6:
            raise KeyboardInterrupt
        real(path, data)
    monkeypatch.setattr(prepare_offline, "write_atomic", dies)
    with pytest.raises(KeyboardInterrupt):
        prepare_offline.main(config)
    monkeypatch.setattr(prepare_offline, "write_atomic", real)
    files = prepare_offline.main(config)
    assert len(files) == 7 and all(prepare_offline.is_intact(tmp_path / name, facts) for name, facts in files.items())


def test_one_part_can_be_made_beside_the_files_of_others(tmp_path):
    (tmp_path / "base_data").mkdir()
    (tmp_path / "base_data" / "shard_01822.parquet").write_bytes(b"downloaded")
    config = prepare_offline.Config(**SMALL, only="identity", output_dir=str(tmp_path))
    assert list(prepare_offline.main(config)) == ["identity_conversations.jsonl"]
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["base_data", "identity_conversations.jsonl", "offline_manifest.json", "shard_01822.parquet"]
    with pytest.raises(ValueError, match="did not write"):
        prepare_offline.main(prepare_offline.Config(**SMALL, output_dir=str(tmp_path)))
    (tmp_path / "base_data" / "shard_01822.parquet").unlink()
    assert len(prepare_offline.main(prepare_offline.Config(**SMALL, output_dir=str(tmp_path)))) == 7
    with pytest.raises(ValueError, match="text, aqua, identity"):
        prepare_offline.main(prepare_offline.Config(only="aquarat"))


@pytest.mark.parametrize("name", ["base_data/shard_01234.parquet", "aqua/test.jsonl", "identity_conversations.jsonl"])
def test_files_of_others_are_never_replaced(tmp_path, name):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(b"mine")
    with pytest.raises(ValueError, match="did not write"):
        prepare_offline.main(prepare_offline.Config(**SMALL, output_dir=str(tmp_path)))
    assert (tmp_path / name).read_bytes() == b"mine"


def test_a_file_replaced_since_is_not_ours_any_more(offline):
    folder, files = offline
    path = folder / "aqua" / "train.jsonl"
    before = path.read_bytes()
    path.write_text("the real AQuA")
    with pytest.raises(ValueError, match="changed since"):
        prepare_offline.main(prepare_offline.Config(**SMALL, output_dir=str(folder)))
    path.write_bytes(before)
    assert prepare_offline.main(prepare_offline.Config(**SMALL, output_dir=str(folder))) == files


def test_sizes_that_leave_nothing_are_refused(tmp_path):
    with pytest.raises(ValueError, match="test_rows=0"):
        prepare_offline.main(prepare_offline.Config(**{**SMALL, "test_rows": 0}, output_dir=str(tmp_path)))
