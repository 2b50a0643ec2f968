"""How much faster evaluation is than answering or scoring one example at a time, with the same answers and the same scores.

    python dev/bench/eval.py --bundle=DIR --aqua=DIR

CORE: `core_eval` beside a loop over the examples, whose choices go through the model as one padded batch and get logits everywhere; and
beside one pass per choice. AQuA: the engine, all rows in flight, beside a loop over Hugging Face's `generate`, greedy, with the same weights.
Both run in turns in this process, on one thread, and are timed by the processor time they take (on a GPU by the clock): neighbours on a
busy machine do not count. Random weights unless --source names a stage. The last line is JSON.
"""
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

from nanochat.checkpoint_manager import load_model  # noqa: E402
from nanochat.compute import compute_init  # noqa: E402
from nanochat.configurator import parse  # noqa: E402
from nanochat.core_bundle import find_bundle, load_bundle  # noqa: E402
from nanochat.core_eval import choose_items, crop, draw_examples, evaluate_task, likeliest, render, render_blind, tokenize  # noqa: E402
from nanochat.engine import Engine, Request  # noqa: E402
from nanochat.gpt import GPT, config_from_depth  # noqa: E402
from nanochat.huggingface.folder import write_folder  # noqa: E402
from nanochat.likelihood import GPTScorer, Score  # noqa: E402
from nanochat.tokenizer import Tokenizer  # noqa: E402
from tasks.common import get_task, message_text  # noqa: E402

NEAR_TIE = 1e-3                                         # between the two likeliest tokens: below it float32 may choose either


@dataclass(frozen=True)
class Config:
    """Measure evaluation beside one example at a time."""
    parts: tuple[str, ...] = ("core", "aqua")  # what to measure
    bundle: str | None = None                  # folder of CORE's tasks (None = the base directory's)
    items: int = 16                            # items per CORE task
    aqua: str | None = None                    # folder of AQuA (None = where the task finds it)
    rows: int = 254                            # rows of AQuA's validation split
    new_tokens: int = 128                      # of an answer
    depth: int = 4                             # layers of the random model; the width is 64 times as many
    vocab_size: int = 8192                     # of its tokenizer, which is trained on the texts at hand
    source: str = ""                           # stage of a checkpoint to use instead of a random model
    model_tag: str | None = None               # its folder
    batch_tokens: int = 4096                   # in one pass of core_eval
    max_rows: int = 128                        # in flight in the engine
    repeats: int = 3                           # runs of each, in turns
    threads: int = 1                           # of a CPU
    device: str = ""                           # cuda or cpu ("" = the best there is)


def main(config):
    torch.set_num_threads(config.threads)
    compute = compute_init(config.device, "float32")
    results = {"device": str(compute.device), "threads": config.threads, "torch": torch.__version__, "dtype": "float32"}
    if "core" in config.parts:
        results["core"] = measure_core(config, compute)
        print(results["core"], flush=True)
    if "aqua" in config.parts:
        results["aqua"] = measure_aqua(config, compute)
    print(json.dumps(results))


def build(config, compute, texts):
    """-> (model, tokenizer): a checkpoint, or random weights of a trained model's sizes and a tokenizer trained on `texts`."""
    if config.source:
        return load_model(config.source, compute, "eval", config.model_tag)[:2]
    tokenizer = Tokenizer.train(texts, config.vocab_size)
    model = GPT(config_from_depth(config.depth, tokenizer.vocab_size, 2048), compute.dtype).eval().requires_grad_(False)
    model.init_weights()
    generator = torch.Generator().manual_seed(0)
    for name, weight in model.named_parameters():
        if name.endswith("c_proj.weight") or name == "lm_head.weight":  # these start at zero, where all tokens are equally likely
            torch.nn.init.normal_(weight, std=0.1, generator=generator)
    model.lm_head.weight[-9:] = 0                       # the special tokens' logits are far below the best: no answer ends early
    return model.to(compute.device), tokenizer


def in_turns(runs, compute, repeats):
    """{name: function} -> ({name: seconds of each run}, {name: what it returned last}), one after the other, `repeats` times."""
    clock = time.perf_counter if compute.device.type == "cuda" else time.process_time
    seconds, found = {name: [] for name in runs}, {}
    for _ in range(repeats):
        for name, run in runs.items():
            compute.synchronize()
            begin = clock()
            found[name] = run()
            compute.synchronize()
            seconds[name].append(clock() - begin)
    return seconds, found


def ratio(seconds, slow, fast="ours"):
    """The median over the turns of slow / fast."""
    return round(statistics.median(a / b for a, b in zip(seconds[slow], seconds[fast])), 2)


# -- CORE -------------------------------------------------------------------------------------------------------------

