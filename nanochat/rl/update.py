"""From judged groups to a gradient: who teaches, by how much, and the passes over them. Both RL scripts share every line of it.

Only groups with signal are computed, each prompt once for all its samples, with log-probabilities at completion positions alone. What the
loss is divided by is counted over all micro-batches and ranks before the first pass. The model that learns may be divided over the ranks
(sharding.py); what needs no gradient is asked of the one that sampled, which is whole.
"""
import math
import random
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from nanochat.rl.algorithm import ALGORITHMS, check_algorithm, clipped_tokens, denominator, kl_exact, kl_k1, kl_k3, kl_k3_loss, policy_loss
from nanochat.rl.rollout import has_signal
from nanochat.rl.shared_prompt import make_shared_batches
from nanochat.training import optimizer_step
from nanochat.vocab_loss import capped, chunks

KL_MODES = ("k1", "k3", "exact")


@dataclass(frozen=True)
class Objective:
    """What a step minimises. The defaults are chat_rl's."""
    temperature: float
    algorithm: str = "reinforce"
    top_k: int | None = None            # log-probabilities are renormalised on the likeliest top_k tokens, as they were when sampled
    clip: dict = field(default_factory=dict)  # clip_low, clip_high where they are not the paper's
    advantage_clip: float = -1          # largest advantage, either way (-1 = off)
    outcome_only: bool = False          # the reward is 1 for right and 0 for wrong, whatever its other parts say
    max_new_tokens: int = 1             # what Dr. GRPO divides by
    kl_coef: float = 0.0
    kl_mode: str = "k3"                 # k1 into the reward, k3 times ratio into the loss, the exact KL into the loss

    def __post_init__(self):
        check_algorithm(self.algorithm)
        if self.kl_mode not in KL_MODES or self.kl_coef < 0:
            raise ValueError(f"kl_mode={self.kl_mode!r} and kl_coef={self.kl_coef}: use one of {', '.join(KL_MODES)} and a coefficient of 0 or more")
        if self.temperature <= 0:
            raise ValueError(f"temperature={self.temperature}: at 0 a group is one answer many times; 1.0 works well")


# ---------------------------------------------------------------------------------------------------------------------
# Who teaches

def set_advantages(groups, objective, penalties=None):
    """Fills in every rollout's advantage -> the rollouts that teach: those of groups with signal; for expert iteration all right answers.

    `penalties` {id(rollout): number} is taken off the rewards (k1 KL)."""
    advantages_of, taught = ALGORITHMS[objective.algorithm].advantages, []
    is_expert = objective.algorithm == "expert"
    for group in groups:
        outcomes = torch.tensor([[rollout.rewards["correct"] for rollout in group]])
        rewards = (outcomes > 0).float() if objective.outcome_only else torch.tensor([[rollout.reward for rollout in group]])
        if penalties:
            rewards = rewards - torch.tensor([[penalties.get(id(rollout), 0.0) for rollout in group]])
        teaches = bool((outcomes > 0).any()) if is_expert else has_signal(group)
        if len(group) < 2 and not is_expert:
            continue                                    # a group of one has no mean to differ from
        advantages = advantages_of(outcomes if is_expert else rewards)[0]
        if objective.advantage_clip > 0:
            advantages = advantages.clamp(-objective.advantage_clip, objective.advantage_clip)
        for rollout, advantage in zip(group, advantages.tolist()):
            rollout.advantage = advantage
            if teaches and not (is_expert and advantage == 0):
                taught.append(rollout)
    return taught


def make_minibatches(taught, count, device_batch_size, pad_id, compute, seed):
    """This rank's rollouts that teach -> `count` lists of RolloutBatches, one list per optimizer step, at most as many as there are groups.

    Whole groups, shuffled by the seed over all ranks: which group is in which minibatch does not depend on the number of ranks."""
    places = sorted({place for part in compute.gather_objects([rollout.place for rollout in taught]) for place in part})
    random.Random(seed).shuffle(places)
    count = max(1, min(count, len(places)))
    chosen = [set(places[i::count]) for i in range(count)]
    return [make_shared_batches([rollout for rollout in taught if rollout.place in part], device_batch_size, pad_id, compute.device) for part in chosen]


# ---------------------------------------------------------------------------------------------------------------------
# Log-probabilities and KL at the completion positions

def target_logprobs(model, hidden, targets, temperature, top_k=None):
    """hidden (B, T, C), targets (B, T) -> log p (B, T) under the distribution that is sampled, 0 where the target is -1."""
    if top_k is None:
        return model.logprobs_of_hidden(hidden, targets, temperature)
    wanted = targets != -1
    result = torch.zeros(targets.shape, device=hidden.device)
    result[wanted] = kept_logprobs(hidden[wanted], model.lm_head.weight, targets[wanted], temperature, top_k)
    return result


