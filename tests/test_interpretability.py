"""Watching changes nothing, and what is seen is what the model computed."""
import math
import sys
from pathlib import Path

import pytest
import torch

from nanochat.common import env
from nanochat.gpt import GPT, GPTConfig, norm
from nanochat.interpretability import plots
from nanochat.interpretability.attention_metrics import (SPANS, attention_metrics, entropy_of, find_options, head_statistics, measure_attention,
                                                         measure_overhead, prompt_spans)
from nanochat.interpretability.capture import Capture
from nanochat.interpretability.logit_lens import lens_metrics, lens_of_rollouts, lens_rows_of_table, lens_verdict, logit_lens
from nanochat.tokenizer import Tokenizer
from tasks.common import get_task, message_text

REAL = Path(env("NANOCHAT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")) / "aqua"
LETTERS = ["A", "B", "C", "D", "E"]
QUESTION = ("Twice a number is 14.\nWhat is the number?\n- 4=A\n- 7=B\n- 9=C\n- 2=D\n- 1=E\n"
            'Reason, then end with the line "Answer: <letter>".')


@pytest.fixture(scope="module")
def tokenizer():
    text = [f"{a} * {b} = {a * b}\nAnswer: {letter}" for a in range(20) for b in range(5) for letter in LETTERS] + [QUESTION] * 20
    return Tokenizer.train(text, 420)


