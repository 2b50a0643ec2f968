"""Bits per byte: the loss in a unit that no vocabulary can flatter, since a larger one makes fewer but harder tokens."""
import math

import torch


@torch.no_grad()
def evaluate_bpb(model, batches, token_bytes, compute):
    """Bounded batches of this rank -> {"bpb", "loss" (nats per target), "tokens", "bytes"}, each over all ranks.

    `token_bytes` holds the UTF-8 bytes of every id. A target of 0 bytes (a special token) counts in the loss, not in the bits.
    """
    token_bytes = torch.as_tensor(token_bytes, dtype=torch.int64, device=compute.device)
    loss_sum, nats, num_tokens, num_bytes = 0.0, 0.0, 0, 0
    for inputs, targets in batches:
        losses = model(inputs, targets, loss_reduction="none").view(-1).float()
        targets = targets.reshape(-1)
        is_counted = targets >= 0
        sizes = torch.where(is_counted, token_bytes[targets.clamp(min=0)], 0)
        losses = torch.where(is_counted, losses, 0.0)
        loss_sum += losses.sum().item()
        nats += torch.where(sizes > 0, losses, 0.0).sum().item()
        num_tokens += int(is_counted.sum())
        num_bytes += int(sizes.sum())
    loss_sum, nats, num_tokens, num_bytes = (compute.sum(value) for value in (loss_sum, nats, num_tokens, num_bytes))
    if num_tokens == 0 or num_bytes == 0:
        raise ValueError(f"the batches hold {num_tokens} targets and {num_bytes} bytes, so there is no bits per byte: "
                         "check the validation data and that at least one batch is asked for")
    return {"bpb": nats / (math.log(2) * num_bytes), "loss": loss_sum / num_tokens, "tokens": num_tokens, "bytes": num_bytes}
