"""The simulator: a step of all ranks, replayed event by event from their schedules.

    schedules -> classes of ranks, channels      simulate_world
              -> steps, matched transfers        simulate_program, times from simulate_cost
              -> when each begins and ends       simulate_engine, shares of links simulate_rates
              -> what that means                 simulate_result, simulate_memory
              -> files                           simulate_export, simulate_chakra, simulate_compare
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..ir.errors import CompileError
from ..ir.module import Function, Module
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
        costs = Scaled(self._question.costs, part, factor)
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
    cluster: Cluster
    settings: Settings
    costs: Costs
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
            stage, all with the same mesh: stage i runs on the ranks `i * mesh.size ...`; or a
            mapping with one for each rank.
        cluster: what it runs on, with as many devices as there are ranks.
        settings: assumptions about backend and devices; those of the device kind by default.
        costs: times of actions; by default those of the cost model for `cluster`.
        symmetric: replay equal ranks once. The result is the same without, and slower.

    Raises CompileError W0201 for a module of another level, W0501 where the cluster does not fit,
    RunError W0802 where the ranks' schedules do not fit together or deadlock.
    """
    modules = _of_ranks(stages)
    mesh, ranks = modules[0].mesh or Mesh(), len(modules)
    cluster.homogeneous()
    if ranks != cluster.ranks:
        raise CompileError(
            "W0501", f"the plan is for {ranks} devices, the cluster {cluster} has {cluster.ranks}",
            reason="each rank's part of every tensor was fixed when the plan was made",
            hint=f"name a cluster of {ranks} devices, or plan again for this one",
        )  # fmt: skip
    settings = settings or settings_of(cluster.device.kind)
    costs = costs or ModelCosts(mesh, cluster, _kernels(modules))
    return _replay(_Question(modules, cluster, settings, costs, symmetric))


def _replay(question: _Question) -> Simulation:
    modules = question.modules
    entries, mesh = [module.entry for module in modules], modules[0].mesh or Mesh()
    world = World(entries, mesh, question.cluster, question.symmetric)
    replay = read_programs(world, question.costs, _kernels(modules))
    return Simulation(question, replay, Engine(replay, question.settings).run())


def _kernels(modules: Sequence[Module]) -> dict[str, Function]:
    distinct = {id(module): module for module in modules}.values()
    return {f.name: f for module in distinct for f in module.functions[1:]}


def _of_ranks(stages: Module | Sequence[Module] | Mapping[int, Module]) -> tuple[Module, ...]:
    """The module of each rank. Raises CompileError W0201."""
    given = [stages] if isinstance(stages, Module) else stages
    found = list(given.values()) if isinstance(given, Mapping) else list(given)
    if not found:
        raise CompileError("W0201", "a plan needs at least one rank")
    mesh = found[0].mesh or Mesh()
    for module in found:
        if module.level != "schedule":
            raise CompileError(
                "W0201", f"a {module.level} module cannot be replayed: it must be a schedule",
                hint="lower it first: weft opt FILE --pass lower --pass schedule",
            )  # fmt: skip
        if (module.mesh or Mesh()).axes != mesh.axes:
            raise CompileError("W0201", "the ranks of a plan have different meshes")
    if not isinstance(given, Mapping):
        return tuple(module for module in found for _ in range(mesh.size))
    if sorted(given) != list(range(len(given))) or len(given) % mesh.size:
        raise CompileError(
            "W0201", f"there are programs for {len(given)} ranks, the mesh has {mesh.size}",
            hint="give each rank of the mesh, and of each pipeline stage, a program",
        )  # fmt: skip
    return tuple(given[rank] for rank in range(len(given)))


__all__ = ["GLOO", "NCCL", "Settings", "Simulation", "Timeline", "settings_of", "simulate"]
