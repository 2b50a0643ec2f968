"""Explicit experiments: nothing has a default, every field of a mixture works, packed rows are blind to each other, a run resumes to the same bits."""
import dataclasses
import json
import os
import runpy
import signal
import subprocess
import sys
import time
from dataclasses import MISSING, replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dev.integration_training import base_config, deploy, train
from dev.integration_training.base_config import Config, DatasetSpec, from_dict, load
from dev.integration_training.rollouts import checkpoints
from dev.integration_training.rollouts.backends import LocalBackend, check_rates
from dev.integration_training.rollouts.datasets import KINDS, Rows, Synthetic, build_mixture, build_task
from dev.integration_training.rollouts.models import make_tiny, open_policy
from dev.integration_training.rollouts.training import build_judged, policy_gradient, schedule
from dev.integration_training.rollouts.types import DataBuffer, pack
from nanochat.compute import compute_init
from nanochat.engine import Request
from nanochat.rl.rollout import make_batches, sample_groups
from nanochat.rl.update import Objective, set_advantages
from nanochat.run_logger import read_log
from tasks.common import message_text
from tests.checkpoints import save_small
from tests.fakes.hub import FakeHub
from tests.fakes.sshd import MISSING as NO_SSHD, Sshd

ROOT = Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "dev" / "integration_training" / "configs").glob("*.py"))
COMPUTE = compute_init("cpu", "float32")
TEXTS = ["Sort 5 2 8 1", "1 2 5 8", "What is 3 + 4?", "Think: 3 + 4 = 7\nAnswer: A", "0 1 2 3 4 5 6 7 8 9 #### 12 13 14"] * 20


def config_of(name):
    return runpy.run_path(str(next(path for path in CONFIGS if path.stem == name)))["config"]


def spec(name="synthetic", **changes):
    fields = {"name": name, "split": "train", "subset": None, "max_samples": None, "filepath": None, "size": None, "repeat": 1}
    if name == "synthetic":
        fields |= {"subset": "sorting", "size": 60}
    return DatasetSpec(**{**fields, **changes})


def small(tmp_path, name="run", model="tiny-gpt", **changes):
    """The CPU twin, cut to a few steps of naming one of two letters, which half of the first answers get right, so that RL has something to compare.
    `sft__num_iterations=3` and the like change one value."""
    coin = Path(tmp_path) / "coin.jsonl"
    coin.parent.mkdir(parents=True, exist_ok=True)
    coin.write_text("".join(json.dumps({"question": f"Case {i}", "answer": "xy"[i * i % 7 % 2]}) + "\n" for i in range(40)))
    coins = (spec("custom_json", filepath=str(coin)),)
    config = config_of("01_debug_sft_rl_cpu")
    few = {"sft__num_iterations": 12, "sft__target_examples_per_step": 16, "sft__batch_size": 2, "sft__eval_every": 6, "sft__eval_steps": 6, "sft__checkpoint_every": 8,
           "sft__log_every": 1, "sft__embedding_lr": 0.007, "sft__unembedding_lr": 0.007, "sft__matrix_lr": 0.007, "sft__lr_decay_style": "constant", "sft__adam_eps": 1e-5,
           "rl__adam_eps": 1e-5, "rl__num_iterations": 3, "rl__examples_per_step": 4, "rl__num_samples": 6, "rl__batch_size": 5, "rl__max_new_tokens": 6, "rl__eval_every": 3,
           "rl__eval_examples": 6, "rl__save_every": 2, "rl__log_every": 1, "data__max_length": 64, "output__save_dir": str(tmp_path), "output__experiment_name": name,
           "output__log_level": "debug", "model__name": model,
           "data__sft_mixture": coins, "data__rl_mixture": coins, "data__sft_eval_mixture": coins, "data__rl_eval_mixture": coins}
    parts = {}
    for key, value in {**few, **changes}.items():
        part, field = key.split("__")
        parts.setdefault(part, {})[field] = value
    return replace(config, **{part: replace(getattr(config, part), **values) for part, values in parts.items()})


def run(config, monkeypatch):
    """In this process -> the folder of its results."""
    folder = deploy.results_folder(config)
    deploy.prepare_results(folder, config)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
    train.main(config)
    return folder


def policy_at(folder, model, max_length=160, seed=1):
    make_tiny(model, TEXTS, max_length, seed, folder)
    policy = open_policy(str(folder), torch.float32, COMPUTE, max_length)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in policy.parameters():  # no zero matrix left: every part matters
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    return policy


