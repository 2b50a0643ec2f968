"""What must be true before a reinforcement-learning run spends any compute, looked at once, printed as a small table.

The reward accepts the reference answers and refuses wrong ones; the answers fit; the letters are single tokens; the reference is the
policy; and a sample of rollouts, drawn like the run's own, tells which share of groups will teach anything. All draws have seeds of
their own: a run with the preflight is the run without it.
"""
import random

from nanochat.common import print0
from nanochat.rl.letter_metrics import letter_ids, letter_metrics
from nanochat.rl.rollout import has_signal, sample_groups

GOLD = 128              # reference answers looked at per task
CONFIDENCE = 0.05       # with this probability at most, a run with a larger share of groups with signal shows none in the sample


def preflight(problems, reference_text, sampler, reference, is_same_model, num_groups, temperature, seed, device_batch_size=8, levels=None):
    """`num_groups` groups of the run's first problems (and up to 128 reference answers of each task) -> (rows of a table, metrics).

    `reference_text(conversation)` is the reference answer; `reference` None leaves the KL out, `is_same_model` says it must be 0.
    ValueError where the run cannot work."""
    tokenizer, compute = sampler.tokenizer, sampler.compute
    rows, metrics = [], {}
    for name, asked in first_of_each_task(problems, levels).items():
        rows += check_rewards(name, asked, problems.rewards, reference_text)
        rows.append(check_letters(name, asked, tokenizer))
        long, longest = too_long(asked, tokenizer, sampler.max_new_tokens)
        rows.append(row(f"{name}: reference answers longer than max_new_tokens={sampler.max_new_tokens}", f"{long:.1%} (the longest has {longest} tokens)"))
        metrics[f"preflight/{name}/too_long"] = long

    asked = [problems.at(place, levels) for place in range(compute.rank, num_groups, compute.world_size)]
    asked = [problem for problem in asked if len(tokenizer.render_for_completion(problem.conversation)) <= sampler.longest_prompt]
    seeds = [random.Random(f"preflight|{seed}|{problem.place}").getrandbits(62) for problem in asked]
    groups = sample_groups(sampler.engine, tokenizer, [problem.conversation for problem in asked], problems.rewards, sampler.num_samples,
                           sampler.max_new_tokens, temperature, seeds, sampler.top_k)
    groups = [group for group in groups if group]
    if reference is not None:
        kl = letter_metrics(sampler.engine.training_model, reference, tokenizer, groups, [group[0].conversation for group in groups], compute,
                            device_batch_size, temperature).get("kl", 0.0)
        rows.append(row("KL to the reference per token", f"{kl:.3g}" + (" (another model)" if not is_same_model else "")))
        if is_same_model and kl != 0:
            raise ValueError(f"the KL to the reference is {kl:.3g} before the first step, not 0: the reference is not the model that training starts from")
    signal = [(sum(rollout.rewards["correct"] > 0 for rollout in group), len(group), has_signal(group)) for group in groups]
    signal = [one for rank in compute.gather_objects(signal) for one in rank]
    share, found = summarize_signal(signal)
    rows += found
    metrics |= share
    show(rows)
    refuse_without_signal(share, sampler)
    return rows, metrics


def row(check, result):
    return {"check": check, "result": result}


def show(rows):
    width = max(len(one["check"]) for one in rows)
    print0("\n".join(["preflight", *(f"  {one['check']:<{width}}  {one['result']}" for one in rows)]))


def first_of_each_task(problems, levels):
    """{task: its first conversations}, as the run will ask them."""
    found = {name: [] for name in problems.tasks}
    for place in range(GOLD * len(found)):
        conversation = problems.at(place, levels).conversation
        if len(found[conversation["task"]]) < min(GOLD, len(problems.tasks[conversation["task"]])):
            found[conversation["task"]].append(conversation)
    return {name: asked for name, asked in found.items() if asked}


