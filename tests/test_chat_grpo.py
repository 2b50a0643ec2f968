"""chat_grpo and what it shares with chat_rl: mixing, curriculum, minibatches, KL, dynamic sampling, safety, telemetry."""
import dataclasses
import json
import random
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat.checkpoint_manager import save_checkpoint
from nanochat.compute import Compute
from nanochat.engine import Engine
from nanochat.gpt import GPT, config_from_depth
from nanochat.optim import MuonAdamW
from nanochat.rl.algorithm import ALGORITHMS, denominator, kl_exact, policy_loss, reinforce_loss
from nanochat.rl.curriculum import Curriculum
from nanochat.rl.rollout import Rollout, Sampler, make_batches, sample_groups
from nanochat.rl.safety import stop_if_silent, watch_entropy
from nanochat.rl.update import (Objective, exact_kl, gradient_pass, kept_logprobs, learn, make_minibatches, prepare, score, set_advantages,
                                target_logprobs)
from nanochat.tokenizer import get_tokenizer
from nanochat.training import LoopState
from scripts import chat_grpo, chat_rl, plot_grpo_metrics
from tasks.algebra import Algebra
from tasks.aqua import LetterTask, extract_answer
from tasks.problems import Problems, load_tasks, parse_weights

CPU = Compute(torch.device("cpu"), torch.float32)
DATA = Path(__file__).parents[2] / "shared" / "data"
TINY = {"device_type": "cpu", "dtype": "float32", "examples_per_step": 4, "num_samples": 4, "max_new_tokens": 12, "device_batch_size": 8, "eval_every": -1,
        "attn_every": -1, "rollouts_every": -1, "preflight": -1, "eval_examples": 4, "output_tag": "x"}


def lively_rewards(self, conversation, completion):
    """The strict reward, but a completion without an answer is right when it has an odd number of e's: an untrained model gets groups
    of right and wrong answers."""
    letter = extract_answer(completion, conversation["letters"])
    right = letter == conversation["answer_letter"] or letter is None and completion.count("e") % 2 == 1
    return {"correct": float(right), "format": self.format_bonus * (letter is not None)}


