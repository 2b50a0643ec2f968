"""A model divided over two ranks learns what a whole one does, in every stage, bit by bit, writes the same files, and takes half the memory on each."""
import json
import shutil

import pytest
import torch

from nanochat.compute import Compute
from nanochat.gpt import GPT, config_from_depth
from nanochat.sharding import place
from tests import pipeline
from tests.multinode import Job, program
from tests.test_multinode import same_run
from tests.test_stages import checkpoint, equal, logged


@pytest.fixture(scope="module")
def ran(prepared, tmp_path_factory):
    """(what tests/sharded.py found, its base directory, its output): one process ran base, mid and SFT under the tag d2, two ranks the rest."""
    place = tmp_path_factory.mktemp("sharded")
    folder = shutil.copytree(prepared, place / "base")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("NANOCHAT_BASE_DIR", str(folder))
        for stage in ("base", "mid", "sft"):
            pipeline.run_stage(stage)
    job = Job(None, place, ["tests.sharded", str(folder), str(place / "result.json")], per_node=2)
    assert job.wait(1800) == [0], job.output()
    return json.loads((place / "result.json").read_text()), folder, job.output()


def test_a_divided_model_takes_the_same_steps_bit_by_bit(ran):
    """Loss, gradient norm, weights and optimizer state; where gradients of several micro-batches add up, in another order of the sums."""
    assert ran[0]["exact"] == {"curve": 0, "weights": 0, "state": 0}
    for run in ("accumulated", "bfloat16"):
        assert ran[0][run]["curve"] < 1e-5 and ran[0][run]["weights"] < 1e-4 and ran[0][run]["state"] < 1e-6, ran[0][run]


def test_weights_gradients_and_optimizer_state_of_a_divided_model_are_half_on_each_of_two_ranks(ran):
    parameters, none, full = (ran[0]["bytes"][name] for name in ("parameters", "none", "full"))
    one_process = 2 * parameters + 2 * (none - 2 * parameters)  # of whole models too, two ranks halve the optimizer state
    print(f"bytes of weights, gradients and optimizer state: one process {one_process:,}, rank 0 of 2 {none:,}, divided {full:,}")
    assert 3 * parameters < one_process and full < 0.51 * one_process and full < 0.63 * none


def test_whole_weights_go_into_a_divided_model_and_come_out_of_it(ran):
    assert ran[0]["copy"] == 0 and ran[0]["loaded"] == 0 and ran[0]["kept"] == [True, True, True]


@pytest.mark.parametrize("stage", ["base", "mid", "sft"])
def test_a_stage_divided_over_two_ranks_is_that_stage_in_one_process(ran, stage):
    same_run(ran[1], stage, "full", ran[1])


def test_a_run_may_go_from_divided_to_whole_and_back_and_ends_at_the_same_bits(ran):
    _, folder, output = ran
    ends = [checkpoint(folder, "base", tag="full")]
    for tag in ("full-none", "none-full", "full-full"):
        assert f"resuming base {tag} at step 4" in output
        ends += [*kept(folder / "base_checkpoints" / tag, 1), checkpoint(folder, "base", tag=tag)]
        assert logged(folder, "base", "train/loss", tag) == logged(folder, "base", "train/loss", "full")
    assert all(equal(ends[0], end) for end in ends[1:])


def numbers_of(folder, tag):
    """{(step, name): number} of all that an RL run logged but what a clock says."""
    found = {}
    for record in map(json.loads, (folder / "runs" / f"rl_{tag}.jsonl").read_text().splitlines()):
        if "step" in record:
            found |= {(record["step"], name): value for name, value in record.items() if not name.startswith(("time", "tokens_per_s", "text", "image"))}
    return found


