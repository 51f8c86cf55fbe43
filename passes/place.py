"""place: a split for each op and a placement for each parameter, by exact search.

The problem is a cost network (`place_model`: variables, constraints, objective), solved exactly by
variable elimination on a tree decomposition (`place_solve`), one network per candidate mesh. A
parameter and its update share one variable, gradients and optimizer states are ordinary values, so
data, tensor, sequence and context parallelism and ZeRO stages 1 to 3 are all points of this one
space. With d states per variable and width w a network takes time d^(w+1); depth costs nothing.

Memory: where the cheapest placement does not fit, bytes get a price lambda (a Lagrange multiplier,
Everett, 1963), raised until it fits and then lowered by bisection.

Related: Cai et al., TensorOpt, 2020, and Jia et al., OptCNN, 2018 (elimination of nodes); Zheng et
al., Alpa, 2022 (the same costs as an integer program); OneFlow's solver (reductions, then greedy).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from ..costmodel.cluster import Cluster, meshes, parse_cluster
from ..ir.errors import CompileError
from ..ir.module import Module
from ..ir.types import Mesh
from .apply import Choices, apply
from .base import Pass
from .place_model import PlacementModel
from .place_solve import Solution, solve
from .price import Price, price

#: share of a device's memory that a plan may fill: allocator slack and communication buffers
#: take the rest (CUDA context and NCCL take 1 to 3 GB of 80)
MEMORY_SHARE = 0.9
#: steps of the search for the least price of memory
_RAISES, _BISECTIONS = 14, 4


@dataclass(frozen=True)
class MeshReport:
    """What the search found on one mesh.

    Attributes:
        mesh: the mesh.
        time_us: predicted time of a step, one action after the other.
        lower_bound_us: no placement on this mesh is faster (at the same price of memory).
        gap: (time - bound) / time; 0 when exact.
        variables: size of the network.
        treewidth: width of the network's best elimination order.
        core_variables: variables left after reductions.
        search_s: time of the search.
        us_per_byte: price of memory; 0 when everything fits anyway.
        fits: whether the predicted peak fits the device.
        peak_bytes: predicted peak memory of a rank.
    """

    mesh: Mesh
    time_us: float
    lower_bound_us: float
    gap: float
    variables: int
    treewidth: int
    core_variables: int
    search_s: float
    us_per_byte: float
    fits: bool
    peak_bytes: int

    def __str__(self) -> str:
        axes = " ".join(f"{name}={size}" for name, size in self.mesh.axes) or "one rank"
        proof = "exact" if self.gap == 0 else f"within {self.gap:.1%} of the optimum"
        memory = "" if self.fits else ", DOES NOT FIT"
        return (
            f"[{axes}] {self.time_us / 1e3:.3g} ms, {proof}, {self.peak_bytes / 1e6:.4g} MB "
            f"a rank{memory}, {self.variables} variables, width {self.treewidth}, "
            f"{self.search_s:.2g} s"
        )


@dataclass(frozen=True)
class PlacementResult:
    """The best placement found.

    Attributes:
        mesh: the chosen mesh.
        choices: what `apply` writes down.
        placed: the placed module.
        price: its price, from scratch.
        objective_us: the search's own objective without the price of memory.
        lower_bound_us: its lower bound on this mesh.
        report: one entry per candidate mesh, the chosen one first.
    """

    mesh: Mesh
    choices: Choices
    placed: Module
    price: Price
    objective_us: float
    lower_bound_us: float
    report: tuple[MeshReport, ...]


def search(
    module: Module,
    cluster: Cluster,
    candidates: Sequence[Mesh] | None = None,
    *,
    limit_s: float = 60.0,
) -> PlacementResult:
    """The fastest placement of a logical module that fits, over candidate meshes.

    Args:
        candidates: meshes to try; `meshes(cluster)` by default.
        limit_s: time after which a mesh's search returns its best placement with its gap.

    Raises:
        CompileError: W0402 where no mesh gives a legal placement, or parameters and optimizer
            states do not fit on any.
    """
    found = []
    for mesh in candidates or meshes(cluster):
        result = search_mesh(module, mesh, cluster, limit_s=limit_s)
        if result is not None:
            found.append(result)
    if not found:
        raise CompileError(
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
    return PlacementResult(
        best.mesh, best.choices, best.placed, best.price, best.objective_us,
        best.lower_bound_us, reports,
    )  # fmt: skip


def search_mesh(
    module: Module, mesh: Mesh, cluster: Cluster, *, limit_s: float = 60.0
) -> PlacementResult | None:
    """The fastest placement on one mesh, or None where none is legal."""
    start = time.perf_counter()
    model = PlacementModel(module, mesh, cluster)
    variables = len(model.network.unary)

    def attempt(weight: float) -> PlacementResult | None:
        solution = solve(model.weighted(weight), limit_s)
        if solution is None:
            return None
        return _result(model, solution, weight, variables, start)

    best = attempt(0.0)
    if best is None or best.report[0].fits:
        return best
    # the price at which all memory would cost as much as the step does now, over 4 ** 7
    scale = best.objective_us / max(1.0, best.price.peak_bytes) / 4**7
    low, high, fitting = 0.0, 0.0, None
    for number in range(_RAISES):
        weight = scale * 4**number
        result = attempt(weight)
        if result is None:
            break
        if result.report[0].fits:
            high, fitting = weight, result
            break
        low = weight
        if result.price.peak_bytes < best.price.peak_bytes:
            best = result
    for _ in range(_BISECTIONS if fitting else 0):
        middle = (low + high) / 2
        result = attempt(middle)
        if result is not None and result.report[0].fits:
            high, fitting = middle, result
        else:
            low = middle
    return fitting or best


def _result(
    model: PlacementModel, solution: Solution, weight: float, variables: int, start: float
) -> PlacementResult:
    choices = model.choices(solution.states)
    placed = apply(model.module, model.mesh, choices)
    cost = price(placed, model.cluster)
    memory_us = model.memory_term_us(solution.states, weight)
    time_us, bound_us = solution.cost - memory_us, solution.lower_bound - memory_us
    report = MeshReport(
        mesh=model.mesh,
        time_us=time_us,
        lower_bound_us=bound_us,
        gap=0.0 if solution.exact else (time_us - bound_us) / max(time_us, 1e-9),
        variables=variables,
        treewidth=solution.treewidth,
        core_variables=solution.core_variables,
        search_s=time.perf_counter() - start,
        us_per_byte=weight,
        fits=cost.peak_bytes <= MEMORY_SHARE * model.cluster.device.memory_bytes,
        peak_bytes=cost.peak_bytes,
    )
    return PlacementResult(model.mesh, choices, placed, cost, time_us, bound_us, (report,))


@dataclass(frozen=True)
class Place(Pass):
    """Search a placement and write it down.

    Before (logical):

        %y = einsum(%x, %w) {spec = "b k, k n -> b n"} : f32[8, 4]

    After (placed; `cluster` of the module's attributes or of the option):

        %y = einsum(%x, %w) {spec = "b k, k n -> b n"} split [dev = b] : f32[8, 4]{S(0)}

    Options:
        cluster: shorthand or TOML path; the module's attribute `cluster` by default.
        mesh: axis sizes as `2x2`, the only candidate; all default meshes by default.
        limit_s: time limit of the search on one mesh.
    """

    name: ClassVar[str] = "place"
    summary: ClassVar[str] = "search a split for each op and a placement for each parameter"
    levels: ClassVar[tuple[str, ...]] = ("logical",)

    cluster: str = ""
    mesh: str = ""
    limit_s: float = 60.0

    def run(self, module: Module) -> Module:
        """The placed module. Raises CompileError W0402, W0501."""
        text = self.cluster or str(module.attrs.get("cluster", ""))
        if not text:
            raise CompileError(
                "W0501", "place needs a cluster", reason="neither the module nor the pass has one",
                hint='write place[cluster="2x2:cpu"]',
            )  # fmt: skip
        cluster = parse_cluster(text)
        result = search(module, cluster, self._candidates(cluster), limit_s=self.limit_s)
        return result.placed.with_(attrs={**module.attrs, "cluster": text})

    def _candidates(self, cluster: Cluster) -> list[Mesh] | None:
        if not self.mesh:
            return None
        wanted = tuple(int(part) if part.isdigit() else 0 for part in self.mesh.split("x"))
        for mesh in meshes(cluster):
            if mesh.sizes == wanted:
                return [mesh]
        product = 1
        for size in wanted:
            product *= size
        if product != cluster.ranks:
            raise CompileError(
                "W0501", f"the mesh {self.mesh!r} does not have the {cluster.ranks} ranks of "
                f"{cluster}", hint="write the sizes of its axes, for example 2x2",
            )  # fmt: skip
        axes = tuple((f"axis{i}", size) for i, size in enumerate(wanted) if size > 1)
        return [Mesh(axes, cluster.groups[0].kind)]
