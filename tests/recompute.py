"""Every number of an evaluation's summary, computed again from its answers by nothing but this file and the standard library.

    python -m tests.recompute EVAL.json [EVAL_answers.jsonl]        # prints what differs; exit status 1 if anything does

It imports none of nanochat/statistics.py, tasks/metrics.py and tasks/evaluation.py, and counts where they use formulas, so that an error
there is seen here. A number of the summary that it does not know is an error too.
"""
import itertools
import json
import math
import statistics
import sys
from fractions import Fraction
from pathlib import Path

Z = statistics.NormalDist().inv_cdf(0.975)


def wilson(share, n):
    """The two shares p with |share - p| = z sqrt(p (1 - p) / n), as roots of the quadratic equation in p."""
    a, b, c = 1 + Z * Z / n, -(2 * share + Z * Z / n), share * share
    root = math.sqrt(max(0.0, b * b - 4 * a * c))
    return max(0.0, (-b - root) / (2 * a)), min(1.0, (-b + root) / (2 * a))


def mean(values):
    values = list(values)
    return math.fsum(values) / len(values)


def error(values):
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else math.inf


def interval(scores):
    """Mean and Wilson's interval, with as many independent answers as give the clustered error, and at least one a problem."""
    share, n = mean(scores), len(scores)
    if error(scores) > 0:
        n = max(n, share * (1 - share) / error(scores)**2)
    low, high = wilson(share, n)
    return {"accuracy": share, "ci_low": low, "ci_high": high}


def is_letter_scored(record):
    return "completions" not in record or record.get("scored") == "letter"


def letter_right(record):
    return 1.0 if record["no_reasoning"]["answer"] == record["gold"] else 0.0


def written_right(record):
    return sum(completion["correct"] for completion in record["completions"]) / len(record["completions"])


def right(record):
    return letter_right(record) if is_letter_scored(record) else written_right(record)


def given(record):
    return [record["no_reasoning"]["answer"]] if is_letter_scored(record) else [completion["answer"] for completion in record["completions"]]


def pass_at(correct, n, k):
    """1 - (n-c)/n * (n-c-1)/(n-1) * ...: the chance that k draws without replacement all miss, taken from 1."""
    miss = Fraction(1)
    for i in range(k):
        miss *= Fraction(max(0, n - correct - i), n - i)
    return float(1 - miss)


def majority_at(answers, gold, k):
    shares = []
    for group in (answers[i:i + k] for i in range(0, len(answers), k)):
        if len(group) == k:
            counts = {answer: group.count(answer) for answer in group if answer is not None}
            top = [answer for answer in counts if counts[answer] == max(counts.values())]
            shares.append(1 / len(top) if gold in top else 0.0)
    return mean(shares)


def sign_test(first, second):
    """Two-sided: twice the chance of as few heads in as many fair throws, at most 1."""
    ones, others = sum(a > b for a, b in zip(first, second)), sum(b > a for a, b in zip(first, second))
    return min(1.0, float(2 * sum(Fraction(math.comb(ones + others, i), 2**(ones + others)) for i in range(min(ones, others) + 1))))


def choices_of(record):
    """The choices of the prompt, from its lines "- choice=LETTER"."""
    lines, found = record["prompt"].split("\n"), {}
    for line in lines:                                  # the last block of lines counts
        for letter in record["letters"]:
            if line.startswith("- ") and line.endswith(f"={letter}"):
                found[letter] = line[2:-len(letter) - 1]
    return found


def recompute(records, random_accuracy):
    scores, gold, n = [right(record) for record in records], [record["gold"] for record in records], len(records)
    metrics = {**interval(scores), "best_constant": None, "random_accuracy": random_accuracy, "no_reasoning": None, "parse_failures": None, "mean_tokens": None}
    if any(gold):
        best = max(sorted({answer for answer in gold if answer is not None}), key=gold.count)
        metrics["best_constant"] = {"letter": best, "share": gold.count(best) / n}
        if set(scores) <= {0, 1}:
            metrics["p_against_constant"] = sign_test([float(answer == best) for answer in gold], scores)
    if all("chance" in record for record in records):
        metrics["random_accuracy"] = mean(record["chance"] for record in records)
    if all("letters" in record for record in records):
        letters = sorted({letter for record in records for letter in record["letters"]})
        answers = [answer or "none" for record in records for answer in given(record)]
        metrics |= {"random_accuracy": mean(1 / len(record["letters"]) for record in records), "letters_gold": {letter: gold.count(letter) for letter in letters},
                    "letters_pred": {letter: answers.count(letter) for letter in [*letters, "none"]}, "confusion": {}}
        for record in records:
            for answer in given(record):
                row = metrics["confusion"].setdefault(record["gold"], {})
                row[answer or "none"] = row.get(answer or "none", 0) + 1
        if all("completions" in record for record in records):
            metrics["generative"] = interval([written_right(record) for record in records])
        if all("no_reasoning" in record for record in records):
            metrics["categorical"] = interval([letter_right(record) for record in records])
    too_long = sum(record["completions"][0]["finish_reason"] == "prompt too long" if "completions" in record else not record["no_reasoning"]["logprobs"] for record in records)
    if too_long:
        metrics["too_long"] = too_long
    metrics |= of_completions(records, any(gold)) | of_letters(records) | of_controls(records)
    for name in ("level", "subject", "subtask", "kind"):
        values = sorted({str(record[name]) for record in records if record.get(name) is not None})
        groups = {value: [right(record) for record in records if str(record.get(name)) == value] for value in values}
        if len(groups) > 1:
            metrics[f"by_{name}"] = {value: {"n": len(group), **interval(group)} for value, group in groups.items()}
    return metrics


