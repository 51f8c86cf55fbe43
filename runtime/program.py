"""A plan that is ready to run on this rank: state in, steps, state out.

    program = Program(module, device="cpu")
    program.load_state(model.state_dict())
    (loss,) = program.step(tokens, lr=1e-3)
    weights = program.state_dict()

Inputs, loaded state and results are whole tensors, the same on every rank, which keeps its part.
"""

from __future__ import annotations

import hashlib
import reprlib
import resource
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..ir.errors import RunError
from ..ir.module import Function, Module, Value
from ..ir.types import TensorType
from .comm import TIMEOUT_S, Comm
from .context import TORCH_DTYPES
from .executor import Executor
from .heap import LEAST_BYTES, idle_heap, trim
from .schedule_check import check
from .stage_map import StageMap, ranks_of
from .trace import Trace
from .watch import together
from .wrapper import Kernel


@dataclass(frozen=True)
class Memory:
    """Memory of this rank, in bytes.

    Attributes:
        state_bytes: parameters, buffers and optimizer states.
        planned_bytes: the largest number of bytes of live tensors during a step, by the plan.
        peak_bytes: the highest resident set of the process so far, or on a GPU the most bytes that
            the allocator gave out.
    """

    state_bytes: int
    planned_bytes: int
    peak_bytes: int


