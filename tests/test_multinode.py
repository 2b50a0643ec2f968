"""Two nodes are one process; a job that lost a rank goes on from its newest whole checkpoint and ends at the same bits, or ends at once and says why."""
import shutil
import time
from contextlib import nullcontext

import pytest
import torch

from tests import pipeline
from tests.multinode import Job, program, two_nodes
from tests.test_stages import checkpoint, equal, logged


GRPO = {"num_steps": 2, "save_every": 1, "eval_every": -1}  # its two steps make eight updates


@pytest.fixture(scope="module")
def alone(prepared, tmp_path_factory):
    """stages -> a base directory in which one process ran them, under the tag d2; all of them or the first alone."""
    made = {}

    def run(*stages):
        if stages not in made:
            made[stages] = tmp_path_factory.mktemp("alone") / "base"
            shutil.copytree(prepared, made[stages])
            with pytest.MonkeyPatch.context() as patch:
                patch.setenv("NANOCHAT_BASE_DIR", str(made[stages]))
                for stage in stages:
                    pipeline.run_stage(stage, **GRPO if stage == "grpo" else {})
        return made[stages]

    return run


def same_run(folder, stage, tag, alone, alone_tag="d2", step=6, weights=1e-3):
    """The same tokens, the same loss curve to 1e-4, near weights at the end."""
    for key, tolerance in (("train/loss", 1e-4), ("train/tokens", 0), ("num_tokens", 0), ("rl/acc", 0)):
        theirs = logged(alone, stage, key, alone_tag)
        assert theirs or key in ("num_tokens", "rl/acc", "train/tokens")
        assert logged(folder, stage, key, tag) == pytest.approx(theirs, abs=tolerance), (stage, key)
    mine, theirs = checkpoint(folder, stage, step, tag), checkpoint(alone, stage, step, alone_tag)
    for name in theirs:
        torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=weights, msg=lambda text: f"{stage} {name}: {text}")


def test_two_nodes_are_one_process(alone, prepared, tmp_path):
    folder = shutil.copytree(prepared, tmp_path / "base")
    with two_nodes() as nodes:
        job = Job(nodes, tmp_path, program([(folder, "base", {})]))
        assert job.wait() == [0, 0], job.output()
    assert "on 2 x cpu" in job.output()
    same_run(folder, "base", "d2", alone("base"))


