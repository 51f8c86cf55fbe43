"""The simulator: a step of all ranks, replayed event by event from their schedules.

    schedules -> classes of ranks, channels      simulate_world
              -> steps, matched transfers        simulate_program, times from simulate_cost
              -> when each begins and ends       simulate_engine, shares of links simulate_rates
              -> what that means                 simulate_result, simulate_memory
"""

from __future__ import annotations

from collections.abc import Sequence

from ..ir.errors import CompileError
from ..ir.module import Module
from ..ir.types import Mesh
from .cluster import Cluster
from .simulate_cost import Costs, ModelCosts
from .simulate_engine import Engine, Settings
from .simulate_program import read_programs
from .simulate_result import Simulation, Timeline
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


def simulate(
    stages: Module | Sequence[Module],
    cluster: Cluster,
    *,
    settings: Settings | None = None,
    costs: Costs | None = None,
    symmetric: bool = True,
) -> Simulation:
    """Replay a step.

    Args:
        stages: a schedule-level module, which all ranks of its mesh run; or one for each pipeline
            stage, all with the same mesh: stage i runs on the ranks `i * mesh.size ...`.
        cluster: what it runs on, with as many devices as there are ranks.
        settings: assumptions about backend and devices; those of the device kind by default.
        costs: times of actions; by default those of the cost model for `cluster`.
        symmetric: replay equal ranks once. The result is the same without, and slower.

    Raises CompileError W0201 for a module of another level, W0501 where the cluster does not fit,
    RunError W0802 where the ranks' schedules do not fit together or deadlock.
    """
    modules = [stages] if isinstance(stages, Module) else list(stages)
    mesh = _mesh_of(modules)
    ranks = mesh.size * len(modules)
    cluster.homogeneous()
    if ranks != cluster.ranks:
        raise CompileError(
            "W0501", f"the plan is for {ranks} devices, the cluster {cluster} has {cluster.ranks}",
            reason="each rank's part of every tensor was fixed when the plan was made",
            hint=f"name a cluster of {ranks} devices, or plan again for this one",
        )  # fmt: skip
    functions = {f.name: f for module in modules for f in module.functions[1:]}
    world = World([module.entry for module in modules], mesh, cluster, symmetric)
    settings = settings or settings_of(cluster.device.kind)
    replay = read_programs(world, costs or ModelCosts(mesh, cluster, functions), functions)
    run = Engine(replay, settings).run()
    return Simulation(replay, run, cluster, settings)


def _mesh_of(modules: Sequence[Module]) -> Mesh:
    for module in modules:
        if module.level != "schedule":
            raise CompileError(
                "W0201", f"a {module.level} module cannot be replayed: it must be a schedule",
                hint="lower it first: weft opt FILE --pass lower --pass schedule",
            )  # fmt: skip
        if (module.mesh or Mesh()).axes != (modules[0].mesh or Mesh()).axes:
            raise CompileError("W0201", "the stages of a plan have different meshes")
    if not modules:
        raise CompileError("W0201", "a plan needs at least one stage")
    return modules[0].mesh or Mesh()


__all__ = ["GLOO", "NCCL", "Settings", "Simulation", "Timeline", "settings_of", "simulate"]
