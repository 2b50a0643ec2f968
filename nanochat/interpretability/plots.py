"""Pictures of what was captured, as PNG files: attention per layer, numbers per head, the logit lens. No display is needed.

`write_treescope` renders arrays and modules as one interactive HTML file, where the optional package treescope is installed.
"""
import io
from pathlib import Path

import numpy as np
import torch

from nanochat.common import write_atomic
from nanochat.interpretability.attention_metrics import prompt_spans
from nanochat.interpretability.capture import Capture

CELL = 0.125                                  # inches per token: the smallest at which its label can be read
DPI = 110
INK, FAINT = "#1c2733", "#8a94a0"
SPAN_COLORS = {"question": "#1f5fa8", "options": "#b3541e", "completion": INK, "other": FAINT}


@torch.no_grad()
def save_attention_pictures(model, tokenizer, sequence, prompt_length, folder, layers=None, max_queries=32, max_keys=160):
    """One sequence (prompt and completion) -> one PNG per layer with a panel per head, `attention_layer_N.png`: a row for each of the
    last `max_queries` predictions of the completion, a column for every token it could look at. -> their paths."""
    inputs = torch.tensor([sequence], device=model.device)
    with Capture(model, layers) as seen:
        model.hidden(inputs)
    T = len(sequence)
    first_query = max(prompt_length - 1, T - 1 - max_queries)
    keys = list(range(T - 1)) if T - 1 <= max_keys else [0, *range(T - max_keys, T - 1)]
    labels = token_labels(tokenizer, sequence)
    spans = prompt_spans(tokenizer, sequence)
    kinds = ["completion" if t >= prompt_length else "question" if spans["question"][t] else "options" if spans["options"][t] else "other" for t in keys]
    left_out = f", {T - 1 - len(keys)} tokens left out after the first" if len(keys) < T - 1 else ""
    paths = []
    for layer in seen.layers:
        weights = seen.attention(layer, first_query)[0, :, :T - 1 - first_query][:, :, keys]  # (H, Q, keys)
        path = Path(folder) / f"attention_layer_{layer}.png"
        plot_attention(weights, [f"{labels[t]}→{labels[t + 1]}" for t in range(first_query, T - 1)], [labels[t] for t in keys], path,
                       f"Layer {layer}: where each head looks (row: token read → token predicted){left_out}", kinds)
        paths.append(path)
    return paths


