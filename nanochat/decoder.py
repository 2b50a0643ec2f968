"""GPT.hidden and GPT.logits once more, for the engine: the same function without gradients, at a fraction of the cost of a small step.

A step at batch 1 is a thousand small operators when it is written for training, and PyTorch pays for each. `CpuDecoder` makes the whole step,
pass and draw, in one call of Rust (rustbpe/src/forward.rs, sample.rs): weights packed once and read once a step, a few rows at the speed of memory.
Activations are float32 there, the cache is in the model's own format; a row's token and log-probability do not depend, to the bit, on the other rows or on the
number of threads. `TorchDecoder`, for GPUs, needs a third of the training pass's operators: queries, keys and values are one product, RMSNorm four operators
instead of nine. Both equal the plain model to 1e-5 in float32 (tests/test_decoder.py). Their weights are copies: `refresh` after an update.
"""
import torch
import torch.nn.functional as F
from rustbpe import CpuTransformer

from nanochat.gpt import GPT, norm
from nanochat.kv_cache import CpuKVCache, KVCache
from nanochat.sampling import GREEDY, TorchSampler
from nanochat.vocab_loss import SOFTCAP


def make_decoder(model):
    """The fastest that the model and its device have."""
    if not isinstance(model, GPT):
        return Decoder(model)
    is_served = model.device.type == "cpu" and model.compute_dtype in (torch.float32, torch.bfloat16) and CpuTransformer.is_fast()
    return (CpuDecoder if is_served else TorchDecoder)(model)


class Decoder:
    """What the engine asks, answered by a model's own hidden and logits."""
    cap = None  # what is still to be done to the raw logits

    def __init__(self, model):
        self.model = model
        self.refresh()

    def new_cache(self):
        return KVCache(self.model.config, self.model.compute_dtype, self.model.device)

    def refresh(self):
        """The model's weights have changed."""

    def hidden(self, inputs, kv_cache):
        """(B, T) ids that continue what the cache holds -> (B, T, C) after the last norm."""
        return self.model.hidden(inputs, kv_cache)

    def raw_logits(self, hidden):
        """(n, C) -> (n, V), before the soft-cap where there is a `cap`."""
        return self.model.logits(hidden)

    def prompts_raw_logits(self, prompts, prefill):
        """Lists of ids, without those that the prefill has already -> (P, V) after the last of each."""
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=self.model.device)
        inputs = torch.tensor([prompt + [0] * (int(lengths.max()) - len(prompt)) for prompt in prompts], device=self.model.device)
        hidden = self.hidden(inputs, prefill)
        return self.raw_logits(hidden[torch.arange(len(prompts), device=self.model.device), lengths - 1])

    def sampler(self, settings):
        """[(temperature, top_k, top_p)] -> what draws from raw logits."""
        return TorchSampler(settings, self.model.device, self.cap)

    def next_tokens(self, tokens, kv_cache, sampler, uniform, vocab_size):
        """The last token of each row and a random number -> lists of the next ones and their log-probabilities, drawn from the first `vocab_size`."""
        hidden = self.hidden(torch.tensor(tokens, device=self.model.device)[:, None], kv_cache)[:, 0]
        return sampler(self.raw_logits(hidden)[:, :vocab_size], uniform)


class CpuDecoder(Decoder):
    """A GPT on a CPU. A pass runs on as many threads as torch's do; how many changes no bit."""

    def __init__(self, model):
        config = model.config
        self.transformer = CpuTransformer(config.n_embd, config.n_head, config.n_kv_head, config.n_layer, model.compute_dtype == torch.bfloat16)
        super().__init__(model)

    def new_cache(self):
        return CpuKVCache(self.model.config, self.model.compute_dtype, self.model.device)

    def refresh(self):
        """The model's weights have changed: pack them anew."""
        model, dtype = self.model, self.model.compute_dtype
        layers = [(attn.c_q, attn.c_k, attn.c_v, attn.c_proj, mlp.c_fc, mlp.c_proj) for attn, mlp in ((block.attn, block.mlp) for block in model.transformer.h)]
        assert all(linear.weight.dtype == dtype and linear.weight.is_contiguous() for linear in (*sum(layers, ()), model.lm_head)), "addresses say neither dtype nor layout"
        cos, sin = (table.to(dtype).float().contiguous() for table in (model.cos, model.sin))  # rounded as the model rounds them
        embedding = model.transformer.wte.weight
        assert embedding.dtype == dtype and embedding.is_contiguous()
        self.transformer.take(embedding.data_ptr(), [[linear.weight.data_ptr() for linear in layer] for layer in layers], model.lm_head.weight.data_ptr(),
                              model.config.vocab_size, (cos.data_ptr(), sin.data_ptr(), cos.numel()))

    def hidden(self, inputs, kv_cache):
        """(B, T) ids that continue what the cache holds -> (B, T, C) float32 after the last norm; 0 at a prefill's padding."""
        B, T = inputs.size()
        is_real, places = kv_cache.places(B, T, self.model.compute_dtype)
        x = self.passed((inputs if is_real is None else inputs[is_real]).flatten().tolist(), places)
        kv_cache.advance(T)
        if is_real is None:
            return x.view(B, T, -1)
        padded = x.new_zeros(B, T, x.size(1))
        padded[is_real] = x
        return padded

    def passed(self, ids, places):
        """A list of n ids and their places -> (n, C). No operator of PyTorch's works here: its threads would wait for more, awake, on the cores that ours need."""
        x = torch.empty(len(ids), self.model.config.n_embd)
        self.transformer.hidden(x.data_ptr(), ids, *places, torch.get_num_threads())
        return x

    def next_tokens(self, tokens, kv_cache, sampler, uniform, vocab_size):
        _, places = kv_cache.places(len(tokens), 1, self.model.compute_dtype)
        drawn = self.transformer.next(tokens, *places, vocab_size, float(SOFTCAP), sampler.draws, uniform.tolist(), torch.get_num_threads())
        kv_cache.advance(1)
        return drawn

    def prompts_raw_logits(self, prompts, prefill):
        _, places = prefill.places(len(prompts), max(map(len, prompts)), self.model.compute_dtype)
        x = self.passed([token for prompt in prompts for token in prompt], places)
        return self.raw_logits(x[torch.tensor([len(prompt) for prompt in prompts]).cumsum(0) - 1])

    def raw_logits(self, hidden):
        hidden = hidden.contiguous()
        logits = torch.empty(len(hidden), self.model.config.vocab_size)
        self.transformer.logits(hidden.data_ptr(), len(hidden), logits.data_ptr(), torch.get_num_threads())
        return logits

    def sampler(self, settings):
        return CpuSampler(self.transformer, settings)


