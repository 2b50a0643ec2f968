"""The Muon update of a stack of equal-shaped matrices: momentum, then the nearest (semi-)orthogonal matrix. Arithmetic only.

Muon: Keller Jordan et al., kellerjordan.github.io/posts/muon. `torch.optim.Muon` is the test's reference; it takes one matrix
at a time, while a stack goes through each product in one batch.
"""
import torch

# the quintic whose repeated use pushes every singular value towards 1 (from the post above)
QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalize(stack, ns_steps=5, dtype=torch.bfloat16):
    """(K, m, n) -> (K, m, n): each matrix's singular vectors with singular values near 1, by Newton-Schulz iteration."""
    a, b, c = QUINTIC
    tall = stack.size(1) > stack.size(2)
    x = stack.to(dtype)
    x = x.mT if tall else x
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(ns_steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def muon_direction(grads, state, momentum, ns_steps=5, dtype=torch.bfloat16):
    """A stack of gradients (K, m, n) -> where each matrix goes, near orthogonal, in `dtype`; `state` (empty at first) keeps the momentum
    buffer. Nesterov momentum."""
    if not state:
        state["momentum_buffer"] = torch.zeros_like(grads)
    state["momentum_buffer"].lerp_(grads, 1 - momentum)
    return orthogonalize(grads.lerp(state["momentum_buffer"], momentum), ns_steps, dtype)


def muon_move(weights, direction, m, n, lr, weight_decay):
    """Go there, in place: a stack of (m, n) matrices, or any rows of them. The step is scaled by sqrt(max(1, m / n)), so that tall and
    wide layers move alike."""
    weights.mul_(1 - lr * weight_decay)
    weights.add_(direction.to(weights.dtype), alpha=-lr * max(1.0, m / n) ** 0.5)


def muon_update(stack, grads, state, lr, momentum, weight_decay, ns_steps=5, dtype=torch.bfloat16):
    """One step in place on a stack (K, m, n) of weights."""
    muon_move(stack, muon_direction(grads, state, momentum, ns_steps, dtype), stack.size(1), stack.size(2), lr, weight_decay)
