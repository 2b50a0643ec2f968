"""What an RL run logged is read back whole, and an update is explained by exactly the log-probabilities of the two models."""
import json
import re
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console

from nanochat.gpt import GPT, GPTConfig
from nanochat.interpretability.rollout_log import LoggedRollout, has_signal, log_rollouts, read_rollouts
from nanochat.interpretability.update_explained import Change, explain_update, full_colour, summarize_update, token_logprobs, update_page, update_text
from nanochat.rl.rollout import Rollout
from nanochat.run_logger import RunLogger
from nanochat.tokenizer import Tokenizer
from scripts import rl_show
from tasks.aqua import extract_answer
from tests import pipeline

ALONE = SimpleNamespace(is_master=True)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train([f"{a} + {b} = {a + b}\nAnswer: {letter}" for a in range(20) for b in range(5) for letter in "ABCDE"], 380)


def make_model(tokenizer, seed):
    model = GPT(GPTConfig(sequence_len=96, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=2, n_kv_head=2, n_embd=32))
    model.init_weights(seed=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def make_rollout(tokenizer, text, correct, advantage, mask=None):
    prompt = tokenizer.render_prompt([{"role": "user", "content": "2 + 3 = ?"}])
    tokens = tokenizer.encode(text, append="<|assistant_end|>")
    return Rollout(prompt, tokens, mask or [1] * len(tokens), [-1.25] * len(tokens), text, "stop", {"correct": correct, "format": 0.1}, advantage)


def conversation(question, answer="B"):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "Answer: B"}], "letters": list("ABCDE"), "answer_letter": answer}


@pytest.fixture
def logged(tokenizer, tmp_path, monkeypatch):
    """Two groups of two rollouts at steps 0 and 3, of which one question stands at both steps."""
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    config = SimpleNamespace(run="dummy", model_tag="tiny")
    monkeypatch.setattr("nanochat.run_logger.config_dict", lambda config: {"num_samples": 2, "temperature": 0.5, "source": "sft", "model_tag": "tiny", "step": 6})
    logger = RunLogger("rl", config, ALONE, 4)
    for step in (0, 3):
        groups = [[make_rollout(tokenizer, "5\nAnswer: B", 1.0, 0.5), make_rollout(tokenizer, f"{step}\nAnswer: C", 0.0, -0.5)],
                  [make_rollout(tokenizer, "so 5", 0.0, 0.0), make_rollout(tokenizer, "Answer: E", 0.0, 0.0)]]
        log_rollouts(logger, step, groups, [conversation("2 + 3 = ?"), conversation(f"1 + {step} = ?", "D")], extract_answer)
        logger.log(step, {"rl/acc": 0.25 + step / 10, "train/loss": None if step else 1.0})
    logger.close()
    return logger.path


# ---------------------------------------------------------------------------------------------------------------------
# The log

def test_what_is_logged_is_read_back(tokenizer, logged):
    header, steps, metrics = read_rollouts(logged)
    assert header["stage"] == "rl" and list(steps) == [0, 3] and metrics[3]["rl/acc"] == 0.55
    for step, groups in steps.items():
        assert [len(group) for group in groups] == [2, 2]
        first, second = groups[0]
        source = make_rollout(tokenizer, f"{step}\nAnswer: C", 0.0, -0.5)
        assert (second.prompt, second.tokens, second.mask, second.logprobs) == (source.prompt, source.tokens, source.mask, source.logprobs)
        assert (first.completion, first.letter, first.answer, first.question) == ("5\nAnswer: B", "B", "B", "2 + 3 = ?")
        assert (first.rewards, first.reward, first.advantage, first.finish) == ({"correct": 1.0, "format": 0.1}, 1.1, 0.5, "stop")
        assert groups[1][0].letter is None and has_signal(groups[0]) and not has_signal(groups[1])


def test_an_older_log_without_ids_is_read_in_groups_of_num_samples(tmp_path):
    rows = [{"completion": f"c{i}", "letter": "none", "reward/correct": 0.0, "advantage": 0.0, "finish": "length"} for i in range(6)]
    lines = [{"stage": "rl", "model_tag": "d2", "config": {"num_samples": 3}}, {"step": 4, "text": {"rollouts": [{"completion": "old"}]}},
             {"step": 4, "text": {"rollouts": rows}}]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, lines)) + '\n{"step": 5, "text": {"rollou')
    _, steps, _ = read_rollouts(tmp_path / "x.jsonl")
    assert list(steps) == [4] and [[one.completion for one in group] for group in steps[4]] == [["c0", "c1", "c2"], ["c3", "c4", "c5"]]
    assert steps[4][0][0].tokens == [] and steps[4][0][0].question is None


