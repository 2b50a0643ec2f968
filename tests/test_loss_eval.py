"""Bits per byte on cases solved by hand."""
import math

import pytest
import torch

from nanochat.compute import Compute
from nanochat.loss_eval import evaluate_bpb

def uniform_model(inputs, targets, loss_reduction):
    assert loss_reduction == "none"
    return torch.where(targets >= 0, math.log(256.0), 0.0)


CPU = Compute(torch.device("cpu"), torch.float32)


def test_bits_per_byte_of_a_uniform_byte_model_are_eight():
    targets = torch.tensor([[1, 2, -1], [3, -1, -1]])
    result = evaluate_bpb(uniform_model, [(targets, targets)], [1] * 256, CPU)
    assert result == {"bpb": pytest.approx(8.0), "loss": pytest.approx(math.log(256.0)), "tokens": 3, "bytes": 3}


def test_a_token_of_two_bytes_halves_the_bits_and_a_special_token_counts_only_in_the_loss():
    targets = torch.tensor([[1, 2, 0]])
    result = evaluate_bpb(uniform_model, [(targets, targets)], [0] + [2] * 255, CPU)
    assert result["bpb"] == pytest.approx(4.0) and result["tokens"] == 3 and result["bytes"] == 4


def test_no_target_is_an_error_and_not_nan():
    targets = torch.tensor([[-1, -1]])
    for batches in ([], [(targets, targets)]):
        with pytest.raises(ValueError, match="0 targets"):
            evaluate_bpb(uniform_model, batches, [1] * 256, CPU)