@pytest.fixture(scope="module", params=["tiny-gpt", "tiny-qwen2"])
def policy(request, tmp_path_factory):
    return policy_at(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return policy_at(tmp_path_factory.mktemp("qwen"), "tiny-qwen2")


# ---------------------------------------------------------------------------------------------------------------------
# The schema

def test_no_value_of_the_schema_has_a_default():
    kinds = [kind for kind in vars(base_config).values() if dataclasses.is_dataclass(kind) and isinstance(kind, type)]
    assert len(kinds) == 8
    for kind in kinds:
        assert kind.__dataclass_params__.frozen
        for field in dataclasses.fields(kind):
            assert field.default is MISSING and field.default_factory is MISSING, f"{kind.__name__}.{field.name}"
    with pytest.raises(TypeError, match="compile"):
        base_config.ModelConfig(name="x", dtype="float32")


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_configuration_survives_json(path, tmp_path):
    config = runpy.run_path(str(path))["config"]
    config.save(tmp_path / "config.json")
    assert load(tmp_path / "config.json") == config
    assert config.output.experiment_name == path.stem


def test_what_a_json_file_lacks_invents_or_mistypes_is_named(tmp_path):
    good = dataclasses.asdict(config_of("02_debug_sft"))
    for change, problem in ((lambda c: c["sft"].pop("clip_grad"), r"config.sft lacks \['clip_grad'\]"), (lambda c: c["data"].update(seed=1), r"unknown \['seed'\]"),
                            (lambda c: c["sft"].update(batch_size=2.5), "config.sft.batch_size is 2.5"), (lambda c: c["model"].update(compile=1), "config.model.compile is 1"),
                            (lambda c: c["data"].update(sft_mixture=3), "config.data.sft_mixture is 3"), (lambda c: c.update(target=None), "config.target is NoneType")):
        values = json.loads(json.dumps(good))
        change(values)
        with pytest.raises(ValueError, match=problem):
            from_dict(Config, values, "config")
    (tmp_path / "torn.json").write_text('{"target": ')
    with pytest.raises(ValueError, match="cannot be read as a configuration"):
        load(tmp_path / "torn.json")


@settings(max_examples=60, deadline=None)
@given(st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5), lambda inner: st.lists(inner, max_size=3)
                    | st.dictionaries(st.sampled_from(["target", "model", "data", "sft", "rl", "output", "gpu_ranks", "device_type", "x"]), inner, max_size=6), max_leaves=12))
def test_no_json_but_a_configuration_is_one(value):
    with pytest.raises(ValueError):
        from_dict(Config, value, "config")


@pytest.mark.parametrize("change, problem", [
    ({"sft__matrix_lr": 0.02}, "no learning rate for AdamW"), ({"rl__unembedding_lr": 0.02}, "no learning rate for AdamW"), ({"sft__matrix_lr": 0.0}, "no learning rate"),
    ({"rl__num_samples": 1}, "a group of one"), ({"rl__temperature": 0.0}, "one answer many times"), ({"output__mode": "both"}, "not one of the 3 modes"),
    ({"data__rl_mixture": ()}, "rl_mixture has 0 data sets"), ({"rl__max_new_tokens": 64}, "no room for a prompt"), ({"target__gpu_ranks": ()}, "at least 1 GPU"),
    ({"output__use_wandb": True}, "name the project"), ({"output__experiment_name": "../up"}, "folder's name"), ({"sft__num_epochs": 0, "sft__num_iterations": -1}, "0 steps")])
def test_a_value_that_cannot_be_is_refused_before_anything_runs(change, problem, tmp_path):
    with pytest.raises(ValueError, match=problem):
        small(tmp_path, **change)


def test_muon_may_have_the_rate_that_adamw_may_not(tmp_path):
    assert small(tmp_path, sft__optimizer="muon", sft__matrix_lr=0.02).sft.matrix_lr == 0.02


def test_the_most_that_adamw_may_have_shrinks_with_the_width(qwen, tmp_path):
    sft = small(tmp_path).sft
    check_rates(qwen, "sft", replace(sft, embedding_lr=0.005, matrix_lr=0.005, unembedding_lr=0.005))
    for knob in ("embedding_lr", "matrix_lr", "unembedding_lr"):
        with pytest.raises(ValueError, match=f"sft.{knob}=0.009 is too high for AdamW at width 64"):
            check_rates(qwen, "sft", replace(sft, **{knob: 0.009}))
    qwen.width, before = 896, qwen.width                # Qwen2.5-0.5B's: 2e-3 is refused, 1e-5 is fine
    with pytest.raises(ValueError, match="too high for AdamW at width 896"):
        check_rates(qwen, "sft", replace(sft, embedding_lr=1e-5, matrix_lr=2e-3, unembedding_lr=1e-5))
    check_rates(qwen, "sft", replace(sft, embedding_lr=1e-5, matrix_lr=1e-5, unembedding_lr=1e-5))
    qwen.width = before


@pytest.mark.parametrize("style, last", [("linear", 0.1), ("cosine", 0.1), ("constant", 1.0)])
def test_rates_rise_first_and_then_follow_their_style(style, last, tmp_path):
    sft = replace(small(tmp_path).sft, warmup_ratio=0.2, lr_decay_style=style, init_lr_frac=0.5)
    factors = [schedule(sft, step, 20) for step in range(20)]
    assert factors[0] < factors[1] < factors[2] and max(factors) <= 0.5 and factors[-1] <= 0.5 * last


# ---------------------------------------------------------------------------------------------------------------------
# Data

ARC_ROW = {"id": "1", "question": "Which is hot?", "choices": {"text": ["ice", "fire", "snow"], "label": ["1", "2", "3"]}, "answerKey": "2"}
SHAPES = {
    "messages": ({"messages": [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]}, "Hello", None),
    "conversations": ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]}, "Hello", None),
    "prompt/completion": ({"prompt": "Hi", "completion": "Hello"}, "Hello", None),
    "instruction/output": ({"instruction": "Add", "input": "1 and 2", "output": "3"}, "3", None),
    "question/answer": ({"question": "Capital of France?", "answer": "Paris"}, "Paris", "text"),
    "GSM8K": ({"question": "2 and 2?", "answer": "2+2=<<2+2=4>>4\n#### 4"}, "#### 4", "number"),
    "ARC": (ARC_ROW, "Answer: B", "letter"),
    "MMLU": ({"question": "Which is hot?", "subject": "x", "choices": ["ice", "fire", "snow", "rain"], "answer": 1}, "Answer: B", "letter"),
    "AQuA": ({"question": "1+1?", "options": ["A)1", "B)2", "C)3", "D)4", "E)5"], "rationale": "1+1=2", "correct": "B"}, "Answer: B", "letter"),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_of_a_row_becomes_a_conversation_whose_own_answer_is_right(shape):
    row, ending, judged = SHAPES[shape]
    task = Rows([row, {"nothing": "known"}], shape)
    answer = message_text(task[0]["messages"][-1])
    assert len(task) == 1 and answer.endswith(ending) and task[0]["judged"] == judged
    if judged:
        assert task.rewards(task[0], answer) == {"correct": 1.0} and task.find_answer(task[0], answer) is not None
        assert not task.is_correct(task[0], "") and not task.is_correct(task[0], f"{answer} no")
    else:
        assert build_mixture_of(task).unjudged() == [shape]


