"""Letter and sequence telemetry against slow, literal computations on a tiny model."""
import math
from types import SimpleNamespace

import pytest
import torch

from nanochat.gpt import GPT, GPTConfig
from nanochat.rl.letter_metrics import decision_point, letter_ids, letter_metrics, measure_rollouts, mean_and_std, summarize, token_kl
from nanochat.rl.rollout import Rollout
from nanochat.tokenizer import Tokenizer

ALONE = SimpleNamespace(gather_objects=lambda value: [value])
LETTERS = ["A", "B", "C", "D", "E"]


@pytest.fixture(scope="module")
def tokenizer():
    text = [f"{a} + {b} = {a + b}\nAnswer: {letter}" for a in range(20) for b in range(5) for letter in LETTERS]
    return Tokenizer.train(text, 400)


def make_model(tokenizer, seed, noise=0.15):
    model = GPT(GPTConfig(sequence_len=64, vocab_size=tokenizer.vocab_size, n_layer=2, n_head=4, n_kv_head=2, n_embd=32))
    model.init_weights(seed=1)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(noise * torch.randn(weight.shape, generator=generator))
    return model


def make_rollout(tokenizer, answer, question="2 + 3 = ?", mask=None):
    prompt = tokenizer.render_prompt([{"role": "user", "content": question}])
    tokens = tokenizer.encode(answer, append="<|assistant_end|>")
    return Rollout(prompt, tokens, mask or [1] * len(tokens), [-1.0] * len(tokens), answer, "stop", {"correct": 0.0})


def conversation(letters=LETTERS, answer="B"):
    return {"messages": [], "letters": letters, "answer_letter": answer}


ANSWERS = ["2 + 3 = 5\nAnswer: B", "Answer: E", "5", "so 4\nAnswer: 12", "2 + 3 = 5 and 5 = 5\nAnswer: A\nAnswer: C", "x = 7\nanswer: D"]


@pytest.fixture(scope="module")
def rollouts(tokenizer):
    return [make_rollout(tokenizer, answer, question="1 + 1 = ? " * (1 + i % 2)) for i, answer in enumerate(ANSWERS)]


def brute_force(model, reference, tokenizer, rollout, letters, temperature):
    """One rollout, position by position, in Python floats."""
    ids = torch.tensor([rollout.prompt + rollout.tokens])
    with torch.no_grad():
        both = [one(ids)[0].double() for one in (model, reference)]
    result = {"kl_sequence": 0.0, "entropy": 0.0, "num_tokens": sum(rollout.mask)}
    for place, sampled in enumerate(rollout.mask):
        if not sampled:
            continue
        position = len(rollout.prompt) - 1 + place
        p, q = (torch.softmax(logits[position] / temperature, dim=0).tolist() for logits in both)
        result["kl_sequence"] += sum(a * math.log(a / b) for a, b in zip(p, q))
        result["entropy"] -= sum(a * math.log(a) for a in p)
        before = tokenizer.decode(rollout.tokens[:place])
        if before.lower().endswith("answer:"):
            places = [tokenizer.encode(f"Answer: {letter}")[-1] for letter in letters]
            p_letters, q_letters = ([one[i] for i in places] for one in (p, q))
            scores = sorted((float(both[0][position][i]) for i in places), reverse=True)
            result.update(mass=sum(p_letters), margin=scores[0] - scores[1],
                          probs=[a / sum(p_letters) for a in p_letters], ref_probs=[b / sum(q_letters) for b in q_letters])
            result["kl_letter"] = sum(a * math.log(a / b) for a, b in zip(result["probs"], result["ref_probs"]))
    return result


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("device_batch_size", [1, 4])
def test_every_number_is_the_brute_force_one(tokenizer, rollouts, temperature, device_batch_size, monkeypatch):
    monkeypatch.setattr("nanochat.vocab_loss.CHUNK_NUMBERS", {"cpu": 16 * tokenizer.vocab_size})  # several chunks, the last ragged
    model, reference = make_model(tokenizer, 2), make_model(tokenizer, 3)
    conversations = [conversation(LETTERS[:2 + i % 4]) for i in range(len(rollouts))]  # not all questions have five options
    measured = measure_rollouts(model, reference, tokenizer, rollouts, conversations, device_batch_size, temperature)
    for one, rollout, asked in zip(measured, rollouts, conversations):
        slow = brute_force(model, reference, tokenizer, rollout, asked["letters"], temperature)
        assert ("margin" in one) == ("margin" in slow)
        for key in {"kl_sequence", "entropy", "mass", "margin", "kl_letter"} & set(slow):
            assert one[key] == pytest.approx(slow[key], rel=1e-4, abs=1e-5), key
        assert one["num_tokens"] == slow["num_tokens"]
        for key in ("probs", "ref_probs"):
            assert list(one.get(key, {}).values()) == pytest.approx(slow.get(key, []), rel=1e-4)
            assert list(one.get(key, asked["letters"])) == asked["letters"]
    assert all(one["kl_sequence"] > 0 for one in measured) and sum("margin" in one for one in measured) == 5


