"""Plans that are kept: one for each signature of a program's inputs.

A signature is structure, shapes, dtypes, values that are no tensors, train or eval mode. Where a
trace serves several sizes (`tracings.py`), their plans share the placement that was searched first.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..ir.errors import CompileError
from ..passes.carry import CARRIED
from ..runtime.comm import Comm
from ..runtime.program import Program as Running
from .calls import Call, Key
from .device_mesh import mesh_option, use_mesh
from .driver import Program, Progress, plan_program
from .options import Options
from .plan import Plan
from .searched import seconds_of
from .structure import Structure
from .tracings import Checked, Tracing, Tracings
from .world import join_world, world_cluster

#: plans of one program that are kept; the one that was used least recently goes
KEPT_PLANS = 64


@dataclass
class Entry:
    """A plan that is ready to run.

    Attributes:
        running: the plan on this rank.
        plan: the plan itself.
        outputs: structure of the result.
        weights: names of the parameters and buffers, in the entry's order.
        updated: buffers that a step replaces, in the order of the results.
        tangents: numbers of the outputs whose gradients a joint plan takes.
        grads: names of the gradients that it gives.
        checked: what the sizes of its last call were checked against.
    """

    running: Running
    plan: Plan
    outputs: Structure
    weights: tuple[str, ...]
    updated: tuple[str, ...] = ()
    tangents: tuple[int, ...] = ()
    grads: tuple[str, ...] = ()
    checked: Checked | None = None


class Compiler:
    """Plans and keeps plans; shared by all kinds of compiled programs."""

    def __init__(
        self,
        cluster: str,
        mesh: str | DeviceMesh,
        options: Options,
        dynamic_shapes: Any = None,
    ) -> None:
        self.cluster, self.mesh, self.options = cluster, mesh, options
        self.entries: OrderedDict[Key, Entry] = OrderedDict()
        self.tracings = Tracings(dynamic_shapes)
        self._seeds: tuple[int, int] | None = None

    def find(self, call: Call) -> Entry:
        """The plan for a call, made where there is none.

        Raises CompileError, among others W0306 for a size out of its bounds, and W0302 for an
        input without elements.
        """
        found = self.entries.get(call.key)
        checked = self.tracings.check(call, found.checked if found else None)
        if found is None:
            found = self.entries[call.key] = self._make(call, self.tracings.find(call))
            if len(self.entries) > KEPT_PLANS:
                self.entries.popitem(last=False)
        found.checked = checked
        self.entries.move_to_end(call.key)
        self.tracings.seen(call.key)
        return found

    def _make(self, call: Call, tracing: Tracing) -> Entry:
        program, outputs = tracing.lower(call)
        plan = self._plan(program, tracing)
        module = plan.module("schedule")
        comm = use_mesh(Comm(plan.stage_ranks.meshes), self.mesh)
        device = join_world().device
        running = Running(
            plan.schedules, comm, device, check_finite=self.options.trace_nan,
            cpu_backend=self.options.cpu_backend,
        )  # fmt: skip
        entry = module.entry
        roles = [(str(a.get("role", "")), str(a.get("name", ""))) for a in entry.param_attrs]
        results = [(str(a.get("role", "")), a) for a in entry.result_attrs]
        of = [a.get("of") for a in entry.param_attrs if a.get("role") == "tangent"]
        return Entry(
            running,
            plan,
            outputs,
            tuple(name for role, name in roles if role in ("param", "buffer")),
            tuple(str(a["updates"]) for role, a in results if role == "update"),
            tuple(n for n in of if isinstance(n, int)),
            tuple(str(a["name"]) for role, a in results if role == "grad"),
        )

    def _plan(self, program: Program, tracing: Tracing) -> Plan:
        world = join_world()
        cluster = self.cluster or world_cluster(world)
        progress = Progress(self.options.progress and world.rank == 0)
        if world.size > 1 and self.options.budget and seconds_of(self.options.budget) < inf:
            raise CompileError(
                "W1001", f"a budget of {self.options.budget} for a plan of several processes",
                reason="each process makes the plan, and a clock could end their searches at "
                "different plans", hint='use budget="inf", or weft.plan() and run the artifact',
            )  # fmt: skip
        try:
            plan = plan_program(
                program, cluster, mesh_option(self.mesh), self.options, progress, tracing.placed
            )
        finally:
            progress.stop()
        if plan.ranks != world.size:
            raise CompileError(
                "W0501",
                f"the plan is for {plan.ranks} ranks ({cluster}), the world has {world.size}",
                hint=f"torchrun --nproc-per-node {plan.ranks}, or leave `cluster` out; "
                "weft.plan() plans for clusters that are not there",
            )
        placed = plan.module("placed")
        if not placed.attrs.get(CARRIED):
            tracing.placed.append(placed)
        return plan

    def seed(self) -> int:
        """A seed for the next step: from torch's seed, the same on all ranks."""
        base, drawn = self._seeds or self._first_seed()
        self._seeds = base, drawn + 1
        digest = hashlib.blake2b(f"{base}/{drawn}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") >> 2

    def _first_seed(self) -> tuple[int, int]:
        base = [torch.initial_seed() % (1 << 62)]
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(base, 0)
        return base[0], 0

    def seeds(self) -> list[int]:
        """Where the stream of seeds is: what it began with, and how many were drawn."""
        return list(self._seeds or self._first_seed())

    def set_seeds(self, seeds: Sequence[int]) -> None:
        """Go on from another place in the stream, that of a checkpoint."""
        base, drawn = seeds
        self._seeds = int(base), int(drawn)


def mode_of(*modules: torch.nn.Module) -> tuple[bool, ...]:
    """Train or eval, for each module; a plan is for one mode."""
    return tuple(m.training for module in modules for m in module.modules())


def state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a parameter wins."""
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}
