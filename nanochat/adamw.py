"""The AdamW update of one tensor (arXiv 1711.05101): arithmetic only. `torch.optim.AdamW` is the test's reference."""
import torch


def adamw_update(weight, grad, state, lr, betas, eps, weight_decay):
    """One step in place: `weight` moves, `state` (empty at first) keeps step, exp_avg, exp_avg_sq. All tensors one shape, float32."""
    if not state:
        state["step"] = 0
        state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(weight), torch.zeros_like(weight)
    state["step"] += 1
    beta1, beta2 = betas
    weight.mul_(1 - lr * weight_decay)
    state["exp_avg"].lerp_(grad, 1 - beta1)
    state["exp_avg_sq"].mul_(beta2).addcmul_(grad, grad, value=1 - beta2)
    correction1, correction2 = 1 - beta1 ** state["step"], 1 - beta2 ** state["step"]
    denominator = (state["exp_avg_sq"].sqrt() / correction2**0.5).add_(eps)
    weight.addcdiv_(state["exp_avg"], denominator, value=-lr / correction1)
