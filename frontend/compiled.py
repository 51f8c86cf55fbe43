"""`@weft.compile`: programs that trace, plan and run themselves at their first call.

A program is planned once for each *signature* of its inputs: structure, shapes, dtypes, values that
are no tensors, train or eval mode. Another signature plans again, and the log says what changed.
On several ranks every rank calls with the same whole inputs and gets the same whole results.
"""

from __future__ import annotations

import functools
import inspect
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
from .api import named_inputs, step_program
from .device_mesh import mesh_option, use_mesh
from .driver import Program, Progress, plan_program
from .load_target import is_train_step
from .logs import configure
from .options import OPTIONS, Options
from .plan import Plan
from .structure import Structure, flatten
from .trace import trace_forward
from .tracebacks import shows_users_frames
from .train_step import trace_joint, trace_train_step
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
        self._seeds: torch.Generator | None = None

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
        """A seed for the next step: drawn from torch's generator, the same on all ranks."""
        if self._seeds is None:
            base = [torch.initial_seed() % (1 << 62)]
            if dist.is_initialized() and dist.get_world_size() > 1:
                dist.broadcast_object_list(base, 0)
            self._seeds = torch.Generator().manual_seed(base[0])
        return int(torch.randint(1 << 62, (), generator=self._seeds))


def _mode(*modules: torch.nn.Module) -> tuple[bool, ...]:
    return tuple(m.training for module in modules for m in module.modules())


class TrainStep:
    """A compiled `(model, optimizer, *batch) -> loss`.

    After its first call the compiled step owns the parameters and the optimizer's state. On one
    rank, and for whole parameters on several, the model's tensors share their memory, so the model
    is always up to date; `sync()` writes everything back into model and optimizer.
    """

    def __init__(self, function: Callable[..., Any], compiler: Compiler) -> None:
        functools.update_wrapper(self, function)
        self.function, self.compiler = function, compiler
        self._owner: tuple[torch.nn.Module, torch.optim.Optimizer] | None = None
        self._current: Entry | None = None

    @shows_users_frames
    def __call__(
        self, model: torch.nn.Module, optimizer: torch.optim.Optimizer, *batch: Any, **kwargs: Any
    ) -> Any:
        """One step on the whole batch."""
        if self._owner is not None and self._owner != (model, optimizer):
            raise CompileError(
                "W0304",
                "the compiled step was called with another model or optimizer",
                reason="it holds the state of the first one",
                hint="compile the function once more for the other model: weft.compile(step)",
            )
        self._owner = model, optimizer

        def trace() -> tuple[Program, Structure]:
            traced = trace_train_step(self.function, model, optimizer, batch, kwargs)
            name = getattr(self.function, "__qualname__", "train_step")
            return step_program(name, traced, batch, kwargs), traced.outputs

        entry = self.compiler.find(Key.of(batch, kwargs, _mode(model)), trace)
        if entry is not self._current:
            self._move_state(entry)
        tensors = list(named_inputs_in_order(batch, kwargs))
        rates = [float(group["lr"]) for group in optimizer.param_groups]
        results = entry.running.step(*tensors, lr=rates, seed=self.compiler.seed())
        self._share(entry, model)
        return entry.outputs.build(results)

    def _move_state(self, entry: Entry) -> None:
        """Load the state of the last plan, or of the model and optimizer."""
        if self._current is None:
            entry.running.load_state(entry.plan.weights)
        else:
            entry.running.load_state(self._current.running.state_dict(), strict=False)
        self._current = entry

    @staticmethod
    def _share(entry: Entry, model: torch.nn.Module) -> None:
        """Let the model's tensors be those of the plan where this rank holds them whole.

        Updates in place keep the memory, others (of buffers) replace it.
        """
        shards = entry.running.state_dict(full=False, copy=False)
        for name, tensor in _state_of(model).items():
            shard = shards.get(name)
            if shard is None or shard.shape != tensor.shape:
                continue
            if shard.data_ptr() != tensor.data_ptr():
                tensor.data = shard

    def state_dict(self, *, dtensor: bool = False) -> dict[str, Tensor]:
        """All state by the user's names (`exp_avg/NAME` for the optimizer's); all ranks call.

        Args:
            dtensor: DTensors on the plan's mesh instead of whole tensors.
        """
        if self._current is None:
            raise CompileError("W0304", "the compiled step has no state before its first call")
        return self._current.running.state_dict(dtensor=dtensor)

    def sync(self) -> None:
        """Write parameters, buffers and optimizer states back into model and optimizer."""
        if self._owner is None or self._current is None:
            return
        model, optimizer = self._owner
        state = self.state_dict()
        named = _state_of(model)
        for name, value in state.items():
            if name in named:
                named[name].data.copy_(value)
        by_name = dict(model.named_parameters())
        for key, value in state.items():
            kind, slash, name = key.partition("/")
            if slash and name in by_name:
                optimizer.state[by_name[name]][kind] = value
                if kind != "momentum_buffer":
                    optimizer.state[by_name[name]]["step"] = state["step"].float()

    @property
    def plan(self) -> Plan:
        """The plan of the last call. Raises CompileError before the first one."""
        if self._current is None:
            raise CompileError("W0304", "the compiled step has no plan before its first call")
        return self._current.plan