def make_model(vocab_size=96, n_layer=3, n_kv_head=2, dtype=torch.float32, noise=0.15):
    model = GPT(GPTConfig(sequence_len=128, vocab_size=vocab_size, n_layer=n_layer, n_head=4, n_kv_head=n_kv_head, n_embd=32), dtype)
    model.init_weights(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(noise * torch.randn(weight.shape, generator=generator))
    return model


def ids(*shape, vocab_size=96):
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def answered(tokenizer):
    """[(ids of prompt and completion, length of the prompt)]"""
    prompt = tokenizer.render_prompt([{"role": "user", "content": QUESTION}])
    return [(prompt + tokenizer.encode(text, append="<|assistant_end|>"), len(prompt))
            for text in ("14 / 2 = 7\nAnswer: B", "Answer: C", "2 * 7 = 14 so 7\nAnswer: B")]


# ---------------------------------------------------------------------------------------------------------------------
# Capture

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_bit_equal_with_and_without_hooks(dtype):
    model, inputs = make_model(dtype=dtype), ids(2, 20)
    before = model(inputs)
    with Capture(model, residual=True) as seen:
        during = model(inputs)
        seen.attention(1)
    assert torch.equal(before, during) and torch.equal(before, model(inputs))
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_gradients_are_bit_equal_with_and_without_hooks():
    model, inputs = make_model(), ids(2, 20)
    plain = torch.autograd.grad(model(inputs, inputs), list(model.parameters()))
    with Capture(model, residual=True) as seen:
        watched = torch.autograd.grad(model(inputs, inputs), list(model.parameters()))
    assert all(torch.equal(one, other) for one, other in zip(plain, watched))
    assert not seen.q[0].requires_grad and not seen.residual[0].requires_grad


def test_hooks_leave_even_when_the_pass_fails():
    model = make_model()
    with pytest.raises(ZeroDivisionError), Capture(model):
        1 / 0
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_captured_attention_is_what_the_model_attended_with(n_kv_head, monkeypatch):
    """Against a literal attention in double precision, and through the model's own output: weights @ v is what c_proj receives."""
    model, inputs = make_model(n_kv_head=n_kv_head), ids(2, 12)
    received = {}
    for layer, block in enumerate(model.transformer.h):
        block.attn.c_v.register_forward_hook(lambda module, arguments, output, layer=layer: received.update({(layer, "v"): output}))
        block.attn.c_proj.register_forward_pre_hook(lambda module, arguments, layer=layer: received.update({(layer, "y"): arguments[0]}))
    with torch.no_grad(), Capture(model) as seen:
        model(inputs)
    for layer in range(3):
        weights = seen.attention(layer)
        assert weights.shape == (2, 4, 12, 12)
        q, k = seen.q[layer].double(), seen.k[layer].double()
        for head in range(4):
            for query in (0, 5, 11):
                scores = [float(q[1, query, head] @ k[1, key, head * n_kv_head // 4]) / math.sqrt(8) for key in range(query + 1)]
                total = sum(math.exp(score) for score in scores)
                assert weights[1, head, query].tolist() == pytest.approx([math.exp(score) / total for score in scores] + [0.0] * (11 - query), abs=1e-5)
        v = received[layer, "v"].view(2, 12, n_kv_head, 8).repeat_interleave(4 // n_kv_head, dim=2)
        torch.testing.assert_close(torch.einsum("bhqk,bkhd->bqhd", weights, v).reshape(2, 12, 32), received[layer, "y"], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(seen.attention(layer, first_query=7), weights[:, :, 7:])


def test_packed_documents_stay_hidden_from_each_other():
    model, inputs = make_model(), ids(1, 9)
    documents = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 1, 1]])
    with torch.no_grad(), Capture(model) as seen:
        model.hidden(inputs, documents=documents)
    packed = seen.attention(2)
    with torch.no_grad(), Capture(model) as seen:
        model.hidden(inputs[:, 4:])
    torch.testing.assert_close(packed[:, :, 4:, 4:], seen.attention(2), rtol=1e-4, atol=1e-5)  # rotary positions are relative
    assert (packed[:, :, 4:, :4] == 0).all()


def test_the_residual_stream_ends_in_the_model_s_own_logits():
    model, inputs = make_model(), ids(2, 12)
    with torch.no_grad(), Capture(model, queries_and_keys=False, residual=True) as seen:
        logits = model(inputs)
    assert len(seen.residual) == 4 and not seen.q
    assert torch.equal(model.logits(norm(seen.residual[-1])), logits)
    with Capture(model, residual=True) as seen:
        model(inputs[:1])
        model(inputs)
    assert len(seen.residual) == 4 and seen.residual[0].size(0) == 2  # the last pass is kept


def test_only_the_chosen_layers_are_captured():
    model = make_model()
    with Capture(model, layers=[0, -1]) as seen:
        model(ids(1, 5))
    assert sorted(seen.q) == [0, 2]
    with pytest.raises(ValueError, match=r"layer 1 was not captured, only \[0, 2\]"):
        seen.attention(1)
    with pytest.raises(ValueError, match="layer 3 does not exist: the model has 3"):
        Capture(model, layers=[3])


def test_a_pass_with_a_cache_is_refused():
    from nanochat.kv_cache import Prefill
    model = make_model()
    with pytest.raises(ValueError, match="KV cache"), Capture(model):
        model.hidden(ids(1, 5), Prefill(model.config, model.device))


def test_a_compiled_model_is_watched_while_it_runs_eagerly():
    model = make_model()
    model.compiled, model.fused_blocks = True, None  # calling the fused blocks would fail
    with Capture(model) as seen:
        model.hidden(ids(1, 5))
    assert model.compiled and sorted(seen.q) == [0, 1, 2]


# ---------------------------------------------------------------------------------------------------------------------
# Numbers

def test_a_uniform_head_has_the_entropy_log_t():
    model, T = make_model(), 16
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_q.weight.zero_()  # no query prefers any key
    with Capture(model) as seen:
        model.hidden(ids(2, T))
    weights = seen.attention(1)
    torch.testing.assert_close(entropy_of(weights), torch.log(torch.arange(1.0, T + 1)).expand(2, 4, T), rtol=1e-5, atol=1e-6)
    last = torch.zeros(2, T, dtype=torch.bool)
    last[:, -1] = True
    stats = head_statistics(weights, last, {"numbers": last})
    for name, value in {"entropy": math.log(T), "entropy_normalized": 1.0, "distance": (T - 1) / 2, "first_token": 1 / T, "agreement": 1.0,
                        "numbers": 1 / T, "uniform_numbers": 1 / T}.items():
        assert (stats[name] / 2).tolist() == pytest.approx([value] * 4, rel=1e-5), name


def test_a_head_that_looks_at_one_token_has_entropy_0():
    weights = torch.zeros(1, 2, 3, 5)
    weights[0, 0, :, 0] = weights[0, 1, :, 1] = 1.0  # two heads, two different tokens
    stats = head_statistics(weights, torch.tensor([[False, False, False, True, True]]), {})
    assert stats["entropy"].tolist() == [0.0, 0.0] and stats["first_token"].tolist() == [2.0, 0.0]
    assert stats["distance"].tolist() == [3.0 + 4.0, 2.0 + 3.0]
    assert stats["agreement"].tolist() == pytest.approx([0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("device_batch_size", [1, 2, 8])
def test_the_metrics_are_the_brute_force_ones(tokenizer, answered, device_batch_size):
    model = make_model(tokenizer.vocab_size)
    sequences, prompts = zip(*answered)
    table = measure_attention(model, tokenizer, sequences, prompts, device_batch_size=device_batch_size)
    slow, count = {}, 0
    for sequence, prompt in answered:
        spans = prompt_spans(tokenizer, sequence)
        with Capture(model) as seen:
            model.hidden(torch.tensor([sequence]))
        count += len(sequence) - prompt
        for layer in range(3):
            for head in range(4):
                for query in range(prompt - 1, len(sequence) - 1):
                    row = seen.attention(layer)[0, head, query].tolist()
                    entropy = -sum(w * math.log(w) for w in row if w > 0)
                    found = {"entropy": entropy, "entropy_normalized": entropy / math.log(query + 1), "first_token": row[0],
                             "distance": sum(w * (query - key) for key, w in enumerate(row))}
                    for name in SPANS:
                        found[name] = sum(w for key, w in enumerate(row) if spans[name][key])
                        found[f"uniform_{name}"] = sum(spans[name][:query + 1]) / (query + 1)
                    for name, value in found.items():
                        slow.setdefault(name, torch.zeros(3, 4, dtype=torch.float64))[layer, head] += value
    assert set(slow) == set(table) - {"agreement"}
    for name, value in slow.items():
        torch.testing.assert_close(table[name], value / count, rtol=1e-4, atol=1e-5)
    assert (table["agreement"] > 0).all() and (table["agreement"] < 1).all()


def test_the_names_of_the_metrics(tokenizer, answered):
    model = make_model(tokenizer.vocab_size)
    sequences, prompts = zip(*answered)
    table = measure_attention(model, tokenizer, sequences, prompts)
    metrics = attention_metrics(model, tokenizer, sequences, prompts)
    for name in ("entropy", "entropy_normalized", "distance", "first_token", "agreement", *SPANS):
        assert metrics[f"attn/{name}_mean"] == pytest.approx(table[name].mean().item())
        for layer in range(3):
            assert metrics[f"attn/{name}_layer/{layer}"] == pytest.approx(table[name][layer].mean().item())
    assert metrics["attn/uniform_options_mean"] > 0 and "attn/uniform_options_layer/0" not in metrics
    last = attention_metrics(model, tokenizer, sequences, prompts, layers=[-1])
    assert last["attn/entropy_layer/2"] == pytest.approx(metrics["attn/entropy_layer/2"]) and "attn/entropy_layer/0" not in last
    with pytest.raises(ValueError, match="0 completion tokens"):
        attention_metrics(model, tokenizer, [sequences[0][:5]], [5])


def test_spans_of_a_rendered_prompt(tokenizer, answered):
    sequence, prompt = answered[0]
    spans = prompt_spans(tokenizer, sequence)

    def text_of(name):
        return tokenizer.decode([token for token, inside in zip(sequence, spans[name]) if inside])

    assert text_of("question") == "Twice a number is 14.\nWhat is the number?\n"
    assert text_of("options") == "- 4=A\n- 7=B\n- 9=C\n- 2=D\n- 1=E\n"
    assert text_of("numbers").replace(" ", "") == "14" + "47921" + "1427"
    assert [len(mask) for mask in spans.values()] == [len(sequence)] * 3


def test_spans_where_there_are_no_options(tokenizer):
    prompt = tokenizer.render_prompt([{"role": "user", "content": "first 1"}, {"role": "assistant", "content": "yes"}, {"role": "user", "content": "- and 7=A"}])
    spans = prompt_spans(tokenizer, prompt)
    assert not any(spans["options"]) and sum(spans["numbers"]) == 2
    assert tokenizer.decode([token for token, inside in zip(prompt, spans["question"]) if inside]) == "- and 7=A"
    assert not any(any(mask) for mask in prompt_spans(tokenizer, tokenizer.encode("words")).values())
    assert find_options(b"q\n- x=A\n- y=B\nq\n- 1=A\n- 2=B\n- 3=C") == (16, 33)  # the last block counts
    assert find_options(b"- x=A\n- y=C") is None


def test_the_spans_of_a_real_task(tokenizer):
    for conversation in get_task("algebra", split="train", stop=20):
        check_spans(tokenizer, conversation)


@pytest.mark.skipif(not (REAL / "validation.jsonl").is_file(), reason="the real AQuA files are not here")
def test_the_spans_of_every_real_aqua_question(tokenizer):
    for conversation in get_task("AQUA", split="validation", data_dir=REAL):
        check_spans(tokenizer, conversation)


def check_spans(tokenizer, conversation):
    prompt = tokenizer.render_for_completion(conversation)
    spans = prompt_spans(tokenizer, prompt)
    question, options = (tokenizer.decode([token for token, inside in zip(prompt, spans[name]) if inside]) for name in ("question", "options"))
    assert message_text(conversation["messages"][0]).startswith(question + options)
    assert [line[-1] for line in options.split("\n") if line] == conversation["letters"]


def test_the_overhead_is_three_times_in_seconds(tokenizer, answered):
    sequences, prompts = zip(*answered)
    seconds = measure_overhead(make_model(tokenizer.vocab_size), tokenizer, sequences, prompts, repeats=2)
    assert list(seconds) == ["plain_s", "hooked_s", "metrics_s"] and all(0 < value < 60 for value in seconds.values())


# ---------------------------------------------------------------------------------------------------------------------
# Logit lens

def lens_arguments(tokenizer, answered):
    sequences = [sequence for sequence, _ in answered]
    return sequences, [len(sequence) - 3 for sequence in sequences], LETTERS, [tokenizer.encode(f" {letter}")[0] for letter in LETTERS]


def test_the_lens_at_every_depth_is_the_model_cut_there(tokenizer, answered):
    """Brute force: the first blocks of the model as a model of their own, one sequence at a time."""
    model = make_model(tokenizer.vocab_size)
    sequences, positions, letters, letter_ids = lens_arguments(tokenizer, answered)
    lens = logit_lens(model, sequences, positions, letters, letter_ids, ["B", "C", "A"], device_batch_size=2)
    assert lens.probs.shape == lens.ranks.shape == (3, 4, 5) and lens.mass.shape == (3, 4)
    blocks = list(model.transformer.h)
    for depth in range(4):
        model.transformer.h = torch.nn.ModuleList(blocks[:depth])
        for row, (sequence, position) in enumerate(zip(sequences, positions)):
            with torch.no_grad():
                logits = model(torch.tensor([sequence]))[0, position]
            torch.testing.assert_close(lens.probs[row, depth], torch.softmax(logits[letter_ids], dim=0), rtol=1e-4, atol=1e-6)
            assert float(lens.mass[row, depth]) == pytest.approx(float(torch.softmax(logits, dim=0)[letter_ids].sum()), rel=1e-4)
            assert lens.ranks[row, depth].tolist() == [int((logits > logits[letter]).sum()) for letter in letter_ids]
    model.transformer.h = torch.nn.ModuleList(blocks)
    assert lens.right.tolist() == [1, 2, 0] and lens.final.tolist() == lens.probs[:, -1].argmax(dim=-1).tolist()
    assert torch.equal(lens.of(lens.right, lens.probs)[1], lens.probs[1, :, 2])


def test_the_lens_leaves_logits_bit_equal(tokenizer, answered):
    model, inputs = make_model(tokenizer.vocab_size), ids(2, 20)
    before = model(inputs)
    logit_lens(model, *lens_arguments(tokenizer, answered), ["B", "C", "A"])
    assert torch.equal(before, model(inputs)) and not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_a_letter_appears_where_it_begins_to_lead_for_good(monkeypatch):
    """Depth by depth the best letter is: A B B C | B A B B | C C C C | and the right one is B."""
    from nanochat.interpretability import logit_lens as module
    best = torch.tensor([[0, 1, 1, 2], [1, 0, 1, 1], [2, 2, 2, 2]])
    monkeypatch.setattr(module, "lens_rows", lambda model, sequences, positions, letter_ids: (
        torch.nn.functional.one_hot(best, 5).float(), torch.ones(3, 4), torch.arange(5).expand(3, 4, 5)))
    lens = logit_lens(None, [[0]] * 3, [0] * 3, LETTERS, [], ["B", "B", "B"])
    assert lens.appears.tolist() == [-1, 2, -1] and lens.settles.tolist() == [3, 2, 0] and lens.final.tolist() == [2, 1, 2]
    metrics = lens_metrics(lens)
    assert metrics["lens/found_share"] == pytest.approx(1 / 3) and metrics["lens/appears_median"] == 2 and metrics["lens/settles_median"] == 2
    for name, wanted in {"share_right": [1 / 3, 1 / 3, 2 / 3, 1 / 3], "prob_right": [1 / 3, 1 / 3, 2 / 3, 1 / 3], "prob_final": [2 / 3, 1 / 3, 2 / 3, 1],
                         "rank_right": [1] * 4}.items():
        assert [metrics[f"lens/layer_{depth}/{name}"] for depth in range(4)] == pytest.approx(wanted), name
    assert lens_rows_of_table(lens)[2] == ("2", "67%", "0.667", "0.667", "1", "2", "1.000", "1", "1")
    assert lens_verdict(lens) == "The right letter leads in the end at 1 of 3 decision points; the median of them has it for good after block 2 of 3"


def test_a_training_log_gets_the_lens_of_the_rollouts_that_reached_a_letter(tokenizer, answered):
    from types import SimpleNamespace

    from nanochat.rl.letter_metrics import decision_point
    model = make_model(tokenizer.vocab_size)
    rollouts = [SimpleNamespace(prompt=sequence[:prompt], tokens=sequence[prompt:]) for sequence, prompt in answered]
    rollouts.insert(1, SimpleNamespace(prompt=rollouts[0].prompt, tokens=tokenizer.encode("7")))
    sequences, positions, letters, letter_ids = lens_arguments(tokenizer, answered)
    metrics = lens_of_rollouts(model, rollouts, [{"answer_letter": letter} for letter in "BDCB"], lambda rollout: decision_point(tokenizer, rollout.tokens),
                               dict(zip(letters, letter_ids)))
    assert metrics == lens_metrics(logit_lens(model, sequences, positions, letters, letter_ids, ["B", "C", "B"]))
    assert {f"lens/layer_{depth}/prob_right" for depth in range(4)} <= set(metrics)
    assert lens_of_rollouts(model, rollouts[1:2], [{"answer_letter": "B"}], lambda rollout: None, {"B": 5}) == {}


def test_the_lens_says_what_it_misses(tokenizer, answered):
    sequences, positions, letters, letter_ids = lens_arguments(tokenizer, answered)
    with pytest.raises(ValueError, match="3 sequences, 3 positions and 1 answers"):
        logit_lens(None, sequences, positions, letters, letter_ids, ["A"])
    with pytest.raises(ValueError, match=r"\['F'\] are not among the 5 letters ABCDE"):
        logit_lens(None, sequences, positions, letters, letter_ids, ["A", "F", "B"])


# ---------------------------------------------------------------------------------------------------------------------
# Pictures

def png_size(path):
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_pictures_are_written(tokenizer, answered, tmp_path):
    model = make_model(tokenizer.vocab_size)
    sequence, prompt = answered[2]
    paths = plots.save_attention_pictures(model, tokenizer, sequence, prompt, tmp_path, layers=[0, 2], max_queries=6)
    assert [path.name for path in paths] == ["attention_layer_0.png", "attention_layer_2.png"]
    assert all(min(png_size(path)) > 300 for path in paths)
    (narrow,) = plots.save_attention_pictures(model, tokenizer, sequence, prompt, tmp_path / "narrow", layers=[0], max_queries=4, max_keys=8)
    assert png_size(narrow)[0] < png_size(paths[0])[0]
    sequences, prompts = zip(*answered)
    plots.plot_heads(measure_attention(model, tokenizer, sequences, prompts), tmp_path / "heads.png")
    plots.plot_lens(logit_lens(model, *lens_arguments(tokenizer, answered), ["B", "C", "B"]), tmp_path / "lens.png")
    assert min(png_size(tmp_path / "heads.png") + png_size(tmp_path / "lens.png")) > 200


def test_labels_are_visible_short_and_harmless(tokenizer):
    labels = plots.token_labels(tokenizer, [tokenizer.bos_id, *tokenizer.encode("$ 7\n"), *tokenizer.encode("\x1b\x00")])
    assert labels[0] == "bos" and "".join(labels[1:]) == r"\$·7⏎??"


def test_without_treescope_the_error_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "treescope", None)  # importing it fails, installed or not
    with pytest.raises(ValueError, match="pip install treescope"):
        plots.write_treescope(torch.zeros(2), tmp_path / "x.html")


def test_treescope_writes_one_html_file(tmp_path):
    pytest.importorskip("treescope")
    plots.write_treescope({"attention": torch.rand(2, 4, 4)}, tmp_path / "x.html")
    assert "<script" in (tmp_path / "x.html").read_text()
