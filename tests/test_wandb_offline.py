"""What the log holds is in W&B's offline file as well, every metric of it, with the same values."""
import json
import math
import re
from pathlib import Path

import pytest

from nanochat.common import env
from nanochat.run_logger import read_log
from tests.logged_run import logged_run, read_wandb

PRACTICE = Path(env("NANOCHAT_TEST_DATA", Path(__file__).parents[2] / "shared" / "data")).parent / "spec" / "rl-practice.md"


@pytest.fixture(scope="session")
def runs(prepared, tmp_path_factory):
    """{stage: (its JSONL's metrics {name: [values]}, its config, W&B's config keys, W&B's history)}"""
    folder = logged_run(prepared, prepared.parent / "logged")
    found = {}
    for path in sorted((folder / "wandb").glob("offline-run-*/*.wandb")):
        config, history = read_wandb(path)
        found[frozenset(config - {"_wandb"})] = config, history
    result = {}
    for path in sorted((folder / "runs").glob("*.jsonl")):
        records = read_log(path)
        header = next(record for record in records if "config" in record)
        metrics, shown = {}, set()
        for record in records:
            if "config" in record:
                continue
            for name in ("text", "image"):
                shown |= set(record.get(name, ()))
            if "text" not in record and "image" not in record:
                for name, value in record.items():
                    if name not in ("step", "time", "non_finite"):
                        metrics.setdefault(name, []).append(value)
        config, history = next(both for keys, both in found.items() if set(header["config"]) <= keys)
        result[path.stem] = metrics, shown, header["config"], config, history
    assert len(result) == len(found) == 4, (list(result), list(found))
    return result


def test_every_metric_of_every_stage_is_in_the_offline_file_with_its_values(runs):
    for name, (metrics, shown, header, config, history) in runs.items():
        assert len(metrics) > 5 and set(header) <= config, name
        assert set(metrics) <= set(history), (name, set(metrics) - set(history))
        assert shown <= set(history), (name, shown - set(history))  # tables and pictures
        for metric, values in metrics.items():
            assert [json.loads(value) for value in history[metric]] == [pytest.approx(value, nan_ok=True) if isinstance(value, float) else value for value in values], (name, metric)


def documented():
    """The names of rl-practice.md, section 4, without their braces and placeholders -> regular expressions."""
    section = PRACTICE.read_text(encoding="utf-8").split("## 4.")[1].split("\n- ")[0]
    from tests.test_docs import expand, name_pattern
    return {name: name_pattern(name) for span in re.findall(r"`([^`]+)`", section) for name in expand(span)}


@pytest.mark.skipif(not PRACTICE.is_file(), reason="the list of names is not here")
def test_every_name_of_the_practice_is_logged_by_an_rl_run(runs):
    names = documented()
    assert len(names) >= 36
    logged = {stage: set(runs[stage][0]) & set(runs[stage][4]) for stage in runs if stage.startswith("rl")}
    everywhere = set().union(*logged.values())
    missing = [name for name, pattern in names.items() if not any(pattern.fullmatch(one) for one in everywhere)]
    assert not missing, missing


def test_no_logged_number_of_a_tiny_run_is_infinite(runs):
    for name, (metrics, *_) in runs.items():
        for metric, values in metrics.items():
            assert all(value is None or not isinstance(value, float) or math.isfinite(value) for value in values), (name, metric)