def build_mixture_of(task):
    from dev.integration_training.rollouts.datasets import Mixture
    return Mixture([task], 1)


def test_rows_without_a_known_shape_are_an_error_that_names_their_columns():
    with pytest.raises(ValueError, match="none of the 2 rows of mine can be used.*columns a, b"):
        Rows([{"a": 1, "b": 2}] * 2, "mine")


@settings(max_examples=60, deadline=None)
@given(st.dictionaries(st.sampled_from(["messages", "conversations", "prompt", "completion", "question", "answer", "choices", "answerKey", "options", "correct", "instruction", "output"]),
                       st.none() | st.integers(-1, 5) | st.text(max_size=8) | st.lists(st.none() | st.text(max_size=4) | st.integers(0, 4), max_size=4)
                       | st.fixed_dictionaries({"text": st.lists(st.text(max_size=3), max_size=4), "label": st.lists(st.text(max_size=1), max_size=4)}), max_size=5))
def test_a_strange_row_is_left_out_or_used_but_never_a_crash(row):
    task = Rows([ARC_ROW, row], "fuzz")
    for conversation in task:
        assert conversation["messages"][-1]["role"] == "assistant"


@pytest.mark.parametrize("kind", KINDS)
def test_made_problems_are_the_same_for_a_seed_and_never_held_out_and_trained_on(kind):
    splits = {split: Synthetic(kind, split, 150, 7) for split in ("train", "validation", "test")}
    texts = {split: {message_text(conversation["messages"][0]) for conversation in task} for split, task in splits.items()}
    assert not texts["train"] & texts["validation"] and not texts["train"] & texts["test"] and not texts["validation"] & texts["test"]
    assert [c for c in Synthetic(kind, "train", 150, 7)] == [c for c in splits["train"]] != [c for c in Synthetic(kind, "train", 150, 8)]
    assert all(task.is_correct(c, message_text(c["messages"][-1])) for task in splits.values() for c in task)


def test_every_field_of_a_data_set_works_from_local_files(tmp_path):
    rows = [{"question": f"Question {i}?", "answer": f"text\n#### {i}"} for i in range(5)]
    (tmp_path / "main").mkdir()
    (tmp_path / "main" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "arc_easy_test.jsonl").write_text(json.dumps(ARC_ROW) + "\n")
    (tmp_path / "list.json").write_text(json.dumps(rows[:2]))
    folder = str(tmp_path)
    assert len(build_task(spec("openai/gsm8k", subset="main", filepath=folder), 1)) == 5                             # filepath, subset, split
    assert build_task(spec("allenai/ai2_arc", subset="ARC-Easy", split="test", filepath=folder), 1)[0]["answer_letter"] == "B"
    assert len(build_task(spec("openai/gsm8k", subset="main", filepath=folder, max_samples=3), 1)) == 3             # max_samples
    assert len(build_mixture([spec("openai/gsm8k", subset="main", filepath=folder, repeat=4)], 1)) == 20            # repeat
    assert len(build_task(spec("custom_json", filepath=str(tmp_path / "list.json")), 1)) == 2
    assert len(build_task(spec(size=9), 1)) == 9 and len(build_task(spec(size=9, max_samples=4), 1)) == 4           # size
    algebra = build_task(spec("ALGEBRA", subset="1,2", size=30, split="validation"), 1)                              # a task of ours, levels as its subset
    assert len(algebra) == 30 and {conversation["level"] for conversation in algebra} == {1, 2}
    assert len(build_task(spec("ARC-Easy", split="test", filepath=folder), 1)) == 1
    mixture = build_mixture([spec("openai/gsm8k", subset="main", filepath=folder), spec(size=7), spec(size=7, repeat=2)], 1)
    assert len(mixture) == 5 + 7 + 14 and not mixture.unjudged()
    assert all(mixture.is_correct(conversation, message_text(conversation["messages"][-1])) for conversation in mixture)


def test_a_field_that_a_data_set_has_no_use_for_is_refused(tmp_path):
    for wrong, problem in ((spec("openai/gsm8k", size=5), "no use for size=5"), (spec("ALGEBRA", filepath="x"), "no use for filepath"), (spec(filepath="x"), "no use for filepath"),
                           (spec("custom_json", filepath=str(tmp_path), subset="x"), "no use for subset"), (spec(subset="magic"), "no subset 'magic'"),
                           (spec("custom_json", filepath=str(tmp_path / "no.jsonl")), "neither a file nor a folder"), (spec("openai/gsm8k", filepath=str(tmp_path)), "none of the 3 files")):
        with pytest.raises(ValueError, match=problem):
            build_task(wrong, 1)
    for fields in ({"repeat": 0}, {"max_samples": 0}, {"size": None}):
        with pytest.raises(ValueError, match=next(iter(fields))):
            spec(**fields)


