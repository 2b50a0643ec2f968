"""What an update did to the words it was made from: each token's advantage times the change of its log-probability.

A policy gradient wants tokens of good rollouts likelier and tokens of bad ones rarer. Where advantage * (log p after - log p before)
is positive the update did that to the token; where it is negative other rollouts, or shared weights, pulled the other way. The sum
over tokens is the first-order gain of the surrogate objective. Nothing here trains or samples.
"""
from dataclasses import dataclass
from html import escape

import torch

from nanochat.interpretability.rollout_log import has_signal
from nanochat.run_logger import visible

GOOD, BAD = (22, 130, 68), (190, 48, 48)     # the update did, or undid, what the advantage asked for
FULL = 0.95                                  # this quantile of |value| gets the full colour, so that one token does not pale all others


@dataclass(frozen=True)
class Change:
    """One sampled or forced token of a completion. Forced ones have no log-probabilities and value 0."""
    text: str
    before: float | None
    after: float | None
    value: float

    @property
    def change(self):
        return None if self.before is None else self.after - self.before


@torch.no_grad()
def token_logprobs(model, rollouts, temperature=1.0, device_batch_size=8):
    """Rollouts with `prompt`, `tokens` -> for each a list of log p of its completion's tokens, at the temperature of the run."""
    results = [[]] * len(rollouts)
    order = sorted(range(len(rollouts)), key=lambda i: len(rollouts[i].prompt) + len(rollouts[i].tokens))
    for start in range(0, len(order), device_batch_size):
        places = order[start:start + device_batch_size]
        T = max(len(rollouts[i].prompt) + len(rollouts[i].tokens) for i in places) - 1
        inputs, targets = torch.zeros(len(places), T, dtype=torch.int64), torch.full((len(places), T), -1)
        for row, i in enumerate(places):
            ids = torch.tensor(rollouts[i].prompt + rollouts[i].tokens)
            inputs[row, :len(ids) - 1] = ids[:-1]
            targets[row, len(rollouts[i].prompt) - 1:len(ids) - 1] = ids[len(rollouts[i].prompt):]
        logprobs = model.logprobs(inputs.to(model.device), targets.to(model.device), temperature).float().cpu()
        for row, i in enumerate(places):
            results[i] = logprobs[row][targets[row] != -1].tolist()
    return results


def explain_update(before, after, tokenizer, rollouts, temperature=1.0, device_batch_size=8):
    """Two models and LoggedRollouts -> for each rollout its list of Changes, one per token of the completion."""
    both = [token_logprobs(model, rollouts, temperature, device_batch_size) for model in (before, after)]
    explained = []
    for rollout, old, new in zip(rollouts, *both):
        mask = rollout.mask or [1] * len(rollout.tokens)
        explained.append([Change(token_text(tokenizer, token), was, now, rollout.advantage * (now - was)) if sampled else Change(token_text(tokenizer, token), None, None, 0.0)
                          for token, sampled, was, now in zip(rollout.tokens, mask, old, new)])
    return explained


def token_text(tokenizer, token):
    return visible(tokenizer.id_to_bytes(token).decode("utf-8", errors="replace"))


def summarize_update(rollouts, explained):
    """-> {"tokens", "gain": mean of advantage * change over the tokens that have an advantage, "aligned": share of them that went the way
    their advantage asked, "up"/"down": mean change of log p in rollouts of positive / negative advantage; None where there are none}."""
    values, ups, downs = [], [], []
    for rollout, changes in zip(rollouts, explained):
        sampled = [change for change in changes if change.before is not None]
        if rollout.advantage:
            values += [change.value for change in sampled]
            (ups if rollout.advantage > 0 else downs).extend(change.change for change in sampled)

    def mean(numbers):
        return sum(numbers) / len(numbers) if numbers else None

    return {"tokens": len(values), "gain": mean(values), "aligned": mean([value > 0 for value in values]), "up": mean(ups), "down": mean(downs)}


def full_colour(explained):
    """The |value| that gets the full colour."""
    sizes = sorted(abs(change.value) for changes in explained for change in changes if change.value)
    return sizes[min(len(sizes) - 1, int(FULL * len(sizes)))] if sizes else 1.0


