"""Read the residual stream between the blocks as if it were the last one: at which layer does the answer's letter appear?

The logit lens (nostalgebraist 2020, lesswrong.com/posts/AcKRB8wDpdaN6v6ru): the model's own last norm and head, applied early. A
letter that appears at layer 3 of 8 was decided there only in the sense that the head can already read it.
"""
from dataclasses import dataclass

import torch

from nanochat.gpt import norm
from nanochat.interpretability.capture import Capture


@dataclass(frozen=True)
class Lens:
    """N decision points, L + 1 depths: 0 is before the first block, l after l blocks."""
    letters: list[str]
    answers: list[str]         # the right letter of each
    probs: torch.Tensor        # (N, L + 1, letters), renormalised over the letters
    mass: torch.Tensor         # (N, L + 1): the letters' probability in the whole vocabulary
    rank: torch.Tensor         # (N, L + 1) int64: tokens of the whole vocabulary ahead of the right letter
    appears: torch.Tensor      # (N,) int64: the depth from which on the right letter is the best letter; -1 = not even at the end


@torch.no_grad()
def logit_lens(model, sequences, positions, letters, letter_ids, answers, device_batch_size=8):
    """Sequences of ids, in each the position that predicts the letter, the letters with their token ids, the right letter of each
    sequence -> Lens."""
    if not len(sequences) == len(positions) == len(answers) > 0:
        raise ValueError(f"{len(sequences)} sequences, {len(positions)} positions and {len(answers)} answers: give one of each per decision point")
    unknown = sorted(set(answers) - set(letters))
    if unknown:
        raise ValueError(f"the right letters {unknown} are not among the {len(letters)} letters {''.join(letters)}: leave those sequences out")
    right = torch.tensor([list(letters).index(answer) for answer in answers])
    parts = [lens_rows(model, sequences[i:i + device_batch_size], positions[i:i + device_batch_size], letter_ids, right[i:i + device_batch_size])
             for i in range(0, len(sequences), device_batch_size)]
    probs, mass, rank = (torch.cat(part) for part in zip(*parts))
    is_best = probs.argmax(dim=-1) == right[:, None]  # (N, L + 1)
    held = is_best.flip(1).long().cumprod(dim=1).sum(dim=1)  # depths, counted from the end, at which it is best without a gap
    appears = torch.where(held > 0, is_best.size(1) - held, -1)
    return Lens(list(letters), list(answers), probs, mass, rank, appears)


def lens_rows(model, sequences, positions, letter_ids, right):
    T = max(positions) + 1  # causal: what follows the decision point changes nothing
    inputs = torch.tensor([(row + [0] * T)[:T] for row in sequences], device=model.device)
    with Capture(model, queries_and_keys=False, residual=True) as seen:
        model.hidden(inputs)
    rows = torch.arange(len(sequences), device=model.device)
    stream = torch.stack([residual[rows, torch.tensor(positions, device=model.device)] for residual in seen.residual], dim=1)  # (n, L + 1, C)
    logits = torch.stack([model.logits(norm(depth)).cpu() for depth in stream.unbind(1)], dim=1)  # (n, L + 1, V)
    of_letters = logits[:, :, letter_ids]
    right_logit = of_letters.gather(2, right[:, None, None].expand(-1, logits.size(1), 1))
    probs = torch.softmax(of_letters, dim=-1)
    mass = torch.softmax(logits, dim=-1)[:, :, letter_ids].sum(dim=-1)
    return probs, mass, (logits > right_logit).sum(dim=-1)


def lens_metrics(lens):
    """-> metrics: over the decision points, at each depth the share whose best letter is right, the mean probability of the right
    letter, and the median depth at which it appears (of those where it does)."""
    right = torch.tensor([lens.letters.index(answer) for answer in lens.answers])
    is_best, of_right = lens.probs.argmax(dim=-1) == right[:, None], lens.probs[torch.arange(len(right)), :, right]
    metrics = {"lens/found_share": (lens.appears >= 0).double().mean().item()}
    if (lens.appears >= 0).any():
        metrics["lens/appears_median"] = lens.appears[lens.appears >= 0].double().median().item()
    for depth in range(lens.probs.size(1)):
        metrics[f"lens/right_share_layer/{depth}"] = is_best[:, depth].double().mean().item()
        metrics[f"lens/right_prob_layer/{depth}"] = of_right[:, depth].double().mean().item()
    return metrics


def lens_table(lens):
    """-> a plain-text table, one line per depth: how often the right letter is the best one, its probability among the letters, the
    letters' share of the vocabulary, the median rank of the right letter, and at how many points it appears there."""
    metrics, N = lens_metrics(lens), len(lens.answers)
    lines = [f"{N} decision points", "depth  right  p(right)  letter mass  median rank  appears"]
    for depth in range(lens.probs.size(1)):
        lines.append(f"{depth:5d}  {metrics[f'lens/right_share_layer/{depth}']:5.0%}  {metrics[f'lens/right_prob_layer/{depth}']:8.3f}  "
                     f"{lens.mass[:, depth].mean():11.3f}  {int(lens.rank[:, depth].median()):11d}  {int((lens.appears == depth).sum()):7d}")
    return "\n".join([*lines, f"never at {int((lens.appears < 0).sum())} of {N}"])
