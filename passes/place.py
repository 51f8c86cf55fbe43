"""place: a split for each op and a placement for each parameter, by exact search.

The problem is a cost network (`place_model`: variables, constraints, objective), solved exactly by
variable elimination on a tree decomposition (`place_solve`), one network per candidate mesh. A
parameter and its update share one variable, gradients and optimizer states are ordinary values, so
data, tensor, sequence and context parallelism and ZeRO stages 1 to 3 are all points of this one
space. With d states per variable and width w a network takes time d^(w+1); depth costs nothing.

Meshes of three axes and more: exact searches over each pair of axes in turn, the others kept as they
are, until no pair helps (very large neighbourhood descent); the bound then is the least compute time.

Memory: where the cheapest placement does not fit, bytes get a price lambda (a Lagrange multiplier,
Everett, 1963): the least of a few powers of ten at which it fits, then bisection.

Related: Cai et al., TensorOpt, 2020, and Jia et al., OptCNN, 2018 (elimination of nodes); Zheng et
al., Alpa, 2022 (the same costs as an integer program); OneFlow's solver (reductions, then greedy).
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from math import inf, prod
from typing import ClassVar

from ..costmodel.cluster import Cluster, meshes, parse_cluster
from ..ir.errors import CompileError
from ..ir.module import Module
from ..ir.types import Mesh
from .apply import Choices, FunctionChoices, apply_phased
from .base import Pass
from .constraints import Constraints, Rule
from .place_body import Path
from .place_model import Decoded, Near, PlacementModel, Runs
from .place_refuse import check_axes, conflict, over_cap, unused
from .place_solve import Solution, solve
from .price import Price, price

log = logging.getLogger("weft.place")

#: share of a device's memory that a plan may fill: allocator slack and communication buffers
#: take the rest (CUDA context and NCCL take 1 to 3 GB of 80)
MEMORY_SHARE = 0.9
#: prices of memory that are tried, as powers of ten, and steps of bisection below the first that fits
_POWERS, _BISECTIONS = range(-3, 4), 2
#: meshes with more axes are searched by descent: with 3 axes a hub of a 4-dim tensor has 27,000
#: states
JOINT_AXES = 2
#: programs of so few ops are searched over all axes at once
JOINT_OPS = 16
_ROUNDING = 1e-6
#: relative difference of a plan's price to the search's objective that is rounding
_DRIFT = 1e-6
#: a round of descent over all pairs that gains less is the last
_ENOUGH = 1e-3


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
        phases: of each op of the placed entry: `before`, `forward`, `backward` or `update`; None
            where none were given.
    """

    mesh: Mesh
    choices: Choices
    placed: Module
    price: Price
    objective_us: float
    lower_bound_us: float
    report: tuple[MeshReport, ...]
    phases: tuple[str, ...] | None = None


def search(
    module: Module,
    cluster: Cluster,
    candidates: Sequence[Mesh] | None = None,
    *,
    limit_s: float = 60.0,
    constraints: Constraints = Constraints(),
) -> PlacementResult:
    """The fastest placement of a logical module that fits, over candidate meshes.

    Args:
        candidates: meshes to try; `meshes(cluster)` by default.
        limit_s: time after which a mesh's search returns its best placement with its gap.
        constraints: what the placement must obey.

    Raises:
        CompileError: W0402 where no mesh gives a legal placement, or parameters and optimizer
            states do not fit on any, or constraints contradict each other or are about nothing.
    """
    found, refused = [], None
    tried = candidates or meshes(cluster)
    check_axes(constraints, tried)
    for mesh in tried:
        try:
            result = search_mesh(module, mesh, cluster, limit_s=limit_s, constraints=constraints)
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
) -> PlacementResult | None:
    """The fastest placement on one mesh that fits, or the one of least memory; None if none is legal.

    Args:
        joint_axes: meshes with more axes than this are searched by descent over pairs of axes.
        phases: of each op of the entry (`micro.TimeSplit.phases`): forward and backward ops run for
            each micro-batch, the others once.
        micro: number of micro-batches; the module is the program of one.
        constraints: what the placement must obey. One that is about an axis that the mesh does not
            have says nothing.
        enough: relative gap at which the search stops; 0 for a proven optimum.

    Raises:
        CompileError: W0402 where constraints contradict each other, with a least set of them, or one
            is about nothing in the program, or the memory cap cannot be kept.
    """
    runs = Runs(tuple(phases) if phases is not None else None, micro)
    task = _Task(module, mesh, cluster, limit_s, joint_axes, runs, constraints, enough)
    best = task.attempt(0.0)
    if best is None and task.chosen.rules:
        raise conflict(task.chosen.rules, lambda rules: task.legal(rules))
    if best is None or best.report[0].fits:
        return best
    # time over peak is the price at which all memory would cost as much as the step takes
    unit = best.objective_us / max(1.0, best.price.peak_bytes)
    low, frugal = 0.0, best
    for power in _POWERS:
        high = unit * 10.0**power
        result = task.attempt(high)
        if result is None:
            continue
        if result.report[0].fits:
            frugal = result
            break
        # the sum of bytes stands for the peak, which may rise where the sum falls
        frugal = min(frugal, result, key=lambda r: r.price.peak_bytes)
        low = high
    for _ in range(_BISECTIONS if frugal.report[0].fits else 0):
        middle = (low + high) / 2
        result = task.attempt(middle)
        if result is not None and result.report[0].fits:
            high, frugal = middle, min(frugal, result, key=lambda r: r.objective_us)
        else:
            low = middle
    cap = constraints.memory_bytes
    if cap is not None and not frugal.report[0].fits:
        raise over_cap(constraints, frugal.price.peak_bytes)
    return frugal


