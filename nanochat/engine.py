"""One engine for RL, evaluation, terminal and web: many different prompts in flight, each row with its own settings.

Continuous batching (Orca, OSDI 2022): at every step finished rows leave at once and waiting ones enter. A group of samples
shares one pass over its prompt. A row's random numbers come from (seed, sample, draw) alone, and on a CPU it is the same to the bit, log-probabilities
included, whatever else is in flight (decoder.py); on a GPU products of another shape round differently, and a near tie may fall the other way.
Calculator calls are answered inside the row. Not thread-safe: one thread drives an engine.
"""
import codecs
import itertools
import math
from collections import deque
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from nanochat.decoder import make_decoder
from nanochat.execution import calculate
from nanochat.gpt import frozen_gpt
from nanochat.kv_cache import Prefill
from nanochat.sampling import stream_key, uniforms

PREFILL_TOKENS = 8192  # padded prompt tokens in one pass: bounds the memory of admission


@dataclass(frozen=True)
class Request:
    """A prompt, how often to continue it, and how. temperature 0 is greedy; top_k and top_p are off at None."""
    tokens: list[int]
    num_samples: int = 1
    max_new_tokens: int = 256
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    seed: int = 0
    stop_ids: tuple[int, ...] = ()  # besides <|assistant_end|> and <|bos|>


@dataclass(frozen=True)
class Completion:
    """What follows the prompt. The sampled end token is part of it: whoever trains on it trains the decision to stop."""
    tokens: list[int]
    mask: list[int]  # 1 = sampled, 0 = forced by a tool
    logprobs: list[float]  # under the distribution sampled from: after temperature, top_k, top_p; 0.0 where forced
    finish_reason: str  # "stop", "length" (max_new_tokens or sequence_len), or "cancelled"
    text: str  # without the end token


class Event(NamedTuple):
    """One token of one row; with its last token also the whole completion."""
    id: int
    token: int
    is_forced: bool
    completion: Completion | None


class Group:
    """The samples of one request that still wait, and their prompt's prefill once it is there."""

    def __init__(self, request, ids):
        self.request, self.waiting = request, deque(enumerate(ids))
        self.prefill = self.logits = None


class Row:
    """One completion in flight."""
    __slots__ = ("id", "request", "key", "tokens", "mask", "logprobs", "limit", "stops", "forced", "expression")

    def __init__(self, id, request, key, limit, stops):
        self.id, self.request, self.key, self.limit, self.stops = id, request, key, limit, stops  # key: of its random stream
        self.tokens, self.mask, self.logprobs = [], [], []
        self.forced = deque()  # tokens a tool has put in the row's mouth
        self.expression = None  # the tokens since <|python_start|>, inside a tool call