def test_two_equal_questions_in_a_row_stay_two_groups(tokenizer, tmp_path, monkeypatch):
    rows = [{"question": "same", "completion": str(i), "letter": "A", "advantage": 0.0, "finish": "stop"} for i in range(4)]
    (tmp_path / "x.jsonl").write_text("\n".join(map(json.dumps, [{"config": {"num_samples": 2}}, {"step": 0, "text": {"rollouts": rows}}])))
    assert [len(group) for group in read_rollouts(tmp_path / "x.jsonl")[1][0]] == [2, 2]


# ---------------------------------------------------------------------------------------------------------------------
# An update

@pytest.mark.parametrize("temperature", [1.0, 0.5])
@pytest.mark.parametrize("device_batch_size", [1, 3])
def test_the_log_probabilities_are_the_models_own(tokenizer, temperature, device_batch_size):
    model = make_model(tokenizer, 1)
    rollouts = [make_rollout(tokenizer, text, 0.0, 0.0) for text in ("5\nAnswer: B", "Answer: E", "2 + 3 = 5\nAnswer: A", "1")]
    for rollout, found in zip(rollouts, token_logprobs(model, rollouts, temperature, device_batch_size)):
        with torch.no_grad():
            logprobs = torch.log_softmax(model(torch.tensor([rollout.prompt + rollout.tokens]))[0] / temperature, dim=-1)
        wanted = [logprobs[len(rollout.prompt) - 1 + i, token].item() for i, token in enumerate(rollout.tokens)]
        assert found == pytest.approx(wanted, abs=1e-5)


def test_a_token_s_value_is_its_advantage_times_the_change_of_its_log_probability(tokenizer):
    before, after = make_model(tokenizer, 1), make_model(tokenizer, 2)
    rollouts = [make_rollout(tokenizer, "5\nAnswer: B", 1.0, 0.5), make_rollout(tokenizer, "Answer: E", 0.0, -2.0, mask=[1, 0, 1, 1][:len(tokenizer.encode("Answer: E")) + 1])]
    explained = explain_update(before, after, tokenizer, rollouts)
    for rollout, changes, old, new in zip(rollouts, explained, token_logprobs(before, rollouts), token_logprobs(after, rollouts)):
        assert "".join(change.text for change in changes) == rollout.text + "<|assistant_end|>"
        for change, sampled, was, now in zip(changes, rollout.mask, old, new):
            assert (change.before, change.after, change.value) == ((was, now, rollout.advantage * (now - was)) if sampled else (None, None, 0.0))
    total = summarize_update(rollouts, explained)
    values = [change.value for changes in explained for change in changes if change.before is not None]
    assert total["tokens"] == len(values) and total["gain"] == pytest.approx(sum(values) / len(values))
    assert total["aligned"] == sum(value > 0 for value in values) / len(values)


def test_an_update_that_changed_nothing_says_so(tokenizer):
    model, rollouts = make_model(tokenizer, 1), [make_rollout(tokenizer, "Answer: E", 1.0, 1.0), make_rollout(tokenizer, "5", 0.0, 0.0)]
    total = summarize_update(rollouts, explain_update(model, model, tokenizer, rollouts))
    assert total == {"tokens": len(rollouts[0].tokens), "gain": 0.0, "aligned": 0.0, "up": 0.0, "down": None}


def test_a_step_of_reinforce_is_seen_as_aligned(tokenizer):
    """One gradient step on two rollouts makes the good one likelier and the bad one rarer, and the colours say so."""
    before, after = make_model(tokenizer, 1), make_model(tokenizer, 1)
    rollouts = [make_rollout(tokenizer, "2 + 3 = 5\nAnswer: B", 1.0, 1.0), make_rollout(tokenizer, "7\nAnswer: D", 0.0, -1.0)]
    loss = 0
    for rollout in rollouts:
        ids = torch.tensor([rollout.prompt + rollout.tokens])
        targets = ids[:, 1:].clone()
        targets[:, :len(rollout.prompt) - 1] = -1
        loss = loss - rollout.advantage * after.logprobs(ids[:, :-1], targets).sum()
    loss.backward()
    with torch.no_grad():
        for weight in after.parameters():
            weight -= 1e-4 * weight.grad
    total = summarize_update(rollouts, explain_update(before, after, tokenizer, rollouts))
    assert total["gain"] > 0 and total["aligned"] > 0.5 and total["up"] > 0 > total["down"]


# ---------------------------------------------------------------------------------------------------------------------
# Shown

def test_the_page_is_self_contained_and_harmless():
    changes = [Change("<script>alert(1)</script>", -1.0, -0.5, 0.25), Change("\n", -1.0, -2.0, -0.5), Change("tool", None, None, 0.0)]
    rollout = LoggedRollout("x", "B", {"correct": 1.0}, 0.5, "stop", question="<b>2 + 3</b>\x1b[31m", answer="B")
    page = update_page("a & b", [("before", "sft <d2>")], [([rollout], [changes])])
    assert "<script" not in page and "&lt;script&gt;" in page and "&lt;b&gt;2 + 3" in page and "\x1b" not in page and "a &amp; b" in page
    assert not re.search(r"(?:src|href)=|url\(|@import|https?://", page)
    assert page.count("rgba(22,130,68,") == 2 and page.count("rgba(190,48,48,") == 2  # a token and the legend, of each colour
    assert "log p -1.000 → -0.500 (+0.500), × advantage = +0.2500" in page and "forced by a tool" in page


