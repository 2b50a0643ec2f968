"""Records of an evaluation become metrics. A record is a dict of what a model said about one problem:

    {"index": 0, "prompt": ..., "gold": "B", "letters": ["A", ...],
     "completions": [{"text", "answer": "B" or None, "correct", "finish_reason", "tokens"}, ...],      one per sample; with "tool" if one was used
     "no_reasoning": {"answer": "A", "logprobs": {"A": -0.9, ...}}, "after_reasoning": ...,            letters read, not written
     "controls": {"blind": {"answer", "correct", "choice"}, "shift 1": ..., ...}}

Only index, prompt and gold are always there. With "scored": "letter" the letter read counts, not what was written; "chance" is what
guessing scores on this problem; level, subject, subtask and kind group the problems. The statistics are in nanochat/statistics.py.
"""
import math
from collections import Counter

import numpy as np

from nanochat.statistics import (accuracy_interval, clustered_error, confusion, majority_at_k, mcnemar, most_common, pass_at_k, powers_of_two,
                                 wilson_interval)
from tasks.aqua import split_choices


GROUPS = ("level", "subject", "subtask", "kind")        # what a conversation may say about its problem


def is_written(record):
    """True if the record is scored by its completions, False if by the letter that was read."""
    return "completions" in record and record.get("scored") != "letter"


def score(record):
    """The share of right answers to one problem: of the completions, or of the letter read."""
    return written_score(record) if is_written(record) else letter_score(record)


def written_score(record):
    return float(np.mean([completion["correct"] for completion in record["completions"]]))


def letter_score(record):
    return float(record["no_reasoning"]["answer"] == record["gold"])


def answers_of(record):
    return [completion["answer"] for completion in record["completions"]] if is_written(record) else [record["no_reasoning"]["answer"]]


def summarize(records, random_accuracy=0.0):
    """Records of one task -> its metrics. Shares lie within 0..1."""
    if not records:
        raise ValueError("there are 0 answers to summarize: check the task's split and --max-problems")
    accuracy, low, high = accuracy_interval([score(record) for record in records])
    gold = [record["gold"] for record in records]
    metrics = {"accuracy": accuracy, "ci_low": low, "ci_high": high, "best_constant": None, "random_accuracy": random_accuracy}
    if any(gold):
        letter, share = most_common(gold)
        metrics["best_constant"] = {"letter": letter, "share": share}
        if all(score(record) in (0, 1) for record in records):
            metrics["p_against_constant"] = mcnemar([right == letter for right in gold], [score(record) for record in records])
    if all("chance" in record for record in records):
        metrics["random_accuracy"] = math.fsum(record["chance"] for record in records) / len(records)
    if all("letters" in record for record in records):
        metrics |= both_ways(records)
        metrics["random_accuracy"] = math.fsum(1 / len(record["letters"]) for record in records) / len(records)
        letters = sorted(set().union(*(record["letters"] for record in records)))
        pairs = [(record["gold"], answer) for record in records for answer in answers_of(record)]
        metrics["letters_gold"] = {letter: gold.count(letter) for letter in letters}
        given = Counter(answer or "none" for _, answer in pairs)
        metrics["letters_pred"] = {letter: given[letter] for letter in [*letters, "none"]}
        metrics["confusion"] = confusion(*zip(*pairs))
    too_long = sum(is_too_long(record) for record in records)
    if too_long:
        metrics["too_long"] = too_long
    metrics |= completion_metrics(records, any(gold)) | letter_metrics(records) | control_metrics(records)
    for name in GROUPS:
        groups = {}
        for record in records:
            if record.get(name) is not None:
                groups.setdefault(str(record[name]), []).append(score(record))
        if len(groups) > 1:
            metrics[f"by_{name}"] = {key: {"n": len(groups[key]), **interval(groups[key])} for key in sorted(groups)}
    return metrics


def interval(scores):
    return dict(zip(("accuracy", "ci_low", "ci_high"), accuracy_interval(scores)))


