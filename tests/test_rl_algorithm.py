"""The arithmetic of policy gradients, on a policy of three tokens where everything can be enumerated or differentiated by hand."""
import itertools
import math

import pytest
import torch

from nanochat.rl.algorithm import (ALGORITHMS, cispo_loss, clip_counts, clipped, dapo_loss, denominator, expert_advantages, gspo_loss,
                                   group_advantages, groups_with_signal, grpo_loss, kl_exact, kl_k1, kl_k3, kl_k3_loss, log_ratios,
                                   normalized_advantages, policy_loss, reinforce_loss, rewards_minus_kl, rloo_advantages)

B, T, V = 4, 3, 3
TOKENS = torch.tensor([[0, 1, 2], [2, 2, 0], [1, 0, 0], [0, 2, 1]])
MASK = torch.tensor([[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]], dtype=torch.bool)
ADVANTAGES = torch.tensor([1.0, -0.5, 0.25, -0.75], dtype=torch.float64)
RATIO_LOSSES = [name for name in ALGORITHMS if ALGORITHMS[name].loss is not reinforce_loss]


def normal(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def logprobs_of(logits):
    """(B, T, V) logits, or (V,) shared by all positions -> (B, T) of TOKENS."""
    return torch.log_softmax(logits, dim=-1).expand(B, T, V).gather(2, TOKENS[:, :, None])[:, :, 0]


def gradient(function, at):
    at = at.clone().requires_grad_()
    return torch.autograd.grad(function(at), at)[0]


def finite_differences(function, at, h=1e-6):
    result = torch.zeros_like(at)
    for place in range(at.numel()):
        step = torch.zeros_like(at)
        step.view(-1)[place] = h
        result.view(-1)[place] = (function(at + step) - function(at - step)) / (2 * h)
    return result


# ---------------------------------------------------------------------------------------------------------------------
# Losses

@pytest.mark.parametrize("name", [name for name in ALGORITHMS if name != "cispo"])
@pytest.mark.parametrize("distance", [0.01, 0.5])
def test_the_gradient_of_every_loss_agrees_with_finite_differences(name, distance):
    logits = normal(B, T, V, seed=1)
    old = logprobs_of(logits + distance * normal(B, T, V, seed=2))

    def loss(logits):
        return policy_loss(name, logprobs_of(logits), old, ADVANTAGES, MASK)

    torch.testing.assert_close(gradient(loss, logits), finite_differences(loss, logits), rtol=1e-6, atol=1e-8)
    assert gradient(loss, logits).abs().sum() > 0


def test_cispo_has_the_gradient_of_reinforce_with_its_clipped_ratios_as_constants():
    logits = normal(B, T, V, seed=1)
    old = logprobs_of(logits + normal(B, T, V, seed=2))
    weights = (logprobs_of(logits) - old).exp().clamp(0.4, 1.4)
    assert (weights == 1.4).any() and (weights == 0.4).any()
    found = gradient(lambda logits: cispo_loss(logprobs_of(logits), old, ADVANTAGES, MASK, 0.6, 0.4), logits)
    frozen = finite_differences(lambda logits: -(ADVANTAGES[:, None] * weights * logprobs_of(logits) * MASK).sum(), logits)
    torch.testing.assert_close(found, frozen, rtol=1e-6, atol=1e-8)


def test_the_gradient_of_the_kl_losses_agrees_with_finite_differences():
    logits, old, ref = normal(B, T, V, seed=1), logprobs_of(normal(B, T, V, seed=2)), logprobs_of(normal(B, T, V, seed=3))
    for loss in (lambda logits: kl_k3_loss(logprobs_of(logits), old, ref, MASK),
                 lambda logits: kl_exact(logits, normal(B, T, V, seed=3)).sum()):
        torch.testing.assert_close(gradient(loss, logits), finite_differences(loss, logits), rtol=1e-6, atol=1e-8)


def test_on_policy_every_loss_has_the_gradient_of_reinforce():
    logits, lengths = normal(B, T, V, seed=1), MASK.sum(dim=1)
    old = logprobs_of(logits)
    by_token = gradient(lambda logits: reinforce_loss(logprobs_of(logits), ADVANTAGES, MASK), logits)
    by_rollout = gradient(lambda logits: reinforce_loss(logprobs_of(logits), ADVANTAGES / lengths, MASK), logits)
    for name in ALGORITHMS:
        found = gradient(lambda logits: policy_loss(name, logprobs_of(logits), old, ADVANTAGES, MASK), logits)
        torch.testing.assert_close(found, by_rollout if name in ("grpo", "gspo") else by_token, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_accumulated_over_micro_batches_a_loss_is_that_of_the_full_batch(name):
    logits, old = normal(B, T, V, seed=1), logprobs_of(normal(B, T, V, seed=2))
    whole = policy_loss(name, logprobs_of(logits), old, ADVANTAGES, MASK)
    parts = sum(policy_loss(name, logprobs_of(logits)[rows], old[rows], ADVANTAGES[rows], MASK[rows]) for rows in ([2], [0, 3], [1]))
    assert float(whole) == pytest.approx(float(parts), rel=1e-12)


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("name", [*RATIO_LOSSES, "reinforce"])
def test_a_step_down_the_loss_makes_good_tokens_likelier_and_bad_ones_rarer(name, advantage):
    logits = normal(B, T, V, seed=1)
    old, advantages = logprobs_of(logits), torch.full((B,), advantage, dtype=torch.float64)
    stepped = logits - 1e-3 * gradient(lambda logits: policy_loss(name, logprobs_of(logits), old, advantages, MASK), logits)
    change = (logprobs_of(stepped) - old) * advantage
    assert (change[MASK] > 0).all() and (change[~MASK] == 0).all()


@pytest.mark.parametrize("advantage, ratio, pulls", [
    (1.0, 1.5, False), (1.0, 1.1, True), (1.0, 0.5, True),       # a good token: no pull once it has risen far; full pull back up
    (-1.0, 0.5, False), (-1.0, 0.9, True), (-1.0, 1.5, True)])   # a bad token: no pull once it has fallen far; full pull back down
@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo"])
def test_the_clip_binds_on_the_side_that_the_sign_of_the_advantage_says(name, advantage, ratio, pulls):
    old, mask = torch.full((1, 2), -1.0, dtype=torch.float64), torch.ones(1, 2)
    found = gradient(lambda logprobs: policy_loss(name, logprobs, old, torch.tensor([advantage], dtype=torch.float64), mask,
                                                  clip_low=0.2, clip_high=0.2), old + math.log(ratio))
    weight = 0.5 if name in ("grpo", "gspo") else 1.0
    torch.testing.assert_close(found, torch.full_like(found, -advantage * ratio * weight * pulls))
    assert float(clipped(torch.tensor(ratio), torch.tensor(advantage), 0.2, 0.2)) == pytest.approx(
        -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage))


def test_clip_counts_are_the_tokens_without_a_gradient():
    logits = normal(B, T, V, seed=1)
    old = logprobs_of(logits + normal(B, T, V, seed=2))
    pulled = gradient(lambda logprobs: dapo_loss(logprobs, old, ADVANTAGES, MASK), logprobs_of(logits))
    low, high = clip_counts(logprobs_of(logits), old, ADVANTAGES, MASK, 0.2, 0.28)
    assert low > 0 and high > 0
    assert int(low + high) == int(((pulled == 0) & MASK).sum())


def test_cispo_never_loses_a_token():
    logits = normal(B, T, V, seed=1)
    old = logprobs_of(logits + 3 * normal(B, T, V, seed=2))
    pulled = gradient(lambda logprobs: cispo_loss(logprobs, old, ADVANTAGES, MASK, clip_low=0.2), logprobs_of(logits))
    assert (pulled[MASK] != 0).all() and (pulled[~MASK] == 0).all()


def test_dapo_clips_higher_upwards_than_downwards():
    old, mask = torch.zeros(1, 1), torch.ones(1, 1)
    for ratio, pulls in ((1.25, True), (1.3, False)):
        found = gradient(lambda logprobs: dapo_loss(logprobs, old, torch.ones(1), mask), torch.full((1, 1), math.log(ratio)))
        assert bool(found.item()) == pulls


def test_gspo_judges_a_rollout_as_a_whole():
    """Two tokens whose ratios cancel: the rollout's ratio is 1, where GRPO would clip one of them."""
    old, mask, one = torch.zeros(1, 2), torch.ones(1, 2), torch.ones(1)
    cancelling = torch.tensor([[0.5, -0.5]])
    assert (gradient(lambda logprobs: gspo_loss(logprobs, old, one, mask), cancelling) == -0.5).all()
    assert gradient(lambda logprobs: grpo_loss(logprobs, old, one, mask), cancelling)[0, 0] == 0


def test_a_second_epoch_leaves_ratio_1():
    logits = normal(B, T, V, seed=1)
    old = logprobs_of(logits)
    assert (log_ratios(old, old, MASK) == 0).all()
    for _ in range(2):
        logits = logits - 0.5 * gradient(lambda logits: grpo_loss(logprobs_of(logits), old, ADVANTAGES, MASK), logits)
    assert (log_ratios(logprobs_of(logits), old, MASK)[MASK].abs() > 1e-3).all()


def test_nothing_behind_the_mask_reaches_a_loss():
    logits, old = normal(B, T, V, seed=1), logprobs_of(normal(B, T, V, seed=2))
    wild = torch.where(MASK, old, -1e30)
    for name in ALGORITHMS:
        clean = policy_loss(name, logprobs_of(logits), old, ADVANTAGES, MASK)
        assert torch.equal(policy_loss(name, logprobs_of(logits), wild, ADVANTAGES, MASK), clean)
        nothing = policy_loss(name, logprobs_of(logits), old, ADVANTAGES, torch.zeros_like(MASK))
        assert float(nothing) == 0.0
    assert torch.equal(kl_k3_loss(logprobs_of(logits), wild, wild, MASK), kl_k3_loss(logprobs_of(logits), old, old, MASK))


def test_denominators_are_the_papers():
    assert [denominator(name, 1000, 16, 256) for name in ("reinforce", "dapo", "cispo", "expert")] == [1000] * 4
    assert [denominator(name, 1000, 16, 256) for name in ("grpo", "gspo", "rloo")] == [16] * 3
    assert denominator("dr_grpo", 1000, 16, 256) == 16 * 256


def test_an_unknown_algorithm_is_an_error_that_names_the_known():
    with pytest.raises(ValueError, match="'ppo' is not one of the 8 known: use reinforce, rloo"):
        policy_loss("ppo", torch.zeros(1, 1), torch.zeros(1, 1), torch.zeros(1), torch.ones(1, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Advantages

def test_a_group_of_equals_teaches_nothing():
    for value in (0.0, 0.1, 1.0, 1.1):
        equals = torch.full((2, 6), value)
        for advantages in (group_advantages, normalized_advantages, rloo_advantages):
            assert (advantages(equals) == 0).all()  # exactly: 1e-9 over a standard deviation of 0 would be a lesson
        assert not groups_with_signal(equals == 1.0).any()


def test_advantages_against_their_definitions():
    rewards = torch.tensor([[1.1, 0.0, 0.1, 0.1], [1.0, 1.0, 1.0, 0.0]], dtype=torch.float64)
    for group, mean, rloo, normalized in zip(rewards, group_advantages(rewards), rloo_advantages(rewards), normalized_advantages(rewards, 0.0)):
        for i in range(4):
            others = [float(group[j]) for j in range(4) if j != i]
            assert float(mean[i]) == pytest.approx(float(group[i] - group.mean()))
            assert float(rloo[i]) == pytest.approx(float(group[i]) - sum(others) / 3)
            assert float(normalized[i]) == pytest.approx(float((group[i] - group.mean()) / group.std()))
    torch.testing.assert_close(group_advantages(rewards).sum(dim=1), torch.zeros(2, dtype=torch.float64))
    assert expert_advantages(torch.tensor([[1.0, 0.0]])).tolist() == [[1.0, 0.0]]


def test_rloo_is_unbiased_and_the_group_mean_shrinks_the_gradient_by_one_part_in_g():
    """All groups of 3 from a policy of 3 tokens, enumerated, against the gradient of the expected reward."""
    logits, rewards, G = normal(V, seed=1), torch.tensor([1.0, 0.1, 0.0], dtype=torch.float64), 3
    true = gradient(lambda logits: torch.softmax(logits, dim=0) @ rewards, logits)
    for advantages_of, factor in ((rloo_advantages, 1.0), (group_advantages, (G - 1) / G)):
        torch.testing.assert_close(expected_update(logits, rewards, G, advantages_of), true * factor, rtol=1e-10, atol=1e-12)


def expected_update(logits, rewards, G, advantages_of, is_taught=lambda group: True):
    """The mean over all groups of G tokens of REINFORCE's (ascent) gradient per rollout."""
    probs, total = torch.softmax(logits, dim=0), torch.zeros_like(logits)
    for group in itertools.product(range(V), repeat=G):
        group = torch.tensor(group)
        if is_taught(group):
            advantages = advantages_of(rewards[group][None])[0]
            grads = torch.eye(V, dtype=logits.dtype)[group] - probs  # d log softmax / d logits
            total += probs[group].prod() * (advantages[:, None] * grads).sum(dim=0) / G
    return total


def test_gating_on_the_outcome_beats_the_std_filter_on_phantom_advantages():
    """A hard problem: the right answer is rare, and a wrong answer in the right format earns 0.1. Groups of wrong answers differ only
    in format. Kept because their rewards vary, and scaled by their std, they teach the format first and make the right answer
    rarer than it was; gated on the outcome, the same 40 steps of the same size teach the right answer."""
    rewards = torch.tensor([1.1, 0.1, 0.0], dtype=torch.float64)  # right; wrong, well-formed; wrong, malformed
    start = torch.tensor([0.02, 0.30, 0.68], dtype=torch.float64).log()

    def learn(advantages_of, is_taught):
        logits = start.clone()
        for _ in range(40):
            logits += expected_update(logits, rewards, 4, advantages_of, is_taught)
        return torch.softmax(logits, dim=0)[0].item()

    by_std = learn(normalized_advantages, lambda group: float(rewards[group].std()) > 0)
    by_outcome = learn(normalized_advantages, lambda group: bool(groups_with_signal((group == 0)[None])[0]))
    assert by_std < 0.05 and by_outcome > 0.9


def test_groups_with_signal_look_at_the_outcome_alone():
    outcomes = torch.tensor([[1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1], [1, 1, 0, 1]])
    assert groups_with_signal(outcomes).tolist() == [True, False, False, True]


# ---------------------------------------------------------------------------------------------------------------------
# KL

def policies():
    return normal(V, seed=1), normal(V, seed=3)


def test_estimates_of_the_kl_are_right_on_average():
    logits, ref = policies()
    logprobs, ref_logprobs = torch.log_softmax(logits, 0), torch.log_softmax(ref, 0)
    exact = float(sum(math.exp(p) * (p - q) for p, q in zip(logprobs.tolist(), ref_logprobs.tolist())))
    assert float(kl_exact(logits, ref)) == pytest.approx(exact, rel=1e-12)
    assert float(kl_exact(ref, logits)) != pytest.approx(exact, rel=1e-2)  # the direction matters
    for estimate in (kl_k1, kl_k3):
        assert float(logprobs.exp() @ estimate(logprobs, ref_logprobs)) == pytest.approx(exact, rel=1e-12)
    assert (kl_k3(logprobs, ref_logprobs) >= 0).all() and (kl_k1(logprobs, ref_logprobs) < 0).any()


def test_gradients_of_the_kl_are_right_on_average():
    """Enumerated over the sampled token: k1 in the reward and k3 times ratio have the gradient of the exact KL; k1 in a loss has
    none, and k3 alone has that of the KL the other way round."""
    logits, ref = policies()
    probs, ref_logprobs = torch.softmax(logits, 0), torch.log_softmax(ref, 0)
    exact = gradient(lambda logits: kl_exact(logits, ref), logits)
    reversed_kl = gradient(lambda logits: kl_exact(ref, logits), logits)
    old = torch.log_softmax(logits, 0)

    def expected(loss_of):  # the mean over the sampled token of the gradient of its loss
        return sum(probs[token] * gradient(lambda logits: loss_of(torch.log_softmax(logits, 0)[token][None, None], token), logits)
                   for token in range(V))

    def row(values, token):
        return values[token][None, None]

    mask = torch.ones(1, 1)
    ratio_k3 = expected(lambda logprobs, token: kl_k3_loss(logprobs, row(old, token), row(ref_logprobs, token), mask))
    in_reward = expected(lambda logprobs, token: reinforce_loss(
        logprobs, rewards_minus_kl(torch.zeros(1), logprobs, row(ref_logprobs, token), mask, beta=1.0), mask))
    plain_k3 = expected(lambda logprobs, token: kl_k3(logprobs, row(ref_logprobs, token)).sum())
    plain_k1 = expected(lambda logprobs, token: kl_k1(logprobs, row(ref_logprobs, token)).sum())
    for found, true in ((ratio_k3, exact), (in_reward, exact), (plain_k3, reversed_kl), (plain_k1, torch.zeros_like(exact))):
        torch.testing.assert_close(found, true, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(exact, reversed_kl, rtol=0.1)


def test_equal_policies_have_a_kl_of_exactly_0():
    logits = normal(B, T, 50, seed=1).float()
    logprobs = torch.log_softmax(logits, -1)
    for kl in (kl_exact(logits, logits.clone()), kl_k1(logprobs, logprobs), kl_k3(logprobs, logprobs)):
        assert (kl == 0).all()
    rewards = torch.tensor([1.1, 0.0, 0.1, 1.0])
    assert torch.equal(rewards_minus_kl(rewards, logprobs[:, :, 0], logprobs[:, :, 0], MASK, 0.3), rewards)


def test_the_kl_lowers_the_reward_of_tokens_the_reference_would_not_say():
    logprobs, ref_logprobs = torch.tensor([[-0.5, -9.0]]), torch.tensor([[-2.5, -1.0]])
    kept = rewards_minus_kl(torch.tensor([1.0]), logprobs, ref_logprobs, torch.tensor([[1, 0]]), beta=0.1)
    assert kept.tolist() == pytest.approx([1.0 - 0.1 * 2.0])