class Engine:
    """`generate` for many prompts at once, `stream` for one; `add`, `step`, `cancel` for a server that drives it itself.

    `keep_rows`: of so many finished rows, the newest, keys and values stay, and a prompt that begins as one of them does (the next turn of
    a conversation) begins there.
    """

    def __init__(self, model, tokenizer, max_rows=128, tools=True, keep_rows=0):
        if max_rows < 1:
            raise ValueError(f"max_rows={max_rows} leaves no room for a row: use 1 or more")
        self.training_model, self.tokenizer, self.max_rows, self.tools = model, tokenizer, max_rows, tools
        self.model = cast_copy(model)
        self.decoder = make_decoder(self.model)
        self.kept = deque(maxlen=keep_rows)  # (tokens, Prefill) of finished rows
        self.kv_cache = self.decoder.new_cache()
        self.markers = {name: tokenizer.encode_special(f"<|{name}|>") for name in
                        ("assistant_end", "python_start", "python_end", "output_start", "output_end")}
        self.stops = frozenset((self.markers["assistant_end"], tokenizer.bos_id))
        self.ids = itertools.count()
        self.waiting, self.rows = deque(), []  # groups in order of arrival; rows as they stand in the cache
        self.sampler = None  # made anew when the rows change

    @property
    def is_idle(self):
        return not self.rows and not self.waiting

    @torch.no_grad()
    def refresh(self):
        """Copy the training weights into the engine's cast copy, in place; nothing to do where both are the same tensors."""
        assert not self.rows, f"{len(self.rows)} rows in flight hold keys and values of the old weights"
        for group in self.waiting:
            group.prefill = group.logits = None
        self.kept.clear()
        if self.model is not self.training_model:
            for mine, theirs in zip(self.model.parameters(), self.training_model.parameters()):
                mine.copy_(theirs)
        self.decoder.refresh()

    # ------------------------------------------------------------ whole completions

    def generate(self, requests, on_finish=None):
        """Requests -> for each, in their order, a list of its `num_samples` Completions.

        `on_finish(request_index, sample_index, completion)` is called the moment a completion is done.
        """
        assert self.is_idle, "generate() while other rows are in flight: their events would be lost; drive add() and step() yourself"
        for request in requests:
            self.check(request)
        places, results = {}, [[None] * request.num_samples for request in requests]
        try:
            for index, request in enumerate(requests):
                places.update((id, (index, sample)) for sample, id in enumerate(self.add(request)))
            while places:
                for event in self.step():
                    if event.completion is not None:
                        index, sample = places.pop(event.id)
                        results[index][sample] = event.completion
                        if on_finish is not None:
                            on_finish(index, sample, event.completion)
        finally:  # an interrupted call leaves nothing behind
            for id in places:
                self.cancel(id)
            self.waiting = deque(group for group in self.waiting if group.waiting)
        return results

    def stream(self, tokens, **settings):
        """A prompt and Request's settings -> iterator of (token, is_forced), each as soon as it is there."""
        (id,) = self.add(Request(list(tokens), **settings))
        completion = None
        try:
            while completion is None:
                for event in self.step():
                    if event.id == id:
                        completion = event.completion
                        yield event.token, event.is_forced
        finally:
            if completion is None:
                self.cancel(id)

    def generate_batch(self, tokens, num_samples=1, max_tokens=None, temperature=1.0, top_k=None, seed=42):
        """One prompt -> (sequences, masks), prompt included; the mask is 0 on the prompt and on forced tokens."""
        max_tokens = self.model.config.sequence_len if max_tokens is None else max_tokens
        request = Request(list(tokens), num_samples, max_tokens, temperature, top_k, seed=seed)
        (completions,) = self.generate([request])
        return ([request.tokens + completion.tokens for completion in completions],
                [[0] * len(tokens) + completion.mask for completion in completions])

    # ------------------------------------------------------------ one step at a time

    def add(self, request):
        """Queue a request -> the ids of its samples."""
        self.check(request)
        ids = [next(self.ids) for _ in range(request.num_samples)]
        self.waiting.append(Group(request, ids))
        return ids

    @torch.inference_mode()
    def step(self):
        """Let waiting rows in, then one more token for every row -> the Events of this step."""
        events = self.admit()
        if self.rows:
            if self.sampler is None:
                self.sampler = RowSampler(self.rows, self.decoder)
            events += self.extend(self.rows, *self.sampler.next(self.rows, self.kv_cache, self.tokenizer.vocab_size))
        return events

    @torch.inference_mode()
    def cancel(self, id):
        """Drop a row, waiting or in flight -> what it has so far, or None if there is no such row any more."""
        for group in self.waiting:
            for sample, waiting_id in group.waiting:
                if waiting_id == id:
                    group.waiting.remove((sample, id))
                    if not group.waiting:
                        self.waiting.remove(group)
                    return Completion([], [], [], "cancelled", "")
        for place, row in enumerate(self.rows):
            if row.id == id:
                self.remove(place)
                return self.completion(row, "cancelled")
        return None

    def check(self, request):
        """ValueError for what cannot be asked."""
        config, length = self.model.config, len(request.tokens)
        if not length:
            raise ValueError("the prompt has 0 tokens: begin with <|bos|>")
        if length > config.sequence_len - 1:
            raise ValueError(f"the prompt has {length} tokens, and sequence_len={config.sequence_len} leaves no place for an answer: "
                             f"shorten it to {config.sequence_len - 1} tokens or fewer")
        if not 0 <= min(request.tokens) <= max(request.tokens) < config.vocab_size:
            raise ValueError(f"the prompt holds token {max(request.tokens)} (least {min(request.tokens)}), outside the vocabulary of "
                             f"{config.vocab_size}: encode it with the model's own tokenizer")
        for name, valid, wanted in (
                ("num_samples", request.num_samples >= 1, "1 or more"),
                ("max_new_tokens", request.max_new_tokens >= 1, "1 or more"),
                ("temperature", 0 <= request.temperature < float("inf"), "0 for greedy, or more"),
                ("top_k", request.top_k is None or request.top_k >= 1, "1 or more, or None for the whole vocabulary"),
                ("top_p", request.top_p is None or 0 < request.top_p <= 1, "more than 0 and at most 1, or None")):
            if not valid:
                raise ValueError(f"{name}={getattr(request, name)} is out of range: use {wanted}")

    # ------------------------------------------------------------ inside

    def admit(self, most=None):
        """Fill the free rows from the front of the queue and draw their first tokens -> Events. `most`: prompts to let in at once (None = all)."""
        if not self.rows:  # an interrupt may have struck between the cache and the list of rows
            self.kv_cache.n_rows = 0
        entering, free = [], self.max_rows - len(self.rows)
        for group in self.waiting:
            if not free or len(entering) == most:
                break
            entering.append((group, count := min(free, len(group.waiting))))
            free -= count
        if not entering:
            return []
        fresh = [(group, count) for group, count in entering if group.prefill is None]
        events = []
        for group, count in entering:
            if group.prefill is not None:  # its first samples found room earlier, and the prompt was kept for these
                events += self.enter(group.prefill, group.logits.clone(), [(group, count)])  # drawing overwrites them
        for batch in similar_lengths(fresh):
            events += self.enter(*self.prefill([group.request.tokens for group, _ in batch]), batch)
        self.waiting = deque(group for group in self.waiting if group.waiting)
        return events

    def prefill(self, prompts):
        """Prompts -> (Prefill, raw logits (P, V) after each prompt's last token)."""
        past, reused = self.longest_kept(prompts[0]) if len(prompts) == 1 else (None, 0)
        news = [prompt[reused:] for prompt in prompts]
        prefill = Prefill(self.model.config, self.model.device, past, reused, [len(new) for new in news])
        return prefill, self.decoder.prompts_raw_logits(news, prefill)

    def longest_kept(self, prompt):
        """-> (Prefill, n): the kept row that shares the most first tokens with the prompt, n of them; the last is always computed anew."""
        best = (None, 0)
        for tokens, prefill in self.kept:
            shared = next((i for i, (one, other) in enumerate(zip(tokens, prompt[:-1])) if one != other), min(len(tokens), len(prompt) - 1))
            best = max(best, (prefill, shared), key=lambda entry: entry[1])
        return best

    def enter(self, prefill, logits, batch):
        """Rows for the first `count` waiting samples of each group; prefill row i is group i's prompt -> Events."""
        sources, rows = [], []
        for source, (group, count) in enumerate(batch):
            request = group.request
            limit, stops = min(request.max_new_tokens, self.model.config.sequence_len - len(request.tokens)), self.stops | set(request.stop_ids)
            for sample, id in (group.waiting.popleft() for _ in range(count)):
                rows.append(Row(id, request, stream_key(request.seed, sample), limit, stops))
                sources.append(source)
            if group.waiting and group.prefill is None:
                group.prefill, group.logits = prefill.row(source), logits[source:source + 1].clone()
        self.kv_cache.add(prefill, sources, [len(row.request.tokens) for row in rows])
        self.rows += rows
        if sources != list(range(len(logits))):  # every sample draws its own first token from the shared logits
            logits = logits[torch.tensor(sources, device=logits.device)]
        self.sampler = None
        # rows of logits that only pad the vocabulary are no token's
        return self.extend(rows, *RowSampler(rows, self.decoder).draw(logits[:, :self.tokenizer.vocab_size], rows), first=len(self.rows) - len(rows))

    def extend(self, rows, drawn, logprobs, first=0):
        """Append to each row the token its tool forces, else the drawn one; `rows` stand at place `first` -> Events."""
        events, finished = [], []
        for place, (row, token, logprob) in enumerate(zip(rows, drawn, logprobs), first):
            is_forced = bool(row.forced)
            if is_forced:
                token, logprob = row.forced.popleft(), 0.0
            row.tokens.append(token)
            row.mask.append(0 if is_forced else 1)
            row.logprobs.append(logprob)
            reason = None
            if not is_forced:
                if token in row.stops:
                    reason = "stop"
                elif self.tools:
                    self.use_tool(row, token)
            if reason is None and len(row.tokens) >= row.limit:
                reason = "length"
            completion = None
            if reason is not None:
                completion = self.completion(row, reason)
                finished.append(place)
            events.append(Event(row.id, token, is_forced, completion))
        for place in reversed(finished):  # from the end: what moves into the gap is never a finished row
            self.remove(place)
        return events

    def use_tool(self, row, token):
        """Follow a row through <|python_start|> expression <|python_end|>; a value is forced as <|output_start|> value <|output_end|>."""
        if token == self.markers["python_start"]:
            row.expression = []
        elif token == self.markers["python_end"]:
            value = None if row.expression is None else calculate(self.tokenizer.decode(row.expression))
            row.expression = None
            if value is not None:
                row.forced.extend((self.markers["output_start"], *self.tokenizer.encode(value), self.markers["output_end"]))
        elif row.expression is not None:
            row.expression.append(token)

    def remove(self, place):
        if self.kept.maxlen:  # the last token has not been through the model
            row = self.rows[place]
            self.kept.append((row.request.tokens + row.tokens[:-1], self.kv_cache.row(place)))
        self.kv_cache.remove(place)
        last = self.rows.pop()
        if place < len(self.rows):
            self.rows[place] = last
        self.sampler = None

    def completion(self, row, reason):
        words = row.tokens[:-1] if reason == "stop" else row.tokens
        return Completion(row.tokens, row.mask, row.logprobs, reason, self.tokenizer.decode(words))


