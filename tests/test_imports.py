"""The arrows go one way, each side effect has one owner, importing does nothing, and nothing names this or that machine."""
import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ("nanochat", "tasks", "scripts", "dev")  # a room may import itself and those before it
FILES = sorted(path for room in ROOMS for path in (ROOT / room).rglob("*.py"))
names = [str(path.relative_to(ROOT)) for path in FILES]


def imports(path):
    """Every module that a file names in an import, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def calls(path):
    """Dotted names of everything called: torch.save, os.environ.get, ..."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, (ast.Attribute, ast.Name)):
            yield ast.unparse(node)


@pytest.mark.parametrize("path", FILES, ids=names)
def test_imports_go_one_way(path):
    room = path.relative_to(ROOT).parts[0]
    for module in imports(path):
        other = module.split(".")[0]
        if other in ROOMS:
            assert ROOMS.index(other) <= ROOMS.index(room), f"{path.name} in {room}/ imports {module}"
        if room == "scripts" and other == "scripts":
            assert path.name == "sft_train.py", f"{path.name} imports {module}: what two scripts share moves inward"


@pytest.mark.parametrize("room", ["rl", "interpretability", "cloud", "huggingface"])
def test_a_side_room_can_be_locked(room):
    """The corridor never enters it: only scripts and the room itself do."""
    for path in FILES:
        if path.relative_to(ROOT).parts[0] in ("nanochat", "tasks") and room not in path.relative_to(ROOT).parts:
            assert not any(module.startswith(f"nanochat.{room}") for module in imports(path)), path


OWNERS = {
    r"os\.environ|os\.getenv": {"nanochat/common.py"},
    r"torch\.save": {"nanochat/checkpoint_manager.py"},
    r"wandb\.(init|log|login)": {"nanochat/run_logger.py"},
    r"(dist|torch\.distributed)\.(all_reduce|all_gather\w*|reduce_scatter\w*|broadcast\w*|barrier|init_process_group)": {"nanochat/compute.py", "nanochat/optim.py"},
    r"subprocess\.\w+": {"nanochat/execution.py", "nanochat/cloud/", "nanochat/report.py", "dev/"},
    r"pickle\.(load|loads|Unpickler)": {"nanochat/reference_tokenizer.py"},
    r"(builtins\.)?(eval|exec)": set(),
}


@pytest.mark.parametrize("effect", OWNERS)
def test_each_side_effect_has_one_owner(effect):
    for path, name in zip(FILES, names):
        used = {call for call in calls(path) if re.fullmatch(effect, call)}
        assert not used or any(name.startswith(owner) for owner in OWNERS[effect]), f"{name} uses {used}"


def test_importing_everything_prints_nothing_and_reads_no_arguments():
    modules = [name.removesuffix(".py").removesuffix("/__init__").replace("/", ".") for name in names if not name.startswith("dev/")]
    code = "import importlib, sys; sys.argv = ['x', '--nonsense']\n" + "\n".join(f"importlib.import_module({module!r})" for module in modules)
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert (result.returncode, result.stdout) == (0, ""), result.stdout + result.stderr


def loaded_after(code, heavy):
    """Which of these modules a fresh process holds once it has run the code."""
    code = f"import sys\n{code}\nprint(*sorted(set({heavy}) & set(sys.modules)))"
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=300, check=True).stdout.split()


def test_stages_without_tensors_import_no_torch():
    """chat_eval only to compare answers that are there."""
    assert loaded_after("import nanochat.report, scripts.chat_eval, scripts.contamination, scripts.prepare_offline, scripts.tok_train", ["torch", "matplotlib"]) == []


def test_stages_import_what_they_use_and_sample_without_a_compiler():
    """Each process of the pipeline pays for its imports again: sharding, pictures, parquet and the compiler are there for those who ask for them."""
    code = """
import scripts.base_loss, scripts.base_train, scripts.chat_eval, scripts.chat_rl, scripts.chat_sft, scripts.mid_train, scripts.reasoning_eval
from nanochat.gpt import GPT, GPTConfig, frozen_gpt
sizes = GPTConfig(sequence_len=8, vocab_size=64, n_layer=1, n_head=1, n_kv_head=1, n_embd=32)
frozen_gpt(sizes, scripts.chat_rl.compute_init("cpu", "float32").dtype, GPT(sizes).state_dict())
"""
    assert loaded_after(code, ["torch._dynamo", "torch.distributed.fsdp", "sympy", "matplotlib", "pyarrow", "datasets", "transformers", "wandb"]) == []


def test_no_machine_paths_and_no_secrets_are_tracked():
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    if not tracked:
        pytest.skip("not a git checkout")
    assert "uv.lock" not in tracked and ".env" not in tracked
    for name in tracked:
        text = (ROOT / name).read_text(encoding="utf-8", errors="replace") if (ROOT / name).is_file() else ""
        assert str(Path.home()) + "/" not in text, name
        assert not re.search(r"hf_[A-Za-z0-9]{30,}|sk-[A-Za-z0-9]{40,}", text), name