def _state_of(model: torch.nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_buffers()), **dict(model.named_parameters())}


def named_inputs_in_order(args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """The tensors among the inputs, in the entry's order, detached."""
    return [t.detach() for t in flatten((tuple(args), dict(kwargs)))[0]]


class _Joint(torch.autograd.Function):
    """Autograd's view of a joint plan: parameters and inputs in, outputs out."""

    @staticmethod
    def forward(ctx: Any, module: Any, entry: Entry, inputs: Any, *wanted: Tensor) -> Any:
        ctx.module, ctx.entry = module, entry
        outs = module.begin(entry, inputs)
        ctx.mark_non_differentiable(*(t for t in outs if not t.is_floating_point()))
        ctx.shapes = [(t.shape, t.dtype) for t in outs]
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *tangents: Any) -> Any:
        entry: Entry = ctx.entry
        device = entry.running.executor.device
        given = [
            torch.zeros(ctx.shapes[n][0], dtype=ctx.shapes[n][1], device=device)
            if tangents[n] is None
            else tangents[n]
            for n in entry.tangents
        ]
        grads = dict(zip(entry.grads, entry.running.finish(*given), strict=True))
        return None, None, None, *(grads[name] for name in entry.grads)


class CompiledModule(torch.nn.Module):
    """A compiled module; its parameters stay those of the module it was made from.

    Without gradients a forward plan runs. With them a joint plan runs up to the outputs, and its
    rest when autograd asks for the gradients.
    """

    def __init__(self, module: torch.nn.Module, compiler: Compiler) -> None:
        super().__init__()
        self.module, self.compiler = module, compiler
        self._last: Entry | None = None

    @shows_users_frames
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plan on whole inputs."""
        tensors, _, _ = flatten((args, kwargs))
        learned = [p for p in self.module.parameters() if p.requires_grad]
        joint = torch.is_grad_enabled() and bool(learned or any(t.requires_grad for t in tensors))
        key = Key.of(args, kwargs, (joint, *_mode(self.module)))
        entry = self.compiler.find(key, lambda: self._trace(joint, args, kwargs))
        self._last = entry
        self._load(entry)
        if not joint:
            results = entry.running.step(*(t.detach() for t in tensors), seed=self.compiler.seed())
            return entry.outputs.build(self._take(entry, results))
        wanted = [self._tensor(name, entry, tensors) for name in entry.grads]
        run: Callable[..., Any] = _Joint.apply
        return entry.outputs.build(run(self, entry, tensors, *wanted))

    def _trace(
        self, joint: bool, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Program, Structure]:
        trace = trace_joint if joint else trace_forward
        traced = trace(self.module, args, kwargs)
        named = named_inputs(traced.input_names, args, kwargs)
        name = type(self.module).__qualname__
        kind = "joint" if joint else "forward"
        return Program(kind, name, traced.module, traced.tensors, named, {}), traced.outputs

    def begin(self, entry: Entry, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Run a joint plan up to its outputs."""
        results = entry.running.begin(*(t.detach() for t in inputs), seed=self.compiler.seed())
        return self._take(entry, results)

    def _tensor(self, name: str, entry: Entry, tensors: Sequence[Tensor]) -> Tensor:
        named = _state_of(self.module)
        if name in named:
            return named[name]
        attrs = entry.plan.module("schedule").entry.param_attrs
        inputs = [str(a["name"]) for a in attrs if a.get("role") == "input"]
        return tensors[inputs.index(name)]

    def _load(self, entry: Entry) -> None:
        """Hand the module's current parameters and buffers to the plan."""
        named = _state_of(self.module)
        state = {n: named[n] if n in named else entry.plan.weights[n] for n in entry.weights}
        entry.running.load_state(state, strict=False)

    def _take(self, entry: Entry, results: list[Tensor]) -> list[Tensor]:
        """Write buffers that the plan updated back into the module; the outputs."""
        if entry.updated:
            fresh = entry.running.state_dict()
            named = _state_of(self.module)
            for name in entry.updated:
                if name in named:
                    named[name].data.copy_(fresh[name])
        return results

    @property
    def plan(self) -> Plan:
        """The plan of the last call. Raises CompileError before the first one."""
        if self._last is None:
            raise CompileError("W0304", "the compiled module has no plan before its first call")
        return self._last.plan

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("module"), name)


