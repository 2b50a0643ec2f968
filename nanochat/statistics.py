"""What a score on a few hundred problems proves: intervals, baselines, pass@k, maj@k, and paired tests of two runs.

Pure functions of numbers and letters. No model, no task, no files: `tasks/evaluation.py` makes the answers that come in here.
"""
import math
from collections import Counter

import numpy as np

Z = 1.959963984540054                                   # 97.5 % of a normal distribution lie below it
EXACT_FLIPS = 15                                        # sign flips are enumerated up to 2 ** this, sampled beyond


# ---------------------------------------------------------------------------------------------------------------------
# One run

def wilson_interval(correct, n, z=Z):
    """(low, high) of the true share behind `correct` of `n` independent problems (Wilson 1927). Both may be fractional."""
    if not 0 <= correct <= n or n <= 0:
        raise ValueError(f"{correct} right answers of {n} are no share: correct must lie within 0..n, and n above 0")
    share = correct / n
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    # min and max: at 0 and 1 the bound is exact, and rounding must not step over it
    return min(share, max(0.0, (centre - half) / (1 + z * z / n))), max(share, min(1.0, (centre + half) / (1 + z * z / n)))


def clustered_error(shares):
    """Standard error of the mean of per-problem shares: the K samples of a problem are no K problems."""
    n = len(shares)
    return float(np.std(shares, ddof=1) / math.sqrt(n)) if n > 1 else math.inf


def accuracy_interval(shares):
    """Per-problem shares of right samples -> (mean, low, high), 95 %. With one sample per problem it is Wilson's interval.

    More samples shrink the clustered error; Wilson's formula then gets the number of independent answers with that error,
    and never fewer than the problems there are."""
    n, mean = len(shares), float(np.mean(shares))
    error = clustered_error(shares)
    effective = max(n, mean * (1 - mean) / error**2) if error > 0 else n
    return mean, *wilson_interval(mean * effective, effective)


def most_common(values):
    """(value, share) of the most frequent value that is not None; the first in sorted order among equals. (None, 0.0) if there is none."""
    counts = Counter(value for value in values if value is not None)
    if not counts:
        return None, 0.0
    value = min(counts, key=lambda key: (-counts[key], key))
    return value, counts[value] / len(values)


def confusion(gold, predicted):
    """{right letter: {given letter: count}}; a missing answer counts as "none"."""
    table = {}
    for right, given in zip(gold, predicted, strict=True):
        table.setdefault(right, Counter())[given or "none"] += 1
    return {right: dict(sorted(row.items())) for right, row in sorted(table.items())}


def pass_at_k(n, correct, k):
    """The chance that at least one of k samples, drawn without replacement from n of which `correct` are right, is right.

    1 - C(n-c, k) / C(n, k): unbiased, unlike 1 - (1 - c/n)^k (Chen et al. 2021, arXiv 2107.03374)."""
    if not 1 <= k <= n or not 0 <= correct <= n:
        raise ValueError(f"pass@{k} cannot be told from {n} samples of which {correct} are right: k must lie within 1..n")
    return 1.0 - math.comb(n - correct, k) / math.comb(n, k)


def majority_share(answers, gold):
    """1.0 if `gold` alone is the most frequent answer, 1/m if it shares that place with m - 1 others, else 0.0. None never votes."""
    votes = Counter(answer for answer in answers if answer is not None)
    most = max(votes.values(), default=0)
    winners = [answer for answer, count in votes.items() if count == most]
    return 1.0 / len(winners) if gold in winners else 0.0


def majority_at_k(answers, gold, k):
    """maj@k of one problem: the mean of `majority_share` over as many disjoint groups of k samples as there are."""
    if not 1 <= k <= len(answers):
        raise ValueError(f"maj@{k} needs k within 1..{len(answers)}, the number of samples")
    groups = [answers[start:start + k] for start in range(0, len(answers) - k + 1, k)]
    return sum(majority_share(group, gold) for group in groups) / len(groups)


def powers_of_two(n):
    """1, 2, 4, ... up to n, and n itself: the k that are reported."""
    return sorted({2**i for i in range(n.bit_length()) if 2**i <= n} | {n})


def centred(accuracy, random_accuracy):
    """0 for guessing, 1 for all right, negative below guessing."""
    return (accuracy - random_accuracy) / (1 - random_accuracy)


# ---------------------------------------------------------------------------------------------------------------------
# Two runs on the same problems

def mcnemar(first, second):
    """Two-sided exact p of two lists of right/wrong on the same problems: are the problems that only one of them solves
    split as a fair coin would split them? (McNemar 1947)"""
    only_first = sum(bool(a) and not b for a, b in zip(first, second, strict=True))
    only_second = sum(bool(b) and not a for a, b in zip(first, second, strict=True))
    n = only_first + only_second
    tail = sum(math.comb(n, i) for i in range(min(only_first, only_second) + 1))
    return min(1.0, 2 * tail / 2**n)                    # integers until here: no underflow however many problems


