import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nanochat.engine import Engine, Request, TextStream
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import KVCache, Prefill
from nanochat.sampling import Sampler, stream_key, uniforms

SPECIALS = ["bos", "user_start", "user_end", "assistant_start", "assistant_end", "python_start", "python_end", "output_start", "output_end"]
VOCAB = 256 + len(SPECIALS)
PYTHON_START, PYTHON_END, OUTPUT_START, OUTPUT_END = range(VOCAB - 4, VOCAB)
END = 256 + SPECIALS.index("assistant_end")


class ByteTokenizer:
    """Every byte is a token."""
    bos_id, vocab_size = 256, VOCAB

    def encode_special(self, name):
        return 256 + SPECIALS.index(name[2:-2])

    def encode(self, text):
        return list(text.encode())

    def id_to_bytes(self, id):
        return bytes([id]) if id < 256 else f"<|{SPECIALS[id - 256]}|>".encode()

    def decode(self, ids):
        return b"".join(map(self.id_to_bytes, ids)).decode(errors="replace")


class ScriptedModel(torch.nn.Module):
    """A stand-in for GPT whose greedy answer is a given token sequence, whatever the prompt says."""
    compute_dtype, device = torch.float32, torch.device("cpu")

    def __init__(self, prompt_length, script, sequence_len=256):
        super().__init__()
        self.config = GPTConfig(sequence_len, VOCAB, 1, 1, 1, 2)
        self.prompt_length, self.script = prompt_length, script

    def hidden(self, inputs, kv_cache):
        B, T = inputs.size()
        positions = kv_cache.positions(T).expand(B, T)
        kv_cache.attend(0, *(torch.zeros(B, T, 1, 2) for _ in range(3)))
        kv_cache.advance(T)
        return positions[..., None].float()

    def logits(self, hidden):
        steps = (hidden[..., 0].long() - self.prompt_length + 1).clamp(0, len(self.script) - 1)
        return torch.nn.functional.one_hot(torch.tensor(self.script)[steps], VOCAB).float() * 10


def make_model(dtype=torch.float32, n_kv_head=2, sequence_len=64, seed=0):
    torch.manual_seed(seed)
    model = GPT(GPTConfig(sequence_len, VOCAB, 2, 4, n_kv_head, 32), compute_dtype=dtype)
    for weight in model.parameters():
        torch.nn.init.normal_(weight, std=0.3)  # the head too: a fresh model is uniform, and every greedy choice a tie
    return model.eval()


@pytest.fixture(scope="module")
def model():
    return make_model()


@pytest.fixture
def engine(model):
    return Engine(model, ByteTokenizer())


def prompts(n, seed=0, longest=20):
    generator = np.random.default_rng(seed)
    return [[256, *generator.integers(0, 256, generator.integers(0, longest)).tolist()] for _ in range(n)]


def uncached_greedy(model, tokens, n):
    tokens, start = list(tokens), len(tokens)
    while len(tokens) < start + n:
        tokens.append(model(torch.tensor([tokens]))[0, -1].argmax().item())
        if tokens[-1] in (END, 256):
            break
    return tokens[start:]


# ---------------------------------------------------------------- the cache


@torch.inference_mode()
@pytest.mark.parametrize("n_kv_head", [1, 2, 4])
def test_cached_logits_are_uncached_logits_for_ragged_rows(n_kv_head):
    model = make_model(n_kv_head=n_kv_head)
    rows = [torch.randint(0, VOCAB, (40,)) for _ in range(3)]
    lengths = [3, 17, 9]
    cache, prefill = KVCache(model.config, torch.float32, "cpu"), Prefill(model.config, "cpu")
    padded = torch.zeros(3, 17, dtype=torch.int64)
    for row, length in enumerate(lengths):
        padded[row, :length] = rows[row][:length]
    first = model(padded, kv_cache=prefill)
    cache.add(prefill, [0, 1, 2], lengths)
    logits = [[first[row, length - 1]] for row, length in enumerate(lengths)]
    for step in range(20):
        inputs = torch.stack([rows[row][lengths[row] + step] for row in range(3)])[:, None]
        for row, found in enumerate(model(inputs, kv_cache=cache)[:, 0]):
            logits[row].append(found)
    for row, length in enumerate(lengths):
        expected = model(rows[row][None, :length + 20])[0, length - 1:]
        torch.testing.assert_close(torch.stack(logits[row]), expected, atol=1e-5, rtol=0)