def test_a_tool_s_tokens_count_in_no_kl(tokenizer):
    model, reference = make_model(tokenizer, 2), make_model(tokenizer, 3)
    rollout = make_rollout(tokenizer, "2 + 3 = 5\nAnswer: B")
    rollout.mask = [0 if 2 <= i < 4 else 1 for i in range(len(rollout.tokens))]
    (one,) = measure_rollouts(model, reference, tokenizer, [rollout], [conversation()])
    slow = brute_force(model, reference, tokenizer, rollout, LETTERS, 1.0)
    assert one["kl_sequence"] == pytest.approx(slow["kl_sequence"], rel=1e-4) and one["num_tokens"] == len(rollout.tokens) - 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_at_the_start_both_kls_are_exactly_0(tokenizer, rollouts, dtype):
    policy, reference = make_model(tokenizer, 2), make_model(tokenizer, 2)
    policy.compute_dtype = reference.compute_dtype = dtype
    metrics = letter_metrics(policy, reference, tokenizer, [rollouts], [conversation()], ALONE, device_batch_size=4)
    for name in ("kl_letter", "kl_sequence"):
        assert metrics[f"rl/{name}_mean"] == metrics[f"rl/{name}_std"] == 0.0
    assert metrics["rl/kl_token_mean"] == 0.0 and metrics["rl/letter_margin_mean"] > 0


def test_the_kl_has_its_direction(tokenizer, rollouts):
    one, other, asked = make_model(tokenizer, 2), make_model(tokenizer, 3), [conversation()] * len(rollouts)
    forwards = measure_rollouts(one, other, tokenizer, rollouts, asked)
    backwards = measure_rollouts(other, one, tokenizer, rollouts, asked)
    assert forwards[0]["kl_letter"] != pytest.approx(backwards[0]["kl_letter"], rel=1e-3)
    assert forwards[0]["probs"] == pytest.approx(backwards[0]["ref_probs"])


def test_the_measurement_leaves_no_gradient_and_no_trace(tokenizer, rollouts):
    model, reference = make_model(tokenizer, 2), make_model(tokenizer, 3)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    measure_rollouts(model, reference, tokenizer, rollouts, [conversation()] * len(rollouts))
    assert all(weight.grad is None and torch.equal(weight, before[name]) for name, weight in model.named_parameters())


def test_the_metrics_names_and_their_values(tokenizer, rollouts):
    model, reference = make_model(tokenizer, 2), make_model(tokenizer, 3)
    groups, conversations = [rollouts[:3], rollouts[3:]], [conversation(answer="B"), conversation(answer="C")]
    metrics = letter_metrics(model, reference, tokenizer, groups, conversations, ALONE)
    measured = measure_rollouts(model, reference, tokenizer, rollouts, [conversations[0]] * 3 + [conversations[1]] * 3)
    decided = [one for one in measured if "margin" in one]
    for name, values in (("kl_letter", [one["kl_letter"] for one in decided]), ("letter_margin", [one["margin"] for one in decided]),
                         ("kl_sequence", [one["kl_sequence"] for one in measured])):
        values = torch.tensor(values, dtype=torch.float64)
        assert metrics[f"rl/{name}_mean"] == pytest.approx(values.mean().item(), rel=1e-5)
        assert metrics[f"rl/{name}_std"] == pytest.approx(values.std(correction=0).item(), rel=1e-4)
    assert metrics["rl/kl_token_mean"] == pytest.approx(sum(one["kl_sequence"] for one in measured) / sum(len(r.tokens) for r in rollouts), rel=1e-5)
    assert metrics["rl/no_decision_point"] == 1
    confusion = {name.rpartition("/")[2]: value for name, value in metrics.items() if "confusion" in name}
    assert len(confusion) == 5 * 6 and {name: n for name, n in confusion.items() if n} == {
        "B_B": 1, "B_E": 1, "B_none": 1, "C_none": 1, "C_C": 1, "C_D": 1}  # "Answer: 12" reached the point, but wrote no letter
    assert sum(metrics[f"rl/letter_prob/{letter}"] for letter in LETTERS) == pytest.approx(1.0)
    assert 0 < metrics["rl/letter_mass_mean"] < 1


def test_two_ranks_together_are_one(tokenizer, rollouts):
    model, reference = make_model(tokenizer, 2), make_model(tokenizer, 3)
    whole = letter_metrics(model, reference, tokenizer, [rollouts[:3], rollouts[3:]], [conversation()] * 2, ALONE, device_batch_size=1)
    halves = [measure_rollouts(model, reference, tokenizer, half, [conversation()] * 3, 1) for half in (rollouts[:3], rollouts[3:])]
    both = SimpleNamespace(gather_objects=lambda value: halves)
    assert letter_metrics(model, reference, tokenizer, [rollouts[:3]], [conversation()], both, device_batch_size=1) == whole