class CpuSampler:
    """sampling.Sampler's twin: [(temperature, top_k, top_p)] once, then (n, V) logits before the soft-cap and n random numbers -> n tokens, n log-probabilities.
    They are the same to the bit whatever the other rows are."""

    def __init__(self, transformer, settings):
        self.transformer = transformer
        self.draws = [(0.0 if temperature < GREEDY else temperature, top_k or 0, 1.0 if top_p is None else max(top_p, 1e-30)) for temperature, top_k, top_p in settings]
        self.is_greedy = all(temperature == 0 for temperature, _, _ in self.draws)

    def __call__(self, logits, uniform):
        return self.transformer.draw(logits.data_ptr(), logits.stride(0), logits.size(1), float(SOFTCAP), self.draws, uniform.tolist(), torch.get_num_threads())


def capped_(raw):
    """`vocab_loss.capped` in place and a sixth of the time: 15 tanh(x / 15) = 30 sigmoid(2 x / 15) - 15. Off by 4e-6 at most."""
    return raw.float().mul_(2 / SOFTCAP).sigmoid_().mul_(2 * SOFTCAP).sub_(SOFTCAP)


class TorchDecoder(Decoder):
    """A GPT on a GPU, or on a CPU that the other does not serve."""
    cap = staticmethod(capped_)

    def __init__(self, model):
        config = model.config
        self.H, self.Hkv, self.D = config.n_head, config.n_kv_head, config.n_embd // config.n_head
        # (x1, x2) turns into (x1 cos + x2 sin, x2 cos - x1 sin): x times (cos, cos) plus x with its halves swapped times (sin, -sin).
        self.rotary = torch.stack((torch.cat((model.cos, model.cos), 1), torch.cat((model.sin, -model.sin), 1)), 1).to(model.compute_dtype)
        self.epsilon = torch.full((1,), 1e-6, device=model.device)
        super().__init__(model)

    def refresh(self):
        """The model's weights have changed: put queries', keys' and values' side by side anew."""
        self.qkv = [torch.cat([linear.weight.detach() for linear in (block.attn.c_q, block.attn.c_k, block.attn.c_v)]) for block in self.model.transformer.h]

    def norm(self, x):
        if x.dtype != torch.float32 or x.device.type != "cpu":
            return norm(x)  # in float32 inside, rounded once; on a GPU one kernel
        length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self.epsilon, length, length, value=1 / x.size(-1)).rsqrt_()

    def hidden(self, inputs, kv_cache):
        """(B, T) ids that continue what the cache holds -> (B, T, C) after the last norm."""
        B, T = inputs.size()
        positions = kv_cache.positions(T)  # (B or 1, T)
        turn = self.rotary[positions].expand(B, T, 2, self.D).reshape(B * T, 2, 1, self.D)
        x = self.norm(F.embedding(inputs.reshape(-1), self.model.transformer.wte.weight))  # (B * T, C)
        for layer, (qkv, block) in enumerate(zip(self.qkv, self.model.transformer.h)):
            x.add_(block.attn.c_proj(self.attend(layer, F.linear(self.norm(x), qkv), turn, kv_cache, B, T)))
            x.add_(block.mlp.c_proj(relu_squared_(block.mlp.c_fc(self.norm(x)))))
        kv_cache.advance(T)
        return self.norm(x).view(B, T, -1)

    def attend(self, layer, qkv, turn, kv_cache, B, T):
        """qkv (B * T, (H + 2 Hkv) * D) -> what the heads bring (B * T, H * D)."""
        H, Hkv, D = self.H, self.Hkv, self.D
        qkv = qkv.view(B * T, H + 2 * Hkv, D)
        qk = qkv[:, :H + Hkv]
        swapped = qk.unflatten(2, (2, D // 2)).flip(2).flatten(2)
        qk = self.norm((qk * turn[:, 0]).addcmul_(swapped, turn[:, 1])).view(B, T, H + Hkv, D)
        y = kv_cache.attend(layer, qk[:, :, :H], qk[:, :, H:], qkv[:, H + Hkv:].view(B, T, Hkv, D))
        return y.reshape(B * T, H * D)

    def raw_logits(self, hidden):
        return self.model.lm_head(hidden)


def relu_squared_(x):
    x.relu_()
    return x.mul_(x)