class RowSampler:
    """Settings and random streams of fixed rows, prepared once for as long as no row comes or goes."""

    def __init__(self, rows, decoder):
        self.decoder, self.sampler = decoder, decoder.sampler([(row.request.temperature, row.request.top_k, row.request.top_p) for row in rows])
        self.keys, self.zeros = np.array([row.key for row in rows], dtype=np.uint64), np.zeros(len(rows))

    def uniform(self, rows):
        return self.zeros if self.sampler.is_greedy else uniforms(self.keys, np.array([len(row.tokens) for row in rows]))

    def draw(self, logits, rows):
        """logits (n, V), which may be overwritten -> lists of n tokens and n log-probabilities."""
        return finite(*self.sampler(logits, self.uniform(rows)))

    def next(self, rows, kv_cache, vocab_size):
        """The same for the token after each row's last."""
        return finite(*self.decoder.next_tokens([row.tokens[-1] for row in rows], kv_cache, self.sampler, self.uniform(rows), vocab_size))


def finite(tokens, logprobs):
    if math.isnan(sum(logprobs)):
        raise FloatingPointError("the model's logits are not finite: its weights are damaged; take an earlier checkpoint (--step), or train on from one at a lower rate")
    return tokens, logprobs


def similar_lengths(batch):
    """[(group, count)] -> lists of them to prefill together: at most half of a pass is padding, and it fits PREFILL_TOKENS."""
    batches = []
    for group, count in sorted(batch, key=lambda entry: -len(entry[0].request.tokens)):
        length = len(group.request.tokens)
        if batches:
            longest = len(batches[-1][0][0].request.tokens)
            if 2 * length >= longest and longest * (len(batches[-1]) + 1) <= PREFILL_TOKENS:
                batches[-1].append((group, count))
                continue
        batches.append([(group, count)])
    return batches


