"""Rewards -> advantages, log-probabilities -> loss. Arithmetic on tensors: no model, no tokenizer, no task.

Shapes: P prompts, G rollouts per prompt, B = P * G rows, T time. Every loss is a sum over its rows and wants to be divided, once
per step over all micro-batches and ranks, by the number of tokens, of rollouts, or of rollouts times the length limit:
`ALGORITHMS` names the advantage, the loss and the denominator of each paper. `old_logprobs` are the ones sampled with; on policy
they equal `logprobs`, the ratio is 1, and every loss here has REINFORCE's gradient.
"""
import inspect
from collections.abc import Callable
from typing import NamedTuple

import torch


# ---------------------------------------------------------------------------------------------------------------------
# Rewards -> advantages

def group_advantages(rewards):
    """(P, G) rewards -> (P, G) advantages: each rollout against the mean of its own group.

    No division by the group's standard deviation, which would weigh the easiest and the hardest prompts most (Dr. GRPO,
    arXiv 2503.20783).
    """
    shifted = rewards - rewards[:, :1]  # changes nothing but the rounding: in a group of equals every advantage is exactly 0
    return shifted - shifted.mean(dim=1, keepdim=True)


def normalized_advantages(rewards, epsilon=1e-6):
    """(P, G) -> (P, G): against the group's mean, in units of its standard deviation (GRPO, arXiv 2402.03300)."""
    return group_advantages(rewards) / (rewards.std(dim=1, keepdim=True) + epsilon)


def rloo_advantages(rewards):
    """(P, G) -> (P, G): each rollout against the mean of the *other* ones, which leaves the gradient unbiased (RLOO, arXiv 2402.14740)."""
    G = rewards.size(1)
    return group_advantages(rewards) * (G / (G - 1))


def expert_advantages(outcomes):
    """(P, G) outcomes -> 1 for right, 0 for wrong: with REINFORCE's loss this is supervised training on one's own right answers
    (expert iteration, arXiv 1705.08439; rejection sampling, 2308.01825). The control arm: what no comparison within a group buys."""
    return (outcomes > 0).float()


def groups_with_signal(outcomes):
    """(P, G) outcomes, right or wrong -> (P,) True where the group holds both. Gated on the outcome, not on the shaped reward:
    in a group of wrong answers the format bonus would otherwise teach which wrong answer to give."""
    right = outcomes.float().mean(dim=1)
    return (right > 0) & (right < 1)


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities -> loss. logprobs, old_logprobs, mask (B, T); advantages (B,)

def reinforce_loss(logprobs, advantages, mask):
    """logprobs (B, T), advantages (B,), mask (B, T) -> -sum of advantage * log p over the masked tokens (Williams 1992).

    The caller divides by the number of tokens of the whole step, over all micro-batches and ranks.
    """
    return -(advantages[:, None] * logprobs * mask).sum()


def log_ratios(logprobs, old_logprobs, mask):
    """(B, T) log of policy / policy that sampled; 0 where the mask is 0, whatever stands there."""
    return torch.where(mask.bool(), logprobs - old_logprobs.detach(), 0.0)


def clipped(ratio, advantages, clip_low, clip_high):
    """PPO's surrogate, to be minimised (arXiv 1707.06347): beyond the clip, an advantage that has been acted on stops pulling. The
    minimum is taken after the product with the advantage: for a negative one it picks the larger ratio."""
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - clip_low, 1 + clip_high) * advantages)


def grpo_loss(logprobs, old_logprobs, advantages, mask, clip_low=0.2, clip_high=0.2):
    """Mean over the tokens of each rollout, summed over rollouts; divide by the rollouts (arXiv 2402.03300). A token of a long
    rollout counts less."""
    losses = clipped(log_ratios(logprobs, old_logprobs, mask).exp(), advantages[:, None], clip_low, clip_high) * mask
    return (losses.sum(dim=1) / mask.sum(dim=1).clamp(min=1)).sum()


