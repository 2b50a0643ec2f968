"""What each head looks at, in numbers: how widely, how far, and at which parts of the prompt.

Every number is a mean over queries of one head, (L, H) per layer and head. A prompt's question lies behind every answer, so a head
that looks everywhere alike also "looks at the question": `uniform_*` is what that head would score.
"""
import math
import re
import time

import torch

from nanochat.interpretability.capture import Capture, chosen

SPANS = ("question", "options", "numbers")
DIGIT = re.compile(rb"[0-9]")


def attention_metrics(model, tokenizer, sequences, prompt_lengths, layers=None, device_batch_size=8):
    """Token sequences (prompt and completion) -> {"attn/entropy_mean": ..., "attn/entropy_layer/0": ..., ...}, over the queries of the
    completions: their means over all layers and heads, and over the heads of each layer."""
    layers = chosen(layers, model.config.n_layer)
    return flatten(measure_attention(model, tokenizer, sequences, prompt_lengths, layers, device_batch_size), layers)


def flatten(table, layers):
    """{name: (L, H)} and the layers' numbers -> flat metrics. What a head that looks everywhere alike would score is the same in all
    layers, so it stands there once."""
    metrics = {}
    for name, values in table.items():
        metrics[f"attn/{name}_mean"] = values.mean().item()
        if not name.startswith("uniform_"):
            for layer, value in zip(layers, values.mean(dim=1).tolist()):
                metrics[f"attn/{name}_layer/{layer}"] = value
    return metrics


@torch.no_grad()
def measure_attention(model, tokenizer, sequences, prompt_lengths, layers=None, device_batch_size=8):
    """-> {name: (L, H) float64 on the CPU}, each the mean over all completion queries of all sequences. The query at position t is
    the one that predicts token t + 1, so a completion's queries begin at the prompt's last token. Names: entropy (nats),
    entropy_normalized (1 = uniform), distance (tokens), first_token, question, options, numbers and their uniform_*, agreement."""
    totals, count = {}, 0
    order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
    for start in range(0, len(order), device_batch_size):
        places = order[start:start + device_batch_size]
        rows = [sequences[i] for i in places]
        T = max(map(len, rows))
        inputs = torch.tensor([row + [tokenizer.bos_id] * (T - len(row)) for row in rows], device=model.device)
        queries = torch.tensor([[prompt_lengths[i] - 1 <= t < len(row) - 1 for t in range(T)] for i, row in zip(places, rows)], device=model.device)
        spans = {name: torch.tensor([masks[name] + [False] * (T - len(masks[name])) for masks in (
            prompt_spans(tokenizer, row) for row in rows)], device=model.device) for name in SPANS}
        first_query = min(prompt_lengths[i] for i in places) - 1  # the queries before it count nowhere
        with Capture(model, layers) as seen:
            model.hidden(inputs)
        of_layers = [head_statistics(seen.attention(layer, first_query), queries, spans) for layer in seen.layers]
        for name in of_layers[0]:
            totals[name] = totals.get(name, 0) + torch.stack([one[name] for one in of_layers]).double().cpu()
        count += int(queries.sum())
    if not count:
        raise ValueError(f"{len(sequences)} sequences hold 0 completion tokens: give prompts with their completions")
    return {name: total / count for name, total in totals.items()}


