"""A Task meets an Engine: every problem is answered and judged.

Two ways to answer. Generative: the model writes, the task judges. Categorical (multiple choice): "Answer:" is forced and the
letters' probabilities are compared, right after the prompt ("no reasoning") and after the model's own reasoning. A record
holds all that was said about one problem; tasks/metrics.py turns records into metrics.
"""
import random
from dataclasses import dataclass

import torch

from nanochat.engine import Request
from tasks.aqua import extract_answer, permuted, split_choices
from tasks.common import message_text, render_choices
from tasks.metrics import GROUPS, choose, summarize


@dataclass(frozen=True)
class Settings:
    """All that decides the answers: the same model with the same settings answers the same."""
    mode: str = ""                                      # generative, categorical, or both, scored as the task says ("" = only so)
    temperature: float = 0.0                            # 0 = always the likeliest token
    top_k: int | None = None                            # sample among the likeliest tokens only
    num_samples: int = 1                                # completions per problem
    max_new_tokens: int = 512
    seed: int = 42
    letters: bool = True                                # multiple choice: read the letters' probabilities as well
    controls: bool = False                              # multiple choice: without the question, and in all cyclic orders
    control_problems: int = -1                          # so for the first so many problems only (-1 = all)

    def __post_init__(self):
        if self.mode not in ("", "generative", "categorical", "both"):
            raise ValueError(f"mode={self.mode!r} is not generative or categorical, nor both: leave it empty for the task's own")
        if self.num_samples < 1 or self.max_new_tokens < 1 or self.temperature < 0:
            raise ValueError(f"num_samples={self.num_samples} and max_new_tokens={self.max_new_tokens} must be at least 1, "
                             f"temperature={self.temperature} at least 0: raise what is too small")
        if self.num_samples > 1 and self.temperature == 0:
            raise ValueError(f"num_samples={self.num_samples} at temperature 0 are {self.num_samples} equal answers: set a temperature, or num_samples=1")


# ---------------------------------------------------------------------------------------------------------------------
# Answering

def evaluate(task, engine, tokenizer, compute, settings, known=None, keep=None, batch_size=64, max_problems=-1, progress=None):
    """Every problem of a task, or its first max_problems, -> its record, in the task's order, on every rank; each rank answers its share.

    `known` {index: record} are records of an earlier, interrupted evaluation with the same settings; what they hold is not
    asked again. `keep(record)` is called whenever a record of this rank has grown, `progress(what, done, total)` now and then."""
    known, keep, progress = known or {}, keep or (lambda record: None), progress or (lambda what, done, total: None)
    count = len(task) if max_problems < 0 else min(max_problems, len(task))
    conversations = {index: task[index] for index in range(compute.rank, count, compute.world_size)}
    letters = sorted({letter for conversation in conversations.values() for letter in conversation.get("letters", ())})
    scored = task.eval_type if settings.mode in ("", "both") else settings.mode  # the way that counts
    writes = scored == "generative" or settings.mode == "both"
    reads = bool(letters) and (settings.letters or scored == "categorical")
    if scored == "categorical" and not all("letters" in conversation for conversation in conversations.values()):
        raise ValueError(f"{task.name} has no letters to compare: only multiple-choice tasks can be evaluated with mode='categorical'")
    if reads:
        answer_tokens(tokenizer, letters)               # before hours of writing, not after
    controlled = settings.controls and (count if settings.control_problems < 0 else settings.control_problems)  # below this index
    records = {index: start_record(task, index, conversation, scored if writes else None, known.get(index)) for index, conversation in conversations.items()}
    if writes:
        write_answers(task, conversations, records, engine, tokenizer, settings, scored == "generative" and controlled, keep, progress)
    if reads:
        read_letters(conversations, records, engine.model, tokenizer, scored == "categorical" and controlled, keep, batch_size, progress)
    return sorted((record for part in compute.gather_objects(list(records.values())) for record in part), key=lambda record: record["index"])


def quick_accuracy(task, engine, tokenizer, compute, max_problems, max_new_tokens, num_samples=1, temperature=0.0):
    """Accuracy on the first problems of a task, greedy unless told otherwise, as metrics for a training log; with samples pass@k and maj@k."""
    settings = Settings(mode="generative", max_new_tokens=max_new_tokens, letters=False, num_samples=num_samples, temperature=temperature)
    records = evaluate(task, engine, tokenizer, compute, settings, max_problems=max_problems)
    metrics = summarize(records, task.random_accuracy)
    names = ("accuracy", "ci_low", "ci_high", "parse_failures", "truncated", "mean_tokens")
    at_k = {f"{name}@{k}": value for name in ("pass", "maj") for k, value in metrics.get(f"{name}@k", {}).items()}
    return {f"eval/{name}": metrics[name] for name in names if metrics[name] is not None} | {f"eval/{name}": value for name, value in at_k.items()}


