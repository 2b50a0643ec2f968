"""Learning rate and momentum as pure functions of the step: asked twice about step 7, they answer the same."""
import math


def warmup_warmdown(step, num_steps, warmup_frac=0.0, warmdown_frac=0.2, final_frac=0.0):
    """Factor on the learning rate: up linearly from 1/warmup, flat at 1, down linearly to `final_frac` at the last step."""
    warmup, warmdown = round(warmup_frac * num_steps), round(warmdown_frac * num_steps)
    if step < warmup:
        return (step + 1) / warmup
    if step >= num_steps - warmdown:
        left = (num_steps - step) / warmdown if warmdown else 0.0
        return final_frac + (1 - final_frac) * max(left, 0.0)
    return 1.0


def warmup(step, warmup_steps):
    """From 1/warmup_steps up to 1: an optimizer without a past takes its first steps almost at random, so they should be short."""
    return min(1.0, (step + 1) / warmup_steps) if warmup_steps > 0 else 1.0


def linear_decay(step, num_steps, final_frac=0.0):
    """From 1 at step 0 to `final_frac` at num_steps."""
    return 1.0 + (final_frac - 1.0) * min(step / num_steps, 1.0)


def cosine(step, num_steps, final_frac=0.0):
    """Half a cosine from 1 to `final_frac`."""
    return final_frac + (1 - final_frac) * 0.5 * (1 + math.cos(math.pi * min(step / num_steps, 1.0)))


def between(start, end, step, num_steps, kind="linear"):
    """From `start` at step 0 to `end` at num_steps, in a line or along half a cosine."""
    return end + (start - end) * {"linear": linear_decay, "cosine": cosine}[kind](step, num_steps)


def muon_momentum(step, warmup_steps=300):
    """0.85 -> 0.95 over the first steps: a young average should forget its first gradients sooner."""
    return 0.85 + 0.10 * min(step / warmup_steps, 1.0)
