"""The outer search: stages, micro-batches, order, recompute and meshes of a train step, together.

    for each way to deal the devices out to stages, and each mesh of a stage     (a *layout*)
        a bound from the ops' least times; where it is above the best plan, next
        place the program of one micro-batch on the mesh                         place.search_mesh
        read the costs of its units off the placed module                        search_costs
        for each number of micro-batches: cut units over stages                  search_cuts
            for each order: step time, memory, exactly                           search_evaluate

The program is placed once per layout, whatever its depth, and the placement is priced again for
each number of micro-batches. Layouts come in the order of their bounds, so the first that cannot
win ends the search. All of it is deterministic; a budget ends it at the best plan so far.

Memory: where no cut fits, the program is placed again under a cap.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf

import numpy as np

from ..costmodel.cluster import Cluster
from ..costmodel.estimate import VIEWS, launch_of, op_time_us
from ..ir.errors import CompileError
from ..ir.module import Module, Op
from ..ir.types import Mesh
from .apply import apply_phased
from .constraints import Constraints
from .micro import LOOP, time_split
from .place import MEMORY_SHARE, PlacementResult, search_mesh
from .search_costs import Array, UnitCosts, unit_costs
from .search_cuts import Block, Cut, Cutter, Part
from .search_evaluate import Pipeline, evaluate
from .search_layouts import Layout, layouts_of, part_of
from .search_mixed import Share, lines_of, most_stages, places_of, shares_of
from .search_realize import simulated
from .search_result import Found, SearchResult, Wishes, nothing_fits, rank, why
from .search_short import Short, shorten
from .search_units import Units, units_of
from .stages import cut

log = logging.getLogger("weft.search")

#: micro-batches per stage that are tried: more shrink the bubble, and each of them
_PER_STAGE = (1, 2, 4, 8, 16)
#: chunks of a stage under the interleaved order
_CHUNKS = (2, 4)
#: caps of the placed program's memory that are tried where nothing fits, as parts of what the
#: devices of all stages have
_CAPS = (0.5, 0.2)
#: numbers of micro-batches on clusters of several kinds
_MIXED_MICROS = (2, 4, 8, 16, 32, 64)
#: more memory than any program takes: its placement is the fastest, whatever it holds
_ROOM_BYTES = 1e18
#: plans that are as near to the fastest are replayed by the event simulator
_NEAR = 0.15
#: rejected plans that are kept for people
_KEPT = 5
#: limit of one placement, after which it is the best found; meshes of more axes than these are
#: searched by descent, which takes ten times as long: they come last
_PLACE_S, _JOINT_AXES = 20.0, 2


def search_plan(
    module: Module,
    cluster: Cluster,
    *,
    wishes: Wishes = Wishes(),
    budget_s: float = inf,
    layouts: Sequence[Layout] | None = None,
    finalists: int = 3,
) -> SearchResult:
    """The fastest plan of a logical train step.

    Args:
        finalists: of so many plans the schedules are written and replayed by the event simulator,
            which decides between them.
        budget_s: after so many seconds the best plan so far is returned.
        layouts: what is tried; `layouts_of(cluster)` by default.

    Raises CompileError: W0402 where nothing fits, with what it misses by; W0404 where wishes cannot be
        met, or the budget ran out before a first plan.
    """
    return _Search(module, cluster, wishes, budget_s, layouts, finalists).run()


@dataclass
class _Program:
    """The shortened program for one number of micro-batches."""

    module: Module  #: of one micro-batch
    phases: tuple[str, ...]
    unit_of: Mapping[str, int]
    units: int


class _Search:
    def __init__(
        self,
        module: Module,
        cluster: Cluster,
        wishes: Wishes,
        budget_s: float,
        layouts: Sequence[Layout] | None,
        finalists: int,
    ) -> None:
        self.module, self.cluster, self.wishes = module, cluster, wishes
        self.start, self.budget_s = time.perf_counter(), budget_s
        self.programs: dict[int, _Program] = {}
        self.found: list[Found] = []
        self.misfit: Pipeline | None = None
        self.evaluated = 0
        self.fastest = inf  #: step of the layout at hand, whether it fits or not
        self.alone: Array | None = None  #: see `_alone_us`
        self.given, self.finalists = layouts, finalists
        whole = time_split(module, 1)
        self.units = units_of(whole)
        short = shorten(whole, self.units)
        if short is None:
            short = Short(module, tuple(range(self.units.count)), 1.0)
        self.short = short

    def run(self) -> SearchResult:
        """Search. See `search_plan`."""
        if len(self.cluster.groups) > 1:
            return self._run_mixed()
        layouts = self._layouts(self.units)
        bounds = [self._bound_us(layout) for layout in layouts]
        slow = [len(layout.mesh.axes) > _JOINT_AXES for layout in layouts]
        order = sorted(range(len(layouts)), key=lambda i: (slow[i], bounds[i], layouts[i].stages, i))
        bounded, complete, open_bounds = 0, True, []
        for position, index in enumerate(order):
            if self.found and bounds[index] >= self._best().pipeline.step_us:
                bounded += 1
                continue
            if time.perf_counter() - self.start > self.budget_s:
                complete = False
                open_bounds = [bounds[i] for i in order[position:]]
                break
            self._layout(layouts[index])
        if not self.found:
            raise self._nothing(complete)
        best = self._final()
        lower = min([best.pipeline.step_us, *open_bounds, min(bounds, default=inf)])
        split = time_split(self.module, best.pipeline.micro)
        return SearchResult(
            best, split, units_of(split), tuple(self._rejected(best)), len(layouts), bounded,
            self.evaluated, lower, time.perf_counter() - self.start, complete,
        )  # fmt: skip

    def _layouts(self, units: Units) -> list[Layout]:
        wanted = self.wishes.stages
        if self.given is not None:
            layouts = list(self.given)
        else:
            layouts = list(layouts_of(self.cluster, min(units.count, wanted or units.count)))
        chosen = [layout for layout in layouts if wanted in (None, layout.stages)]
        if not chosen:
            raise CompileError(
                "W0404", f"no plan of {wanted} stages on {self.cluster}",
                reason=f"{self.cluster.ranks} devices and {units.count} parts of the program do not "
                f"divide into {wanted} stages", hint="leave stages out, or ask for a divisor",
            )  # fmt: skip
        return chosen

    def _program(self, micro: int) -> _Program:
        if micro not in self.programs:
            split = time_split(self.short.module, micro)
            units = units_of(split)
            stage = cut(split, [0] * len(split.phases))[0]
            ops = split.module.entry.ops
            unit_of = {
                op.results[0].name: unit for op, unit in zip(ops, units.stage_of, strict=True)
            }
            self.programs[micro] = _Program(stage.module, stage.phases, unit_of, units.count)
        return self.programs[micro]

    def _micros(self, layout: Layout) -> list[int]:
        """Numbers of micro-batches, the one that the layout is placed with first."""
        if self.wishes.micro is not None:
            return [self.wishes.micro]
        counts = [1] if layout.stages == 1 else [layout.stages * k for k in _PER_STAGE]
        legal = [count for count in counts if self._can_split(count)]
        if not legal:
            legal = [count for count in range(layout.stages, 0, -1) if self._can_split(count)][:1]
        middle = min(len(legal) - 1, 2)
        return [legal[middle], *legal[:middle], *legal[middle + 1 :]]

    def _can_split(self, micro: int) -> bool:
        try:
            self._program(micro)
        except CompileError as error:
            if error.code != "W0404":
                raise
            return False
        return True

    # -- bounds ---------------------------------------------------------------------------------

    def _bound_us(self, layout: Layout) -> float:
        """No plan of a layout is faster, its collectives left out.

        With work w_s of stage s per micro-batch, a step takes at least m w_s + w_0 + ... + w_(s-1)
        for each s. Over all w of sum W the largest of them is least where all are equal, which is
        W / (1 - (1 - 1/m)^p). W has each op of the whole batch on one device, in as many parts as
        there are ranks and micro-batches: parts of an op are together no faster than the op.
        """
        if self.alone is None:
            self.alone = _alone_us(self._program(1), self.short.of, self.cluster)
        least_us = launch_of(layout.cluster)
        bounds = []
        for micro in self._micros(layout):
            work = np.maximum(self.alone / (layout.ranks * micro), least_us).sum()
            bounds.append(float(work) / (1 - (1 - 1 / micro) ** layout.stages))
        return min(bounds, default=inf)

    # -- one layout -----------------------------------------------------------------------------

    def _layout(self, layout: Layout) -> None:
        first, *others = self._micros(layout)
        before = len(self.found)
        self.fastest = inf
        devices = layout.stages * layout.cluster.device.memory_bytes
        caps = [MEMORY_SHARE * devices] if layout.stages == 1 else [inf]
        caps += [devices * part for part in _CAPS] if layout.stages > 1 else []
        for number, cap in enumerate(caps):
            if number and self._hopeless(layout, before):
                break
            placement = self._place(layout, first, cap)
            if placement is None:
                continue
            for micro in (first, *others):
                try:
                    self._plans(layout, placement, micro)
                except CompileError as error:
                    if error.code not in ("W0401", "W0402"):
                        raise
                    # too few rows for the splits of other micro-batches
                    own = self._place(layout, micro, cap)
                    if own is not None:
                        self._plans(layout, own, micro)
        if len(self.found) == before and layout.stages == 1 and self.wishes.micro is None:
            self._accumulate(layout)

    def _hopeless(self, layout: Layout, before: int) -> bool:
        """Is less memory of no use? Plans fit as they are, or would be too slow if they did."""
        fits = self.found[before:]
        if fits and not any(s.recompute for f in fits for s in f.pipeline.stages):
            return True
        return bool(self.found) and self.fastest >= self._best().pipeline.step_us

    def _accumulate(self, layout: Layout) -> None:
        """One stage that does not fit: smaller micro-batches, until it does."""
        micro = 2
        while self._can_split(micro) and time.perf_counter() - self.start < self.budget_s:
            placement = self._place(layout, micro, MEMORY_SHARE * layout.cluster.device.memory_bytes)
            if placement is not None and self._plans(layout, placement, micro):
                return
            micro *= 2

    def _place(self, layout: Layout, micro: int, cap: float) -> PlacementResult | None:
        program = self._program(micro)
        left = max(0.5, self.budget_s - (time.perf_counter() - self.start))
        wanted = self.wishes.constraints
        most = min(cap, (wanted.memory_bytes or inf) * layout.stages) * self.short.share
        device = layout.cluster.device
        room = replace(device, memory_bytes=min(most / MEMORY_SHARE, _ROOM_BYTES))
        return search_mesh(
            program.module, layout.mesh, replace(layout.cluster, device=room),
            limit_s=min(_PLACE_S, left), phases=program.phases, micro=micro,
            constraints=Constraints(wanted.rules),
        )  # fmt: skip

    def _costs(self, layout: Layout, placement: PlacementResult, micro: int) -> UnitCosts:
        program = self._program(micro)
        placed, phases = apply_phased(
            program.module, layout.mesh, replace(placement.choices, phases=program.phases)
        )
        assert phases is not None  # they were given
        costs = unit_costs(placed, phases, program.unit_of, program.units, layout.cluster)
        return costs.spread(self.short.of, self.units.edges)

    def _plans(self, layout: Layout, placement: PlacementResult, micro: int) -> bool:
        """Evaluate the cuts of a layout for a number of micro-batches. Does one fit?"""
        costs = self._costs(layout, placement, micro)
        memory = MEMORY_SHARE * layout.cluster.device.memory_bytes
        if self.wishes.constraints.memory_bytes is not None:
            memory = min(memory, self.wishes.constraints.memory_bytes)
        stages = layout.stages
        blocks = [
            Block(s * layout.ranks, (s + 1) * layout.ranks, costs, memory) for s in range(stages)
        ]
        clusters = {block.start: layout.cluster for block in blocks}
        cutter = Cutter(self.units, micro, self.wishes.recompute and _FULL_RECOMPUTE)
        fits = False
        for name, chunks in self._orders(stages, micro):
            parts = self._cut(cutter, blocks, chunks)
            if parts is None:
                continue
            plan = evaluate(parts, self.units.names, clusters, micro, name, chunks)
            self.evaluated += 1
            self.fastest = min(self.fastest, plan.step_us)
            if plan.fits:
                self.found.append(Found(plan, layout, placement))
                fits = True
            elif self.misfit is None or _over(plan) < _over(self.misfit):
                self.misfit = plan
        return fits

    def _orders(self, stages: int, micro: int) -> list[tuple[str, int]]:
        """(order, chunks of a stage)."""
        wanted = self.wishes.order
        rows = [("1f1b", 1), ("gpipe", 1)]
        rows += [("interleaved", c) for c in _CHUNKS if micro % stages == 0]
        if stages == 1:
            rows = [("1f1b", 1)]
        return [row for row in rows if wanted in ("", row[0])] or [(wanted, 1)]

    def _cut(self, cutter: Cutter, blocks: Sequence[Block], chunks: int) -> tuple[Part, ...] | None:
        """The best parts; where nothing fits, those of unlimited memory, to say what is missing."""
        stages = len(blocks)
        chain = list(blocks) * chunks
        line = [
            replace(block, start=i, stop=i + 1,
                    memory_bytes=block.memory_bytes if chunks == 1 else inf)
            for i, block in enumerate(chain)
        ]  # fmt: skip
        if cutter.units.count < len(line):
            return None
        best = _longest(cutter.best(line, len(line)), len(line))
        if best is None:
            line = [replace(block, memory_bytes=inf) for block in line]
            best = _longest(cutter.best(line, len(line)), len(line))
        if best is None:
            return None
        return tuple(
            replace(part, block=blocks[i % stages]) for i, part in enumerate(best.parts)
        )

    # -- results --------------------------------------------------------------------------------

    def _best(self) -> Found:
        """The fastest; of equals the one with fewer stages, micro-batches and chunks."""
        return min(self.found, key=rank)

    # -- clusters of several kinds ----------------------------------------------------------------

    def _run_mixed(self) -> SearchResult:
        """Stages of different devices. See `search_mixed`."""
        shares = shares_of(self.cluster)
        most = min(self.units.count, most_stages(self.cluster))
        wanted = self.wishes.micro
        micros = [wanted] if wanted else [m for m in _MIXED_MICROS if self._can_split(m)]
        first = micros[len(micros) // 2] if micros else 1
        placed: dict[Share, tuple[Layout, PlacementResult]] = {}
        for share in shares:
            if time.perf_counter() - self.start > self.budget_s:
                break
            part = part_of(self.cluster, share.own)
            layout = Layout(most, share.mesh, part, share.own.ranks)
            placement = self._place(layout, first, inf)
            if placement is not None:
                placed[share] = layout, placement
        bound = inf
        for micro in micros or [1]:
            costs = self._mixed_costs(placed, micro)
            for line in lines_of(self.cluster):
                bound = min(bound, self._line(line, costs, micro, most))
        if not self.found:
            raise self._nothing(len(placed) == len(shares))
        best = self._best()
        split = time_split(self.module, best.pipeline.micro)
        return SearchResult(
            best, split, units_of(split), tuple(self._rejected(best)), len(shares), 0,
            self.evaluated, min(bound, best.pipeline.step_us), time.perf_counter() - self.start,
            len(placed) == len(shares),
        )  # fmt: skip

    def _mixed_costs(
        self, placed: Mapping[Share, tuple[Layout, PlacementResult]], micro: int
    ) -> dict[Share, UnitCosts]:
        """Costs of the units on each share, of those whose splits a micro-batch has rows for."""
        out = {}
        for share, (layout, placement) in placed.items():
            try:
                out[share] = self._costs(layout, placement, micro)
            except CompileError as error:
                if error.code not in ("W0401", "W0402"):
                    raise
        return out

    def _line(
        self, line: tuple[int, ...], costs: Mapping[Share, UnitCosts], micro: int, most: int
    ) -> float:
        """Evaluate the cuts over an order of the groups; no plan with these blocks is faster than
        what is returned: a step has `micro` times its slowest stage."""
        blocks, clusters, shares = [], {}, {}
        for share, own in costs.items():
            part = part_of(self.cluster, share.own)
            memory = MEMORY_SHARE * part.device.memory_bytes
            cap = self.wishes.constraints.memory_bytes
            memory = memory if cap is None else min(memory, cap)
            for start in places_of(self.cluster, line, share):
                block = Block(start, start + share.own.ranks, own, memory)
                blocks.append(block)
                clusters[start] = part
                shares[id(block)] = share
        cutter = Cutter(self.units, micro, self.wishes.recompute)
        cuts = cutter.best(blocks, most) if blocks else []
        for cut_ in cuts:
            if self.wishes.stages not in (None, len(cut_.parts)):
                continue
            used = [shares[id(part.block)] for part in cut_.parts]
            layout = Layout(
                len(used), used[0].mesh, clusters[cut_.parts[0].block.start], used[0].own.ranks,
                tuple(str(share.own) for share in used),
            )  # fmt: skip
            for order in ("1f1b", "gpipe"):
                if self.wishes.order in ("", order):
                    plan = evaluate(cut_.parts, self.units.names, clusters, micro, order)
                    self.evaluated += 1
                    if plan.fits:
                        self.found.append(Found(plan, layout, None))
                    elif self.misfit is None or _over(plan) < _over(self.misfit):
                        self.misfit = plan
        return min((micro * c.bottleneck_us for c in cuts), default=inf)

    def _final(self) -> Found:
        """The best by the event simulator, of the few that are near the fastest."""
        near = self._best().pipeline.step_us * (1 + _NEAR)
        few = [f for f in self._kinds() if f.pipeline.step_us <= near][: self.finalists]
        if len(few) < 2:
            return self._best()
        for found in few:
            if time.perf_counter() - self.start > self.budget_s:
                break
            split = time_split(self.module, found.pipeline.micro)
            units = units_of(split)
            part = found.layout.cluster
            step = simulated(split, units, found.pipeline, part, self.cluster)
            place = next(i for i, other in enumerate(self.found) if other is found)
            self.found[place] = replace(found, simulated_us=step.step_us)
        return self._best()

    def _kinds(self) -> list[Found]:
        """The best plan of each layout, number of micro-batches and order."""
        kinds: dict[object, Found] = {}
        for found in sorted(self.found, key=rank):
            plan = found.pipeline
            kinds.setdefault((str(found.layout), plan.micro, plan.order, plan.chunks), found)
        return list(kinds.values())

    def _rejected(self, best: Found) -> Iterator[tuple[Found, str]]:
        """The best plan of each other kind and why it lost."""
        others = [found for found in self._kinds() if found is not best]
        for found in others[:_KEPT]:
            yield found, why(found.pipeline, best.pipeline)

    def _nothing(self, complete: bool) -> CompileError:
        if self.misfit is None and not complete:
            return CompileError(
                "W0404", f"the budget of {self.budget_s:g} s ran out before a first plan",
                reason="the program was not yet placed on any mesh", hint="give it more seconds",
            )  # fmt: skip
        if self.misfit is None:
            return CompileError(
                "W0402", f"no placement on {self.cluster} is legal",
                reason="every candidate mesh leaves some op without a legal split",
                hint="use fewer devices",
            )  # fmt: skip
        return nothing_fits(self.misfit, self.cluster)


#: whether full recompute is among the choices of a stage: `recompute.py` writes it down
_FULL_RECOMPUTE = True


def _longest(cuts: Sequence[Cut], stages: int) -> Cut | None:
    return next((c for c in cuts if len(c.parts) == stages), None)


def _over(plan: Pipeline) -> float:
    """Bytes by which the fullest rank is over its memory."""
    return max(stage.peak_bytes - stage.memory_bytes for stage in plan.stages)


def _alone_us(program: _Program, of: Sequence[int], cluster: Cluster) -> Array:
    """Times of the whole program's forward and backward ops on one device; views left out."""
    module = program.module
    functions: dict[str, list[float]] = {}

    def times(op: Op) -> list[float]:
        if op.name != "call":
            return [] if op.name in VIEWS else [op_time_us(op, (), Mesh(), cluster)]
        name = str(op.attrs["callee"])
        if name not in functions:
            functions[name] = [t for inner in module.function(name).ops for t in times(inner)]
        return functions[name]

    by_unit: list[list[float]] = [[] for _ in range(program.units)]
    for op, phase in zip(module.entry.ops, program.phases, strict=True):
        unit = program.unit_of.get(op.results[0].name, -1)
        if phase in LOOP and unit >= 0:
            by_unit[unit] += times(op)
    flat = [time_us for unit in of for time_us in by_unit[unit] if time_us > 0]
    return np.array(flat, dtype=np.float64)



__all__ = [
    "Found", "Layout", "SearchResult", "Wishes", "layouts_of", "part_of", "search_plan",
]  # fmt: skip