def dapo_loss(logprobs, old_logprobs, advantages, mask, clip_low=0.2, clip_high=0.28):
    """Every token counts the same, and rare tokens have more room upwards than downwards; divide by the tokens (arXiv 2503.14476)."""
    return (clipped(log_ratios(logprobs, old_logprobs, mask).exp(), advantages[:, None], clip_low, clip_high) * mask).sum()


def dr_grpo_loss(logprobs, old_logprobs, advantages, mask, clip_low=0.2, clip_high=0.2):
    """GRPO without its two biases: advantages not divided by the std, and one constant, rollouts * length limit, instead of each
    rollout's own length (arXiv 2503.20783)."""
    return dapo_loss(logprobs, old_logprobs, advantages, mask, clip_low, clip_high)


def gspo_loss(logprobs, old_logprobs, advantages, mask, clip_low=3e-4, clip_high=4e-4):
    """One ratio per rollout, the geometric mean of its tokens', clipped as a whole, as the reward judges the whole; divide by the
    rollouts (arXiv 2507.18071)."""
    log_ratio = log_ratios(logprobs, old_logprobs, mask).sum(dim=1) / mask.sum(dim=1).clamp(min=1)  # (B,)
    return (clipped(log_ratio.exp(), advantages, clip_low, clip_high) * (mask.sum(dim=1) > 0)).sum()


def cispo_loss(logprobs, old_logprobs, advantages, mask, clip_low=1.0, clip_high=4.0):
    """REINFORCE with clipped, constant importance weights: unlike PPO's clip, no token ever loses its gradient; divide by the
    tokens (MiniMax-M1, arXiv 2506.13585, which leaves the lower side open, as clip_low 1 does)."""
    weights = log_ratios(logprobs, old_logprobs, mask).exp().clamp(1 - clip_low, 1 + clip_high).detach()
    return reinforce_loss(weights * logprobs, advantages, mask)


def clip_counts(logprobs, old_logprobs, advantages, mask, clip_low, clip_high):
    """-> (low, high): how many tokens have lost their gradient below and above; over the tokens they are `clip_ratio/{low,high}_mean`."""
    ratio, pull = log_ratios(logprobs, old_logprobs, mask).exp(), advantages[:, None] * mask
    return ((ratio < 1 - clip_low) & (pull < 0)).sum(), ((ratio > 1 + clip_high) & (pull > 0)).sum()


class Algorithm(NamedTuple):
    advantages: Callable  # (P, G) rewards, or outcomes for "expert" -> (P, G)
    loss: Callable
    per: str              # what the summed loss is divided by: "token", "rollout" or "limit"


ALGORITHMS = {
    "reinforce": Algorithm(group_advantages, reinforce_loss, "token"),
    "rloo": Algorithm(rloo_advantages, reinforce_loss, "rollout"),
    "grpo": Algorithm(normalized_advantages, grpo_loss, "rollout"),
    "dr_grpo": Algorithm(group_advantages, dr_grpo_loss, "limit"),
    "dapo": Algorithm(normalized_advantages, dapo_loss, "token"),
    "gspo": Algorithm(normalized_advantages, gspo_loss, "rollout"),
    "cispo": Algorithm(normalized_advantages, cispo_loss, "token"),
    "expert": Algorithm(expert_advantages, reinforce_loss, "token"),
}


def check_algorithm(name):
    if name not in ALGORITHMS:
        raise ValueError(f"algorithm={name!r} is not one of the {len(ALGORITHMS)} known: use {', '.join(ALGORITHMS)}")


def policy_loss(name, logprobs, old_logprobs, advantages, mask, **clip):
    """The summed loss of an algorithm by its name. `clip`: clip_low and clip_high where they are not the paper's."""
    check_algorithm(name)
    if ALGORITHMS[name].loss is reinforce_loss:  # knows no ratio, so there is nothing to clip
        return reinforce_loss(logprobs, advantages, mask)
    return ALGORITHMS[name].loss(logprobs, old_logprobs, advantages, mask, **clip)