class Program:
    """A schedule-level module on one rank. All ranks make the same calls in the same order.

    Args:
        module: the plan; the schedule of each stage where it has several (see `StageRanks`).
        comm: this rank's communication; made from torch.distributed by default.
        device: where this rank's tensors live.
        kernels: compiled kernels by name.
        timeout_s: how long a collective may wait for the other ranks.
        check_finite: trace NaN and Inf to the action that made them; slow.
        cpu_backend: `eager` or `inductor`; see `Executor`.

    Raises RunError W0801 when the world does not fit the plan, W0802 when the ranks' schedules
    do not agree, W0804 when the module is not at the schedule level.
    """

    def __init__(
        self,
        module: Module | Sequence[Module],
        comm: Comm | None = None,
        device: torch.device | str = "cpu",
        *,
        kernels: Mapping[str, Kernel] | None = None,
        timeout_s: float = TIMEOUT_S,
        check_finite: bool = False,
        cpu_backend: str = "eager",
    ) -> None:
        modules = (module,) if isinstance(module, Module) else tuple(module)
        self.comm = comm or Comm(ranks_of(modules).meshes, timeout_s=timeout_s)
        same_plan(modules, self.comm)
        self.map = StageMap(modules, self.comm.stage)
        module = modules[self.map.stage]
        self.executor = Executor(
            module, comm=self.comm, device=device, kernels=kernels, check_finite=check_finite,
            cpu_backend=cpu_backend, stages=modules,
        )  # fmt: skip
        self._trace: Trace | None = None
        self._idle: list[int] = []  # bytes of idle heap after the first two steps
        self._growth = self.executor.planned_bytes() // 10
        names = _names(module.entry)
        self._kept = [(names[value.name], value) for value in self.executor.kept]
        self._fed = [(names[v.name], v, self._role(v)) for v in self.executor.fed]
        self._attrs = {
            v.name: a for v, a in zip(module.entry.params, module.entry.param_attrs, strict=True)
        }

    def _role(self, value: Value) -> str:
        return self.executor.wrapper.roles[value.name]

    # -- state --------------------------------------------------------------------------------

    @property
    def state_types(self) -> dict[str, TensorType]:
        """Placed types of all state by name, in the same order on all ranks.

        State of another stage is placed on that one's mesh.
        """
        own = {name: value.type for name, value in self._kept}
        return {name: own.get(name, type) for name, (type, _, _) in self.map.kept.items()}

    @property
    def state_roles(self) -> dict[str, str]:
        """What each state is: `param`, `buffer` or `state` (of the optimizer)."""
        return {name: role for name, (_, role, _) in self.map.kept.items()}

    @property
    def elsewhere(self) -> frozenset[str]:
        """Names of state that another pipeline stage has, or writes into checkpoints."""
        return self.map.elsewhere

    def load_state(self, full: Mapping[str, Tensor], *, strict: bool = True) -> None:
        """Take whole tensors by name and keep this rank's part; the tensors stay the caller's.

        An optimizer state that is missing starts at 0, a step counter too.

        Args:
            strict: refuse names that the plan does not have, unless another name has the same
                memory (tied weights), and parameters or buffers that are missing.

        Raises RunError W0804 for wrong names, shapes or dtypes; then nothing was changed.
        """
        if strict:
            self._check_names(full)
        shards: dict[int, Tensor] = {}
        for slot, (name, value) in enumerate(self._kept):
            if name in full:
                _fits(full[name], value.type, f"state {name!r}")
                shards[slot] = self._own(full[name], value)
            elif self._role(value) == "state":
                shards[slot] = torch.zeros_like(self.executor.state[slot], device=self.executor.device)
        for slot, shard in shards.items():
            self.executor.state[slot] = shard

    def share_state(self, other: Program) -> bool:
        """Let both programs have one state from now on, that of `other`: a step of either changes it.

        False, and nothing is done, where they do not hold the same tensors in the same places.
        """
        if self.map.stage != other.map.stage:
            return False
        mine, theirs = list(self.state_types.items()), list(other.state_types.items())
        if mine != theirs or self.executor.mesh != other.executor.mesh:
            return False
        self.executor.state = other.executor.state
        return True

    def drop_state(self) -> None:
        """Free the memory of the state, also for programs that share it. Each of them needs all of
        its state loaded, or another's shared, before its next step."""
        self.executor.state[:] = [t.to("meta") for t in self.executor.state]

    def init_state(self, fn: Callable[[str, TensorType], Tensor]) -> None:
        """Set each parameter and buffer to this rank's part of `fn(name, type)`, one at a time.

        `fn` gives a whole tensor, the same on all ranks. Optimizer states start at 0.
        """
        for slot, (name, value) in enumerate(self._kept):
            if self._role(value) == "state":
                self.executor.state[slot] = torch.zeros_like(self.executor.state[slot])
                continue
            tensor = fn(name, value.type)
            _fits(tensor, value.type, f"state {name!r}")
            self.executor.state[slot] = self._own(tensor, value)

    def state_dict(
        self, full: bool = True, copy: bool = True, *, dtensor: bool = False
    ) -> dict[str, Tensor]:
        """All state by name: whole tensors (all ranks must call), or local shards.

        Args:
            dtensor: DTensors on the plan's mesh instead (all ranks must call), with the plan's
                placements; with `copy` they do not share memory with the state.
            copy: without it local shards share memory with the state.
        """
        out: dict[str, Tensor] = {}
        if dtensor:
            from .dtensors import to_dtensor  # torch.distributed.tensor takes a second to load
        if full and not dtensor:
            return self._whole_state()
        if dtensor and self.map.staged:
            raise RunError(
                "W0804", "state over pipeline stages has no DTensors",
                reason="a DTensor is on the ranks of one mesh", hint="take whole tensors",
            )  # fmt: skip
        for slot, (name, value) in enumerate(self._kept):
            shard = self.executor.state[slot]
            shard = shard.clone() if copy else shard
            out[name] = to_dtensor(shard, value.type, self.comm) if dtensor else shard
        return out

    def _whole_state(self) -> dict[str, Tensor]:
        """Whole tensors of all stages."""
        out: dict[str, Tensor] = {}
        for name in self.map.kept:
            with together(f"gathers {name!r} of its state"):
                out[name] = self.whole(name)
        return out

    def whole(self, name: str) -> Tensor:
        """A state as a whole tensor; all ranks must call."""
        type, _, stage = self.map.kept[name]
        mine = None
        if stage == self.map.stage:
            slot, value = next((i, v) for i, (n, v) in enumerate(self._kept) if n == name)
            mine = self.comm.gather(self.executor.state[slot].clone(), value.type)
        return self.map.share(self.comm, type.placed(None), stage, mine)

    def set_shards(self, shards: Mapping[str, Tensor]) -> None:
        """Take local shards by name; these tensors become the state."""
        slots = {name: slot for slot, (name, _) in enumerate(self._kept)}
        for name, shard in shards.items():
            self.executor.state[slots[name]] = shard

    def _own(self, tensor: Tensor, value: Value) -> Tensor:
        shard = self.executor.place(tensor.detach(), value)
        return shard.clone(memory_format=torch.contiguous_format)

    def _check_names(self, full: Mapping[str, Tensor]) -> None:
        known = self.map.kept
        for name, value in full.items():
            if not isinstance(value, Tensor):
                raise RunError(
                    "W0804", f"state {name[:80]!r} is of type {type(value).__name__}",
                    reason="a state dict holds tensors", hint="pass what model.state_dict() gives",
                )  # fmt: skip
        memory = {full[name].data_ptr() for name in known if name in full}
        unknown = [n for n in full if n not in known and full[n].data_ptr() not in memory]
        needed = [name for name, (_, role, _) in known.items() if role != "state"]
        missing = [name for name in needed if name not in full]
        if unknown or missing:
            parts = [f"missing {_some(missing)}"] if missing else []
            parts += [f"unknown {_some(unknown)}"] if unknown else []
            raise RunError(
                "W0804", "the state does not match the plan", reason="; ".join(parts),
                hint="load the state of the model that was compiled, or pass strict=False",
            )  # fmt: skip

    # -- steps --------------------------------------------------------------------------------

    def step(
        self,
        *inputs: Tensor,
        lr: float | Sequence[float] | None = None,
        seed: int | None = None,
    ) -> list[Tensor]:
        """Run one step on whole inputs and return its results (loss, outputs), whole.

        Args:
            inputs: the entry's inputs, in its order.
            lr: the learning rate, or one for each parameter group.
            seed: for programs that draw random numbers; another one for each step.

        Raises RunError W0804 for wrong inputs (nothing has run then), W0803 when a rank fails.
        """
        results = self.executor.run(self._inputs(inputs, lr, seed), trace=self._trace)
        with together("gets the results of its step"):
            results = self.map.collect(self.comm, self.executor.function, results)
        self._trim()
        return results

    def begin(self, *inputs: Tensor, seed: int | None = None) -> list[Tensor]:
        """Run the first half of a step up to the outputs, for plans with tangents. As `step`."""
        return self.executor.begin(self._inputs(inputs, None, seed), trace=self._trace)

    def hand_over(self) -> list[Tensor] | None:
        """What the last `begin` left for `finish`; see `Executor.hand_over`."""
        return self.executor.hand_over()

    def finish(self, *tangents: Tensor, handed: list[Tensor] | None = None) -> list[Tensor]:
        """Run the second half: gradients of the outputs in, gradients out. As `step`."""
        wanted = [(name, value.type) for name, value, role in self._fed if role == "tangent"]
        given = _matched(tangents, wanted, "tangent")
        results = self.executor.finish(given, handed=handed, trace=self._trace)
        self._trim()
        return results

    def _trim(self) -> None:
        """Return what the idle heap has grown by, a tenth of the plan's peak at a time.

        What a step leaves idle the next one takes again: returning it would cost a page fault for
        each page (measured: 15 % of a small Llama's step). The first step also leaves what tracing
        and planning took, which nothing takes again.
        """
        if self.executor.device.type != "cpu":
            return
        if not self._idle:
            trim(0)
        if len(self._idle) < 2:
            self._idle.append(idle_heap())
        else:
            trim(self._idle[1] + max(self._growth, LEAST_BYTES))

    def _inputs(
        self, inputs: Sequence[Tensor], lr: float | Sequence[float] | None, seed: int | None
    ) -> list[Tensor]:
        wanted = self.map.inputs
        given = dict(zip((n for n, _ in wanted), _matched(inputs, wanted, "input"), strict=True))
        rates = dict(zip(self.map.rates, _rates(lr, self.map.rates), strict=True))
        out = []
        for name, value, role in self._fed:
            if role == "input":
                out.append(self.map.part(given[name], value, self._attrs[value.name]))
            elif role == "lr":
                out.append(torch.tensor(rates[name], dtype=TORCH_DTYPES[value.type.dtype]))
            elif role == "seed":
                if seed is None:
                    raise RunError(
                        "W0804", "the plan draws random numbers and needs a seed",
                        hint="pass seed=, another number for each step",
                    )  # fmt: skip
                out.append(_seed(seed, TORCH_DTYPES[value.type.dtype]))
            elif role != "tangent":
                raise RunError("W0804", f"parameter {name!r} of the plan has role {role!r}")
        return out

    @contextmanager
    def tracing(self, path: str | Path | None = None) -> Iterator[Trace]:
        """Record the steps inside as a timeline; write it to `path` (with this rank's number)."""
        self._trace = trace = Trace(self.comm.rank)
        try:
            yield trace
        finally:
            self._trace = None
        if path is not None:
            path = Path(path)
            stem, dot, rest = path.name.partition(".")
            trace.write(path.with_name(f"{stem}.rank{self.comm.rank}{dot}{rest}"))

    def memory(self) -> Memory:
        """This rank's memory so far."""
        executor = self.executor
        if executor.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated(executor.device)
        else:
            unit = 1 if sys.platform == "darwin" else 1024  # getrusage(2): KiB, bytes on macOS
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
        return Memory(executor.state_bytes(), executor.planned_bytes(), peak)