def test_colours_in_the_terminal_tell_good_from_bad():
    changes = [Change("up", -1.0, -0.5, 0.25), Change("down", -1.0, -2.0, -0.5), Change("nothing", -1.0, -1.0, 0.0), Change("forced", None, None, 0.0)]
    text = update_text(changes, full_colour([changes]))
    assert text.plain == "updownnothingforced"
    assert [str(span.style) for span in text.spans] == ["white on rgb(11,65,34)", "white on rgb(190,48,48)", "dim"]


def said(capsys):
    return re.sub(r"[ │┃]+", " ", capsys.readouterr().out)


def test_a_step_is_printed_as_a_table(logged, capsys):
    rl_show.main(rl_show.command_line(["3"]))
    printed = said(capsys)
    assert "Group 0, right answer B" in printed and "2 + 3 = ?" in printed and " 0 5 B 1 0.1 +0.500 stop " in printed and "-0.500" in printed
    assert "Group 1, right answer D: all right or all wrong, so it gave no gradient" in printed and " so 5 none 0 " in printed
    rl_show.main(rl_show.command_line(["--", "0", "--group=1", "--run=rl_tiny"]))
    printed = said(capsys)
    assert "1 of 2 logged groups; steps with rollouts: 0, 3" in printed and "2 + 3" not in printed


def test_two_steps_are_compared_on_the_question_they_share(logged, capsys):
    rl_show.main(rl_show.command_line(["0", "3"]))
    printed = said(capsys)
    assert "rl/acc 0.25 0.55 +0.3" in printed and "train/loss" not in printed  # not a number at step 3
    assert "step 0: 1 of 2 right step 3: 1 of 2 right" in printed and "1 + 3" not in printed and "No question" not in printed


def test_steps_without_a_shared_question_show_their_first_groups(logged, capsys):
    _, steps, metrics = read_rollouts(logged)
    rl_show.show_difference(Console(width=120), "rl_tiny", {0: steps[0][1:], 3: steps[3][1:]}, metrics, 0, 3)
    printed = said(capsys)
    assert "No question was logged at both steps" in printed and "1 + 0" in printed and "1 + 3" in printed


@pytest.mark.parametrize("words, message", [
    (["2"], "holds no rollouts of step 2, only of 0, 3: try 3"), (["0", "--group=2"], "group 2 was not logged: step 0 has 2"),
    (["--run=rl_nobody"], "holds 1 logs .rl_tiny., and none is called 'rl_nobody'"),
    (["0", "--explain", "--after=9"], "--after=9 is not one of the 0 checkpoints of rl tiny"), (["3", "--explain"], "rl tiny has no checkpoint after step 3")])
def test_what_is_not_there_is_named(logged, words, message):
    with pytest.raises(ValueError, match=message):
        rl_show.main(rl_show.command_line(words))


def test_three_steps_are_one_too_many():
    with pytest.raises(SystemExit, match="3 steps were given"):
        rl_show.command_line(["1", "2", "3"])


def test_a_real_run_is_explained_by_the_checkpoints_around_the_step(base_directory, capsys):
    for stage in ("base", "sft"):
        pipeline.run_stage(stage, num_iterations=2, **({"source": "base"} if stage == "sft" else {}))
    pipeline.run_stage("rl", max_steps=3, rollouts_every=1, save_every=1, keep_last=-1, init_lr_frac=1.0, eval_every=-1, kl_every=-1, attn_every=-1)
    capsys.readouterr()
    total = rl_show.main(rl_show.command_line(["0", "--explain"]))
    printed = capsys.readouterr().out
    page = (base_directory / "runs" / "rl_d2_explained" / "step_000000.html").read_text(encoding="utf-8")
    assert "before: sft d2, step 2" in printed and "after: rl d2, step 1" in printed and "is the model that sampled" in printed
    assert "<title>rl_d2: what the update around step 0 did</title>" in page and page.count("class=card") == 8 and total["tokens"] >= 0
    rl_show.main(rl_show.command_line(["1", "--explain", "--before=-1", "--after=3", f"--html={base_directory / 'x.html'}"]))
    printed = capsys.readouterr().out
    assert "before: sft d2, step 2" in printed and "after: rl d2, step 3" in printed and (base_directory / "x.html").is_file()
    rl_show.main(rl_show.command_line(["1", "--explain"]))
    assert "before: rl d2, step 1" in (printed := capsys.readouterr().out) and "is the model that sampled" in printed
