"""The guides are true: every command in them is one that its script accepts, every file they name is there, and the guide to one's own data works
word for word: its files are written, its task is added, its commands are run, with smaller numbers.
"""
import ast
import importlib
import inspect
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import tasks
from dev import depth_table
from nanochat import configurator, data_recipes
from nanochat.checkpoint_manager import load_model
from nanochat.cloud.orders import bare_flags
from scripts import chat_sft
from tasks import common

ROOT = Path(__file__).parents[1]
GUIDES = sorted({*ROOT.glob("*.md"), *(ROOT / "hf_release").glob("*.md")})
OTHERS = {"git", "ssh", "scp", "tmux", "tail", "nvidia-smi", "nano", "sudo", "apt-get", "curl", "gcloud", "uv", "hf", "sbatch", "squeue", "scancel", "mkdir", "chmod", "tar",
          "bash", "python", "torchrun", "export", "source", "cd", "cp", "umask", "watch"}


def blocks(text, language):
    """The fenced blocks of a language, with the text before each: [(what stands before, content)]."""
    parts, found = re.split(r"^( *)```(\w*)\n", text, flags=re.MULTILINE), []
    for place in range(1, len(parts) - 2, 3):
        indent, kind, content = parts[place:place + 3]
        if kind == language:
            content = content.split(f"\n{indent}```")[0]
            found.append((parts[place - 1], "\n".join(line.removeprefix(indent) for line in content.splitlines()) + "\n"))
    return found


def command_lines(script):
    """A block of shell -> its simple commands as lists of words; comments are left out, pipes and && divide."""
    commands = []
    for line in script.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="|&;()<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words = []
        for word in lexer:
            if word and set(word) <= set("|&;()"):
                commands.append(words)
                words = []
            else:
                words.append(word)
        commands.append(words)
    return [words for words in commands if words]


def take_apart(words):
    """Words -> ({VARIABLE: value} before the command, module or None, its arguments, program)."""
    variables, words = {}, list(words)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0], re.DOTALL):
        name, _, variables[name] = words.pop(0).partition("=")
    if any(word in (">", "<", ">>") for word in words):
        words = words[:next(place for place, word in enumerate(words) if word in (">", "<", ">>"))]
    if not words:
        return variables, None, [], ""
    program = words[0]
    if program in ("python", "torchrun") and "-m" in words:
        place = words.index("-m")
        return variables, words[place + 1], words[place + 2:], program
    if program == "python" and len(words) > 1 and words[1].endswith(".py") and (ROOT / words[1]).is_file():
        return variables, words[1].removesuffix(".py").replace("/", "."), words[2:], program
    return variables, None, words[1:], program


def shown_commands():
    """Every command of every guide: in shell blocks, and inline as `python -m ...`."""
    for guide in GUIDES:
        text = guide.read_text(encoding="utf-8")
        scripts = [content for _, content in blocks(text, "bash")]
        scripts += [span + "\n" for span in re.findall(r"(?<!`)`((?:python|torchrun|bash|sbatch) [^`\n]+)`(?!`)", text)]
        for words in (words for script in scripts for words in command_lines(script)):
            yield guide, words


COMMANDS = list(shown_commands())
OURS = [(guide, words) for guide, words in COMMANDS if take_apart(words)[1] not in (None, "pytest")]
def parsed(module, arguments):
    """What the script would be called with, by its own reading of the command line; SystemExit where it would refuse the arguments."""
    arguments = [word for word in arguments if word != "--"]
    if not hasattr(module, "Config"):                    # it takes none
        return () if not arguments else pytest.fail(f"{module.__name__} takes no arguments")
    own = getattr(module, "command_line", None)          # a script that takes words without flags
    if own and own.__module__ == module.__name__:
        found = own(arguments)
        return found if isinstance(found, tuple) else (found,)
    bare = re.search(r"bare_flags\(sys\.argv\[1:\], (.*?)\)", inspect.getsource(module))
    if bare:
        arguments = bare_flags(arguments, *ast.literal_eval(f"({bare[1]},)"))
    return (configurator.parse(module.Config, arguments),)


def test_the_tables_of_depths_are_what_their_commands_compute(capsys):
    text = (ROOT / "QUICKSTART.md").read_text(encoding="utf-8")
    commands = [words for _, script in blocks(text, "bash") for words in command_lines(script) if "dev.depth_table" in words and "--bench=bench.txt" not in words]
    for command in commands:
        depth_table.main(*parsed(depth_table, command[3:]))
    computed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(commands) == 2 and len(computed) > 8
    assert [line for line in text.splitlines() if line.startswith(("| depth", "| ---: |")) or re.match(r"\| \d+ \|", line)] == computed


