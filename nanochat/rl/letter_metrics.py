"""How far the policy has moved from its reference, over whole completions and at the one token that decides the answer's letter.

The decision point is the position that predicts the token right behind a line "Answer:". Everything here is exact: the KL of two
distributions over the vocabulary, not an estimate from the token that was drawn. The vocabulary is walked in chunks, so that
memory does not grow with V * T. What the letters are worth is not judged here: the right one comes with the conversation.
"""
import re
from collections import Counter

import torch
import torch.nn.functional as F

from nanochat.rl.algorithm import kl_exact
from nanochat.rl.rollout import to_batch
from nanochat.vocab_loss import capped, chunks

ANSWER_LINE = re.compile(rb"[ \t]*answer:", re.IGNORECASE)
NOT_AN_OPTION = -1e9  # a logit without probability; not -inf, whose difference from itself is no number


def letter_metrics(model, reference, tokenizer, groups, conversations, compute, device_batch_size=8, temperature=1.0):
    """Groups of Rollouts on this rank and the conversation of each group -> metrics over all ranks.

    The conversation's "letters" are its options, "answer_letter" the right one; without letters only the sequence is measured.
    With `reference` None the KLs are left out. Two forward passes per rollout: call it at a cadence, or on some of the groups.
    """
    rollouts = [rollout for group in groups for rollout in group]
    of_rollouts = [conversation for group, conversation in zip(groups, conversations) for _ in group]
    measured = measure_rollouts(model, reference, tokenizer, rollouts, of_rollouts, device_batch_size, temperature)
    return summarize([one for rank in compute.gather_objects(measured) for one in rank])


def summarize(measured):
    """measure_rollouts' dicts -> metrics. Letter metrics are missing where no completion reached a decision point."""
    metrics, tokens = {}, sum(one["num_tokens"] for one in measured)
    if tokens:
        metrics["entropy"] = sum(one["entropy"] for one in measured) / tokens
        if "kl_sequence" in measured[0]:
            metrics["rl/kl_token_mean"] = metrics["kl"] = sum(one["kl_sequence"] for one in measured) / tokens
    asked = [one for one in measured if one["letters"]]
    decided = [one for one in asked if "margin" in one]
    for name, key, of in (("kl_sequence", "kl_sequence", measured), ("kl_letter", "kl_letter", decided), ("letter_margin", "margin", decided)):
        if of and key in of[0]:
            metrics[f"rl/{name}_mean"], metrics[f"rl/{name}_std"] = mean_and_std([one[key] for one in of])
    if asked:
        metrics["rl/no_decision_point"] = len(asked) - len(decided)
        confusion = Counter((one["answer"], one["written"] or "none") for one in asked)
        letters = sorted({letter for one in asked for letter in one["letters"]})
        for right in letters:
            for written in [*letters, "none"]:
                metrics[f"rl/letter_confusion/{right}_{written}"] = confusion[right, written]
    if decided:
        metrics["rl/letter_mass_mean"] = sum(one["mass"] for one in decided) / len(decided)
        metrics["rl/letter_prob_right_mean"] = sum(one["probs"].get(one["answer"], 0.0) for one in decided) / len(decided)
        for letter in letters:
            metrics[f"rl/letter_prob/{letter}"] = sum(one["probs"].get(letter, 0.0) for one in decided) / len(decided)
    return metrics


def mean_and_std(values):
    mean = sum(values) / len(values)
    return mean, (sum((value - mean) ** 2 for value in values) / len(values)) ** 0.5


# ---------------------------------------------------------------------------------------------------------------------
# Where the letter is decided

def letter_ids(tokenizer, letters):
    """["A", ...] -> the token id of each letter as it follows "Answer:". ValueError where a letter is not one token there."""
    stem, ids = tokenizer.encode("Answer:"), []
    for letter in letters:
        whole = tokenizer.encode(f"Answer: {letter}")
        if whole[:-1] != stem:
            raise ValueError(f"'Answer: {letter}' is {len(whole)} tokens, but it must be the {len(stem)} of 'Answer:' and one more for "
                             f"' {letter}': train the tokenizer on text with such answers (python -m scripts.tok_train)")
        ids.append(whole[-1])
    return ids


def decision_point(tokenizer, tokens, mask=None):
    """A completion -> the index of the token behind its last line "Answer:", whatever that token is; None if there is no such line
    or nothing was sampled behind it. The grammar's other forms, with the letter in bold, have no such point."""
    line, found = b"", None
    for index, token in enumerate(tokens):
        if ANSWER_LINE.fullmatch(line) and (mask is None or mask[index]):
            found = index
        line = (line + tokenizer.id_to_bytes(token)).rpartition(b"\n")[2]
    return found


# ---------------------------------------------------------------------------------------------------------------------
# What the two models say