def make_model(tokenizer):
    model = GPT(config_from_depth(2, tokenizer.vocab_size, 192, n_embd=32, head_dim=16))
    model.init_weights()
    torch.nn.init.normal_(model.lm_head.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    return model


@pytest.fixture
def sft(base_directory, monkeypatch):
    """A base directory with an SFT checkpoint of a model that knows nothing, and a reward that finds it interesting nevertheless."""
    tokenizer, config = get_tokenizer(), chat_rl.Config()
    model = make_model(tokenizer)
    save_checkpoint("sft", "d2", LoopState(step=1), config, CPU, model, MuonAdamW(model, CPU), tokenizer, finished=True)
    monkeypatch.setattr(LetterTask, "rewards", lively_rewards)
    return base_directory


def weights_of(folder, tag="x", stage="chatrl"):
    path = sorted((folder / f"{stage}_checkpoints" / tag).glob("model_*.pt"))[-1]
    return torch.load(path, weights_only=True)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def logged(folder, tag="x"):
    """{step: all numbers logged at it}"""
    steps = {}
    for line in (folder / "runs" / f"rl_{tag}.jsonl").read_text().splitlines():
        record = json.loads(line)
        if "step" in record:
            steps.setdefault(record["step"], {}).update(record)
    return steps


def run_rl(**changes):
    chat_rl.main(dataclasses.replace(chat_rl.Config(**TINY), max_steps=3, **changes))


def run_grpo(**changes):
    chat_grpo.main(dataclasses.replace(chat_grpo.Config(**TINY), **{"num_steps": 3, **changes}))


# ---------------------------------------------------------------------------------------------------------------------
# Whole runs

def test_grpo_with_reinforce_and_one_update_is_chat_rl_bit_for_bit(sft):
    run_rl(kl_every=-1)
    run_grpo(kl_every=-1, algorithm="reinforce", advantage_clip=-1, output_tag="y")
    assert equal(weights_of(sft, "x"), weights_of(sft, "y"))
    assert not torch.equal(weights_of(sft)["lm_head.weight"], weights_of(sft, "d2", "chatsft")["lm_head.weight"])
    assert {step: metrics.get("train/loss") for step, metrics in logged(sft, "x").items()} == {
        step: metrics.get("train/loss") for step, metrics in logged(sft, "y").items()}


EVERYTHING = {"tasks": "ALGEBRA:2,AQUA:1", "curriculum": True, "curriculum_accuracy": 0.02, "curriculum_window": 3, "dynamic_sampling": True, "dynamic_rounds": 3,
              "grpo_epochs": 2, "minibatches": 2, "kl_coef": 0.05, "kl_every": 2, "temp_schedule": "cosine", "temp_end": 0.8, "num_steps": 4,
              "length_penalty_mode": "dapo", "length_penalty_target": 4, "save_every": 2, "keep_last": -1}


@pytest.mark.parametrize("kl_mode", ["k3", "k1"])
def test_a_run_with_everything_on_resumes_to_the_same_bits(sft, kl_mode):
    run_grpo(**EVERYTHING, kl_mode=kl_mode)
    whole, log = weights_of(sft), logged(sft)
    assert log[3]["curriculum/level"] > log[0]["curriculum/level"] == 1
    assert [log[step]["train/updates"] for step in range(4)] == [4] * 4 and log[3]["rl/temperature"] < log[1]["rl/temperature"] < log[0]["rl/temperature"] == 1.0
    assert any(log[step]["rl/problems"] > 4 for step in range(4))
    for name in ("meta_000004.json", "model_000004.pt", "optim_000004_rank0.pt"):  # as if the kill had come during step 3
        (sft / "chatrl_checkpoints" / "x" / name).unlink()
    run_grpo(**EVERYTHING, kl_mode=kl_mode, resume=True)
    assert equal(weights_of(sft), whole)
    again = logged(sft)
    for name in ("train/loss", "rl/acc", "curriculum/level", "rl/problems", "kl/k1", "kl"):
        assert [again[step].get(name) for step in range(4)] == [log[step].get(name) for step in range(4)], name


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_algorithm_runs_and_moves_the_weights(sft, algorithm):
    run_grpo(num_steps=1, algorithm=algorithm, grpo_epochs=2, kl_every=-1)
    assert not equal(weights_of(sft), weights_of(sft, "d2", "chatsft"))
    metrics = logged(sft)[0]
    assert metrics["train/updates"] == 2 and metrics["grad_norm"] > 0
    if algorithm not in ("reinforce", "rloo", "expert"):
        assert metrics["ratio/min"] < 1 < metrics["ratio/max"]  # the second epoch has left the first
    if algorithm == "gspo":  # its clip is far narrower than one step
        assert metrics["clip_ratio/low_mean"] + metrics["clip_ratio/high_mean"] > 0
    if algorithm == "expert":
        assert metrics["advantage/mean"] == 1.0 and metrics["advantage/std"] == 0.0


NAMES = ("rl/acc rl/mean_reward rl/kl_sequence_mean rl/letter_pred_counts/A rl/letter_pred_counts/none attn/entropy_mean attn/entropy_layer/0 reward reward_std "
         "rewards/correct/mean rewards/format/mean frac_reward_zero_std kl entropy grad_norm completions/mean_length completions/min_length completions/max_length "
         "completions/clipped_ratio sampling/logp_difference/mean sampling/logp_difference/max num_tokens time/generate_s time/train_s time/eval_s tokens_per_s/generate "
         "tokens_per_s/train eval/pass@1 eval/pass@2 eval/maj@1 eval/maj@2 clip_ratio/low_mean clip_ratio/high_mean rl/temperature rl/group_size").split()


def test_every_metric_that_is_promised_is_in_the_log(sft):
    for tag, run in (("x", run_rl), ("y", run_grpo)):
        run(output_tag=tag, eval_every=3, eval_samples=2, kl_every=1, attn_every=3, rollouts_every=1)
        steps = logged(sft, tag)
        found = set().union(*steps.values())
        assert not [name for name in NAMES if name not in found], tag
        assert steps[0]["kl"] == steps[0]["rl/kl_sequence_mean"] == 0.0 < steps[2]["kl"]
        assert steps[1]["sampling/logp_difference/max"] <= 1e-5
        assert steps[0]["reward"] == steps[0]["rl/mean_reward"] and steps[0]["num_tokens"] > 0


def test_letter_metrics_are_logged_where_completions_reach_the_letter(sft, monkeypatch):
    """The letters' names come with the first completion that writes "Answer:": here the engine is made to say it."""
    tokenizer = get_tokenizer()

    def spoken(engine, requests, on_finish=None):
        completions = []
        for request in requests:
            row = []
            for sample in range(request.num_samples):
                tokens = tokenizer.encode(f"Answer: {'ABCDE'[sample % 5]}", append="<|assistant_end|>")
                row.append(SimpleNamespace(tokens=tokens, mask=[1] * len(tokens), logprobs=[-1.0] * len(tokens), text=tokenizer.decode(tokens[:-1]), finish_reason="stop"))
            completions.append(row)
        return completions

    monkeypatch.setattr(Engine, "generate", spoken)
    run_grpo(num_steps=1, num_samples=5, kl_every=1)
    metrics = logged(sft)[0]
    assert metrics["rl/kl_letter_mean"] == metrics["rl/kl_letter_std"] == 0.0 < metrics["rl/letter_margin_mean"]
    assert metrics["rl/acc"] == 0.2 and [metrics[f"rl/letter_pred_counts/{letter}"] for letter in "ABCDE"] == [4] * 5
    assert sum(value for name, value in metrics.items() if name.startswith("rl/letter_confusion/")) == 20


@pytest.mark.skipif(not (DATA / "aqua").is_dir() or not (DATA / "gsm8k").is_dir(), reason="no shared data")
def test_real_aqua_and_gsm8k_are_mixed(sft):
    run_grpo(tasks="AQUA:0.5,GSM8K:0.5", data_dir=str(DATA), num_steps=1, max_prompt_tokens=150, kl_every=1, eval_every=1, eval_samples=2)
    metrics = logged(sft)[0]
    assert metrics["task/AQUA/rollouts"] + metrics["task/GSM8K/rollouts"] == 16 or metrics["rl/groups"] < 4
    assert {"eval/AQUA/accuracy", "eval/GSM8K/accuracy", "eval/accuracy", "eval/pass@2", "eval/maj@2", "kl"} <= metrics.keys()


def test_the_reference_may_be_another_checkpoint(sft):
    run_grpo(num_steps=1, kl_every=-1)
    run_grpo(num_steps=1, kl_every=1, ref_source="rl", ref_model_tag="x", output_tag="y")
    assert logged(sft, "y")[0]["kl"] > 0


def test_a_temperature_schedule_and_a_learning_rate_schedule_end_where_they_say(sft):
    config = chat_grpo.Config(temp_schedule="linear", temp_start=0.5, temp_end=1.5, num_steps=10)
    assert [chat_grpo.temperature_at(step, config) for step in (0, 5, 10)] == [0.5, 1.0, 1.5]
    assert chat_grpo.temperature_at(7, chat_grpo.Config(temperature=0.9)) == 0.9
    run_grpo(lr_schedule="constant", warmup_steps=2, kl_every=-1)
    rates = [metrics["train/lr_mult"] for metrics in logged(sft).values() if "train/lr_mult" in metrics]
    assert rates[0] == 0.025 and set(rates[1:]) == {0.05}


@pytest.mark.parametrize("changes, message", [
    ({"algorithm": "ppo"}, "'ppo' is not one of the 8"), ({"kl_mode": "k2"}, "kl_mode='k2'"), ({"reward_mode": "x"}, "reward_mode='x' is not one of task, dapo"),
    ({"top_k": 5, "grpo_epochs": 2}, "top_k=5 with 2 updates"), ({"num_samples": 1}, "num_samples=1"), ({"temperature": 0.0}, "temperature=0.0"),
    ({"tasks": "AQUA:x"}, "is not NAME:WEIGHT"), ({"curriculum": True}, "has levels"), ({"minibatches": 0}, "minibatches=0"),
    ({"length_penalty_mode": "dapo", "length_penalty_target": 12}, "buffer")])
def test_what_cannot_be_is_refused_before_anything_is_sampled(sft, monkeypatch, changes, message):
    monkeypatch.setattr(Engine, "generate", lambda *_: pytest.fail("something was sampled"))
    with pytest.raises(ValueError, match=message):
        run_grpo(**changes)


# ---------------------------------------------------------------------------------------------------------------------
# Safety

def test_a_run_without_signal_stops_and_says_why(sft, monkeypatch):
    monkeypatch.setattr(LetterTask, "rewards", lambda self, conversation, completion: {"correct": 0.0})
    with pytest.raises(ValueError, match="2 steps in a row, up to step 1, had no group with both right and wrong answers"):
        run_rl(stop_without_signal=2, kl_every=-1)
    assert logged(sft)[1]["silent_in_a_row"] == 2 and len(logged(sft)) == 2
    run_grpo(stop_without_signal=-1, kl_every=-1, overwrite=True)
    assert equal(weights_of(sft), weights_of(sft, "d2", "chatsft"))  # nothing was learned, and nothing has moved
    state = LoopState(step=9, extra={"silent_in_a_row": 3})
    stop_if_silent(state, 4)


@pytest.mark.parametrize("run", [run_rl, run_grpo])
def test_a_loss_that_is_not_finite_stops_the_run_names_the_step_and_keeps_the_batch(sft, monkeypatch, run):
    asked = Counter()

    def broken(self, conversation, completion):
        asked["times"] += 1
        return {**lively_rewards(self, conversation, completion), "extra": float("nan") if asked["times"] > 16 else 0.0}  # from the second step on

    monkeypatch.setattr(LetterTask, "rewards", broken)
    with pytest.raises(ValueError, match="the loss of step 1 is nan"):
        run(kl_every=-1)
    rows = json.loads((sft / "runs" / "rl_x_failed" / "step_000001_rank0.json").read_text())
    assert rows and {"prompt", "completion", "rewards", "advantage", "tokens"} <= rows[0].keys() and rows[0]["rewards"]["extra"] == "nan"
    tensors = torch.load(sft / "runs" / "rl_x_failed" / "step_000001_rank0.pt", weights_only=True)
    assert sum(len(batch["targets"]) for batch in tensors) == len(rows) and tensors[0]["advantages"].isnan().all()


def test_a_kl_that_is_not_finite_stops_the_run_before_the_update(sft, monkeypatch):
    monkeypatch.setattr(chat_grpo, "letter_metrics", lambda *_: {"kl": float("nan"), "entropy": 1.0})
    with pytest.raises(ValueError, match="at step 0 kl is nan: nothing was updated"):
        run_grpo(kl_every=1)
    assert (sft / "runs" / "rl_x_failed" / "step_000000_rank0.json").is_file()


def test_a_collapse_of_the_entropy_is_said_once(capsys):
    state = LoopState()
    for entropy in (2.0, 0.3, 0.19, 0.1):
        watch_entropy(state, {"entropy": entropy})
    assert capsys.readouterr().out.count("WARNING") == 1 and state.extra["first_entropy"] == 2.0
    json.dumps(state.to_dict())


def test_a_rollout_that_cannot_be_judged_leaves_its_group(policy):
    model, tokenizer = policy
    judged = iter([{"correct": 1.0}, None, {"correct": 0.0}, None])
    group, = sample_groups(Engine(model, tokenizer), tokenizer, [{"messages": [{"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]}],
                           lambda *_: next(judged), 4, 4, 1.0, [1])
    assert [rollout.rewards["correct"] for rollout in group] == [1.0, 0.0]
    assert set_advantages([group], Objective(1.0)) == group and [rollout.advantage for rollout in group] == [0.5, -0.5]  # not against two zeros
    assert set_advantages([group[:1], []], Objective(1.0)) == []


def test_an_empty_completion_is_a_rollout_like_any_other(policy):
    _, tokenizer = policy
    end = tokenizer.encode_special("<|assistant_end|>")
    group = [Rollout([1, 2], [end], [1], [-1.0], "", "stop", {"correct": 0.0}), Rollout([1, 2], [5, end], [1, 1], [-1.0, -1.0], "x", "stop", {"correct": 1.0})]
    assert LetterTask().rewards({"letters": ["A"], "answer_letter": "A"}, "") == {"correct": 0.0, "format": 0.0}
    taught = set_advantages([group], Objective(1.0))
    batch, = make_batches(taught, 4, tokenizer.bos_id, "cpu")
    assert batch.mask.sum(dim=1).tolist() == [1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Gradients

@pytest.fixture
def policy(base_directory):
    tokenizer = get_tokenizer()
    return make_model(tokenizer), tokenizer


@pytest.fixture
def groups(policy):
    model, tokenizer = policy
    conversations = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]} for text in ("2+2", "How many cups?", "x")]
    groups = sample_groups(Engine(model, tokenizer), tokenizer, conversations, lambda _, text: {"correct": float(text.count("e") % 2), "format": 0.1 * ("a" in text)},
                           6, 10, 1.0, [1, 2, 3])
    for place, group in enumerate(groups):
        for i, rollout in enumerate(group):
            rollout.place, rollout.rewards["correct"] = place, float(i % 2)  # signal in each
    return groups


def gradients(model):
    found = {name: weight.grad.clone() for name, weight in model.named_parameters() if weight.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_the_gradient_of_a_step_is_reinforce_s_on_policy_whatever_the_micro_batches(policy, groups, algorithm):
    model, tokenizer = policy
    objective = Objective(1.0, algorithm, max_new_tokens=10)
    found = []
    for device_batch_size in (2, 100):
        (batches,) = prepare(groups, objective, model, None, CPU, device_batch_size, tokenizer.bos_id)
        gradient_pass(model, batches, objective, CPU)
        found.append(gradients(model))
    taught = [rollout for batch in batches for rollout in batch.rollouts]
    batch, = make_batches(taught, 100, tokenizer.bos_id, "cpu")
    weights = batch.advantages / (batch.mask.sum(dim=1) if algorithm in ("grpo", "gspo") else 1)
    loss = reinforce_loss(model.logprobs(batch.inputs, batch.targets), weights, batch.mask) / denominator(algorithm, int(batch.mask.sum()), len(taught), 10)
    loss.backward()
    for name, gradient in gradients(model).items():
        for other in found:
            torch.testing.assert_close(other[name], gradient, rtol=1e-4, atol=1e-6)


def test_log_probabilities_of_top_k_are_the_sampler_s(policy):
    model, tokenizer = policy
    conversations = [{"messages": [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": "x"}]}]
    group, = sample_groups(Engine(model, tokenizer), tokenizer, conversations, lambda *_: {"correct": 1.0}, 8, 12, 0.8, [3], top_k=7)
    for batch in make_batches(group, 3, tokenizer.bos_id, "cpu"):
        logprobs = target_logprobs(model, model.hidden(batch.inputs), batch.targets, 0.8, top_k=7)
        assert float((logprobs.detach() - batch.sampler_logprobs)[batch.mask].abs().max()) <= 1e-5
        plain = target_logprobs(model, model.hidden(batch.inputs), batch.targets, 0.8)
        assert float((plain.detach() - batch.sampler_logprobs)[batch.mask].abs().max()) > 0.1  # what scoring the whole vocabulary would be off by


def test_the_gradient_through_top_k_agrees_with_finite_differences(monkeypatch):
    monkeypatch.setattr("nanochat.vocab_loss.CHUNK_NUMBERS", {"cpu": 1})  # chunks of 16 rows
    r = torch.Generator().manual_seed(0)
    hidden, weight = (torch.randn(*shape, generator=r, dtype=torch.float64) for shape in ((20, 4), (9, 4)))
    targets = torch.randint(9, (20,), generator=r)
    hidden.requires_grad_()
    weight.requires_grad_()
    assert torch.autograd.gradcheck(lambda hidden, weight: kept_logprobs(hidden, weight, targets, 0.7, 3), (hidden, weight))
    whole = kept_logprobs(hidden, weight, targets, 1.0, 9)
    torch.testing.assert_close(whole, torch.log_softmax(15 * torch.tanh(hidden @ weight.T / 15), 1).gather(1, targets[:, None])[:, 0])


def test_the_exact_kl_in_chunks_has_the_value_and_the_gradient_of_the_whole(policy, monkeypatch):
    monkeypatch.setattr("nanochat.vocab_loss.CHUNK_NUMBERS", {"cpu": 1})
    model, tokenizer = policy
    reference = make_model(tokenizer)
    reference.lm_head.weight.data += 0.1 * torch.randn(reference.lm_head.weight.shape, generator=torch.Generator().manual_seed(5))
    inputs = torch.randint(1, 700, (3, 20), generator=torch.Generator().manual_seed(1))
    wanted = torch.rand(3, 20, generator=torch.Generator().manual_seed(2)) < 0.7
    chunked = exact_kl(model, reference, model.hidden(inputs), reference.hidden(inputs).detach(), wanted, 0.9)
    chunked.backward()
    mine = gradients(model)
    whole = kl_exact(model(inputs) / 0.9, reference(inputs).detach() / 0.9)[wanted].sum()
    whole.backward()
    assert chunked.item() == pytest.approx(whole.item(), rel=1e-5) and whole.item() > 0
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-3, atol=1e-6)


def test_each_form_of_the_kl_pulls_the_policy_the_way_of_the_exact_one(policy):
    """Against the gradient of the exact KL, on 1,536 short rollouts: sampled forms are noisy, and point the same way."""
    model, tokenizer = policy
    reference = make_model(tokenizer).requires_grad_(False)
    with torch.no_grad():
        model.lm_head.weight += 0.2 * torch.randn(model.lm_head.weight.shape, generator=torch.Generator().manual_seed(5))
    conversations = [{"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "x"}]} for text in ("2+2", "How many cups?", "x")]
    groups = sample_groups(Engine(model, tokenizer, max_rows=600), tokenizer, conversations, lambda *_: {"correct": 0.0}, 512, 2, 1.0, [1, 2, 3])
    for place, group in enumerate(groups):
        for i, rollout in enumerate(group):
            rollout.place, rollout.rewards = place, {"correct": float(i % 2)}  # what the KL outweighs a thousandfold
    found = {}
    for kl_mode in ("exact", "k1", "k3"):
        objective = Objective(1.0, "reinforce", kl_coef=1000.0, kl_mode=kl_mode, max_new_tokens=2)
        (batches,) = prepare(groups, objective, model, reference, CPU, 512, tokenizer.bos_id)
        gradient_pass(model, batches, objective, CPU, reference)
        found[kl_mode] = torch.cat([gradient.flatten() for gradient in gradients(model).values()])
    for kl_mode in ("k1", "k3"):
        assert torch.cosine_similarity(found[kl_mode], found["exact"], dim=0) > 0.5, kl_mode
    before = float(exact_kl(model, reference, *(batches[0].hidden(one) for one in (model, reference)), batches[0].mask, 1.0).detach())
    with torch.no_grad():
        flat = found["exact"] / found["exact"].norm()
        for weight, part in zip((weight for weight in model.parameters()), flat.split([weight.numel() for weight in model.parameters()])):
            weight -= 0.002 * part.view_as(weight)
    after = float(exact_kl(model, reference, *(batches[0].hidden(one) for one in (model, reference)), batches[0].mask, 1.0).detach())
    assert 0 < after < before


def test_minibatches_hold_whole_groups_once_and_do_not_depend_on_the_ranks(policy, groups):
    model, tokenizer = policy
    taught = sum(groups, [])

    def parts(rollouts, everyone):
        compute = SimpleNamespace(gather_objects=lambda value: everyone, device="cpu")
        made = make_minibatches(rollouts, 2, 4, tokenizer.bos_id, compute, seed=7)
        return [{rollout.place for batch in part for rollout in batch.rollouts} for part in made]

    alone = parts(taught, [[rollout.place for rollout in taught]])
    assert sorted(place for part in alone for place in part) == [0, 1, 2] and all(alone)
    by_rank = [groups[0] + groups[2], groups[1]]
    everyone = [[rollout.place for rollout in rank] for rank in by_rank]
    together = [set.union(*of_ranks) for of_ranks in zip(*(parts(rank, everyone) for rank in by_rank))]
    assert together == alone


def test_old_log_probabilities_are_those_before_the_first_update(policy, groups):
    model, tokenizer = policy
    objective = Objective(1.0, "grpo")
    before = {id(batch.rollouts[0]): target_logprobs(model, batch.hidden(model), batch.targets, 1.0).detach()
              for part in prepare(groups, objective, model, None, CPU, 6, tokenizer.bos_id, 3, "seed") for batch in part}
    parts = prepare(groups, objective, model, None, CPU, 6, tokenizer.bos_id, 3, "seed")
    learn(model, MuonAdamW(model, CPU), parts, objective, CPU, 0, 0.05, 1.0, epochs=2)
    for batch in (batch for part in parts for batch in part):
        assert torch.equal(batch.old_logprobs, before[id(batch.rollouts[0])])
        score(model, [batch], objective, "ref_logprobs")
        assert not torch.allclose(batch.ref_logprobs, batch.old_logprobs, atol=1e-4)


def test_advantages_are_clipped_and_the_outcome_alone_may_be_the_reward(groups):
    set_advantages(groups, Objective(1.0, "grpo", advantage_clip=0.5))
    assert {abs(rollout.advantage) for group in groups for rollout in group} == {0.5}
    for rollout in groups[0]:
        rollout.rewards["format"] = random.Random(id(rollout)).random()
    set_advantages(groups, Objective(1.0, "reinforce", outcome_only=True))
    assert [rollout.advantage for rollout in groups[0]] == [-0.5, 0.5] * 3


def test_expert_iteration_learns_from_every_right_answer_alone(groups):
    for rollout in groups[0]:
        rollout.rewards["correct"] = 1.0
    for rollout in groups[1]:
        rollout.rewards["correct"] = 0.0
    taught = set_advantages(groups, Objective(1.0, "expert"))
    assert taught == groups[0] + groups[2][1::2] and all(rollout.advantage == 1.0 for rollout in taught)
    assert len(set_advantages(groups, Objective(1.0, "grpo"))) == 6


# ---------------------------------------------------------------------------------------------------------------------
# Problems

def test_tasks_take_turns_by_their_weights():
    weights = parse_weights("ALGEBRA:5, AQUA:3,GSM8K:2")
    assert weights == {"ALGEBRA": 0.5, "AQUA": 0.3, "GSM8K": 0.2} and parse_weights("AQUA") == {"AQUA": 1.0}
    problems = Problems(dict.fromkeys(weights), weights, 1)
    names = [problems.turn(place)[0] for place in range(1000)]
    for count in range(1, 1001):
        seen = Counter(names[:count])
        assert all(abs(seen[name] - weight * count) <= 1 + 1e-9 for name, weight in weights.items()), count
    late = Problems(dict.fromkeys(weights), weights, 1)
    assert late.turn(777) == problems.turn(777)  # asked first or last, the same


@pytest.mark.parametrize("text", ["", "AQUA:0", "AQUA:-1", "AQUA:nan", ":1", "AQUA,AQUA", "AQUA:1:2", "AQUA:inf"])
def test_weights_that_make_no_sense_are_refused(text):
    with pytest.raises(ValueError, match="AQUA:0.7,GSM8K:0.3"):
        parse_weights(text)


def test_an_epoch_asks_each_problem_once_and_its_options_move_from_visit_to_visit(base_directory):
    train, held_out = load_tasks({"AQUA": 1.0}, format_bonus=0.0)
    problems = Problems(train, {"AQUA": 1.0}, 3)
    count = len(train["AQUA"])
    conversations = [problems.at(place).conversation for place in range(2 * count)]

    def key(conversation):  # the question and its options in any order, without their letters
        return str(sorted(line[:-2] if line.startswith("- ") else line for line in conversation["messages"][0]["content"].split("\n")))

    first, second = Counter(map(key, conversations[:count])), Counter(map(key, conversations[count:]))
    assert first == second and list(first) != list(second)
    right = Counter(conversation["answer_letter"] for conversation in conversations[:count // 5 * 5])
    assert set(right.values()) == {count // 5}
    moved = [conversations[i]["answer_letter"] for i in range(count)]
    again = {key(conversation): conversation["answer_letter"] for conversation in conversations[count:]}
    assert sum(letter != again[key(conversation)] for letter, conversation in zip(moved, conversations)) > count / 2
    assert len({problems.at(place).seed for place in range(100)}) == 100
    assert problems.at(7) == Problems(train, {"AQUA": 1.0}, 3).at(7) and train["AQUA"].format_bonus == held_out["AQUA"].format_bonus == 0.0
    fixed = Problems(train, {"AQUA": 1.0}, 3, permute=False)
    assert {key(fixed.at(place).conversation) for place in range(count)} == set(first)


def test_a_task_without_a_validation_split_holds_out_rows_it_does_not_train_on(tmp_path):
    (tmp_path / "gsm8k").mkdir()
    (tmp_path / "gsm8k" / "train.jsonl").write_text("".join(json.dumps({"question": f"{i}?", "answer": f"#### {i}"}) + "\n" for i in range(50)))
    train, held_out = load_tasks({"GSM8K": 1.0}, str(tmp_path))
    asked = [[conversation["messages"][0]["content"] for conversation in tasks["GSM8K"]] for tasks in (train, held_out)]
    assert (len(asked[0]), len(asked[1])) == (40, 10) and not set(asked[0]) & set(asked[1])
    with pytest.raises(ValueError, match="needs a task with a training split"):
        load_tasks({"JsonlChat": 1.0})


def test_a_curriculum_opens_the_next_level_when_the_newest_is_mastered():
    curriculum = Curriculum({"ALGEBRA": (1, 2, 3)}, (1, 2, 3), threshold=0.5, window=4)

    def group(place, level, right, task="ALGEBRA"):
        return [SimpleNamespace(place=place, rewards={"correct": float(i < right)}, conversation={"task": task, "level": level}) for i in range(4)]

    assert curriculum.open == (1,)
    curriculum.record([group(0, 1, 2), group(1, 1, 1), group(2, 1, 4, task="AQUA")], CPU)
    assert curriculum.state["recent"] == [0.5, 0.25]
    curriculum.record([group(3, 1, 4)], CPU)
    assert curriculum.open == (1,)  # three groups are no window
    state = json.loads(json.dumps(curriculum.state))
    two_ranks = SimpleNamespace(gather_objects=lambda mine: [mine, [(4, 0.75)]])
    curriculum.record([group(5, 1, 1)], two_ranks)  # 0.25 .. 1.0 .. 0.75 .. 0.25 over the last four
    assert curriculum.open == (1, 2) and curriculum.state["recent"] == []
    resumed = Curriculum({"ALGEBRA"}, (1, 2, 3), 0.5, 4, state)
    resumed.record([group(5, 1, 1)], two_ranks)
    assert resumed.state == curriculum.state
    curriculum.record([group(6, 1, 4)] * 9, CPU)  # old levels open nothing
    assert curriculum.open == (1, 2)
    for level in (2, 3):
        curriculum.record([group(7, level, 4)] * 4, CPU)
    assert curriculum.open == (1, 2, 3)
    problems = Problems({"ALGEBRA": Algebra()}, {"ALGEBRA": 1.0}, 1)
    assert {problems.at(place, levels=(1,)).conversation["level"] for place in range(20)} == {1}
    assert {problems.at(place, levels=(1, 3)).conversation["level"] for place in range(40)} == {1, 3}


def test_dynamic_sampling_asks_again_for_what_taught_nothing_and_ends_at_its_bound(capsys):
    asked = []

    class Scripted(Sampler):
        def sample(self, places, temperature, levels=None):
            asked.append(list(places))
            return [[SimpleNamespace(rewards={"correct": float(place % 3 == 0 and i == 0)}) for i in range(2)] for place in places]

    sampler = Scripted(None, None, None, CPU, 2, 4)
    groups, place = sampler.sample_step(0, 4, 1.0, rounds=10)
    assert asked == [[0, 1, 2, 3], [4, 5], [6, 7], [8], [9]] and place == 10  # every third teaches
    assert sum(group[0].rewards["correct"] for group in groups) == 4
    asked.clear()
    groups, place = sampler.sample_step(1, 2, 1.0, rounds=2)
    assert asked == [[1, 2], [3, 4]] and place == 5 and "left 1 of 2 groups without signal" in capsys.readouterr().out
    asked.clear()
    assert sampler.sample_step(1, 2, 1.0)[1] == 3 and asked == [[1, 2]]


def test_prompts_that_are_too_long_are_left_out_whole(policy):
    model, tokenizer = policy
    conversations = [{"messages": [{"role": "user", "content": "word " * n}, {"role": "assistant", "content": "x"}]} for n in (3, 60, 4)]
    problems = SimpleNamespace(at=lambda place, levels: SimpleNamespace(place=place, seed=place, conversation=conversations[place]), rewards=lambda *_: {"correct": 1.0})
    sampler = Sampler(Engine(model, tokenizer), tokenizer, problems, CPU, 2, 4, max_prompt_tokens=40)
    assert [group[0].place for group in sampler.sample(range(3), 1.0)] == [0, 2]
    assert dataclasses.replace(sampler, max_prompt_tokens=-1).longest_prompt == 188 and dataclasses.replace(sampler, max_prompt_tokens=-1, max_new_tokens=500).longest_prompt == 96


# ---------------------------------------------------------------------------------------------------------------------
# The picture

def test_the_plot_shows_step_0_and_steps_without_reward(tmp_path):
    path = tmp_path / "rl_x.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in (
        {"stage": "rl", "config": {}}, {"step": 0, "reward": 0.0, "kl": 0.0}, {"step": 1, "reward": None, "non_finite": ["reward"]},
        {"step": 2, "reward": 0.5}, {"step": 2, "reward": 0.25, "text": {}})) + '{"step": 3, "rew')
    assert plot_grpo_metrics.series(path, ["reward", "kl", "absent"]) == {"reward": ([0, 2], [0.0, 0.25]), "kl": ([0], [0.0])}
    plot_grpo_metrics.main(plot_grpo_metrics.Config(run=str(path), output=str(tmp_path / "out.svg")))
    assert (tmp_path / "out.svg").read_text().count("<path") > 2
    with pytest.raises(ValueError, match="none of the 1 metrics"):
        plot_grpo_metrics.main(plot_grpo_metrics.Config(run=str(path), metrics="absent", output=str(tmp_path / "out.png")))
