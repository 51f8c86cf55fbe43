"""What an outer search knows so far: plans, the nearest one that does not fit, the clock."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import inf

from ..costmodel.cluster import Cluster
from ..ir.errors import CompileError
from .apply import Choices, apply_phased
from .constraints import Constraints
from .place import MEMORY_SHARE, PlacementResult, search_mesh
from .search_costs import UnitCosts, unit_costs
from .search_evaluate import Pipeline
from .search_layouts import Layout
from .search_program import Programs
from .search_result import Found, Wishes, nothing_fits, rank, why

#: limit of one placement, after which it is the best found
_PLACE_S = 20.0
#: one placement takes no more than this share of the budget that is left; with a price of memory
#: there are several
_PLACE_SHARE = 0.25
#: relative gap at which the placement of a large program stops: below what the predictions are worth
ENOUGH = 0.01
#: more memory than any program takes: its placement is the fastest, whatever it holds
_ROOM_BYTES = 1e18
#: rejected plans that are kept for people
_KEPT = 5


@dataclass
class State:
    """One search.

    Attributes:
        cluster: of all devices.
        budget_s: seconds for everything.
        enough: relative gap at which the placement of a large program stops.
        found: plans that fit.
        misfit: the plan that is least over the memory.
        evaluated: plans that were evaluated.
        placements: programs that were placed.
    """

    programs: Programs
    cluster: Cluster
    wishes: Wishes
    budget_s: float
    enough: float = ENOUGH
    start: float = field(default_factory=time.perf_counter)
    found: list[Found] = field(default_factory=list)
    misfit: Pipeline | None = None
    evaluated: int = 0
    placements: int = 0

    @property
    def seconds(self) -> float:
        """Since the search began."""
        return time.perf_counter() - self.start

    def over(self, share: float = 1.0) -> bool:
        """Is this share of the budget used up?"""
        return self.seconds > self.budget_s * share

    # -- placements -----------------------------------------------------------------------------

    def place(self, layout: Layout, micro: int, cap_bytes: float) -> PlacementResult | None:
        """Place the short program on a stage's mesh.

        Args:
            micro: the program is that of one of so many micro-batches.
            cap_bytes: what all stages of the whole program may hold on a rank of each.
        """
        program = self.programs.of(micro)
        wanted = self.wishes.constraints
        most = min(cap_bytes, (wanted.memory_bytes or inf) * layout.stages) * self.programs.short.share
        room = replace(
            layout.cluster.device, memory_bytes=min(most / MEMORY_SHARE, _ROOM_BYTES)
        )
        self.placements += 1
        return search_mesh(
            program.module, layout.mesh, replace(layout.cluster, device=room),
            limit_s=min(_PLACE_S, max(0.5, _PLACE_SHARE * (self.budget_s - self.seconds))),
            phases=program.phases, micro=micro, constraints=Constraints(wanted.rules),
            enough=self.enough,
        )  # fmt: skip

    def costs(self, layout: Layout, placement: PlacementResult, micro: int) -> UnitCosts:
        """The costs of the units of the whole program under a placement of the short one.

        Raises CompileError W0401 or W0402 where the micro-batch has too few rows for it.
        """
        costs = self.read(self.programs, micro, layout, placement.choices)
        return costs.accumulating(layout.cluster) if micro > 1 else costs

    @staticmethod
    def read(programs: Programs, micro: int, layout: Layout, choices: Choices) -> UnitCosts:
        """As `costs`, of any short form of the program."""
        program = programs.of(micro)
        placed, phases = apply_phased(
            program.module, layout.mesh, replace(choices, phases=program.phases)
        )
        assert phases is not None  # they were given
        costs = unit_costs(placed, phases, program.unit_of, program.units, layout.cluster)
        return costs.spread(programs.short.of, programs.units.edges)

    def room_bytes(self, cluster: Cluster) -> float:
        """What a plan may fill of a device."""
        room = MEMORY_SHARE * cluster.device.memory_bytes
        return min(room, self.wishes.constraints.memory_bytes or inf)

    # -- plans ----------------------------------------------------------------------------------

    def add(self, plan: Pipeline, layout: Layout, placement: PlacementResult | None) -> bool:
        """Keep an evaluated plan. Does it fit?"""
        self.evaluated += 1
        if plan.fits:
            self.found.append(Found(plan, layout, placement))
        elif self.misfit is None or _over(plan) < _over(self.misfit):
            self.misfit = plan
        return plan.fits

    @property
    def best(self) -> Found:
        """The fastest; of equals the one with fewer stages, micro-batches and chunks."""
        return min(self.found, key=rank)

    @property
    def best_us(self) -> float:
        """The step of the fastest plan; infinite before the first one."""
        return min((found.pipeline.step_us for found in self.found), default=inf)

    def kinds(self) -> list[Found]:
        """The best plan of each layout, number of micro-batches and order, the fastest first."""
        kinds: dict[object, Found] = {}
        for found in sorted(self.found, key=rank):
            plan = found.pipeline
            kinds.setdefault((str(found.layout), plan.micro, plan.order, plan.chunks), found)
        return list(kinds.values())

    def rejected(self, best: Found) -> Iterator[tuple[Found, str]]:
        """The nearest plans of other kinds, and why they lost; each layout once, while there are
        enough of them."""
        others = [found for found in self.kinds() if found.pipeline != best.pipeline]
        seen = {str(best.layout)}
        first = []
        for found in others:
            if str(found.layout) not in seen:
                seen.add(str(found.layout))
                first.append(found)
        rest = [found for found in others if all(found is not f for f in first)]
        chosen = (first[: _KEPT - 1] + rest)[:_KEPT]
        for found in sorted(chosen, key=rank):
            yield found, why(found.pipeline, best.pipeline)

    def nothing(self, complete: bool) -> CompileError:
        """Why there is no plan."""
        if self.misfit is not None:
            return nothing_fits(self.misfit, self.cluster, self.wishes)
        if not complete:
            return CompileError(
                "W0404", f"the budget of {self.budget_s:g} s ran out before a first plan",
                reason="the program was not yet placed on any mesh", hint="give it more seconds",
            )  # fmt: skip
        return CompileError(
            "W0402", f"no placement on {self.cluster} is legal",
            reason="every candidate mesh leaves some op without a legal split",
            hint="use fewer devices",
        )  # fmt: skip


def _over(plan: Pipeline) -> float:
    """Bytes by which the fullest rank is over its memory."""
    return max(stage.peak_bytes - stage.memory_bytes for stage in plan.stages)


__all__ = ["ENOUGH", "State"]
