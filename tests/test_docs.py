"""Every flag and every metric name in README, launchers and docs exists in the code.

A flag in a command belongs to the script of that command; a flag that stands alone in a text must be some script's. A metric's name must be
logged by a tiny run of the stages, or be written in the code in full, f-strings with whole parts left open included.
"""
import ast
import re
from pathlib import Path

import pytest

from nanochat.run_logger import read_log
from tests.logged_run import logged_run

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted([*(ROOT / "scripts").glob("*.py"), *(ROOT / "nanochat").rglob("*.py"), *(ROOT / "dev").rglob("*.py"), *(ROOT / "hf_jobs").glob("*.py"), *ROOT.glob("*.py")])
MARKDOWN = sorted({*ROOT.glob("*.md"), *(path for room in ("docs", "dev", "hf_jobs", "slurm", "scripts") for path in (ROOT / room).rglob("*.md"))})
SHELL = sorted({*ROOT.glob("*.sh"), *(path for room in ("scripts", "dev", "hf_jobs", "slurm") for path in (ROOT / room).rglob("*.sh"))})
ALWAYS = {"--help", "-h", "--config"}
# flags in our texts that belong to other programs
EXTERNAL = {"--standalone", "--nproc_per_node", "--nnodes", "--local-addr", "--max-restarts", "--rdzv-conf", "--extra", "--inexact", "--all-extras", "--flavor", "--timeout", "--secrets", "--secrets-file", "--volume", "--detach",
            "--release", "--quiet", "--no-dev", "--locked", "--from", "--export", "--dependency", "--gres", "--partition", "--nodelist", "--array", "--job-name", "--time"}
NAME = r"-{1,2}[A-Za-z][\w-]*"
# what starts one of our scripts, and the arguments behind it up to where the shell's command ends
COMMAND = re.compile(r"(?:(?:python3?|uv run python)\s+(?P<file>(?:scripts|nanochat|dev|hf_jobs)/[\w/]+\.py|\w+\.py)|(?:-m|\$\{?LAUNCH\}?)\s+(?P<module>(?:scripts|nanochat|dev|hf_jobs)(?:\.\w+)+))"
                     r"(?P<arguments>[^|;&`#\n]*)")


# ---------------------------------------------------------------------------------------------------------------------
# What scripts understand

def canonical(flag):
    """--device-batch-size -> --device_batch_size; -x stays."""
    return f"--{flag[2:].replace('-', '_')}" if flag.startswith("--") else flag