@torch.no_grad()
def measure_rollouts(model, reference, tokenizer, rollouts, conversations, device_batch_size=8, temperature=1.0):
    """Rollouts and the conversation of each -> one dict per rollout, in their order:

        num_tokens, entropy (nats, summed over the sampled tokens), kl_sequence (likewise), letters, answer, written (the letter
        that was sampled, or None); and where there is a decision point: probs and ref_probs {letter: p, renormalised over the
        options}, mass (their probability in the whole vocabulary), best, margin (logit of the best less that of the second best)
        and kl_letter. Without a reference no key that needs it.
    """
    options = [conversation.get("letters") or [] for conversation in conversations]
    id_of = {letter: letter_ids(tokenizer, [letter])[0] for letter in sorted(set().union(*options))}
    letter_of = {token: letter for letter, token in id_of.items()}
    measured = []
    for rollout, conversation, letters in zip(rollouts, conversations, options):
        point = decision_point(tokenizer, rollout.tokens, rollout.mask) if letters else None
        written = None if point is None else letter_of.get(rollout.tokens[point])
        measured.append({"letters": letters, "answer": conversation.get("answer_letter"), "point": point,
                         "written": written if written in letters else None})
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].prompt) + len(rollouts[i].tokens))
    for start in range(0, len(order), device_batch_size):
        places = order[start:start + device_batch_size]
        batch = to_batch([rollouts[i] for i in places], tokenizer.bos_id, model.device, pad_multiple=16, context=model.config.sequence_len)
        wanted = batch.targets != -1
        hidden = model.hidden(batch.inputs)
        ref_hidden = None if reference is None else reference.hidden(batch.inputs)
        kl, entropy = token_kl(model, reference, hidden, ref_hidden, wanted, temperature)
        for row, i in enumerate(places):
            measured[i].update(num_tokens=int(wanted[row].sum()), entropy=entropy[row].sum().item())
            if reference is not None:
                measured[i]["kl_sequence"] = kl[row].sum().item()
        rows = [row for row, i in enumerate(places) if measured[i]["point"] is not None]
        if rows:
            chosen = [places[row] for row in rows]
            positions = [len(rollouts[i].prompt) - 1 + measured[i]["point"] for i in chosen]
            said = letters_at(model, reference, hidden[rows, positions], None if reference is None else ref_hidden[rows, positions],
                              [options[i] for i in chosen], id_of, temperature)
            for i, one in zip(chosen, said):
                measured[i].update(one)
    return measured


def token_kl(model, reference, hidden, ref_hidden, wanted, temperature=1.0):
    """hidden states (B, T, C) of both, wanted (B, T) -> KL(policy || reference) and the policy's entropy in nats, each (B, T)
    float64, 0 where not wanted. `reference` None: the KL is 0."""
    kl, entropy = (torch.zeros(wanted.shape, dtype=torch.float64, device=hidden.device) for _ in range(2))
    hidden, ref_hidden = hidden[wanted], None if reference is None else ref_hidden[wanted]
    weight = model.lm_head.weight.to(hidden.dtype)
    ref_weight = None if reference is None else reference.lm_head.weight.to(hidden.dtype)
    kls, entropies = (torch.zeros(hidden.size(0), dtype=torch.float64, device=hidden.device) for _ in range(2))
    for rows in chunks(hidden, weight.size(0)):
        logits = capped(F.linear(hidden[rows], weight)) / temperature
        logprobs = torch.log_softmax(logits, dim=-1)
        entropies[rows] = -(logprobs.exp() * logprobs).sum(dim=-1).double()
        if reference is not None:
            kls[rows] = kl_exact(logits, capped(F.linear(ref_hidden[rows], ref_weight)) / temperature).double()
    kl[wanted], entropy[wanted] = kls, entropies
    return kl, entropy


def letters_at(model, reference, hidden, ref_hidden, options, id_of, temperature):
    """Hidden states (n, C) at n decision points and the letters on offer at each -> n dicts of what the models say there."""
    most = max(map(len, options))
    ids = torch.tensor([[id_of[letter] for letter in letters] + [0] * (most - len(letters)) for letters in options], device=hidden.device)
    offered = torch.tensor([[1] * len(letters) + [0] * (most - len(letters)) for letters in options], device=hidden.device).bool()

    def of_letters(model, hidden):
        logits = model.logits(hidden)  # (n, V): n is at most the rows of a batch
        return logits, logits.gather(1, ids).masked_fill(~offered, NOT_AN_OPTION)

    logits, letter_logits = of_letters(model, hidden)
    probs = torch.softmax(letter_logits / temperature, dim=-1)
    mass = (torch.softmax(logits / temperature, dim=-1).gather(1, ids) * offered).sum(dim=-1)
    best = letter_logits.topk(min(2, most), dim=-1)
    margin = best.values[:, 0] - best.values[:, -1]
    said = [{"probs": dict(zip(letters, row)), "mass": share, "best": letters[first], "margin": gap} for letters, row, share, first, gap in
            zip(options, probs.tolist(), mass.tolist(), best.indices[:, 0].tolist(), margin.tolist())]
    if reference is not None:
        ref_letter_logits = of_letters(reference, ref_hidden)[1]
        ref_probs = torch.softmax(ref_letter_logits / temperature, dim=-1)
        kl = kl_exact(letter_logits / temperature, ref_letter_logits / temperature)
        for one, letters, row, value in zip(said, options, ref_probs.tolist(), kl.tolist()):
            one.update(ref_probs=dict(zip(letters, row)), kl_letter=value)
    return said