@pytest.mark.parametrize("guide, words", OURS, ids=[f"{guide.name}-{place}" for place, (guide, _) in enumerate(OURS)])
def test_every_command_of_ours_is_one_that_its_script_accepts(guide, words):
    _, module, arguments, _ = take_apart(words)
    if any(word.startswith("$") for word in arguments):
        pytest.skip("arguments from a variable")
    try:
        parsed(importlib.import_module(module), arguments)
    except SystemExit as refusal:
        pytest.fail(f"{guide.name}: {shlex.join(words)}: refused with status {refusal.code}")


def test_the_commands_are_found():
    found = {(guide.name, take_apart(words)[1]) for guide, words in OURS}
    assert {("OWN_DATA.md", "scripts.chat_rl"), ("LAMBDA_MANUAL_SETUP.md", "scripts.launch_lambda_training"), ("README.md", "scripts.base_train")} <= found
    assert len(OURS) > 60


@pytest.mark.parametrize("text", ["python -m scripts.chat_rl --task=AQUA --max-stepz=3", "python -m scripts.chat_rl --max-steps=many", "python launch_lambda.py --regionn=x",
                                  "torchrun --standalone -m scripts.base_train -- --depht=3"])
def test_a_wrong_command_is_found_out(text, capsys):
    (words,) = command_lines(text)
    _, module, arguments, _ = take_apart(words)
    with pytest.raises(SystemExit):
        parsed(importlib.import_module(module), arguments)


@pytest.mark.parametrize("guide", GUIDES, ids=[str(guide.relative_to(ROOT)) for guide in GUIDES])
def test_every_shell_block_is_shell_and_every_program_in_it_is_known(guide):
    for _, content in blocks(guide.read_text(encoding="utf-8"), "bash"):
        done = subprocess.run(["bash", "-n"], input=content, text=True, capture_output=True)
        assert done.returncode == 0, f"{done.stderr}\n{content}"
    for words in (words for other, words in COMMANDS if other == guide):
        variables, module, arguments, program = take_apart(words)
        assert not program or program in OTHERS or (ROOT / program).is_file(), f"{program} in {shlex.join(words)}"
        if program in ("bash", "sbatch", "source") and arguments:
            script = next((word for word in arguments if word.endswith(".sh")), None)
            assert script is None or (ROOT / script).is_file(), script


# files that a run makes, or that the guide itself tells to make
MADE = re.compile(r"own/.*|tasks/coins\.py|(?:report|runs|tokenizer|plots|cloud|aqua|eval|stages)/.*|\w+_checkpoints/.*|training\.log|~/.*|tasks/my_.*|[\w.-]+\.(?:safetensors|jinja|parquet|pt|jsonl|json|log)")


@pytest.mark.parametrize("guide", GUIDES, ids=[str(guide.relative_to(ROOT)) for guide in GUIDES])
def test_every_file_and_link_that_is_named_is_there(guide):
    text = guide.read_text(encoding="utf-8")
    prose = re.sub(r"^ *```.*?^ *```", "", text, flags=re.MULTILINE | re.DOTALL)
    missing = []
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", prose):
        if not re.match(r"https?://", target) and not (guide.parent / target).exists():
            missing.append(target)
    for name in re.findall(r"(?<!`)`((?:[\w.-]+/)*[\w.-]+\.(?:py|sh|md|toml|html|json|jsonl|parquet|rs))`(?!`)", prose):
        places = (ROOT, guide.parent, ROOT / "scripts", ROOT / "nanochat")
        if not MADE.fullmatch(name) and not any((place / name).exists() for place in places) and name not in ("report.md", "report.html", "rental.json", "model.safetensors"):
            missing.append(name)
    assert not missing


# ---------------------------------------------------------------------------------------------------------------------
# OWN_DATA.md, word for word

SMALLER = {"scripts.base_train": ["--num-iterations=2", "--eval-tokens=512", "--sample-every=-1", "--compile=false", "--n-embd=64", "--device-batch-size=2", "--total-batch-size=512"],
           "scripts.chat_sft": ["--num-iterations=1", "--target-examples-per-step=16", "--eval-steps=1", "--compile=false"],
           "scripts.chat_rl": ["--max-steps=1", "--examples-per-step=2", "--num-samples=2", "--max-new-tokens=4", "--eval-every=-1", "--preflight=-1"],
           "scripts.chat_eval": ["--max-problems=4", "--max-new-tokens=4", "--mode=generative"], "scripts.chat_cli": ["--max-new-tokens=4"]}