@torch.inference_mode()
def test_feeding_several_tokens_at_once_equals_one_by_one(model):
    tokens = torch.randint(0, VOCAB, (2, 30))
    cache, prefill = KVCache(model.config, torch.float32, "cpu"), Prefill(model.config, "cpu")
    model(tokens[:, :5], kv_cache=prefill)
    cache.add(prefill, [0, 1], [5, 3])  # row 1 feeds positions 3 and 4 again
    found = model(torch.stack((tokens[0, 5:12], tokens[1, 3:10])), kv_cache=cache)
    torch.testing.assert_close(found[0], model(tokens[:1, :12])[0, 5:], atol=1e-5, rtol=0)
    torch.testing.assert_close(found[1], model(tokens[1:, :10])[0, 3:], atol=1e-5, rtol=0)


@torch.inference_mode()
def test_a_row_that_leaves_is_filled_by_the_last_and_memory_grows_in_steps(model):
    tokens = torch.randint(0, VOCAB, (1, 60))
    cache, prefill = KVCache(model.config, torch.float32, "cpu"), Prefill(model.config, "cpu")
    assert cache.memory_bytes == 0
    model(tokens[:, :10], kv_cache=prefill)
    cache.add(prefill, [0, 0, 0], [4, 5, 6])
    one_row = 2 * 2 * 64 * 2 * 8 * 4  # keys and values, layers, positions, key heads, head size, bytes
    assert cache.memory_bytes == 3 * one_row
    cache.remove(0)
    assert cache.n_rows == 2 and cache.lengths[:2].tolist() == [6, 5]
    found = model(torch.stack((tokens[0, 6:7], tokens[0, 5:6])), kv_cache=cache)[:, 0]
    expected = model(tokens[:, :7])[0]
    torch.testing.assert_close(found, expected[[6, 5]], atol=1e-5, rtol=0)
    cache.remove(1)
    cache.remove(0)
    assert cache.n_rows == 0 and cache.memory_bytes == 3 * one_row
    cache.release()
    assert cache.memory_bytes == 0


# ---------------------------------------------------------------- rows are independent


def test_greedy_generation_is_the_uncached_argmax_alone_and_in_company(model, engine):
    requests = [Request(prompt, max_new_tokens=25, temperature=0.0) for prompt in prompts(12)]
    together = engine.generate(requests)
    for request, (completion,) in zip(requests, together):
        assert completion.tokens == uncached_greedy(model, request.tokens, 25)
        assert engine.generate([request])[0][0] == completion
        assert completion.logprobs == [0.0] * len(completion.tokens)


@pytest.mark.parametrize("max_rows", [1, 3, 7, 64])
def test_samples_do_not_depend_on_how_many_rows_run_at_once(model, max_rows):
    requests = [Request(prompt, num_samples=1 + i % 5, max_new_tokens=5 + 3 * i, temperature=(0.0, 0.7, 1.0)[i % 3],
                        top_k=(None, 5)[i % 2], top_p=(None, None, 0.85, 0.5)[i % 4], seed=i) for i, prompt in enumerate(prompts(8))]
    together = Engine(model, ByteTokenizer(), max_rows=max_rows).generate(requests)
    assert [len(group) for group in together] == [request.num_samples for request in requests]
    alone = Engine(model, ByteTokenizer())
    for request, group in zip(requests, together):
        for found, expected in zip(group, alone.generate([request])[0]):
            assert found.tokens == expected.tokens and found.finish_reason == expected.finish_reason
            np.testing.assert_allclose(found.logprobs, expected.logprobs, atol=1e-4)


def test_a_smaller_group_is_the_beginning_of_a_larger_one(engine):
    request = Request([256, 1, 2], num_samples=8, max_new_tokens=10, seed=3)
    (eight,), (three,) = engine.generate([request]), engine.generate([dataclasses.replace(request, num_samples=3)])
    assert [c.tokens for c in eight[:3]] == [c.tokens for c in three]


def test_first_tokens_of_a_group_are_independent_draws(model, engine):
    prompt = [256, 5, 9]
    (group,) = engine.generate([Request(prompt, num_samples=2000, max_new_tokens=1)])
    counts = np.bincount([completion.tokens[0] for completion in group], minlength=VOCAB)
    expected = model(torch.tensor([prompt]))[0, -1].softmax(0).detach().double().numpy() * 2000
    common = expected >= 5
    chi2 = ((counts - expected) ** 2 / expected)[common].sum()
    degrees = common.sum()
    assert degrees > 20 and abs(chi2 - degrees) < 5 * np.sqrt(2 * degrees)


