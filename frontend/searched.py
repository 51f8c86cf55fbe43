"""A searched plan on its way to a `Plan`: what the driver asks before it places a program."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import inf

from ..costmodel.cluster import Cluster
from ..ir.errors import CompileError
from ..ir.module import Module
from ..passes.constraints import Constraints
from ..passes.search import SearchResult, Wishes, search_plan
from ..passes.search_realize import realize
from ..passes.search_state import ENOUGH
from .options import expect
from .report import Dump
from .search_text import explain_search
from .staging import written

_UNITS = {"": 1.0, "s": 1.0, "ms": 1e-3, "m": 60.0, "min": 60.0, "h": 3600.0}
_BUDGET = re.compile(r"([0-9]+(?:\.[0-9]+)?)\s*(s|ms|m|min|h|)")


def seconds_of(budget: str | float) -> float:
    """Seconds of `10s`, `2min`, `inf` or a number. Raises CompileError W1001."""
    expect(budget, (str, int, float), "the budget")
    if isinstance(budget, str):
        match = _BUDGET.fullmatch(budget.strip())
        seconds = float(match[1]) * _UNITS[match[2]] if match else -1.0
        seconds = inf if budget.strip() == "inf" else seconds
    else:
        seconds = float(budget)
    if not seconds > 0:
        raise CompileError(
            "W1001", f"the budget {budget!r} is no time", reason="it must be a positive number of "
            "seconds, a text with a unit, or inf", hint='write for example "10s" or "2min"',
        )  # fmt: skip
    return seconds


@dataclass(frozen=True)
class Searched:
    """What the search chose for a program, and what its placements had to obey."""

    result: SearchResult
    constraints: Constraints = Constraints()

    @property
    def staged(self) -> bool:
        """Has the plan several stages or micro-batches, or computes activations again?"""
        pipeline = self.result.best.pipeline
        again = any(stage.recompute for stage in pipeline.stages)
        return len(pipeline.stages) > 1 or pipeline.micro > 1 or again

    @property
    def mesh(self) -> str:
        """The mesh of a stage, as the option `mesh` of the place pass."""
        axes = self.result.best.layout.mesh.axes
        return ",".join(f"{name}={size}" for name, size in axes)

    def in_order(self, cluster: Cluster) -> Cluster:
        """The cluster with its groups as the stages stand on them."""
        line = self.result.best.layout.line
        return cluster.in_order(line) if line else cluster

    def dumps(self) -> list[tuple[str, Dump]]:
        """(what made it, dump) of each stage at each level, as `staging.staged_dumps`."""
        best = self.result.best
        found = self.result.realized or realize(
            self.result.split, self.result.units, best.pipeline, best.layout.clusters,
            self.constraints, enough=ENOUGH,
        )  # fmt: skip
        return written(
            found.split, found.parts, found.pieces, found.placed, found.orders,
            best.layout.clusters, schedules=found.schedules,
        )  # fmt: skip

    def explain(self) -> str:
        """The plan in words, where its time goes, and what it was chosen over."""
        return explain_search(self.result)


def searched(module: Module, cluster: Cluster, wishes: Wishes, budget_s: float) -> Searched:
    """Search a plan of a logical train step. Raises CompileError W0402, W0404."""
    result = search_plan(module, cluster, wishes=wishes, budget_s=budget_s)
    return Searched(result, wishes.constraints)
