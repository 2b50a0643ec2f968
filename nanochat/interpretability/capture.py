"""Record queries, keys and the residual stream of forward passes through hooks. The model computes what it computes without them.

    with Capture(model, layers=[0, 3]) as seen:
        model.hidden(inputs)
    weights = seen.attention(3)               # (B, H, T, T)

Fused attention never shows its weights, so they are computed again, one layer at a time and only when asked for, from the
captured outputs of c_q and c_k and the rotary positions that the attention was given.
"""
import math

import torch

from nanochat.gpt import norm, rotate


class Capture:
    """A context: `q[layer]` (B, T, H, D) and `k[layer]` (B, T, Hkv, D) after rotation and QK-norm, for the chosen layers (None = all);
    `residual` [(B, T, C)] the stream that enters block 0, then after each block, if asked for. The last pass inside the
    context is kept, with the mask of packed documents if it had one. Whole sequences only: a pass with a KV cache is refused."""

    def __init__(self, model, layers=None, queries_and_keys=True, residual=False):
        self.model, self.layers = model, chosen(layers, model.config.n_layer)
        self.queries_and_keys, self.keeps_residual = queries_and_keys, residual
        self.q, self.k, self.mask, self.residual, self.handles = {}, {}, None, [], []

    def __enter__(self):
        blocks = self.model.transformer.h
        if self.queries_and_keys:
            for layer in self.layers:
                attn, raw = blocks[layer].attn, {}
                self.handles += [attn.c_q.register_forward_hook(self.keep_in(raw, "q")), attn.c_k.register_forward_hook(self.keep_in(raw, "k")),
                                 attn.register_forward_hook(self.keep_heads(layer, raw))]
        if self.keeps_residual:
            self.handles.append(blocks[0].register_forward_pre_hook(self.start_residual))
            self.handles += [block.register_forward_hook(self.add_residual) for block in blocks]
        # torch.compile traces hooks away, so a compiled model is watched while it runs eagerly
        self.was_compiled, self.model.compiled = self.model.compiled, False
        return self

    def __exit__(self, *exception):
        for handle in self.handles:
            handle.remove()
        self.handles, self.model.compiled = [], self.was_compiled

    # Hooks return nothing, which leaves a module's output as it is.

    def keep_in(self, raw, name):
        def hook(module, arguments, output):
            raw[name] = output.detach()
        return hook

    def keep_heads(self, layer, raw):
        def hook(attn, arguments, output):
            _, cos, sin, kv_cache, self.mask = arguments
            if kv_cache is not None:
                raise ValueError(f"layer {layer} ran on {raw['q'].size(1)} tokens with a KV cache, whose earlier keys no hook sees: "
                                 "capture a pass over the whole sequence")
            B, T, _ = raw["q"].size()
            self.q[layer] = norm(rotate(raw["q"].view(B, T, attn.n_head, attn.head_dim), cos, sin))
            self.k[layer] = norm(rotate(raw["k"].view(B, T, attn.n_kv_head, attn.head_dim), cos, sin))
            raw.clear()
        return hook

    def start_residual(self, block, arguments):
        self.residual = [arguments[0].detach()]

    def add_residual(self, block, arguments, output):
        self.residual.append(output.detach())

    @torch.no_grad()
    def attention(self, layer, first_query=0):
        """-> (B, H, T - first_query, T) float32: how each query from `first_query` on spreads its attention over the keys."""
        if layer not in self.q:
            raise ValueError(f"layer {layer} was not captured, only {sorted(self.q) or 'none'}: name it in Capture(layers=...) "
                             "and run the model inside the context")
        q, k = self.q[layer][:, first_query:].float(), self.k[layer].float()
        k = k.repeat_interleave(q.size(2) // k.size(2), dim=2)  # grouped-query attention: each key head serves several query heads
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(q.size(-1))
        T = k.size(1)
        visible = torch.ones(1, T, T, dtype=torch.bool, device=q.device).tril() if self.mask is None else self.mask
        return torch.softmax(scores.masked_fill(~visible[:, None, first_query:], float("-inf")), dim=-1)


def chosen(layers, n_layer):
    """Layer numbers, -1 being the last, or None for all -> the numbers from 0 on."""
    for layer in layers or ():
        if not -n_layer <= layer < n_layer:
            raise ValueError(f"layer {layer} does not exist: the model has {n_layer}, so name 0 to {n_layer - 1} (or -1 for the last)")
    return list(range(n_layer)) if layers is None else [layer % n_layer for layer in layers]
