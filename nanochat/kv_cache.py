"""Keys and values already computed, so that each new token costs one position instead of all of them.

`KVCache` holds one row per completion in flight, each with its own length. The rows in use are always the first ones: a row
that leaves is filled by the last, so a step costs what the rows in use cost. `Prefill` computes the prompts that enter.
Both are handed to `GPT.hidden(inputs, kv_cache)`, which calls positions, attend and advance, or to CpuDecoder, which asks for places instead:
the new tokens' and the memory's addresses. No other file knows the layout.
"""
import numpy as np
import torch
import torch.nn.functional as F
from rustbpe import CpuTransformer

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

    def places(self, B, T, dtype):
        """-> which of (B, T) ids are real, and CpuTransformer's account of their places: (rows, positions, addresses of keys, of values, strides, room,
        no shared prompts). Makes room for them: one head's positions follow each other."""
        config, lengths = self.config, [T] * B if self.lengths is None else self.lengths
        Hkv, reach, D = config.n_kv_head, self.reused + T, config.n_embd // config.n_head
        for part, old in ((self.keys, self.past and self.past.keys), (self.values, self.past and self.past.values)):
            for layer in range(config.n_layer):
                part[layer] = torch.empty(B, Hkv, reach, D, dtype=dtype).transpose(1, 2)  # nobody reads the padding
                if self.past is not None:
                    part[layer][:, :self.reused] = old[layer][:, :self.reused]
        rows = [row for row, length in enumerate(lengths) for _ in range(length)]
        positions = [position for length in lengths for position in range(self.reused, self.reused + length)]
        is_real = torch.arange(T) < torch.tensor(lengths)[:, None]
        return is_real, (rows, positions, *addresses(self), (Hkv * reach * D, reach * D, D), (B, reach), [], [])

    def row(self, index):
        """A Prefill of one prompt alone, which does not keep the others' memory alive."""
        alone = Prefill(self.config, self.device)
        alone.keys, alone.values = ([by_head(part[index:index + 1]) for part in half] for half in (self.keys, self.values))
        return alone


def by_head(part):
    """(1, T, Hkv, D) -> a copy in which one head's positions follow each other."""
    return part.transpose(1, 2).clone(memory_format=torch.contiguous_format).transpose(1, 2)


def addresses(cache):
    """-> those of the keys and those of the values, by layer."""
    return [part.data_ptr() for part in cache.keys], [part.data_ptr() for part in cache.values]


class KVCache:
    """Rows 0 .. n_rows-1 are in use, `lengths[row]` positions of each, the first of them that memory is kept for `starts[row]` (0 here). Memory grows
    in steps and stays until `release()`."""

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
        self.n_rows, self.lengths, self.starts = 0, np.zeros(0, dtype=np.int64), np.zeros(0, dtype=np.int64)
        self.allocate(0, 0)

    @property
    def memory_bytes(self):
        return sum(part.numel() * part.element_size() for part in (*self.keys, *self.values))

    def allocate(self, rows, positions):
        """Make room for (rows, positions), keeping what the rows in use hold. keys and values: (rows, Hkv, positions, D) for each layer."""
        config = self.config
        shape = rows, config.n_kv_head, positions, config.n_embd // config.n_head
        n = self.n_rows
        reach = int((self.lengths - self.starts)[:n].max(initial=0))

        def moved(half):
            parts = [self.empty(shape) for _ in range(config.n_layer)]
            for part, old in zip(parts, half):
                part[:n, :, :reach] = old[:n, :, :reach]
            return parts
        self.keys, self.values = moved(self.keys), moved(self.values)
        self.row_capacity, self.position_capacity = rows, positions
        self.lengths, self.starts = (np.concatenate([part, np.zeros(max(rows - len(part), 0), dtype=np.int64)]) for part in (self.lengths, self.starts))
        self.key_positions = torch.arange(positions, device=self.device)

    def empty(self, shape):
        return torch.zeros(shape, dtype=self.dtype, device=self.device)  # zeros: 0 times garbage could be NaN

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
            self.lengths[row] = self.lengths[self.n_rows]
            kept = self.lengths[row] - self.starts[self.n_rows]
            for part in (*self.keys, *self.values):
                part[row, :, :kept] = part[self.n_rows, :, :kept]

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


