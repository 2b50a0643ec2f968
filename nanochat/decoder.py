"""GPT.hidden and GPT.logits once more, for the engine: the same function without gradients, in a third of the operators.

A step at batch 1 is a thousand small operators when it is written for training, and PyTorch pays for each. Here queries, keys
and values are one product, RMSNorm is four operators instead of nine, and a CPU's weights are packed once into the blocks its
kernels want (oneDNN) instead of at every product. With `compiled`, rotation, QK-norm and attention of a step run as one fused
kernel that reads the cache once (torch.compile; seconds, whatever the depth: all layers share it); worth it for RL and serving.
Equal to the plain model to 1e-5 in float32 (tests/test_decoder.py). The weights are copies: `refresh` after an update.
"""
from functools import lru_cache

import torch
import torch.nn.functional as F

from nanochat.gpt import norm
from nanochat.kv_cache import KVCache
from nanochat.vocab_loss import SOFTCAP

FEW_ROWS = 8  # below, the fused kernel's entry costs more than it saves


class Packed:
    """x (N, in) -> x @ weight.T (N, out), the weight also in oneDNN's blocks where that is faster."""

    def __init__(self, *weights):
        self.sources = weights  # several: their products stand side by side
        self.refresh()

    def refresh(self):
        sources = [weight.detach() for weight in self.sources]
        self.weight = sources[0] if len(sources) == 1 else torch.cat(sources)
        self.blocks = torch.ops.mkldnn._reorder_linear_weight(self.weight, 32) if can_pack(self.weight) else None
        # One float32 row is read too fast for oneDNN's entry to pay, unless the matrix is large.
        self.least_rows = 2 if self.weight.dtype == torch.float32 and self.weight.numel() < 2**20 else 1

    def __call__(self, x):
        if self.blocks is None or x.size(0) < self.least_rows:
            return F.linear(x, self.weight)
        return torch.ops.mkldnn._linear_pointwise(x, self.blocks, None, "none", [], "")


def can_pack(weight):
    """True where oneDNN has kernels for this weight: x86 with AVX; bfloat16 where the processor multiplies it."""
    is_x86 = weight.device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")
    return is_x86 and (weight.dtype == torch.float32 or weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())


class Decoder:
    """A GPT's weights, packed, and its forward pass against a cache."""

    def __init__(self, model, compiled=False):
        self.model, self.compiled, config = model, compiled and model.device.type == "cpu", model.config
        self.H, self.Hkv, self.D = config.n_head, config.n_kv_head, config.n_embd // config.n_head
        self.layers = [tuple(Packed(*weights) for weights in (
            (block.attn.c_q.weight, block.attn.c_k.weight, block.attn.c_v.weight), (block.attn.c_proj.weight,),
            (block.mlp.c_fc.weight,), (block.mlp.c_proj.weight,))) for block in model.transformer.h]
        self.head = Packed(model.lm_head.weight)
        # (x1, x2) turns into (x1 cos + x2 sin, x2 cos - x1 sin): x times (cos, cos) plus x with its halves swapped times (sin, -sin).
        self.rotary = torch.stack((torch.cat((model.cos, model.cos), 1), torch.cat((model.sin, -model.sin), 1)), 1).to(model.compute_dtype)
        self.epsilon = torch.full((1,), 1e-6, device=model.device)

    def refresh(self):
        """The model's weights have changed: pack them anew."""
        for packed in (self.head, *(packed for layer in self.layers for packed in layer)):
            packed.refresh()

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
        attend = self.attend_fused if self.compiled and T == 1 and B >= FEW_ROWS and isinstance(kv_cache, KVCache) else self.attend
        x = self.norm(F.embedding(inputs.reshape(-1), self.model.transformer.wte.weight))  # (B * T, C)
        for layer, (qkv, attn_proj, fc, mlp_proj) in enumerate(self.layers):
            x.add_(attn_proj(attend(layer, qkv(self.norm(x)), turn, kv_cache, B, T)))
            x.add_(mlp_proj(relu_squared_(fc(self.norm(x)))))
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

    def attend_fused(self, layer, qkv, turn, kv_cache, B, T):
        return fused_kernel(self.H, self.Hkv, self.D)(qkv, turn, kv_cache.keys[layer], kv_cache.values[layer], kv_cache.fed[:, 0], kv_cache.reach)

    def raw_logits(self, hidden):
        """(n, C) -> (n, V) before the soft-cap."""
        return self.head(hidden)


def capped_(raw):
    """`vocab_loss.capped` in place and a sixth of the time: 15 tanh(x / 15) = 30 sigmoid(2 x / 15) - 15. Off by 2e-6 at most."""
    return raw.float().mul_(2 / SOFTCAP).sigmoid_().mul_(2 * SOFTCAP).sub_(SOFTCAP)


def relu_squared_(x):
    x.relu_()
    return x.mul_(x)


@lru_cache
def fused_kernel(H, Hkv, D):
    """`attend_step` of these heads, compiled once for any number of rows and positions."""
    def attend(*arguments):
        return attend_step(H, Hkv, D, *arguments)
    return torch.compile(attend, dynamic=True)


def attend_step(H, Hkv, D, qkv, turn, keys, values, positions, reach):
    """One new token per row: qkv (B, (H + 2 Hkv) * D), keys and values (rows, Hkv, capacity, D), positions (B,) -> (B, H * D).

    Writes the new key and value; a row looks at its first positions + 1 of the `reach` that are read. Sums of products, not
    matrix products: with one query per row the cache's memory is what costs, and a fused loop streams it once.
    """
    assert keys.shape[1] == Hkv and keys.shape[3] == D  # known to the compiler from here on
    B = qkv.size(0)
    qkv = qkv.view(B, H + 2 * Hkv, D)
    first, second = qkv[:, :H + Hkv].chunk(2, dim=2)
    qk = norm(qkv[:, :H + Hkv] * turn[:, 0] + torch.cat((second, first), dim=2) * turn[:, 1])
    rows = torch.arange(B, device=qkv.device)
    keys[rows, :, positions] = qk[:, H:].to(keys.dtype)
    values[rows, :, positions] = qkv[:, H + Hkv:].to(values.dtype)
    q = qk[:, :H].reshape(B, Hkv, H // Hkv, 1, D).to(keys.dtype)
    scores = (q * keys[:B, :, None, :reach]).sum(dim=4) * D**-0.5  # (B, Hkv, H / Hkv, reach)
    scores = scores.masked_fill(torch.arange(reach, device=qkv.device) > positions[:, None, None, None], -torch.inf)
    y = (scores.softmax(dim=3)[..., None] * values[:B, :, None, :reach]).sum(dim=3)
    return y.reshape(B, H * D).to(qkv.dtype)