def flags_of(path):
    """A script's source -> its flags with underscores: the fields and short names of its Config, or what it tells argparse; None if it has neither."""
    source = path.read_text(encoding="utf-8")
    tree, lines, found = ast.parse(source), source.splitlines(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith("Config"):
            for field in node.body:
                if isinstance(field, ast.AnnAssign):
                    found.add(f"--{field.target.id}")
                    found |= {canonical(name) for name in re.findall(r"#\s*\[(--?[\w-]+)\]", lines[field.end_lineno - 1])}
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("add_argument"):
            found |= {canonical(argument.value) for argument in node.args if isinstance(argument, ast.Constant) and str(argument.value).startswith("-")}
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("scripts.") and any(alias.name == "Config" for alias in node.names):
            found |= flags_of(ROOT / f"{node.module.replace('.', '/')}.py") or set()
    return found or None


FLAGS = {path: flags for path in SCRIPTS if (flags := flags_of(path))}
ANY = set().union(*FLAGS.values(), ALWAYS)


def script_of(command):
    """A match of COMMAND -> the script's path, whether or not it is there."""
    name = command["file"] or f"{command['module'].replace('.', '/')}.py"
    path = ROOT / name
    return path if path.is_file() or command["file"] else ROOT / name.removesuffix(".py") / "__main__.py"


# ---------------------------------------------------------------------------------------------------------------------
# What texts claim

def documents():
    """(name, text, "markdown" or "shell") of every document: files, and the docstrings in which scripts show their commands."""
    for path in MARKDOWN:
        yield path.relative_to(ROOT), path.read_text(encoding="utf-8"), "markdown"
    for path in SHELL:
        yield path.relative_to(ROOT), path.read_text(encoding="utf-8"), "shell"
    for path in SCRIPTS:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
        if docstring:
            yield path.relative_to(ROOT), docstring, "markdown"


def claims(text, kind):
    """A document -> [(script's path or None, flag as written)]."""
    text, found = re.sub(r"\\\n\s*", " ", text), []
    shown = []                                          # where commands stand: they are not searched again for lone flags
    for command in COMMAND.finditer(text):
        arguments = command["arguments"].split(" && ")[0]
        shown.append(command.span())
        found += [(script_of(command), flag) for flag in flags_in(arguments)]
    variables = {}
    for command in COMMAND.finditer(text):
        for variable in re.findall(r"\$\{?(\w+_ARGS)\b", command["arguments"]):
            variables.setdefault(variable, script_of(command))
    if kind == "shell":
        for variable, value in re.findall(r"\b(\w+_ARGS)=(?:\"\$\{\w+:-)?\"?([^\"\n}]*)", text):
            owner = variables.get(variable, ARGUMENT_OWNERS.get(variable))
            found += [(owner, flag) for flag in flags_in(value)]
        return found
    for span in re.finditer(r"(?<!`)`([^`\n]+)`(?!`)", text):
        if span[1].startswith("-") and not any(start <= span.start() < end for start, end in shown):
            found += [(None, flag) for flag in flags_in(span[1])]
    return found


def flags_in(arguments):
    """The flags of a command line; what stands in quotes or behind = is a value."""
    plain = re.sub(r"\"[^\"]*\"|'[^']*'", " ", arguments)
    return re.findall(rf"(?<![\w=/.$-])({NAME})(?=[\s=\])]|$)", plain)


def argument_owners():
    """{"RL_ARGS": the script whose command takes it}, over all shell files."""
    owners = {}
    for path in SHELL:
        for command in COMMAND.finditer(re.sub(r"\\\n\s*", " ", path.read_text(encoding="utf-8"))):
            for variable in re.findall(r"\$\{?(\w+_ARGS)\b", command["arguments"]):
                owners[variable] = script_of(command)
    return owners


ARGUMENT_OWNERS = argument_owners()


def unknown_flags(text, kind):
    """-> what is wrong, one line each."""
    wrong = []
    for path, flag in claims(text, kind):
        if path is None:
            if canonical(flag) not in ANY and flag not in EXTERNAL:
                wrong.append(f"{flag} is no script's")
        elif not path.is_file():
            wrong.append(f"{path.relative_to(ROOT)} does not exist")
        elif canonical(flag) not in FLAGS.get(path, set()) | ALWAYS:
            wrong.append(f"{path.relative_to(ROOT)} has no {flag}")
    return sorted(set(wrong))


DOCUMENTS = list(documents())


@pytest.mark.parametrize("name, text, kind", DOCUMENTS, ids=[str(name) for name, *_ in DOCUMENTS])
def test_every_flag_exists(name, text, kind):
    assert not unknown_flags(text, kind)


def test_the_documents_and_their_flags_are_found():
    """Against a reader that finds nothing: the known commands must be among what it found."""
    names = {str(name) for name, *_ in DOCUMENTS}
    assert {"README.md", "dev/LOG.md", "run_aquarat_small.sh", "run_aquarat_lite.sh", "scripts/chat_rl.py"} <= names
    found = {(path.name if path else None, flag) for _, text, kind in DOCUMENTS for path, flag in claims(text, kind)}
    assert {("chat_rl.py", "--rows-in-flight"), ("chat_rl.py", "--num_samples"), ("chat_eval.py", "-i"), ("base_train.py", "--mask-documents"), ("dataset.py", "-n"),
            ("decode.py", "--threads"), (None, "--help")} <= found and len(found) > 80


@pytest.mark.parametrize("text, kind, wrong", [
    ("run `python -m scripts.chat_rl --task=AQUA --max-stepz=3`", "markdown", ["scripts/chat_rl.py has no --max-stepz"]),
    ("```bash\ntorchrun --standalone --nproc_per_node=8 -m scripts.base_train -- --depth=8 \\\n    --deepth=9\n```", "markdown", ["scripts/base_train.py has no --deepth"]),
    ("`--controls` and `--contrls`, `-m slow` not", "markdown", ["--contrls is no script's"]),
    ("python -m scripts.nowhere --x", "markdown", ["scripts/nowhere/__main__.py does not exist"]),
    ("python -m scripts.chat_eval -i rl -z 3 | tee --append x", "markdown", ["scripts/chat_eval.py has no -z"]),
    ("stage x $LAUNCH scripts.chat_rl --run=\"$R --nonsense\" ${RL_ARGS:-}\n", "shell", []),
    ("export RL_ARGS=\"${RL_ARGS:---num_samples=4 --num_sampels=4}\"", "shell", ["scripts/chat_rl.py has no --num_sampels"]),
    ("python dev/bench/decode.py --threads 1 --thread 2 # --not-a-flag", "markdown", ["dev/bench/decode.py has no --thread"])])
def test_a_wrong_flag_is_found(text, kind, wrong):
    assert unknown_flags(text, kind) == wrong


# ---------------------------------------------------------------------------------------------------------------------
# Metrics

FAMILIES = ("rl", "attn", "eval", "time", "train", "val", "rewards", "reward", "completions", "clip_ratio", "sampling", "tokens_per_s", "lens", "preflight")
METRIC = re.compile(rf"(?:{'|'.join(FAMILIES)})(?:/[\w@{{}},.<>*-]+)+")


def expand(span):
    """"a/{b,c}" -> ["a/b", "a/c"]; {A..E,none} counts letters."""
    found = re.search(r"\{([^{}]*)\}", span)
    if not found:
        return [span]
    values = []
    for value in found[1].split(","):
        ends = re.fullmatch(r"\s*([A-Z])\.\.([A-Z])\s*", value)
        values += [chr(code) for code in range(ord(ends[1]), ord(ends[2]) + 1)] if ends else [value.strip()]
    return [one for value in values for one in expand(span[:found.start()] + value + span[found.end():])]


def name_pattern(name):
    """A name with placeholders (<part>, N, @k, *) -> a compiled pattern of the names it stands for."""
    pattern = re.escape(name)
    for placeholder, meaning in ((r"<\w+>", r"[^/]+"), (r"(?<![A-Za-z])N(?![A-Za-z])", r"\\d+"), (r"@k\b", r"@\\d+"), (r"\\\*", r".+")):
        pattern = re.sub(placeholder, meaning, pattern)
    return re.compile(pattern)


def metrics_in(text):
    """The metric names that a Markdown text shows as code."""
    spans = re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
    return sorted({name for span in spans if METRIC.fullmatch(span) and not span.endswith((".py", ".md", ".sh")) for name in expand(span)})


def literal_patterns():
    """Every text constant in the code that looks like a metric, as a pattern. An f-string counts if what is open in it ends a part between slashes
    and two other parts are written out: eval/{name} alone would vouch for anything, and what it stands for is found in the log."""
    found = set()
    for room in ("nanochat", "tasks", "scripts"):
        for path in (ROOT / room).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and METRIC.fullmatch(node.value):
                    found.add(re.escape(node.value))
                elif isinstance(node, ast.JoinedStr):
                    text = "".join(re.escape(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
                    parts = text.split("/")
                    if sum(bool(part) and "\0" not in part for part in parts) >= 2 and all(part.find("\0") in (-1, len(part) - 1) for part in parts):
                        found.add(text.replace("\0", r"[^/]+"))
    return [re.compile(pattern) for pattern in found]


@pytest.fixture(scope="module")
def known(prepared):
    """-> a function that tells whether a name is one of the code's: (name) -> bool."""
    folder = logged_run(prepared, prepared.parent / "logged")
    records = [record for path in (folder / "runs").glob("*.jsonl") for record in read_log(path)]
    logged = set().union(*records, *(record.get(shown, {}) for record in records for shown in ("text", "image")))
    patterns = literal_patterns()

    def is_known(name):
        pattern = name_pattern(name)
        sample = re.sub(r"<\w+>", "x", re.sub(r"(?<![A-Za-z])N(?![A-Za-z])", "0", name.replace("@k", "@1")))
        return any(pattern.fullmatch(one) for one in logged) or any(one.fullmatch(sample) for one in patterns)
    return is_known


def test_every_metric_in_the_docs_is_logged(known):
    unknown = {f"{name}: {metric}" for name, text, _ in DOCUMENTS if name.suffix == ".md" for metric in metrics_in(text) if not known(metric)}
    assert not unknown


def test_an_invented_metric_is_found_out(known):
    assert known("rl/kl_letter_mean") and known("attn/entropy_layer/N") and known("rewards/<part>/mean") and known("eval/pass@k") and known("lens/layer_N/prob_right")
    assert known("train/loss") and known("val/bpb") and known("rl/letter_pred_counts/none")
    for invented in ("rl/kl_word_mean", "attn/entropie_mean", "rl/letter_pred_counts", "lens/layer_N/nonsense", "train/perplexity", "completions/average_length", "eval/past@k"):
        assert not known(invented), invented


def test_names_are_taken_apart():
    assert metrics_in("`rl/letter_pred_counts/{A..C,none}`, `time/{a,b}_s`, `train/x.py`, `nanochat/rl`, `rl/`") == [
        "rl/letter_pred_counts/A", "rl/letter_pred_counts/B", "rl/letter_pred_counts/C", "rl/letter_pred_counts/none", "time/a_s", "time/b_s"]
    assert name_pattern("attn/entropy_layer/N").fullmatch("attn/entropy_layer/11") and not name_pattern("attn/entropy_layer/N").fullmatch("attn/entropy_layer/x")
    assert name_pattern("eval/pass@k").fullmatch("eval/pass@16") and name_pattern("rewards/<part>/mean").fullmatch("rewards/format/mean")
