"""Keys and values already computed, so that each new token costs one position instead of all of them.

`KVCache` holds one row per completion in flight, each with its own length. The rows in use are always the first ones: a row
that leaves is filled by the last, so a step costs what the rows in use cost. `Prefill` computes the prompts that enter.
Both are handed to `GPT.hidden(inputs, kv_cache)`, which calls positions, attend and advance, or to CpuDecoder, which asks for the new tokens'
places and the memory's addresses instead; no other file knows the layout.
"""
import numpy as np
import torch
import torch.nn.functional as F

from nanochat.flash_attention import attend as causal_attend

STEP = 64  # capacities are multiples of this many positions


class Prefill:
    """One pass over right-padded prompts (B, T). Padding stands behind every real token, so causal attention never sees it.

    With `past`, a Prefill of one row, the ids are one prompt's tokens after the first `reused` of that row. `lengths` (B,): the ids that are
    no padding, where that is known."""

    def __init__(self, config, device, past=None, reused=0, lengths=None):
        self.keys, self.values, self.config, self.device = [None] * config.n_layer, [None] * config.n_layer, config, device
        self.past, self.reused, self.lengths = past, reused, lengths

    def positions(self, T):
        self.mask = None if self.past is None else torch.ones(1, T, self.reused + T, dtype=torch.bool, device=self.device).tril_(self.reused)
        return torch.arange(self.reused, self.reused + T, device=self.device)[None]  # (1, T) serves all rows

    def attend(self, layer, q, k, v):
        if self.past is not None:
            k = torch.cat((self.past.keys[layer][:, :self.reused].to(k.dtype), k), dim=1)
            v = torch.cat((self.past.values[layer][:, :self.reused].to(v.dtype), v), dim=1)
        self.keys[layer], self.values[layer] = k, v
        return causal_attend(q, k, v, self.mask, causal=self.past is None)

    def advance(self, T):
        pass

    def fed_tokens(self, B, T):
        """-> the (row, position) of every token as two lists, and which of (B, T) ids they are. Makes room for them."""
        config, lengths = self.config, [T] * B if self.lengths is None else self.lengths
        shape = B, self.reused + T, config.n_kv_head, config.n_embd // config.n_head
        for part, old in ((self.keys, self.past and self.past.keys), (self.values, self.past and self.past.values)):
            for layer in range(config.n_layer):
                part[layer] = torch.zeros(shape)  # padding is copied with the rest, and 0 times garbage could be NaN
                if self.past is not None:
                    part[layer][:, :self.reused] = old[layer][:, :self.reused]
        rows = [row for row, length in enumerate(lengths) for _ in range(length)]
        positions = [position for length in lengths for position in range(self.reused, self.reused + length)]
        return rows, positions, torch.arange(T) < torch.tensor(lengths)[:, None]

    def addresses(self):
        B, T, Hkv, D = self.keys[0].size()
        return [part.data_ptr() for part in self.keys], [part.data_ptr() for part in self.values], (T * Hkv * D, D, Hkv * D), (B, T)

    def row(self, index):
        """A Prefill of one prompt alone, which does not keep the others' memory alive."""
        alone = Prefill(self.config, self.device)
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
        self.zero, self.minus_infinity = (torch.tensor(value, dtype=self.dtype, device=self.device) for value in (0.0, -torch.inf))
        self.keys = self.values = ()
        self.release()

    @torch.inference_mode()
    def release(self):
        """Forget every row and give the memory back."""
        self.n_rows, self.lengths = 0, np.zeros(0, dtype=np.int64)
        self.allocate(0, 0)

    @property
    def memory_bytes(self):
        return sum(part.numel() * part.element_size() for part in (*self.keys, *self.values))

    def allocate(self, rows, positions):
        """Make room for (rows, positions), keeping what the rows in use hold. keys and values: (rows, Hkv, positions, D) for each layer."""
        config = self.config
        shape = rows, config.n_kv_head, positions, config.n_embd // config.n_head
        n, reach = self.n_rows, int(self.lengths[:self.n_rows].max(initial=0))

        def moved(half):
            parts = [torch.zeros(shape, dtype=self.dtype, device=self.device) for _ in range(config.n_layer)]  # zeros: 0 times garbage could be NaN
            for part, old in zip(parts, half):
                part[:n, :, :reach] = old[:n, :, :reach]
            return parts
        self.keys, self.values = moved(self.keys), moved(self.values)
        self.key_addresses, self.value_addresses = ([part.data_ptr() for part in half] for half in (self.keys, self.values))
        self.row_capacity, self.position_capacity = rows, positions
        self.lengths = np.concatenate([self.lengths, np.zeros(max(rows - len(self.lengths), 0), dtype=np.int64)])
        self.key_positions = torch.arange(positions, device=self.device)

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
        for mine, part in zip((*self.keys, *self.values), (*prefill.keys, *prefill.values)):
            mine[first:last, :, :T] = part[index, :T].transpose(1, 2)
        self.lengths[first:last] = lengths
        self.n_rows = last

    @torch.inference_mode()
    def row(self, row):
        """A copy of what a row holds, as a Prefill of one prompt."""
        alone, length = Prefill(self.config, self.device), int(self.lengths[row])
        alone.keys, alone.values = ([part[row:row + 1, :, :length].transpose(1, 2).clone() for part in half] for half in (self.keys, self.values))
        return alone

    @torch.inference_mode()
    def remove(self, row):
        """Free a row: the last row moves into its place."""
        self.n_rows -= 1
        if row != self.n_rows:
            length = self.lengths[row] = self.lengths[self.n_rows]
            for part in (*self.keys, *self.values):
                part[row, :, :length] = part[self.n_rows, :, :length]

    # ------------------------------------------------------------ what GPT.hidden calls

    def positions(self, T):
        """The (B, T) positions of the T tokens each row is about to be fed."""
        lengths = self.lengths[:self.n_rows]
        self.reach = int(lengths.max()) + T  # how far the longest row goes
        self.reserve(self.n_rows, self.reach)
        self.fed = torch.from_numpy(lengths[:, None] + np.arange(T)).to(self.device, non_blocking=True)
        self.is_even, self.places = T == 1 and bool((lengths == lengths[0]).all()), None
        return self.fed

    def prepare(self):
        """Once for all layers: the lines (B * T * Hkv,) where new keys go, and what each query may not see, (B, 1, G * T, reach) or None."""
        Hkv = self.config.n_kv_head
        lines = torch.arange(self.n_rows * Hkv, device=self.device).view(-1, 1, Hkv) * self.position_capacity
        self.places, self.mask = (lines + self.fed[:, :, None]).view(-1), None
        if not self.is_even:
            self.reach = min(-(-self.reach // 8) * 8, self.position_capacity)  # CUDA wants masks in multiples of 8
            mask = torch.where(self.key_positions[:self.reach] > self.fed[:, :, None], self.minus_infinity, self.zero)  # (B, T, reach)
            self.mask = mask[:, None].repeat(1, 1, self.config.n_head // Hkv, 1)

    def attend(self, layer, q, k, v):
        """q (B, T, H, D), k and v (B, T, Hkv, D) of the new tokens -> (B, T, H, D): attention to all of the row so far."""
        B, T, H, D = q.size()
        Hkv = k.size(2)
        if self.places is None:
            self.prepare()
        for part, new in ((self.keys[layer], k), (self.values[layer], v)):
            part.view(-1, D).index_copy_(0, self.places, new.reshape(B * T * Hkv, D).to(self.dtype))
        keys, values = self.keys[layer][:B, :, :self.reach], self.values[layer][:B, :, :self.reach]
        # The H / Hkv query heads that share a key head stand where the queries' time stands: nothing is repeated.
        q = q.view(B, T, Hkv, H // Hkv, D).permute(0, 2, 3, 1, 4).reshape(B, Hkv, H // Hkv * T, D).to(self.dtype)
        y = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.mask)
        y = y.view(B, Hkv, H // Hkv, T, D).permute(0, 3, 1, 2, 4).reshape(B, T, H, D)
        return y.to(k.dtype)

    def advance(self, T):
        self.lengths[:self.n_rows] += T

    # ------------------------------------------------------------ what CpuDecoder calls instead of positions and attend

    def fed_tokens(self, B, T):
        """-> the (row, position) of every one of the T tokens each row is about to be fed, as two lists; all ids are real."""
        fed = self.lengths[:B, None] + np.arange(T)
        self.reserve(B, int(fed.max()) + 1)
        return np.arange(B).repeat(T).tolist(), fed.ravel().tolist(), None

    def addresses(self):
        """Addresses of the keys and the values by layer; strides of (row, head, position); (rows, positions) that there is room for."""
        D, positions = self.config.n_embd // self.config.n_head, self.position_capacity
        return self.key_addresses, self.value_addresses, (self.config.n_kv_head * positions * D, positions * D, D), (self.row_capacity, positions)
