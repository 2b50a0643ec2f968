"""dev/FEATURES.md: no row is missing, and every file, test and quotation in its tables is where it says; and what several rows rest on and no other test shows."""
import ast
import re
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

from nanochat.common import env

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "dev/FEATURES.md").read_text(encoding="utf-8")
ROWS = 240                                              # promises of the five documents
BUGS = {"A": 25, "R": 12, "L": 21, "H": 12, "G": 10, "S": 1, "J": 14, "P": 23, "I": 11}
TEST, QUOTATION = re.compile(r"`(tests/\w+\.py)::(\w+)(?:\[[^`]*\])?`"), re.compile(r'`([\w./-]+)` "(.+)"')


# ---------------------------------------------------------------------------------------------------------------------
# The tables

def table(heading):
    """The rows under a heading -> [[cell, ...]], without the two lines of the head; `\\|` is a bar within a cell."""
    lines = [line for line in TEXT.split(f"\n## {heading}\n")[1].split("\n## ")[0].splitlines() if line.startswith("|")]
    return [[cell.strip().replace("\0", "|") for cell in line.replace("\\|", "\0").strip("|").split("|")] for line in lines[2:]]


FEATURES, NOT_HERE = table("Features"), table("Bugs that are not here")


@lru_cache(maxsize=None)
def content(name):
    """A file of the repository with all white space as single blanks; of this table's own file only what stands outside of tables with proofs."""
    text = (ROOT / name).read_text(encoding="utf-8")
    if name == "dev/FEATURES.md":
        text = text.split("\n## Said nowhere else\n")[1]
    return " ".join(text.split())


