"""A release's own part: what its author says in hf_release/ goes into the model card and beside it; and no file of the author's is ever deleted.

The author's folder is only read. The staged folder lists its files with their checksums in release.json, so that the next release knows which are its own.
"""
import difflib
import json
import re
import shutil
import tomllib
from dataclasses import dataclass, field
from pathlib import Path

from nanochat import report as run_report
from nanochat.common import sha256_of

CARD, NOTES, LISTING = "card.toml", "README.md", "release.json"
KNOBS = {"title": str, "summary": str, "tags": list, "datasets": list, "links": dict}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class Release:
    """What hf_release/ holds: `card` for the model card, `files` {name in the release: path}."""
    card: dict = field(default_factory=dict)
    files: dict = field(default_factory=dict)


def read_release(folder):
    """hf_release/ -> Release; an absent folder is an empty one. ValueError for a card.toml that says what no card can."""
    folder = Path(folder)
    if not folder.is_dir():
        return Release()
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*"))
             if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)}
    return Release(read_card(files.pop(CARD)) if CARD in files else {}, {name: path for name, path in files.items() if name != NOTES})


def read_card(path):
    try:
        card = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is no TOML: {error}") from error
    for name, value in card.items():
        if name not in KNOBS:
            nearest = difflib.get_close_matches(name, KNOBS, n=1, cutoff=0)[0]
            raise ValueError(f"{path} sets {name!r}, which no card has: did you mean {nearest!r}?")
        if not isinstance(value, KNOBS[name]) or not all(isinstance(one, str) for one in (value.values() if isinstance(value, dict) else value)):
            raise ValueError(f"{path} has {name}={value!r}: it must be {'a text' if KNOBS[name] is str else 'texts'}")
    for name, address in card.get("links", {}).items():
        if not re.fullmatch(r"https?://[^\s<>()]+", address):
            raise ValueError(f"{path} has the link {name} = {address!r}: it must begin with https:// and hold no spaces or brackets")
    for one in card.get("datasets", []):
        if not HUB_ID.fullmatch(one):
            raise ValueError(f"{path} names the data set {one!r}: write it as on the Hub, owner/name")
    if "\n" in card.get("title", ""):
        raise ValueError(f"{path} has a title of several lines: one line is a heading")
    return card


def complete_card(text, card, plots=()):
    """The generated model card -> with the author's title, summary, links, tags and data sets, and the plots [(file, heading, caption)]."""
    import yaml
    end = text.index("\n---\n", 4)
    front, body = yaml.safe_load(text[4:end]), text[end + 5:]
    for name in ("tags", "datasets"):
        both = list(dict.fromkeys([*(front.get(name) or []), *card.get(name, [])]))
        if both:
            front[name] = both
    _, heading, rest = re.split(r"^(# .*)$", body, maxsplit=1, flags=re.MULTILINE)
    parts = [f"# {card['title'].strip()}" if card.get("title", "").strip() else heading]
    if card.get("summary", "").strip():
        parts.append(card["summary"].strip())
    if card.get("links"):
        parts.append(" · ".join(f"[{name}]({address})" for name, address in card["links"].items()))
    parts.append(rest.strip())
    if plots:
        parts.append("\n\n".join(["## Curves", *(f"![{heading}]({name})\n\n{caption}" for name, heading, caption in plots)]))
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True).strip()}\n---\n\n" + "\n\n".join(parts) + "\n"


def write_plots(folder, tag):
    """The report's plots of a model tag as SVG files below plots/ -> [(file, heading, caption)]."""
    from html import unescape

    from nanochat import report_plots
    report = run_report.collect(run_report.Config())
    runs = [run for run in report["runs"] if run["model_tag"] == tag]
    html = report_plots.accuracy_plot([row for row in report["evals"] if row["model_tag"] == tag]) + report_plots.curves(runs) + report_plots.telemetry(runs)
    found = []
    for heading, drawing, caption in re.findall(r"<h3>(.*?)</h3>\s*(<svg.*?</svg>)\s*<figcaption>(.*?)</figcaption>", html, re.DOTALL):
        name = re.sub(r"[^a-z0-9]+", "-", unescape(heading).lower()).strip("-") or "plot"
        name = f"plots/{len(found) + 1:02d}-{name[:60]}.svg"
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(drawing + "\n", encoding="utf-8")
        found.append((name, unescape(re.sub(r"[\[\]\n]", " ", heading)), unescape(caption)))
    return found


def add_files(folder, files):
    """Copy the author's files into the release. ValueError where one would replace a part of the model."""
    for name, path in files.items():
        if (folder / name).exists():
            raise ValueError(f"{path} would replace the release's own {name}: give it another name")
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, folder / name)


def write_listing(folder, meta):
    content = {"stage": meta.get("stage"), "model_tag": meta.get("model_tag"), "step": meta.get("step"), "code": run_report.git_state(), "files": checksums(folder)}
    (folder / LISTING).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def checksums(folder):
    return {path.relative_to(folder).as_posix(): sha256_of(path) for path in sorted(folder.rglob("*"))
            if path.is_file() and path != folder / LISTING}


def refuse_to_delete(folder):
    """ValueError where the staged folder holds a file that no release put there, or that was changed since."""
    folder = Path(folder)
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    try:
        own = dict(json.loads((folder / LISTING).read_text(encoding="utf-8"))["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder} exists and is not a release of this command (no readable {LISTING}): choose another --release-dir, or --overwrite to replace it") from error
    yours = [name for name, digest in checksums(folder).items() if own.get(name) != digest]
    if yours:
        raise ValueError(f"{folder} holds {len(yours)} files that you added or changed, {yours[0]} the first of them, and they would be deleted: "
                         "move them to hf_release/ of the repository, where they are published from, or --overwrite to lose them")
