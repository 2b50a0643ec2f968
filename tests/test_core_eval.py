"""Likelihood scoring against one sequence at a time, CORE's prompts and numbers on cases solved by hand, bundles good and bad."""
import json
import os
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from nanochat.compute import Compute
from nanochat.core_bundle import CORE_LABELS, CoreTask, Item, load_bundle
from nanochat.core_eval import core_score, crop, draw_examples, evaluate_task, render, render_blind, task_numbers, to_record, tokenize
from nanochat.gpt import GPT, GPTConfig
from nanochat.likelihood import GPTScorer, Score, Sequence, pack, score
from nanochat.tokenizer import Tokenizer

DATA = Path(os.environ.get("NANOCHAT_TEST_DATA") or Path(__file__).parents[2] / "shared" / "data")
CPU = Compute(torch.device("cpu"), torch.float32)
WORDS = "the cat sat on a mat and Question: Which is right? Answer: A B C D yes no\n".split(" ")


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([" ".join(WORDS)] * 20, 300)


def random_model(vocab_size, sequence_len=256, dtype=torch.float32):
    model = GPT(GPTConfig(sequence_len=sequence_len, vocab_size=vocab_size, n_layer=2, n_head=4, n_kv_head=2, n_embd=32), dtype)
    model.init_weights()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("c_proj.weight") or name == "lm_head.weight":  # they start at zero, where all tokens are equally likely
            torch.nn.init.normal_(weight, std=0.4, generator=generator)
    model.fill_rotary_table()
    return model.to(dtype).eval()


@pytest.fixture(scope="module")
def scorer(tokenizer):
    return GPTScorer(random_model(tokenizer.vocab_size), tokenizer)


def alone(model, sequence):
    """One sequence by one plain pass of the whole model."""
    logits = model(torch.tensor([sequence.tokens[:-1]])).double()
    targets = torch.tensor(sequence.tokens[sequence.start:])
    logits = logits[0, sequence.start - 1:]
    return Score(-F.cross_entropy(logits, targets, reduction="sum").item(), len(targets), bool((logits.argmax(-1) == targets).all()))


