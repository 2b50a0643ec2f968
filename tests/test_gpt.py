"""The model is causal, starts as documented, computes what Hugging Face's NanoChatForCausalLM computes; its loss is the cross-entropy."""
import math

import pytest
import torch
import torch.nn.functional as F

from nanochat.flash_attention import attend
from nanochat.gpt import GPT, GPTConfig, config_from_depth
from nanochat.vocab_loss import SOFTCAP, chunk_gradient, chunk_logprobs, entropies, summed_loss, target_logprobs


def noisy_model(**sizes):
    """A model whose zero-initialised matrices are not zero, so that every part of it matters."""
    config = GPTConfig(**{"sequence_len": 32, "vocab_size": 96, "n_layer": 2, "n_head": 4, "n_kv_head": 2, "n_embd": 32, **sizes})
    model = GPT(config)
    model.init_weights(seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return model


def ids(*shape, vocab_size=96, seed=3):
    return torch.randint(0, vocab_size, shape, generator=torch.Generator().manual_seed(seed))


def test_a_position_does_not_see_what_follows_it():
    model, inputs = noisy_model(), ids(1, 16)
    changed = inputs.clone()
    changed[0, 10:] = ids(1, 6, seed=4)
    with torch.no_grad():
        torch.testing.assert_close(model(inputs)[0, :10], model(changed)[0, :10], rtol=0, atol=1e-6)
        assert not torch.allclose(model(inputs)[0, 10:], model(changed)[0, 10:])


def test_the_untrained_model_is_the_uniform_distribution():
    model = GPT(config_from_depth(2, 96, 32, head_dim=32))
    model.init_weights()
    assert model(ids(2, 16), ids(2, 16, seed=5)).item() == pytest.approx(math.log(96), abs=1e-6)
    assert float(model.entropy(ids(2, 16), ids(2, 16))[0, 0]) == pytest.approx(math.log(96), abs=1e-5)


def test_weights_start_with_the_documented_spread():
    model = GPT(config_from_depth(4, 512, 32, head_dim=64))
    model.init_weights()
    block = model.transformer.h[1]
    assert float(model.transformer.wte.weight.std()) == pytest.approx(1.0, rel=0.02)
    assert float(block.attn.c_q.weight.std()) == pytest.approx(1 / math.sqrt(256), rel=0.02)
    assert float(block.mlp.c_fc.weight.std()) == pytest.approx(1 / math.sqrt(256), rel=0.02)  # wide: min(1, sqrt(out / in)) = 1
    assert float(block.attn.c_proj.weight.abs().max()) == float(block.mlp.c_proj.weight.abs().max()) == 0.0
    assert float(model.lm_head.weight.abs().max()) == 0.0


def test_the_published_sizes_of_the_depth_dial():
    # nanochat's own numbers: d8 has 92,274,688 parameters and d20 about 561 million at a vocabulary of 65,536
    with torch.device("meta"):
        assert GPT(config_from_depth(8, 65536, 2048)).num_params() == 92_274_688
        assert GPT(config_from_depth(20, 65536, 2048)).num_params() == 560_988_160
    assert config_from_depth(20, 65536, 2048).n_head == 10
    assert config_from_depth(5, 65536, 2048).n_head == 4  # 320 channels are not three even heads
    with pytest.raises(ValueError, match="even head size"):
        GPTConfig(n_embd=30, n_head=4)
    with pytest.raises(ValueError, match="multiple of n_kv_head=4"):
        GPTConfig(n_embd=96, n_head=6, n_kv_head=4)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_the_chunked_loss_is_the_cross_entropy_and_so_is_its_gradient(reduction, monkeypatch):
    monkeypatch.setattr("nanochat.vocab_loss.CHUNK_NUMBERS", {"cpu": 96 * 16})  # several chunks, the last one ragged
    model, inputs, targets = noisy_model(), ids(3, 13), ids(3, 13, seed=6)
    targets[0, :5] = -1
    reference = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten(), ignore_index=-1, reduction=reduction)
    ours = model(inputs, targets, loss_reduction=reduction)
    torch.testing.assert_close(ours.flatten(), reference.flatten(), rtol=1e-5, atol=1e-5)
    weights = torch.linspace(0.5, 1.5, ours.numel()).view(ours.shape)  # another weight on every token's loss
    expected = torch.autograd.grad((reference.view(ours.shape) * weights).sum(), list(model.parameters()))
    found = torch.autograd.grad((ours * weights).sum(), list(model.parameters()))
    for one, other in zip(found, expected):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_gradient_of_a_logprob_at_a_temperature_agrees_with_finite_differences():
    raw = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 4
    targets, outer = torch.tensor([0, 3, 6]), torch.tensor([1.0, -2.0, 0.5])
    step = 1e-3
    for temperature in (1.0, 0.7):
        gradient = chunk_gradient(raw, targets, chunk_logprobs(raw, targets, temperature)[1], outer, temperature)
        for index in [(0, 0), (0, 5), (1, 3), (2, 1)]:
            bump = torch.zeros_like(raw)
            bump[index] = step
            up, down = (float((outer * chunk_logprobs(raw + sign * bump, targets, temperature)[0]).sum()) for sign in (1, -1))
            assert float(gradient[index]) == pytest.approx((up - down) / (2 * step), abs=3e-3)


