"""The CORE metric (DCLM, arXiv 2406.11794): 22 tasks, few-shot, scored by likelihood, each centred so that guessing scores 0.

Three kinds of task. Multiple choice: which continuation of the question is likeliest, by mean log-probability per token. Schema: under
which of the contexts is the continuation likeliest. Language modeling: is every token of the continuation the likeliest one. Beside each
score stand those of answers that do not read: the same choices without their context, always one place, the shortest, the commonest.

`core_bundle` reads the tasks, `likelihood` the model. A record holds all that was found out about one item.
"""
import random
from collections import Counter

from nanochat.core_bundle import CORE_LABELS
from nanochat.likelihood import Sequence, score

WINDOW = 512                                            # items rendered at once: bounds the memory that their tokens take
MAX_SHOWN = 16                                          # characters of a constant answer in a table


# -- prompts ----------------------------------------------------------------------------------------------------------

def render(task, item, examples):
    """-> the (context, continuation) texts to be scored, one for each choice (language modeling: one), behind the worked examples."""
    worked = [example.contexts[example.gold % len(example.contexts)] + task.continuation_delimiter
              + example.continuations[example.gold % len(example.continuations)] + task.example_delimiter for example in examples]
    before = task.prompt_string + "".join(worked)
    return [(before + context + task.continuation_delimiter, continuation) for context in item.contexts for continuation in item.continuations]


def render_blind(task, item):
    """-> what is scored without reading: the choices after nothing but the delimiter, a schema's contexts without what follows.
    Of language modeling nothing: nobody expects it to be guessed."""
    if task.kind == "multiple_choice":
        return [(task.continuation_delimiter.lstrip(), choice) for choice in item.continuations]
    return [("", context) for context in item.contexts] if task.kind == "schema" else []


def draw_examples(task, index, seed):
    """The examples shown with item `index`: different rows of the same file, none equal to it, the same whatever else is evaluated."""
    generator, chosen = random.Random(f"core|{seed}|{task.label}|{index}"), {}
    while len(chosen) < task.num_fewshot:               # ends: load_bundle counted more different rows than examples
        example = task.items[generator.randrange(len(task.items))]
        if example != task.items[index]:
            chosen[example] = True
    return list(chosen)


def tokenize(scorer, pairs):
    """(context, continuation) texts -> Sequences. The white space at the end of a context belongs to the continuation's first token, and the
    continuation is what the whole has beyond the context's tokens: the rule of lm-evaluation-harness, so that words are cut as in running text."""
    moved = [(context.rstrip(), context[len(context.rstrip()):] + continuation) for context, continuation in pairs]
    contexts = list(dict.fromkeys(context for context, _ in moved))
    encoded = scorer.encode([*contexts, *(context + continuation for context, continuation in moved)])
    lengths = dict(zip(contexts, map(len, encoded)))
    sequences = []
    for (context, _), tokens in zip(moved, encoded[len(contexts):]):
        before = scorer.bos if context else scorer.start
        start = min(lengths[context], len(tokens) - 1)  # where the two merge into one token, that token is scored
        before = before or (scorer.start if start == 0 else [])
        sequences.append(Sequence(before + tokens, len(before) + start))
    return sequences


def crop(sequences, sequence_len, num_fixed):
    """-> (sequences that fit, number of tokens dropped). From all of an item's sequences the same number of tokens goes, the earliest ones, so
    that its choices keep one context; the first `num_fixed` (BOS) stay. (None, number) where no context or not even the continuation would be left."""
    over = max(len(sequence.tokens) for sequence in sequences) - (sequence_len + 1)
    if over <= 0:
        return sequences, 0
    if over > min(sequence.start for sequence in sequences) - max(num_fixed, 1):
        return None, over
    return [Sequence(tokens[:num_fixed] + tokens[num_fixed + over:], start - over) for tokens, start in sequences], over


# -- items ------------------------------------------------------------------------------------------------------------

def choose_items(task, max_items, seed):
    """The indices that are evaluated: all, or `max_items` of them drawn by the seed."""
    count = len(task.items)
    if max_items < 0 or max_items >= count:
        return range(count)
    return sorted(random.Random(f"core|{seed}|{task.label}").sample(range(count), max_items))


def evaluate_task(task, scorer, compute, max_items=-1, seed=1234, batch_tokens=16384, known=None, keep=None):
    """A CoreTask -> its records in the order of its items, on every rank; each rank scores its share.

    `known` {index: record} are those of an earlier evaluation; `keep(record)` is called as soon as this rank has a new one."""
    known, keep = known or {}, keep or (lambda record: None)
    chosen = choose_items(task, max_items, seed)
    missing = [index for index in chosen if index not in known]
    mine = missing[compute.rank::compute.world_size]
    records = [known[index] for index in chosen if index in known] if compute.is_master else []

    def finish(record):
        records.append(record)
        keep(record)

    for begin in range(0, len(mine), WINDOW):
        evaluate_items(task, scorer, mine[begin:begin + WINDOW], seed, batch_tokens, finish)
    return sorted((record for part in compute.gather_objects(records) for record in part), key=lambda record: record["index"])


