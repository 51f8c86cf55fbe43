"""The devices of a cluster dealt out to pipeline stages: whole hosts, or a part of one, of one group.

Stage i has the devices behind those of the stages before it, in the order in which ranks are numbered.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ..ir.errors import CompileError
from .cluster import Cluster, Group, joined


def stage_clusters(cluster: Cluster, stages: int, sizes: Sequence[int] = ()) -> tuple[Cluster, ...]:
    """The devices of each stage, as a cluster.

    Args:
        sizes: devices of each stage. By default a group's stages share it evenly, and groups have so
            many stages that the strongest stage is as weak as can be.

    Raises CompileError W0404 where the stages cannot share the devices.
    """
    if sizes:
        return _as_wished(cluster, tuple(sizes))
    if len(cluster.groups) == 1:
        return (_even(cluster, 0, stages),) * stages
    counts = _counts(cluster, stages)
    if not counts:
        raise CompileError(
            "W0404", f"{stages} stages cannot share the devices of {cluster}",
            reason=f"it has {len(cluster.groups)} kinds of hosts, a stage has devices of one: whole "
            "hosts, or an equal part of one",
            hint=f"ask for {len(cluster.groups)} stages, or give each stage a mesh: meshes="
            f"\"{'+'.join(str(group.ranks) for group in cluster.groups)}\"",
        )  # fmt: skip
    return tuple(
        share for number, count in enumerate(counts)
        for share in (_even(cluster, number, count),) * count
    )  # fmt: skip


def _even(cluster: Cluster, number: int, stages: int) -> Cluster:
    """An equal part of a group."""
    group = cluster.groups[number]
    own = _share(group, stages)
    if own is None:
        raise CompileError(
            "W0404", f"{stages} stages cannot share the {group.ranks} devices of {cluster}",
            reason="a stage has whole hosts, or an equal part of one",
            hint="use a number of stages that divides the hosts, or the devices, or give each stage "
            "a mesh (meshes=)",
        )  # fmt: skip
    return _part(cluster, number, own)


def _share(group: Group, stages: int) -> Group | None:
    ranks, rest = divmod(group.ranks, stages)
    if rest == 0 and ranks % group.devices == 0:
        return Group(group.kind, ranks // group.devices, group.devices)
    if rest == 0 and group.devices % ranks == 0:
        return Group(group.kind, 1, ranks)
    return None


def _part(cluster: Cluster, number: int, own: Group) -> Cluster:
    """Some devices of a group, with its links."""
    return joined([own], [cluster.hardware[number]])


def _as_wished(cluster: Cluster, sizes: tuple[int, ...]) -> tuple[Cluster, ...]:
    """Stages of given sizes, one behind the other."""
    if sum(sizes) != cluster.ranks:
        raise CompileError(
            "W0404", f"the meshes of the stages have {sum(sizes)} devices, {cluster} has "
            f"{cluster.ranks}", reason="each device belongs to one stage",
            hint="give meshes whose sizes add up, or name another cluster",
        )  # fmt: skip
    out, number, used = [], 0, 0
    for stage, size in enumerate(sizes):
        if used == cluster.groups[number].ranks:
            number, used = number + 1, 0
        group = cluster.groups[number]
        start, devices = used % group.devices, group.devices
        inside = start + size <= devices
        if used + size > group.ranks or not (inside or (start == 0 and size % devices == 0)):
            raise CompileError(
                "W0404", f"stage {stage} of {size} devices does not fit behind {used} of {group}",
                reason="a stage has whole hosts, or a part of one, of one kind",
                hint="give meshes whose sizes fill host after host",
            )  # fmt: skip
        own = Group(group.kind, 1, size) if inside else Group(group.kind, size // devices, devices)
        out.append(_part(cluster, number, own))
        used += size
    return tuple(out)


def _counts(cluster: Cluster, stages: int) -> tuple[int, ...]:
    """How many stages each group has: the strongest stage is as weak as can be; none where
    the devices cannot be shared so."""
    peaks = [
        group.ranks * hardware.device.peak_flops_per_s("bf16")
        for group, hardware in zip(cluster.groups, cluster.hardware, strict=True)
    ]

    @lru_cache(maxsize=None)
    def best(number: int, left: int) -> tuple[float, tuple[int, ...]]:
        """(peak of the strongest stage, stages of each group) from a group on."""
        if number == len(cluster.groups):
            return (0.0, ()) if left == 0 else (float("inf"), ())
        found: tuple[float, tuple[int, ...]] = (float("inf"), ())
        for count in range(1, left + 1):
            if _share(cluster.groups[number], count) is not None:
                peak, rest = best(number + 1, left - count)
                found = min(found, (max(peak, peaks[number] / count), (count, *rest)))
        return found

    peak, counts = best(0, stages)
    return counts if peak < float("inf") else ()


__all__ = ["stage_clusters"]