def test_the_hubs_data_sets_are_read_through_the_real_client(tmp_path):
    published = {"allenai/ai2_arc": ("ARC-Challenge", ARC_ROW), "openai/gsm8k": ("main", SHAPES["GSM8K"][0]), "HuggingFaceTB/smol-smoltalk": ("default", SHAPES["messages"][0]),
                 "deepmind/aqua_rat": ("raw", SHAPES["AQuA"][0]), "me/alpaca": ("default", SHAPES["instruction/output"][0])}
    for name, (subset, row) in published.items():
        (tmp_path / name / subset).mkdir(parents=True)
        (tmp_path / name / subset / "train.jsonl").write_text((json.dumps(row) + "\n") * 3)
        (tmp_path / name / "README.md").write_text(f"---\nconfigs:\n- config_name: {subset}\n  data_files:\n  - split: train\n    path: {subset}/train.jsonl\n---\n")
    program = ("import json, sys\nfrom dev.integration_training.base_config import DatasetSpec\nfrom dev.integration_training.rollouts.datasets import build_mixture\n"
               "for fields in json.load(sys.stdin):\n    task = build_mixture([DatasetSpec(**fields)], 1)\n    print(json.dumps([len(task), task[0]['messages'][-1]['role'], task.unjudged()]))\n")
    wanted = [dataclasses.asdict(spec(name, subset=None if subset == "default" else subset, max_samples=2, repeat=2)) for name, (subset, _) in published.items()]
    with FakeHub({f"datasets/{name}": tmp_path / name for name in published}) as hub:
        done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, input=json.dumps(wanted), capture_output=True, text=True, timeout=500,
                              env={**os.environ, **hub.env(tmp_path / "home"), "NANOCHAT_BASE_DIR": str(tmp_path / "base")})
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert found == [[4, "assistant", []], [4, "assistant", []], [4, "assistant", ["HuggingFaceTB/smol-smoltalk"]], [4, "assistant", []], [4, "assistant", ["me/alpaca"]]]


def test_a_buffer_goes_on_where_it_was_and_shuffles_each_epoch_anew():
    task = build_mixture([spec(size=10)], 3)
    whole = DataBuffer(task, 5)
    straight = [place for _ in range(7) for place in whole.take(4)]
    assert straight == list(range(28)) and whole.save_state() == {"epoch_id": 2, "sample_offset": 8}
    orders = [[whole.at(place).conversation["messages"][0]["content"] for place in range(10 * epoch, 10 * epoch + 10)] for epoch in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) and orders[0] != orders[1]
    other = DataBuffer(task, 5)
    other.load_state(json.loads(json.dumps({"epoch_id": 1, "sample_offset": 2})))
    assert [other.at(place) for place in other.take(4)] == [whole.at(place) for place in range(12, 16)]


# ---------------------------------------------------------------------------------------------------------------------
# Loss and packing

def conversations(count=9):
    return [conversation for conversation in build_mixture([spec(size=count, subset="sorting"), spec(size=3, subset="addition")], 2)]


def test_packed_conversations_do_not_see_each_other(policy):
    rendered = [policy.tokenizer.render_conversation(conversation, 160) for conversation in conversations()]
    batches = pack(rendered, 2, 160, policy.tokenizer.bos_id, COMPUTE.device)
    assert sum(int(row.max()) for batch in batches for row in batch.documents) == len(rendered) and sum(len(batch.inputs) for batch in batches) < len(rendered)
    alone = {tuple(ids[:-1]): policy.logits(torch.tensor([ids[:-1]]))[0] for ids, _ in rendered}
    seen = 0
    with torch.no_grad():
        for batch in batches:
            together = policy.logits(batch.inputs, batch.documents, batch.positions)
            for row, documents in enumerate(batch.documents):
                for document in range(1, int(documents.max()) + 1):
                    places = documents == document
                    torch.testing.assert_close(together[row, places], alone[tuple(batch.inputs[row, places].tolist())], atol=1e-5, rtol=0)
                    seen += 1
    assert seen == len(rendered)


def test_without_their_numbers_packed_conversations_would_see_each_other(policy):
    rendered = [policy.tokenizer.render_conversation(conversation, 160) for conversation in conversations()]
    batch = pack(rendered, 8, 160, policy.tokenizer.bos_id, COMPUTE.device)[0]
    with torch.no_grad():
        difference = (policy.logits(batch.inputs, batch.documents, batch.positions) - policy.logits(batch.inputs)).abs().amax(dim=-1)
    assert float(difference[batch.documents > 1].min()) > 1e-4 > float(difference[batch.documents == 1].max())


def test_labels_are_shifted_by_one_as_in_hugging_faces_own_loss(qwen):
    rendered = [qwen.tokenizer.render_conversation(conversation, 64) for conversation in conversations()]
    for ids, mask in rendered:
        labels = torch.tensor([[token if trained else -100 for token, trained in zip(ids, mask)]])
        theirs = qwen.model(input_ids=torch.tensor([ids]), labels=labels).loss
        batch = pack([(ids, mask)], 1, 64, qwen.tokenizer.bos_id, COMPUTE.device)[0]
        ours = -qwen(batch.inputs, batch.targets, batch.documents, batch.positions).sum() / (batch.targets != -1).sum()
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_our_own_model_has_the_loss_it_has_everywhere_else(tmp_path):
    policy = policy_at(tmp_path, "tiny-gpt")
    (ids, mask), = [policy.tokenizer.render_conversation(conversations(1)[0], 64)]
    batch = pack([(ids, mask)], 1, 64, policy.tokenizer.bos_id, COMPUTE.device)[0]
    torch.testing.assert_close(-policy(batch.inputs, batch.targets, batch.documents, batch.positions).sum(), policy.model(batch.inputs, batch.targets, loss_reduction="sum"))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(2, 33), min_size=1, max_size=30), st.integers(1, 4))
