"""look_inside writes numbers and pictures of the real model, and the model answers as it would unwatched."""
import json
import shutil

import pytest
import torch

from nanochat.checkpoint_manager import load_model
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT, GPTConfig
from nanochat.interpretability.plots import write_attention_page, write_treescope
from nanochat.tokenizer import Tokenizer
from scripts import look_inside
from tasks.common import get_task
from tests import pipeline


@pytest.fixture(scope="module")
def checkpoints(prepared, tmp_path_factory):
    """A base directory with an SFT checkpoint, to be copied."""
    folder = tmp_path_factory.mktemp("look") / "base"
    shutil.copytree(prepared, folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        pipeline.run_stage("base", num_iterations=2)
        pipeline.run_stage("sft", source="base", num_iterations=2, eval_every=-1, eval_metrics_every=-1)
    return folder


@pytest.fixture
def trained(checkpoints, tmp_path, monkeypatch):
    shutil.copytree(checkpoints, tmp_path / "base")
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "base"))
    monkeypatch.delenv("AQUA_DATA_DIR", raising=False)
    return tmp_path / "base"


def config(**changes):
    return look_inside.Config(**{"source": "sft", "num_problems": 5, "max_new_tokens": 8, "device_type": "cpu", "treescope": False, **changes})


def test_everything_is_written_and_says_what_was_measured(trained, capsys):
    metrics = look_inside.main(config(forced=True, pictures=(0, 3), layers=(-1,)))
    folder = trained / "interpretability" / "sft_d2_AQUA_forced"
    there = sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))
    assert there == ["heads.png", "lens.png", "look.json", "problem_0000/attention_layer_1.png", "problem_0003/attention_layer_1.png"]
    assert {f"lens/layer_{depth}/{name}" for depth in range(3) for name in ("prob_right", "prob_final", "share_right", "rank_right")} <= set(metrics)
    assert "attn/entropy_layer/1" in metrics and "attn/entropy_layer/0" not in metrics
    assert json.loads((folder / "look.json").read_text(encoding="utf-8"))["metrics"] == metrics
    section = json.loads((trained / "report" / "look_inside_sft.json").read_text(encoding="utf-8"))
    printed = capsys.readouterr().out
    assert "| blocks passed |" in section["markdown"] and "forced to answer at once" in section["markdown"] and "logit lens at 5 decision points" in printed
    assert "The right letter leads" in printed and "a head that looks everywhere alike" in printed

    # the last depth of the lens is the model's own forced answer, read by an evaluation
    from tasks.evaluation import letter_logprobs
    model, tokenizer, _ = load_model("sft", dtype="float32")
    problems = list(get_task("AQUA", split="validation", stop=5))
    read = letter_logprobs(model, tokenizer, [tokenizer.render_for_completion(one) for one in problems], [one["letters"] for one in problems])
    of_right = [torch.tensor(logprobs[one["answer_letter"]]).exp().item() for logprobs, one in zip(read, problems)]
    assert metrics["lens/layer_2/prob_right"] == pytest.approx(sum(of_right) / 5, rel=1e-4)


def test_a_model_that_reaches_no_answer_line_still_shows_its_attention(trained, capsys):
    metrics = look_inside.main(config(max_new_tokens=2))
    assert "5 of 5 problems have no decision point" in (printed := capsys.readouterr().out) and "--forced reads the letter" in printed
    assert not any(name.startswith("lens/") for name in metrics) and metrics["attn/entropy_mean"] > 0
    assert not (trained / "interpretability" / "sft_d2_AQUA" / "lens.png").exists()


def test_the_completions_watched_are_the_engine_s_and_end_in_the_letter(trained):
    model, tokenizer, _ = load_model("sft")
    problems = list(get_task("AQUA", split="validation", stop=3))
    sequences, lengths, points = look_inside.answers(model, tokenizer, problems, config())
    for problem, sequence, length, point in zip(problems, sequences, lengths, points):
        prompt = tokenizer.render_for_completion(problem)
        ((completion,),) = Engine(model, tokenizer).generate([Request(prompt, max_new_tokens=8, temperature=0)])
        assert sequence == prompt + completion.tokens and length == len(prompt) and (point is None or tokenizer.decode(sequence[:point + 1]).endswith("Answer:"))
    sequences, lengths, points = look_inside.answers(model, tokenizer, problems, config(forced=True))
    for problem, sequence, length, point in zip(problems, sequences, lengths, points):
        assert tokenizer.decode(sequence[length:point + 1]) == "Answer:" and tokenizer.decode(sequence[point + 1:]) == f" {problem['answer_letter']}"


def test_what_cannot_be_looked_at_is_named(trained):
    with pytest.raises(ValueError, match=r"pictures \[9\] are not among the 5 problems of AQUA validation: give 0 to 4"):
        look_inside.main(config(pictures=(9,)))
    with pytest.raises(ValueError, match="SpellingBee has no letters to look for"):
        look_inside.main(config(task="SpellingBee", split="test"))


def test_without_treescope_there_are_pictures_and_a_hint(trained, capsys, monkeypatch):
    monkeypatch.setattr(look_inside, "find_spec", lambda name: None)
    look_inside.main(config(forced=True, treescope=True))
    assert "pip install treescope" in capsys.readouterr().out and not list((trained / "interpretability").rglob("*.html"))


def test_treescope_shows_module_tree_and_attention_without_the_network(tmp_path):
    pytest.importorskip("treescope")
    tokenizer = Tokenizer.train(["one two three <four> & five"] * 9, 290)
    model = GPT(GPTConfig(sequence_len=64, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights()
    sequence, weights = tokenizer.encode("one two three <four> & five </script>"), {name: weight.clone() for name, weight in model.named_parameters()}
    before = model(torch.tensor([sequence]))
    write_treescope(model, tmp_path / "model.html")
    write_attention_page(model, tokenizer, sequence, 4, tmp_path / "attention.html", [1])
    tree, attention = ((tmp_path / name).read_text(encoding="utf-8") for name in ("model.html", "attention.html"))
    assert "treescope-container" in tree and "Layer 1, weights up to" in attention and "Layer 0" not in attention
    for page in (tree, attention):
        assert "<script src" not in page and "<link" not in page and len(page) > 10_000
    assert torch.equal(before, model(torch.tensor([sequence]))) and all(torch.equal(weight, weights[name]) for name, weight in model.named_parameters())