def test_a_task_without_letters_has_a_sequence_kl_only(tokenizer, rollouts):
    metrics = letter_metrics(make_model(tokenizer, 2), make_model(tokenizer, 3), tokenizer, [rollouts], [{"messages": []}], ALONE)
    assert set(metrics) == {"entropy", "kl", "rl/kl_token_mean", "rl/kl_sequence_mean", "rl/kl_sequence_std"} and metrics["kl"] == metrics["rl/kl_token_mean"]


def test_without_a_reference_what_needs_none_is_still_there(tokenizer, rollouts):
    metrics = letter_metrics(make_model(tokenizer, 2), None, tokenizer, [rollouts], [conversation()], ALONE)
    assert "rl/letter_margin_mean" in metrics and "entropy" in metrics and not any("kl" in name for name in metrics)


def test_completions_without_a_decision_point_are_counted(tokenizer):
    lost = [make_rollout(tokenizer, text) for text in ("5", "Answer", "the Answer: B", "**Answer:** B")]
    metrics = letter_metrics(make_model(tokenizer, 2), None, tokenizer, [lost], [conversation()], ALONE)
    assert metrics["rl/no_decision_point"] == 4 and metrics["rl/letter_confusion/B_none"] == 4
    assert "rl/letter_margin_mean" not in metrics  # no number rather than a number about nothing
    assert summarize([]) == {}


def test_the_decision_point_is_the_token_behind_the_last_answer_line(tokenizer):
    for text, before in (("x\nAnswer: B", "x\nAnswer:"), ("Answer: A\nso\n answer: C.", "Answer: A\nso\n answer:"),
                         ("Answer: A\nAnswer", "Answer:"), ("Answer:\nB", "Answer:")):
        tokens = tokenizer.encode(text, append="<|assistant_end|>")
        point = decision_point(tokenizer, tokens)
        assert tokenizer.decode(tokens[:point]) == before
    assert decision_point(tokenizer, tokenizer.encode("x\nAnswer:")) is None  # cut off: nothing was predicted there
    torn = [token for part in ("An", "swe", "r", ":") for token in tokenizer.encode(part)] + tokenizer.encode(" B")
    assert decision_point(tokenizer, torn) == len(torn) - 1  # however the model spells it
    forced = tokenizer.encode("Answer: B")
    assert decision_point(tokenizer, forced, mask=[1] * (len(forced) - 1) + [0]) is None


def test_a_letter_of_two_tokens_is_an_error_that_says_what_to_do():
    bytes_only = Tokenizer.train(["hello there"], 265)
    with pytest.raises(ValueError, match=r"'Answer: A' is 9 tokens, but it must be the 7 of 'Answer:' and one more for ' A': train"):
        letter_ids(bytes_only, LETTERS)


def test_letters_are_different_single_tokens(tokenizer):
    ids = letter_ids(tokenizer, LETTERS)
    assert len(set(ids)) == 5 and [tokenizer.decode([i]) for i in ids] == [" A", " B", " C", " D", " E"]


def test_the_entropy_of_a_uniform_policy_is_log_v(tokenizer):
    model = GPT(GPTConfig(sequence_len=64, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=2, n_kv_head=2, n_embd=16))
    model.init_weights()
    hidden, wanted = model.hidden(torch.zeros(2, 5, dtype=torch.int64)), torch.tensor([[1, 1, 0, 1, 0], [0, 0, 1, 1, 1]]).bool()
    with torch.no_grad():
        kl, entropy = token_kl(model, model, hidden, hidden, wanted)
    torch.testing.assert_close(entropy, wanted.double() * math.log(tokenizer.vocab_size), rtol=1e-6, atol=0)
    assert (kl == 0).all()
    assert mean_and_std([1.0, 3.0]) == (2.0, 1.0)


def test_memory_does_not_hold_the_vocabulary_of_every_position(tokenizer, monkeypatch):
    """No tensor as large as (positions, V) is ever made: the largest logits seen are one chunk's."""
    monkeypatch.setattr("nanochat.vocab_loss.CHUNK_NUMBERS", {"cpu": 16 * tokenizer.vocab_size})
    seen = []
    import nanochat.rl.letter_metrics as module
    monkeypatch.setattr(module, "capped", lambda raw, capped=module.capped: (seen.append(raw.numel()), capped(raw))[1])
    rollouts = [make_rollout(tokenizer, "2 + 3 = 5 and 2 + 3 = 5\nAnswer: B") for _ in range(8)]
    measure_rollouts(make_model(tokenizer, 2), make_model(tokenizer, 3), tokenizer, rollouts, [conversation()] * 8)
    assert max(seen) == 16 * tokenizer.vocab_size < sum(len(r.tokens) for r in rollouts) * tokenizer.vocab_size / 4
