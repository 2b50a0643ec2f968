"""Rejection sampling: let a checkpoint answer training problems, keep what the strict reward accepts, write it for chat_sft.

    python -m scripts.rs_generate --task=AQUA --num-samples=8
    torchrun --standalone --nproc_per_node=8 -m scripts.rs_generate -- --source=rl --task="AQUA|GSM8K" --max_per_prompt=2
    python -m scripts.chat_sft --recipe=r1_rs_sft

A line of the output is {"messages": [...], "provenance": {task, index, sample, reward, seed, checkpoint, temperature, tokens}}. Beside it
stay the right answers of all problems, one file per rank: an interrupted run goes on there, and a run that only keeps by other
rules (dedupe, max_per_prompt, max_tokens, min_right, shortest_k) samples nothing again. Delete the .part files to free the room.
"""
import hashlib
import json
import random
import time
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

from nanochat.checkpoint_manager import load_model
from nanochat.common import base_dir, print0, write_atomic
from nanochat.compute import compute_cleanup, compute_init
from nanochat.configurator import config_dict, parse
from nanochat.engine import Engine, Request, message_parts
from nanochat.report import add_section
from nanochat.statistics import accuracy_interval, percent
from tasks.aqua import permuted
from tasks.common import get_task, load_jsonl, message_text

TRAIN_SPLITS = ("train", "auxiliary_train")


@dataclass(frozen=True)
class Config:
    """Sample answers to training problems and keep the right ones as data for chat_sft."""
    source: str = "rl"                  # stage of the checkpoint: base, mid, sft or rl
    model_tag: str | None = None        # folder of the checkpoint (None = the one saved last)
    step: int | None = None             # step of the checkpoint (None = the newest)
    device_type: str = ""               # cuda, mps or cpu ("" = the best there is)
    dtype: str = ""                     # float32 or bfloat16 ("" = bfloat16 where the hardware has it)
    output: str | None = None           # where the rows go (None = rs_cot.jsonl in the base directory)
    # Problems
    task: str = "AQUA"                  # tasks whose answers can be checked, "|" between them
    split: str = "train"                # train, or auxiliary_train for MMLU; held-out splits are refused
    data_dir: str | None = None         # folder of local data: the task's own, or one with aqua/, arc/, mmlu/, gsm8k/ in it
    max_problems: int = -1              # problems per task, drawn by the seed (-1 = all)
    permute_options: bool = False       # multiple choice: every problem's options in an order of their own, so that no letter pays
    # Sampling
    num_samples: int = 8                # completions per problem
    temperature: float = 1.0            # of sampling
    top_k: int | None = None            # sample among the likeliest tokens only (None = all)
    max_new_tokens: int = 256           # longest completion; one that does not end by itself is dropped
    seed: int = 42                      # of every draw
    rows_in_flight: int = 256           # rows per rank that the engine decodes at once; does not change what is drawn
    problems_per_chunk: int = 512       # problems per rank that wait in memory; does not change what is drawn
    # Keeping
    dedupe: bool = True                 # drop answers to the same question that differ in case and blanks alone
    max_per_prompt: int = 4             # answers kept per problem (-1 = all)
    max_tokens: int = -1                # longest answer kept, in tokens (-1 = any that ended by itself)
    min_right: int = 1                  # leave out problems with fewer right samples: with five options every fifth guess is right
    shortest_k: int = -1                # of each problem's right answers keep the shortest ones only (-1 = off)