@pytest.mark.slow
def test_every_stage_on_two_nodes_is_that_stage_in_one_process(alone, tmp_path):
    whole = alone(*pipeline.STAGES, "grpo")
    folder = shutil.copytree(whole, tmp_path / "base")
    from_parent = {"model_tag": "d2", "output_tag": "two"}
    runs = [(folder, "base", {"model_tag": "two"}), *((folder, stage, from_parent) for stage in ("mid", "sft", "rl")),
            (folder, "grpo", {"model_tag": "d2", "output_tag": "two-g", **GRPO})]
    with two_nodes() as nodes:
        job = Job(nodes, tmp_path, program(runs))
        assert job.wait() == [0, 0], job.output()
    for stage in pipeline.STAGES:
        same_run(folder, stage, "two", whole)
    same_run(folder, "rl", "two-g", whole, "g2", step=1, weights=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("nodes, victim, stage", [(1, 1, "base"), (1, 0, "sft"), (2, 1, "base"), (2, 0, "mid"), (2, 1, "rl")])
def test_a_job_restarted_after_a_killed_rank_ends_at_the_bits_of_one_that_never_stopped(alone, tmp_path, nodes, victim, stage):
    """Two ranks on one node, or on two that share their base directory; also where only one node saw the failure and the other a new round."""
    whole = alone(*pipeline.STAGES)
    never, folder = (shutil.copytree(whole, tmp_path / name) for name in ("never", "folder"))
    death = {"how": "kill", "rank": victim, "step": 5, "marker": str(tmp_path / "died")}

    def run(folder, death, places):
        job = Job(places, tmp_path, program([(folder, stage, {"overwrite": True, "device_type": "cpu"})], death), "--max-restarts=2", per_node=3 - nodes)
        assert set(job.wait()) == {0}, job.output()
        return job.output()

    with two_nodes() if nodes == 2 else nullcontext() as places:
        assert "resuming" not in run(never, None, places)
        assert f"resuming {stage} d2 at step 4" in run(folder, death, places)
    assert (tmp_path / "died").exists()
    assert equal(checkpoint(folder, stage), checkpoint(never, stage))
    assert logged(folder, stage, "train/loss") == logged(never, stage, "train/loss")


def forget(folder, stage, step, tag):
    """As if a kill had come before this step was saved."""
    for path in (folder / pipeline.FOLDERS[stage] / tag).glob(f"*_{step:06d}*"):
        path.unlink()


@pytest.mark.slow
def test_the_number_of_ranks_may_change_in_the_middle_of_every_stage_divided_or_not(alone, tmp_path, monkeypatch):
    """From one process to two ranks, and from two ranks to one process: both end where one process ends."""
    whole, cases = alone(*pipeline.STAGES, "grpo"), {}
    for stage, shard in (("sft", "none"), ("rl", "none"), ("grpo", "none"), *((stage, "full") for stage in (*pipeline.STAGES, "grpo"))):
        room, tag, last = ("rl", "g2", 2) if stage == "grpo" else (stage, "d2", 6)
        folder = shutil.copytree(whole, tmp_path / f"{stage}-{shard}")
        cases[folder] = stage, {"shard": shard, **(GRPO if stage == "grpo" else {})}, room, tag, last

    def two_ranks(**changes):
        job = Job(None, tmp_path, program([(folder, stage, {**knobs, **changes}) for folder, (stage, knobs, *_) in cases.items()]), per_node=2)
        assert job.wait() == [0], job.output()
        return job.output()

    def check():
        for folder, (_, _, room, tag, last) in cases.items():
            same_run(folder, room, tag, whole, tag, last)

    for folder, (_, _, *place) in cases.items():
        room, tag, last = place
        forget(folder, room, last, tag)
    output = two_ranks(resume=True)
    assert output.count("at step 4, saved by 1 ranks, on 2") == 6 and output.count("resuming rl g2 at step 1, saved by 1 ranks, on 2") == 2
    check()
    two_ranks(overwrite=True)
    for folder, (stage, knobs, room, tag, last) in cases.items():
        forget(folder, room, last, tag)
        monkeypatch.setenv("NANOCHAT_BASE_DIR", str(folder))
        pipeline.run_stage(stage, resume=True, **knobs)
    check()


@pytest.mark.slow
@pytest.mark.parametrize("how, reason", [("kill", "Signal 9 (SIGKILL)"), ("exit", "exitcode  : 3"), ("error", "rank 1 of 2 on"), ("hang", "rank 0 of 2 on")])
@pytest.mark.parametrize("nodes", [1, 2])
def test_a_rank_that_dies_ends_the_job_and_the_console_says_why(prepared, tmp_path, nodes, how, reason):
    """A rank that hangs is given up after NANOCHAT_TIMEOUT seconds; all others at once."""
    folder = shutil.copytree(prepared, tmp_path / "base")
    death = {"how": how, "rank": 1, "step": 2, "marker": str(tmp_path / "died")}
    with two_nodes() if nodes == 2 else nullcontext() as places:
        job = Job(places, tmp_path, program([(folder, "base", {})], death), per_node=3 - nodes, environment={"NANOCHAT_TIMEOUT": "8"} if how == "hang" else None)
        codes = job.wait()
        seconds = time.time() - float((tmp_path / "died").read_text())
    print(f"{how} on {nodes} node(s): ended with {codes} after {seconds:.1f} s")
    assert 0 not in codes and seconds < 90, job.output()
    assert reason in job.output(), job.output()
    if how == "error":
        assert "failed: MemoryError: no memory left, says the test" in job.output()
