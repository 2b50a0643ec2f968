"""The table of depths says of a model what the built model, its optimizer and base_train say."""
import json

import pytest
import torch

from dev import depth_table
from nanochat.compute import compute_init
from nanochat.gpt import GPT, GPTConfig, config_from_depth
from nanochat.optim import MuonAdamW
from scripts import base_train

SMALL = {"depths": (1, 2, 3), "vocab_size": 300, "max_seq_len": 64, "head_dim": 32, "device_batch_size": 2, "total_batch_size": 128}


def table(capsys, **knobs):
    rows = depth_table.main(depth_table.Config(**{**SMALL, **knobs}))
    return rows, capsys.readouterr().out


def built(depth, dtype=torch.float32):
    model = GPT(config_from_depth(depth, 300, 64, head_dim=32), dtype)
    model.init_weights()
    return model


def test_parameters_flops_and_steps_are_the_built_models_and_base_trains(capsys):
    rows, _ = table(capsys, flops=1e9)
    for one in rows:
        model = built(one["depth"])
        assert (one["parameters"], one["width"]) == (model.num_params(), 64 * one["depth"])
        steps = base_train.count_steps(base_train.Config(total_batch_size=128), model)
        assert (one["steps"], one["tokens"]) == (steps, 128 * steps)
        assert one["flops"] == one["tokens"] * model.flops_per_token()
        assert one["hours"] == pytest.approx(one["flops"] / 1e9 / 3600)


def test_memory_that_does_not_depend_on_the_batch_is_what_the_tensors_take():
    model = built(2, torch.bfloat16)
    optimizer = MuonAdamW(model, compute_init("cpu", "bfloat16"))
    ids = torch.randint(0, 300, (1, 9))
    model(ids[:, :-1], ids[:, 1:]).backward()
    found = depth_table.fixed_memory(model, 1, 2)
    assert found["weights"] == found["gradients"] == sum(weight.numel() * weight.element_size() for weight in model.parameters())
    assert found["gradients"] == sum(weight.grad.numel() * weight.grad.element_size() for weight in model.parameters())
    optimizer.step()
    tensors = [value for bundle in optimizer.bundles for value in bundle.state.values() if isinstance(value, torch.Tensor)]
    assert found["optimizer"] == sum(value.numel() * value.element_size() for value in tensors)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_activations_of_a_large_model_follow_from_small_ones(dtype):
    sizes = GPTConfig(64, 64, 3, 6, 6, 6 * 32)
    few, many = depth_table.kept_bytes(sizes, dtype, 32), depth_table.kept_bytes(sizes, dtype, 64)
    assert depth_table.activation_bytes(sizes, dtype) == (many - few) / 32
    casts = depth_table.fixed_memory(GPT(sizes), 1, depth_table.BYTES[dtype])["casts"]
    tables = 2 * few - many                              # what does not grow with the number of tokens
    assert casts <= tables <= casts + 4 * 2 * 64 * 16 * 2


def test_the_parts_of_the_memory_add_up_and_devices_share_the_optimizer(capsys):
    (one, *_), _ = table(capsys, flops=1e9, depths=(3,))
    (four, *_), _ = table(capsys, flops=1e9, depths=(3,), devices=4)
    memory = one["memory"]
    fixed = sum(memory[part] for part in ("weights", "gradients", "optimizer", "casts"))
    assert memory["total"] == fixed + max(memory["activations"] + memory["loss"], memory["optimizer_step"])
    assert four["memory"]["optimizer"] == -(-memory["optimizer"] // 4) and four["memory"]["weights"] == memory["weights"]
    assert four["hours"] == pytest.approx(one["hours"] / 4)


def test_a_measured_speed_comes_back_at_its_own_depth_and_changes_with_the_flops_at_others(capsys):
    rows, text = table(capsys, tokens_per_second=1000, at_depth=2, measured_devices=2, devices=2, price=3.0)
    assert rows[1]["tokens_per_second"] == pytest.approx(1000) and "ASSUMED" not in text and "1,000 tokens/s at depth 2 on 2 devices" in text
    assert rows[2]["tokens_per_second"] == pytest.approx(1000 * built(2).flops_per_token() / built(3).flops_per_token())
    assert rows[1]["dollars"] == pytest.approx(3 * rows[1]["tokens"] / 1000 / 3600) and " cost |" in text


def test_a_bench_file_is_read_with_the_sizes_it_was_measured_with(tmp_path, capsys):
    bench = {"config": {"depth": 2, "n_embd": 96, "head_dim": 32, "vocab_size": 500, "seq_len": 32}, "device": "cuda", "default": "compiled bfloat16",
             "modes": {"compiled bfloat16": {"tok_per_sec": 5000.0}}}
    (tmp_path / "bench.txt").write_text("eager float32   1 ms\n" + json.dumps(bench) + "\n")
    rows, text = table(capsys, bench=str(tmp_path / "bench.txt"))
    flops = 5000 * GPT(config_from_depth(2, 500, 32, 96, 32)).flops_per_token()
    assert json.loads(text.splitlines()[-1])["flops_per_device"] == pytest.approx(flops) and "measured on cuda (compiled bfloat16, depth 2, 5,000 tokens/s)" in text
    assert rows[0]["tokens_per_second"] == pytest.approx(flops / built(1).flops_per_token())


def test_an_assumed_speed_is_called_assumed_and_the_table_is_markdown(capsys):
    _, text = table(capsys, flops=1e9)
    assert "ASSUMED: this speed" in text and "not measured on a GPU" in text and " cost |" not in text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len(lines) == 5 and len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize("knobs, problem", [
    ({}, "exactly one way"), ({"flops": 1.0, "bench": "x"}, "exactly one way"), ({"tokens_per_second": 5.0}, "at-depth"), ({"bench": "nowhere.json"}, "dev.bench.train_step"),
    ({"flops": 1.0, "dtype": "int8"}, "int8"), ({"flops": 1.0, "devices": 0}, "devices=0"), ({"flops": 1.0, "depths": (0,)}, "depths")])
def test_knobs_that_make_no_table_are_refused(knobs, problem):
    with pytest.raises(ValueError, match=problem):
        depth_table.main(depth_table.Config(**{**SMALL, **knobs}))


def test_numbers_are_short():
    assert [depth_table.amount(number) for number in (950, 36_700_160, 1_313_865_728, 2.5e12)] == ["950", "36.7M", "1.31B", "2.5T"]
    assert [depth_table.duration(hours) for hours in (0.01, 1.5, 47.9, 72)] == ["0.6 min", "1.5 h", "47.9 h", "3.0 days"]