@torch.no_grad()
def cast_copy(model):
    """The model with weights in its compute dtype: itself where they are, else a copy. Casting at every token costs 40 %."""
    if all(weight.dtype == model.compute_dtype for weight in model.parameters()):
        return model
    return frozen_gpt(model.config, model.compute_dtype, {name: weight.to(model.compute_dtype) for name, weight in model.state_dict().items()})


class TextStream:
    """Tokens one by one -> text piece by piece; bytes of a character that is not complete yet are held back."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def add(self, token):
        return self.decoder.decode(self.tokenizer.id_to_bytes(token))

    def flush(self):
        """What is left, torn bytes as replacement characters."""
        return self.decoder.decode(b"", final=True)


def message_parts(tokenizer, tokens):
    """A completion's tokens -> the parts of an assistant's message: text, python, python_output. End tokens and torn calls are dropped."""
    names = {tokenizer.encode_special(f"<|{name}|>"): name for name in
             ("bos", "user_start", "user_end", "assistant_start", "assistant_end", "python_start", "python_end", "output_start", "output_end")}
    parts, kind, run = [], "text", []
    for token in (*tokens, None):
        name = names.get(token)
        if name is None and token is not None:
            run.append(token)
            continue
        if run and (kind == "text" or name == {"python": "python_end", "python_output": "output_end"}[kind]):
            parts.append({"type": kind, "text": tokenizer.decode(run)})
        kind, run = {"python_start": "python", "output_start": "python_output"}.get(name, "text"), []
    return parts