def colour_of(value, full):
    """A value -> ((r, g, b), strength in 0..1)."""
    return (GOOD if value > 0 else BAD), min(1.0, abs(value) / full)


# ---------------------------------------------------------------------------------------------------------------------
# Shown

def update_text(changes, full):
    """Changes -> a rich Text: the completion on coloured ground."""
    from rich.text import Text
    text = Text()
    for change in changes:
        (r, g, b), strength = colour_of(change.value, full)
        style = "dim" if change.before is None else ""
        if strength > 0.04:                   # blended with black: a terminal has no transparency
            style = f"white on rgb({int(r * strength)},{int(g * strength)},{int(b * strength)})"
        text.append(change.text.replace("\n", "⏎\n"), style)
    return text


STYLE = """
:root { color-scheme: light dark; --ink: #1c2733; --faint: #66707b; --line: #d9dee4; --ground: #ffffff; --card: #f6f8fa }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ed; --faint: #9aa4af; --line: #343c46; --ground: #14181d; --card: #1b2128 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground); max-width: 70rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.3rem } h2 { font-size: 1rem; margin: 2rem 0 .4rem }
p, summary { color: var(--faint) } pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3rem 0 }
.card { border: 1px solid var(--line); background: var(--card); border-radius: 8px; padding: .6rem .9rem; margin: .6rem 0 }
.facts { font-size: .85rem; color: var(--faint); display: flex; flex-wrap: wrap; gap: .2rem 1.2rem } .facts b { color: var(--ink); font-weight: 600 }
.tokens { font-family: ui-monospace, monospace; font-size: .9rem } .tokens span { border-radius: 3px; padding: 1px 0 } .forced { opacity: .5 }
.legend span { padding: 1px .5rem; border-radius: 3px } table { border-collapse: collapse } td { padding: 0 1rem 0 0 }
"""


def update_page(title, facts, groups):
    """A heading, facts [(name, value)] and groups [(LoggedRollouts, their Changes)] -> one self-contained HTML page."""
    full = full_colour([changes for _, explained in groups for changes in explained])
    parts = [f"<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'><title>{escape(title)}</title><style>{STYLE}</style>",
             f"<h1>{escape(title)}</h1><table>", *(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in facts), "</table>",
             f"<p class=legend>Each token on the colour of advantage × change of its log-probability: <span style='{css(full, full)}'>the update did what the advantage "
             f"asked (full colour: {full:.2g})</span> <span style='{css(-full, full)}'>it did the opposite</span>. Point at a token for its numbers.</p>"]
    for number, (rollouts, explained) in enumerate(groups):
        question = rollouts[0].question
        parts.append(f"<h2>Group {number}: right answer {escape(str(rollouts[0].answer or 'not logged'))}"
                     f"{'' if has_signal(rollouts) else ' (all right or all wrong: it gave no gradient, so what changed was taught by others)'}</h2>")
        if question:
            parts.append(f"<details{'' if number else ' open'}><summary>the question</summary><pre>{escape(visible(question))}</pre></details>")
        for rollout, changes in zip(rollouts, explained):
            named = {**rollout.rewards, "advantage": rollout.advantage, "summed value": sum(change.value for change in changes)}
            facts_line = "".join(f"<span>{escape(name)} <b>{value:+.3f}</b></span>" for name, value in named.items())
            parts.append(f"<div class=card><div class=facts><span>letter <b>{escape(rollout.letter or 'none')}</b></span>{facts_line}"
                         f"<span>finish <b>{escape(rollout.finish)}</b></span></div><pre class=tokens>{''.join(map(lambda c: token_html(c, full), changes))}</pre></div>")
    return "".join(parts) + "</html>\n"


def token_html(change, full):
    text = escape(change.text).replace("\n", "⏎\n")
    if change.before is None:
        return f"<span class=forced title='forced by a tool'>{text}</span>"
    return (f"<span style='{css(change.value, full)}' title='log p {change.before:.3f} → {change.after:.3f} ({change.change:+.3f}), "
            f"× advantage = {change.value:+.4f}'>{text}</span>")


def css(value, full):
    (r, g, b), strength = colour_of(value, full)
    return f"background: rgba({r},{g},{b},{0.75 * strength:.2f})"