def evaluate_items(task, scorer, indices, seed, batch_tokens, finish):
    """Score the items with these indices; `finish(record)` as soon as one is done."""
    pairs = [render(task, task.items[index], draw_examples(task, index, seed)) for index in indices]
    blind = [render_blind(task, task.items[index]) for index in indices]
    sequences = iter(tokenize(scorer, [pair for group in (*pairs, *blind) for pair in group]))
    pairs, blind = ([[next(sequences) for _ in group] for group in groups] for groups in (pairs, blind))
    asked, dropped, waiting = [], {}, {}
    for index, group, blind_group in zip(indices, pairs, blind):
        fitting, dropped[index] = crop(group, scorer.sequence_len, len(scorer.bos))
        blind_fitting = crop(blind_group, scorer.sequence_len, len(scorer.start))[0] if blind_group and fitting else None
        waiting[index] = {"scores": None, "blind": None}
        groups = {"scores": fitting, "blind": blind_fitting}
        todo = [name for name in groups if groups[name]]
        waiting[index]["open"] = len(todo)
        asked += [(index, name, groups[name]) for name in todo]
        if not todo:
            finish(to_record(task, index, dropped[index], None, None))

    def on_result(place, scores):
        index, name, _ = asked[place]
        state = waiting[index]
        state[name], state["open"] = scores, state["open"] - 1
        if state["open"] == 0:
            finish(to_record(task, index, dropped[index], state["scores"], state["blind"]))

    score(scorer, [group for _, _, group in asked], batch_tokens, on_result)


def to_record(task, index, dropped, scores, blind):
    """What is known about an item, JSON-able. Without scores (it does not fit the model's context) it counts as wrong."""
    item = task.items[index]
    record = {"task": task.label, "index": index, "gold": item.gold, "cropped": dropped, "correct": False, "chosen": None, "blind": None}
    if task.kind == "language_modeling":
        record |= {"context": item.contexts[0], "continuation": item.continuations[0]}
    elif task.kind == "schema":
        record |= {"contexts": item.contexts, "continuation": item.continuations[0]}
    else:
        record |= {"context": item.contexts[0], "choices": item.continuations}
    if scores is None:
        return {**record, "too_long": True}
    record |= {"logprobs": [one.logprob for one in scores], "tokens": [one.num_tokens for one in scores], "greedy": [one.is_greedy for one in scores]}
    if task.kind == "language_modeling":
        return {**record, "correct": scores[0].is_greedy}
    record["chosen"] = likeliest(scores)
    record["blind"] = likeliest(blind) if blind else None
    return {**record, "correct": record["chosen"] == item.gold}


def likeliest(scores):
    """The place of the highest mean log-probability per token; of equals the first."""
    return max(range(len(scores)), key=lambda place: (scores[place].mean, -place))


# -- numbers ----------------------------------------------------------------------------------------------------------

def centred(accuracy, random_baseline):
    """0 for guessing, 1 for all right, negative below guessing."""
    return (accuracy - random_baseline) / (1 - random_baseline)


def task_numbers(task, records):
    """Records of one task -> its accuracy, centred score and what answers that do not read score, 0..1 each."""
    n = len(records)
    accuracy = sum(record["correct"] for record in records) / n
    numbers = {"n": n, "accuracy": accuracy, "random_baseline": task.random_baseline, "centred": centred(accuracy, task.random_baseline),
               "cropped": sum(record["cropped"] > 0 for record in records) / n, "too_long": sum("too_long" in record for record in records) / n}
    # what does not ask the model is counted over the whole task: a sample's best constant is the best by luck
    items, total = task.items, len(task.items)
    if task.kind == "language_modeling":
        answer, count = most_common(item.continuations[0] for item in items)
        return {**numbers, "best_constant": {"letter": repr(answer[:MAX_SHOWN]), "share": count / total}, "blind": None}
    sides = [max(item.contexts, item.continuations, key=len) for item in items]
    place, count = most_common(item.gold for item in items)
    return {**numbers, "best_constant": {"letter": f"choice {place + 1}", "share": count / total},
            "by_choices": sum(1 / len(side) for side in sides) / total,
            "first": sum(item.gold == 0 for item in items) / total,
            "shortest": sum(extreme_share(side, item.gold, min) for side, item in zip(sides, items)) / total,
            "longest": sum(extreme_share(side, item.gold, max) for side, item in zip(sides, items)) / total,
            "blind": sum(record["blind"] == record["gold"] for record in records) / n}


def most_common(values):
    """(value, count) of the most frequent; of equals the first in order."""
    return min(Counter(values).items(), key=lambda pair: (-pair[1], pair[0]))


def extreme_share(side, gold, extreme):
    """What choosing the shortest (min) or longest (max) text scores on one item: 1/m where it is one of m of that length."""
    lengths = list(map(len, side))
    bound = extreme(lengths)
    return (lengths[gold] == bound) / lengths.count(bound)


def core_score(numbers, is_whole=True):
    """{label: task_numbers} -> {"name", "value", "blind"}: the mean centred score. Over other than the 22 whole tasks it has another name.
    `blind` is the same mean for the better of guessing, the best constant answer and (where there is one) the choices without context."""
    missing = sum(label not in numbers for label in CORE_LABELS)
    reasons = [f"{missing} of its 22 tasks are missing"] * (missing > 0) + ["the tasks are sampled"] * (not is_whole)
    complete = not reasons and len(numbers) == len(CORE_LABELS)
    name = "CORE" if complete else f"mean of {len(numbers)} centred scores (not CORE: {', '.join(reasons) or 'other tasks are among them'})"
    blind = [max(0.0, *(centred(value, one["random_baseline"]) for value in (one["best_constant"]["share"], one["blind"]) if value is not None))
             for one in numbers.values()]
    return {"name": name, "is_core": complete, "value": sum(one["centred"] for one in numbers.values()) / len(numbers), "blind": sum(blind) / len(blind)}