def _names(function: Function) -> dict[str, str]:
    """The user's name of each entry parameter."""
    pairs = zip(function.params, function.param_attrs, strict=True)
    return {value.name: str(attrs.get("name", value.name)) for value, attrs in pairs}


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more


def _fits(tensor: Tensor, type: TensorType, what: str) -> None:
    """Raise RunError W0804 when a tensor does not have the dtype and global shape of a type."""
    expected = TensorType(type.dtype, type.shape)
    if not isinstance(tensor, Tensor):
        raise RunError(
            "W0804", f"{what}: expected {expected}, got {tensor.__class__.__name__}",
            hint="pass a torch.Tensor",
        )  # fmt: skip
    if tensor.is_meta:
        raise RunError(
            "W0804", f"{what}: a tensor on device meta has no data",
            reason="weft.plan() takes such tensors, running takes real ones",
            hint="make it on a real device; tensors of other real devices are copied",
        )  # fmt: skip
    if tensor.dtype != TORCH_DTYPES[type.dtype] or tuple(tensor.shape) != type.shape:
        got = f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}"
        raise RunError(
            "W0804", f"{what}: expected {expected}, got {got}",
            reason="a plan is made for fixed shapes and dtypes",
            hint="pass whole (global) tensors; compile again for other shapes",
        )  # fmt: skip