def clips_of(name, **clip):
    """{clip_low, clip_high} in force: those given, else the paper's; none for an algorithm that knows no ratio."""
    defaults = {key: value.default for key, value in inspect.signature(ALGORITHMS[name].loss).parameters.items() if key.startswith("clip_")}
    return {key: clip.get(key, default) for key, default in defaults.items()}


def clipped_tokens(name, logprobs, old_logprobs, advantages, mask, **clip):
    """-> (low, high): on how many tokens the clip of an algorithm bears. GSPO clips rollouts, with all their tokens; CISPO caps a token's weight,
    whatever its advantage, and leaves it its gradient."""
    clip = clips_of(name, **clip)
    if not clip:
        return torch.zeros(2, dtype=torch.int64)
    if name == "gspo":
        log_ratio = log_ratios(logprobs, old_logprobs, mask).sum(dim=1, keepdim=True) / mask.sum(dim=1, keepdim=True).clamp(min=1)
        logprobs, old_logprobs = log_ratio.expand(mask.shape), torch.zeros_like(logprobs)
    if name == "cispo":
        ratio = log_ratios(logprobs, old_logprobs, mask).exp()
        return torch.stack([((ratio < 1 - clip["clip_low"]) & mask.bool()).sum(), ((ratio > 1 + clip["clip_high"]) & mask.bool()).sum()])
    return torch.stack(clip_counts(logprobs, old_logprobs, advantages, mask, **clip))


def denominator(name, num_tokens, num_rollouts, max_new_tokens):
    """What the step's summed loss is divided by. All three numbers are of the whole step: all micro-batches, all ranks."""
    return {"token": num_tokens, "rollout": num_rollouts, "limit": num_rollouts * max_new_tokens}[ALGORITHMS[name].per]


# ---------------------------------------------------------------------------------------------------------------------
# KL(policy || reference): estimates from the sampled token (Schulman, joschu.net/blog/kl-approx.html), and the exact value

def kl_k1(logprobs, ref_logprobs):
    """Unbiased, but noisy and of both signs: log policy - log reference of the sampled token. It belongs into the reward: as a
    loss its gradient is zero on average, because the expectation of grad log p is."""
    return logprobs - ref_logprobs


def kl_k3(logprobs, ref_logprobs):
    """Unbiased, non-negative estimate of KL(policy || reference) per sampled token: r - 1 - log r with r = ref / policy
    (Schulman, joschu.net/blog/kl-approx.html). Unbiased as a number only: see `kl_k3_loss` for the gradient."""
    log_ratio = ref_logprobs - logprobs
    return torch.exp(log_ratio) - 1 - log_ratio


def kl_k3_loss(logprobs, old_logprobs, ref_logprobs, mask):
    """Sum of k3 times the ratio over the masked tokens: the ratio carries the gradient of the sampling, without which k3 in a loss
    pulls along the gradient of KL(reference || policy) instead (arXiv 2512.21852)."""
    kl = kl_k3(torch.where(mask.bool(), logprobs, 0.0), torch.where(mask.bool(), ref_logprobs, 0.0))
    return (log_ratios(logprobs, old_logprobs, mask).exp() * kl).sum()


def rewards_minus_kl(rewards, logprobs, ref_logprobs, mask, beta):
    """(B,) rewards less beta times k1 summed over each rollout: the one use of a sampled KL whose policy gradient is unbiased
    (arXiv 2512.21852). No gradient flows through it."""
    return rewards - beta * (kl_k1(logprobs, ref_logprobs) * mask).sum(dim=1).detach()


def kl_exact(logits, ref_logits):
    """(..., V) and (..., V) -> (...,) sum over the vocabulary of p * (log p - log q). Exactly 0 for equal logits."""
    logprobs, ref_logprobs = torch.log_softmax(logits, dim=-1), torch.log_softmax(ref_logits, dim=-1)
    return (logprobs.exp() * (logprobs - ref_logprobs)).sum(dim=-1)
