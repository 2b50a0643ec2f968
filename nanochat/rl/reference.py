"""The frozen model that a policy is held to, or measured against: where training starts from, or a checkpoint of its own."""
import dataclasses

import torch

from nanochat.checkpoint_manager import load_model
from nanochat.engine import cast_copy


def load_reference(given, parent, compute):
    """(stage, model_tag, step) of the reference, None = the parent's, and of the model training starts from -> (the frozen reference, True if it
    is that model). The step of another stage or folder is its newest where none is given. A resumed run finds the same one again:
    the parent's step is in its config, and the reference is loaded from its own checkpoint, never taken from the policy. It is whole on every
    rank, in the dtype that computes."""
    stage, model_tag = given[0] or parent[0], given[1] or parent[1]
    step = parent[2] if given[2] is None and (stage, model_tag) == tuple(parent[:2]) else given[2]
    model, _, meta = load_model(stage, dataclasses.replace(compute, device=torch.device("cpu")), "eval", model_tag, step)  # cast before it goes to the device
    return cast_copy(model).to(compute.device).requires_grad_(False), (stage, meta["model_tag"], meta["step"]) == tuple(parent)
