"""What is saved is what is loaded; the newest whole checkpoint is found; torn, foreign and mismatched ones are named and skipped."""
import json
import os
import pickle
import random
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch

from nanochat import checkpoint_manager as manager
from nanochat.common import write_atomic
from nanochat.compute import Compute
from nanochat.gpt import GPT, config_from_depth
from nanochat.optim import MuonAdamW
from nanochat.training import LoopState

CPU = Compute(torch.device("cpu"), torch.float32)
TOKENIZER = SimpleNamespace(fingerprint="f" * 64)


@dataclass(frozen=True)
class Config:
    lr: float = 0.1
    save_every: int = 5
    resume: bool = True
    overwrite: bool = False


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("NANOCHAT_BASE_DIR", str(tmp_path))
    monkeypatch.setattr(manager, "get_tokenizer", lambda: TOKENIZER)
    model = GPT(config_from_depth(1, 64, 16, head_dim=32))
    model.init_weights()
    optimizer = MuonAdamW(model, CPU)

    def train(step):
        inputs = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(step))
        model(inputs[:, :-1], inputs[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()

    def save(step, **more):
        state = LoopState(step=step, tokens=10 * step, loader={"position": step})
        manager.save_checkpoint("base", "d1", state, Config(), CPU, model, optimizer, TOKENIZER, **{"keep_last": -1, **more})

    return SimpleNamespace(model=model, optimizer=optimizer, train=train, save=save, folder=tmp_path / "base_checkpoints" / "d1")


def weights(model):
    return torch.cat([weight.detach().flatten() for weight in model.parameters()]).clone()


def start_again(config=Config()):
    model = GPT(config_from_depth(1, 64, 16, head_dim=32))
    model.init_weights(seed=9)
    optimizer = MuonAdamW(model, CPU)
    return model, optimizer, manager.start_or_resume("base", "d1", config, CPU, model, optimizer)


def test_what_is_saved_is_what_is_loaded(run):
    run.train(1)
    run.save(3, finished=True)
    model, tokenizer, meta = manager.load_model("base", device="cpu", phase="eval", dtype="float32")
    assert torch.equal(weights(model), weights(run.model))
    assert (meta["step"], meta["finished"], model.training) == (3, True, False)
    newest = manager.newest_whole(run.folder)
    assert newest["finished"] and newest["step"] == 3


def test_a_resumed_run_is_one_that_never_stopped(run):
    run.train(1)
    run.save(1)
    run.train(2)
    run.train(3)
    never_stopped = weights(run.model)
    model, optimizer, state = start_again()
    assert (state.step, state.tokens, state.loader) == (1, 10, {"position": 1})
    for step in (2, 3):
        inputs = torch.randint(0, 64, (2, 8), generator=torch.Generator().manual_seed(step))
        model(inputs[:, :-1], inputs[:, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert torch.equal(weights(model), never_stopped)


@pytest.mark.parametrize("damage", ["truncated model", "flipped byte", "no model", "torn meta", "no optimizer"])
def test_a_damaged_checkpoint_is_skipped_for_the_newest_whole_one(run, damage, capsys):
    run.save(1)
    run.train(1)
    run.save(2)
    model_file, meta_file = run.folder / "model_000002.pt", run.folder / "meta_000002.json"
    data = model_file.read_bytes()
    if damage == "truncated model":
        model_file.write_bytes(data[:-100])
    elif damage == "flipped byte":
        model_file.write_bytes(data[:1000] + bytes([data[1000] ^ 1]) + data[1001:])
    elif damage == "no model":
        model_file.unlink()
    elif damage == "torn meta":
        meta_file.write_text(meta_file.read_text()[:-30])
    else:
        (run.folder / "optim_000002_rank0.pt").unlink()
    assert start_again()[2].step == 1
    assert "skipping checkpoint 2" in capsys.readouterr().out


def test_a_checkpoint_without_its_meta_file_does_not_exist(run):
    run.save(1)
    (run.folder / "meta_000001.json").unlink()
    assert start_again()[2].step == 0
    with pytest.raises(ValueError, match="there is no base checkpoint"):
        manager.load_model("base")


def test_a_pickle_is_never_executed(run, tmp_path):
    class Attack:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "hacked"),)
    path = tmp_path / "model.pt"
    torch.save({"weight": Attack()}, path)
    with pytest.raises(ValueError, match="was not loaded"):
        manager.read_tensors(path)
    path.write_bytes(pickle.dumps(Attack()))
    with pytest.raises(ValueError, match="was not loaded"):
        manager.read_tensors(path)
    assert not (tmp_path / "hacked").exists()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_any_bytes_at_all_are_read_or_refused_by_name(tmp_path):
    """What torch's unpickler raises on broken bytes is any of ten kinds of error; the caller sees one."""
    draw, path, refused, written = random.Random(1), tmp_path / "model.pt", 0, []
    for whole in (True, False):
        torch.save({"weight": torch.ones(3, 4), "step": 5}, path, _use_new_zipfile_serialization=whole)
        written.append(path.read_bytes())
    written.append(pickle.dumps({"weight": [1, (2, 3)]}, protocol=2))
    for _ in range(2000):
        content = bytearray(draw.choice([draw.randbytes(draw.choice([1, 50, 500])), *written]))
        for _ in range(draw.choice([1, 2, 5, 20])):
            content[draw.randrange(len(content))] = draw.randrange(256)
        path.write_bytes(content[:draw.choice([len(content), len(content), draw.randrange(len(content))])])
        try:
            manager.read_tensors(path)
        except ValueError as error:
            refused += str(path) in str(error) and "was not loaded" in str(error)
    assert refused > 1500


def test_only_the_newest_are_kept_and_leftovers_of_a_kill_go(run):
    (run.folder).mkdir(parents=True)
    (run.folder / "model_000007.pt").write_bytes(b"half")
    (run.folder / ".model_000008.pt.1.partial").write_bytes(b"half")
    for step in (1, 2, 3):
        run.save(step, keep_last=2)
    assert manager.saved_steps(run.folder) == [2, 3]
    assert sorted(path.name for path in run.folder.iterdir()) == [
        "meta_000002.json", "meta_000003.json", "model_000002.pt", "model_000003.pt", "optim_000002_rank0.pt", "optim_000003_rank0.pt"]


def test_an_earlier_run_is_neither_overwritten_nor_continued_unasked(run):
    run.save(4)
    with pytest.raises(ValueError, match="--resume goes on from there, --overwrite deletes"):
        start_again(Config(resume=False))
    with pytest.raises(ValueError, match="lr=0.1, now asked for lr=0.2"):
        start_again(Config(lr=0.2))
    assert start_again(Config(save_every=9))[2].step == 4  # how often to save does not change what is learned
    assert start_again(Config(resume=False, overwrite=True))[2].step == 0
    assert manager.saved_steps(run.folder) == []


def test_another_tokenizer_and_an_unknown_stage_are_refused(run, monkeypatch):
    run.save(1)
    monkeypatch.setattr(manager, "get_tokenizer", lambda: SimpleNamespace(fingerprint="e" * 64))
    with pytest.raises(ValueError, match="was trained with tokenizer ffffffffffff"):
        manager.load_model("base")
    with pytest.raises(ValueError, match="no stage 'chatsft'"):
        manager.load_model("chatsft")


def test_a_process_that_torchrun_restarted_resumes_whatever_its_flags_say(run):
    run.save(1)
    model = GPT(config_from_depth(1, 64, 16, head_dim=32))
    restarted = Compute(torch.device("cpu"), torch.float32, restarts=1)
    state = manager.start_or_resume("base", "d1", Config(resume=False, overwrite=True), restarted, model, MuonAdamW(model, CPU))
    assert state.step == 1 and torch.equal(weights(model), weights(run.model))


def test_nodes_that_do_not_share_their_base_directory_are_told_so_instead_of_beginning_anew(run, monkeypatch):
    run.save(4)
    monkeypatch.setattr(Compute, "gather_objects", lambda self, value: [value, -1])  # rank 1 stands on a node that sees no checkpoint
    with pytest.raises(ValueError, match="rank 0 finds base checkpoint 4 in .*, rank 1 -1 .*: all nodes must share one NANOCHAT_BASE_DIR"):
        start_again()
    assert manager.saved_steps(run.folder) == [4]


def test_a_foreign_meta_file_is_said_to_be_foreign(run):
    run.folder.mkdir(parents=True)
    write_atomic(run.folder / "meta_000005.json", json.dumps({"step": 5}))
    with pytest.raises(ValueError, match="not a checkpoint of this project"):
        manager.read_meta(run.folder, 5)