def random_item(draw, vocab_size, longest):
    """Sequences with a common beginning of any length, with equal rests, one-token rests and scored tokens inside the beginning."""
    shared = [draw.randrange(vocab_size) for _ in range(draw.randint(1, longest // 2))]
    rests = [[draw.randrange(3) for _ in range(draw.randint(1, draw.choice((1, 4, longest // 2))))] for _ in range(draw.randint(1, 5))]
    start = draw.randint(1, len(shared))
    return [Sequence(shared + rest, start if draw.random() < 0.3 else len(shared)) for rest in rests]


# ---------------------------------------------------------------------------------------------------------------------
# Likelihood

@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_packed_in_batches_scores_as_one_at_a_time(scorer, batch_tokens):
    draw = random.Random(batch_tokens)
    items = [random_item(draw, scorer.model.config.vocab_size, 60) for _ in range(25)]
    finished = {}
    results = score(scorer, items, batch_tokens, finished.__setitem__)
    assert finished == dict(enumerate(results)) and list(map(len, results)) == list(map(len, items))
    for sequences, scores in zip(items, results):
        for sequence, got in zip(sequences, scores):
            expected = alone(scorer.model, sequence)
            assert got.logprob == pytest.approx(expected.logprob, abs=1e-4, rel=1e-6) and got[1:] == expected[1:]


def test_in_float64_packed_and_alone_agree_to_a_billionth(tokenizer):
    scorer = GPTScorer(random_model(tokenizer.vocab_size, dtype=torch.float64), tokenizer)
    draw = random.Random(1)
    items = [random_item(draw, tokenizer.vocab_size, 60) for _ in range(10)]
    for sequences, scores in zip(items, score(scorer, items)):
        assert [one.logprob for one in scores] == pytest.approx([alone(scorer.model, sequence).logprob for sequence in sequences], abs=1e-9)


def test_a_row_holds_the_shared_tokens_and_equal_rests_once():
    row = pack([Sequence([1, 2, 3, 7, 9], 3), Sequence([1, 2, 3, 8], 3), Sequence([1, 2, 3, 7, 5], 3), Sequence([1, 2, 3], 1)])
    assert row.tokens == [1, 2, 3, 7, 3] and row.positions == [0, 1, 2, 3, 2] and row.branches == [0, 0, 1, 1, 2]
    assert row.columns == [[2, 3], [4], [2, 3], [0, 1]] and row.targets == [[7, 9], [8], [7, 5], [2, 3]]
    letters = pack([Sequence([1, 2, 3, letter], 3) for letter in (7, 8, 9)])
    assert letters.tokens == [1, 2, 3] and letters.columns == [[2]] * 3 and letters.targets == [[7], [8], [9]] and not letters.has_branches
    answers = pack([Sequence([1, 2, 3, 4, 5], 3), Sequence([1, 2, 3, 6, 7, 8], 3)])
    assert answers.tokens == [1, 2, 3, 4, 6, 7] and answers.positions == [0, 1, 2, 3, 3, 4] and answers.branches == [0, 0, 0, 1, 2, 2]
    assert answers.columns == [[2, 3], [2, 4, 5]] and answers.targets == [[4, 5], [6, 7, 8]]


def test_a_sequence_that_cannot_be_scored_is_refused(scorer):
    for sequence, said in ((Sequence([1, 2], 0), "at least one"), (Sequence([1, 2], 2), "at least one"), (Sequence([1] * 258, 5), "does not fit the model's 256")):
        with pytest.raises(ValueError, match=said):
            score(scorer, [[sequence]])


# ---------------------------------------------------------------------------------------------------------------------
# Prompts

ARC = Item(("Question: Which is right?",), ("A cat", "no mat"), 1)
COPA = Item(("the cat sat on",), ("a mat", "the cat and a mat"), 0)
SCHEMA = Item(("the cat sat", "the mat sat"), ("on a mat",), 1)
LAMBADA = Item(("the cat sat on a",), ("mat",))


def task_of(items, kind="multiple_choice", shots=0, delimiter=" ", baseline=0.5, **more):
    return CoreTask("made_up", kind, shots, baseline, tuple(items), "digest", delimiter, **more)


def test_prompts_show_examples_delimiters_and_every_choice():
    few = task_of([ARC, COPA], shots=1, delimiter="\nAnswer: ")
    assert render(few, COPA, [ARC]) == [("Question: Which is right?\nAnswer: no mat\nthe cat sat on\nAnswer: ", choice) for choice in COPA.continuations]
    blank = task_of([ARC], example_delimiter="\n\n", prompt_string="Say.\n")
    assert render(blank, COPA, [ARC])[0][0] == "Say.\nQuestion: Which is right? no mat\n\nthe cat sat on "
    schema = task_of([SCHEMA], "schema")
    assert render(schema, SCHEMA, [SCHEMA]) == [(f"the mat sat on a mat\nthe {noun} sat ", "on a mat") for noun in ("cat", "mat")]
    assert render(task_of([LAMBADA], "language_modeling"), LAMBADA, []) == [("the cat sat on a ", "mat")]


def test_without_context_the_choices_stand_alone():
    assert render_blind(task_of([ARC], delimiter="\nAnswer: "), ARC) == [("Answer: ", "A cat"), ("Answer: ", "no mat")]
    assert render_blind(task_of([COPA]), COPA) == [("", choice) for choice in COPA.continuations]
    assert render_blind(task_of([SCHEMA], "schema"), SCHEMA) == [("", context) for context in SCHEMA.contexts]
    assert render_blind(task_of([LAMBADA], "language_modeling"), LAMBADA) == []


def test_examples_are_other_rows_and_depend_on_nothing_but_seed_and_item():
    items = [Item((f"question {i % 7}",), ("yes", "no"), 0) for i in range(40)]          # seven different rows
    task = task_of(items, shots=6)
    for index in range(40):
        examples = draw_examples(task, index, 1)
        assert len(set(examples)) == 6 and items[index] not in examples and examples == draw_examples(task, index, 1)
    assert len({tuple(draw_examples(task, 0, seed)) for seed in range(20)}) > 5


def test_words_are_cut_as_in_running_text_and_the_space_belongs_to_the_continuation(scorer, tokenizer):
    (sequence,) = tokenize(scorer, [("the cat sat on ", "a mat")])
    assert sequence.tokens == [tokenizer.bos_id, *tokenizer.encode("the cat sat on a mat")]
    assert tokenizer.decode(sequence.tokens[sequence.start:]) == " a mat"
    (alone,) = tokenize(scorer, [("", "a mat")])
    assert alone == Sequence([tokenizer.bos_id, *tokenizer.encode("a mat")], 1)


def test_where_context_and_continuation_merge_into_one_token_that_one_is_scored():
    class Merging(Table):
        def encode(self, texts):
            return [[len(text)] for text in texts]

    assert tokenize(Merging({}), [("the c", "at")]) == [Sequence([0, 7], 1)]
    without_bos = Merging({})
    without_bos.bos = []
    assert tokenize(without_bos, [("the c", "at")]) == [Sequence([0, 7], 1)], "nothing stands before it, so what begins a text does"


def test_a_long_prompt_loses_its_beginning_but_never_bos_and_all_choices_lose_the_same():
    short, long = Sequence([0, 1, 2, 3, 4, 5], 4), Sequence([0, 1, 2, 3, 4, 5, 6, 7], 4)
    assert crop([short, long], 7, 1) == ([short, long], 0)
    assert crop([short, long], 5, 1) == ([Sequence([0, 3, 4, 5], 2), Sequence([0, 3, 4, 5, 6, 7], 2)], 2)
    assert crop([short, long], 4, 1) == ([Sequence([0, 4, 5], 1), Sequence([0, 4, 5, 6, 7], 1)], 3)
    assert crop([short, long], 3, 1) == (None, 4)
    assert crop([short], 3, 0) == ([Sequence([2, 3, 4, 5], 2)], 2) and crop([short], 2, 0)[0] == [Sequence([3, 4, 5], 1)] and crop([short], 1, 0)[0] is None


# ---------------------------------------------------------------------------------------------------------------------
# Scores

class Table:
    """A scorer that looks log-probabilities up: {text: [log p of each scored token]}; words are tokens."""
    packs, sequence_len, bos, start = True, 100, [0], [0]

    def __init__(self, table):
        self.table, self.words = table, ["<bos>"]

    def encode(self, texts):
        lines = []
        for text in texts:
            self.words += [word for word in text.split() if word not in self.words]
            lines.append([self.words.index(word) for word in text.split()])
        return lines

    def read(self, rows):
        logprobs = []
        for row in rows:
            for columns, targets in zip(row.columns, row.targets):
                said = " ".join(self.words[target] for target in targets)
                before = self.words[row.tokens[columns[0]]]
                logprobs += self.table.get((before, said), [-9.0] * len(targets))
        return torch.tensor(logprobs), torch.tensor(logprobs) > -0.5


def test_each_kind_of_task_on_a_case_solved_by_hand():
    # by the sum "a mat" (-3) would win over "the cat and a mat" (-5); by the mean per token -1.5 loses against -1
    scorer = Table({("on", "a mat"): [-1.0, -2.0], ("on", "the cat and a mat"): [-1.0] * 5, ("<bos>", "a mat"): [-1.0, -1.0]})
    (record,) = evaluate_task(task_of([COPA]), scorer, CPU)
    assert record["chosen"] == 1 and not record["correct"] and record["logprobs"] == [-3.0, -5.0] and record["tokens"] == [2, 5]
    assert record["blind"] == 0 and record["choices"] == COPA.continuations
    scorer = Table({("cat", "is here"): [-2.0, -2.0], ("mat", "is here"): [-1.0, -2.0], ("<bos>", "the cat"): [-1.0, -1.0]})
    (record,) = evaluate_task(task_of([Item(("the cat", "the mat"), ("is here",), 1)], "schema"), scorer, CPU)
    assert record["correct"] and record["chosen"] == 1 and record["blind"] == 0
    for logprobs, correct in (([-0.1, -0.2], True), ([-0.1, -0.7], False)):
        (record,) = evaluate_task(task_of([Item(("the",), ("cat sat",))], "language_modeling"), Table({("the", "cat sat"): logprobs}), CPU)
        assert record["correct"] == correct and record["blind"] is None


def test_numbers_and_controls_solved_by_hand():
    items = [Item(("q",), ("xx", "y"), 0), Item(("r",), ("x", "yy"), 0), Item(("s",), ("xx", "yy"), 1), Item(("t",), ("x", "yyy", "z"), 1)]
    task = task_of(items, baseline=0.4)
    scores = [Score(-1.0, 1, False), Score(-2.0, 1, False)]
    records = [to_record(task, index, index, scores, scores[::-1]) for index in range(3)] + [to_record(task, 3, 7, None, None)]
    numbers = task_numbers(task, records)
    assert numbers["accuracy"] == 0.5 and numbers["centred"] == pytest.approx(0.1 / 0.6) and (numbers["cropped"], numbers["too_long"]) == (0.75, 0.25)
    assert numbers["best_constant"] == {"letter": "choice 1", "share": 0.5} and numbers["first"] == 0.5 and numbers["blind"] == 0.25
    assert numbers["shortest"] == (0 + 1 + 0.5 + 0) / 4 and numbers["longest"] == (1 + 0 + 0.5 + 1) / 4 and numbers["by_choices"] == (3 * 0.5 + 1 / 3) / 4
    task = task_of([Item(("q",), (word,)) for word in ("b", "a", "b")], "language_modeling", baseline=0.0)
    numbers = task_numbers(task, [to_record(task, index, 0, [Score(-1.0, 1, index == 0)], None) for index in range(3)])
    assert numbers["accuracy"] == pytest.approx(1 / 3) and numbers["best_constant"] == {"letter": "'b'", "share": 2 / 3} and numbers["blind"] is None


def test_core_is_called_core_only_over_22_whole_tasks():
    one = {"centred": 0.2, "random_baseline": 0.5, "best_constant": {"share": 0.6}, "blind": 0.7}
    whole = {label: one for label in CORE_LABELS}
    assert core_score(whole) == {"name": "CORE", "is_core": True, "value": pytest.approx(0.2), "blind": pytest.approx(0.4)}
    assert core_score(whole, is_whole=False)["name"] == "mean of 22 centred scores (not CORE: the tasks are sampled)"
    part = core_score({label: one for label in CORE_LABELS[:18]}, is_whole=False)
    assert part["name"] == "mean of 18 centred scores (not CORE: 4 of its 22 tasks are missing, the tasks are sampled)" and not part["is_core"]
    assert not core_score({**whole, "another": one})["is_core"]


@pytest.fixture(scope="module")
def small_task():
    draw = random.Random(5)
    items = [Item((" ".join(draw.choices(WORDS[:10], k=draw.randint(3, 30))),), tuple(" ".join(draw.choices(WORDS[:10], k=draw.randint(1, 5))) for _ in range(3)),
                  draw.randrange(3)) for _ in range(30)]
    return task_of(items, shots=3)


def close_to(first, second):
    """The same records, log-likelihoods to float32's precision."""
    assert len(first) == len(second)
    for one, other in zip(first, second):
        assert one["logprobs"] == pytest.approx(other["logprobs"], rel=1e-5)
        assert {**one, "logprobs": 0} == {**other, "logprobs": 0}


def test_batched_sharded_resumed_and_one_at_a_time_are_the_same(tokenizer, small_task):
    scorer = GPTScorer(random_model(tokenizer.vocab_size, sequence_len=150), tokenizer)
    whole = evaluate_task(small_task, scorer, CPU, batch_tokens=2000)
    assert [record["index"] for record in whole] == list(range(30)) and 0 < sum(record["cropped"] > 0 for record in whole) < 30
    close_to(evaluate_task(small_task, scorer, CPU, batch_tokens=1), whole)
    parts = [shard(small_task, scorer, rank, 2) for rank in range(2)]
    close_to(sorted(parts[0] + parts[1], key=lambda record: record["index"]), whole)
    kept = []
    known = {record["index"]: record for record in whole[::3]}
    assert evaluate_task(small_task, scorer, CPU, known=known, keep=kept.append)[0] is whole[0]
    assert sorted(record["index"] for record in kept) == [index for index in range(30) if index % 3]
    sample = evaluate_task(small_task, scorer, CPU, max_items=7)
    close_to(sample, [whole[record["index"]] for record in sample])
    assert len({record["index"] for record in sample}) == 7


def shard(task, scorer, rank, world_size):
    """What one rank contributes: a Compute that gathers nothing from the others."""
    class Alone(Compute):
        def gather_objects(self, value):
            return [value]
    return evaluate_task(task, scorer, Alone(CPU.device, CPU.dtype, rank, rank, world_size), batch_tokens=2000)


def test_an_item_that_cannot_fit_counts_as_wrong(tokenizer):
    scorer = GPTScorer(random_model(tokenizer.vocab_size, sequence_len=8), tokenizer)
    task = task_of([Item(("the cat",), ("a", "the cat sat on a mat and " * 3), 0), ARC, COPA])
    records = evaluate_task(task, scorer, CPU)
    assert records[0]["too_long"] and not records[0]["correct"] and records[0]["chosen"] is None
    assert task_numbers(task, records)["too_long"] >= 1 / 3


# ---------------------------------------------------------------------------------------------------------------------
# Bundles

ROWS = {"multiple_choice": {"query": "Question: Which is right? ", "choices": ["A cat", "no mat"], "gold": 1},
        "schema": {"context_options": ["the cat sat", "the mat sat"], "continuation": "on a mat", "gold": 0},
        "language_modeling": {"context": "the cat sat on a", "continuation": " mat"}}


def write_bundle(folder, rows=None, entries=None, csv_text=None, count=4):
    """A bundle of three tasks, one of each kind, or with something wrong."""
    rows = ROWS if rows is None else rows
    (folder / "eval_data" / "room").mkdir(parents=True, exist_ok=True)
    lines, table = ["icl_tasks:"], ["Eval Task,Task Category,#shots,Random baseline,Description"]
    for kind, row in rows.items():
        text = row if isinstance(row, str) else "".join(json.dumps({**row, **({"query": f"{row['query']} {i}"} if "query" in row else {}),
                                                                    **({"context": f"{row['context']} {i}"} if isinstance(row.get("context"), str) else {}),
                                                                    }) + "\n" for i in range(count))
        (folder / "eval_data" / "room" / f"{kind}.jsonl").write_text(text)
        lines += [f"- label: {kind}", f"  dataset_uri: room/{kind}.jsonl", f"  icl_task_type: {kind}", "  num_fewshot:", f"  - {0 if kind == 'schema' else 2}"]
        table.append(f'{kind},room,2,{0 if kind == "language_modeling" else 50},"Of ""words"", and more"')
    (folder / "core.yaml").write_text(entries if entries is not None else "\n".join(lines))
    (folder / "eval_meta_data.csv").write_text(csv_text if csv_text is not None else "\n".join(table))
    return folder


def test_a_bundle_is_read_with_its_settings(tmp_path):
    tasks = {task.label: task for task in load_bundle(write_bundle(tmp_path))}
    assert list(tasks) == list(ROWS) and [task.num_fewshot for task in tasks.values()] == [2, 0, 2]
    assert tasks["multiple_choice"].items[0] == Item(("Question: Which is right?  0",), ("A cat", "no mat"), 1)
    assert tasks["language_modeling"].items[3].continuations == ("mat",) and tasks["language_modeling"].random_baseline == 0.0
    assert [task.label for task in load_bundle(tmp_path, ["schema"])] == ["schema"]
    with pytest.raises(ValueError, match="has no task arc"):
        load_bundle(tmp_path, ["arc"])


ENTRY = "icl_tasks:\n- label: multiple_choice\n  dataset_uri: {uri}\n  icl_task_type: {kind}\n  num_fewshot: {shots}\n  continuation_delimiter: {delimiter}\n"
GOOD = {"uri": "room/multiple_choice.jsonl", "kind": "multiple_choice", "shots": 1, "delimiter": "' '"}


@pytest.mark.parametrize("entries, said", [
    ("icl_tasks: []", "lists no tasks"), ("- 1", "lists no tasks"), ("icl_tasks: [1]", "lists no tasks"), ("a: [", "not readable yaml"),
    ("icl_tasks:\n- dataset_uri: x\n", "has the label None"), ("icl_tasks:\n- label: a\n- label: a\n", "names the task 'a' 2 times"),
    (ENTRY.format(**{**GOOD, "kind": "cloze"}), "of the type 'cloze'"), (ENTRY.format(**{**GOOD, "shots": -1}), "num_fewshot"),
    (ENTRY.format(**{**GOOD, "shots": "[1, 2]"}), "num_fewshot"), (ENTRY.format(**{**GOOD, "shots": 4}), "4 different rows"),
    (ENTRY.format(**{**GOOD, "uri": "../core.yaml"}), "inside eval_data"), (ENTRY.format(**{**GOOD, "uri": "/etc/hostname"}), "inside eval_data"),
    (ENTRY.format(**{**GOOD, "uri": "room/none.jsonl"}), "is missing"), (ENTRY.format(**{**GOOD, "uri": 7}), "must be text"),
    (ENTRY.format(**{**GOOD, "delimiter": "3"}), "must be text"),
])
def test_a_wrong_core_yaml_is_refused_in_words(tmp_path, entries, said):
    with pytest.raises(ValueError, match=said):
        load_bundle(write_bundle(tmp_path, entries=entries))


@pytest.mark.parametrize("kind, row, said", [
    ("multiple_choice", "{torn\n", "line 1 of .* not a JSON object"), ("multiple_choice", "[1]\n", "not a JSON object"), ("multiple_choice", "", "0 different rows"),
    ("multiple_choice", {"choices": ["a"], "gold": 0}, "two or more"), ("multiple_choice", {"choices": ["a", 3], "gold": 0}, "two or more"),
    ("multiple_choice", {"gold": 2}, "choice 2 of 2"), ("multiple_choice", {"gold": True}, "choice True"), ("multiple_choice", {"gold": None}, "choice None"),
    ("multiple_choice", {"choices": ["a", " "]}, "nothing to score"), ("schema", {"context_options": ["", "a"]}, "nothing to score"),
    ("schema", {"continuation": 5}, "must be a text"), ("language_modeling", {"context": None}, "must be a text"), ("language_modeling", {"continuation": ""}, "nothing to score"),
])
def test_a_wrong_row_is_refused_with_its_line(tmp_path, kind, row, said):
    rows = {kind: row if isinstance(row, str) else {**ROWS[kind], **row}}
    with pytest.raises(ValueError, match=said):
        load_bundle(write_bundle(tmp_path, rows))


@pytest.mark.parametrize("text, said", [("", "missing in eval_meta"), ("Eval Task\nx\n", "must have the columns"), ("Eval Task,Random baseline\nmultiple_choice,high\n", "must have"),
                                        ("Eval Task,Random baseline\nmultiple_choice,100\n", "less than 100")])
def test_wrong_baselines_are_refused(tmp_path, text, said):
    with pytest.raises(ValueError, match=said):
        load_bundle(write_bundle(tmp_path, csv_text=text))


def test_damaged_bundles_give_value_errors_and_nothing_else(tmp_path):
    folder, draw = write_bundle(tmp_path), random.Random(0)
    files = [path for path in folder.rglob("*") if path.is_file()]
    whole = {path: path.read_bytes() for path in files}
    refused = 0
    for _ in range(150):
        path = draw.choice(files)
        data = bytearray(whole[path])
        for _ in range(draw.randint(1, 4)):
            place = draw.randrange(len(data))
            data[place:place + draw.choice((0, 1, 1, 9))] = bytes(draw.choices(b'{}[]",:-0 \n\x00\xff\xc3', k=draw.randint(0, 3)))
        path.write_bytes(data)
        try:
            load_bundle(folder)
        except ValueError:
            refused += 1
        path.write_bytes(whole[path])
    assert refused > 30 and load_bundle(folder)


@pytest.mark.skipif(not (DATA / "core" / "core.yaml").is_file(), reason="needs the eval bundle beside the checkout")
def test_the_published_tasks_are_all_readable():
    tasks = load_bundle(DATA / "core")
    assert {task.label for task in tasks} == set(CORE_LABELS) - {"squad", "coqa", "jeopardy", "agi_eval_lsat_ar"}
    always_first = {task.label: sum(item.gold == 0 for item in task.items) / len(task.items) for task in tasks if task.kind != "language_modeling"}
    assert always_first["copa"] == pytest.approx(0.55, abs=0.1) and all(0.1 < share < 0.7 for share in always_first.values())
