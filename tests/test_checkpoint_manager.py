"""What is saved is what is loaded; the newest whole checkpoint is found; torn, foreign and mismatched ones are named and skipped."""
import dataclasses
import json
import os
import pickle
import random
import threading
from dataclasses import dataclass
from pathlib import Path
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


def start_again(config=Config(), tokenizer=TOKENIZER, parent=None, compute=CPU):
    model = GPT(config_from_depth(1, 64, 16, head_dim=32))
    model.init_weights(seed=9)
    optimizer = MuonAdamW(model, CPU)
    return model, optimizer, manager.start_or_resume("base", "d1", config, compute, model, optimizer, tokenizer, parent)


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
    state = manager.start_or_resume("base", "d1", Config(resume=False, overwrite=True), restarted, model, MuonAdamW(model, CPU), TOKENIZER)
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


# ---------------------------------------------------------------------------------------------------------------------
# The run that a checkpoint belongs to

PARENT, RETRAINED = ({"stage": "mid", "model_tag": "d1", "step": 7, "files": {"model_000007.pt": letter * 64}, "config": {}} for letter in "ab")
OTHERS = {"config": ({"config": Config(lr=0.2)}, "step 4 was trained with lr=0.1, now asked for lr=0.2"),
          "tokenizer": ({"tokenizer": SimpleNamespace(fingerprint="e" * 64)}, "step 4 was trained with tokenizer ffffffffffff, but .* holds eeeeeeeeeeee"),
          "parent": ({"parent": RETRAINED}, "step 4 was trained from mid d1 of step 7 with SHA-256 aaaaaaaaaaaa, but now there is mid d1 of step 7 with SHA-256 bbbbbbbbbbbb")}


def changed(**asked):
    """What `start_again` is asked for: this run's own, but for these."""
    asked = {"config": Config(), "parent": PARENT, **asked}
    return asked, {**asked, "config": dataclasses.replace(asked["config"], overwrite=True)}


@pytest.mark.parametrize("what", OTHERS)
def test_only_the_run_that_a_checkpoint_belongs_to_goes_on_from_it(run, capsys, what):
    """Another one is refused, or, with overwrite as well, starts over."""
    run.save(4, parent=PARENT)
    for own in changed():
        assert start_again(**own)[2].step == 4
    other, other_may_overwrite = changed(**OTHERS[what][0])
    with pytest.raises(ValueError, match=f"cannot be resumed: {OTHERS[what][1]}; .* --overwrite starts over, another --output-tag"):
        start_again(**other)
    assert manager.saved_steps(run.folder) == [4] and "starting" not in capsys.readouterr().out
    model, _, state = start_again(**other_may_overwrite)
    assert state == LoopState() and not torch.equal(weights(model), weights(run.model)) and list(run.folder.iterdir()) == []
    assert "starting base d1 over: step 4 was trained" in capsys.readouterr().out


@pytest.mark.parametrize("what", OTHERS)
def test_however_far_a_killed_run_had_cleared_the_old_one_away_the_same_command_again_starts_over(run, monkeypatch, what):
    unlink = Path.unlink
    for survived in range(9):
        for step in (3, 4):
            run.save(step, parent=PARENT)
        allowed = iter(range(survived))

        def unlink_or_die(path, missing_ok=False):
            if next(allowed, None) is None:
                raise KeyboardInterrupt
            unlink(path, missing_ok)

        again, first = changed(**OTHERS[what][0])
        first = {**first, "config": dataclasses.replace(first["config"], resume=False)}
        again = {**again, "config": dataclasses.replace(again["config"], overwrite=True)}
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", unlink_or_die)
            if survived < 6:
                with pytest.raises(KeyboardInterrupt):
                    start_again(**first)
            else:
                start_again(**first)
        assert len(list(run.folder.iterdir())) == max(0, 6 - survived)
        assert start_again(**again)[2] == LoopState() and list(run.folder.iterdir()) == []


