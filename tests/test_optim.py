"""AdamW is torch's; a stack of Muon updates is torch's Muon matrix by matrix; an update is near orthogonal."""
import pytest
import torch

from nanochat.adamw import adamw_update
from nanochat.compute import Compute
from nanochat.gpt import GPT, config_from_depth
from nanochat.muon import muon_update, orthogonalize
from nanochat.optim import MuonAdamW


def test_adamw_is_torchs_adamw():
    torch.manual_seed(0)
    ours = torch.randn(7, 5)
    theirs = torch.nn.Parameter(ours.clone())
    reference = torch.optim.AdamW([theirs], lr=0.03, betas=(0.8, 0.95), eps=1e-10, weight_decay=0.1)
    state = {}
    for _ in range(5):
        theirs.grad = torch.randn(7, 5)
        adamw_update(ours, theirs.grad, state, 0.03, (0.8, 0.95), 1e-10, 0.1)
        reference.step()
    torch.testing.assert_close(ours, theirs.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("shape", [(8, 8), (16, 4), (4, 16)])
def test_a_stack_of_muon_updates_is_torchs_muon_on_each_matrix(shape):
    torch.manual_seed(0)
    stack = torch.randn(3, *shape)
    theirs = [torch.nn.Parameter(matrix.clone()) for matrix in stack]
    reference = torch.optim.Muon(theirs, lr=0.02, weight_decay=0.1, momentum=0.9, nesterov=True, adjust_lr_fn="original")
    state = {}
    for _ in range(4):
        grads = torch.randn(3, *shape)
        for weight, grad in zip(theirs, grads):
            weight.grad = grad.clone()
        reference.step()
        muon_update(stack, grads, state, lr=0.02, momentum=0.9, weight_decay=0.1)
    # the iteration runs in bfloat16 and batched products round differently: an update is 0.02, one bf16 step of it 1e-4
    torch.testing.assert_close(stack, torch.stack([weight.detach() for weight in theirs]), rtol=0, atol=4e-4)


def test_an_orthogonalized_matrix_has_singular_values_near_one():
    torch.manual_seed(0)
    singular_values = torch.linalg.svdvals(orthogonalize(torch.randn(4, 32, 16), dtype=torch.float32))
    assert singular_values.min() > 0.6 and singular_values.max() < 1.3


def test_every_parameter_is_updated_once_and_clipping_scales_the_gradient():
    model = GPT(config_from_depth(2, 64, 16, head_dim=32))
    model.init_weights()
    optimizer = MuonAdamW(model, None)
    named = [name for bundle in optimizer.bundles for name in bundle.names]
    assert sorted(named) == sorted(name for name, _ in model.named_parameters())
    inputs = torch.arange(16)[None]
    model(inputs, inputs.roll(-1, 1)).backward()
    norm = torch.cat([weight.grad.flatten() for weight in model.parameters()]).norm()
    assert optimizer.step(grad_clip=1e-3) == pytest.approx(float(norm), rel=1e-5)


def of_ranks(model, world_size):
    return [MuonAdamW(model, Compute(torch.device("cpu"), torch.float32, rank, rank, world_size)) for rank in range(world_size)]


def test_state_divided_over_other_numbers_of_ranks_and_joined_again_is_the_same_state():
    model = GPT(config_from_depth(3, 61, 16, head_dim=32))  # 61 rows and stacks of 3 and 12 divide by neither 2 nor 8
    model.init_weights()
    whole = MuonAdamW(model, None)
    inputs = torch.arange(16)[None]
    for _ in range(2):
        model(inputs, inputs.roll(-1, 1)).backward()
        whole.step()
        whole.zero_grad()
    states = [whole.state_dict()]
    for world_size in (2, 8, 3, 1):
        ranks = of_ranks(model, world_size)
        for optimizer in ranks:
            optimizer.load_state_dict(*states)
        states = [optimizer.state_dict() for optimizer in ranks]
    (joined,) = states
    for mine, theirs in zip(joined["bundles"], whole.state_dict()["bundles"], strict=True):
        for key, value in theirs["state"].items():
            assert torch.equal(torch.as_tensor(mine["state"][key]), torch.as_tensor(value)), (mine["names"], key)


def test_one_of_several_old_shards_is_refused_with_the_numbers():
    model = GPT(config_from_depth(1, 64, 16, head_dim=32))
    optimizer = MuonAdamW(model, None)
    with pytest.raises(ValueError, match="rank 1 of 2 alone cannot serve rank 0 of 1: give the states of all 2 ranks"):
        optimizer.load_state_dict({**optimizer.state_dict(), "rank": 1, "world_size": 2})