@lru_cache(maxsize=None)
def functions_of(name):
    """The names of a test file's tests."""
    return {node.name for node in ast.walk(ast.parse((ROOT / name).read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def wrong_with(proof):
    """What is wrong with one proof, or None."""
    if test := TEST.fullmatch(proof):
        if not (ROOT / test[1]).is_file():
            return f"there is no {test[1]}"
        return None if test[2] in functions_of(test[1]) else f"{test[1]} has no {test[2]}"
    if quotation := QUOTATION.fullmatch(proof):
        if not (ROOT / quotation[1]).is_file():
            return f"there is no {quotation[1]}"
        return None if " ".join(quotation[2].split()) in content(quotation[1]) else f"{quotation[1]} does not say {quotation[2]!r}"
    return f"{proof!r} is neither a test nor a quotation"


def test_every_row_is_there_once():
    assert [row[0] for row in FEATURES] == [str(number) for number in range(1, ROWS + 1)] and {len(row) for row in FEATURES} == {4}
    assert [row[0] for row in NOT_HERE] == [f"{kind}{number}" for kind, count in BUGS.items() for number in range(1, count + 1)] and {len(row) for row in NOT_HERE} == {3}


def test_every_proof_stands_and_what_is_not_delivered_says_why():
    problems, missing = [], []
    for row in FEATURES + NOT_HERE:
        if row[-1].startswith("**not delivered:** "):
            missing.append(row[0])
            continue
        problems += [f"{row[0]}: {problem}" for proof in row[-1].split("<br>") if (problem := wrong_with(proof))]
    assert not problems, "\n".join(problems)
    assert missing == ["35"]                            # whoever adds one here has to say so


def test_every_file_that_a_row_names_is_there():
    named = {(row[0], name) for row in FEATURES for name in re.findall(r"`([^`]+)`", row[2])}
    assert len(named) > ROWS and not {(row, name) for row, name in named if not (ROOT / name).exists()}


@pytest.mark.parametrize("proof", ["`tests/test_features.py::test_nothing`", "`tests/test_nothing.py::test_x`", '`README.md` "this project has no readers"', '`NOTHING.md` "x"',
                                   '`dev/FEATURES.md` "Eight GPUs or nothing"', "the code"])
def test_a_proof_that_does_not_stand_is_found_out(proof):
    assert wrong_with(proof)


# ---------------------------------------------------------------------------------------------------------------------
# What rows rest on

FLAGS = {  # the keys that the stage scripts of the seeds have; -x is a short name. Left out: base_train's core_metric_* (base_eval measures CORE), mid_train's dry_run
    "scripts.tok_train": "max_chars doc_cap vocab_size", "nanochat.dataset": "num_files num_workers -n -w",
    "scripts.base_train": "run device_type depth max_seq_len num_iterations target_flops target_param_data_ratio device_batch_size total_batch_size embedding_lr unembedding_lr "
                          "weight_decay matrix_lr grad_clip warmup_ratio warmdown_ratio final_lr_frac eval_every eval_tokens sample_every model_tag",
    "scripts.base_loss": "device_batch_size split_tokens model_tag model_step device_type", "scripts.base_eval": "hf_path max_per_task",
    "scripts.mid_train": "run device_type model_tag step dtype num_iterations max_seq_len device_batch_size embedding_lr unembedding_lr matrix_lr init_lr_frac weight_decay eval_every "
                         "eval_tokens total_batch_size",
    "scripts.chat_sft": "run source model_tag step device_type dtype device_batch_size num_epochs num_iterations target_examples_per_step embedding_lr unembedding_lr matrix_lr "
                        "weight_decay init_lr_frac aqua_train_examples aqua_val_examples eval_every eval_steps eval_metrics_every eval_metrics_max_problems "
                        "sft_recipe ot_stop chat_ratio dolci_stop",
    "scripts.chat_rl": "run temperature max_new_tokens examples_per_step num_samples eval_every save_every eval_examples device_batch_size top_k source dtype num_epochs init_lr_frac "
                       "matrix_lr embedding_lr unembedding_lr weight_decay task max_steps seed model_tag step device_type kl_every",
    "scripts.chat_eval": "source task_name -i -a -d -t -m -n -k -b -g -s -x device_type",
    "scripts.chat_cli": "-i -g -s -p -t -k -d device_type", "scripts.chat_web": "-n -i -t -k -m -g -s -p -d device_type host"}


@pytest.mark.parametrize("module", FLAGS)
def test_the_seeds_flags_are_still_flags(module):
    source = (ROOT / f"{module.replace('.', '/')}.py").read_text(encoding="utf-8")
    config = next(node for node in ast.parse(source).body if isinstance(node, ast.ClassDef) and node.name == "Config")
    known = {field.target.id for field in config.body if isinstance(field, ast.AnnAssign)} | set(re.findall(r"#\s*\[(-\w)\]", source))
    assert not set(FLAGS[module].split()) - known


def test_every_variable_of_the_template_is_read_somewhere():
    template = (ROOT / ".env.template").read_text(encoding="utf-8")
    values = dict(re.findall(r"^(\w+)=(.*)$", template, re.MULTILINE))
    assert {"NANOCHAT_BASE_DIR", "AQUA_DATA_DIR", "WANDB_API_KEY", "WANDB_PROJECT", "WANDB_ENTITY", "WANDB_MODE", "WANDB_RUN", "GCS_BUCKET", "GCP_PROJECT_ID",
            "GOOGLE_APPLICATION_CREDENTIALS", "LAMBDA_API_KEY", "HYPERBOLIC_API_KEY", "HYPERBOLIC_REGION", "HYPERBOLIC_MAX_PRICE"} <= set(values)
    assert not any(values.values())                     # no placeholder is a live value
    code = "\n".join(path.read_text(encoding="utf-8") for path in [*(ROOT / "nanochat").rglob("*.py"), *(ROOT / "scripts").glob("*"), *ROOT.glob("*.sh")] if path.suffix in (".py", ".sh"))
    read_by_libraries = {"HF_TOKEN", "GOOGLE_APPLICATION_CREDENTIALS", "WANDB_API_KEY"}
    assert not [name for name in values if name not in read_by_libraries and not re.search(rf'"{name}"|\$\{{?{name}\b', code)]


def test_there_are_no_submodules():
    if not (ROOT / ".git").exists():
        pytest.skip("this is no git checkout")
    assert not (ROOT / ".gitmodules").exists()
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True)
    assert listed.returncode != 0 or not re.search(r"^160000 ", listed.stdout, re.MULTILINE)


def test_the_run_scripts_clone_nothing_and_hide_no_failure():
    for path in [*ROOT.glob("run_*.sh"), ROOT / "scripts/pipeline.sh", ROOT / "scripts/bootstrap.sh"]:
        code = "\n".join(line.split("#")[0] for line in path.read_text(encoding="utf-8").splitlines() if not line.lstrip().startswith("#"))
        assert not re.search(r"git clone|wandb login|\beval [\"$]|source \.env|(python|\$LAUNCH|uv|wait)\b[^\n]*\|\| true", code), path.name
        assert path.parent == ROOT / "scripts" or "set -euo pipefail" in code
        assert all("|| die" in line or line.endswith("\\") for line in code.splitlines() if "curl " in line), path.name


def test_every_test_asserts_something():
    """An assert, pytest.raises or pytest.fail, in the test itself or in a function of this repository that it calls."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "tests").rglob("*.py")}
    calls, judging = {}, set()                          # of each function: the names of what it calls; the names of those that judge by themselves
    for tree in trees.values():
        for function in [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]:
            inside = list(ast.walk(function))
            called = {ast.unparse(node.func).rpartition(".")[2] for node in inside if isinstance(node, ast.Call)}
            calls.setdefault(function.name, set()).update(called)
            if called & {"raises", "fail", "assert_close", "assert_array_equal", "assert_allclose"} or any(isinstance(node, ast.Assert) for node in inside):
                judging.add(function.name)
    for _ in range(3):
        judging |= {name for name, called in calls.items() if called & judging}
    tests = {name for name in calls if name.startswith("test_")}
    assert len(tests) > 800 and not tests - judging


def test_identity_and_spelling_stand_in_a_mixture(tmp_path):
    from dev.integration_training.base_config import DatasetSpec
    from dev.integration_training.rollouts.datasets import build_mixture
    path = tmp_path / "identity.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Who are you?"}, {"role": "assistant", "content": "A small model."}]}\n' * 3)
    empty = {"split": "train", "subset": None, "max_samples": None, "filepath": None, "size": None, "repeat": 1}
    specs = [DatasetSpec(**{**empty, **values}) for values in ({"name": "custom_json", "filepath": str(path), "max_samples": 2}, {"name": "SimpleSpelling", "size": 5},
                                                               {"name": "SpellingBee", "size": 4, "repeat": 2})]
    assert len(build_mixture(specs, 1)) == 2 + 5 + 8


@pytest.mark.skipif(not (Path(env("NANOCHAT_TEST_DATA", ROOT.parent / "shared/data")).parent / "spec/reference-systems.md").is_file(), reason="the list of promises is not here")
def test_the_numbers_are_those_of_the_list():
    listed = (Path(env("NANOCHAT_TEST_DATA", ROOT.parent / "shared/data")).parent / "spec/reference-systems.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| (\d+) \|", listed, re.MULTILINE) == [row[0] for row in FEATURES]
    bugs = listed.split("### 2.1 ")[1].split("\n## 5")[0]
    assert set(re.findall(r"\*\*([A-Z]\d+)\b", bugs)) == {row[0] for row in NOT_HERE}