def check_rewards(name, asked, rewards, reference_text):
    """The reference answer is right, every other letter is wrong, an empty completion earns nothing."""
    wrong = [f"Answer: {letter}" for conversation in asked[:1] for letter in conversation.get("letters", ()) if letter != conversation.get("answer_letter")]
    for conversation in asked:
        parts = rewards(conversation, reference_text(conversation))
        if parts is None or parts["correct"] != 1 or sum(parts.values()) < 1:
            raise ValueError(f"{name}: the reference answer earns {parts}, not full reward ({reference_text(conversation)[-60:]!r}): mend the task's data or its judgement")
        if sum(rewards(conversation, "").values()) != 0:
            raise ValueError(f"{name}: an empty completion earns {rewards(conversation, '')}: mend the task's judgement")
        for letter in conversation.get("letters", ()):
            parts = rewards(conversation, f"Answer: {letter}")
            if parts["correct"] != (letter == conversation["answer_letter"]):
                raise ValueError(f"{name}: 'Answer: {letter}' earns {parts} where {conversation['answer_letter']} is right: mend the task's judgement")
    result = [row(f"{name}: reward of {len(asked)} reference answers, of an empty one",
                  f"{sum(rewards(asked[0], reference_text(asked[0])).values()):g}, {sum(rewards(asked[0], '').values()):g}")]
    if wrong:
        result.append(row(f"{name}: reward of a wrong letter", f"{sum(rewards(asked[0], wrong[0]).values()):g} (of which for being right: 0)"))
    return result


def check_letters(name, asked, tokenizer):
    """ValueError where a letter is not one token behind "Answer:"."""
    letters = sorted({letter for conversation in asked for letter in conversation.get("letters") or ()})
    letter_ids(tokenizer, letters)
    return row(f"{name}: single tokens behind 'Answer:'", "".join(letters) or "has no letters")


def too_long(asked, tokenizer, max_new_tokens):
    """-> (share of reference answers that do not fit with their end token, tokens of the longest)."""
    lengths = [len(tokenizer.render_conversation(conversation, max_tokens=10**6)[0]) - len(tokenizer.render_for_completion(conversation)) for conversation in asked]
    return sum(length > max_new_tokens for length in lengths) / len(lengths), max(lengths)


def summarize_signal(signal):
    """[(right, samples, has signal)] of groups -> (metrics, rows)."""
    groups = len(signal)
    if not groups:
        raise ValueError("not one of the first prompts fits the context, so there is nothing to sample: train with a longer --max-seq-len, or lower --max-new-tokens")
    metrics = {"preflight/groups": groups, "preflight/acc": sum(right for right, _, _ in signal) / sum(count for _, count, _ in signal),
               "preflight/pass@group": sum(right > 0 for right, _, _ in signal) / groups,
               "preflight/all_right": sum(right == count for right, count, _ in signal) / groups, "preflight/signal": sum(has for *_, has in signal) / groups}
    return metrics, [row(f"accuracy of {sum(count for _, count, _ in signal)} samples", f"{metrics['preflight/acc']:.1%}"),
                     row(f"groups with a right answer, of {groups}", f"{metrics['preflight/pass@group']:.1%}"),
                     row("groups that are right throughout", f"{metrics['preflight/all_right']:.1%}"),
                     row("groups with signal", f"{metrics['preflight/signal']:.1%}")]


def refuse_without_signal(metrics, sampler):
    """ValueError where not one sampled group held right and wrong answers. pass@G near 1 alone is no reason: groups that are right now and
    then teach the most. Of n groups without any signal, the share with signal is below 1 - 0.05 ** (1 / n), with 95 % confidence."""
    if metrics["preflight/signal"] > 0:
        return
    groups, bound = metrics["preflight/groups"], 1 - CONFIDENCE ** (1 / metrics["preflight/groups"])
    why = (f"not one of {groups} sampled groups of {sampler.num_samples} held both right and wrong answers (so fewer than {bound:.1%} of groups do, with 95 % "
           f"confidence), and only such groups teach: accuracy {metrics['preflight/acc']:.1%}, {metrics['preflight/pass@group']:.1%} of groups with a right answer")
    if metrics["preflight/pass@group"] == 0:
        advice = "the problems are too hard for this model: more SFT first, until pass@8 is 10 to 80 %, an easier task, or a larger --num-samples"
    elif metrics["preflight/all_right"] == 1:
        advice = "the problems are too easy for this model: take harder ones"
    else:
        advice = "the samples of a group hardly differ: raise --temperature"
    raise ValueError(f"{why}; {advice}. --preflight=-1 skips this check")
