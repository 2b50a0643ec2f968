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


def muon_update(stack, grads, state, lr, momentum, weight_decay, ns_steps=5, dtype=torch.bfloat16):
    """One step in place on a stack (K, m, n) of weights; `state` (empty at first) keeps the momentum buffer. Nesterov momentum.

    The step of an (m, n) matrix is scaled by sqrt(max(1, m / n)), so that tall and wide layers move alike.
    """
    if not state:
        state["momentum_buffer"] = torch.zeros_like(stack)
    state["momentum_buffer"].lerp_(grads, 1 - momentum)
    update = orthogonalize(grads.lerp(state["momentum_buffer"], momentum), ns_steps, dtype)
    weights_scale = max(1.0, stack.size(1) / stack.size(2)) ** 0.5
    stack.mul_(1 - lr * weight_decay)
    stack.add_(update.to(stack.dtype), alpha=-lr * weights_scale)