def test_logprobs_are_those_of_the_scaled_and_capped_softmax():
    model, inputs, targets = noisy_model(), ids(2, 9), ids(2, 9, seed=7)
    targets[1, 2] = -1
    expected = torch.log_softmax(model(inputs) / 0.7, dim=-1).gather(2, targets.clamp(min=0)[..., None])[..., 0]
    expected[1, 2] = 0
    torch.testing.assert_close(model.logprobs(inputs, targets, temperature=0.7), expected, rtol=1e-5, atol=1e-5)
    assert float(model(inputs).abs().max()) < SOFTCAP


def test_entropy_is_that_of_the_whole_vocabulary():
    hidden, weight = torch.randn(5, 8), torch.randn(40, 8)
    logits = SOFTCAP * torch.tanh(hidden @ weight.T / SOFTCAP)
    torch.testing.assert_close(entropies(hidden, weight), torch.distributions.Categorical(logits=logits).entropy(), rtol=1e-4, atol=1e-5)


def test_memory_for_the_vocabulary_does_not_grow_with_the_number_of_tokens(monkeypatch):
    """The largest tensor made on the way is a chunk, whatever the number of rows."""
    monkeypatch.setattr("nanochat.vocab_loss.CHUNK_NUMBERS", {"cpu": 512 * 16})
    largest = []
    real = F.linear
    monkeypatch.setattr(F, "linear", lambda *a: largest.append(real(*a)) or largest[-1])
    hidden, weight, targets = torch.randn(1000, 8), torch.randn(512, 8, requires_grad=True), torch.zeros(1000, dtype=torch.int64)
    summed_loss(hidden, weight, targets).backward()
    target_logprobs(hidden, weight, targets).sum().backward()
    assert max(tensor.numel() for tensor in largest) == 512 * 16


@pytest.mark.parametrize("n_kv_head", [4, 2])
def test_hugging_face_computes_the_same_logits(n_kv_head):
    transformers = pytest.importorskip("transformers")
    model = noisy_model(n_kv_head=n_kv_head)
    config = model.config
    theirs = transformers.NanoChatForCausalLM(transformers.NanoChatConfig(
        vocab_size=config.vocab_size, hidden_size=config.n_embd, intermediate_size=4 * config.n_embd, num_hidden_layers=config.n_layer,
        num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head, max_position_embeddings=config.sequence_len,
        final_logit_softcapping=15.0, rope_parameters={"rope_type": "default", "rope_theta": 10000.0}))
    parts = {"attn.c_q": "self_attn.q_proj", "attn.c_k": "self_attn.k_proj", "attn.c_v": "self_attn.v_proj",
             "attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}
    weights = {"model.embed_tokens.weight": model.transformer.wte.weight, "lm_head.weight": model.lm_head.weight}
    for name, weight in model.transformer.h.named_parameters():
        layer, part = name.removesuffix(".weight").split(".", 1)
        weights[f"model.layers.{layer}.{parts[part]}.weight"] = weight
    theirs.load_state_dict(weights, strict=True)
    with torch.no_grad():
        torch.testing.assert_close(theirs(ids(2, 20)).logits, model(ids(2, 20)), rtol=0, atol=2e-6)


def test_one_golden_step_pins_loss_and_gradient_norm():
    model, inputs = noisy_model(), ids(4, 24)
    loss = model(inputs[:, :-1], inputs[:, 1:])
    loss.backward()
    norm = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm()
    assert loss.item() == pytest.approx(GOLDEN_LOSS, abs=5e-4)
    assert float(norm) == pytest.approx(GOLDEN_NORM, abs=5e-4)


GOLDEN_LOSS, GOLDEN_NORM = 4.7435, 0.9638


def test_too_long_an_input_names_both_lengths():
    with pytest.raises(ValueError, match="33 tokens do not fit sequence_len=32"):
        noisy_model()(ids(1, 33))


def test_documents_packed_into_a_row_do_not_see_each_other():
    model, first, second = noisy_model(), ids(1, 7), ids(1, 9, seed=8)
    documents = torch.tensor([[1] * 7 + [2] * 9])
    packed = model.hidden(torch.cat((first, second), dim=1), documents=documents)
    torch.testing.assert_close(packed[:, :7], model.hidden(first), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(packed[:, 7:], model.hidden(second), rtol=1e-5, atol=1e-5)


def test_narrow_heads_in_bfloat16_get_gradients_that_were_rounded_once():
    parts = [torch.randn(2, 12, 3, 16, generator=torch.Generator().manual_seed(i)).bfloat16().requires_grad_() for i in range(3)]
    outer = torch.randn(2, 12, 3, 16, generator=torch.Generator().manual_seed(9)).bfloat16()
    y = attend(*parts, causal=True)
    exact = attend(*(part.double() for part in parts), causal=True)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)
    for one, other in zip(torch.autograd.grad(y, parts, outer), torch.autograd.grad(exact, parts, outer.double())):
        torch.testing.assert_close(one, other, rtol=2**-7, atol=1e-6)


def test_on_a_cpu_only_passes_with_gradients_use_the_compiled_code():
    model, inputs = noisy_model(), ids(2, 9)
    expected = model(inputs, inputs).detach()
    model.compiled, calls = True, []
    model.fused_blocks = lambda *arguments: calls.append(1) or model.run_blocks(*arguments)
    with torch.no_grad():
        assert torch.equal(model(inputs, inputs), expected) and not calls
    assert model.hidden(inputs).requires_grad and calls
