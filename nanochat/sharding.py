"""A model's weights divided over the ranks, for models that do not fit one device (FSDP2, torch.distributed.fsdp; ZeRO stage 3, arXiv 1910.02054).

Each rank keeps 1/W of the rows of every matrix, of its gradient and of its optimizer state (optim.py). A block's matrices are whole on
a rank only while the block computes; embedding and head while the model does. Checkpoints are those of an undivided model: they are
gathered and cut one tensor at a time, so a run may go from one way to the other. Sampling reads every weight at every token: it wants a
whole copy on each rank, in the dtype that computes and without gradient or optimizer (`whole_model`, `refill`).
"""
import torch

from nanochat.common import print0
from nanochat.gpt import frozen_gpt

MODES = ("none", "full")


def place(model, compute, shard="none"):
    """Move a model from the host's memory to its device -> the model: whole ("none"), or this rank's rows of it ("full"), which needs several ranks.

    The matrices in the blocks are sent in the dtype they compute in. Embedding and head stay in float32, as their gradients add up
    over many tokens."""
    if shard not in MODES:
        raise ValueError(f"shard={shard!r} is not one of {', '.join(MODES)}: full divides the weights over the ranks, none keeps them whole on each")
    if shard == "none":
        return model.to(compute.device)
    if compute.world_size == 1:
        print0("shard=full: one process has nobody to share with, so its model stays whole")
        return model.to(compute.device)
    from torch.distributed.device_mesh import init_device_mesh  # here: almost a second that only a divided model need spend
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
    mesh = init_device_mesh(compute.device.type, (compute.world_size,))
    for block in model.transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=MixedPrecisionPolicy(param_dtype=model.compute_dtype, reduce_dtype=torch.float32))
    fully_shard(model, mesh=mesh, reshard_after_forward=True)
    register_fsdp_forward_method(model, "as_forward")
    model.is_divided = True
    return model.to(compute.device)


def whole_tensors(model, keep=True, dtype=torch.float32, device="cpu"):
    """-> {name: whole weight}: `model.state_dict()`, or, gathered one by one from a divided model, copies of that dtype on that device. Every
    rank has to call it; one that does not `keep` them takes part and gets {}."""
    if not model.is_divided:
        return model.state_dict() if keep else {}
    whole = {}
    for name, tensor in gathered(model, dtype):
        if keep:
            whole[name] = tensor.to(device)
    return whole


def gathered(model, dtype):
    """(name, whole weight) of a divided model, one after the other. Every rank has to take them all."""
    for name, weight in model.named_parameters():
        yield name, weight.detach().to(dtype).full_tensor()


@torch.no_grad()
def load_tensors(model, tensors):
    """Whole weights by name into a model, divided or not: `model.load_state_dict(tensors)`."""
    if not model.is_divided:
        model.load_state_dict(tensors)
        return
    weights = dict(model.named_parameters())
    if weights.keys() != tensors.keys():
        raise ValueError(f"the weights are called {sorted(tensors)[:2]}..., the model has {sorted(weights)[:2]}...: another architecture")
    for name, weight in weights.items():
        mine = weight.to_local()
        first = weight.device_mesh.get_local_rank() * -(-weight.size(0) // weight.device_mesh.size())
        mine.copy_(tensors[name][first:first + len(mine)])


def whole_model(model, compute, keep=True):
    """A model with whole weights in its compute dtype, for sampling: the model itself where it is not divided, else a copy. Every rank
    has to call it; one that does not `keep` the copy takes part and gets None."""
    if not model.is_divided:
        return model
    whole = whole_tensors(model, keep, model.compute_dtype, compute.device)
    if not keep:
        return None
    return frozen_gpt(model.config, model.compute_dtype, whole)


@torch.no_grad()
def refill(whole, model):
    """The weights a divided model has now into its `whole_model`, in place, on every rank; nothing to do where both are one."""
    if whole is model:
        return
    weights = dict(whole.named_parameters())
    for name, tensor in gathered(model, model.compute_dtype):
        weights[name].copy_(tensor)