def test_a_divided_policy_takes_the_same_steps_bit_by_bit_under_every_algorithm_and_kl(ran):
    """Also where one rank has nothing to learn from; where ranks make several passes, and not equally many, the sums run in another order."""
    found = ran[0]["policy"]
    for case in ("every algorithm", "a silent rank"):
        assert [found[case][what] for what in ("curve", "weights", "state")] == [0, 0, 0], case
    for case in ("unequal passes", "bfloat16"):
        assert found[case]["curve"] < 1e-4 and found[case]["weights"] < 1e-4 and found[case]["state"] < 1e-6, found[case]
    assert found["every algorithm"]["passes"] == [[1] * 9] * 2 and found["a silent rank"]["passes"] == [[1] * 6, [0] * 6]
    mine, theirs = found["unequal passes"]["passes"]
    assert sum(mine) > sum(theirs) > 0 in theirs
    for case in found.values():
        assert case["copy"] == 0 and case["bytes"]["full"] < 0.63 * case["bytes"]["none"]


def test_chat_rl_and_chat_grpo_divided_end_at_the_bits_of_whole_ones(ran):
    _, folder, output = ran
    for stage, last in (("rl", 6), ("grpo", 2)):
        none, full = numbers_of(folder, f"{stage}-none"), numbers_of(folder, f"{stage}-full")
        assert none == full and {"train/loss", "kl", "entropy", "grad_norm"} <= {name for _, name in none}
        assert equal(*(checkpoint(folder, "rl", last, f"{stage}-{way}") for way in ("none", "full")))
        assert not equal(checkpoint(folder, "rl", last, f"{stage}-full"), checkpoint(folder, "sft"))
    assert numbers_of(folder, "rl-full")[0, "kl"] == numbers_of(folder, "half-full")[0, "kl"] == 0 < numbers_of(folder, "half-full")[0, "attn/entropy_mean"]
    assert output.count("KL to the reference per token") == 3


def test_reinforcement_may_go_from_divided_to_whole_and_back_and_ends_at_the_same_bits(ran):
    _, folder, output = ran
    for tag, first, last, times in (("rl-full", 4, 6, 2), ("rl-none", 4, 6, 1), ("grpo-full", 1, 2, 1)):
        assert output.count(f"resuming rl {tag} at step {first}") == times
        assert all(equal(end, checkpoint(folder, "rl", last, tag)) for end in kept(folder / "chatrl_checkpoints" / tag, times))


def kept(place, times):
    """The ends that a run came to before it was cut and resumed."""
    ends = [torch.load(path, weights_only=True) for path in place.glob("kept*.pt")]
    assert len(ends) == times
    return ends


def test_ranks_of_a_grpo_step_whose_groups_teach_more_or_less_make_equally_many_passes(ran):
    found, folder, _ = ran
    one, other = found["passes"]
    assert len(one) == len(other) == 8 and 0 in one and 0 in other and any(one) and any(other)  # twice two epochs of two minibatches
    none, full = (checkpoint(folder, "rl", 1, f"passes-{way}") for way in ("none", "full"))
    for name in none:
        torch.testing.assert_close(full[name], none[name], rtol=0, atol=1e-5)
    numbers = numbers_of(folder, "passes-none")
    assert numbers_of(folder, "passes-full") == pytest.approx(numbers, abs=1e-5)
    assert numbers[0, "train/updates"] == 4


@pytest.mark.slow
def test_a_divided_model_can_be_compiled(ran, tmp_path):
    """Block by block: base again, and the curve of the eager run to 1e-4."""
    folder = ran[1]
    job = Job(None, tmp_path, program([(folder, "base", {"model_tag": "fused", "shard": "full", "compile": True})]), per_node=2)
    assert job.wait() == [0], job.output()
    same_run(folder, "base", "fused", folder)


def test_one_process_has_nobody_to_share_with_and_an_unknown_way_is_refused(capsys):
    model, compute = GPT(config_from_depth(1, 64, 16, head_dim=32)), Compute(torch.device("cpu"), torch.float32)
    assert place(model, compute, "full") is model and not model.is_divided
    assert "nobody to share with" in capsys.readouterr().out
    with pytest.raises(ValueError, match="shard='zero3' is not one of none, full"):
        place(model, compute, "zero3")
