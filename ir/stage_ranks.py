"""Which ranks the stages of a plan own, where each stage may have a mesh of its own.

Stage i owns as many ranks as its mesh has, behind those of the stages before it. Inside of a stage a
rank has a *place*, its number on the stage's mesh.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate

from .types import Mesh


@dataclass(frozen=True)
class StageRanks:
    """The ranks of all stages.

    Attributes:
        meshes: that of each stage.
    """

    meshes: tuple[Mesh, ...]

    @staticmethod
    def of(meshes: Mesh | Sequence[Mesh]) -> StageRanks:
        """The ranks of one mesh, or of stages."""
        return StageRanks((meshes,) if isinstance(meshes, Mesh) else tuple(meshes))

    @cached_property
    def firsts(self) -> tuple[int, ...]:
        """The first rank of each stage, and behind them the number of ranks."""
        return (0, *accumulate(mesh.size for mesh in self.meshes))

    @property
    def size(self) -> int:
        """Ranks of all stages."""
        return self.firsts[-1]

    @property
    def count(self) -> int:
        """Number of stages."""
        return len(self.meshes)

    def stage(self, rank: int) -> int:
        """The stage of a rank."""
        return bisect_right(self.firsts, rank, 0, self.count) - 1

    def place(self, rank: int) -> int:
        """A rank's number on the mesh of its stage."""
        return rank - self.firsts[self.stage(rank)]

    def rank(self, stage: int, place: int) -> int:
        """The rank at a place of a stage."""
        return self.firsts[stage] + place

    def ranks(self, stage: int) -> range:
        """The ranks of a stage."""
        return range(self.firsts[stage], self.firsts[stage + 1])

    def mesh(self, rank: int) -> Mesh:
        """The mesh that a rank is on."""
        return self.meshes[self.stage(rank)]

    def coord(self, rank: int) -> tuple[int, ...]:
        """The coordinate of a rank on the mesh of its stage."""
        return self.mesh(rank).coord(self.place(rank))


__all__ = ["StageRanks"]
