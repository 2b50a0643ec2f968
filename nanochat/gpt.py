"""The transformer: the October 2025 nanochat architecture, with its parameter names, so that its checkpoints load here.

Rotary positions, then QK-norm; relu^2 MLP; RMSNorm without weights; no biases; untied head; soft-capped logits. Hugging Face's
`NanoChatForCausalLM` computes the same function. No training loop, no sampling: `engine.py` asks for the next token.

Shapes: B rows, T time, C channels, H heads, D head dim, V vocabulary.
"""
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from nanochat.flash_attention import attend
from nanochat.vocab_loss import capped, entropies, summed_loss, target_logprobs


@dataclass(frozen=True)
class GPTConfig:
    sequence_len: int = 1024
    vocab_size: int = 50304
    n_layer: int = 12
    n_head: int = 6
    n_kv_head: int = 6
    n_embd: int = 768

    def __post_init__(self):
        if self.n_embd % self.n_head or (self.n_embd // self.n_head) % 2:
            raise ValueError(f"n_embd={self.n_embd} over n_head={self.n_head} heads is not an even head size, which rotary "
                             "positions need: choose n_head so that n_embd / n_head is even")
        if self.n_head % self.n_kv_head:
            raise ValueError(f"n_head={self.n_head} is not a multiple of n_kv_head={self.n_kv_head}: "
                             "each key head serves the same number of query heads")


def config_from_depth(depth, vocab_size, sequence_len, n_embd=-1, head_dim=128, n_kv_head=-1):
    """The one dial: depth -> width 64 * depth, heads of about `head_dim`. Explicit sizes (not -1) win -> GPTConfig."""
    n_embd = 64 * depth if n_embd == -1 else n_embd
    n_head = max(1, math.ceil(n_embd / head_dim))
    while n_embd % n_head or (n_embd // n_head) % 2:  # ends at the latest at n_embd / 2 heads of size 2
        n_head += 1
        if n_head > n_embd // 2:
            raise ValueError(f"n_embd={n_embd} cannot be cut into heads of even size: use an even width")
    return GPTConfig(sequence_len, vocab_size, depth, n_head, n_head if n_kv_head == -1 else n_kv_head, n_embd)


def norm(x):
    """RMSNorm without weights (arXiv 1910.07467)."""
    return F.rms_norm(x, (x.size(-1),), eps=1e-6)


class Linear(nn.Linear):
    """No bias; the float32 master weight is cast to the activations' dtype (nothing happens where they agree)."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class Embedding(nn.Embedding):
    def reset_parameters(self):
        if not self.weight.is_meta:  # nothing to fill there, but torch would import its compiler for it: a second and a half
            super().reset_parameters()


def rotary_table(length, head_dim, device, base=10000.0):
    """cos and sin of position times frequency, each (length, D/2) float32 (RoFormer, arXiv 2104.09864)."""
    # a quotient, not a negative power: the reference and Hugging Face round like this, and with it our logits are theirs to the bit
    frequencies = 1.0 / base ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device=device) / head_dim)
    angles = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequencies)
    return angles.cos(), angles.sin()


def rotate(x, cos, sin):
    """Turn each pair (x_i, x_{i + D/2}) by minus its position's angle. x (B, T, H, D); cos, sin (B or 1, T, 1, D/2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos + second * sin, second * cos - first * sin), dim=-1)


def document_mask(documents):
    """(B, T) document numbers -> (B, T, T) True where a query may look: back, and within its own document. None stays None."""
    if documents is None:
        return None
    T = documents.size(1)
    causal = torch.ones(T, T, dtype=torch.bool, device=documents.device).tril()
    return causal & (documents[:, :, None] == documents[:, None, :])


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.n_head, self.n_kv_head = layer, config.n_head, config.n_kv_head
        self.head_dim = config.n_embd // config.n_head
        self.c_q = Linear(config.n_embd, self.n_head * self.head_dim)
        self.c_k = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_v = Linear(config.n_embd, self.n_kv_head * self.head_dim)
        self.c_proj = Linear(config.n_embd, config.n_embd)

    def forward(self, x, cos, sin, kv_cache, mask):
        B, T, C = x.size()
        q = self.c_q(x).view(B, T, self.n_head, self.head_dim)
        k = self.c_k(x).view(B, T, self.n_kv_head, self.head_dim)
        v = self.c_v(x).view(B, T, self.n_kv_head, self.head_dim)
        q, k = norm(rotate(q, cos, sin)), norm(rotate(k, cos, sin))
        y = attend(q, k, v, mask, causal=mask is None) if kv_cache is None else kv_cache.attend(self.layer, q, k, v)
        return self.c_proj(y.reshape(B, T, C))


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = Linear(config.n_embd, 4 * config.n_embd)
        self.c_proj = Linear(4 * config.n_embd, config.n_embd)

    def forward(self, x):
        return self.c_proj(F.relu(self.c_fc(x)).square())  # relu^2: Primer, arXiv 2109.08668


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.attn = Attention(config, layer)
        self.mlp = MLP(config)

    def forward(self, x, cos, sin, kv_cache, mask):
        x = x + self.attn(norm(x), cos, sin, kv_cache, mask)
        return x + self.mlp(norm(x))


class GPT(nn.Module):
    """`GPT(config)` has empty weights: call `init_weights()` or load a checkpoint. `compute_dtype` is the activations' dtype."""

    def __init__(self, config, compute_dtype=torch.float32):
        super().__init__()
        self.config, self.compute_dtype, self.compiled = config, compute_dtype, False
        self.is_divided = False  # over the ranks: sharding.place
        self.transformer = nn.ModuleDict({
            "wte": Embedding(config.vocab_size, config.n_embd),
            "h": nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)]),
        })
        self.lm_head = Linear(config.n_embd, config.vocab_size)
        self.fill_rotary_table()

    def fill_rotary_table(self):
        """(Re)compute the position tables: they are derived, so no checkpoint holds them and `to_empty` forgets them."""
        head_dim = self.config.n_embd // self.config.n_head
        for name, table in zip(("cos", "sin"), rotary_table(self.config.sequence_len, head_dim, "cpu")):  # there, so that copies agree to the bit
            self.register_buffer(name, table.to(self.transformer.wte.weight.device), persistent=False)

    @torch.no_grad()
    def init_weights(self, seed=42):
        """Embedding N(0, 1); each matrix N(0, std) with std = min(1, sqrt(out / in)) / sqrt(in); what writes into the residual
        stream, and the head, start at zero, so that the model starts as the uniform distribution: loss log V exactly."""
        generator = torch.Generator().manual_seed(seed)  # on the CPU: the same start on every device
        self.fill_rotary_table()
        for name, weight in self.named_parameters():
            if name.endswith("c_proj.weight") or name == "lm_head.weight":
                weight.zero_()
                continue
            fan_out, fan_in = weight.shape
            std = 1.0 if name == "transformer.wte.weight" else min(1.0, math.sqrt(fan_out / fan_in)) / math.sqrt(fan_in)
            weight.copy_(torch.randn(weight.shape, generator=generator) * std)

    @property
    def device(self):
        return self.transformer.wte.weight.device

    def compile_for_training(self):
        """Fuse the blocks and the loss with torch.compile. Cached decoding stays eager: its shapes change at every step."""
        self.compiled = True
        if self.is_divided:  # each block alone, its weights come and go around it; one graph serves them all
            for block in self.transformer.h:
                block.forward = torch.compile(block.forward, dynamic=False)
            self.fused_blocks = self.run_blocks
            return
        self.fused_blocks = torch.compile(self.run_blocks, dynamic=False)

    @property
    def fuses(self):
        """Whether a pass made now uses the compiled code. On a CPU one without gradients does not: half a minute of compiling it for a few evaluations."""
        return self.compiled and (torch.is_grad_enabled() or self.device.type != "cpu")

    def run_blocks(self, x, cos, sin, kv_cache=None, mask=None):
        x = norm(x)
        for block in self.transformer.h:
            x = block(x, cos, sin, kv_cache, mask)
        return norm(x)

    def hidden(self, inputs, kv_cache=None, documents=None):
        """(B, T) ids -> (B, T, C) after the last norm. With a cache, the ids continue what the cache holds. With `documents`,
        (B, T) numbers, a position looks only at positions of its own number (rotary positions are relative: they need no reset)."""
        B, T = inputs.size()
        if kv_cache is None:
            if T > self.config.sequence_len:
                raise ValueError(f"{T} tokens do not fit sequence_len={self.config.sequence_len}: cut the input or train a longer model")
            cos, sin = self.cos[None, :T, None], self.sin[None, :T, None]
        else:
            positions = kv_cache.positions(T)  # (B, T)
            cos, sin = self.cos[positions][:, :, None], self.sin[positions][:, :, None]
        x = self.transformer.wte(inputs).to(self.compute_dtype)
        cos, sin = cos.to(self.compute_dtype), sin.to(self.compute_dtype)
        if kv_cache is None:
            return (self.fused_blocks if self.fuses else self.run_blocks)(x, cos, sin, None, document_mask(documents))
        x = (self.fused_blocks if self.fuses and getattr(kv_cache, "is_compilable", False) else self.run_blocks)(x, cos, sin, kv_cache)
        kv_cache.advance(T)
        return x

    def logits(self, hidden):
        """(..., C) -> (..., V) float32 in (-15, 15)."""
        return capped(self.lm_head(hidden))

    def forward(self, inputs, targets=None, kv_cache=None, loss_reduction="mean", documents=None):
        """(B, T) ids -> logits (B, T, V), or, given targets (B, T) with -1 = ignored, the cross-entropy in nats:
        "mean" or "sum" over the targets, or "none" (B, T) with 0 where ignored. No logits are made for ignored positions."""
        hidden = self.hidden(inputs, kv_cache, documents)
        if targets is None:
            return self.logits(hidden)
        if loss_reduction == "none":
            return -self.logprobs_of_hidden(hidden, targets)
        wanted = targets != -1
        total = summed_loss(hidden[wanted], self.lm_head.weight, targets[wanted], self.fuses)
        return total if loss_reduction == "sum" else total / wanted.sum()

    def as_forward(self, function):
        """-> function(), which may use `hidden` and `lm_head.weight` apart and return what has a gradient: divided over the ranks, embedding
        and head are whole in here and in `forward` alone."""
        return function()

    def logprobs(self, inputs, targets, temperature=1.0):
        """(B, T) inputs and targets -> log p(target) (B, T) at a temperature, 0 where the target is -1. Differentiable."""
        return self.logprobs_of_hidden(self.hidden(inputs), targets, temperature)

    def logprobs_of_hidden(self, hidden, targets, temperature=1.0):
        wanted = targets != -1
        result = torch.zeros(targets.shape, device=hidden.device)
        result[wanted] = target_logprobs(hidden[wanted], self.lm_head.weight, targets[wanted], temperature, self.fuses)
        return result

    @torch.no_grad()
    def entropy(self, inputs, targets):
        """Exact entropy in nats (B, T) of the distribution at each position with a target, 0 elsewhere."""
        wanted = targets != -1
        result = torch.zeros(targets.shape, device=inputs.device)
        result[wanted] = entropies(self.hidden(inputs)[wanted], self.lm_head.weight)
        return result

    def num_params(self):
        return sum(weight.numel() for weight in self.parameters())

    def flops_per_token(self):
        """Floating-point operations of forward and backward per token: 6 per matrix weight plus attention (PaLM, arXiv 2204.02311, B)."""
        config = self.config
        matrix_weights = self.num_params() - self.transformer.wte.weight.numel()
        return 6 * matrix_weights + 12 * config.n_layer * config.n_embd * config.sequence_len


def frozen_gpt(config, compute_dtype, weights):
    """A GPT for sampling around whole weights {name: tensor}, which it takes as they are, without a copy and without gradients."""
    with torch.device("meta"):
        model = GPT(config, compute_dtype)
    model.load_state_dict(weights, assign=True)
    model.fill_rotary_table()
    return model.requires_grad_(False).eval()
