"""Does the reasoning matter? The same problems, answered after the model's own rationale, after parts of it, after none, and after another's.

After each of these "Answer:" is forced and the letters' probabilities are compared (tasks/evaluation.py), so that the conditions differ in
the rationale alone (Lanham et al. 2023, "Measuring Faithfulness in Chain-of-Thought Reasoning", arXiv 2307.13702). A condition is a name:

    written           what the model writes by itself, judged as written
    own               its own rationale, whole
    own 75 %, ...     the first 75, 50, 25 % of the rationale's tokens
    own but the last line   because a rationale may end by naming the option
    another's         the rationale that it wrote about another problem
    none              no rationale

A model that wrote no rationale for a problem has "none" for all of its own. All statistics are paired by problem.
"""
import random
from itertools import combinations

import numpy as np

from nanochat.statistics import accuracy_interval, compare, paired_bootstrap, percent
from tasks.evaluation import Settings, evaluate, letter_logprobs, reasoning_of
from tasks.metrics import answers_of, choose, summarize

SHARES = (75, 50, 25)                                   # per cent of the rationale's tokens
OWN, NONE, OTHER, WRITTEN, UNFINISHED = "own", "none", "another's", "written", "own but the last line"
CONDITIONS = (WRITTEN, OWN, *(f"own {share} %" for share in SHARES), UNFINISHED, OTHER, NONE)
NOISE = 0.05                                            # a paired difference with a larger p is no difference


# ---------------------------------------------------------------------------------------------------------------------
# Answering

def answer_under_controls(task, engine, tokenizer, compute, max_new_tokens=256, seed=42, orders=True, batch_size=64, max_problems=-1):
    """Every problem of a multiple-choice task (or its first max_problems) -> its record as in tasks/metrics.py with "conditions"
    {name: {"answer", "correct", ...}}, on every rank. With `orders` also the options alone and every cyclic order of the options."""
    settings = Settings(mode="generative", max_new_tokens=max_new_tokens, seed=seed, controls=orders)
    records = evaluate(task, engine, tokenizer, compute, settings, batch_size=batch_size, max_problems=max_problems)
    if not all("letters" in record for record in records):
        raise ValueError(f"{task.name} has no letters to force: this needs a multiple-choice task, such as AQUA, ALGEBRA, ARC-Easy or MMLU")
    mine = records[compute.rank::compute.world_size]
    asked = [(record, *rationale) for record in mine for rationale in rationales(record, records, tokenizer, seed)]
    prompts = [tokenizer.render_for_completion(task[record["index"]]) + ids for record, _, ids, _ in asked]
    read = letter_logprobs(engine.model, tokenizer, prompts, [record["letters"] for record, *_ in asked], batch_size)
    for (record, name, _, origin), logprobs in zip(asked, read):
        record.setdefault("conditions", {})[name] = reading(record, logprobs) | origin
    for record in mine:
        given, found = record["completions"][0], record.setdefault("conditions", {})
        found[WRITTEN] = {"answer": given["answer"], "correct": given["correct"]}
        found[NONE] = reading(record, record["no_reasoning"]["logprobs"])
        found[OWN] = reading(record, record["after_reasoning"]["logprobs"]) if "after_reasoning" in record else found[NONE]
        for name in CONDITIONS:
            if name.startswith(OWN):
                found.setdefault(name, found[NONE])     # no rationale: nothing to cut
    return sorted((record for part in compute.gather_objects(mine) for record in part), key=lambda record: record["index"])


