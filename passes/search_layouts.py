"""Layouts: how the devices of a homogeneous cluster are dealt out to stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from ..costmodel.cluster import Cluster, Group, make_cluster, meshes
from ..ir.types import Mesh


@dataclass(frozen=True)
class Layout:
    """Devices dealt out to stages.

    Attributes:
        stages: their number, equal ones of a homogeneous cluster.
        mesh, cluster, ranks: of one stage; of the first one where they differ.
        kinds: what each stage has, where they differ.
        shares: the devices of each stage, where they differ.
        line: the order of the cluster's groups in which its devices are dealt out to such stages.
    """

    stages: int
    mesh: Mesh
    cluster: Cluster
    ranks: int
    kinds: tuple[str, ...] = ()
    shares: tuple[Cluster, ...] = ()
    line: tuple[int, ...] = ()

    @property
    def clusters(self) -> tuple[Cluster, ...]:
        """The devices of each stage."""
        return self.shares or (self.cluster,) * self.stages

    def __str__(self) -> str:
        if self.kinds:
            return "stages of " + ", ".join(self.kinds)
        axes = " x ".join(f"{name}={size}" for name, size in self.mesh.axes) or "one device"
        return axes if self.stages == 1 else f"{self.stages} stages of {axes}"


def layouts_of(cluster: Cluster, most_stages: int) -> Iterator[Layout]:
    """Equal stages: whole hosts each, or equal parts of hosts.

    Meshes of a stage: those of `cluster.meshes`, and all others of two axes, the inner one first
    inside of a host: which axis does what is up to the placement.
    """
    group = cluster.homogeneous()
    for stages in range(1, min(most_stages, group.ranks) + 1):
        if group.ranks % stages:
            continue
        ranks = group.ranks // stages
        if ranks % group.devices == 0:
            own = Group(group.kind, ranks // group.devices, group.devices)
        elif group.devices % ranks == 0:
            own = Group(group.kind, 1, ranks)
        else:
            continue
        part = part_of(cluster, own)
        known = meshes(part)
        known += [
            Mesh((("outer", ranks // inner), ("inner", inner)), group.kind)
            for inner in range(2, ranks)
            if ranks % inner == 0 and (ranks // inner, inner) not in [m.sizes for m in known]
        ]
        for mesh in known:
            yield Layout(stages, mesh, part, ranks)


def part_of(cluster: Cluster, group: Group) -> Cluster:
    """Some of a cluster's devices as a cluster: same links; cores of a host shared as before."""
    device = cluster.device
    if group.kind != device.kind:
        other = make_cluster((group,))
        return replace(other, inter=cluster.inter)
    if device.cores:
        share = group.devices / cluster.devices_per_host
        device = replace(device, cores=max(1, round(device.cores * min(1.0, share))))
    return replace(cluster, groups=(group,), device=device)