def plot_attention(weights, query_labels, key_labels, path, title, key_kinds=None):
    """weights (H, Q, K) -> a PNG with one heatmap per head. `key_kinds` colours the labels of the keys (see SPAN_COLORS)."""
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm
    H, Q, K = weights.shape
    columns = 1 if K > 64 else 2 if H > 1 else 1
    rows = -(-H // columns)
    margin = 0.5 + 0.06 * max(map(len, query_labels))
    width, height = columns * (K * CELL + margin) + 0.9, rows * (Q * CELL + 0.35) + 1.6
    figure = new_figure(max(width, 7), height)
    colors = colormaps["Blues"].with_extremes(bad="#eceef1")  # the future, which no query sees, is grey and not merely pale
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
    for place, ax in enumerate(axes.flat):
        if place >= H:
            ax.axis("off")
            continue
        shown = weights[place].float().cpu()
        image = ax.imshow(shown.masked_fill(shown == 0, float("nan")).numpy(), cmap=colors, norm=PowerNorm(0.5, 0, 1), aspect="auto", interpolation="nearest")
        ax.set_title(f"head {place}", fontsize=8, color=INK, loc="left", pad=3)
        ax.set_yticks(range(Q), query_labels, fontsize=6)
        ax.set_xticks(range(K), key_labels, fontsize=6, rotation=90)
        ax.tick_params(length=0, pad=1, labelbottom=place + columns >= H)
        for label, kind in zip(ax.get_xticklabels(), key_kinds or ()):
            label.set_color(SPAN_COLORS[kind])
        ax.vlines(np.arange(1, K) - 0.5, -0.5, Q - 0.5, color="#eef0f4", linewidth=0.4)  # a grid of minor ticks costs a second
        ax.hlines(np.arange(1, Q) - 0.5, -0.5, K - 0.5, color="#eef0f4", linewidth=0.4)
        for spine in ax.spines.values():
            spine.set_color("#c9cdd6")
    bar = figure.colorbar(image, ax=axes, fraction=0.02, pad=0.01, aspect=40, ticks=[0, 0.01, 0.05, 0.1, 0.25, 0.5, 1])
    bar.set_label("attention weight (square-root colour scale)", fontsize=7)
    bar.ax.tick_params(labelsize=6)
    figure.suptitle(title, fontsize=9, color=INK, x=0.01, ha="left")
    if key_kinds:
        figure.supxlabel("keys: question blue, options orange, completion black, markers and instruction grey", fontsize=7, color=FAINT)
    save(figure, path)


def plot_heads(table, path, layers=None):
    """measure_attention's {name: (L, H)} -> a PNG with one small table of numbers per metric."""
    names = [name for name in table if not name.startswith("uniform_")]
    L, H = table[names[0]].shape
    columns = min(4, len(names))
    rows = -(-len(names) // columns)
    figure = new_figure(columns * max(1.9, 0.42 * H + 0.9), rows * (0.24 * L + 0.95))
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat[len(names):]:
        ax.axis("off")
    for ax, name in zip(axes.flat, names):
        values = table[name].numpy()
        uniform = table.get(f"uniform_{name}")
        low, high = values.min(), values.max()
        reach = max(high - low, 1e-9)
        ax.imshow(values, cmap="Blues", aspect="auto", vmin=low - 0.1 * reach, vmax=high + 0.6 * reach)  # never so dark that the number drowns
        digits = 3 if high < 0.1 else 2 if high < 10 else 0
        for layer in range(L):
            for head in range(H):
                ax.text(head, layer, f"{values[layer, head]:.{digits}f}", ha="center", va="center", fontsize=6.5, color=INK)
        beside = "" if uniform is None else f" (uniform: {uniform.mean():.2f})"
        ax.set_title(f"{name}{beside}", fontsize=8, color=INK, loc="left")
        ax.set_xticks(range(H), range(H), fontsize=6)
        ax.set_yticks(range(L), layers or range(L), fontsize=6)
        ax.set_xlabel("head", fontsize=6, color=FAINT)
        ax.set_ylabel("layer", fontsize=6, color=FAINT)
        ax.tick_params(length=0)
        ax.spines[:].set_visible(False)
    save(figure, path)


def plot_lens(lens, path):
    """A Lens -> a PNG: over the depth, the probability of the right and of the final letter among the letters, their ranks in the vocabulary,
    how often the right one leads, and at which depth each begins to lead for good."""
    from matplotlib.ticker import MaxNLocator
    depths, N = range(lens.probs.size(1)), len(lens.answers)
    blue, orange = SPAN_COLORS["question"], SPAN_COLORS["options"]
    of_right, of_final = lens.of(lens.right, lens.probs), lens.of(lens.final, lens.probs)  # (N, L + 1)
    leads = (lens.probs.argmax(dim=-1) == lens.right[:, None]).double().mean(dim=0)
    figure = new_figure(12, 3.2)
    probs, ranks, shares, counts = figure.subplots(1, 4)
    for row in of_right[:64]:
        probs.plot(depths, row, color=FAINT, alpha=0.2, linewidth=0.6)
    probs.plot(depths, of_right.mean(dim=0), color=blue, linewidth=2, label="right letter (grey: single points)")
    probs.plot(depths, of_final.mean(dim=0), color=orange, linewidth=1.4, label="final letter")
    probs.axhline(1 / len(lens.letters), color=FAINT, linewidth=0.8, linestyle="--", label="chance")
    probs.set_title("mean probability among the letters", fontsize=8, loc="left", color=INK)
    for name, letter, color in (("right letter", lens.right, blue), ("final letter", lens.final, orange)):
        low, middle, high = torch.quantile(lens.of(letter, lens.ranks).double() + 1, torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), dim=0)
        ranks.fill_between(depths, low, high, color=color, alpha=0.12, linewidth=0)
        ranks.plot(depths, middle, color=color, linewidth=1.6, label=name)
    ranks.set_yscale("log")
    ranks.yaxis.set_major_formatter("{x:g}")
    ranks.invert_yaxis()
    ranks.set_title("place in the vocabulary (median, quartiles)", fontsize=8, loc="left", color=INK)
    shares.plot(depths, leads, color=blue, linewidth=2, marker="o", markersize=3, label="right letter leads")
    shares.plot(depths, lens.mass.mean(dim=0), color=FAINT, linewidth=1.2, label="letters' share of the vocabulary")
    shares.set_title(f"share of {N} points", fontsize=8, loc="left", color=INK)
    for offset, name, depth_of, color in ((-0.2, "right letter appears", lens.appears, blue), (0.2, "final letter settles", lens.settles, orange)):
        counts.bar([depth + offset for depth in depths], [int((depth_of == depth).sum()) for depth in depths], color=color, width=0.38, label=name)
    counts.set_title(f"points by depth (right never leads: {int((lens.appears < 0).sum())})", fontsize=8, loc="left", color=INK)
    counts.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    for ax in (probs, shares):
        ax.set_ylim(-0.02, 1.02)
    for ax in (probs, ranks, shares, counts):
        ax.legend(fontsize=6, edgecolor="none", framealpha=0.85)
        ax.set_xlabel("blocks passed", fontsize=7, color=FAINT)
        ax.tick_params(labelsize=6)
        ax.set_xticks(list(depths)[::max(1, len(depths) // 10)])
        ax.spines[["top", "right"]].set_visible(False)
    save(figure, path)


def token_labels(tokenizer, ids):
    """Ids -> short texts for an axis: blanks and line ends visible, special tokens by name, `$` harmless to matplotlib."""
    special = {tokenizer.encode_special(name): name[2:-2] for name in tokenizer.special_tokens}
    labels = []
    for token in ids:
        text = special.get(token) or tokenizer.decode([token]).replace(" ", "·").replace("\n", "⏎").replace("\t", "⇥")
        text = "".join(letter if letter.isprintable() else "?" for letter in text)
        labels.append((text if len(text) <= 12 else f"{text[:11]}…").replace("$", r"\$"))
    return labels


def new_figure(width, height):
    """An empty figure, in inches. matplotlib is imported here and not above: two thirds of a second that only those spend who draw."""
    from matplotlib.figure import Figure
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path):
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    write_atomic(path, buffer.getvalue())


def write_treescope(value, path):
    """A tensor, a module, or a dict of them -> one self-contained HTML file to click through (treescope, Google DeepMind)."""
    treescope = import_treescope(path)
    with treescope.active_autovisualizer.set_scoped(treescope.ArrayAutovisualizer()):
        write_atomic(path, treescope.render_to_html(value))


@torch.no_grad()
def write_attention_page(model, tokenizer, sequence, prompt_length, path, layers=None):
    """One sequence (prompt and completion) -> one self-contained HTML file with an array per layer, (head, query) down and key across: point at
    a cell for its tokens and its weight."""
    treescope = import_treescope(path)
    with Capture(model, layers) as seen:
        model.hidden(torch.tensor([sequence], device=model.device))
    labels, first_query = token_labels(tokenizer, sequence), prompt_length - 1
    queries = [f"{labels[t]}→{labels[t + 1]}" for t in range(first_query, len(sequence) - 1)]
    parts = ["<!doctype html><html lang=en><meta charset=utf-8><title>Attention</title><body style='font: 14px system-ui, sans-serif; margin: 1.5rem'>"
             "<p>Where each head looks while the completion is written: a row for each token read → token predicted, a column for each token it could look at.</p>"]
    for layer in seen.layers:
        weights = seen.attention(layer, first_query)[0, :, :-1, :-1].cpu().numpy()  # (H, Q, T - 1)
        seen_by = np.broadcast_to(np.tri(len(sequence) - 1, dtype=bool)[first_query:], weights.shape)  # the future is crossed out
        figure = treescope.render_array(weights, rows=(1, 0), columns=(2,), valid_mask=seen_by, vmin=0.0, vmax=float(weights.max()), around_zero=False,
                                        maximum_size=10**6, cutoff_size_per_axis=2048, axis_labels={0: "head", 1: "query", 2: "key"}, axis_item_labels={1: queries, 2: labels[:-1]})
        parts.append(f"<h3>Layer {layer}, weights up to {weights.max():.2f}</h3>{figure._repr_html_()}")
    write_atomic(path, "".join(parts))


def import_treescope(path):
    try:
        import treescope
    except ImportError as error:
        raise ValueError(f"treescope is not installed, so {path} cannot be written: pip install treescope, or use the PNG pictures") from error
    return treescope
