"""MuonAdamW: Muon for the matrices inside the blocks, AdamW for embedding and head; state, sharding and averaging over ranks.

Matrices of one shape form one stack (K, m, n). Over W ranks a stack is padded to a multiple of W, reduce-scattered, updated
in shards, all-gathered: every rank keeps 1/W of the optimizer state (ZeRO stage 2, arXiv 1910.02054). An AdamW tensor is cut
along its rows in the same way. Of a model that `sharding.py` has divided every rank keeps 1/W of weights and gradients too (ZeRO
stage 3); its share of the optimizer state stays the very same. The arithmetic is in adamw.py and muon.py and does not know of ranks.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F

from nanochat.adamw import adamw_update
from nanochat.compute import Compute
from nanochat.muon import muon_direction, muon_move, muon_update


class Bundle:
    """Parameters updated together: one embedding, or all matrices of one shape; and this rank's share of them."""

    def __init__(self, kind, names, weights, rank, world_size, **hyper):
        self.kind, self.names, self.weights, self.hyper, self.state = kind, names, weights, hyper, {}
        self.rank, self.world_size = rank, world_size
        rows = len(weights) if kind == "muon" else weights[0].size(0)
        self.share = -(-rows // world_size)  # rows of the stack (or of the tensor) per rank, the last ones padding
        self.rows = rows
        self.shard_grad = self.work = self.flat_grad = None

    def stacked(self, tensors):
        """The bundle's tensors as one, padded with zero rows to `share * world_size`."""
        whole = torch.stack(tensors) if self.kind == "muon" else tensors[0]
        missing = self.share * self.world_size - self.rows
        return torch.cat((whole, whole.new_zeros(missing, *whole.shape[1:]))) if missing else whole

    def mine(self, whole):
        return whole[self.rank * self.share:(self.rank + 1) * self.share]

    def share_of(self, shards, is_mine):
        """The shards of one state tensor -> this rank's: the only one as it is, or those of other ranks joined, their padding cut
        off, and divided anew."""
        if is_mine:
            return shards[0]
        whole = torch.cat(shards)[:self.rows]
        missing = self.share * self.world_size - self.rows
        return self.mine(torch.cat((whole, whole.new_zeros(missing, *whole.shape[1:])))).clone()

    def start_reduce(self):
        """Set `shard_grad`, the average over ranks of this rank's share of the gradient; it holds after `finish_reduce`."""
        whole = self.stacked([torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in self.weights])
        if self.world_size == 1:
            self.shard_grad = whole
            return
        self.shard_grad = torch.empty_like(self.mine(whole))
        self.work = dist.reduce_scatter_tensor(self.shard_grad, whole.contiguous(), op=dist.ReduceOp.SUM, async_op=True)

    def finish_reduce(self):
        if self.work is not None:  # wait(), not get_future(): gloo has none
            self.work.wait()
            self.shard_grad.div_(self.world_size)
            self.work = None

    def update(self, lr_mult, momentum):
        """Move this rank's share; afterwards `shard` holds it. An all-padding share has nothing to move."""
        self.shard = self.mine(self.stacked([weight.data for weight in self.weights]))
        hyper = {**self.hyper, "lr": self.hyper["lr"] * lr_mult}
        if self.kind == "adamw":
            adamw_update(self.shard, self.shard_grad, self.state, **hyper)
        else:
            muon_update(self.shard, self.shard_grad, self.state, momentum=momentum, **hyper)

    def collect(self):
        """Give the moved shares to every rank and write them into the model's weights."""
        whole = self.shard
        if self.world_size > 1:
            whole = torch.empty(self.share * self.world_size, *self.shard.shape[1:], dtype=self.shard.dtype, device=self.shard.device)
            dist.all_gather_into_tensor(whole, self.shard.contiguous())
        rows = whole[:self.rows] if self.kind == "muon" else [whole[:self.rows]]
        for weight, row in zip(self.weights, rows):
            if row.data_ptr() != weight.data_ptr():
                weight.copy_(row)
        self.shard = self.shard_grad = None


class ShardedBundle(Bundle):
    """The same parameters where each rank holds rows of every one of them, and FSDP2 has averaged the gradient of those rows.

    AdamW moves the rows where they are. Muon needs whole matrices: the ranks swap gradient rows, each gets the matrices of its share
    whole, finds their directions, and they swap rows of these back. No rank ever holds more than 1/W of anything."""

    def start_reduce(self):
        rows = [torch.zeros_like(mine) if weight.grad is None else weight.grad.to_local() for weight, mine in zip(self.weights, self.local_rows())]
        if self.kind == "adamw":
            self.shard_grad = pad_rows(rows[0], self.share)
            return
        rows = torch.stack([pad_rows(mine, self.rows_per_rank) for mine in rows])  # (K, m / W, n)
        rows = F.pad(rows, (0, 0, 0, 0, 0, self.share * self.world_size - self.rows))
        self.received = torch.empty_like(rows)
        self.sent = rows  # alive until it has left
        self.work = dist.all_to_all_single(self.received, rows, async_op=True)

    def finish_reduce(self):
        if self.work is not None:
            self.work.wait()
            whole = self.received.unflatten(0, (self.world_size, self.share)).transpose(0, 1).flatten(1, 2)  # (share, m + padding, n)
            self.shard_grad = whole[:, :self.weights[0].size(0)].contiguous()
            self.work = self.sent = self.received = None

    def update(self, lr_mult, momentum):
        hyper = {**self.hyper, "lr": self.hyper["lr"] * lr_mult}
        self.lr = hyper["lr"]
        if self.kind == "adamw":
            (mine,) = self.local_rows()
            padded = pad_rows(mine, self.share)
            adamw_update(padded, self.shard_grad, self.state, **hyper)
            mine.copy_(padded[:len(mine)])
            return
        direction = muon_direction(self.shard_grad, self.state, momentum, hyper["ns_steps"], hyper["dtype"])  # (share, m, n)
        missing = self.rows_per_rank * self.world_size - direction.size(1)
        self.sent = F.pad(direction, (0, 0, 0, missing)).unflatten(1, (self.world_size, -1)).transpose(0, 1).contiguous()
        self.received = torch.empty_like(self.sent)
        self.work = dist.all_to_all_single(self.received, self.sent, async_op=True)

    def collect(self):
        if self.work is not None:
            self.work.wait()
            m, n = self.weights[0].shape
            for mine, direction in zip(self.local_rows(), self.received.flatten(0, 1)):
                muon_move(mine, direction[:len(mine)], m, n, self.lr, self.hyper["weight_decay"])
            self.work = self.sent = self.received = None
        self.shard_grad = None

    def local_rows(self):
        return [weight.to_local() for weight in self.weights]

    @property
    def rows_per_rank(self):
        return -(-self.weights[0].size(0) // self.world_size)


def pad_rows(rows, count):
    """(r, n) -> (count, n), zeros behind; the same tensor where nothing is missing."""
    return F.pad(rows, (0, 0, 0, count - len(rows))) if len(rows) < count else rows


class MuonAdamW:
    """`zero_grad()`, `step(lr_mult, grad_clip, momentum) -> gradient norm`, `state_dict()`, `load_state_dict()`.

    The gradients of all ranks are averaged; the norm is taken, and clipped, after the averaging. `learning_rates` maps
    "embedding", "unembedding", "matrix" to the rates at lr_mult 1. AdamW's rates shrink with sqrt(768 / width), because the
    gradient of a wider embedding adds up over more channels; Muon's updates have unit scale at any width.
    """

    def __init__(self, model, compute, embedding_lr=0.2, unembedding_lr=0.004, matrix_lr=0.02, weight_decay=0.0,
                 betas=(0.8, 0.95), eps=1e-10, ns_steps=5):
        self.compute = compute or Compute(model.device, model.compute_dtype)
        rank, world_size = self.compute.rank, self.compute.world_size
        width_scale = (model.config.n_embd / 768) ** -0.5
        make = ShardedBundle if model.is_divided else Bundle
        adam = {"betas": betas, "eps": eps, "weight_decay": weight_decay}
        self.bundles = [
            make("adamw", ["transformer.wte.weight"], [model.transformer.wte.weight], rank, world_size, lr=embedding_lr * width_scale, **adam),
            make("adamw", ["lm_head.weight"], [model.lm_head.weight], rank, world_size, lr=unembedding_lr * width_scale, **adam),
        ]
        by_shape = {}
        for name, weight in model.transformer.h.named_parameters():
            by_shape.setdefault(tuple(weight.shape), []).append((f"transformer.h.{name}", weight))
        for shape in sorted(by_shape):
            names, weights = zip(*by_shape[shape])
            self.bundles.append(make("muon", list(names), list(weights), rank, world_size,
                                     lr=matrix_lr, weight_decay=weight_decay, ns_steps=ns_steps, dtype=model.compute_dtype))

    def zero_grad(self):
        for bundle in self.bundles:
            for weight in bundle.weights:
                weight.grad = None

    @torch.no_grad()
    def step(self, lr_mult=1.0, grad_clip=0.0, momentum=0.95):
        """Average, clip to `grad_clip` (0 = off), update. -> the norm of the averaged gradient before clipping, a float."""
        for bundle in self.bundles:  # all are started, then awaited
            bundle.start_reduce()
        for bundle in self.bundles:
            bundle.finish_reduce()
        square = sum(bundle.shard_grad.float().square().sum() for bundle in self.bundles)
        norm = float(self.compute.sum(square).sqrt())
        if grad_clip and norm > grad_clip:
            for bundle in self.bundles:
                bundle.shard_grad.mul_(grad_clip / norm)
        for bundle in self.bundles:
            bundle.update(lr_mult, momentum)
        for bundle in self.bundles:
            bundle.collect()
        return norm

    def state_dict(self):
        """This rank's share of the state, by the names of the parameters it belongs to."""
        return {"rank": self.compute.rank, "world_size": self.compute.world_size,
                "bundles": [{"names": bundle.names, "state": bundle.state} for bundle in self.bundles]}

    def load_state_dict(self, *saved):
        """Take back what `state_dict` gave: this rank's own, or, where the number of ranks has changed, that of every old rank in
        order, from which this rank cuts its share. ValueError where ranks or parameters are not the ones that were saved."""
        own = (self.compute.rank, self.compute.world_size)
        if len(saved) == 1 and (saved[0]["rank"], saved[0]["world_size"]) != own and saved[0]["world_size"] != 1:
            raise ValueError(f"the optimizer state of rank {saved[0]['rank']} of {saved[0]['world_size']} alone cannot serve rank {own[0]} of {own[1]}: "
                             f"give the states of all {saved[0]['world_size']} ranks, or resume with {saved[0]['world_size']} processes")
        for place, bundle in enumerate(self.bundles):
            entries = [part["bundles"][place] for part in saved]
            if any(entry["names"] != bundle.names for entry in entries):
                raise ValueError(f"the optimizer state is of {entries[0]['names'][:2]}..., this model has {bundle.names[:2]}...: another architecture")
            states = [entry["state"] for entry in entries]
            is_mine = (saved[0]["rank"], saved[0]["world_size"]) == own
            device = bundle.weights[0].device
            bundle.state = {key: bundle.share_of([state[key] for state in states], is_mine).to(device) if isinstance(value, torch.Tensor) else value
                            for key, value in states[0].items()}
