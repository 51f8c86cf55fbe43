"""place: a split for each op and a placement for each parameter, by exact search.

The problem is a cost network (`place_model`: variables, constraints, objective), solved exactly by
variable elimination on a tree decomposition (`place_solve`), one network per candidate mesh. A
parameter and its update share one variable, gradients and optimizer states are ordinary values, so
data, tensor, sequence and context parallelism and ZeRO stages 1 to 3 are all points of this one
space. With d states per variable and width w a network takes time d^(w+1); depth costs nothing.

Meshes of three axes and more: exact searches over each pair of axes in turn, the others kept as they
are, until no pair helps (very large neighbourhood descent); the bound then is the least compute time.
Programs of a few ops are searched over all axes at once.

Memory: where the cheapest placement does not fit, `place_memory` trades time for bytes.

Related: Cai et al., TensorOpt, 2020, and Jia et al., OptCNN, 2018 (elimination of nodes); Zheng et
al., Alpa, 2022 (the same costs as an integer program); OneFlow's solver (reductions, then greedy).
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import ClassVar

from ..costmodel.cluster import Cluster, meshes, parse_cluster
from ..ir.errors import CompileError
from ..ir.module import Module
from ..ir.types import Mesh
from .base import Pass
from .constraints import Constraints
from .place_cache import cached
from .place_memory import fitted, frontier
from .place_model import Runs
from .place_refuse import check_axes, conflict, over_cap
from .place_task import JOINT_AXES, MEMORY_SHARE, MeshReport, PlacementResult, Task

log = logging.getLogger("weft.place")


def search(
    module: Module,
    cluster: Cluster,
    candidates: Sequence[Mesh] | None = None,
    *,
    limit_s: float = 60.0,
    constraints: Constraints = Constraints(),
    enough: float = 0.0,
    cache: Path | None = None,
) -> PlacementResult:
    """The fastest placement of a logical module that fits, over candidate meshes.

    Args:
        candidates: meshes to try; `meshes(cluster)` by default.
        limit_s: time after which a mesh's search returns its best placement with its gap.
        constraints: what the placement must obey.
        enough: relative gap at which the search of a large program stops.
        cache: folder of answers, by what was asked; None keeps nothing.

    Raises:
        CompileError: W0402 where no mesh gives a legal placement, or parameters and optimizer
            states do not fit on any, or constraints contradict each other or are about nothing.
    """
    found, refused = [], None
    tried = candidates or meshes(cluster)
    check_axes(constraints, tried)
    for mesh in tried:
        try:
            result = search_mesh(
                module, mesh, cluster, limit_s=limit_s, constraints=constraints, enough=enough,
                cache=cache,
            )  # fmt: skip
        except CompileError as error:
            if error.code != "W0402":
                raise
            refused = error
            continue
        if result is not None:
            found.append(result)
    if not found:
        raise refused or CompileError(
            "W0402", f"no placement on {cluster} is legal",
            reason="every candidate mesh leaves some op without a legal split",
            hint="use fewer devices",
        )  # fmt: skip
    found.sort(key=lambda r: (not r.report[0].fits, r.objective_us))
    best = found[0]
    limit = cluster.device.memory_bytes
    if best.price.persistent_bytes > limit:
        raise CompileError(
            "W0402",
            f"parameters and optimizer states do not fit on {cluster}",
            reason=f"each rank would hold {best.price.persistent_bytes / 1e9:.3g} GB of them and "
            f"has {limit / 1e9:.3g} GB",
            hint="use more devices, or fewer optimizer states",
        )
    reports = tuple(report for result in found for report in result.report)
    return replace(best, report=reports)


def search_mesh(
    module: Module,
    mesh: Mesh,
    cluster: Cluster,
    *,
    limit_s: float = 60.0,
    joint_axes: int = JOINT_AXES,
    phases: Sequence[str] | None = None,
    micro: int = 1,
    constraints: Constraints = Constraints(),
    enough: float = 0.0,
    recompute: bool = False,
    cache: Path | None = None,
) -> PlacementResult | None:
    """The fastest placement on one mesh that fits, or the one of least memory; None if none is legal.

    Args:
        joint_axes: meshes with more axes than this are searched by descent over pairs of axes.
        phases: of each op of the entry (`micro.TimeSplit.phases`): forward and backward ops run for
            each micro-batch, the others once.
        micro: number of micro-batches; the module is the program of one.
        constraints: what the placement must obey. One that is about an axis that the mesh does not
            have says nothing.
        enough: relative gap at which the search of a large program stops; 0 for a proven optimum.
        recompute: whether blocks may be computed again where the plan does not fit.
        cache: folder of answers, by what was asked; None keeps nothing.

    Raises:
        CompileError: W0402 where constraints contradict each other, with a least set of them, or one
            is about nothing in the program, or the memory cap cannot be kept.
    """
    runs = Runs(tuple(phases) if phases is not None else None, micro)

    def make(modes: Mapping[int, str]) -> Task:
        return Task(
            module, mesh, cluster, limit_s, joint_axes, runs, constraints, enough, modes
        )

    def found() -> PlacementResult | None:
        task = make({})
        best = task.attempt(0.0)
        if best is None and task.chosen.rules:
            raise conflict(task.chosen.rules, task.legal)
        if best is None or best.report[0].fits:
            return best
        best = fitted(task, best, make if recompute else None)
        if constraints.memory_bytes is not None and not best.report[0].fits:
            raise over_cap(constraints, best.price.peak_bytes)
        return best

    wishes = (limit_s, joint_axes, str(constraints), enough, recompute)
    return cached(cache, module, mesh, cluster, runs, wishes, found)


def search_frontier(
    module: Module,
    mesh: Mesh,
    cluster: Cluster,
    *,
    limit_s: float = 60.0,
    phases: Sequence[str] | None = None,
    micro: int = 1,
    constraints: Constraints = Constraints(),
    enough: float = 0.0,
) -> tuple[PlacementResult, ...]:
    """Time against memory on one mesh: plans of which none is both slower and larger than another.

    Each point has its choices, blocks that are computed again included, and `price` with the times
    of its phases and its bytes: persistent, saved for the backward pass, and at the peak. Arguments
    are those of `search_mesh`. Raises CompileError W0402 as that does.
    """
    runs = Runs(tuple(phases) if phases is not None else None, micro)

    def make(modes: Mapping[int, str]) -> Task:
        return Task(
            module, mesh, cluster, limit_s, JOINT_AXES, runs, constraints, enough, modes
        )

    task = make({})
    found = frontier(task, make)
    if not found and task.chosen.rules:
        raise conflict(task.chosen.rules, task.legal)
    return found


@dataclass(frozen=True)
class Place(Pass):
    """Search a placement and write it down.

    Before (logical):

        %y = einsum(%x, %w) {spec = "b k, k n -> b n"} : f32[8, 4]

    After (placed; `cluster` of the module's attributes or of the option):

        %y = einsum(%x, %w) {spec = "b k, k n -> b n"} split [dev = b] : f32[8, 4]{S(0)}

    Options:
        cluster: shorthand or TOML path; the module's attribute `cluster` by default.
        mesh: axis sizes as `2x2`, or with names `dp=2,tp=2`, the only candidate; all default
            meshes by default.
        limit_s: seconds after which the best so far is taken, for each mesh and price of memory; what
            is found later is mostly the proof.
        constraints: what the placement must obey, as `constraints.Constraints` reads it.
        gap: relative gap to the lower bound at which the search of a large program stops (about
            five transformer blocks or more; smaller ones are solved to the end). 0 proves the
            optimum: most of the time goes into the proof, the plan is mostly the same.

    Attributes:
        cache: folder of placements found before; None keeps nothing. Not an option: it changes
            nothing about the result.
    """

    name: ClassVar[str] = "place"
    summary: ClassVar[str] = "search a split for each op and a placement for each parameter"
    levels: ClassVar[tuple[str, ...]] = ("logical",)

    cluster: str = ""
    mesh: str = ""
    limit_s: float = 10.0
    constraints: str = ""
    gap: float = 0.01
    cache: Path | None = None

    def run(self, module: Module) -> Module:
        """The placed module. Raises CompileError W0402, W0501."""
        text = self.cluster or str(module.attrs.get("cluster", ""))
        if not text:
            raise CompileError(
                "W0501", "place needs a cluster", reason="neither the module nor the pass has one",
                hint='write place[cluster="2x2:cpu"]',
            )  # fmt: skip
        cluster = parse_cluster(text)
        result = search(
            module, cluster, self.candidates(cluster), limit_s=self.limit_s,
            constraints=Constraints.parse(self.constraints), enough=self.gap,
            cache=self.cache,
        )  # fmt: skip
        for number, report in enumerate(result.report):
            log.info("%s: %s", "chosen" if number == 0 else "also tried", report)
        if log.isEnabledFor(logging.DEBUG):
            for function, op in result.placed.walk():
                split = ", ".join(f"{axis}={dim}" for axis, dim in op.split.items())
                log.debug("@%s %s at %s: %s", function.name, op.name, op.loc, split or "whole")
        return result.placed.with_(attrs={**module.attrs, "cluster": text})

    def candidates(self, cluster: Cluster) -> list[Mesh] | None:
        """The mesh of the option; None where it leaves that open. Raises CompileError W0501."""
        if not self.mesh:
            return None
        if "=" in self.mesh:
            return [self._named(cluster)]
        wanted = tuple(int(part) if part.isdigit() else 0 for part in self.mesh.split("x"))
        for mesh in meshes(cluster):
            if mesh.sizes == wanted:
                return [mesh]
        if prod(wanted) != cluster.ranks:
            raise CompileError(
                "W0501", f"the mesh {self.mesh!r} does not have the {cluster.ranks} ranks of "
                f"{cluster}", hint="write the sizes of its axes, for example 2x2",
            )  # fmt: skip
        axes = tuple((f"axis{i}", size) for i, size in enumerate(wanted) if size > 1)
        return [Mesh(axes, cluster.groups[0].kind)]

    def _named(self, cluster: Cluster) -> Mesh:
        """The mesh of axes with names, `dp=2,tp=2`; axes of one rank are left out."""
        pairs = [part.partition("=") for part in self.mesh.split(",")]
        bad = [name for name, _, size in pairs if not (name and size.isdigit() and int(size))]
        axes = [] if bad else [(name.strip(), int(size)) for name, _, size in pairs]
        if bad or prod(size for _, size in axes) != cluster.ranks:
            raise CompileError(
                "W0501", f"the mesh {self.mesh!r} does not have the {cluster.ranks} ranks of "
                f"{cluster}", hint="write names and sizes of its axes, for example dp=2,tp=2",
            )  # fmt: skip
        return Mesh(tuple((n, s) for n, s in axes if s > 1), cluster.groups[0].kind)


__all__ = [
    "MEMORY_SHARE", "MeshReport", "Place", "PlacementResult", "search", "search_frontier",
    "search_mesh",
]  # fmt: skip
