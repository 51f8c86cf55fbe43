"""The outer search: stages, micro-batches, order, recompute and meshes of a train step, together.

    for each way to deal the devices out to stages, and each mesh of a stage     (a *layout*)
        a bound from the ops' least times                                        search_program
        an estimate from placements on one axis                                  search_coarse
    for each layout, the best estimate first; where its bound or its estimate
    is above the best plan, next
        place the program of one micro-batch on the mesh                         place.search_mesh
        read the costs of its units off the placed module                        search_costs
        for each number of micro-batches: cut units over stages                  search_cuts
            for each order: step time, memory, exactly                           search_evaluate
    the best few: cut, placed as what they are, replayed event by event          search_realize

The program is placed once per layout, whatever its depth, and the placement is priced again for
each number of micro-batches. All of it is deterministic; a budget ends it at the best plan so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import inf

from ..costmodel.cluster import Cluster
from ..ir.errors import CompileError
from ..ir.module import Module
from .micro import time_split
from .search_carry import Source
from .search_coarse import Estimate, estimates
from .search_evaluate import Pipeline
from .search_layout import LayoutSearch, micros_of
from .search_layouts import Layout, layouts_of, part_of
from .search_mixed import search_mixed
from .search_program import Programs
from .search_realize import Realized, realize, replayed
from .search_result import Found, Replay, SearchResult, Wishes, rank
from .search_state import ENOUGH, State
from .search_units import units_of

#: layouts whose estimate is above the best plan by more than this are not placed
_SLACK = 0.5
#: plans that are as near to the fastest are replayed by the event simulator
_NEAR = 0.15
#: meshes of more axes are searched by descent, which takes ten times as long: they come last
_JOINT_AXES = 2
#: shares of the budget after which estimates, and layouts, end: what is left is for finalists
_COARSE_SHARE, _LAYOUT_SHARE = 0.4, 0.6


def search_plan(
    module: Module,
    cluster: Cluster,
    *,
    wishes: Wishes = Wishes(),
    budget_s: float = inf,
    layouts: Sequence[Layout] | None = None,
    finalists: int = 3,
    enough: float = ENOUGH,
) -> SearchResult:
    """The fastest plan of a logical train step.

    Args:
        finalists: of so many plans the schedules are written and replayed by the event simulator,
            which decides between them.
        budget_s: after so many seconds the best plan so far is returned.
        layouts: what is tried; `layouts_of(cluster)` by default.
        enough: relative gap at which the placement of a large program stops.

    Raises CompileError: W0402 where nothing fits, with what it misses by; W0404 where wishes cannot be
        met, or the budget ran out before a first plan.
    """
    state = State(Programs(module), cluster, wishes, budget_s, enough)
    if len(cluster.groups) > 1:
        return search_mixed(state)
    return _Search(state, _layouts(state, layouts), finalists).run()


def _layouts(state: State, given: Sequence[Layout] | None) -> list[Layout]:
    wanted, count = state.wishes.stages, state.programs.units.count
    if given is not None:
        layouts = list(given)
    else:
        layouts = list(layouts_of(state.cluster, min(count, wanted or count)))
    chosen = [layout for layout in layouts if wanted in (None, layout.stages)]
    if not chosen:
        raise CompileError(
            "W0404", f"no plan of {wanted} stages on {state.cluster}",
            reason=f"{state.cluster.ranks} devices and {count} parts of the program do not "
            f"divide into {wanted} stages", hint="leave stages out, or ask for a divisor",
        )  # fmt: skip
    return chosen


class _Search:
    """Over the layouts of equal devices."""

    def __init__(self, state: State, layouts: list[Layout], finalists: int) -> None:
        self.state, self.layouts, self.finalists = state, layouts, finalists
        self.bounds = [
            state.programs.bound_us(layout, micros_of(state, layout)) for layout in layouts
        ]

    def run(self) -> SearchResult:
        """Search. See `search_plan`."""
        state, layouts, bounds = self.state, self.layouts, self.bounds
        guessed = self._estimates()
        bounded, slow, complete = 0, 0, True
        open_bounds = []  #: of layouts that were not placed, though their bound allows more
        for index in self._order(guessed):
            if bounds[index] >= state.best_us:
                bounded += 1
            elif inf > guessed[index].step_us > (1 + _SLACK) * state.best_us:
                slow += 1
                open_bounds.append(bounds[index])
            elif state.over(_LAYOUT_SHARE) and (state.found or state.over()):
                complete = False
                open_bounds.append(bounds[index])
            else:
                LayoutSearch(state, layouts[index], guessed[index].micro).run()
        if not state.found:
            raise state.nothing(complete)
        best, realized = self._final()
        lower = min([best.pipeline.step_us, *open_bounds, min(bounds, default=inf)])
        split = time_split(state.programs.module, best.pipeline.micro)
        return SearchResult(
            best, split, units_of(split), tuple(state.rejected(best)), len(layouts), bounded, slow,
            state.evaluated, lower, state.seconds, complete, realized,
        )  # fmt: skip

    def _estimates(self) -> list[Estimate]:
        if len(self.layouts) == 1:
            return [Estimate()]
        # the budget may not last: the first mesh of each number of stages, then the second, ...
        count: dict[int, int] = {}
        place = []
        for layout in self.layouts:
            place.append(count.get(layout.stages, 0))
            count[layout.stages] = place[-1] + 1
        order = sorted(range(len(self.layouts)), key=lambda i: (place[i], i))
        found = estimates(self.state, [self.layouts[i] for i in order], _COARSE_SHARE)
        return [found[order.index(i)] for i in range(len(order))]

    def _order(self, guessed: Sequence[Estimate]) -> list[int]:
        def key(i: int) -> tuple[object, ...]:
            layout = self.layouts[i]
            many = len(layout.mesh.axes) > _JOINT_AXES
            return many, guessed[i].step_us, self.bounds[i], layout.stages, i

        return sorted(range(len(self.layouts)), key=key)

    def _final(self) -> tuple[Found, Realized | None]:
        """The best by the event simulator, of the few that are near the fastest."""
        state = self.state
        near = state.best_us * (1 + _NEAR)
        few = [f for f in state.kinds() if f.pipeline.step_us <= near][: self.finalists]
        if not few or (len(few) == 1 and _is_plain(few[0].pipeline)):
            return state.best, None
        programs: dict[int, Realized] = {}
        for found in few:
            spent = state.seconds
            split = time_split(state.programs.module, found.pipeline.micro)
            part = found.layout.cluster
            realized = realize(
                split, units_of(split), found.pipeline, part, state.wishes.constraints,
                enough=state.enough, source=self._source(found),
            )  # fmt: skip
            step = replayed(realized, state.cluster)
            place = next(i for i, other in enumerate(state.found) if other is found)
            state.found[place] = replace(found, replay=Replay.of(step))
            programs[place] = realized
            if state.seconds + (state.seconds - spent) > state.budget_s:
                break
        best = state.best
        return best, programs.get(next(i for i, f in enumerate(state.found) if f is best))

    def _source(self, found: Found) -> Source | None:
        if found.placement is None:
            return None
        programs = self.state.programs
        program = programs.of(found.pipeline.micro)
        choices = replace(found.placement.choices, phases=program.phases)
        return Source.make(program, programs.short.of, choices, found.layout.mesh)


def _is_plain(plan: Pipeline) -> bool:
    """Is it one program for the whole batch, which the ordinary passes write down?"""
    return len(plan.stages) == 1 and plan.micro == 1 and not plan.stages[0].recompute


__all__ = [
    "Found", "Layout", "SearchResult", "Wishes", "layouts_of", "part_of", "rank", "search_plan",
]  # fmt: skip
