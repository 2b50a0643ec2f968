"""The engine's forward pass is GPT's, and knows no company; a conversation that goes on where a kept row ended is a fresh one."""
import os

import pytest
import torch

from nanochat.decoder import CpuDecoder, TorchDecoder, capped_
from nanochat.engine import Engine, Request
from nanochat.gpt import GPT, GPTConfig
from nanochat.kv_cache import Prefill
from nanochat.sampling import Sampler, largest
from nanochat.vocab_loss import capped
from tests.test_engine import VOCAB, ByteTokenizer, make_model


def assert_same_as_the_model(make, n_kv_head, rows, dtype=torch.float32, atol=1e-5):
    model = make_model(n_kv_head=n_kv_head, dtype=dtype)
    decoder = make(Engine(model, ByteTokenizer()).model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, VOCAB, (rows, 40), generator=generator)
    lengths = [3 + 5 * row % 14 for row in range(rows)]
    with torch.inference_mode():
        expected = model(ids)
        cache, prefill = decoder.new_cache(), Prefill(model.config, "cpu")
        hidden = decoder.hidden(ids[:, :max(lengths)], prefill)
        cache.add(prefill, list(range(rows)), lengths)
        for row, length in enumerate(lengths):
            torch.testing.assert_close(capped_(decoder.raw_logits(hidden[row, :length])), expected[row, :length], atol=atol, rtol=0)
        for step in range(12):
            fed = torch.tensor([length + step for length in lengths])
            hidden = decoder.hidden(ids[torch.arange(rows), fed][:, None], cache)[:, 0]
            torch.testing.assert_close(capped_(decoder.raw_logits(hidden)), expected[torch.arange(rows), fed], atol=atol, rtol=0)


@pytest.mark.parametrize("make", [CpuDecoder, TorchDecoder])
@pytest.mark.parametrize("n_kv_head, rows", [(1, 1), (2, 3), (4, 9), (2, 40)])
def test_the_engine_s_forward_pass_is_the_model_s(make, n_kv_head, rows):
    assert_same_as_the_model(make, n_kv_head, rows)


@torch.inference_mode()
@pytest.mark.parametrize("n_embd, n_head, n_kv_head", [(64, 2, 1), (128, 2, 2), (256, 2, 1), (96, 2, 2), (36, 6, 3), (10, 1, 1)])
def test_heads_of_any_even_size_and_rows_of_several_tokens(n_embd, n_head, n_kv_head):
    torch.manual_seed(0)
    model = GPT(GPTConfig(200, 71, 2, n_head, n_kv_head, n_embd))
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, std=0.05 if name == "lm_head.weight" else 0.3)
    decoder, ids = CpuDecoder(model.requires_grad_(False)), torch.randint(0, 71, (3, 150))
    cache, prefill = decoder.new_cache(), Prefill(model.config, "cpu", lengths=[100, 30, 57])
    first = decoder.hidden(ids[:, :100], prefill)
    cache.add(prefill, [0, 1, 2], [100, 30, 57])
    more = decoder.hidden(torch.stack([ids[0, 100:140], ids[1, 30:70], ids[2, 57:97]]), cache)
    expected = model(ids)
    for row, length in enumerate((100, 30, 57)):
        found = capped_(decoder.raw_logits(torch.cat((first[row, :length], more[row]))))
        torch.testing.assert_close(found, expected[row, :length + 40], atol=2e-5, rtol=0)




@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_completion_is_the_same_in_any_company_on_any_number_of_threads(dtype):
    model = make_model(dtype=dtype, n_kv_head=2)
    prompts = [[256, *range(seed, seed + 3 + 5 * seed)] for seed in range(8)]
    requests = [Request(prompt, num_samples=1 + seed % 4, max_new_tokens=8 + seed, temperature=seed % 3 / 2, seed=seed) for seed, prompt in enumerate(prompts)]
    threads = torch.get_num_threads()
    try:
        together = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            together.append(Engine(model, ByteTokenizer()).generate(requests))
    finally:
        torch.set_num_threads(threads)
    assert together[0] == together[1]
    assert together[0] == together[2]
    for max_rows in (1, 3):  # samples that wait for a place, too
        assert Engine(model, ByteTokenizer(), max_rows).generate(requests) == together[0]
    assert [Engine(model, ByteTokenizer()).generate([request])[0] for request in requests] == together[0]


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_s_logits_are_the_same_to_the_bit_in_any_company(dtype):
    model = make_model(dtype=dtype)
    decoder, ids = CpuDecoder(Engine(model, ByteTokenizer()).model), torch.randint(0, VOCAB, (40, 30))
    lengths = [1 + 7 * row % 19 for row in range(40)]
    found = {}
    for rows in ([0], [3], range(5), range(13), range(40), [39, 3, 0]):
        cache, prefill = decoder.new_cache(), Prefill(model.config, "cpu", lengths=[lengths[row] for row in rows])
        taken = ids[list(rows)]
        hidden = [decoder.hidden(taken[:, :max(prefill.lengths)], prefill)]
        cache.add(prefill, list(range(len(rows))), prefill.lengths)
        hidden += [decoder.hidden(taken[:, 20 + step:21 + step], cache) for step in range(5)]
        for place, row in enumerate(rows):
            logits = decoder.raw_logits(torch.cat([hidden[0][place, :lengths[row]], *(part[place] for part in hidden[1:])]))
            assert torch.equal(found.setdefault(row, logits), logits), (rows, row)