def measure_core(config, compute):
    tasks = load_bundle(find_bundle(config.bundle))
    texts = [text for task in tasks for item in task.items[:300] for text in (*item.contexts, *item.continuations)]
    model, tokenizer = build(config, compute, texts)
    scorer = GPTScorer(model, tokenizer)
    lines, totals = [], {"ours": 0.0, "by example": 0.0, "by choice": 0.0}
    for task in tasks:
        runs = {"ours": lambda: [record["logprobs"] for record in evaluate_task(task, scorer, compute, config.items, batch_tokens=config.batch_tokens)],
                "by example": lambda: one_at_a_time(task, scorer, config.items, together=True),
                "by choice": lambda: one_at_a_time(task, scorer, config.items, together=False)}
        seconds, found = in_turns(runs, compute, config.repeats)
        for name in ("by example", "by choice"):
            for mine, theirs in zip(found["ours"], found[name], strict=True):
                assert all(abs(a - b) < 1e-3 + 1e-5 * abs(b) for a, b in zip(mine, theirs, strict=True)), (task.label, name, mine, theirs)
        for name in totals:                             # what the whole task would take
            totals[name] += statistics.median(seconds[name]) * len(task.items) / len(found["ours"])
        lines.append({"task": task.label, "items": len(found["ours"]), **{name: round(statistics.median(values), 3) for name, values in seconds.items()},
                      "ratio": ratio(seconds, "by example"), "ratio_by_choice": ratio(seconds, "by choice")})
        print(lines[-1], flush=True)
    equal = {name: sum(line[name] for line in lines) for name in totals}
    return {"tasks": lines, "items_per_task": config.items, "whole_bundle_seconds": {name: round(value) for name, value in totals.items()},
            "ratio": round(totals["by example"] / totals["ours"], 2), "ratio_by_choice": round(totals["by choice"] / totals["ours"], 2),
            "ratio_equal_items": round(equal["by example"] / equal["ours"], 2)}


@torch.inference_mode()
def one_at_a_time(task, scorer, max_items, together):
    """The plain loop: each item's choices as one padded batch (or each alone), logits of every position -> the log-likelihoods of each item.

    It also scores the choices without context, as `evaluate_task` does, so that both do the same work."""
    found = []
    for index in choose_items(task, max_items, 1234):
        found.append([one.logprob for one in plain_scores(scorer, render(task, task.items[index], draw_examples(task, index, 1234)), together)])
        blind = render_blind(task, task.items[index])
        if blind:
            likeliest(plain_scores(scorer, blind, together))
    return found


def plain_scores(scorer, pairs, together):
    sequences, _ = crop(tokenize(scorer, pairs), scorer.sequence_len, len(scorer.bos))
    scores = []
    for batch in [sequences] if together else [[sequence] for sequence in sequences]:
        width = max(len(tokens) for tokens, _ in batch)
        ids = torch.tensor([tokens + [0] * (width - len(tokens)) for tokens, _ in batch], device=scorer.model.device)
        logprobs = F.log_softmax(scorer.model(ids[:, :-1]), dim=-1).gather(2, ids[:, 1:, None])[:, :, 0]
        for line, (tokens, start) in zip(logprobs, batch):
            scores.append(Score(line[start - 1:len(tokens) - 1].sum().item(), len(tokens) - start, False))
    return scores


# -- AQuA -------------------------------------------------------------------------------------------------------------

def measure_aqua(config, compute):
    from transformers import AutoModelForCausalLM
    task = get_task("AQUA", split="validation", shuffle=False, stop=config.rows, **({"data_dir": config.aqua} if config.aqua else {}))
    conversations = [task[index] for index in range(len(task))]
    model, tokenizer = build(config, compute, [message_text(message) for conversation in conversations for message in conversation["messages"]])
    prompts = [tokenizer.render_for_completion(conversation) for conversation in conversations]
    prompts = [prompt for prompt in prompts if len(prompt) + config.new_tokens <= model.config.sequence_len]
    with tempfile.TemporaryDirectory() as folder:       # the twin, through the real export
        write_folder(Path(folder) / "twin", model, tokenizer, {})
        peer = AutoModelForCausalLM.from_pretrained(Path(folder) / "twin", dtype=torch.float32).to(compute.device).eval()
    engine = Engine(model, tokenizer, max_rows=config.max_rows, tools=False)
    ends = sorted(engine.stops)

    def ours():
        order = sorted(range(len(prompts)), key=lambda place: len(prompts[place]))
        answers = engine.generate([Request(prompts[place], max_new_tokens=config.new_tokens, temperature=0.0) for place in order])
        return [tokens for _, tokens in sorted((place, completion.tokens) for place, (completion,) in zip(order, answers))]

    @torch.inference_mode()
    def theirs():
        found = []
        for prompt in prompts:
            ids = torch.tensor([prompt], device=compute.device)
            output = peer.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=config.new_tokens, do_sample=False, eos_token_id=ends, pad_token_id=ends[0])
            found.append(output[0, len(prompt):].tolist())
        return found

    seconds, found = in_turns({"ours": ours, "generate": theirs}, compute, config.repeats)
    same, ties = 0, 0
    for prompt, mine, other in zip(prompts, found["ours"], found["generate"], strict=True):
        if mine == other:
            same += 1
            continue
        place = next(i for i, (a, b) in enumerate(zip(mine, other)) if a != b)
        with torch.inference_mode():
            best = model(torch.tensor([prompt + mine[:place]], device=compute.device))[0, -1].topk(2).values
        assert best[0] - best[1] < NEAR_TIE, (prompt, place, mine[place], other[place], best)
        ties += 1
    tokens = sum(map(len, found["ours"]))
    return {"rows": len(prompts), "new_tokens": config.new_tokens, "tokens": tokens, "same_answers": same, "near_ties": ties,
            **{name: [round(value, 2) for value in values] for name, values in seconds.items()}, "ratio": ratio(seconds, "generate")}


if __name__ == "__main__":
    main(parse(Config))