def test_logprobs_are_those_of_the_model_under_the_sampling_distribution(model, engine):
    prompt = [256, 7, 7, 1]
    for settings_ in ({}, {"temperature": 0.6}, {"temperature": 1.3, "top_k": 4}, {"top_p": 0.7}, {"temperature": 0.8, "top_k": 30, "top_p": 0.6}):
        ((completion,),) = engine.generate([Request(prompt, max_new_tokens=12, seed=5, **settings_)])
        logits = model(torch.tensor([prompt + completion.tokens]))[0, len(prompt) - 1:-1].double()
        for row, token, found in zip(logits, completion.tokens, completion.logprobs):
            assert found == pytest.approx(reference_logprobs(row, **settings_)[token].item(), abs=1e-5)


def reference_logprobs(logits, temperature=1.0, top_k=None, top_p=None):
    order = logits.argsort(descending=True)
    kept = order[:top_k]
    probs = (logits[kept] / temperature).softmax(0)
    if top_p is not None:
        kept = kept[:int((probs.cumsum(0) < top_p).sum()) + 1]
    result = torch.full_like(logits, -torch.inf)
    result[kept] = (logits[kept] / temperature).log_softmax(0)
    return result


# ---------------------------------------------------------------- ends


def test_the_end_token_is_kept_and_counts_as_sampled():
    ((completion,),) = Engine(ScriptedModel(2, [*b"hi", END, 65]), ByteTokenizer()).generate([Request([256, 65], temperature=0.0)])
    assert completion.tokens == [*b"hi", END] and completion.mask == [1, 1, 1]
    assert completion.finish_reason == "stop" and completion.text == "hi"


def test_truncated_rows_say_so(model, engine):
    scripted = Engine(ScriptedModel(2, [65], sequence_len=20), ByteTokenizer())
    ((short,),) = scripted.generate([Request([256, 65], temperature=0.0, max_new_tokens=5)])
    assert short.tokens == [65] * 5 and short.finish_reason == "length" and short.text == "AAAAA"
    ((full,),) = scripted.generate([Request([256, 65], temperature=0.0)])
    assert len(full.tokens) == 18 and full.finish_reason == "length"
    ((last,),) = engine.generate([Request([256] * 63, temperature=0.0)])
    assert len(last.tokens) == 1
    with pytest.raises(ValueError, match="64 tokens.*sequence_len=64.*63 tokens or fewer"):
        engine.generate([Request([256] * 64)])


def test_a_request_may_bring_its_own_stop_tokens():
    engine = Engine(ScriptedModel(1, [*b"one\ntwo"]), ByteTokenizer())
    plain, own = engine.generate([Request([256], temperature=0.0, max_new_tokens=7), Request([256], temperature=0.0, stop_ids=(10,))])
    assert plain[0].text == "one\ntwo" and own[0].text == "one" and own[0].tokens[-1] == 10


@pytest.mark.parametrize("wrong", [{"tokens": []}, {"tokens": [VOCAB]}, {"tokens": [-1]}, {"num_samples": 0}, {"max_new_tokens": 0}, {"temperature": -1.0},
                                   {"temperature": float("nan")}, {"top_k": 0}, {"top_p": 0.0}, {"top_p": 1.5}])
def test_what_cannot_be_asked_is_refused_and_leaves_the_engine_idle(engine, wrong):
    with pytest.raises(ValueError):
        engine.generate([Request([256]), Request(**{"tokens": [256], **wrong})])
    assert engine.is_idle


# ---------------------------------------------------------------- tools


def test_a_tool_call_is_answered_inside_its_row_and_masked():
    script = [PYTHON_START, *b"12*12", PYTHON_END, *b"......", END]  # what stands under the forced tokens is never said
    engine = Engine(ScriptedModel(1, script), ByteTokenizer())
    ((completion,),) = engine.generate([Request([256], temperature=0.0)])
    assert completion.tokens == [PYTHON_START, *b"12*12", PYTHON_END, OUTPUT_START, *b"144", OUTPUT_END, *b".", END]
    assert completion.mask == [1] * 7 + [0] * 5 + [1] * 2
    assert completion.text == "<|python_start|>12*12<|python_end|><|output_start|>144<|output_end|>."


def test_nothing_is_forced_when_the_expression_has_no_value_or_tools_are_off():
    for expression, tools in ((b"12*", True), (b"12*12", False)):
        script = [PYTHON_START, *expression, PYTHON_END, *b"?", END]
        ((completion,),) = Engine(ScriptedModel(1, script), ByteTokenizer(), tools=tools).generate([Request([256], temperature=0.0)])
        assert completion.tokens == script and set(completion.mask) == {1}


