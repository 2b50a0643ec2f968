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
    ranks: torch.Tensor        # (N, L + 1, letters) int64: tokens of the whole vocabulary ahead of each letter
    appears: torch.Tensor      # (N,) int64: the depth from which on the right letter is the best letter; -1 = not even at the end
    settles: torch.Tensor      # (N,) int64: the depth from which on the final letter is the best letter

    @property
    def right(self):
        """(N,) places of the right letters."""
        return torch.tensor([self.letters.index(answer) for answer in self.answers])

    @property
    def final(self):
        """(N,) places of the letters that the whole model puts first."""
        return self.probs[:, -1].argmax(dim=-1)

    def of(self, letter, values):
        """`values` (N, L + 1, letters) at one letter of each point, `letter` (N,) -> (N, L + 1)."""
        return values[torch.arange(len(letter)), :, letter]


@torch.no_grad()
def logit_lens(model, sequences, positions, letters, letter_ids, answers, device_batch_size=8):
    """Sequences of ids, in each the position that predicts the letter, the letters with their token ids, the right letter of each
    sequence -> Lens."""
    if not len(sequences) == len(positions) == len(answers) > 0:
        raise ValueError(f"{len(sequences)} sequences, {len(positions)} positions and {len(answers)} answers: give one of each per decision point")
    unknown = sorted(set(answers) - set(letters))
    if unknown:
        raise ValueError(f"the right letters {unknown} are not among the {len(letters)} letters {''.join(letters)}: leave those sequences out")
    parts = [lens_rows(model, sequences[i:i + device_batch_size], positions[i:i + device_batch_size], letter_ids)
             for i in range(0, len(sequences), device_batch_size)]
    probs, mass, ranks = (torch.cat(part) for part in zip(*parts))
    best, right = probs.argmax(dim=-1), torch.tensor([list(letters).index(answer) for answer in answers])
    return Lens(list(letters), list(answers), probs, mass, ranks, leads_from(best == right[:, None]), leads_from(best == best[:, -1:]))


def leads_from(is_best):
    """(N, L + 1) bool -> (N,) the depth from which on it is True without a gap; -1 where it is not True at the end."""
    held = is_best.flip(1).long().cumprod(dim=1).sum(dim=1)  # depths, counted from the end
    return torch.where(held > 0, is_best.size(1) - held, -1)


def lens_rows(model, sequences, positions, letter_ids):
    T = max(positions) + 1  # causal: what follows the decision point changes nothing
    inputs = torch.tensor([(row + [0] * T)[:T] for row in sequences], device=model.device)
    with Capture(model, queries_and_keys=False, residual=True) as seen:
        model.hidden(inputs)
    rows = torch.arange(len(sequences), device=model.device)
    stream = torch.stack([residual[rows, torch.tensor(positions, device=model.device)] for residual in seen.residual], dim=1)  # (n, L + 1, C)
    probs, mass, ranks = [], [], []
    for depth in stream.unbind(1):  # one depth at a time: n * V numbers
        logits = model.logits(norm(depth))
        of_letters = logits[:, letter_ids]
        probs.append(torch.softmax(of_letters, dim=-1))
        mass.append(torch.softmax(logits, dim=-1)[:, letter_ids].sum(dim=-1))
        ranks.append(torch.stack([(logits > one[:, None]).sum(dim=-1) for one in of_letters.unbind(1)], dim=-1))
    return tuple(torch.stack(part, dim=1).cpu() for part in (probs, mass, ranks))


# ---------------------------------------------------------------------------------------------------------------------
# Numbers

def lens_metrics(lens):
    """-> metrics: over the decision points, at each depth the mean probability of the right and of the final letter among the letters, the
    share whose best letter is right, and the median rank of the right letter in the vocabulary; and the share of points where the right
    letter is found at the end, with the median depth at which it appears there."""
    best = lens.probs.argmax(dim=-1)
    metrics = {"lens/found_share": (lens.appears >= 0).double().mean().item(), "lens/settles_median": lens.settles.double().median().item()}
    if (lens.appears >= 0).any():
        metrics["lens/appears_median"] = lens.appears[lens.appears >= 0].double().median().item()
    of_right, of_final, ranks = lens.of(lens.right, lens.probs), lens.of(lens.final, lens.probs), lens.of(lens.right, lens.ranks)
    for depth in range(lens.probs.size(1)):
        metrics[f"lens/layer_{depth}/prob_right"] = of_right[:, depth].double().mean().item()
        metrics[f"lens/layer_{depth}/prob_final"] = of_final[:, depth].double().mean().item()
        metrics[f"lens/layer_{depth}/share_right"] = (best[:, depth] == lens.right).double().mean().item()
        metrics[f"lens/layer_{depth}/rank_right"] = ranks[:, depth].double().median().item()
    return metrics


def lens_of_rollouts(model, rollouts, conversations, decision_point, letter_ids, device_batch_size=8):
    """Rollouts with `prompt` and `tokens`, the conversation of each, and {letter: token id} -> lens_metrics, for a training log; {} where no
    rollout reached a decision point. `decision_point(rollout)` is the place of the letter's token in its completion, or None."""
    points = [(rollout, conversation["answer_letter"], place) for rollout, conversation in zip(rollouts, conversations)
              if conversation.get("answer_letter") in letter_ids and (place := decision_point(rollout)) is not None]
    if not points:
        return {}
    sequences, positions = zip(*((rollout.prompt + rollout.tokens, len(rollout.prompt) - 1 + place) for rollout, _, place in points))
    return lens_metrics(logit_lens(model, sequences, positions, list(letter_ids), list(letter_ids.values()), [answer for _, answer, _ in points], device_batch_size))


LENS_HEAD = ("blocks passed", "right letter leads", "p(right)", "p(final)", "tokens ahead of right", "of final", "letters' mass", "right appears", "final settles")


def lens_rows_of_table(lens):
    """-> rows of texts under LENS_HEAD, one per depth: p is among the letters, the tokens ahead are counted over the whole vocabulary (median)."""
    metrics, final_ranks, rows = lens_metrics(lens), lens.of(lens.final, lens.ranks), []
    for depth in range(lens.probs.size(1)):
        of_depth = {name: metrics[f"lens/layer_{depth}/{name}"] for name in ("share_right", "prob_right", "prob_final", "rank_right")}
        rows.append((str(depth), f"{of_depth['share_right']:.0%}", f"{of_depth['prob_right']:.3f}", f"{of_depth['prob_final']:.3f}", f"{of_depth['rank_right']:.0f}",
                     f"{final_ranks[:, depth].double().median():.0f}", f"{lens.mass[:, depth].mean():.3f}", str(int((lens.appears == depth).sum())),
                     str(int((lens.settles == depth).sum()))))
    return rows


def lens_verdict(lens):
    """One sentence: where the letter appears."""
    N, L, found = len(lens.answers), lens.probs.size(1) - 1, lens.appears >= 0
    if not found.any():
        return f"The right letter leads at none of the {N} decision points, at no depth"
    depth = int(lens.appears[found].median())
    where = "already before the first block" if depth == 0 else f"after block {depth} of {L}"
    return f"The right letter leads in the end at {int(found.sum())} of {N} decision points; the median of them has it for good {where}"