def _matched(
    tensors: Sequence[Tensor], wanted: Sequence[tuple[str, TensorType]], kind: str
) -> Sequence[Tensor]:
    """The tensors, after a check of their number, dtypes and shapes."""
    if len(tensors) != len(wanted):
        expected = ", ".join(f"{name}: {type.placed(None)}" for name, type in wanted) or "none"
        raise RunError(
            "W0804", f"the plan takes {len(wanted)} {kind}s, got {len(tensors)}",
            reason=f"it expects {expected}",
        )  # fmt: skip
    for position, (tensor, (name, type)) in enumerate(zip(tensors, wanted, strict=True)):
        _fits(tensor, type, f"{kind} {position} ({name})")
    return tensors


def _seed(seed: int, dtype: torch.dtype) -> Tensor:
    """Raises RunError W0804 for what is no 64-bit number."""
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise RunError(
            "W0804", "the seed must be a 64-bit integer", reason=f"got {reprlib.repr(seed)[:80]}",
            hint="pass seed=, another number for each step",
        )  # fmt: skip
    return torch.tensor(seed, dtype=dtype)


def _rates(lr: float | Sequence[float] | None, names: Sequence[str]) -> list[float]:
    """One learning rate for each of `names`."""
    if lr is None and names:
        raise RunError(
            "W0804", "the plan needs a learning rate",
            reason=f"it has {_some(names)}", hint="pass lr=",
        )  # fmt: skip
    rates: list[Any] = [lr] * len(names)
    if not isinstance(lr, (int, float)):
        rates = list(lr or ()) if isinstance(lr, Iterable) or lr is None else [lr]
    if not all(isinstance(rate, (int, float)) and abs(rate) <= sys.float_info.max for rate in rates):
        raise RunError(
            "W0804", "a learning rate must be a finite number", reason=f"got {reprlib.repr(rates)[:80]}",
            hint="pass lr=0.001, or one for each parameter group",
        )  # fmt: skip
    if len(rates) != len(names):
        raise RunError(
            "W0804", f"the plan has {len(names)} learning rates ({_some(names)}), got {len(rates)}"
        )
    return [float(rate) for rate in rates]


def same_plan(modules: Sequence[Module], comm: Comm) -> None:
    """Check that all ranks hold the same plan; all must call. Raises RunError W0802."""
    if not comm.distributed or dist.get_world_size() == 1:
        return
    digest = hashlib.sha256(repr(tuple(modules)).encode()).hexdigest()
    digests: list[str] = [""] * dist.get_world_size()
    with together("compares its plan with the others'"):
        dist.all_gather_object(digests, digest)
    if len(set(digests)) == 1:
        return
    entry = modules[comm.stage].entry
    functions: list[Function] = [entry] * len(digests)
    dist.all_gather_object(functions, entry)
    check(dict(enumerate(functions)), comm.ranks.meshes)  # says in detail what differs, if it matters
    odd = [rank for rank, other in enumerate(digests) if other != digests[0]]
    raise RunError(
        "W0802", "the ranks hold different plans",
        reason=f"rank {_some(list(map(str, odd)))} against rank 0",
        hint="give all ranks the same artifact folder",
    )  # fmt: skip
