"""The same model under plans that people write by hand: DDP, FSDP2 and tensor parallelism of DTensor."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from rival_models import EXAMPLES, made, optimizer_of, step
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import parallelize_module

#: one step; returns this rank's loss
Step = Callable[[], Tensor]


class Rival:
    """A plan of a model on this rank.

    Attributes:
        step: runs one train step.
        replicas: the loss is the mean over so many ranks' batches.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer,
                 batch: tuple[Tensor, Tensor], replicas: int, number: int) -> None:  # fmt: skip
        x, y = (tensor.chunk(replicas)[number] for tensor in batch)
        self.step: Step = lambda: step(model, optimizer, x, y)
        self.replicas = replicas


def _ddp(name: str) -> Rival:
    model, _, batch = made(name)
    parallel = nn.parallel.DistributedDataParallel(model)
    return Rival(parallel, optimizer_of(model), batch, dist.get_world_size(), dist.get_rank())


def _shard(model: nn.Module, mesh: DeviceMesh) -> None:
    """Each block on its own, then the rest, as torch's tutorial does."""
    blocks = model.get_submodule("blocks")
    for block in blocks.children():
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)


def _fsdp2(name: str) -> Rival:
    model, _, batch = made(name)
    _shard(model, init_device_mesh("cpu", (dist.get_world_size(),)))
    return Rival(model, optimizer_of(model), batch, dist.get_world_size(), dist.get_rank())


def _tensor_parallel(name: str, ranks: int) -> Rival:
    """Tensor parallelism inside a host of several ranks and FSDP2 between hosts; else over all."""
    model, _, batch = made(name)
    world = dist.get_world_size()
    inside = ranks if ranks > 1 else world
    mesh = init_device_mesh("cpu", (world // inside, inside), mesh_dim_names=("dp", "tp"))
    parallelize_module(model, mesh["tp"], EXAMPLES[name].styles())
    if world > inside:
        _shard(model, mesh["dp"])
    return Rival(model, optimizer_of(model), batch, world // inside, dist.get_rank() // inside)


def rivals(name: str, ranks: int) -> dict[str, Rival]:
    """All hand-written plans of a model; `ranks` are on each host."""
    return {"DDP": _ddp(name), "FSDP2": _fsdp2(name), "DTensor": _tensor_parallel(name, ranks)}