def both_ways(records):
    """Multiple choice: the accuracy of what was written and of the letter read after "Answer:", where all records have them."""
    metrics = {}
    if all("completions" in record for record in records):
        metrics["generative"] = interval([written_score(record) for record in records])
    if all("no_reasoning" in record for record in records):
        metrics["categorical"] = interval([letter_score(record) for record in records])
    return metrics


def is_too_long(record):
    """True if the prompt fills the model's context, so that no answer could be given; it counts as wrong."""
    if "completions" in record:
        return record["completions"][0]["finish_reason"] == "prompt too long"
    return not record["no_reasoning"]["logprobs"]


def completion_metrics(records, readable):
    completions = [completion for record in records for completion in record.get("completions", ())]
    if not completions:
        return {"parse_failures": None, "mean_tokens": None}
    samples = len(records[0]["completions"])            # every problem has as many
    metrics = {"parse_failures": float(np.mean([completion["answer"] is None for completion in completions])) if readable else None,
               "truncated": float(np.mean([completion["finish_reason"] != "stop" for completion in completions])),
               "mean_tokens": float(np.mean([completion["tokens"] for completion in completions]))}
    if any("tool" in completion for completion in completions):
        metrics["tool_use"] = float(np.mean(["tool" in completion for completion in completions]))
    if samples > 1:
        metrics["standard_error"] = clustered_error([written_score(record) for record in records])
        right = [sum(completion["correct"] for completion in record["completions"]) for record in records]
        answers = [[completion["answer"] for completion in record["completions"]] for record in records]
        values = {"pass@k": lambda k: [pass_at_k(samples, count, k) for count in right]}
        if readable:
            values["maj@k"] = lambda k: [majority_at_k(given, record["gold"], k) for given, record in zip(answers, records)]
        for name, of_problems in values.items():
            # The K samples of a problem are no K problems: the error is that of the mean over problems.
            metrics[name] = {str(k): float(np.mean(of_problems(k))) for k in powers_of_two(samples)}
            metrics[f"{name}_error"] = {str(k): clustered_error(of_problems(k)) for k in powers_of_two(samples)}
    return metrics


def letter_metrics(records):
    """Accuracy of the letters read without and after reasoning, and how clearly the best one leads."""
    metrics = {"no_reasoning": None}
    for name in ("no_reasoning", "after_reasoning"):
        read = [record for record in records if record.get(name, {}).get("logprobs")]
        if read:
            top = [sorted(record[name]["logprobs"].values())[-2:] for record in read]
            metrics |= {name: float(np.mean([record[name]["answer"] == record["gold"] for record in read])), f"{name}_n": len(read),
                        f"{name}_margin": float(np.mean([best - second for second, best in top]))}
    return metrics


def control_metrics(records):
    """What the options alone score, the accuracy under each cyclic order, and how often two orders choose the same text."""
    controlled = [record for record in records if "controls" in record]
    if not controlled:
        return {}
    blind = [record["controls"]["blind"]["correct"] for record in controlled]
    low, high = wilson_interval(sum(blind), len(blind))
    by_shift, agreements = {}, []
    for record in controlled:
        given = choose(record["prompt"], record["letters"], record["gold"], answers_of(record)[0])
        orders = [given] + [record["controls"][f"shift {shift}"] for shift in range(1, len(record["letters"]))]
        for shift, order in enumerate(orders):
            by_shift.setdefault(shift, []).append(order["correct"])
        pairs = [(one["choice"], other["choice"]) for i, one in enumerate(orders) for other in orders[:i]]
        agreements.append(np.mean([one == other and one is not None for one, other in pairs]))
    return {"controlled": len(controlled), "question_blind": {"accuracy": float(np.mean(blind)), "ci_low": low, "ci_high": high},
            "shift_accuracy": [float(np.mean(by_shift[shift])) for shift in sorted(by_shift)], "shift_agreement": float(np.mean(agreements))}


def choose(prompt, letters, gold, answer):
    """What a letter means under the prompt's order of the choices: right or wrong, and the text of the choice."""
    _, choices, _ = split_choices(prompt, letters)
    return {"answer": answer, "correct": answer == gold, "choice": None if answer is None else choices[letters.index(answer)]}
