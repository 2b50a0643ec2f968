"""Keys and values already computed, so that each new token costs one position instead of all of them.

`KVCache` holds one row per completion in flight, each with its own length. The rows in use are always the first ones: a row
that leaves is filled by the last, so a step costs what the rows in use cost. `Prefill` computes the prompts that enter.
Both are handed to `GPT.hidden(inputs, kv_cache)`, which calls positions, attend and advance; no other file knows the layout.
"""
import numpy as np
import torch
import torch.nn.functional as F

from nanochat.flash_attention import attend as causal_attend

STEP = 64  # capacities are multiples of this many positions


class Prefill:
    """One pass over right-padded prompts (B, T). Padding stands behind every real token, so causal attention never sees it."""

    def __init__(self, n_layer, device):
        self.keys, self.values, self.device = [None] * n_layer, [None] * n_layer, device

    def positions(self, T):
        return torch.arange(T, device=self.device)[None]  # (1, T) serves all rows

    def attend(self, layer, q, k, v):
        self.keys[layer], self.values[layer] = k, v
        return causal_attend(q, k, v, causal=True)

    def advance(self, T):
        pass

    def row(self, index):
        """A Prefill of one prompt alone, which does not keep the others' memory alive."""
        alone = Prefill(len(self.keys), self.device)
        alone.keys = [keys[index:index + 1].clone() for keys in self.keys]
        alone.values = [values[index:index + 1].clone() for values in self.values]
        return alone


class KVCache:
    """Rows 0 .. n_rows-1 are in use, `lengths[row]` positions of each. Memory grows in steps and stays until `release()`."""

    def __init__(self, config, dtype, device):
        self.config, self.device = config, torch.device(device)
        # A CPU has no bfloat16 attention for single queries worth the name: with the cache in float32 it is 3-8 times as
        # fast at 32 rows x 128 positions, and as fast where memory is the limit (dev/bench/decode.py).
        self.dtype = torch.float32 if self.device.type == "cpu" else dtype
        self.release()

    @torch.inference_mode()
    def release(self):
        """Forget every row and give the memory back."""
        self.n_rows, self.lengths = 0, np.zeros(0, dtype=np.int64)
        self.allocate(0, 0)

    @property
    def memory_bytes(self):
        return self.store.numel() * self.store.element_size()

    def allocate(self, rows, positions):
        """Make room for (rows, positions), keeping what the rows in use hold."""
        config, device = self.config, self.device
        shape = (2, config.n_layer, rows, positions, config.n_kv_head, config.n_embd // config.n_head)
        store = torch.zeros(shape, dtype=self.dtype, device=device)  # zeros: weight 0 times garbage could be NaN
        if self.n_rows:
            reach = int(self.lengths[:self.n_rows].max())
            store[:, :, :self.n_rows, :reach] = self.store[:, :, :self.n_rows, :reach]
        self.store, self.row_capacity, self.position_capacity = store, rows, positions
        self.lengths = np.concatenate([self.lengths, np.zeros(max(rows - len(self.lengths), 0), dtype=np.int64)])
        self.key_positions = torch.arange(positions, device=device)
        self.flat = store.view(2, config.n_layer, rows * positions, shape[-2] * shape[-1])  # writing: one line per position
        self.step = None

    def reserve(self, rows, positions):
        """Grow, by half or more at once, until (rows, positions) fit."""
        if rows > self.row_capacity:
            self.allocate(max(rows, 3 * self.row_capacity // 2), self.position_capacity)
        if positions > self.position_capacity:
            wanted = max(positions, min(3 * self.position_capacity // 2, self.config.sequence_len))
            self.allocate(self.row_capacity, -(-wanted // STEP) * STEP)

    @torch.inference_mode()
    def add(self, prefill, sources, lengths):
        """New rows at the end: row i copies the first lengths[i] positions of the prefill's row sources[i]."""
        first, last, T = self.n_rows, self.n_rows + len(sources), max(lengths)
        self.reserve(last, T)
        index = torch.tensor(sources, device=self.device)
        for half, parts in zip(self.store, (prefill.keys, prefill.values)):
            for layer, part in zip(half, parts):
                layer[first:last, :T] = part[index, :T]
        self.lengths[first:last] = lengths
        self.n_rows = last

    @torch.inference_mode()
    def remove(self, row):
        """Free a row: the last row moves into its place."""
        self.n_rows -= 1
        if row != self.n_rows:
            length = self.lengths[row] = self.lengths[self.n_rows]
            self.store[:, :, row, :length] = self.store[:, :, self.n_rows, :length]

    # ------------------------------------------------------------ what GPT.hidden calls

    def positions(self, T):
        """The (B, T) positions of the T tokens each row is about to be fed. Mask and places are made once, for all layers."""
        lengths = self.lengths[:self.n_rows]
        reach = int(lengths.max()) + T
        self.reserve(self.n_rows, reach)
        positions = torch.from_numpy(lengths[:, None] + np.arange(T)).to(self.device, non_blocking=True)
        rows = self.key_positions.new_tensor(np.arange(self.n_rows)[:, None] * self.position_capacity)
        mask = None
        if T > 1 or (lengths != lengths[0]).any():
            reach = min(-(-reach // 8) * 8, self.position_capacity)  # CUDA wants masks in multiples of 8
            hidden = self.key_positions[:reach] > positions[:, :, None]  # (B, T, reach)
            group = self.config.n_head // self.config.n_kv_head
            mask = torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, -torch.inf)
            mask = mask[:, None].repeat(1, 1, group, 1)  # (B, 1, G * T, reach)
        self.step = (rows + positions).view(-1), reach, mask
        return positions

    def attend(self, layer, q, k, v):
        """q (B, T, H, D), k and v (B, T, Hkv, D) of the new tokens -> (B, T, H, D): attention to all of the row so far."""
        B, T, H, D = q.size()
        Hkv = k.size(2)
        places, reach, mask = self.step
        self.flat[0][layer].index_copy_(0, places, k.reshape(B * T, Hkv * D).to(self.dtype))
        self.flat[1][layer].index_copy_(0, places, v.reshape(B * T, Hkv * D).to(self.dtype))
        keys = self.store[0, layer, :B, :reach].transpose(1, 2)  # (B, Hkv, reach, D)
        values = self.store[1, layer, :B, :reach].transpose(1, 2)
        # The H / Hkv query heads that share a key head stand where the queries' time stands: nothing is repeated.
        q = q.view(B, T, Hkv, H // Hkv, D).permute(0, 2, 3, 1, 4).reshape(B, Hkv, H // Hkv * T, D).to(self.dtype)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask)
        y = y.view(B, Hkv, H // Hkv, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
        return y.to(k.dtype)

    def advance(self, T):
        self.lengths[:self.n_rows] += T