class CompiledFunction:
    """A compiled plain function of tensors; a train step is told by its first arguments."""

    def __init__(self, function: Callable[..., Any], compiler: Compiler) -> None:
        functools.update_wrapper(self, function)
        self.function, self.compiler = function, compiler
        self.step: TrainStep | None = None
        self._last: Entry | None = None

    @shows_users_frames
    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the plan on whole inputs."""
        if is_train_step(self.function, args):
            self.step = self.step or TrainStep(self.function, self.compiler)
            return self.step(*args, **kwargs)
        modules = [a for a in (*args, *kwargs.values()) if isinstance(a, torch.nn.Module)]
        key = Key.of(args, kwargs, _mode(*modules))

        def trace() -> tuple[Program, Structure]:
            traced = trace_forward(self.function, args, kwargs)
            named = named_inputs(traced.input_names, args, kwargs)
            name = getattr(self.function, "__qualname__", "function")
            return Program(
                "forward", name, traced.module, traced.tensors, named, {}
            ), traced.outputs

        entry = self._last = self.compiler.find(key, trace)
        entry.running.load_state(entry.plan.weights, strict=False)
        tensors = named_inputs_in_order(args, kwargs)
        return entry.outputs.build(entry.running.step(*tensors, seed=self.compiler.seed()))

    def state_dict(self, *, dtensor: bool = False) -> dict[str, Tensor]:
        """State of a train step; see `TrainStep.state_dict`."""
        return self._train_step().state_dict(dtensor=dtensor)

    def sync(self) -> None:
        """Write a train step's state back; see `TrainStep.sync`."""
        self._train_step().sync()

    def _train_step(self) -> TrainStep:
        if self.step is None:
            raise CompileError("W0304", "this function was not called as a train step yet")
        return self.step

    @property
    def plan(self) -> Plan:
        """The plan of the last call. Raises CompileError before the first one."""
        if self.step is not None:
            return self.step.plan
        if self._last is None:
            raise CompileError("W0304", "the compiled function has no plan before its first call")
        return self._last.plan


def _compile_class(cls: type[torch.nn.Module], compiler: Callable[[], Compiler]) -> Any:
    """A subclass whose instances run compiled; it keeps name, doc and `isinstance`."""

    def run(self: torch.nn.Module, *args: Any, **kwargs: Any) -> Any:
        compiled = self.__dict__.get("_weft")
        if compiled is None:
            plain = _plain_view(self, cls)
            compiled = self.__dict__["_weft"] = CompiledModule(plain, compiler())
        return compiled(*args, **kwargs)

    names = {"__doc__": cls.__doc__, "__module__": cls.__module__, "__call__": run}
    return type(cls.__name__, (cls,), {**names, "__qualname__": cls.__qualname__})


def _plain_view(instance: torch.nn.Module, cls: type[torch.nn.Module]) -> torch.nn.Module:
    """The same module, attribute dictionary shared, without the compiled `__call__`."""
    plain = cls.__new__(cls)
    plain.__dict__ = instance.__dict__
    return plain


def compile(
    target: Any = None, *, cluster: str = "", mesh: str | DeviceMesh = "", **options: Any
) -> Any:
    """Compile a module class, a module, a function, or a train step `(model, optimizer, *batch)`.

    Use it as a decorator, with or without arguments, or call it. Nothing happens before the first
    call, which traces, plans and runs.

    Args:
        cluster: shorthand or TOML path; by default torchrun's world, or this one device.
        mesh: axis sizes such as `2x2`, or a DeviceMesh, whose names, sizes and process groups are
            used; all default meshes are tried without it.
        options: fields of `Options`.

    Raises CompileError, now for unknown options and at the first call for the program.
    """
    if target is None:
        return functools.partial(compile, cluster=cluster, mesh=mesh, **options)
    chosen = OPTIONS.with_(options)
    configure(chosen.logs)

    def compiler() -> Compiler:
        return Compiler(cluster or chosen.cluster, mesh, chosen)

    if inspect.isclass(target) and issubclass(target, torch.nn.Module):
        return _compile_class(target, compiler)
    if isinstance(target, torch.nn.Module):
        return CompiledModule(target, compiler())
    if callable(target):
        return CompiledFunction(target, compiler())
    raise CompileError(
        "W1001",
        f"cannot compile {type(target).__name__}",
        hint="compile a module class, a module, a function, or a train step",
    )