def test_packing_loses_and_invents_nothing(lengths, batch_size):
    items = [([100 * place + i for i in range(length)], [i % 3 > 0 for i in range(length)]) for place, length in enumerate(lengths)]
    batches = pack(items, batch_size, 32, 0, COMPUTE.device)
    found = []
    for batch in batches:
        assert len(batch.inputs) <= batch_size and batch.inputs.size(1) <= 32
        for row in range(len(batch.inputs)):
            for document in range(1, int(batch.documents[row].max()) + 1):
                places = batch.documents[row] == document
                ids, targets = batch.inputs[row, places].tolist(), batch.targets[row, places].tolist()
                assert batch.positions[row, places].tolist() == list(range(len(ids)))
                found.append((ids, targets))
            assert (batch.targets[row][batch.documents[row] == 0] == -1).all()
    wanted = [(ids[:-1], [token if trained else -1 for token, trained in zip(ids[1:], mask[1:])]) for ids, mask in items]
    assert sorted(found) == sorted(wanted)


TWO_TURNS = {"messages": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Sort 2 1"}, {"role": "assistant", "content": "1 2"},
                          {"role": "user", "content": "Sort 3 1"}, {"role": "assistant", "content": [{"type": "text", "text": "1 "}, {"type": "python", "text": "1+2"},
                                                                                                     {"type": "python_output", "text": "3"}, {"type": "text", "text": "3"}]}]}


def test_a_chat_templates_answers_are_trained_and_nothing_else(qwen):
    for conversation, answers in [(conversation, [message_text(conversation["messages"][-1])]) for conversation in conversations(3)] + [(TWO_TURNS, ["1 2", "1 3"])]:
        ids, mask = qwen.tokenizer.render_conversation(conversation, 200)
        whole = qwen.hf_tokenizer.apply_chat_template([{**message, "content": text} for message, text in zip(conversation["messages"], plain_texts(conversation))], tokenize=False)
        assert ids == qwen.tokenizer.encode(whole)       # piece by piece or at once, it is the same
        trained = [token for token, is_trained in zip(ids, mask) if is_trained]
        assert qwen.hf_tokenizer.decode(trained) == "".join(f"{answer}<|im_end|>" for answer in answers)
        prompt = qwen.tokenizer.render_for_completion(conversation)
        assert ids[:len(prompt)] == prompt and qwen.hf_tokenizer.decode(prompt).endswith("<|im_start|>assistant\n")
    assert qwen.tokenizer.truncated == 0
    ids, mask = qwen.tokenizer.render_conversation(TWO_TURNS, 8)
    assert len(ids) == len(mask) == 8 and qwen.tokenizer.truncated == 1 == qwen.tokenizer.untrained
    qwen.tokenizer.truncated = qwen.tokenizer.untrained = 0


def plain_texts(conversation):
    return [content if isinstance(content := message["content"], str) else "".join(part["text"] for part in content if part["type"] == "text")
            for message in conversation["messages"]]


def test_a_template_that_rewrites_earlier_turns_trains_the_last_answer_alone(qwen):
    template = qwen.hf_tokenizer.chat_template
    try:                                                 # as templates that drop earlier reasoning do
        qwen.hf_tokenizer.chat_template = template.replace("message.content", "(message.content if loop.last or message.role == 'user' else 'dropped')")
        ids, mask = qwen.tokenizer.render_conversation(TWO_TURNS, 200)
        assert qwen.hf_tokenizer.decode([token for token, is_trained in zip(ids, mask) if is_trained]) == "1 3<|im_end|>"
        assert "dropped" in qwen.hf_tokenizer.decode(ids)
    finally:
        qwen.hf_tokenizer.chat_template = template


# ---------------------------------------------------------------------------------------------------------------------
# Sampling

def test_greedy_answers_are_those_of_hugging_faces_generate(qwen):
    prompts = [qwen.tokenizer.render_for_completion(conversation) for conversation in conversations()]
    ours = qwen.engine(4).generate([Request(prompt, max_new_tokens=10, temperature=0) for prompt in prompts])
    for prompt, (completion,) in zip(prompts, ours):
        theirs = qwen.model.generate(torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.int64), max_new_tokens=10, do_sample=False)
        assert completion.tokens == theirs[0, len(prompt):].tolist()


def test_completions_come_in_the_order_of_their_prompts_whichever_ends_first(policy):
    prompts = [policy.tokenizer.render_for_completion(conversation) for conversation in conversations()]
    requests = [Request(prompt, num_samples=3, max_new_tokens=2 + 3 * (place % 4), temperature=1.0, seed=place) for place, prompt in enumerate(prompts)]
    order = []
    together = policy.engine(64).generate(requests, lambda request, sample, completion: order.append(request))
    assert order != sorted(order)                        # they do end in another order
    for request, group in zip(requests, together):
        assert all(len(completion.tokens) <= request.max_new_tokens for completion in group)
        alone, = policy.engine(64).generate([request])
        assert [completion.tokens for completion in group] == [completion.tokens for completion in alone]


