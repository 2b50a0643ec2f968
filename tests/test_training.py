"""Schedules end where they should; accumulated = full batch; bad sizes name the fix; the environment file is data."""
import math
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from nanochat.compute import Compute, native_dtype
from nanochat.gpt import GPT, config_from_depth
from nanochat.hardware import peak_flops
from nanochat.schedules import cosine, linear_decay, muon_momentum, warmup, warmup_warmdown
from nanochat.training import accumulate, every, num_micro_batches, optimizer_step, rng_state, seed_everything, set_rng_state

CPU = Compute(torch.device("cpu"), torch.float32)
ROOT = Path(__file__).parents[1]


def test_schedules_start_and_end_where_they_say():
    assert [warmup_warmdown(step, 10, 0.2, 0.4) for step in range(11)] == pytest.approx([0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25, 0])
    assert warmup_warmdown(10, 10, 0, 0.4, final_frac=0.1) == pytest.approx(0.1)
    assert [warmup(step, 4) for step in range(5)] == [0.25, 0.5, 0.75, 1, 1] and warmup(0, 0) == 1
    assert (linear_decay(0, 8), linear_decay(4, 8), linear_decay(8, 8)) == (1.0, 0.5, 0.0)
    assert (cosine(0, 8), cosine(8, 8)) == pytest.approx((1.0, 0.0))
    assert (muon_momentum(0), muon_momentum(300), muon_momentum(9999)) == pytest.approx((0.85, 0.95, 0.95))


def test_every_is_true_at_multiples_and_at_the_end():
    assert [step for step in range(8) if every(3, step, 7)] == [0, 3, 6, 7]
    assert not any(every(-1, step, 7) for step in range(8))


def test_micro_batches_gradients_are_those_of_the_full_batch_however_long_the_answers():
    model = GPT(config_from_depth(2, 64, 16, head_dim=32))
    model.init_weights()
    torch.nn.init.normal_(model.lm_head.weight, std=0.1)
    inputs, targets = torch.randint(0, 64, (2, 6, 16))
    for row in range(6):
        targets[row, row * 2:] = -1  # from no target at all to ten
    targets[0, 0] = 5

    def gradients(slices):
        model.zero_grad()
        batches = [SimpleNamespace(inputs=inputs[part], targets=targets[part]) for part in slices]
        loss, count = accumulate(lambda batch: model(batch.inputs, batch.targets, loss_reduction="sum"), batches, CPU)
        return loss, count, [weight.grad.clone() for weight in model.parameters()]

    whole_loss, whole_count, whole = gradients([slice(0, 6)])
    parts_loss, parts_count, parts = gradients([slice(0, 1), slice(1, 4), slice(4, 6)])
    assert (whole_loss, whole_count) == (pytest.approx(parts_loss, rel=1e-6), parts_count)
    for one, other in zip(whole, parts):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-7)


def test_a_batch_that_does_not_divide_is_told_what_does():
    with pytest.raises(ValueError, match=r"total_batch_size=30 is not a multiple of the 16 tokens in one pass \(2 sequences x 8 tokens x 1 ranks\): try 32"):
        num_micro_batches(30, 2, 8, CPU)
    assert num_micro_batches(64, 2, 8, CPU) == 4


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step():
    with pytest.raises(ValueError, match="loss of step 7 is nan"):
        optimizer_step(None, math.nan, 7)


def test_random_numbers_go_on_where_they_were():
    seed_everything(3)
    torch.rand(5)
    state = rng_state()
    expected = torch.rand(4)
    set_rng_state(state)
    assert torch.equal(torch.rand(4), expected)


def test_unknown_gpus_have_no_peak_and_known_ones_the_datasheets():
    assert peak_flops("NVIDIA H100 80GB HBM3") == 989e12 and peak_flops("NVIDIA A100-SXM4-80GB") == 312e12
    assert peak_flops("Banana 9000") is None
    assert native_dtype(torch.device("cpu")) in (torch.float32, torch.bfloat16)


def test_an_environment_file_is_read_as_data_and_the_caller_wins(tmp_path):
    (tmp_path / ".env").write_text('# note\nexport A="two words"\nB=$(touch hacked)\nC=from file\nD=\nnonsense\nE=x=y\r\n\'F=1\n')
    command = f'source "{ROOT}/scripts/bootstrap.sh"; read_env_file .env; printf "%s|%s|%s|%s|%s" "$A" "$B" "$C" "${{D-unset}}" "$E"'
    result = subprocess.run(["bash", "-euc", command], cwd=tmp_path, env={"PATH": "/usr/bin:/bin", "C": "from caller"}, capture_output=True, text=True)
    assert result.stdout == "two words|$(touch hacked)|from caller|unset|x=y", result.stderr
    assert not (tmp_path / "hacked").exists()
