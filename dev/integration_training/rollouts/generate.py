"""Completions for many prompts in flight, in the order of the prompts, whichever ends first.

`HFEngine` is `nanochat.engine.Engine.generate` for a Hugging Face model: the same requests, the same completions, the same random numbers, which
are functions of (seed, sample, draw). So nanochat.rl.rollout and tasks.evaluation drive both alike.
"""
import copy
import inspect
from types import SimpleNamespace

import numpy as np
import torch

from nanochat.engine import Completion
from nanochat.sampling import Sampler, stream_key, uniforms


class HFEngine:
    """`generate(requests)`; `refresh()` after the weights have moved. Rows of similar prompts go together, at most `max_rows` at once; of rows
    that ended, the cache keeps none once they are half of all."""

    def __init__(self, model, tokenizer, context, dtype, max_rows):
        self.trained, self.tokenizer, self.max_rows = model, tokenizer, max_rows
        is_same = all(weight.dtype == dtype for weight in model.parameters())
        self.network = model if is_same else cast_weights(copy.deepcopy(model), dtype)
        self.last_only = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
        self.model = SimpleNamespace(config=SimpleNamespace(sequence_len=context))  # what evaluation and rollouts ask an engine's model
        ends = getattr(model.generation_config, "eos_token_id", None)
        self.stops = {tokenizer.eos_id, *(ends if isinstance(ends, list) else [] if ends is None else [ends])}

    @torch.no_grad()
    def refresh(self):
        if self.network is not self.trained:
            for mine, theirs in zip(self.network.parameters(), self.trained.parameters()):
                mine.copy_(theirs)

    @torch.inference_mode()
    def generate(self, requests, on_finish=None):
        """Requests -> for each, in their order, a list of its `num_samples` Completions. `on_finish(request, sample, completion)` comes at once."""
        context = self.model.config.sequence_len
        for request in requests:
            if not 0 < len(request.tokens) < context:
                raise ValueError(f"a prompt has {len(request.tokens)} tokens, and {context} leave no place for an answer: shorten it or raise max_length")
        results = [[None] * request.num_samples for request in requests]
        rows = [Row(request, index, sample, context) for index, request in enumerate(requests) for sample in range(request.num_samples)]
        rows.sort(key=lambda row: len(row.request.tokens))  # stable: a group stays together
        was_training = self.network.training
        self.network.eval()
        try:
            for begin in range(0, len(rows), self.max_rows):
                for row in self.run(rows[begin:begin + self.max_rows]):
                    completion = row.completion(self.tokenizer)
                    results[row.index][row.sample] = completion
                    if on_finish is not None:
                        on_finish(row.index, row.sample, completion)
        finally:
            self.network.train(was_training)
        return results

    def run(self, rows):
        """Rows -> the same rows, each as soon as it has ended."""
        device = self.network.device
        groups = list({row.index: row for row in rows}.values())  # each prompt is read once
        longest = max(len(row.request.tokens) for row in groups)
        pads = [longest - len(row.request.tokens) for row in groups]  # on the left: all rows' next token has one place
        inputs = torch.tensor([[self.tokenizer.bos_id] * pad + row.request.tokens for pad, row in zip(pads, groups)], device=device)
        sees = torch.tensor([[0] * pad + [1] * (longest - pad) for pad in pads], device=device)
        out = self.network(input_ids=inputs, attention_mask=sees, position_ids=(sees.cumsum(1) - 1).clamp(min=0), use_cache=True, **self.last_only)
        source = {row.index: place for place, row in enumerate(groups)}
        sources = torch.tensor([source[row.index] for row in rows], device=device)
        cache, logits, sees = out.past_key_values, out.logits[sources, -1], sees[sources]
        cache.batch_select_indices(sources)
        sampler = None
        while True:
            if sampler is None:
                sampler = Sampler([(row.request.temperature, row.request.top_k, row.request.top_p) for row in rows], device)
                keys = np.array([row.key for row in rows], dtype=np.uint64)
            draws = np.array([len(row.tokens) for row in rows])
            tokens, logprobs = sampler(logits.float(), torch.from_numpy(uniforms(keys, draws)).to(device))
            for row, token, logprob in zip(rows, tokens.tolist(), logprobs.tolist()):
                if row.reason is None:
                    row.add(token, logprob, self.stops)
                    if row.reason is not None:
                        yield row
            alive = [place for place, row in enumerate(rows) if row.reason is None]
            if not alive:
                return
            sees = torch.cat((sees, sees.new_ones(len(rows), 1)), dim=1)
            if 2 * len(alive) <= len(rows):
                kept = torch.tensor(alive, device=device)
                rows, tokens, sees, sampler = [rows[place] for place in alive], tokens[kept], sees[kept], None
                cache.batch_select_indices(kept)
            logits = self.network(input_ids=tokens[:, None], attention_mask=sees, position_ids=sees.sum(1, keepdim=True) - 1, past_key_values=cache,
                                  use_cache=True).logits[:, -1]


class Row:
    """One completion in flight. `reason` says why it ended."""

    def __init__(self, request, index, sample, context):
        self.request, self.index, self.sample, self.key = request, index, sample, stream_key(request.seed, sample)
        self.limit, self.tokens, self.logprobs, self.reason = min(request.max_new_tokens, context - len(request.tokens)), [], [], None

    def add(self, token, logprob, stops):
        self.tokens.append(token)
        self.logprobs.append(logprob)
        self.reason = "stop" if token in stops or token in self.request.stop_ids else "length" if len(self.tokens) >= self.limit else None

    def completion(self, tokenizer):
        words = self.tokens[:-1] if self.reason == "stop" else self.tokens
        return Completion(self.tokens, [1] * len(self.tokens), self.logprobs, self.reason, tokenizer.decode(words))


def cast_weights(module, dtype):
    """The module with frozen weights of a dtype. Its buffers stay: rotary frequencies do not survive bfloat16."""
    for weight in module.parameters():
        weight.data = weight.data.to(dtype)
    return module.requires_grad_(False)