def test_forced_tokens_obey_the_limit():
    script = [PYTHON_START, *b"9**9", PYTHON_END, END]
    ((completion,),) = Engine(ScriptedModel(1, script), ByteTokenizer()).generate([Request([256], temperature=0.0, max_new_tokens=8)])
    assert completion.tokens[6:] == [OUTPUT_START, *b"3"] and completion.finish_reason == "length"


# ---------------------------------------------------------------- doors


def test_streaming_says_what_generate_says(engine):
    settings_ = {"max_new_tokens": 20, "temperature": 0.9, "seed": 4}
    ((completion,),) = engine.generate([Request([256, 3], **settings_)])
    assert [token for token, _ in engine.stream([256, 3], **settings_)] == completion.tokens
    for _ in engine.stream([256, 3], **settings_):
        break
    assert engine.is_idle


def test_generate_batch_returns_prompt_and_completion_with_a_mask(engine):
    sequences, masks = engine.generate_batch([256, 8, 9], num_samples=3, max_tokens=6, seed=1)
    ((completions),) = engine.generate([Request([256, 8, 9], num_samples=3, max_new_tokens=6, seed=1)])
    assert sequences == [[256, 8, 9] + c.tokens for c in completions] and masks == [[0, 0, 0] + c.mask for c in completions]


def test_a_cancelled_row_leaves_and_the_others_do_not_notice(model, engine):
    requests = [Request(prompt, max_new_tokens=15, seed=i) for i, prompt in enumerate(prompts(6))]
    expected = [group[0].tokens for group in engine.generate(requests)]
    small = Engine(model, ByteTokenizer(), max_rows=4)
    ids = [small.add(request)[0] for request in requests]
    small.step()
    assert small.cancel(ids[1]).finish_reason == "cancelled"  # in flight
    assert small.cancel(ids[5]).tokens == []  # still waiting
    assert small.cancel(ids[5]) is None
    done = {}
    while not small.is_idle:
        done.update({event.id: event.completion.tokens for event in small.step() if event.completion})
    assert done == {id: tokens for id, tokens in zip(ids, expected) if id not in (ids[1], ids[5])}


def test_rows_enter_while_others_are_in_flight(model, engine):
    early, late = (Request(prompt, max_new_tokens=12, seed=9) for prompt in prompts(2, seed=4))
    expected = [group[0].tokens for group in engine.generate([early, late])]
    (first,), said = engine.add(early), {}
    for _ in range(3):
        engine.step()
    (second,) = engine.add(late)
    while not engine.is_idle:
        said.update({event.id: event.completion.tokens for event in engine.step() if event.completion})
    assert [said[first], said[second]] == expected


def test_an_interrupted_generate_leaves_the_engine_idle(engine):
    def interrupt(*_):
        raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt):
        engine.generate([Request([256], num_samples=300, max_new_tokens=3)], on_finish=interrupt)
    assert engine.is_idle and engine.kv_cache.n_rows == 0


def test_each_completion_is_reported_once_with_its_place(engine):
    reported = {}
    results = engine.generate([Request(prompt, num_samples=2, max_new_tokens=4) for prompt in prompts(3)],
                              on_finish=lambda request, sample, completion: reported.update({(request, sample): completion}))
    assert reported == {(r, s): completion for r, group in enumerate(results) for s, completion in enumerate(group)}


# ---------------------------------------------------------------- weights


def test_a_bfloat16_engine_keeps_a_cast_copy_that_refresh_updates_in_place():
    model = make_model(torch.bfloat16)
    engine = Engine(model, ByteTokenizer())
    assert all(weight.dtype == torch.bfloat16 for weight in engine.model.parameters())
    assert all(weight.dtype == torch.float32 for weight in model.parameters())
    request = Request([256, 1, 2], max_new_tokens=20, temperature=0.0)
    before = engine.generate([request])
    places = [weight.data_ptr() for weight in engine.model.parameters()]
    with torch.no_grad():
        model.lm_head.weight.neg_()
    assert engine.generate([request]) == before
    engine.refresh()
    assert engine.generate([request]) != before
    assert places == [weight.data_ptr() for weight in engine.model.parameters()]
    torch.testing.assert_close(engine.model(torch.tensor([[256, 1]])), model(torch.tensor([[256, 1]])), atol=0, rtol=0)


def test_an_engine_whose_dtypes_agree_shares_the_weights(model, engine):
    assert engine.model is model
    engine.refresh()