def paired_bootstrap(first, second, samples=10_000, seed=0):
    """Per-problem scores of two runs -> (mean of second - first, low, high): 95 % percentiles over redrawn problems."""
    differences = np.subtract(second, first, dtype=float)
    n = len(differences)
    generator, means = np.random.default_rng(seed), []
    for begin in range(0, samples, 500):                # in pieces: 10,000 x 14,000 indices would fill a gigabyte
        chosen = generator.integers(0, n, size=(min(500, samples - begin), n))
        means.append(differences[chosen].mean(axis=1))
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return float(differences.mean()), float(low), float(high)


def paired_permutation(first, second, samples=20_000, seed=0):
    """Two-sided p of the mean difference under random exchanges of the two runs, problem by problem. Exact for few differences."""
    differences = np.subtract(second, first, dtype=float)
    differences = differences[differences != 0]         # equal scores stay equal when exchanged
    n, observed = len(differences), abs(differences.sum())
    if n == 0:
        return 1.0
    if n <= EXACT_FLIPS:
        signs = 1.0 - 2.0 * ((np.arange(2**n)[:, None] >> np.arange(n)) & 1)
        return float((abs(signs @ differences) >= observed - 1e-9).mean())
    generator, extreme = np.random.default_rng(seed), 0
    for begin in range(0, samples, 500):
        signs = generator.integers(0, 2, size=(min(500, samples - begin), n)) * 2.0 - 1.0
        extreme += int((abs(signs @ differences) >= observed - 1e-9).sum())
    return (extreme + 1) / (samples + 1)                # the observed order is one of the possible ones


def effect_size(first, second, yes_or_no):
    """-> (name, how large the difference is whatever the number of problems; None where no problem differs or all differ alike).

    Cohen's g, the share of B's among the problems that only one solves, less 1/2 (0.05 small, 0.15 medium, 0.25 large); for means
    Cohen's d_z, the mean difference in standard deviations of the differences (0.2, 0.5, 0.8)."""
    differences = np.subtract(second, first, dtype=float)
    if yes_or_no:
        flips = int(np.count_nonzero(differences))
        return "Cohen's g", float((differences > 0).sum() / flips - 0.5) if flips else None
    spread = float(np.std(differences, ddof=1)) if len(differences) > 1 else 0.0
    return "Cohen's d_z", float(differences.mean() / spread) if spread > 0 else None


# ---------------------------------------------------------------------------------------------------------------------
# In words

def percent(value):
    return f"{100 * value:.2f} %"


def verdict(metrics):
    """Whether a score is above what can be scored without reading the question. `metrics` as from evaluation.summarize."""
    accuracy, low, high = (metrics[name] for name in ("accuracy", "ci_low", "ci_high"))
    constant, random_accuracy = metrics.get("best_constant") or {"share": 0.0}, metrics["random_accuracy"]
    if constant["share"] >= random_accuracy and constant["share"] > 0:
        blind, name = constant["share"], f"the best constant answer ({constant['letter']}, {percent(constant['share'])})"
    else:
        blind, name = random_accuracy, f"guessing ({percent(random_accuracy)})"
    said = f"{percent(accuracy)} [{percent(low)}, {percent(high)}]"
    if blind == 0:
        return f"{said}; blind answers score nothing here"
    if low > blind:
        text = f"{said} is above {name}: the whole interval is"
        p = metrics.get("p_against_constant")
        return text + (f", though problem by problem the lead could be chance (p = {p:.2g})" if p is not None and p > 0.05 else "")
    if high < blind:
        return f"{said} is below {name}: the whole interval is"
    return f"{said} cannot be told from {name}, which lies within the interval: no evidence that the questions are understood"


def compare(first, second):
    """Per-problem scores (0..1) of runs A and B on the same problems -> the paired tests as a dict, with a verdict in words."""
    difference, low, high = paired_bootstrap(first, second)
    yes_or_no = all(score in (0, 1) for score in (*first, *second))
    p = mcnemar(first, second) if yes_or_no else paired_permutation(first, second)
    test = "exact McNemar" if yes_or_no else "paired permutation"
    name, effect = effect_size(first, second, yes_or_no)
    size = "" if effect is None else f", effect size {name} = {effect:+.2f}"
    said = f"B - A = {100 * difference:+.2f} points [{100 * low:+.2f}, {100 * high:+.2f}] on {len(first)} problems, {test} p = {p:.3g}{size}"
    if p <= 0.05 and difference:
        words = f"{'B beats A' if difference > 0 else 'A beats B'} beyond noise: {said}"
    else:
        words = f"no difference beyond noise: {said}"
    return {"n": len(first), "accuracy_a": float(np.mean(first)), "accuracy_b": float(np.mean(second)), "difference": difference, "ci_low": low,
            "ci_high": high, "p": p, "test": test, "effect": name, "effect_size": effect, "only_a": sum(a > b for a, b in zip(first, second)),
            "only_b": sum(b > a for a, b in zip(first, second)), "verdict": words}