@pytest.mark.parametrize("temperature, top_k", [(1.0, None), (0.7, None), (1.3, 5)])
def test_what_is_trained_is_the_distribution_that_was_sampled(policy, temperature, top_k):
    task = build_mixture([spec(size=6)], 1)
    groups = sample_groups(policy.engine(16), policy.tokenizer, [task[place] for place in range(3)], task.rewards, 4, 8, temperature, [1, 2, 3], top_k)
    for batch in make_batches([rollout for group in groups for rollout in group], 5, policy.tokenizer.bos_id, COMPUTE.device, context=64):
        with torch.no_grad():
            logprobs = policy(batch.inputs, batch.targets, None, None, temperature, top_k)
        torch.testing.assert_close(logprobs, batch.sampler_logprobs, atol=1e-4, rtol=1e-4)


def test_a_rollout_is_compared_with_its_own_group_and_a_group_of_equals_teaches_nothing(policy, tmp_path):
    config = small(tmp_path)
    task = build_mixture([spec(size=6)], 1)
    groups = sample_groups(policy.engine(16), policy.tokenizer, [task[place] for place in range(2)], lambda c, text: {"correct": 0.0}, 4, 8, 1.0, [1, 2])
    objective, backend = Objective(1.0, max_new_tokens=8), LocalBackend(policy, COMPUTE, config.rl, False)
    for reward in (0.0, 1.0):
        for rollout in sum(groups, []):
            rollout.rewards = {"correct": reward}
        assert set_advantages(groups, objective) == [] and policy_gradient(backend, [], objective, config, COMPUTE) == (0.0, 0, 0.0)
    groups[1][2].rewards, groups[0][0].rewards = {"correct": 0.0}, {"correct": 0.0}
    assert [round(rollout.advantage, 6) for rollout in set_advantages(groups, objective)] == [-0.75, 0.25, 0.25, 0.25, 0.25, 0.25, -0.75, 0.25]


# ---------------------------------------------------------------------------------------------------------------------
# Runs

def checkpoints_of(folder):
    return sorted(folder.glob("checkpoints/*/step_*"))


def weights_below(folder):
    """{stage/step: {name: tensor}} of all checkpoints."""
    found = {}
    for path in checkpoints_of(folder):
        policy = open_policy(str(path), torch.float32, COMPUTE, 64)
        found[f"{path.parent.name}/{path.name}"] = {name: weight.detach() for name, weight in policy.named_parameters()}
    return found


def assert_same(one, other, **tolerance):
    assert one.keys() == other.keys()
    for step in one:
        for name, weight in one[step].items():
            torch.testing.assert_close(weight, other[step][name], msg=lambda text: f"{step} {name}: {text}", **tolerance)


@pytest.mark.parametrize("model", ["tiny-gpt", "tiny-qwen2"])
def test_a_run_that_is_killed_and_started_again_ends_as_if_it_had_never_stopped(model, tmp_path, monkeypatch):
    straight = run(small(tmp_path, "straight", model), monkeypatch)
    saved = weights_below(straight)
    assert list(saved) == ["rl/step_000002", "rl/step_000003", "sft/step_000008", "sft/step_000012"]  # the last is always there
    # RL goes on from what SFT ended with
    config = load(straight / "config.json")
    assert train.parent_of("rl", config, "start") == str(straight / "checkpoints" / "sft" / "step_000012")
    # JSONL in any case
    lines = read_log(straight / "runs" / "rl_straight.jsonl")
    assert [line["step"] for line in lines if "rl/acc" in line] == [0, 1, 2] and all("eval/ci_low" in line for line in lines if "eval/accuracy" in line)
    assert sum("train/loss" in line for line in lines) >= 2  # there was something to learn
    assert [line["step"] for line in lines if "rollouts" in line.get("text", {})] == [0, 1, 2]  # log_level debug
    assert set(json.loads((straight / "summary.json").read_text())) == {"sft", "rl"}
    # torn newest checkpoints, as after a kill in the middle of a stage: the run goes on from the ones before
    killed = deploy.results_folder(small(tmp_path, "killed", model))
    subprocess.run(["cp", "-r", straight, killed], check=True)
    config = replace(config, output=replace(config.output, experiment_name="killed"))
    config.save(killed / "config.json")
    (killed / "checkpoints" / "rl" / "step_000003" / "optimizer.pt").write_bytes(b"torn")
    (killed / "runs" / "rl_straight.jsonl").rename(killed / "runs" / "rl_killed.jsonl")
    run(config, monkeypatch)
    assert_same(saved, weights_below(killed), atol=0, rtol=0)
    again = read_log(killed / "runs" / "rl_killed.jsonl")
    assert [line["step"] for line in again if "rl/acc" in line] == [0, 1, 2]
    same = [{key: value for key, value in line.items() if not key.startswith("time") and "tok_per" not in key} for line in lines if "rl/acc" in line]
    assert same == [{key: value for key, value in line.items() if not key.startswith("time") and "tok_per" not in key} for line in again if "rl/acc" in line]


