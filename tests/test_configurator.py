"""One dataclass gives flags, help and metadata; both dash styles work; a typo names the nearest flag."""
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from nanochat.configurator import config_dict, field_help, inherit, parse


@dataclass(frozen=True)
class Config:
    """A few knobs."""
    run: str = "dummy"            # name of the run ("dummy" = none)
    device_batch_size: int = 32   # [-b] rows per pass
    lr: float = 0.02              # learning rate
    top_k: int | None = 50        # None = all
    resume: bool = False          # go on
    levels: tuple[int, ...] = (1, 2)  # levels of difficulty


@pytest.mark.parametrize("line, expected", [
    ("", {}),
    ("--run=a=b --device-batch-size=8", {"run": "a=b", "device_batch_size": 8}),
    ("--device_batch_size 8", {"device_batch_size": 8}),
    ("-- --device_batch_size=8 --lr=1", {"device_batch_size": 8, "lr": 1.0}),
    ("-b 4 --top_k=None", {"device_batch_size": 4, "top_k": None}),
    ("--top-k=3 --resume", {"top_k": 3, "resume": True}),
    ("--resume=False --lr=1e-3", {"resume": False, "lr": 1e-3}),
    ("--levels 3 4", {"levels": (3, 4)}),
    ("--lr=1 --device-batch-size=4 --lr=2 --device_batch_size=8", {"lr": 2.0, "device_batch_size": 8}),  # a launcher's flags, overridden behind
])
def test_a_command_line_becomes_a_config(line, expected):
    assert parse(Config, line.split()) == Config(**expected)


@pytest.mark.parametrize("line, message", [
    ("--device_batch_sizee=3", "Did you mean --device-batch-size?"),
    ("--lr=abc", 'unable to convert "abc" into float'),
    ("stray", "stray"),
    ("--resume True", "True"),  # a bare word must not fill some other field
    ("--config missing.toml", "no such file"),
])
def test_a_wrong_command_line_ends_with_status_2_and_says_why(line, message, capsys):
    with pytest.raises(SystemExit) as exit:
        parse(Config, line.split())
    output = capsys.readouterr()
    assert message in output.out + output.err + str(exit.value)
    assert exit.value.code not in (0, None)


def test_a_file_gives_defaults_that_flags_override(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text("lr = 3\nresume = true\nlevels = [4, 5]\ntop_k = 7\n")
    assert parse(Config, ["--config", str(path), "--lr=5"]) == Config(lr=5.0, resume=True, levels=(4, 5), top_k=7)
    path.write_text("lrr = 3\n")
    with pytest.raises(SystemExit) as exit:
        parse(Config, [f"--config={path}"])
    assert exit.value.code == 2


def test_help_lists_every_knob_with_its_comment_and_default(capsys):
    with pytest.raises(SystemExit) as exit:
        parse(Config, ["--help"])
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field, (_, comment) in field_help(Config).items():
        assert f"--{field.replace('_', '-')}" in text
        assert comment.split()[0] in text
    assert "A few knobs." in text and "[default: 32]" in text


def test_none_means_the_parents_value_and_a_missing_one_is_named():
    child = inherit(Config(top_k=None), {"top_k": 9, "lr": 1}, "top_k", "lr")
    assert (child.top_k, child.lr) == (9, 0.02)
    with pytest.raises(ValueError, match="top_k is None"):
        inherit(Config(top_k=None), {"lr": 1}, "top_k")
    assert config_dict(Config())["levels"] == (1, 2)


@pytest.mark.parametrize("script", sorted(path.stem for path in (Path(__file__).parents[1] / "scripts").glob("*.py") if path.stem != "__init__"))
def test_every_script_prints_its_help(script):
    result = subprocess.run([sys.executable, "-m", f"scripts.{script}", "--help"], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600)
    assert result.returncode == 0 and "Usage" in result.stdout, result.stdout + result.stderr
