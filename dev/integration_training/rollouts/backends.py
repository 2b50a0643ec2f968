"""The weights and their optimizer, in one process or cut into shards over several (FSDP2), behind the same calls:

    backend.policy(...)            forward, and backward through it: the gradient is averaged over ranks
    backend.optimizer              step(lr_mult, grad_clip) -> gradient norm, and zero_grad(), as nanochat.training.optimizer_step asks
    backend.sync()                 the newest weights into `backend.engine`, which samples
    backend.get_weights(), load_weights(...)   whole tensors by name on the CPU: what is saved does not depend on the number of ranks
"""
import torch
import torch.nn as nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from dev.integration_training.base_config import ADAMW_LIMIT
from dev.integration_training.rollouts.models import OwnPolicy, frozen_copy

ROWS_IN_FLIGHT = 128
RATE_TIMES_WIDTH = 0.5  # an AdamW step moves a weight by about its rate, and a layer's output by about rate x width


def check_rates(policy, name, training):
    """ValueError for rates that would wreck a model of this width in its first steps."""
    of_adamw = ["unembedding_lr"] + ["matrix_lr"] * (training.optimizer == "adamw") + ["embedding_lr"] * (not isinstance(policy, OwnPolicy))
    for knob in of_adamw:
        rate, limit = getattr(training, knob), min(ADAMW_LIMIT, RATE_TIMES_WIDTH / policy.width)
        if rate > limit:
            raise ValueError(f"{name}.{knob}={rate} is too high for AdamW at width {policy.width}, where {limit:.2g} is the most that leaves a model whole: "
                             f"try {limit / 10:.1g}, or less for a model that is trained already")


def make_backend(policy, compute, training, compiled):
    return (LocalBackend if compute.world_size == 1 else ShardedBackend)(policy, compute, training, compiled)


class LocalBackend:
    """One process. The weights that are trained are those that sample, unless their blocks are compiled: sampling changes shape at every token."""

    def __init__(self, policy, compute, training, compiled):
        is_shared = compute.world_size == 1 and not compiled
        self.sampling = policy if is_shared else frozen_copy(policy, compute.dtype)
        self.engine = self.sampling.engine(ROWS_IN_FLIGHT)
        if compiled:
            policy.compile_blocks()
        self.policy = self.placed(policy, compute)
        self.optimizer = Optimizers(self.policy.tensors(), training)

    def placed(self, policy, compute):
        return policy

    @torch.no_grad()
    def sync(self):
        if self.sampling is not self.policy:
            for mine, theirs in zip(self.sampling.parameters(), self.policy.parameters(), strict=True):
                mine.copy_(theirs.full_tensor() if isinstance(theirs, DTensor) else theirs)
        self.engine.refresh()

    def get_weights(self):
        return {name: whole(weight) for name, weight in named_tensors(self.policy)}

    @torch.no_grad()
    def load_weights(self, weights):
        for name, weight in named_tensors(self.policy):
            weight.copy_(like(weight, weights[name]))
        self.sync()


class ShardedBackend(LocalBackend):
    """FSDP2: each rank keeps 1/W of weights, gradients and optimizer state, and collects a block's weights while it computes that block.

    Sampling asks one token at a time; collecting all weights for each would be most of the work, and ranks whose rows end at different times
    would wait for each other forever. So every rank samples from a whole copy in the activations' dtype, which `sync` renews."""

    def placed(self, policy, compute):
        mesh = init_device_mesh(compute.device.type, (compute.world_size,))
        for block in policy.blocks():
            fully_shard(block, mesh=mesh)
        return fully_shard(policy, mesh=mesh)


def named_tensors(policy):
    """Parameters, tied ones once, and the buffers that a checkpoint needs."""
    yield from policy.named_parameters()
    every_name = {name for name, _ in policy.named_parameters(remove_duplicate=False)}
    yield from ((name, value) for name, value in policy.state_dict().items() if name not in every_name)


def whole(value):
    """A tensor, cut into shards or not -> all of it on the CPU. On every rank or on none: the others wait."""
    value = value.detach()
    return (value.full_tensor() if isinstance(value, DTensor) else value).cpu().clone()


def like(tensor, value):
    """A whole tensor -> on the device of `tensor`, and cut as that one is."""
    value = value.to(tensor.device)
    return distribute_tensor(value, tensor.device_mesh, tensor.placements, src_data_rank=None) if isinstance(tensor, DTensor) else value


class Optimizers:
    """AdamW, and Muon for the matrices if asked for, with a rate for each kind of tensor."""

    def __init__(self, tensors, training):
        rates = {"embedding": training.embedding_lr, "unembedding": training.unembedding_lr, "vector": training.unembedding_lr, "matrix": training.matrix_lr}
        self.named = [pair for pairs in tensors.values() for pair in pairs]
        groups = {kind: {"params": [weight for _, weight in pairs], "lr": rates[kind], "initial_lr": rates[kind],
                         "weight_decay": 0.0 if kind == "vector" else training.weight_decay} for kind, pairs in tensors.items() if pairs}
        self.parts = []
        if training.optimizer == "muon":
            self.parts.append(torch.optim.Muon([groups.pop("matrix")], adjust_lr_fn="original"))
        self.parts.append(torch.optim.AdamW(list(groups.values()), betas=(training.adam_beta1, training.adam_beta2), eps=training.adam_eps))

    def zero_grad(self):
        for part in self.parts:
            part.zero_grad()

    def step(self, lr_mult=1.0, grad_clip=0.0, momentum=0.95):
        """Clip the averaged gradient to `grad_clip` (0 = off), update -> its norm before clipping."""
        norm = nn.utils.clip_grad_norm_([weight for _, weight in self.named], grad_clip or float("inf"))
        norm = float(norm.full_tensor() if isinstance(norm, DTensor) else norm)
        for part in self.parts:
            for group in part.param_groups:
                group["lr"] = group["initial_lr"] * lr_mult
                if "momentum" in group:
                    group["momentum"] = momentum
            part.step()
        return norm

    def state_dict(self):
        """{parameter: {what: whole tensor}}."""
        states = {name: next((part.state[weight] for part in self.parts if weight in part.state), {}) for name, weight in self.named}
        return {name: {key: whole(value) if isinstance(value, torch.Tensor) else value for key, value in state.items()} for name, state in states.items()}

    def load_state_dict(self, saved):
        for part in self.parts:
            mine = {id(weight) for group in part.param_groups for weight in group["params"]}
            for name, weight in self.named:
                if id(weight) in mine and saved[name]:
                    part.state[weight] = {key: like(weight, value) if isinstance(value, torch.Tensor) and value.ndim else value for key, value in saved[name].items()}