def kept_logprobs(hidden, weight, targets, temperature, top_k):
    """hidden (N, C), weight (V, C), targets (N,) -> log p of each target renormalised on the top_k likeliest tokens (N,), differentiable.

    The kept set is a constant between two ties, so the gradient is that of the kept logits. A few rows at a time, computed again in
    the backward pass: memory does not grow with N * V."""
    def of_rows(hidden, targets):
        logits = capped(F.linear(hidden, weight.to(hidden.dtype))) / temperature
        kept = logits.topk(min(top_k, logits.size(1)), dim=1).values
        return logits.gather(1, targets[:, None])[:, 0] - kept.logsumexp(dim=1)

    return in_chunks(of_rows, weight.size(0), hidden, targets)


def exact_kl(model, reference, hidden, ref_hidden, wanted, temperature):
    """hidden states (B, T, C) of both, wanted (B, T) -> sum over the wanted positions of KL(policy || reference), differentiable. The
    tokens before each position are taken as they were sampled."""
    weight, ref_weight = model.lm_head.weight, reference.lm_head.weight

    def of_rows(hidden, ref_hidden):
        logits, ref_logits = (capped(F.linear(rows, w.to(rows.dtype))) / temperature for rows, w in ((hidden, weight), (ref_hidden, ref_weight)))
        return kl_exact(logits, ref_logits)

    return in_chunks(of_rows, weight.size(0), hidden[wanted], ref_hidden[wanted]).sum()


def in_chunks(function, vocab_size, first, *others):
    return torch.cat([first.new_zeros(0, dtype=torch.float32), *(checkpoint(function, first[rows], *(other[rows] for other in others), use_reentrant=False)
                                                                   for rows in chunks(first, vocab_size))])


@torch.no_grad()
def score(model, batches, objective, into):
    """Fills `old_logprobs` or `ref_logprobs` of every batch with what a model says about its tokens."""
    for batch in batches:
        setattr(batch, into, target_logprobs(model, batch.hidden(model), batch.targets, objective.temperature, objective.top_k))


# ---------------------------------------------------------------------------------------------------------------------
# The passes

def prepare(groups, objective, model, reference, compute, device_batch_size, pad_id, minibatches=1, seed=None):
    """Judged groups -> minibatches, each a list of RolloutBatches, one optimizer step each; all that must be known before the weights move
    is in them. `model` is whole: the one that sampled. With one minibatch, `old_logprobs` come for free in its first pass."""
    taught = set_advantages(groups, objective)
    parts = make_minibatches(taught, minibatches, device_batch_size, pad_id, compute, seed)
    batches = [batch for part in parts for batch in part]
    if objective.kl_coef > 0:
        score(reference, batches, objective, "ref_logprobs")
    in_reward = objective.kl_coef > 0 and objective.kl_mode == "k1"
    if in_reward or len(parts) > 1:
        score(model, batches, objective, "old_logprobs")
    if in_reward:                                       # the one use of a sampled KL with an unbiased policy gradient (arXiv 2512.21852)
        penalties = {id(rollout): objective.kl_coef * kl for batch in batches for rollout, kl in zip(
            batch.rollouts, (kl_k1(batch.old_logprobs, batch.ref_logprobs) * batch.mask).sum(dim=1).tolist())}
        set_advantages(groups, objective, penalties)
        for batch in batches:
            batch.advantages = torch.tensor([rollout.advantage for rollout in batch.rollouts], device=compute.device)
    return parts


def learn(model, optimizer, minibatches, objective, compute, step, lr_mult, grad_clip, epochs=1, reference=None, keep=None):
    """`epochs` passes over the minibatches, one optimizer step for each -> metrics over all ranks; {} if nobody teaches anything, and then
    no weight has moved. `keep(batches)` is called with the batches of a step that fails before its error goes on."""
    passes, losses, norms = [], [], []
    for epoch in range(epochs):
        for batches in minibatches:
            tally = gradient_pass(model, batches, objective, compute, reference)
            if tally is None:                           # on every rank: all reach the optimizer's collectives or none does
                continue
            try:
                norms.append(optimizer_step(optimizer, tally["loss"], step, lr_mult, grad_clip))
            except ValueError:
                if keep:
                    keep(batches)
                raise
            losses.append(tally.pop("loss"))
            passes.append((epoch, tally))
    if not passes:
        return {}
    return {"train/loss": sum(losses) / len(losses), "train/lr_mult": lr_mult, "grad_norm": sum(norms) / len(norms), "train/updates": len(norms),
            **summarize(passes, objective, compute)}


def gradient_pass(model, batches, objective, compute, reference=None):
    """Adds the gradient of the loss over all ranks' batches -> this rank's tally of what was seen, with the whole "loss"; None without a token."""
    passes = [len(batches) if rank == compute.rank else 0 for rank in range(compute.world_size)]
    mine = torch.tensor([sum(int(batch.mask.sum()) for batch in batches), sum(len(batch.rollouts) for batch in batches), *passes], device=compute.device)
    tokens, rollouts, *passes = compute.sum(mine).tolist()
    if not tokens:
        return None
    divisor = denominator(objective.algorithm, tokens, rollouts, objective.max_new_tokens)
    total, tally = 0.0, Tally()
    for batch in batches:
        loss, logprobs = model.as_forward(lambda: loss_of(model, reference, batch, objective, divisor, tokens))
        (loss * compute.world_size).backward()          # the optimizer averages over ranks
        total += loss.item()
        tally.add(batch, logprobs, objective)
    if model.is_divided:                                # its ranks meet in every pass: who has none left joins in with a loss of 0
        for _ in range(max(passes) - len(batches)):
            (0 * model(torch.zeros(1, 1, dtype=torch.int64, device=compute.device)).sum()).backward()
    return {"loss": float(compute.sum(total)), **tally}