@torch.inference_mode()
def test_a_shared_prompt_is_read_as_one_s_own_to_the_bit_and_takes_the_room_of_one():
    model = make_model()
    decoder, ids = CpuDecoder(model), torch.randint(0, VOCAB, (1, 41))
    sharing, own = decoder.new_cache(), decoder.new_cache()
    for length in (7, 8):  # odd and even: sums run over pairs of positions
        prefill = Prefill(model.config, "cpu", lengths=[length, 3])
        decoder.hidden(torch.stack((ids[0, :length], ids[0, :length])), prefill)
        first = sharing.n_rows
        sharing.add(prefill, [0, 0, 0], [length] * 3)
        for _ in range(3):
            own.add(prefill, [0, 1], [length, 3])   # another source between them: nobody shares
            own.remove(own.n_rows - 1)
        assert sharing.starts[first] == length and not own.starts.any()
    assert sharing.memory_bytes <= own.memory_bytes
    fed = [ids[0, :length].tolist() for length in sharing.lengths[:6]]
    for step in range(30):
        new = ids[0, torch.tensor([[(5 * row + step) % 41] for row in range(len(fed))])]
        hidden = decoder.hidden(new, sharing)
        assert torch.equal(hidden, decoder.hidden(new, own)), step
        for row, (tokens, token) in enumerate(zip(fed, new[:, 0].tolist())):
            tokens.append(token)
            torch.testing.assert_close(capped_(decoder.raw_logits(hidden[row])), model(torch.tensor([tokens]))[0, -1:], atol=1e-5, rtol=0)
        if step in (5, 11):  # rows leave, and what they held comes back as a prompt of its own, as a kept row does
            for cache in (sharing, own):
                held = cache.row(1)
                cache.remove(0)
                cache.add(held, [0], [int(held.keys[0].size(1))])
            fed = [fed[5], *fed[1:5], list(fed[1])]


def test_a_pass_beyond_the_memory_is_refused():
    model = make_model(sequence_len=16)
    decoder = CpuDecoder(model)
    cache, prefill = decoder.new_cache(), Prefill(model.config, "cpu", lengths=[3])
    decoder.hidden(torch.zeros(1, 3, dtype=torch.int64), prefill)
    cache.add(prefill, [0], [3])
    cache.lengths[0] = 40
    with pytest.raises(ValueError, match="positions up to 40 do not fit"):
        decoder.hidden(torch.zeros(1, 1, dtype=torch.int64), cache)


def test_a_forked_process_has_threads_of_its_own():
    engine = Engine(make_model(), ByteTokenizer())
    request = Request([256, *range(40)], num_samples=30, max_new_tokens=5)
    expected = engine.generate([request])
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        os.write(write, b"same" if engine.generate([request]) == expected else b"else")
        os._exit(0)
    assert os.read(read, 4) == b"same"
    os.waitpid(child, 0)


@pytest.mark.parametrize("make", [CpuDecoder, TorchDecoder])
def test_in_bfloat16_it_stays_as_near_as_rounding_allows(make):
    assert_same_as_the_model(make, 2, 9, dtype=torch.bfloat16, atol=0.25)


def test_new_weights_arrive_with_refresh():
    model = make_model()
    engine = Engine(model, ByteTokenizer())
    request = Request([256, 1, 2], max_new_tokens=20, num_samples=3)
    engine.generate([request])
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.1)
    engine.refresh()
    fresh = Engine(model, ByteTokenizer())
    assert engine.generate([request]) == fresh.generate([request])


def test_the_cap_and_the_largest_are_those_of_the_plain_way():
    raw = torch.randn(5, 1024, generator=torch.Generator().manual_seed(0)) * 20
    raw[2, 300] = raw[2, 700] = 100.0  # a tie: the first counts
    assert largest(raw).tolist() == raw.argmax(dim=1).tolist()
    torch.testing.assert_close(capped_(raw.clone()), capped(raw), atol=4e-6, rtol=0)
    uniform = torch.linspace(0.05, 0.95, 5, dtype=torch.float64)
    for settings in ((0.0, None, None), (0.7, None, None), (0.7, 5, None), (1.3, 40, 0.8), (1.0, None, 0.8)):
        one, other = Sampler([settings] * 5, "cpu", capped_)(raw.clone(), uniform), Sampler([settings] * 5, "cpu")(capped(raw), uniform)
        if settings[0]:
            assert one[0].tolist() == other[0].tolist()
            torch.testing.assert_close(one[1], other[1], atol=2e-5, rtol=0)