def test_a_torn_checkpoint_alone_is_not_buried_under_a_new_run_unasked(run):
    run.save(4)
    (run.folder / "optim_000004_rank0.pt").unlink()  # as one that was fetched: it can start a stage, not go on
    with pytest.raises(ValueError, match="cannot be resumed: it holds checkpoints, but .* none to go on from; .* --overwrite starts over, another --model-tag"):
        start_again()
    assert manager.saved_steps(run.folder) == [4]
    assert start_again(Config(overwrite=True))[2] == LoopState() and manager.saved_steps(run.folder) == []


def test_a_process_that_torchrun_restarted_before_it_had_cleared_the_old_run_starts_over(run):
    run.save(4)
    restarted = Compute(torch.device("cpu"), torch.float32, restarts=1)
    with pytest.raises(ValueError, match="lr=0.1, now asked for lr=0.2"):
        start_again(Config(lr=0.2, resume=False), compute=restarted)
    assert start_again(Config(lr=0.2, resume=False, overwrite=True), compute=restarted)[2] == LoopState()


def test_a_checkpoint_older_than_a_field_or_a_knob_is_resumed_by_its_run(run):
    run.save(4, parent=PARENT)
    path = run.folder / "meta_000004.json"
    meta = json.loads(path.read_text())
    assert meta["parent"] == {"stage": "mid", "model_tag": "d1", "step": 7, "model_sha256": "a" * 64}
    del meta["parent"], meta["tokenizer"], meta["config"]["lr"]
    path.write_text(json.dumps(meta))
    assert start_again(parent=RETRAINED)[2].step == 4
    with pytest.raises(ValueError, match="lr=0.1, now asked for lr=0.2"):
        start_again(Config(lr=0.2), parent=RETRAINED)
    path.write_text(json.dumps({**meta, "config": {**meta["config"], "task": "AQUA"}}))  # a knob this script does not have: it is another's
    with pytest.raises(ValueError, match="lr=None, now asked for lr=0.1"):
        start_again(parent=RETRAINED)


class Rank(SimpleNamespace):
    """One of two ranks that are threads."""
    world_size, restarts, met, words = 2, 0, threading.Barrier(2, timeout=300), {}

    @property
    def is_master(self):
        return self.rank == 0

    def barrier(self):
        self.met.wait()

    def gather_objects(self, value):
        self.words[self.rank] = value
        self.barrier()
        heard = [self.words[0], self.words[1]]
        self.barrier()
        return heard


def on_two_ranks(work):
    """What `work(rank)` returns or raises on each of them."""
    found = [None, None]

    def thread(number):
        try:
            found[number] = work(Rank(rank=number))
        except ValueError as error:
            found[number] = error

    threads = [threading.Thread(target=thread, args=(number,)) for number in (0, 1)]
    for one in threads:
        one.start()
    for one in threads:
        one.join()
    return found


@pytest.mark.parametrize("sees_it", [(0,), (1,), (0, 1)])
@pytest.mark.parametrize("what", OTHERS)
def test_two_ranks_decide_alike_whichever_of_them_sees_the_difference(run, monkeypatch, what, sees_it):
    """And none is still reading when one clears."""
    on_two_ranks(lambda rank: manager.save_checkpoint("base", "d1", LoopState(step=4), Config(), rank, run.model, run.optimizer, TOKENIZER, parent=PARENT))
    looked, clear, other_run = [], manager.clear, manager.other_run
    monkeypatch.setattr(manager, "other_run", lambda *asked: looked.append(1) or other_run(*asked))
    monkeypatch.setattr(manager, "clear", lambda folder: clear(folder) if len(looked) == 2 else pytest.fail(f"{len(looked)} of 2 ranks have looked"))

    def start(overwrite):
        looked.clear()
        own, other = changed(), changed(**OTHERS[what][0])
        return on_two_ranks(lambda rank: start_again(**(other if rank.rank in sees_it else own)[overwrite], compute=rank)[2])

    first, second = start(overwrite=False)
    assert isinstance(first, ValueError) and str(first) == str(second) and "cannot be resumed" in str(first) and manager.saved_steps(run.folder) == [4]
    assert start(overwrite=True) == [LoopState(), LoopState()] and list(run.folder.iterdir()) == []