def start_record(task, index, conversation, scored, known=None):
    """What is known about a problem before the model has said anything; or the earlier record, if it is about the same problem."""
    reference = message_text(conversation["messages"][-1])
    record = {"index": index, "prompt": question_of(conversation), "gold": conversation.get("answer_letter", find_answer(task, conversation, reference))}
    record |= {name: conversation[name] for name in ("letters", "chance", *GROUPS) if name in conversation}
    if scored == "categorical":                         # it is written as well, but the letter counts
        record["scored"] = "letter"
    return {**known, **record} if known and all(known.get(name) == value for name, value in record.items()) else record


def question_of(conversation):
    return "\n\n".join(message_text(message) for message in conversation["messages"][:-1])


def find_answer(task, conversation, text):
    """The answer that a completion gives, or None if it gives none or the task's answers cannot be put into a word."""
    if "letters" in conversation:
        return extract_answer(text, conversation["letters"])
    return task.find_answer(conversation, text)


def write_answers(task, conversations, records, engine, tokenizer, settings, controlled, keep, progress):
    """Let the model write: fills "completions", and "controls" below index `controlled`, of the records that lack them. All are in flight together."""
    asked, requests = [], []
    for index, conversation in conversations.items():
        known = {"given"} if "completions" in records[index] else set()
        known |= records[index].get("controls", {}).keys()
        for name, variant in variants(conversation, index < controlled).items():
            if name in known:
                continue
            asked.append((index, name, variant))
            requests.append(Request(tokenizer.render_for_completion(variant), settings.num_samples if name == "given" else 1, settings.max_new_tokens,
                                    settings.temperature, settings.top_k, seed=random.Random(f"evaluation|{settings.seed}|{index}").getrandbits(62)))
    context = engine.model.config.sequence_len
    order = sorted((place for place, request in enumerate(requests) if len(request.tokens) < context), key=lambda place: len(requests[place].tokens))
    finished = [{} for _ in order]                      # of each request: sample -> completion
    done = iter(range(1, len(requests) + 1))

    def finish(place, completions):
        index, name, variant = asked[place]
        if name == "given":
            records[index]["completions"] = [judge(task, variant, completion) for completion in completions]
        else:
            letter = extract_answer(completions[0].text, variant["letters"]) if completions[0] else None
            records[index].setdefault("controls", {})[name] = chosen(variant, letter)
        keep(records[index])
        progress("answers written", next(done), len(requests))

    def on_finish(request, sample, completion):
        finished[request][sample] = completion
        place = order[request]
        if len(finished[request]) == requests[place].num_samples:
            finish(place, [finished[request][sample] for sample in range(requests[place].num_samples)])

    engine.generate([requests[place] for place in order], on_finish)
    for place in set(range(len(requests))) - set(order):  # the prompt alone fills the context: no answer, and counted
        finish(place, [None] * requests[place].num_samples)


def judge(task, conversation, completion):
    if completion is None:
        return {"text": "", "answer": None, "correct": False, "finish_reason": "prompt too long", "tokens": 0}
    answer, correct = find_answer(task, conversation, completion.text), bool(task.is_correct(conversation, completion.text))
    if correct and answer is not None:                  # x+1 and 1+x are one answer, and vote as one
        answer = conversation.get("answer_letter") or find_answer(task, conversation, message_text(conversation["messages"][-1]))
    used = {"tool": True} if 0 in completion.mask else {}  # the calculator has answered in it
    return {"text": completion.text, "answer": answer, "correct": correct, "finish_reason": completion.finish_reason, "tokens": len(completion.tokens), **used}


def variants(conversation, controls):
    """{"given": the conversation itself}, with controls also "blind" (the options without the question) and "shift 1", "shift 2", ..."""
    found = {"given": conversation}
    if controls and "letters" in conversation:
        place = len(conversation["messages"]) - 2       # the last user message
        _, choices, after = split_choices(message_text(conversation["messages"][place]), conversation["letters"])
        messages = list(conversation["messages"])
        messages[place] = {**messages[place], "content": render_choices("", conversation["letters"], choices).strip("\n") + after}
        found["blind"] = {**conversation, "messages": messages}
        found |= {f"shift {shift}": permuted(conversation, shift) for shift in range(1, len(choices))}
    return found


