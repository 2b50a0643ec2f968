"""Numbers that tell whether a policy learns: counted over the rollouts of a step, on all ranks."""
from collections import Counter


def rollout_metrics(groups, compute, extract, letters):
    """Groups of Rollouts on this rank -> metrics over all ranks. `extract(text)` gives the answer's letter or None."""
    gathered = [part for rank in compute.gather_objects(summarize(groups, extract)) for part in rank]
    count = len(gathered)
    lengths = [part["length"] for part in gathered]
    rewards = [part["reward"] for part in gathered]
    mean_reward = sum(rewards) / count
    chosen = Counter(part["letter"] or "none" for part in gathered)
    metrics = {
        "rl/acc": sum(part["correct"] for part in gathered) / count,
        "rl/mean_reward": mean_reward,
        "reward_std": (sum((reward - mean_reward) ** 2 for reward in rewards) / count) ** 0.5,
        "frac_reward_zero_std": sum(part["no_signal"] for part in gathered) / count,
        "completions/mean_length": sum(lengths) / count,
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(part["truncated"] for part in gathered) / count,
    }
    for name in gathered[0]["parts"]:
        metrics[f"rewards/{name}/mean"] = sum(part["parts"][name] for part in gathered) / count
    for letter in [*letters, "none"]:
        metrics[f"rl/letter_pred_counts/{letter}"] = chosen[letter]
    return metrics


def summarize(groups, extract):
    """Groups -> one small dict per rollout, which is what ranks send each other."""
    return [{"length": len(rollout.tokens), "reward": rollout.reward, "correct": rollout.rewards["correct"], "parts": rollout.rewards,
             "truncated": rollout.finish_reason == "length", "letter": extract(rollout.text),
             "no_signal": len({r.rewards["correct"] for r in group}) == 1}
            for group in groups for rollout in group]