GUIDE = (ROOT / "OWN_DATA.md").read_text(encoding="utf-8")
TINY = {"size in ((\"train\", 2000), (\"validation\", 200), (\"test\", 200))": "size in ((\"train\", 60), (\"validation\", 20), (\"test\", 20))",
        "((\"shard_00000\", 4000), (\"shard_val\", 200))": "((\"shard_00000\", 300), (\"shard_val\", 20))"}


def named_blocks():
    """{file that the guide says to save it as: content} of the Python blocks."""
    found = {}
    for before, content in blocks(GUIDE, "python"):
        found[re.findall(r"`([\w/.]+\.py)`", before)[-1]] = content
    return found


@pytest.fixture
def followed(tmp_path, monkeypatch):
    """A folder in which the guide's files are saved, with its task and its mixture known, as they are to someone who has followed it."""
    files = named_blocks()
    assert set(files) == {"own/make.py", "tasks/coins.py", "nanochat/data_recipes.py"}
    make = files["own/make.py"]
    for line, smaller in TINY.items():
        assert line in make
        make = make.replace(line, smaller)
    for name, content in (("own/make.py", make), ("tasks/coins.py", files["tasks/coins.py"])):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(content, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path / "own-run"))
    for name in ("AQUA_DATA_DIR", "NANOCHAT_AQUA_DIR", "NANOCHAT_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    common.task_names()                                  # all others are registered before, and stay when this one goes
    monkeypatch.setattr(tasks, "__path__", [*tasks.__path__, str(tmp_path / "tasks")])
    monkeypatch.setattr(common, "_registry", dict(common._registry))
    for table in ("SFT", "SFT_VALIDATION"):
        monkeypatch.setattr(data_recipes, table, dict(getattr(data_recipes, table)))
    monkeypatch.setattr(chat_sft, "SFT", data_recipes.SFT)
    monkeypatch.setattr(chat_sft, "SFT_VALIDATION", data_recipes.SFT_VALIDATION)
    exec(compile(files["nanochat/data_recipes.py"], "OWN_DATA.md", "exec"), vars(data_recipes))
    subprocess.run([sys.executable, "own/make.py"], cwd=tmp_path, check=True, timeout=300)
    yield tmp_path
    sys.modules.pop("tasks.coins", None)
    vars(tasks).pop("coins", None)


def test_the_guides_task_is_known_and_judges_as_it_says(followed):
    task = common.get_task("coins", split="validation")
    assert task.name == "COINS" and "COINS" in common.task_names() and len(task) == 20
    for conversation in task:
        reference = conversation["messages"][-1]["content"]
        assert task.rewards(conversation, reference) == {"correct": 1.0, "format": 0.1} and task.rewards(conversation, "") == {"correct": 0.0, "format": 0.0}
        answer = int(conversation["answer"])
        assert task.is_correct(conversation, f"so\nAnswer: {answer}.0") and not task.is_correct(conversation, f"Answer: {answer + 1}")
        assert not task.is_correct(conversation, f"Answer: {answer}\nor not") and not task.is_correct(conversation, f"{answer}")


def test_the_guides_rows_are_the_forms_it_shows(followed):
    shown = [json.loads(content) for _, content in blocks(GUIDE, "json")]
    multiple_choice, chat = (json.loads((followed / name).read_text().splitlines()[0]) for name in ("own/aqua/train.jsonl", "own/chat.jsonl"))
    assert [set(row) for row in shown] == [set(multiple_choice), set(chat)]


def test_following_the_guide_from_text_to_talk(followed, monkeypatch, capsys):
    ran = []
    for words in (words for _, script in blocks(GUIDE, "bash") for words in command_lines(script)):
        variables, module, arguments, program = take_apart(words)
        if program == "export" or words == ["python", "own/make.py"]:
            continue                                     # done by the fixture
        assert module, words
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            script = importlib.import_module(module)
            quiet = ["--device-type=cpu"] if "device_type" in script.Config.__dataclass_fields__ else []
            extra = [] if "--compare" in arguments else SMALLER.get(module, [])
            script.main(*parsed(script, [*arguments, *extra, *quiet]))
        ran.append(module)
    assert ran == ["nanochat.dataset", "scripts.tok_train", "scripts.base_train", "scripts.prepare_aqua", "scripts.chat_sft", "scripts.chat_rl", "scripts.chat_eval", "scripts.chat_eval",
                   "scripts.chat_eval", "nanochat.report", "scripts.chat_cli"]
    base = followed / "own-run"
    assert load_model("rl", model_tag="d4")[2]["config"]["task"] == "COINS" and load_model("sft", model_tag="d4")[2]["config"]["sft_recipe"] == "own"
    assert {"sft_d4_COINS.json", "rl_d4_COINS.json", "rl_d4_AQUA.json"} <= {path.name for path in (base / "eval").iterdir()} and (base / "report/report.html").is_file()
