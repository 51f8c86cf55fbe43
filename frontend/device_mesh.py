"""A user's `torch.distributed.DeviceMesh` as the mesh of a plan."""

from __future__ import annotations

import torch
from torch.distributed.device_mesh import DeviceMesh

from ..ir.errors import CompileError
from ..runtime.comm import Comm
from ..runtime.groups import adopt_group


def mesh_option(mesh: str | DeviceMesh) -> str:
    """The text that `place` takes for a mesh: `2x2`, or `dp=2,tp=2` for a DeviceMesh.

    The process groups of a DeviceMesh are used as they are, time limits included. Raises
    CompileError W0501 for one that does not hold all ranks in order.
    """
    if isinstance(mesh, str):
        return mesh
    ranks = mesh.mesh.flatten().tolist()
    world = torch.distributed.get_world_size()
    if ranks != list(range(world)):
        raise CompileError(
            "W0501", f"the DeviceMesh holds the ranks {ranks}",
            reason=f"a plan is for all {world} ranks of the world, in order",
            hint="make it with init_device_mesh over all ranks",
        )  # fmt: skip
    names = mesh.mesh_dim_names or tuple(f"axis{i}" for i in range(mesh.ndim))
    rows = [(name, mesh.size(i), i) for i, name in enumerate(names)]
    for _, size, dim in rows:
        if size > 1:
            group = mesh.get_group(dim)
            adopt_group(tuple(torch.distributed.get_process_group_ranks(group)), group)
    return ",".join(f"{name}={size}" for name, size, _ in rows)


def use_mesh(comm: Comm, mesh: str | DeviceMesh) -> Comm:
    """Let a user's DeviceMesh be that of the DTensors that a plan gives out, if it is the plan's."""
    if not isinstance(mesh, str):
        names = tuple(mesh.mesh_dim_names or ())
        if names == comm.mesh.names and tuple(mesh.mesh.shape) == comm.mesh.sizes:
            comm.device_mesh = mesh
    return comm
