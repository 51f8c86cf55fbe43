"""A rank's place on the mesh, and its process groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ir.errors import RunError
from ..ir.stage_ranks import StageRanks
from ..ir.types import Mesh, TensorType, local_shape
from .watch import together, watch

#: Seconds after which a collective that some rank does not join raises: long enough for a rank
#: that compiles kernels or writes a checkpoint meanwhile, short enough to notice on the same day.
TIMEOUT_S = 300.0

Finish = Callable[[], Tensor]
Shape = tuple[int, ...]


class Pending:
    """A transfer under way. It keeps its operand alive until `wait`."""

    __slots__ = ("works", "_finish", "_kept")

    def __init__(self, works: Sequence[Any], finish: Finish, kept: object = None) -> None:
        self.works, self._finish, self._kept = works, finish, kept

    def wait(self) -> Tensor:
        """The result, once the transfer is done."""
        for work in self.works:
            work.wait()
        self._kept = None
        return self._finish()


class Groups:
    """The process groups of one rank on a mesh, one for each axis of more than one rank.

    Args:
        mesh: the mesh of the plan, or that of each pipeline stage.
        rank: this rank; that of torch.distributed by default.
        timeout_s: how long a collective may wait for the other ranks.

    Attributes:
        ranks: the ranks of all stages.
        mesh, stage, coord: of this rank.

    Raises RunError W0801 when the mesh needs another number of ranks than there are.
    """

    def __init__(
        self,
        mesh: Mesh | Sequence[Mesh],
        rank: int | None = None,
        *,
        timeout_s: float = TIMEOUT_S,
    ) -> None:
        self.ranks, self.timeout_s = StageRanks.of(mesh), timeout_s
        self.distributed = dist.is_available() and dist.is_initialized()
        check_world(self.ranks)
        self.rank = rank if rank is not None else dist.get_rank() if self.distributed else 0
        self.stage = self.ranks.stage(self.rank)
        self.mesh, self.coord = self.ranks.meshes[self.stage], self.ranks.coord(self.rank)
        self._members: dict[str, tuple[int, ...]] = {}
        self._groups = self._agreed() if self._uneven() else {
            name: self._new_group(name) for name in self.mesh.names
        }
        self.nccl = self.distributed and dist.get_backend() == "nccl"
        self.watch = watch()
        self.device_mesh: Any = None  # a DeviceMesh, once one is asked for or given

    def _new_group(self, axis: str) -> Any:
        """The process group along an axis; None where the axis has one rank.

        Members alone take part in its making, axis after axis in mesh order on all ranks.
        """
        ranks = self.members(axis)
        if len(ranks) == 1:
            return None
        found = _GROUPS.get((ranks, self.timeout_s))
        if found is None or found[0] is not dist.group.WORLD:
            return self._make(ranks, f"mesh axis {axis!r}")
        return found[1]

    def _make(self, ranks: tuple[int, ...], what: str) -> Any:
        with together(f"makes the process group of {what}"):
            group = dist.new_group(
                list(ranks), timeout=timedelta(seconds=self.timeout_s),
                use_local_synchronization=True,
            )  # fmt: skip
        _GROUPS[ranks, self.timeout_s] = (dist.group.WORLD, group)
        return group

    def _uneven(self) -> bool:
        """Have the ranks of this world made, or make now, different numbers of process groups?"""
        if not self.distributed:
            return False
        world = dist.group.WORLD
        if len({len(mesh.axes) for mesh in self.ranks.meshes}) > 1:
            _UNEVEN.append(world)
        return any(other is world for other in _UNEVEN)

    def _agreed(self) -> dict[str, Any]:
        """The process groups of all axes, as many made on each rank: torch names a group that its
        members alone make after the number of groups that a rank has. All ranks take part."""
        out: dict[str, Any] = {}
        names = self.mesh.names
        for position in range(max(len(mesh.axes) for mesh in self.ranks.meshes)):
            axis = names[position] if position < len(names) else ""
            ranks = self.members(axis) if axis else (self.rank,)
            found = _GROUPS.get((ranks, self.timeout_s))
            known = len(ranks) == 1 or (found is not None and found[0] is dist.group.WORLD)
            flags = [False] * dist.get_world_size()
            with together("makes the process groups of its mesh"):
                dist.all_gather_object(flags, known)
            group = found[1] if found is not None and known else None
            if not all(flags):
                group = self._make(ranks, f"mesh axis {axis!r}" if axis else "this rank")
            if axis:
                out[axis] = group if len(ranks) > 1 else None
        return out

    def group(self, axis: str) -> Any:
        """The process group along an axis, or None for a single rank. Raises KeyError."""
        return self._groups[axis]

    def members(self, axis: str) -> tuple[int, ...]:
        """The ranks of this rank's process group along an axis."""
        if axis not in self._members:
            places = self.mesh.group(self.ranks.place(self.rank), [axis])
            self._members[axis] = tuple(self.ranks.rank(self.stage, place) for place in places)
        return self._members[axis]

    def coords(self, axis: str) -> list[tuple[int, ...]]:
        """The mesh coordinates of the members of this rank's group along an axis."""
        return [self.ranks.coord(rank) for rank in self.members(axis)]

    def position(self, axis: str) -> int:
        """This rank's coordinate along an axis."""
        return self.coord[self.mesh.axis(axis)]

    def shape(self, type: TensorType) -> Shape:
        """This rank's local shape of a type."""
        return local_shape(type, self.mesh, self.coord)

    def report(self, text: str) -> None:
        """Tell the other ranks why this one fails: `in ACTION: reason`."""
        if self.watch is not None:
            self.watch.report(text)

    def roll_call(self, where: str = "a transfer") -> list[str]:
        """After a failed transfer: which ranks failed, do not answer, or hold the others up."""
        return [] if self.watch is None else self.watch.roll_call(where)

    def barrier(self) -> None:
        """Wait for all ranks of the world."""
        if self.distributed:
            dist.barrier(device_ids=[torch.cuda.current_device()] if self.nccl else None)


_GROUPS: dict[tuple[tuple[int, ...], float], tuple[Any, Any]] = {}
#: worlds whose ranks have made different numbers of process groups
_UNEVEN: list[Any] = []


def adopt_group(ranks: tuple[int, ...], group: Any, timeout_s: float = TIMEOUT_S) -> None:
    """Use a process group that the user made for these ranks, instead of making one."""
    _GROUPS[ranks, timeout_s] = (dist.group.WORLD, group)


def check_world(ranks: StageRanks) -> None:
    """Raise RunError W0801 when the world does not have the ranks that a plan needs."""
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    needed = ranks.size
    if world != needed:
        shapes = dict.fromkeys(
            ", ".join(f"{name}={size}" for name, size in mesh.axes) or "no axes"
            for mesh in ranks.meshes
        )
        raise RunError(
            "W0801",
            f"the plan is for {needed} ranks ({'; '.join(shapes)}), this run has {world}",
            reason="each rank's part of every tensor was fixed when the plan was made",
            hint=f"start it with: torchrun --nproc-per-node {needed} -m weft run ..., "
            f"or compile again for a cluster of {world} devices",
        )  # fmt: skip
