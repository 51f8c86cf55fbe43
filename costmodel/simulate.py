"""The simulator: a step of all ranks, replayed event by event from their schedules.

    schedules -> classes of ranks, channels      simulate_world
              -> steps, matched transfers        simulate_program, times from simulate_cost
              -> when each begins and ends       simulate_engine, shares of links simulate_rates
              -> what that means                 simulate_result, simulate_memory
              -> files                           simulate_export, simulate_chakra, simulate_compare
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path

from ..ir.errors import CompileError
from ..ir.module import Function, Module
from ..ir.stage_ranks import StageRanks
from ..ir.trace_events import Event, from_zero, write_events
from ..ir.types import Mesh
from .cluster import Cluster
from .simulate_chakra import write_chakra
from .simulate_compare import Comparison, compare
from .simulate_cost import Costs, ModelCosts, Scaled
from .simulate_engine import Engine, Run, Settings
from .simulate_export import trace_events
from .simulate_program import Replay, read_programs
from .simulate_result import Result, Timeline
from .simulate_world import World

#: Replays under NCCL. Compute that overlaps with communication took 18.9 % longer on average on
#: A100, H100, MI250 and MI210 (Lee et al., arXiv 2507.03114, 2025). For transfers no figure is
#: published: NCCL's blocks stay on their multiprocessors until they are done, and the links are
#: theirs, so they are taken to be as fast as alone.
NCCL = Settings(at_once=1, compute_slowdown=1.19, transfer_slowdown=1.0)
#: gloo on CPUs: two collectives at once per group. A rank's transfers need its core for copies and
#: sums, but most of their time is spent on the wire; no slowdown is assumed without a measurement.
GLOO = Settings(at_once=2)


def settings_of(kind: str) -> Settings:
    """What is assumed about a device kind."""
    return GLOO if kind == "cpu" else NCCL


#: what `what_if` can make faster
PARTS = ("device", "intra", "inter")


class Simulation(Result):
    """A replayed step of all ranks, and what else can be asked about it.

    Made by `simulate`.
    """

    def __init__(self, question: _Question, replay: Replay, run: Run) -> None:
        super().__init__(replay, run)
        self._question = question
        self.cluster, self.settings = question.cluster, question.settings

    def what_if(
        self, link: str = "", factor: float = 2.0, *, device: bool = False
    ) -> Simulation:
        """The same plan with a link, or the devices, `factor` times as fast.

        Everything that uses the part takes `1 / factor` of its time alone, latency included.

        Args:
            link: `intra`, inside a host, or `inter`, between hosts.
            device: all devices instead of a link.

        Raises CompileError W1001 for another part, or a factor that is not positive.
        """
        part = "device" if device and not link else link
        if part not in PARTS or (device and link):
            raise CompileError(
                "W1001", f"there is no part {part!r} that could be faster",
                reason=f"the parts are {', '.join(PARTS)}", hint='for example what_if("inter", 2)',
            )  # fmt: skip
        if not 0 < factor < float("inf"):
            raise CompileError("W1001", f"{factor} times as fast: the factor must be positive")
        costs = tuple(Scaled(costs, part, factor) for costs in self._question.costs)
        return _replay(replace(self._question, costs=costs))

    def events(self, ranks: Iterable[int] | None = None) -> list[Event]:
        """The step in the form of measured traces; one rank of each class by default."""
        return trace_events(self, ranks)

    def save_perfetto(
        self, path: str | Path, ranks: Iterable[int] | None = None, measured: Sequence[Event] = ()
    ) -> Path:
        """Write a timeline for ui.perfetto.dev, `.json` or `.json.gz`.

        Args:
            ranks: one of each class by default.
            measured: events of a measured trace, which are laid beside it, both from 0 on.
        """
        return write_events(path, [*self.events(ranks), *from_zero(measured)])

    def save_chakra(self, folder: str | Path, ranks: Sequence[int] | None = None) -> Path:
        """Write Chakra execution traces, `weft.RANK.et` for each rank (see `simulate_chakra`)."""
        return write_chakra(self, folder, ranks)

    def compare(self, events: Sequence[Event]) -> Comparison:
        """Predicted against measured, action by action. Raises RunError W1201."""
        return compare(self, events)


@dataclass(frozen=True)
class _Question:
    """What was asked: all that a replay needs."""

    modules: tuple[Module, ...]  #: one for each rank
    ranks: StageRanks
    cluster: Cluster
    settings: Settings
    costs: tuple[Costs, ...]  #: one for each stage
    symmetric: bool


def simulate(
    stages: Module | Sequence[Module] | Mapping[int, Module],
    cluster: Cluster,
    *,
    settings: Settings | None = None,
    costs: Costs | None = None,
    symmetric: bool = True,
) -> Simulation:
    """Replay a step.

    Args:
        stages: a schedule-level module, which all ranks of its mesh run; or one for each pipeline
            stage, whose ranks come behind those of the stages before; or a mapping with one for
            each rank.
        cluster: what it runs on, with as many devices as there are ranks. Each stage lies on
            devices of one group.
        settings: assumptions about backend and devices; those of the device kind by default.
        costs: times of actions; by default those of the cost model for the devices of each stage.
        symmetric: replay equal ranks once. The result is the same without, and slower.

    Raises CompileError W0201 for a module of another level, W0501 where the cluster does not fit,
    RunError W0802 where the ranks' schedules do not fit together or deadlock.
    """
    modules, ranks = _of_ranks(stages)
    if ranks.size != cluster.ranks:
        raise CompileError(
            "W0501",
            f"the plan is for {ranks.size} devices, the cluster {cluster} has {cluster.ranks}",
            reason="each rank's part of every tensor was fixed when the plan was made",
            hint=f"name a cluster of {ranks.size} devices, or plan again for this one",
        )  # fmt: skip
    parts = _parts(ranks, cluster)
    if settings is None:
        kinds = {part.device.kind for part in parts}
        settings = settings_of("cpu" if "cpu" in kinds else parts[0].device.kind)
    if costs is not None:
        return _replay(_Question(modules, ranks, cluster, settings, (costs,) * ranks.count, symmetric))
    own: list[Costs] = []
    for mesh, part in zip(ranks.meshes, parts, strict=True):
        own.append(ModelCosts(mesh, part, _kernels(modules)))
    return _replay(_Question(modules, ranks, cluster, settings, tuple(own), symmetric))


def _parts(ranks: StageRanks, cluster: Cluster) -> list[Cluster]:
    """The device group of each stage, as a cluster. Raises CompileError W0501 for one on several."""
    if len(cluster.groups) == 1:
        return [cluster] * ranks.count
    ends = list(accumulate(group.ranks for group in cluster.groups))
    out = []
    for stage in range(ranks.count):
        own = ranks.ranks(stage)
        first, last = bisect_right(ends, own.start), bisect_right(ends, own.stop - 1)
        if first != last:
            raise CompileError(
                "W0501", f"stage {stage} has the ranks {own.start} to {own.stop - 1} of {cluster}",
                reason="they are devices of several kinds, and the mesh of a stage has one",
                hint="give stages meshes that fill the groups one after the other",
            )  # fmt: skip
        out.append(cluster.part(first))
    return out


def _replay(question: _Question) -> Simulation:
    modules = question.modules
    entries = [module.entry for module in modules]
    world = World(entries, question.ranks, question.cluster, question.symmetric)
    replay = read_programs(world, question.costs, _kernels(modules))
    return Simulation(question, replay, Engine(replay, question.settings).run())


def _kernels(modules: Sequence[Module]) -> dict[str, Function]:
    distinct = {id(module): module for module in modules}.values()
    return {f.name: f for module in distinct for f in module.functions[1:]}


def _of_ranks(
    stages: Module | Sequence[Module] | Mapping[int, Module],
) -> tuple[tuple[Module, ...], StageRanks]:
    """The module of each rank, and the ranks of the stages. Raises CompileError W0201."""
    given = [stages] if isinstance(stages, Module) else stages
    found = list(given.values()) if isinstance(given, Mapping) else list(given)
    if not found:
        raise CompileError("W0201", "a plan needs at least one rank")
    for module in found:
        if module.level != "schedule":
            raise CompileError(
                "W0201", f"a {module.level} module cannot be replayed: it must be a schedule",
                hint="lower it first: weft opt FILE --pass lower --pass schedule",
            )  # fmt: skip
    if not isinstance(given, Mapping):
        ranks = StageRanks(tuple(module.mesh or Mesh() for module in found))
        return tuple(found[ranks.stage(rank)] for rank in range(ranks.size)), ranks
    meshes: list[Mesh] = []
    total = 0
    while total < len(given) and sorted(given) == list(range(len(given))):
        meshes.append(given[total].mesh or Mesh())
        own = range(total, min(len(given), total + meshes[-1].size))
        if any((given[rank].mesh or Mesh()).axes != meshes[-1].axes for rank in own):
            raise CompileError("W0201", "the ranks of a stage have different meshes")
        total += meshes[-1].size
    if total != len(given):
        raise CompileError(
            "W0201", f"there are programs for {len(given)} ranks, the mesh has "
            f"{(found[0].mesh or Mesh()).size}",
            hint="give each rank of the mesh, and of each pipeline stage, a program",
        )  # fmt: skip
    return tuple(given[rank] for rank in range(len(given))), StageRanks(tuple(meshes))


__all__ = ["GLOO", "NCCL", "Settings", "Simulation", "Timeline", "settings_of", "simulate"]
