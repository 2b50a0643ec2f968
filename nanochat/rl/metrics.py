"""Numbers that tell whether a policy learns: counted over the rollouts of a step, on all ranks."""
import time
from collections import Counter


def rollout_metrics(groups, compute, extract, letters, num_samples=None, by_task=False):
    """Groups of Rollouts on this rank -> metrics over all ranks; {} if there is not one. `extract(text)` gives the answer's letter or None.

    All that was sampled counts, not only what will be trained on. `num_samples` says how many were asked for, so that those that could not
    be judged are counted; `by_task` adds accuracy and reward of each task."""
    gathered = [part for rank in compute.gather_objects([summarize(group, extract) for group in groups]) for part in rank]
    rollouts = [one for group in gathered for one in group]
    count = len(rollouts)
    if not count:
        return {}
    lengths = [one["length"] for one in rollouts]
    rewards = [one["reward"] for one in rollouts]
    mean_reward, right = sum(rewards) / count, [sum(one["correct"] for one in group) / len(group) for group in gathered]
    chosen = Counter(one["letter"] or "none" for one in rollouts if one["has_letters"])
    metrics = {
        "rl/acc": sum(one["correct"] for one in rollouts) / count,
        "rl/mean_reward": mean_reward,
        "frac_reward_zero_std": sum(one["no_signal"] for one in rollouts) / count,
        "rl/pass@group": sum(share > 0 for share in right) / len(right),
        "rl/groups": len(gathered),
        "completions/mean_length": sum(lengths) / count,
        "completions/min_length": min(lengths),
        "completions/max_length": max(lengths),
        "completions/clipped_ratio": sum(one["truncated"] for one in rollouts) / count,
        "reward": mean_reward,
        "reward_std": (sum((reward - mean_reward) ** 2 for reward in rewards) / count) ** 0.5,
        "reward_min": min(rewards),
        "reward_max": max(rewards),
    }
    if num_samples:
        metrics["completions/unjudged"] = num_samples * len(gathered) - count
    for name in sorted({name for one in rollouts for name in one["parts"]}, key=lambda name: (name != "correct", name)):
        values = [one["parts"][name] for one in rollouts if name in one["parts"]]
        metrics[f"rewards/{name}/mean"] = sum(values) / len(values)
    for letter in [*letters, "none"] if letters else []:
        metrics[f"rl/letter_pred_counts/{letter}"] = chosen[letter]
    for task in sorted({one["task"] for one in rollouts if by_task}):
        of_task = [one for one in rollouts if one["task"] == task]
        metrics |= {f"task/{task}/rollouts": len(of_task), f"task/{task}/acc": sum(one["correct"] for one in of_task) / len(of_task),
                    f"task/{task}/reward": sum(one["reward"] for one in of_task) / len(of_task)}
    return metrics


def summarize(group, extract):
    """A group -> one small dict per rollout, which is what ranks send each other."""
    no_signal = len({rollout.rewards["correct"] > 0 for rollout in group}) == 1
    found = []
    for rollout in group:
        conversation = rollout.conversation or {"letters": True}
        found.append({"length": len(rollout.tokens), "reward": rollout.reward, "correct": rollout.rewards["correct"], "parts": rollout.rewards,
                      "truncated": rollout.finish_reason == "length", "letter": extract(rollout.text), "has_letters": bool(conversation.get("letters")),
                      "no_signal": no_signal, "task": conversation.get("task", "none")})
    return found


class Clock:
    """Seconds between laps, the device's work included."""

    def __init__(self, compute):
        self.compute = compute
        self.lap()

    def lap(self):
        self.compute.synchronize()
        since, self.since = getattr(self, "since", 0.0), time.perf_counter()
        return self.since - since
