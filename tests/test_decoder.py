"""The engine's packed forward pass is GPT's, fused or not; a conversation that goes on where a kept row ended is a fresh one."""
import pytest
import torch

from nanochat.decoder import CpuDecoder, TorchDecoder, capped_
from nanochat.engine import Engine, Request
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


def test_a_prompt_that_begins_like_a_finished_row_begins_there_and_says_the_same():
    model = make_model(n_kv_head=1)
    keeping, plain = Engine(model, ByteTokenizer(), keep_rows=2), Engine(model, ByteTokenizer())
    fed = []
    hidden = keeping.decoder.hidden
    keeping.decoder.hidden = lambda inputs, cache: fed.append(inputs.size(1)) or hidden(inputs, cache)
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
