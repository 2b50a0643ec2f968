"""Scaled dot-product attention behind one function of (B, T, H, D). PyTorch picks the Flash kernel where there is one."""
import torch
import torch.nn.functional as F


def attend(q, k, v, mask=None, causal=False):
    """q (B, Tq, H, D), k and v (B, Tk, Hkv, D) -> (B, Tq, H, D). mask (B, Tq, Tk) is True where a query may look.

    Hkv divides H: each key head serves H / Hkv query heads (grouped-query attention, arXiv 2305.13245).
    """
    H, Hkv = q.size(2), k.size(2)
    if Hkv != H:  # repeated by hand: the CPU's Flash kernel has no grouped form
        k, v = k.repeat_interleave(H // Hkv, dim=2), v.repeat_interleave(H // Hkv, dim=2)
    dtype = q.dtype
    if dtype == torch.bfloat16 and q.device.type == "cpu" and q.size(3) < 64 and torch.is_grad_enabled():
        q, k, v = q.float(), k.float(), v.float()  # narrow heads: the CPU's backward pass is 1.2 to 2 times as fast (dev/LOG.md)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, T, D), as PyTorch wants it
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=None if mask is None else mask[:, None], is_causal=causal)
    return y.transpose(1, 2).to(dtype)