def chosen(conversation, answer):
    return choose(question_of(conversation), conversation["letters"], conversation["answer_letter"], answer)


# ---------------------------------------------------------------------------------------------------------------------
# Reading letters

def read_letters(conversations, records, model, tokenizer, controlled, keep, batch_size, progress):
    """Force "Answer:" and compare the letters: fills "no_reasoning" of each record, "after_reasoning" where the model wrote some,
    and below index `controlled` the letters without the question and in other orders."""
    places, prompts, letters = [], [], []
    for index, conversation in conversations.items():
        if "letters" not in conversation:
            continue
        record = records[index]
        for name, variant in variants(conversation, index < controlled).items():
            missing = "no_reasoning" not in record if name == "given" else name not in record.get("controls", {})
            if missing:
                places.append((index, "no_reasoning" if name == "given" else name, variant))
                prompts.append(tokenizer.render_for_completion(variant))
                letters.append(conversation["letters"])
        reasoning = reasoning_of(record)
        if reasoning and "after_reasoning" not in record:
            places.append((index, "after_reasoning", conversation))
            prompts.append(tokenizer.render_for_completion(conversation) + tokenizer.encode(f"{reasoning}\n"))
            letters.append(conversation["letters"])

    done = iter(range(1, len(places) + 1))

    def fill(place, logprobs):
        index, name, variant = places[place]
        letter = max(logprobs, key=logprobs.get) if logprobs else None
        if name in ("no_reasoning", "after_reasoning"):
            records[index][name] = {"answer": letter, "logprobs": {key: round(value, 4) for key, value in (logprobs or {}).items()}}
        else:
            records[index].setdefault("controls", {})[name] = chosen(variant, letter)
        keep(records[index])
        progress("letters read", next(done), len(places))

    letter_logprobs(model, tokenizer, prompts, letters, batch_size, fill)


def reasoning_of(record):
    """What the first completion says before its answer line; all of it if it was cut off before one. "" if there is nothing."""
    if not record.get("completions"):
        return ""
    text = record["completions"][0]["text"].rstrip()
    return (text.rpartition("\n")[0] if record["completions"][0]["answer"] else text).rstrip()


def answer_tokens(tokenizer, letters):
    """-> (the tokens to force so that a letter comes next, {letter: its token}) of "Answer: X". ValueError unless each letter is one token."""
    encoded = {letter: tokenizer.encode(f"Answer: {letter}") for letter in letters}
    forced = next(iter(encoded.values()))[:-1]
    for letter, ids in encoded.items():
        if ids[:-1] != forced or list(encoded.values()).count(ids) > 1:
            raise ValueError(f"'Answer: {letter}' is {len(ids)} tokens that differ from those of the other {len(encoded) - 1} letters in more than the last, "
                             f"so the letters cannot be compared by one probability: train the tokenizer with more than its {tokenizer.vocab_size} tokens")
    return forced, {letter: ids[-1] for letter, ids in encoded.items()}


@torch.inference_mode()
def letter_logprobs(model, tokenizer, prompts, letters, batch_size=64, on_result=None):
    """Prompts (token ids up to where "Answer:" is to be forced) and the letters of each -> [{letter: log-probability among its letters}].

    None where the prompt does not fit the context. `on_result(place, logprobs)` is called as soon as a batch is done."""
    results = [None] * len(prompts)
    if not prompts:
        return results
    forced, ids = answer_tokens(tokenizer, sorted(set().union(*letters)))
    rows = [prompt + forced for prompt in prompts]
    fits = [place for place, row in enumerate(rows) if len(row) <= model.config.sequence_len]
    fits.sort(key=lambda place: len(rows[place]))       # similar lengths together: little padding
    for start in range(0, len(fits), batch_size):
        batch = fits[start:start + batch_size]
        lengths = torch.tensor([len(rows[place]) for place in batch])
        inputs = torch.zeros(len(batch), int(lengths.max()), dtype=torch.int64)  # padding on the right: nothing before it looks there
        for row, place in enumerate(batch):
            inputs[row, :lengths[row]] = torch.tensor(rows[place])
        hidden = model.hidden(inputs.to(model.device))[torch.arange(len(batch)), lengths - 1]  # (B, C)
        logits = model.logits(hidden).float().cpu()     # (B, V)
        for row, place in enumerate(batch):
            logprobs = torch.log_softmax(logits[row, [ids[letter] for letter in letters[place]]], dim=0)
            results[place] = dict(zip(letters[place], logprobs.tolist()))
            if on_result:
                on_result(place, results[place])
    for place in set(range(len(rows))) - set(fits):
        if on_result:
            on_result(place, None)
    return results