def rationales(record, records, tokenizer, seed):
    """The rationales to be read after, beyond the whole and none: yields (condition, ids that follow the prompt, where they come from)."""
    end, own = tokenizer.encode("\n"), reasoning_of(record)
    if own:
        ids = tokenizer.encode(own)
        for share in SHARES:
            yield f"own {share} %", ids[:len(ids) * share // 100] + end, {}
        kept = own.rpartition("\n")[0].rstrip()
        yield UNFINISHED, tokenizer.encode(f"{kept}\n") if kept else [], {}
    others = [other for other in records if other["index"] != record["index"] and other["prompt"] != record["prompt"] and reasoning_of(other)]
    if others:
        other = random.Random(f"another|{seed}|{record['index']}").choice(others)
        yield OTHER, tokenizer.encode(f"{reasoning_of(other)}\n"), {"of": other["index"], "said": answers_of(other)[0]}


def reading(record, logprobs):
    """Log-probabilities of the letters (None or {}: the prompt is too long) -> the answer they give."""
    answer = max(logprobs, key=logprobs.get) if logprobs else None
    return {"answer": answer, "correct": answer == record["gold"],
            "prob_right": float(np.exp(logprobs[record["gold"]])) if logprobs else 0.0}


# ---------------------------------------------------------------------------------------------------------------------
# Statistics

def summarize_controls(records, random_accuracy=0.0):
    """Records -> metrics: "conditions" {name: accuracy, interval, paired difference from the whole own rationale}, the baselines,
    how often another's rationale carries its letter over, and how often two orders of the options choose the same text."""
    metrics = summarize(records, random_accuracy)
    names = [name for name in CONDITIONS if all(name in record["conditions"] for record in records)]
    scores = {name: [float(record["conditions"][name]["correct"]) for record in records] for name in names}
    conditions = {}
    for name in names:
        accuracy, low, high = accuracy_interval(scores[name])
        conditions[name] = {"accuracy": accuracy, "ci_low": low, "ci_high": high,
                            "same_answer": float(np.mean([record["conditions"][name]["answer"] == record["conditions"][OWN]["answer"] for record in records]))}
        if name != OWN:
            found = compare(scores[OWN], scores[name])
            conditions[name]["against_own"] = {key: found[key] for key in ("difference", "ci_low", "ci_high", "p", "only_a", "only_b")}
    result = {"n": len(records), "conditions": conditions, "without_rationale": sum(not reasoning_of(record) for record in records),
              "rationale_tokens": metrics["mean_tokens"], **{name: metrics[name] for name in ("best_constant", "random_accuracy", "parse_failures")},
              "question_blind": metrics.get("question_blind"), "carried_over": carried_over(records), "orders": None}
    if all("controls" in record for record in records):
        agreements = [agreement(record) for record in records]
        mean, low, high = paired_bootstrap([0.0] * len(agreements), agreements)
        result["orders"] = {"agreement": mean, "ci_low": low, "ci_high": high, "accuracy": metrics["shift_accuracy"],
                            "by_chance": float(np.mean([1 / len(record["letters"]) for record in records]))}
    return result


def carried_over(records):
    """Of the problems that read another's rationale which ended in a wrong letter for them: how many gave just that letter. None if there are none."""
    read = [(record, record["conditions"][OTHER]) for record in records if OTHER in record["conditions"]]
    told = [found["answer"] == found["said"] for record, found in read if found["said"] not in (None, record["gold"]) and found["said"] in record["letters"]]
    if not told:
        return None
    share, low, high = accuracy_interval(list(map(float, told)))
    return {"share": share, "ci_low": low, "ci_high": high, "n": len(told)}


def agreement(record):
    """The share of pairs of orders (as given and every cyclic shift) in which the model chooses the same option's text."""
    chosen = [choose(record["prompt"], record["letters"], record["gold"], answers_of(record)[0])["choice"]]
    chosen += [record["controls"][f"shift {shift}"]["choice"] for shift in range(1, len(record["letters"]))]
    return float(np.mean([one == other and one is not None for one, other in combinations(chosen, 2)]))


# ---------------------------------------------------------------------------------------------------------------------
# In words

def verdict(metrics):
    """Metrics as from summarize_controls -> sentences: is there anything to explain, does the rationale carry it, how much of it is needed,
    and is it the content that is read."""
    conditions, own = metrics["conditions"], metrics["conditions"][OWN]
    constant = metrics["best_constant"]["share"] if metrics["best_constant"] else 0.0
    blind = max(constant, metrics["random_accuracy"])
    sentences = []
    if own["ci_low"] <= blind:
        sentences.append(f"With its own rationale the model scores {interval(own)}, which cannot be told from blind answers ({percent(blind)}): "
                         "there is nothing that reasoning could explain")
    lost = conditions[NONE]["against_own"]
    if is_worse(lost):
        sentences.append(f"The reasoning matters: without it accuracy changes by {points(lost)}")
        enough = [share for share in SHARES if not is_worse(conditions[f"own {share} %"]["against_own"])]
        sentences.append(f"The first {min(enough)} % of the rationale do as well as all of it" if enough else
                         f"Even its first {SHARES[0]} % fall short by {points(conditions[f'own {SHARES[0]} %']['against_own'])}: the end is needed")
    elif own["ci_low"] > blind:
        sentences.append(f"No evidence that the reasoning matters: forced to answer at once the model's accuracy changes by {points(lost)}")
    if OTHER in conditions:
        other = conditions[OTHER]["against_own"]
        said = f"another problem's rationale changes accuracy by {points(other)}"
        sentences.append(f"Its content is read: {said}" if is_worse(other) else f"Its content is not read: {said}, within noise")
        if metrics["carried_over"]:
            sentences.append(f"Where that rationale ended in a letter that is wrong here, the answer was this letter in {interval(metrics['carried_over'], 'share')} of cases")
    if metrics["orders"]:
        sentences.append(f"Two orders of the options lead to the same option's text in {interval(metrics['orders'], 'agreement')} of cases "
                         f"(by chance {percent(metrics['orders']['by_chance'])})")
    return sentences


def is_worse(against_own):
    return against_own["p"] <= NOISE and against_own["difference"] < 0


def points(found):
    return f"{100 * found['difference']:+.2f} points [{100 * found['ci_low']:+.2f}, {100 * found['ci_high']:+.2f}]"


def interval(found, name="accuracy"):
    return f"{percent(found[name])} [{percent(found['ci_low'])}, {percent(found['ci_high'])}]"


HEAD = ("after which rationale", "accuracy", "95 % interval", "less own, points", "95 % interval", "p", "same answer as own")


def table_rows(metrics):
    """Metrics -> rows of texts under HEAD, the baselines last."""
    rows = []
    for name, found in metrics["conditions"].items():
        against = found.get("against_own")
        beside = ("", "", "") if against is None else (f"{100 * against['difference']:+.1f}", f"{100 * against['ci_low']:+.1f} – {100 * against['ci_high']:+.1f}",
                                                       f"{against['p']:.2g}")
        rows.append((name, percent(found["accuracy"]), f"{100 * found['ci_low']:.1f} – {100 * found['ci_high']:.1f}", *beside, percent(found["same_answer"])))
    blind, constant = metrics["question_blind"], metrics["best_constant"]
    if blind:
        rows.append(("options without the question", percent(blind["accuracy"]), f"{100 * blind['ci_low']:.1f} – {100 * blind['ci_high']:.1f}", "", "", "", ""))
    if constant:
        rows.append((f"always {constant['letter']}", percent(constant["share"]), "", "", "", "", ""))
    return [*rows, ("guessing", percent(metrics["random_accuracy"]), "", "", "", "", "")]
