"""The placement search on one mesh: a network, its solution, and the plan that it describes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from math import inf

from ..costmodel.cluster import Cluster
from ..ir.module import Module
from ..ir.types import Mesh
from .apply import Choices, FunctionChoices, apply_phased
from .constraints import Constraints, Rule
from .place_body import Path
from .place_model import Decoded, Near, PlacementModel, Runs
from .place_recompute import recompute
from .place_refuse import unused
from .place_solve import Solution, solve
from .price import Price, price

#: share of a device's memory that a plan may fill: allocator slack and communication buffers
#: take the rest (CUDA context and NCCL take 1 to 3 GB of 80)
MEMORY_SHARE = 0.9
#: meshes with more axes are searched by descent: with 3 axes a hub of a 4-dim tensor has 27,000
#: states
JOINT_AXES = 2
#: programs of so few ops are searched over all axes at once
JOINT_OPS = 16
_ROUNDING = 1e-6
#: relative difference of a plan's price to the search's objective that is rounding
_DRIFT = 1e-6
#: relative gain below which a round of descent over all pairs is the last, and gap at which a
#: search with a price of memory stops
_ENOUGH = 1e-3


@dataclass(frozen=True)
class MeshReport:
    """What the search found on one mesh.

    Attributes:
        mesh: the mesh.
        time_us: predicted time of a step, one action after the other.
        lower_bound_us: no placement on this mesh is faster, with less memory or with more.
        gap: (time - bound) / time; 0 when exact.
        variables: size of the network.
        width: of the elimination order that was used; 0 where bounds were enough.
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
    width: int
    core_variables: int
    search_s: float
    us_per_byte: float
    fits: bool
    peak_bytes: int

    def __str__(self) -> str:
        axes = " ".join(f"{name}={size}" for name, size in self.mesh.axes) or "one rank"
        proof = "exact" if self.gap == 0 else f"within {100 * self.gap:.2g} % of the optimum"
        memory = "" if self.fits else ", DOES NOT FIT"
        return (
            f"[{axes}] {self.time_us / 1e3:.3g} ms, {proof}, {self.peak_bytes / 1e6:.4g} MB "
            f"a rank{memory}, {self.variables} variables, {self.search_s:.2g} s"
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
        logical: the program that was placed: the given one, or with blocks computed again.
        modes: index of a call of the given entry -> how its block is computed again.
    """

    mesh: Mesh
    choices: Choices
    placed: Module
    price: Price
    objective_us: float
    lower_bound_us: float
    report: tuple[MeshReport, ...]
    phases: tuple[str, ...] | None = None
    logical: Module | None = None
    modes: Mapping[int, str] = field(default_factory=dict)


@dataclass
class Task:
    """The search on one mesh, for several prices of memory.

    Attributes:
        modes: blocks to compute again, see `place_recompute`.
    """

    module: Module
    mesh: Mesh
    cluster: Cluster
    limit_s: float
    joint_axes: int
    runs: Runs
    constraints: Constraints
    enough: float = 0.0
    modes: Mapping[int, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.start = time.perf_counter()
        if self.modes:
            self.module, phases = recompute(self.module, self.modes, self.runs.phases)
            self.runs = Runs(phases, self.runs.micro)
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

    @property
    def room_bytes(self) -> float:
        """The most that a plan may hold on a rank."""
        room = MEMORY_SHARE * self.cluster.device.memory_bytes
        cap = self.constraints.memory_bytes
        return room if cap is None else min(room, cap)

    def legal(self, rules: Sequence[Rule]) -> bool:
        """Is there a placement that obeys some of the constraints?"""
        model = PlacementModel(
            self.module, self.mesh, self.cluster, None, Constraints(tuple(rules)), self.runs
        )
        return solve(model.weighted(0.0), self.limit_s) is not None

    def attempt(self, us_per_byte: float) -> PlacementResult | None:
        """The best placement at a price of memory."""
        if self.model is not None:
            # plans at a price of memory are bounded by the one without, not by their own proof
            enough = max(self.enough, _ENOUGH) if us_per_byte else self.enough
            solution = solve(self.model.weighted(us_per_byte), self.limit_s, enough)
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
            # what is added for memory is at most this for any other placement
            bound_us = solution.lower_bound - model.most_memory_term_us(us_per_byte)
        gap = max(0.0, (time_us - bound_us) / max(time_us, 1e-9))
        report = MeshReport(
            mesh=self.mesh,
            time_us=time_us,
            lower_bound_us=bound_us,
            gap=gap if gap > _ROUNDING else 0.0,
            variables=solution.variables,
            width=solution.width,
            core_variables=solution.core_variables,
            search_s=time.perf_counter() - self.start,
            us_per_byte=us_per_byte,
            fits=cost.peak_bytes <= self.room_bytes,
            peak_bytes=cost.peak_bytes,
        )
        return PlacementResult(
            self.mesh, decoded.choices, placed, cost, time_us, bound_us, (report,), phases,
            self.module, self.modes,
        )  # fmt: skip