SETTINGS = [(0.0, None, None), (1.0, None, None), (0.7, None, None), (0.7, 5, None), (1.3, 40, 0.8), (1.0, None, 0.8), (2.0, None, 0.999), (1e-9, 3, 0.5)]


@pytest.mark.parametrize("vocab", [1, 3, 71, 1000, 4096])
def test_rust_and_pytorch_draw_the_same_tokens(vocab):
    """Uniforms keep clear of the edges between tokens, where rounding may decide."""
    generator = torch.Generator().manual_seed(vocab)
    settings = SETTINGS * 40
    raw = torch.randn(len(settings), vocab + 5, generator=generator) * 8
    uniform = torch.rand(len(settings), generator=generator, dtype=torch.float64)
    sampler = CpuDecoder(GPT(GPTConfig(8, 80, 1, 1, 1, 4))).sampler(settings)
    tokens, logprobs = sampler(raw.clone()[:, :vocab], uniform.numpy())
    plain = Sampler(settings, "cpu", capped_)
    below, (expected, expected_logprobs), above = (plain(raw.clone()[:, :vocab], (uniform + step).clamp(0, 1 - 1e-9)) for step in (-1e-5, 0.0, 1e-5))
    compared = 0
    for row, found in enumerate(tokens):
        if below[0][row] == expected[row] == above[0][row]:
            assert found == expected[row], (settings[row], found, expected[row])
            assert logprobs[row] == pytest.approx(float(expected_logprobs[row]), abs=2e-5)
            compared += 1
    assert compared > 0.97 * len(settings)


def test_a_draw_knows_no_company_and_no_threads():
    raw = torch.randn(len(SETTINGS), 3000, generator=torch.Generator().manual_seed(0)) * 8
    uniform, decoder = torch.linspace(0.03, 0.97, len(SETTINGS), dtype=torch.float64).numpy(), CpuDecoder(GPT(GPTConfig(8, 80, 1, 1, 1, 4)))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        together = decoder.sampler(SETTINGS)(raw.clone(), uniform)
        torch.set_num_threads(1)
        alone = [decoder.sampler([settings])(raw[row:row + 1].clone(), uniform[row:row + 1]) for row, settings in enumerate(SETTINGS)]
    finally:
        torch.set_num_threads(threads)
    assert together == tuple(map(list, zip(*((token, logprob) for (token,), (logprob,) in alone))))


def test_logits_that_are_no_numbers_are_told_whatever_the_settings():
    model = make_model()
    engine = Engine(model, ByteTokenizer())
    with torch.no_grad():
        model.lm_head.weight[7, 0] = torch.nan
    engine.refresh()
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="not finite"):
            engine.generate([Request([256, 1], max_new_tokens=2, temperature=temperature)])


def test_a_prompt_that_begins_like_a_finished_row_begins_there_and_says_the_same():
    model = make_model(n_kv_head=1)
    keeping, plain = Engine(model, ByteTokenizer(), keep_rows=2), Engine(model, ByteTokenizer())
    fed = []
    of_prompts, of_next = keeping.decoder.prompts_raw_logits, keeping.decoder.next_tokens
    keeping.decoder.prompts_raw_logits = lambda prompts, prefill: fed.append(len(prompts[0])) or of_prompts(prompts, prefill)
    keeping.decoder.next_tokens = lambda *asked: fed.append(1) or of_next(*asked)
    prompt = [256, *range(10)]
    for turn, new in enumerate(([], [3, 4, 5], [7], [])):  # the last turn asks the same again
        prompt = prompt + new
        request = Request(prompt, max_new_tokens=6, seed=turn)
        fed.clear()
        ((found,),), ((expected,),) = keeping.generate([request]), plain.generate([request])
        assert found.tokens == expected.tokens
        torch.testing.assert_close(torch.tensor(found.logprobs), torch.tensor(expected.logprobs), atol=1e-5, rtol=0)
        # the first turn feeds all of its prompt; the others their news and the answer's last token, which no row holds yet
        assert fed[0] == {0: 11, 1: len(new) + 1, 2: len(new) + 1, 3: 1}[turn], (turn, fed)
        if turn < 2:
            prompt = prompt + found.tokens
    keeping.generate([Request([256, 99], max_new_tokens=3)])  # shares the first token only
    assert fed[-3:] == [1, 1, 1] and len(keeping.kept) == 2
    keeping.refresh()
    assert not keeping.kept, "keys and values of old weights"


def test_a_cancelled_row_can_be_gone_on_with():
    engine = Engine(make_model(), ByteTokenizer(), keep_rows=1)
    (id,) = engine.add(Request([256, 1, 2, 3], max_new_tokens=30))
    for _ in range(4):
        engine.step()
    said = engine.cancel(id).tokens
    (tokens, prefill), = engine.kept
    assert tokens == [256, 1, 2, 3, *said[:-1]] and prefill.keys[0].size(1) == len(tokens)