def of_completions(records, readable):
    completions = [completion for record in records for completion in record.get("completions", ())]
    if not completions:
        return {}
    samples = len(records[0]["completions"])
    metrics = {"truncated": mean(completion["finish_reason"] != "stop" for completion in completions), "mean_tokens": mean(completion["tokens"] for completion in completions)}
    if any("tool" in completion for completion in completions):
        metrics["tool_use"] = mean("tool" in completion for completion in completions)
    if readable:
        metrics["parse_failures"] = mean(completion["answer"] is None for completion in completions)
    if samples > 1:
        metrics["standard_error"] = error([written_right(record) for record in records])
        ks = sorted({samples} | {2**i for i in range(20) if 2**i <= samples})
        values = {"pass@k": {k: [pass_at(sum(completion["correct"] for completion in record["completions"]), samples, k) for record in records] for k in ks}}
        if readable:
            values["maj@k"] = {k: [majority_at([completion["answer"] for completion in record["completions"]], record["gold"], k) for record in records] for k in ks}
        for name, by_k in values.items():
            metrics[name] = {str(k): mean(of_problems) for k, of_problems in by_k.items()}
            metrics[f"{name}_error"] = {str(k): error(of_problems) for k, of_problems in by_k.items()}
    return metrics


def of_letters(records):
    metrics = {}
    for name in ("no_reasoning", "after_reasoning"):
        read = [record for record in records if name in record and record[name]["logprobs"]]
        if read:
            leads = []
            for record in read:
                values = sorted(record[name]["logprobs"].values(), reverse=True)
                leads.append(values[0] - values[1])
            metrics |= {name: mean(record[name]["answer"] == record["gold"] for record in read), f"{name}_n": len(read), f"{name}_margin": mean(leads)}
    return metrics


def of_controls(records):
    records = [record for record in records if "controls" in record]
    if not records:
        return {}
    blind, shifts, agreements = [float(record["controls"]["blind"]["correct"]) for record in records], {}, []
    for record in records:
        answer, choices = given(record)[0], choices_of(record)
        chosen = [choices[answer] if answer else None]
        shifts.setdefault(0, []).append(answer == record["gold"])
        for shift in range(1, len(record["letters"])):
            control = record["controls"][f"shift {shift}"]
            chosen.append(control["choice"])
            shifts.setdefault(shift, []).append(control["correct"])
            # under a shift by s, letter i stands behind the choice that was at place i - s
            if control["answer"]:
                place = (record["letters"].index(control["answer"]) - shift) % len(record["letters"])
                assert control["choice"] == choices[record["letters"][place]] and control["correct"] == (record["letters"][place] == record["gold"]), record["index"]
        agreements.append(mean(float(one is not None and one == other) for one, other in itertools.combinations(chosen, 2)))
    return {"controlled": len(records), "question_blind": interval_of_counts(blind), "shift_accuracy": [mean(shifts[shift]) for shift in sorted(shifts)], "shift_agreement": mean(agreements)}


def interval_of_counts(values):
    low, high = wilson(mean(values), len(values))
    return {"accuracy": mean(values), "ci_low": low, "ci_high": high}


def differences(mine, theirs, path=""):
    """Where two nested values differ by more than rounding."""
    if isinstance(mine, dict) and isinstance(theirs, dict):
        return [line for key in sorted(set(mine) | set(theirs)) for line in
                (differences(mine[key], theirs[key], f"{path}/{key}") if key in mine and key in theirs else [f"{path}/{key} is only in the {'summary' if key in theirs else 'answers'}"])]
    if isinstance(mine, list) and isinstance(theirs, list) and len(mine) == len(theirs):
        return [line for i, (one, other) in enumerate(zip(mine, theirs)) for line in differences(one, other, f"{path}/{i}")]
    if isinstance(mine, (int, float)) and isinstance(theirs, (int, float)):
        return [] if math.isclose(mine, theirs, rel_tol=1e-9, abs_tol=1e-9) else [f"{path}: {mine} from the answers, {theirs} in the summary"]
    return [] if mine == theirs else [f"{path}: {mine!r} from the answers, {theirs!r} in the summary"]


def check(summary_path, answers_path=None):
    """A summary and its answers -> what differs, as lines; and how many numbers agree."""
    summary_path = Path(summary_path)
    answers_path = Path(answers_path or summary_path.with_name(f"{summary_path.stem}_answers.jsonl"))
    summary = json.loads(summary_path.read_text(encoding="utf-8"))
    records = [json.loads(line) for line in answers_path.read_text(encoding="utf-8").splitlines()]
    lines = [] if [record["index"] for record in records] == list(range(summary["n"])) else ["the answers are not those to problems 0, 1, 2, ..., each once"]
    mine = recompute(records, summary["metrics"]["random_accuracy"])
    return lines + differences(mine, summary["metrics"]), count_numbers(summary["metrics"])


def count_numbers(value):
    if isinstance(value, (dict, list)):
        return sum(map(count_numbers, value.values() if isinstance(value, dict) else value))
    return int(isinstance(value, (int, float)))


if __name__ == "__main__":
    lines, count = check(*sys.argv[1:3])
    print(*lines, f"{count} numbers in the summary, {len(lines)} differences", sep="\n")
    sys.exit(1 if lines else 0)