# ---------------------------------------------------------------- sampling


def test_draws_are_uniform_and_differ_between_seeds_samples_and_draws():
    keys = np.array([stream_key(seed, sample) for seed in range(40) for sample in range(50)])
    assert len(set(keys.tolist())) == 2000
    numbers = np.stack([uniforms(keys, np.full(2000, draw)) for draw in range(50)])
    assert 0 <= numbers.min() and numbers.max() < 1 and len(np.unique(numbers)) == numbers.size
    counts = np.histogram(numbers, bins=100, range=(0, 1))[0]
    assert ((counts - 1000) ** 2 / 1000).sum() < 99 + 5 * np.sqrt(2 * 99)
    for other in (numbers[1:, :], numbers[:, 1:]):
        here = numbers[:-1] if other.shape[0] < 50 else numbers[:, :-1]
        assert abs(np.corrcoef(here.ravel(), other.ravel())[0, 1]) < 0.02


@pytest.mark.parametrize("vocab", [1, 7, 255, 256, 257, 1000, 8192])
def test_the_inverse_distribution_picks_what_a_plain_search_picks(vocab):
    generator = torch.Generator().manual_seed(vocab)
    logits = torch.randn(64, vocab, generator=generator) * 3
    uniform = torch.rand(64, generator=generator, dtype=torch.float64)
    uniform[:2] = torch.tensor([0.0, 1 - 2**-53])
    tokens, logprobs = Sampler([(1.0, None, None)] * 64, "cpu")(logits.clone(), uniform)
    exact = logits.double().log_softmax(1)
    edges = exact.exp().cumsum(1)
    rows = torch.arange(64)
    below = torch.where(tokens > 0, edges[rows, (tokens - 1).clamp(min=0)], 0.0)
    assert (below <= uniform + 1e-6).all() and (uniform <= edges[rows, tokens] + 1e-6).all()
    torch.testing.assert_close(logprobs, exact[rows, tokens], atol=1e-5, rtol=0)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.3, 1.0, 2.0]), st.sampled_from([None, 1, 3, 400, 1000]), st.sampled_from([None, 1e-9, 0.5, 0.99, 1.0])),
                min_size=1, max_size=6), st.integers(0, 2**31))
def test_any_mixture_of_settings_draws_each_row_as_if_alone(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), 700, generator=generator) * 2  # a nucleus may or may not fit the first 256
    logits[:, ::7] = -torch.inf
    uniform = torch.rand(len(rows), generator=generator, dtype=torch.float64)
    tokens, logprobs = Sampler(rows, "cpu")(logits.clone(), uniform)
    for row, (temperature, top_k, top_p) in enumerate(rows):
        alone = Sampler([rows[row]], "cpu")(logits[row:row + 1].clone(), uniform[row:row + 1])
        assert alone[0].item() == tokens[row].item()
        expected = 0.0 if temperature == 0 else reference_logprobs(logits[row].double(), temperature, top_k, top_p)[tokens[row]].item()
        assert logprobs[row].item() == pytest.approx(expected, abs=1e-5) and alone[1].item() == pytest.approx(expected, abs=1e-5)


def test_characters_are_held_back_until_they_are_whole():
    stream, pieces = TextStream(ByteTokenizer()), []
    for byte in "a€😀".encode():
        pieces.append(stream.add(byte))
    assert pieces == ["a", "", "", "€", "", "", "", "😀"]
    assert stream.add(0xE2) == "" and stream.flush() == "\ufffd"


def test_prompts_let_in_one_by_one_say_what_they_say_together(model):
    requests = [Request([256, *range(seed, seed + 3 + seed)], num_samples=1 + seed % 3, max_new_tokens=6, seed=seed) for seed in range(5)]
    engine = Engine(model, ByteTokenizer(), max_rows=7)
    ids, tokens, entered = {}, {}, []
    for place, request in enumerate(requests):
        ids.update((id, (place, sample)) for sample, id in enumerate(engine.add(request)))
    while not engine.is_idle:
        while events := engine.admit(1):
            entered.append(len({ids[event.id][0] for event in events}))
            for event in events:
                tokens.setdefault(ids[event.id], []).append(event.token)
        for event in engine.step():
            tokens.setdefault(ids[event.id], []).append(event.token)
    assert set(entered) == {1} and len(entered) >= len(requests)
    together = Engine(model, ByteTokenizer(), max_rows=7).generate(requests)
    assert tokens == {(place, sample): completion.tokens for place, group in enumerate(together) for sample, completion in enumerate(group)}
