"""Rewards -> advantages, log-probabilities -> loss. Arithmetic on tensors: no model, no tokenizer, no task.

Shapes: P prompts, G rollouts per prompt, B = P * G rows, T time.
"""
import torch


def group_advantages(rewards):
    """(P, G) rewards -> (P, G) advantages: each rollout against the mean of its own group.

    No division by the group's standard deviation, which would weigh the easiest and the hardest prompts most (Dr. GRPO,
    arXiv 2503.20783).
    """
    return rewards - rewards.mean(dim=1, keepdim=True)


def groups_with_signal(outcomes):
    """(P, G) outcomes, right or wrong -> (P,) True where the group holds both. Gated on the outcome, not on the shaped reward:
    in a group of wrong answers the format bonus would otherwise teach which wrong answer to give."""
    right = outcomes.float().mean(dim=1)
    return (right > 0) & (right < 1)


def reinforce_loss(logprobs, advantages, mask):
    """logprobs (B, T), advantages (B,), mask (B, T) -> -sum of advantage * log p over the masked tokens (Williams 1992).

    The caller divides by the number of tokens of the whole step, over all micro-batches and ranks.
    """
    return -(advantages[:, None] * logprobs * mask).sum()


def kl_k3(logprobs, ref_logprobs):
    """Unbiased, non-negative estimate of KL(policy || reference) per sampled token: r - 1 - log r with r = ref / policy
    (Schulman, joschu.net/blog/kl-approx.html)."""
    log_ratio = ref_logprobs - logprobs
    return torch.exp(log_ratio) - 1 - log_ratio