class CpuKVCache(KVCache):
    """What CpuDecoder reads. Samples of one prompt read its keys and values from one place, which then stays in the processor's own memory (as in
    Hydragen, arXiv 2402.05099, where it is one product; here the reading is what costs); a row has memory of its own from its first sampled token."""

    def __init__(self, config, dtype, device):
        super().__init__(config, dtype, device)
        self.dtype = dtype  # the plain cache of a CPU is float32

    def empty(self, shape):
        part = torch.empty(shape, dtype=self.dtype)
        CpuTransformer.advise_huge_pages(part.data_ptr(), part.numel() * part.element_size())
        return part  # nobody reads what nobody has written

    def release(self):
        super().release()
        self.prompts, self.numbered = [], None  # by row: a Prefill of one prompt, or None where the row holds it all; the same for CpuTransformer

    @torch.inference_mode()
    def add(self, prefill, sources, lengths):
        """New rows at the end: row i begins as the first lengths[i] positions of the prefill's row sources[i]."""
        first, is_one = self.n_rows, len(prefill.keys[0]) == 1
        assert prefill.keys[0].dtype == self.dtype and prefill.keys[0].stride(1) == prefill.keys[0].size(3), "CpuTransformer reads one head's positions in a row"
        shared = {source: prefill if is_one else prefill.row(source) for source in set(sources) if is_one or sources.count(source) > 1}
        self.reserve(first + len(sources), max((length for source, length in zip(sources, lengths) if source not in shared), default=1))
        for row, (source, length) in enumerate(zip(sources, lengths), first):
            self.lengths[row], self.starts[row] = length, length if source in shared else 0
            if source not in shared:
                for mine, part in zip((*self.keys, *self.values), (*prefill.keys, *prefill.values)):
                    mine[row, :, :length] = part[source, :length].transpose(0, 1)
        self.prompts[first:] = [shared.get(source) for source in sources]
        self.n_rows, self.numbered = first + len(sources), None

    @torch.inference_mode()
    def row(self, row):
        alone, start, length = Prefill(self.config, self.device), int(self.starts[row]), int(self.lengths[row])
        alone.keys, alone.values = ([part[row:row + 1, :, :length - start].transpose(1, 2) for part in half] for half in (self.keys, self.values))
        if start:
            prompt = self.prompts[row]
            alone.keys, alone.values = ([torch.cat((shared[:, :start], part), dim=1) for shared, part in zip(shares, half)]
                                        for shares, half in ((prompt.keys, alone.keys), (prompt.values, alone.values)))
        return alone.row(0)

    @torch.inference_mode()
    def remove(self, row):
        last = self.n_rows - 1
        super().remove(row)
        self.prompts[row], self.starts[row], self.numbered = self.prompts[last], self.starts[last], None
        del self.prompts[last:]

    def places(self, B, T, dtype):
        """The same as Prefill's, for T more tokens of each row; they are all real (None)."""
        assert dtype == self.dtype
        fed = self.lengths[:B, None] + np.arange(T)
        self.reserve(B, int((fed[:, -1] - self.starts[:B]).max()) + 1)
        if self.numbered is None:
            starts = {prompt: int(start) for prompt, start in zip(self.prompts, self.starts) if prompt is not None}
            number_of = {prompt: number for number, prompt in enumerate(starts)}
            self.numbered = ([(*addresses(prompt), prompt.keys[0].stride(2), start) for prompt, start in starts.items()],
                             [number_of.get(prompt, -1) for prompt in self.prompts])
        D, positions = self.config.n_embd // self.config.n_head, self.position_capacity
        prompts, prompt_of = self.numbered
        prompt_of = np.repeat(prompt_of, T).tolist() if prompts else []
        return None, (np.arange(B).repeat(T).tolist(), fed.ravel().tolist(), *addresses(self), (self.config.n_kv_head * positions * D, positions * D, D),
                      (self.row_capacity, positions), prompts, prompt_of)