def main(config):
    check(config)
    compute = compute_init(config.device_type, config.dtype)
    output = Path(config.output).expanduser() if config.output else base_dir() / "rs_cot.jsonl"
    tasks = {name: load_task(name, config) for name in dict.fromkeys(name.strip() for name in config.task.split("|"))}
    model, tokenizer, meta = load_model(config.source, compute, "eval", config.model_tag, config.step)
    engine = Engine(model, tokenizer, max_rows=config.rows_in_flight)
    checkpoint = f"{meta['stage']}/{meta['model_tag']}/{meta['step']}"

    # Problems: the seed's choice of each task's; what an earlier run has answered is not asked again
    problems = [(name, index) for name, task in tasks.items() for index in chosen_problems(name, len(task), config)]
    journal = Journal(output, {name: sampling_key(name, task, config, meta) for name, task in tasks.items()}, compute)
    open_problems = [problem for problem in problems if problem not in journal.records]
    mine = open_problems[compute.rank::compute.world_size]
    print0(f"rejection sampling from {checkpoint}: {len(problems):,} problems x {config.num_samples} samples at temperature {config.temperature}, "
           f"{len(problems) - len(open_problems):,} problems answered before")

    # Answers
    started, done, right, sampled = time.perf_counter(), 0, 0, 0
    for first in range(0, len(mine), config.problems_per_chunk):
        for record in answer(mine[first:first + config.problems_per_chunk], tasks, engine, tokenizer, journal, config):
            done, right, sampled = done + 1, right + len(record["right"]), sampled + config.num_samples
        print0(f"rank {compute.rank}: {done:,} of {len(mine):,} problems, {right / max(1, sampled):.1%} of the samples right, "
               f"{done / (time.perf_counter() - started):.1f} problems/s")
    journal.close()
    compute.barrier()

    # Keeping: a rule over all records, so that it does not depend on who sampled what
    report = None
    if compute.is_master:
        records = journal.read()
        rows, dropped = select([records[problem] for problem in problems], config)
        report = summarize(records, problems, rows, dropped, config, checkpoint, time.perf_counter() - started)
        for row in rows:
            row["provenance"].update(checkpoint=checkpoint, temperature=config.temperature)
        if rows:
            write_atomic(output, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        write_atomic(output.with_name(f"{output.name}.report.json"), json.dumps(report, indent=1))
        show(report, output)
        if not rows:
            raise ValueError(f"none of {report['samples']:,} samples is kept ({dict(dropped)}), so {output} is not written: "
                             "begin with a checkpoint that solves some of the problems, or raise --num-samples or --max-new-tokens")
    compute.barrier()
    compute_cleanup()
    return report


def check(config):
    if config.split not in TRAIN_SPLITS:
        raise ValueError(f"split={config.split!r} is held out, and what is written here is trained on: use one of {', '.join(TRAIN_SPLITS)}")
    for name, valid, wanted in (("num_samples", config.num_samples >= 1, "1 or more"), ("temperature", config.temperature > 0 or config.num_samples == 1,
                                "above 0, or num_samples=1: at 0 all samples are the same"),
                                ("problems_per_chunk", config.problems_per_chunk >= 1, "1 or more"),
                                ("min_right", 1 <= config.min_right <= config.num_samples, f"1 to num_samples={config.num_samples}"),
                                *((name, getattr(config, name) == -1 or getattr(config, name) >= 1, "1 or more, or -1 for no limit")
                                  for name in ("max_problems", "max_per_prompt", "max_tokens", "shortest_k"))):
        if not valid:
            raise ValueError(f"{name}={getattr(config, name)} is out of range: use {wanted}")


# ---------------------------------------------------------------------------------------------------------------------
# Problems

def load_task(name, config):
    """A task's training split. ValueError where it has none, or cannot tell right from wrong."""
    own = Path(config.data_dir).expanduser() / name.lower().partition("-")[0] if config.data_dir else None
    folder = {"data_dir": own if own.is_dir() else config.data_dir} if own else {}
    try:
        task = get_task(name, split=config.split, **folder)
    except TypeError as error:
        raise ValueError(f"{name} has no split to choose, or takes no data_dir ({error}): only tasks with a {config.split} split can be sampled") from error
    if len(task) == 0:
        raise ValueError(f"{name} {config.split} has 0 problems: look at its data")
    try:
        is_sound = task.is_correct(task[0], message_text(task[0]["messages"][-1])) and not task.is_correct(task[0], "")
    except NotImplementedError as error:
        raise ValueError(f"{name} cannot be sampled: {error}") from error
    if not is_sound:
        raise ValueError(f"{name} {config.split} does not accept its own reference answer to problem 0, or accepts an empty one: mend its data")
    return task


def chosen_problems(name, count, config):
    """The indices of a task's problems in the seed's order: a longer run asks a shorter one's problems first."""
    order = list(range(count))
    random.Random(f"problems|{config.seed}|{name}").shuffle(order)
    return order if config.max_problems == -1 else order[:config.max_problems]


def build_conversation(task, name, index, config):
    conversation = task[index]
    if config.permute_options and "letters" in conversation:
        n = len(conversation["letters"])
        return permuted(conversation, random.Random(f"options|{config.seed}|{name}|{index}").sample(range(n), n))
    return conversation


def draw_seed(config, name, index):
    """The number that decides all draws of one problem, whatever the rank and the chunk."""
    return random.Random(f"rejection|{config.seed}|{name}|{index}").getrandbits(62)


# ---------------------------------------------------------------------------------------------------------------------
# Answers

def answer(problems, tasks, engine, tokenizer, journal, config):
    """Sample all problems in flight together; each is judged and written down the moment its last sample ends -> their records."""
    conversations, requests, asked, records = [], [], [], []
    longest = engine.model.config.sequence_len - 1
    for name, index in problems:
        conversation = build_conversation(tasks[name], name, index, config)
        tokens, seed = tokenizer.render_for_completion(conversation), draw_seed(config, name, index)
        record = {"task": name, "index": index, "seed": seed, "prompt": conversation["messages"][:-1], "right": [], "dropped": Counter()}
        records.append(record)
        if len(tokens) > longest:
            record["dropped"]["prompt too long"] = config.num_samples
            journal.keep(record)
            continue
        asked.append(record)
        conversations.append(conversation)
        requests.append(Request(tokens, config.num_samples, config.max_new_tokens, config.temperature, config.top_k, seed=seed))
    missing = [config.num_samples] * len(requests)

    def finish(place, sample, completion):
        record, conversation = asked[place], conversations[place]
        reason, reward = judge(tasks[record["task"]], conversation, completion)
        if reason is None:
            content = faithful_content(tokenizer, requests[place].tokens, completion, conversation)
            reason = None if content else "no faithful text"
        if reason is None:
            record["right"].append({"sample": sample, "content": content, "reward": reward, "tokens": len(completion.tokens)})
        else:
            record["dropped"][reason] += 1
        missing[place] -= 1
        if not missing[place]:
            record["right"].sort(key=lambda answer: answer["sample"])  # they ended in the order of their lengths
            journal.keep(record)

    engine.generate(requests, on_finish=finish)
    return records


def judge(task, conversation, completion):
    """A completion -> (the reason to drop it or None, its reward). Only a whole answer that is right in the strict sense is kept."""
    if completion.finish_reason != "stop":
        return "cut off", 0.0
    parts = task.rewards(conversation, completion.text)
    if parts.get("correct") is None:
        return "not judged", 0.0
    return (None if parts["correct"] == 1 else "wrong"), sum(parts.values())


def faithful_content(tokenizer, prompt, completion, conversation):
    """The completion as an assistant's content, text or parts, if a conversation that ends with it has the very bytes that were sampled.

    None for marks in the wrong place, an end that is not the assistant's, torn characters, a tool's output that no tool gave."""
    parts = message_parts(tokenizer, completion.tokens)
    outputs = {tokenizer.encode_special(name) for name in ("<|output_start|>", "<|output_end|>")}
    if not parts or any(token in outputs for token, is_sampled in zip(completion.tokens, completion.mask) if is_sampled):
        return None
    content = parts[0]["text"] if len(parts) == 1 and parts[0]["type"] == "text" else parts
    ids, _ = tokenizer.render_conversation({"messages": [*conversation["messages"][:-1], {"role": "assistant", "content": content}]}, max_tokens=10**9)
    written, sampled = (b"".join(map(tokenizer.id_to_bytes, tokens)) for tokens in (ids, [*prompt, *completion.tokens]))
    return content if written == sampled else None


class Journal:
    """{output}.rank0.part, .rank1.part, ...: one problem a line, with its right answers and the count of the others by reason.

    A line counts if it bears this run's key, whichever rank and however many of them wrote it; torn lines are passed over."""

    def __init__(self, output, keys, compute):
        self.output, self.keys = output, keys           # keys: {task: the key its lines must bear}
        output.parent.mkdir(parents=True, exist_ok=True)
        self.records = self.read()
        compute.barrier()                               # all have read before any writes
        self.file = open(output.with_name(f"{output.name}.rank{compute.rank}.part"), "a", encoding="utf-8")

    def read(self):
        """{(task, index): record}"""
        records = {}
        for path in sorted(self.output.parent.glob(f"{self.output.name}.rank*.part")):
            for record in load_jsonl(path, skipped=Counter()):  # lines that a kill has torn are passed over
                if self.keys.get(record.get("task")) == record.get("key") is not None:
                    records[record["task"], record["index"]] = record
        return records

    def keep(self, record):
        # the newline stands first as well: a line torn by a kill must not swallow the next one
        self.file.write(f"\n{json.dumps({**record, 'key': self.keys[record['task']]}, ensure_ascii=False)}\n")
        self.file.flush()

    def close(self):
        self.file.close()


def sampling_key(name, task, config, meta):
    """What a task's samples depend on, as a short text: weights, problems, the way of drawing. Rules of keeping are not in it."""
    names = ("split", "permute_options", "num_samples", "temperature", "top_k", "max_new_tokens", "seed")
    # that the data are the same is told by 64 of the problems: to look at all would take minutes for a million of them
    some = [task[index]["messages"] for index in range(0, len(task), max(1, len(task) // 64))]
    parts = {"files": {file: digest for file, digest in meta["files"].items() if file.startswith("model_")}, "tokenizer": meta["tokenizer"],
             "task": name, "problems": len(task), "some": some, **{name: getattr(config, name) for name in names}}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------------------
# Keeping

def select(records, config):
    """Records in the order of the problems -> (rows to train on, Counter of samples dropped by reason). A pure function.

    Each right answer is kept or counted under the first rule that drops it: luck, length, duplicate, shortest, cap."""
    rows, dropped, seen = [], Counter(), set()
    for record in records:
        dropped.update(record["dropped"])
        kept, trusted = [], record["right"]
        if len(trusted) < config.min_right:
            dropped["of problems with too few right ones"] += len(trusted)
            trusted = []
        for answer in trusted:
            text = normalized([*record["prompt"], {"content": answer["content"]}])
            if config.max_tokens != -1 and answer["tokens"] > config.max_tokens:
                dropped["longer than max_tokens"] += 1
            elif config.dedupe and text in seen:
                dropped["duplicate"] += 1
            else:
                seen.add(text)
                kept.append(answer)
        if config.shortest_k != -1:
            kept.sort(key=lambda answer: (answer["tokens"], answer["sample"]))
            dropped["not among the shortest"] += len(kept[config.shortest_k:])
            kept = kept[:config.shortest_k]
        if config.max_per_prompt != -1:
            dropped["over max_per_prompt"] += len(kept[config.max_per_prompt:])
            kept = kept[:config.max_per_prompt]
        for answer in kept:
            rows.append({"messages": [*record["prompt"], {"role": "assistant", "content": answer["content"]}],
                         "provenance": {"task": record["task"], "index": record["index"], "sample": answer["sample"], "reward": answer["reward"],
                                        "seed": record["seed"], "tokens": answer["tokens"]}})
    return rows, +dropped


def normalized(messages):
    """A digest of what is said, its case and blanks left out."""
    text = "\x00".join(" ".join(message_text(message).casefold().split()) for message in messages)
    return hashlib.blake2b(text.encode("utf-8", errors="replace"), digest_size=16).digest()


def summarize(records, problems, rows, dropped, config, checkpoint, seconds):
    """The run in numbers: per task how much was solved, over all of them what was kept and why the rest was not."""
    by_task = defaultdict(list)
    for problem in problems:
        by_task[problem[0]].append(len(records[problem]["right"]))
    per_task = {}
    for name, counts in by_task.items():
        accuracy, low, high = accuracy_interval([count / config.num_samples for count in counts])
        kept = Counter(row["provenance"]["index"] for row in rows if row["provenance"]["task"] == name)
        per_task[name] = {"problems": len(counts), "right_samples": sum(counts), "accuracy": accuracy, "ci_low": low, "ci_high": high,
                          "solved_problems": sum(count > 0 for count in counts), "problems_kept": len(kept), "rows": kept.total()}
    return {"checkpoint": checkpoint, "samples": len(problems) * config.num_samples, "rows": len(rows), "dropped": dict(dropped.most_common()),
            "tasks": per_task, "seconds": seconds, "config": config_dict(config)}


def show(report, output):
    lines = [f"{name}: {percent(task['accuracy'])} of the samples right ({percent(task['ci_low'])} to {percent(task['ci_high'])}), "
             f"{task['solved_problems']:,} of {task['problems']:,} problems solved at least once, {task['rows']:,} rows kept of {task['problems_kept']:,} problems"
             for name, task in report["tasks"].items()]
    lines += [f"dropped: {count:,} {reason}" for reason, count in report["dropped"].items()]
    lines.append(f"{report['rows']:,} of {report['samples']:,} samples kept in `{output.name}`")
    print0("\n".join(lines))
    add_section("rs_generate", f"Rejection sampling from `{report['checkpoint']}`:\n\n" + "\n".join(f"- {line}" for line in lines), report)


if __name__ == "__main__":
    main(parse(Config))