@dataclass
class _Task:
    """The search on one mesh, for several prices of memory."""

    module: Module
    mesh: Mesh
    cluster: Cluster
    limit_s: float
    joint_axes: int
    runs: Runs
    constraints: Constraints
    enough: float = 0.0

    def __post_init__(self) -> None:
        self.start = time.perf_counter()
        self.chosen = self.constraints.on(self.mesh)
        few = sum(len(function.ops) for function in self.module.functions) <= JOINT_OPS
        self.joint = few or len(self.mesh.axes) <= self.joint_axes
        self.model: PlacementModel | None = None
        if self.joint:
            self.model = self._model(None)
            unused(self.model.unused, self.module)

    def _model(self, near: Near | None) -> PlacementModel:
        return PlacementModel(
            self.module, self.mesh, self.cluster, near, self.chosen, self.runs
        )

    def legal(self, rules: Sequence[Rule]) -> bool:
        """Is there a placement that obeys some of the constraints?"""
        model = PlacementModel(
            self.module, self.mesh, self.cluster, None, Constraints(tuple(rules)), self.runs
        )
        return solve(model.weighted(0.0), self.limit_s) is not None

    def attempt(self, us_per_byte: float) -> PlacementResult | None:
        """The best placement at a price of memory."""
        if self.model is not None:
            solution = solve(self.model.weighted(us_per_byte), self.limit_s, self.enough)
            if solution is None:
                return None
            decoded = self.model.plan(solution.states)
            return self._result(self.model, decoded, solution, us_per_byte, None)
        return self._descend(us_per_byte)

    def _descend(self, us_per_byte: float) -> PlacementResult | None:
        """Exact searches over two axes at a time, the others kept, until none of them helps."""
        chosen: Mapping[Path, FunctionChoices] = {}
        best, cost, bound_us = None, inf, 0.0
        while True:
            before = cost
            for free in combinations(range(len(self.mesh.axes)), 2):
                model = self._model(Near(chosen, frozenset(free)))
                bound_us = bound_us or model.least_compute_us()
                solution = solve(model.weighted(us_per_byte), self.limit_s, self.enough)
                if solution is None:
                    return best
                if solution.cost < cost:
                    decoded = model.plan(solution.states)
                    chosen, cost = decoded.chosen, solution.cost
                    best = self._result(model, decoded, solution, us_per_byte, bound_us)
            if cost >= before * (1 - _ENOUGH) or time.perf_counter() - self.start > self.limit_s:
                return best

    def _result(
        self,
        model: PlacementModel,
        decoded: Decoded,
        solution: Solution,
        us_per_byte: float,
        bound_us: float | None,
    ) -> PlacementResult:
        placed, phases = apply_phased(self.module, self.mesh, decoded.choices)
        cost = price(placed, self.cluster, phases, self.runs.micro)
        memory_us = model.memory_term_us(solution.states, us_per_byte)
        time_us = solution.cost - memory_us + decoded.slack_us
        if abs(cost.total_us - time_us) > _DRIFT * max(1.0, time_us):
            raise AssertionError(
                f"the plan for {self.mesh} costs {cost.total_us:.9g} us, the search says "
                f"{time_us:.9g} us"
            )
        if bound_us is None:
            bound_us = solution.lower_bound - memory_us
        gap = max(0.0, (time_us - bound_us) / max(time_us, 1e-9))
        limit = MEMORY_SHARE * self.cluster.device.memory_bytes
        if self.constraints.memory_bytes is not None:
            limit = min(limit, self.constraints.memory_bytes)
        report = MeshReport(
            mesh=self.mesh,
            time_us=time_us,
            lower_bound_us=bound_us,
            gap=gap if gap > _ROUNDING else 0.0,
            variables=solution.variables,
            treewidth=solution.treewidth,
            core_variables=solution.core_variables,
            search_s=time.perf_counter() - self.start,
            us_per_byte=us_per_byte,
            fits=cost.peak_bytes <= limit,
            peak_bytes=cost.peak_bytes,
        )
        return PlacementResult(
            self.mesh, decoded.choices, placed, cost, time_us, bound_us, (report,), phases
        )


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
        limit_s: time limit of the search on one mesh.
        constraints: what the placement must obey, as `constraints.Constraints` reads it.
    """

    name: ClassVar[str] = "place"
    summary: ClassVar[str] = "search a split for each op and a placement for each parameter"
    levels: ClassVar[tuple[str, ...]] = ("logical",)

    cluster: str = ""
    mesh: str = ""
    limit_s: float = 60.0
    constraints: str = ""

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
            constraints=Constraints.parse(self.constraints),
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