def head_statistics(weights, queries, spans):
    """weights (B, H, Q, T) of the last Q of T queries, queries (B, T) and spans {name: (B, T)} -> {name: (H,)}, summed over the queries
    that are True."""
    B, H, Q, T = weights.size()
    t = torch.arange(T - Q, T, device=weights.device)
    counted = queries[:, None, T - Q:]  # (B, 1, Q)

    def summed(values):  # (B, H, Q) -> (H,)
        return torch.where(counted, values, 0.0).sum(dim=(0, 2))

    entropy = entropy_of(weights)
    widest = torch.log(t + 1.0)  # a query at t sees t + 1 keys
    distance = (t[:, None] - torch.arange(T, device=weights.device)[None]).clamp(min=0).to(weights.dtype)
    # How alike the heads are: 1 = all look at the same places, 0 = as different as H heads can be (Jensen-Shannon over log H)
    spread = entropy_of(weights.mean(dim=1, keepdim=True)) - entropy.mean(dim=1, keepdim=True)
    agreement = 1 - spread / math.log(H) if H > 1 else torch.ones_like(spread)
    result = {"entropy": summed(entropy), "entropy_normalized": summed(entropy / widest.clamp(min=math.log(2))),
              "distance": summed((weights * distance).sum(dim=-1)), "first_token": summed(weights[..., 0]),
              "agreement": summed(agreement.expand(B, H, Q))}
    for name, span in spans.items():
        span = span.to(weights.dtype)
        seen = (span.cumsum(dim=1) / torch.arange(1, T + 1, device=span.device))[:, None, T - Q:]  # (B, 1, Q)
        result[name] = summed((weights * span[:, None, None]).sum(dim=-1))
        result[f"uniform_{name}"] = summed(seen.expand(B, H, Q))
    return result


def entropy_of(weights):
    """(..., T) distributions -> (...,) entropy in nats; 0 log 0 = 0."""
    return -torch.special.xlogy(weights, weights).sum(dim=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Which tokens are what

def prompt_spans(tokenizer, ids):
    """The ids of a rendered prompt, with or without a completion -> {name: list of bool, one per id}:

        question   the last user turn up to its options (all of it where there are none)
        options    its lines `- choice=A`, `- choice=B`, ...
        numbers    every token with a digit, wherever it stands, answers included

    A token belongs where its last byte lies."""
    pieces = [tokenizer.id_to_bytes(token) for token in ids]
    masks = {name: [False] * len(ids) for name in SPANS}
    masks["numbers"] = [bool(DIGIT.search(piece)) for piece in pieces]
    begin, end = tokenizer.encode_special("<|user_start|>"), tokenizer.encode_special("<|user_end|>")
    if begin not in ids:
        return masks
    first = len(ids) - ids[::-1].index(begin)  # behind the last user's marker
    last = next((place for place in range(first, len(ids)) if ids[place] == end), len(ids))
    text = b"".join(pieces[first:last])
    option_bytes = find_options(text) or (len(text), len(text))
    position = 0
    for place in range(first, last):
        position += len(pieces[place])
        masks["question"][place] = position <= option_bytes[0]
        masks["options"][place] = option_bytes[0] < position <= option_bytes[1]
    return masks


def find_options(text):
    """Bytes of a user's turn -> (start, end) of its last lines `- choice=A`, `- choice=B`, ...; None where there are not two or more."""
    found, position, start, n = None, 0, 0, 0
    for line in text.split(b"\n"):
        if n and is_option(line, n):
            n += 1
        elif is_option(line, 0):
            start, n = position, 1
        else:
            n = 0
        position += len(line) + 1
        if n > 1:
            found = start, min(position, len(text))
    return found


def is_option(line, n):
    return line.startswith(b"- ") and line.endswith(b"=%c" % (65 + n))


# ---------------------------------------------------------------------------------------------------------------------
# What watching costs

@torch.no_grad()
def measure_overhead(model, tokenizer, sequences, prompt_lengths, layers=None, repeats=10):
    """-> seconds of a plain pass over the sequences as one batch, of the same pass under hooks, and of all attention metrics with
    their own pass, each the least of `repeats` (taken in turns, so that a busy machine troubles all three alike)."""
    T = max(map(len, sequences))
    inputs = torch.tensor([row + [tokenizer.bos_id] * (T - len(row)) for row in sequences], device=model.device)

    def hooked():
        with Capture(model, layers):
            model.hidden(inputs)

    runs = {"plain_s": lambda: model.hidden(inputs), "hooked_s": hooked,
            "metrics_s": lambda: measure_attention(model, tokenizer, sequences, prompt_lengths, layers, len(sequences))}
    seconds = {name: float("inf") for name in runs}
    for _ in range(repeats + 1):  # the first round, which warms up, is rarely the least
        for name, run in runs.items():
            synchronize(model.device)
            began = time.perf_counter()
            run()
            synchronize(model.device)
            seconds[name] = min(seconds[name], time.perf_counter() - began)
    return seconds


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)
