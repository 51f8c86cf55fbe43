"""Shards of a plan as DTensors.

Placements mean the same in both: `S(d)` is Shard(d), `B` Replicate, `P(c)` Partial(c), and several
axes on one dim nest the same way. Uneven shards differ: a plan balances them, DTensor cuts dims like
torch.chunk. Those tensors are gathered and cut again.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement as TorchPlacement

from ..ir.errors import RunError
from ..ir.types import Placement, TensorType, parts_of
from .comm import Comm


def device_mesh(comm: Comm, kind: str) -> DeviceMesh:
    """The plan's mesh with its process groups, made once. Raises RunError W0804 for one rank.

    Args:
        kind: `cpu` or `cuda`.
    """
    found: DeviceMesh | None = comm.device_mesh
    if found is None:
        groups = [comm.group(name) for name in comm.mesh.names]
        if not groups or None in groups:
            raise RunError(
                "W0804", "a plan for one rank has no DTensors",
                reason="a DTensor needs a DeviceMesh of several ranks",
                hint="take state_dict() as it is: its tensors are whole",
            )  # fmt: skip
        ranks = torch.arange(comm.mesh.size).view(comm.mesh.sizes)
        comm.device_mesh = found = DeviceMesh.from_group(
            groups if len(groups) > 1 else groups[0], kind, ranks, mesh_dim_names=comm.mesh.names
        )
    return found


def to_dtensor(shard: Tensor, type: TensorType, comm: Comm) -> DTensor:
    """This rank's shard as a part of a DTensor; all ranks must call."""
    mesh = device_mesh(comm, shard.device.type)
    placements = [_placement(held) for held in type.placement or ()]
    cut = {held.dim for held in type.placement or () if held.kind == "S"}
    if all(type.shape[dim] % parts_of(type, comm.mesh, dim) == 0 for dim in cut):
        shape = torch.Size(type.shape)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            shard, mesh, placements, run_check=False, shape=shape, stride=stride
        )
    whole = comm.gather(shard, type)
    everywhere = [Replicate()] * len(placements)
    found: DTensor = DTensor.from_local(whole, mesh, everywhere, run_check=False)
    return found.redistribute(mesh, [Replicate() if p.is_partial() else p for p in placements])


def _placement(held: Placement) -> TorchPlacement:
    if held.kind == "S":
        return Shard(held.dim)
    return Replicate() if held.kind == "B" else Partial(held.combine)


__all__ = ["device_mesh", "to_dtensor"]