def loss_of(model, reference, batch, objective, divisor, tokens):
    """One pass -> (this batch's part of the step's loss, differentiable; the log-probabilities (B, T) in it). Fills `old_logprobs` where they are missing."""
    hidden = batch.hidden(model)
    logprobs = target_logprobs(model, hidden, batch.targets, objective.temperature, objective.top_k)
    if batch.old_logprobs is None:
        batch.old_logprobs = logprobs.detach()
    loss = policy_loss(objective.algorithm, logprobs, batch.old_logprobs, batch.advantages, batch.mask, **objective.clip) / divisor
    if objective.kl_coef > 0 and objective.kl_mode != "k1":
        loss = loss + objective.kl_coef * kl_loss(model, reference, batch, hidden, logprobs, objective) / tokens
    return loss, logprobs.detach()


def kl_loss(model, reference, batch, hidden, logprobs, objective):
    """The KL term summed over a batch's completion tokens, differentiable."""
    if objective.kl_mode == "k3":
        return kl_k3_loss(logprobs, batch.old_logprobs, batch.ref_logprobs, batch.mask)
    with torch.no_grad():
        ref_hidden = batch.hidden(reference)
    return exact_kl(model, reference, hidden, ref_hidden, batch.mask, objective.temperature)


class Tally(dict):
    """Sums and extremes over the tokens of a pass."""

    def __init__(self):
        super().__init__(tokens=0, rows=0, low=0, high=0, ratio=0.0, ratio_min=math.inf, ratio_max=-math.inf, difference=0.0, difference_max=0.0,
                         advantage=0.0, advantage_square=0.0, advantage_max=0.0, k1=0.0, k3=0.0, k1_max=0.0)

    def add(self, batch, logprobs, objective):
        mask = batch.mask
        ratio = (logprobs - batch.old_logprobs)[mask].exp()
        difference = (batch.old_logprobs - batch.sampler_logprobs)[mask].abs()
        low, high = clipped_tokens(objective.algorithm, logprobs, batch.old_logprobs, batch.advantages, mask, **objective.clip).tolist()
        for name, value in (("tokens", ratio.numel()), ("rows", len(batch.rollouts)), ("low", low), ("high", high), ("ratio", float(ratio.sum())),
                            ("difference", float(difference.sum())), ("advantage", float(batch.advantages.sum())),
                            ("advantage_square", float(batch.advantages.square().sum()))):
            self[name] += value
        for name, value in (("ratio_max", ratio.max()), ("difference_max", difference.max()), ("advantage_max", batch.advantages.abs().max())):
            self[name] = max(self[name], float(value))
        self["ratio_min"] = min(self["ratio_min"], float(ratio.min()))
        if batch.ref_logprobs is not None:
            k1 = kl_k1(logprobs, batch.ref_logprobs)[mask]
            self["k1"] += float(k1.sum())
            self["k3"] += float(kl_k3(logprobs, batch.ref_logprobs)[mask].sum())
            self["k1_max"] = max(self["k1_max"], float(k1.abs().max()))


def summarize(passes, objective, compute):
    """[(epoch, tally)] of each rank -> metrics over all ranks."""
    passes = [one for rank in compute.gather_objects(passes) for one in rank]
    every, first = [tally for _, tally in passes], [tally for epoch, tally in passes if epoch == 0]

    def total(name, tallies=every):
        return sum(tally[name] for tally in tallies)

    tokens, rows = total("tokens", first), total("rows", first)
    mean = total("advantage", first) / rows
    metrics = {"sampling/logp_difference/mean": total("difference", first) / tokens, "sampling/logp_difference/max": max(tally["difference_max"] for tally in first),
               "ratio/mean": total("ratio") / total("tokens"), "ratio/min": min(tally["ratio_min"] for tally in every),
               "ratio/max": max(tally["ratio_max"] for tally in every),
               "clip_ratio/low_mean": total("low") / total("tokens"), "clip_ratio/high_mean": total("high") / total("tokens"),
               "advantage/mean": mean, "advantage/std": max(0.0, total("advantage_square", first) / rows - mean ** 2) ** 0.5,
               "advantage/max": max(tally["advantage_max"] for tally in first), "train/tokens": tokens, "train/rollouts": rows}
    if objective.kl_coef > 0:
        metrics |= {"kl/k1": total("k1") / total("tokens"), "kl/k3": total("k3") / total("tokens"), "kl/max_token": max(tally["k1_max"] for tally in every)}
    return metrics
