"""From hidden states to the log-probability of each target, without ever holding (B * T, V) numbers.

The vocabulary is the widest place of a small model: at V = 65,536 the logits of one batch outweigh the model. Here they
exist for a few rows at a time, in the forward pass and again in the backward pass, so memory does not grow with T * V.
The soft-cap 15 * tanh(x / 15) on the logits is Gemma 2's (arXiv 2408.00118).
"""
from functools import lru_cache

import torch
import torch.nn.functional as F

SOFTCAP = 15.0
# logits alive at once: on a CPU what stays near the caches (measured in dev/LOG.md), on a GPU what keeps it busy
CHUNK_NUMBERS = {"cpu": 2**21, "cuda": 2**27}


def capped(raw):
    """Raw logits -> float32 logits in (-15, 15); float64 stays what it is."""
    return SOFTCAP * torch.tanh(raw.to(torch.promote_types(raw.dtype, torch.float32)) / SOFTCAP)


def chunk_logprobs(raw, targets, temperature):
    """raw (N, V), targets (N,) -> log p of the targets (N,) at this temperature, and the log-normalizer (N,)."""
    logits = capped(raw) / temperature
    normalizer = torch.logsumexp(logits, dim=-1)
    return logits.gather(1, targets[:, None])[:, 0] - normalizer, normalizer


def chunk_gradient(raw, targets, normalizer, grad_logprobs, temperature):
    """d(sum of grad_logprobs * logprobs) / d raw, in raw's dtype: through log-softmax, the temperature, the cap. Eagerly, memory is what
    costs: each line but two works in place."""
    scale = (grad_logprobs / temperature)[:, None]
    tanh = (raw.float() / SOFTCAP).tanh_()
    grad = (tanh * (SOFTCAP / temperature)).sub_(normalizer[:, None]).exp_().mul_(-scale)
    grad.scatter_add_(1, targets[:, None], scale)
    return grad.addcmul_(grad, tanh.square_(), value=-1).to(raw.dtype)


@lru_cache
def kernels(compiled):
    """(chunk_logprobs, chunk_gradient), fused by torch.compile where asked: eager PyTorch walks each chunk ten times."""
    functions = chunk_logprobs, chunk_gradient
    return tuple(torch.compile(function) for function in functions) if compiled else functions


def chunks(hidden, vocab_size):
    rows = max(16, CHUNK_NUMBERS.get(hidden.device.type, 2**24) // vocab_size)
    return [slice(i, i + rows) for i in range(0, hidden.size(0), rows)]


class TargetLogprobs(torch.autograd.Function):
    """hidden (N, C), weight (V, C), targets (N,) -> log p (N,) float32. The backward pass computes the logits once more."""

    @staticmethod
    def forward(ctx, hidden, weight, targets, temperature, compiled):
        cast = weight.to(hidden.dtype)
        logprobs, normalizer = (torch.empty(hidden.size(0), device=hidden.device) for _ in range(2))
        for rows in chunks(hidden, weight.size(0)):
            logprobs[rows], normalizer[rows] = kernels(compiled)[0](F.linear(hidden[rows], cast), targets[rows], temperature)
        ctx.save_for_backward(hidden, weight, targets, normalizer)
        ctx.temperature, ctx.compiled = temperature, compiled
        return logprobs

    @staticmethod
    def backward(ctx, grad_logprobs):
        hidden, weight, targets, normalizer = ctx.saved_tensors
        cast = weight.to(hidden.dtype)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        for rows in chunks(hidden, weight.size(0)):
            raw = F.linear(hidden[rows], cast)
            grad_raw = kernels(ctx.compiled)[1](raw, targets[rows], normalizer[rows], grad_logprobs[rows], ctx.temperature)
            grad_hidden[rows] = grad_raw @ cast
            grad_weight += grad_raw.T @ hidden[rows]
        return grad_hidden, grad_weight, None, None, None


class SummedLoss(torch.autograd.Function):
    """-sum of log p(target), a scalar. All targets count the same, so the gradient is known, and taken, in the forward pass.

    That saves computing the logits a second time: at depth 8 with 65,536 tokens, a fifth of the whole step.
    """

    @staticmethod
    def forward(ctx, hidden, weight, targets, compiled):
        cast = weight.to(hidden.dtype)
        total = torch.zeros((), device=hidden.device)
        grad_hidden, grad_weight = torch.empty_like(hidden), torch.zeros_like(weight)
        minus_one = torch.full((hidden.size(0),), -1.0, device=hidden.device)
        logprobs_of, gradient_of = kernels(compiled)
        for rows in chunks(hidden, weight.size(0)):
            raw = F.linear(hidden[rows], cast)
            logprobs, normalizer = logprobs_of(raw, targets[rows], 1.0)
            total -= logprobs.sum()
            grad_raw = gradient_of(raw, targets[rows], normalizer, minus_one[rows], 1.0)
            grad_hidden[rows] = grad_raw @ cast
            grad_weight += grad_raw.T @ hidden[rows]
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad_total):
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad_total.to(grad_hidden.dtype), grad_weight * grad_total, None, None


def target_logprobs(hidden, weight, targets, temperature=1.0, compiled=False):
    """hidden (N, C), weight (V, C), targets (N,) -> log p of each target (N,) at this temperature, differentiable."""
    return TargetLogprobs.apply(hidden, weight, targets, temperature, compiled)


def summed_loss(hidden, weight, targets, compiled=False):
    """hidden (N, C), weight (V, C), targets (N,) -> the summed cross-entropy in nats, differentiable where gradients are on."""
    if not torch.is_grad_enabled():
        return -TargetLogprobs.apply(hidden, weight, targets, 1.0, compiled).sum()
    return SummedLoss.apply(hidden, weight, targets, compiled)


@torch.no_grad()
def entropies(hidden, weight):
    """hidden (N, C), weight (V, C) -> the exact entropy in nats of each row's distribution (N,)."""
    cast, result = weight.to(hidden.dtype), torch.empty(hidden.size(0), device=hidden.device)
    for rows in chunks(hidden, weight.size(0)):
        logprobs = torch.log_softmax(capped(F.linear(hidden[rows], cast)), dim=-1)
        result[rows] = -(logprobs.exp() * logprobs).sum(dim=-1)
    return result