@pytest.mark.slow
def test_a_process_killed_in_the_middle_resumes_to_the_same_bits(tmp_path, monkeypatch):
    many = {"sft__num_iterations": 40, "sft__checkpoint_every": 5, "sft__eval_every": -1, "output__mode": "sft"}
    straight = run(small(tmp_path, "straight", **many), monkeypatch)
    config = small(tmp_path, "killed", **many)
    folder = deploy.results_folder(config)
    deploy.prepare_results(folder, config)
    child = subprocess.Popen(deploy.command(config, folder), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    until = time.monotonic() + 300
    while not (folder / "checkpoints" / "sft" / "step_000010").is_dir() and child.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    output = child.communicate()[0].decode()
    assert (folder / "checkpoints" / "sft" / "step_000010").is_dir(), output
    run(config, monkeypatch)
    assert_same(weights_below(straight), weights_below(folder), atol=0, rtol=0)


def torchrun(config):
    folder = deploy.results_folder(config)
    deploy.prepare_results(folder, config)
    done = subprocess.run(deploy.command(config, folder), cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return folder


@pytest.mark.parametrize("model, optimizer", [("tiny-gpt", "adamw"), pytest.param("tiny-qwen2", "adamw", marks=pytest.mark.slow), pytest.param("tiny-gpt", "muon", marks=pytest.mark.slow)])
def test_two_ranks_that_share_the_model_end_where_one_does(model, optimizer, tmp_path, monkeypatch):
    changes = {"rl__num_iterations": 2, "sft__optimizer": optimizer, "rl__optimizer": optimizer, "sft__target_examples_per_step": 7, "sft__eval_every": -1}
    if optimizer == "muon":                             # few steps: see below
        changes |= {"output__mode": "sft", "sft__num_iterations": 3, "sft__checkpoint_every": -1}
    one = run(small(tmp_path, "one", model, **changes), monkeypatch)
    two = torchrun(small(tmp_path, "two", model, target__gpu_ranks=(0, 1), **changes))
    meta = json.loads((checkpoints_of(two)[-1] / "meta.json").read_text())
    assert meta["world_size"] == 2 and meta["finished"]
    ends = [weights_below(one), weights_below(two)]
    if optimizer == "muon":
        # A gradient of few tokens has few directions; in all others Newton-Schulz makes bfloat16's rounding as large as the signal. What matters to the loss agrees
        ends = [{step: {name: weight for name, weight in weights.items() if ".h." not in name} for step, weights in end.items()} for end in ends]
    assert_same(*ends, atol=2e-4, rtol=0)
    for stage in json.loads((one / "summary.json").read_text()):
        losses = [[line["train/loss"] for line in read_log(folder / "runs" / f"{stage}_{folder.name}.jsonl") if "train/loss" in line] for folder in (one, two)]
        assert losses[0] == pytest.approx(losses[1], abs=1e-4 if optimizer == "adamw" else 1e-3) and len(losses[0]) >= 1


def test_unjudged_answers_stop_a_run_before_sft_is_paid_for(tmp_path, monkeypatch):
    (tmp_path / "chat.jsonl").write_text(json.dumps(SHAPES["prompt/completion"][0]) + "\n")
    config = small(tmp_path, data__rl_mixture=(spec("custom_json", filepath=str(tmp_path / "chat.jsonl")),))
    with pytest.raises(ValueError, match="rl_mixture holds chat.jsonl, whose answers cannot be checked"):
        run(config, monkeypatch)
    assert not (deploy.results_folder(config) / "checkpoints").exists()
    with pytest.raises(ValueError, match="cannot be checked"):
        build_judged(config.data.rl_mixture, 1, "rl_mixture")


def test_the_four_steps_of_02_run(tmp_path, monkeypatch):
    config = config_of("02_debug_sft")
    folder = run(replace(config, output=replace(config.output, save_dir=str(tmp_path))), monkeypatch)
    assert sorted(path.name for path in (folder / "checkpoints" / "sft").iterdir()) == ["step_000002", "step_000004"]
    from transformers import AutoModelForCausalLM
    assert AutoModelForCausalLM.from_pretrained(folder / "checkpoints" / "sft" / "step_000004").num_parameters() > 0


def test_a_checkpoint_of_the_stages_can_be_the_start(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    model, _ = save_small("sft", "tiny")
    name = str(tmp_path / "base" / "chatsft_checkpoints" / "tiny")
    policy = open_policy(name, torch.float32, COMPUTE, 64)
    assert all(torch.equal(one, other) for one, other in zip(policy.parameters(), model.parameters()))
    with pytest.raises(ValueError, match="max_length=65 is more than the 64 tokens"):
        open_policy(name, torch.float32, COMPUTE, 65)


def test_a_torn_checkpoint_is_reported_and_passed_over(tmp_path, monkeypatch, capsys):
    folder = run(small(tmp_path, output__mode="sft", sft__num_iterations=3, sft__checkpoint_every=2, sft__eval_every=-1), monkeypatch)
    (folder / "checkpoints" / "sft" / "step_000003" / "model.pt").write_bytes(b"")
    (folder / "checkpoints" / "sft" / ".step_000009.partial").mkdir()
    found, meta = checkpoints.newest("sft")
    assert meta["step"] == 2 and found.name == "step_000002" and "model.pt is missing or changed" in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------------------------
# deploy.py

def test_the_path_of_a_configuration_may_begin_here_or_in_its_folder(tmp_path, monkeypatch):
    expected = ROOT / "dev" / "integration_training" / "configs" / "02_debug_sft.py"
    monkeypatch.chdir(tmp_path)
    assert deploy.find("configs/02_debug_sft.py") == deploy.find("02_debug_sft.py") == deploy.find(str(expected)) == expected
    with pytest.raises(ValueError, match="is no file.*02_debug_sft.py"):
        deploy.find("configs/none.py")
    assert deploy.named(["configs/x.py", "--ssh=a@b"]) == ["--experiment=configs/x.py", "--ssh=a@b"] == deploy.named(["--ssh=a@b", "configs/x.py"])[:0] + ["--experiment=configs/x.py", "--ssh=a@b"]
    (tmp_path / "wrong.py").write_text("config = 3\n")
    with pytest.raises(ValueError, match="defines config as int"):
        deploy.read_config(deploy.find("wrong.py"))


def test_the_gpus_of_the_configuration_become_cuda_visible_devices(tmp_path):
    config = small(tmp_path)
    config = replace(config, target=base_config.TargetConfig(gpu_ranks=(2, 5), device_type="cuda"))
    command = deploy.command(config, deploy.results_folder(config))
    assert "--nproc-per-node=2" in command
    shown = subprocess.run([*command[:command.index(sys.executable)], sys.executable, "-c", "import os; print(os.environ['CUDA_VISIBLE_DEVICES'])"], capture_output=True, text=True)
    assert shown.stdout == "2,5\n"
    assert not any(part.startswith("WANDB") for part in command)
    watched = replace(config, output=replace(config.output, use_wandb=True, wandb_project="mine"))
    assert "WANDB_PROJECT=mine" in deploy.command(watched, deploy.results_folder(config))  # run_logger starts W&B, and reads this
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="nvidia-smi shows 0 GPUs here.*01_debug_sft_rl_cpu"):
            deploy.check_devices(config)


def test_a_folder_with_another_experiments_results_is_refused(tmp_path):
    config = small(tmp_path)
    folder = deploy.results_folder(config)
    deploy.prepare_results(folder, config)
    deploy.prepare_results(folder, small(tmp_path, output__log_level="warning", target__gpu_ranks=(0, 1)))  # only how and where it is watched
    assert load(folder / "config.json") == config
    with pytest.raises(ValueError, match="results of another configuration"):
        deploy.prepare_results(folder, small(tmp_path, sft__matrix_lr=0.001))


@pytest.mark.skipif(bool(NO_SSHD), reason=f"not installed: {', '.join(NO_SSHD)} (apt-get install openssh-server tmux)")
@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout, so there is no list of the files to send")
def test_over_ssh_the_tree_goes_over_the_run_happens_there_and_its_results_come_back(tmp_path):
    config = small(tmp_path / "here", "far.away", output__mode="sft", sft__num_iterations=2, sft__eval_every=-1, output__log_level="info")
    config.save(tmp_path / "experiment.json")
    (tmp_path / "env").write_text("WANDB_API_KEY=a-secret\n")
    with Sshd(tmp_path / "machine") as machine:
        command = [sys.executable, ROOT / "dev" / "integration_training" / "deploy.py", tmp_path / "experiment.json", f"--ssh={machine.user}@127.0.0.1:{machine.port}",
                   f"--ssh-key={machine.key}", f"--remote-python={sys.executable}", f"--env-file={tmp_path / 'env'}", "--poll-seconds=0.5", f"--tmux-socket={machine.socket}"]
        folder = deploy.results_folder(config)
        left = subprocess.run([*command, "--detached"], capture_output=True, text=True, timeout=600)
        assert left.returncode == 0 and (folder / "remote.json").is_file(), left.stdout + left.stderr
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)  # the same command follows it and fetches
        assert done.returncode == 0, done.stdout + done.stderr
        tree, = (machine.home / "integration_training").iterdir()
        assert (tree / "nanochat" / "gpt.py").is_file() and (tree / ".env").stat().st_mode & 0o077 == 0
    assert "a-secret" not in left.stdout + left.stderr + done.stdout and "sft step" in done.stdout and not (folder / "remote.json").exists()
    assert sorted(path.name for path in folder.iterdir()) == ["checkpoints", "config.json", "run.json", "runs", "start", "summary.json"]
    assert list(weights_below(folder)) == ["sft/step_000002"]


def test_a_gpu_in_use_over_there_is_left_alone():
    from dev.integration_training.remote import check_gpus
    listing = "0, 12, 0\n1, 40000, 97\n2, [N/A], [N/A]\n"
    check_gpus(listing, (0, 2))
    with pytest.raises(ValueError, match="GPU 1 there is in use"):
        check_gpus(listing, (0, 1))
    with pytest.raises(ValueError, match="has the 3 GPUs"):
        check_gpus(listing, (3,))


@pytest.mark.slow
@pytest.mark.parametrize("model", ["tiny-gpt", "tiny-qwen2"])
def test_compiled_blocks_train_to_the_same_weights(model, tmp_path, monkeypatch):
    changes = {"sft__num_iterations": 3, "sft__checkpoint_every": -1, "rl__num_iterations": 1, "rl__save_every": -1}
    one, other = (run(small(tmp_path, f"run{compiled}", model, model__compile=compiled, **changes), monkeypatch) for compiled in (False, True))
    assert_same(weights_below(one), weights_below(other), atol=2e-4, rtol=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["01_debug_sft_rl_cpu", "01_debug_sft_rl_cpu_qwen2"])
def test_the_cpu_twins_improve_in_both_stages_beyond_noise(name, tmp_path):
    config = config_of(name)
    config = replace(config, output=replace(config.output, save_dir=str(tmp_path)))
    config.save(tmp_path / "experiment.json")
    done = subprocess.run([sys.executable, ROOT / "dev" / "integration_training" / "deploy.py", tmp_path / "experiment.json"], capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    summary = json.loads((deploy.results_folder(config) / "summary.json").read_text())
    for stage in ("sft", "rl"):
        assert summary[stage]["difference"]["ci_low"] > 0 and summary[stage]["difference"]["p"] < 0.01, summary[stage]["verdict"]
