"""Plans that are kept: one for each signature of a program's inputs.

A signature is structure, shapes, dtypes, values that are no tensors, train or eval mode. Another
one plans again, and the log says what changed.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from ..ir.errors import CompileError
from ..runtime.comm import Comm
from ..runtime.program import Program as Running
from .device_mesh import mesh_option, use_mesh
from .driver import Program, Progress, plan_program
from .options import Options
from .plan import Plan
from .structure import Structure, flatten
from .world import join_world, world_cluster

log = logging.getLogger("weft")


@dataclass(frozen=True)
class Key:
    """What a plan is made for."""

    tensors: tuple[tuple[str, tuple[int, ...], torch.dtype], ...]
    body: str
    mode: tuple[bool, ...]

    @staticmethod
    def of(args: Sequence[Any], kwargs: Mapping[str, Any], mode: tuple[bool, ...]) -> Key:
        """The key of a call."""
        tensors, names, structure = flatten((tuple(args), dict(kwargs)))
        rows = zip(names, tensors, strict=True)
        return Key(tuple((n, tuple(t.shape), t.dtype) for n, t in rows), repr(structure.body), mode)

    def changes(self, old: Key) -> str:
        """What differs from another key, in the user's terms."""
        before = {name: (shape, dtype) for name, shape, dtype in old.tensors}
        for name, shape, dtype in self.tensors:
            if name in before and before[name] != (shape, dtype):
                was = f"{before[name][1]}{list(before[name][0])}"
                return f"input {name or '0'} was {was}, now it is {dtype}{list(shape)}"
        return "train or eval mode changed" if self.mode != old.mode else "the inputs changed"


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
    """

    running: Running
    plan: Plan
    outputs: Structure
    weights: tuple[str, ...]
    updated: tuple[str, ...] = ()
    tangents: tuple[int, ...] = ()
    grads: tuple[str, ...] = ()


class Compiler:
    """Plans and keeps plans; shared by all kinds of compiled programs."""

    def __init__(self, cluster: str, mesh: str | DeviceMesh, options: Options) -> None:
        self.cluster, self.mesh, self.options = cluster, mesh, options
        self.entries: dict[Key, Entry] = {}
        self._last: Key | None = None
        self._seeds: tuple[int, int] | None = None

    def find(self, key: Key, trace: Callable[[], tuple[Program, Structure]]) -> Entry:
        """The entry of a key, made by tracing and planning where there is none."""
        found = self.entries.get(key)
        if found is None:
            if self._last is not None:
                hint = "keep shapes fixed, or pad, to avoid this"
                log.warning("weft plans again: %s; %s", key.changes(self._last), hint)
            found = self.entries[key] = self._make(*trace())
        self._last = key
        return found

    def _make(self, program: Program, outputs: Structure) -> Entry:
        world = join_world()
        cluster = self.cluster or world_cluster(world)
        mesh = mesh_option(self.mesh)
        progress = Progress(self.options.progress and world.rank == 0)
        try:
            plan = plan_program(program, cluster, mesh, self.options, progress)
        finally:
            progress.stop()
        module = plan.module("schedule")
        if plan.mesh.size != world.size:
            raise CompileError(
                "W0501",
                f"the plan is for {plan.mesh.size} ranks ({cluster}), the world has {world.size}",
                hint=f"torchrun --nproc-per-node {plan.mesh.size}, or leave `cluster` out; "
                "weft.plan() plans for clusters that are not there",
            )
        comm = use_mesh(Comm(plan.mesh), self.mesh)
        running = Running(module, comm, world.device, check_finite=self.options.trace_nan)
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


def tensors_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among the inputs, in the entry's order, detached."""
    return [t.detach() for t in flatten((tuple(args), dict(kwargs)))[0]]
