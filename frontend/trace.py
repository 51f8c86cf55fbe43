"""From PyTorch programs to logical IR: one flat entry function.

`trace_forward` is for programs without gradients; `train_step.py` and `grad.py` add those.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.export.graph_signature import InputKind, OutputKind

from ..ir.builder import Builder
from ..ir.errors import CompileError
from ..ir.module import NOWHERE, Attr, Function, Module, Op, Value
from ..ir.types import TensorType
from ..ir.verify import user_span
from ..runtime.context import tensor_type
from .aten import Lowering
from .aten_grouped import AnyDtype
from .capture import AtenProgram, RefuseReads, VaryingDims, capture
from .complex_pair import Pair, is_complex, split
from .locate import node_location
from .rewrites import Rewrites
from .structure import Structure, flatten

#: constants with at most this many elements are written out in the program
LITERAL_ELEMENTS = 64
#: results that are new values of parameters and buffers
_MUTATIONS = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
#: the attribute that holds the user's modules below the traced root
_ROOT = "m"


@dataclass(frozen=True)
class Traced:
    """A traced program.

    Attributes:
        module: logical IR; the entry's parameters are params, buffers, inputs (in order), seed.
        tensors: the user's tensors for parameters of role `param` and `buffer`, by name.
        inputs: the structure of `(args, kwargs)`; its tensors are the entry's inputs.
        input_names: names of the inputs.
        outputs: the structure of the program's result; its tensors are the `output` results.
    """

    module: Module
    tensors: Mapping[str, Tensor]
    inputs: Structure
    input_names: tuple[str, ...]
    outputs: Structure


T = TypeVar("T")
U = TypeVar("U")


@dataclass(frozen=True)
class Captured(Generic[T]):
    """A program that Python has run and torch has recorded, before it becomes IR.

    Attributes:
        program: its ATen graph. Sizes in it are numbers, or symbols where dims may vary.
        outputs: the structure of its result.
        lower: gives what is traced from a graph without symbols and its structure of the result.
    """

    program: AtenProgram
    outputs: Structure
    lower: Callable[[AtenProgram, Structure], T]

    def lowered(self) -> T:
        """What is traced, for a program without symbols."""
        return self.lower(self.program, self.outputs)

    def then(self, function: Callable[[T], U]) -> Captured[U]:
        """With something done to what is traced."""
        return Captured(self.program, self.outputs, lambda p, o: function(self.lower(p, o)))


@dataclass
class _Run:
    """What a root runs and leaves behind, hidden from export, which would register a module a
    second time and restores the attributes of modules after tracing."""

    call: Callable[..., Any]
    inputs: Structure
    outputs: Structure | None = None


class Root(torch.nn.Module):
    """What is exported: takes flat tensors, calls the program, gives flat tensors.

    Args:
        call: the program, given its nested `(args, kwargs)`.
        modules: the modules that it uses, by name; one alone has the empty name.
        inputs: the structure of `(args, kwargs)`.
    """

    def __init__(
        self,
        call: Callable[..., Any],
        modules: Mapping[str, torch.nn.Module],
        inputs: Structure,
    ) -> None:
        super().__init__()
        if set(modules) == {""}:
            setattr(self, _ROOT, modules[""])
        elif modules:
            setattr(self, _ROOT, torch.nn.ModuleDict(modules))
        self._run = _Run(call, inputs)

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Run the program; remember the structure of its result."""
        args, kwargs = self._run.inputs.build(tensors)
        with RefuseReads(), Rewrites(), AnyDtype():
            result = self._run.call(*args, **kwargs)
        out, _, self._run.outputs = flatten(result)
        return tuple(out)

    @property
    def outputs(self) -> Structure:
        """The structure of the result, once traced."""
        assert self._run.outputs is not None, "not traced yet"
        return self._run.outputs

    def state_names(self) -> dict[str, str]:
        """Name of each parameter and buffer as exported -> the user's name, one per tensor."""
        first: dict[int, str] = {}
        names: dict[str, str] = {}
        both = (self.named_parameters(remove_duplicate=False),
                self.named_buffers(remove_duplicate=False))  # fmt: skip
        for table in both:
            for name, tensor in table:
                names[name] = first.setdefault(id(tensor), name.removeprefix(f"{_ROOT}."))
        return names


def input_names(
    program: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> list[str]:
    """Names for the tensors of `(args, kwargs)`, from the program's signature: `ids`, `batch.x`."""
    target = program.forward if isinstance(program, torch.nn.Module) else program
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # some builtins have no signature
        parameters = []
    positional = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY,
                                                           p.POSITIONAL_OR_KEYWORD)]  # fmt: skip
    named = {
        positional[i] if i < len(positional) else f"args.{i}": value for i, value in enumerate(args)
    }
    paths = flatten([named, dict(kwargs)])[1]
    return [path.partition(".")[2] for path in paths]


def distinct(tensors: Iterable[Tensor]) -> list[Tensor]:
    """Detached inputs, each its own object: export would merge two uses of one tensor."""
    seen: set[int] = set()
    out = []
    for tensor in tensors:
        out.append(tensor.detach().clone() if id(tensor) in seen else tensor.detach())
        seen.add(id(tensor))
    return out


def trace_forward(
    program: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
) -> Traced:
    """Trace a module or a function on example inputs.

    Args:
        program: an `nn.Module`, or a function; modules among a function's arguments are part of
            the program, not inputs.
        args, kwargs: example inputs, nested as the program takes them. Real, fake or meta.

    Raises CompileError W0301, W0302; an exception of the program itself passes through.
    """
    return capture_forward(program, args, kwargs).lowered()


def capture_forward(
    program: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    varying: VaryingDims = (),
) -> Captured[Traced]:
    """The first half of `trace_forward`; `varying` are the dims of the inputs that may vary."""
    kwargs = dict(kwargs or {})
    names = tuple(input_names(program, args, kwargs))
    tensors, _, inputs = flatten((tuple(args), kwargs))
    root = Root(program, _modules_of(program, args, kwargs), inputs)
    exported = capture(root, distinct(tensors), varying)
    users_names = root.state_names()

    def lower(graph: AtenProgram, outputs: Structure) -> Traced:
        function, state, _ = lower_program(graph, users_names, names)
        module = Module("logical", (drop_dead(drop_stops(function)),))
        return Traced(module, state, inputs, names, outputs)

    return Captured(exported, root.outputs, lower)


def _modules_of(
    program: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> dict[str, torch.nn.Module]:
    if isinstance(program, torch.nn.Module):
        return {"": program}
    found = [arg for arg in (*args, *kwargs.values()) if isinstance(arg, torch.nn.Module)]
    if len(found) == 1:
        return {"": found[0]}
    return {f"model{i}": module for i, module in enumerate(found)}


def lower_program(
    program: AtenProgram,
    names: Mapping[str, str],
    input_names: Sequence[str],
    roles: Mapping[str, str] = MappingProxyType({}),
) -> tuple[Function, dict[str, Tensor], dict[int, Value]]:
    """The entry function of a captured program, its tensors by name, and its `backward()` losses.

    Parameters that share storage become one. Results: outputs in order, then buffer updates.

    Args:
        names: `Root.state_names` of what was captured.
        roles: roles of buffers that have another one, by the user's names.
    """
    builder = Builder()
    lowering = Lowering(builder, _ROOT)
    state: dict[str, Tensor] = {}
    params: dict[str, Value] = {}
    env: dict[torch.fx.Node, Any] = {}
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    inputs, given = iter(input_names), dict[str, str]()
    updated = set(program.graph_signature.buffers_to_mutate.values())
    for node, spec in zip(placeholders, program.graph_signature.input_specs, strict=True):
        if spec.kind in (InputKind.PARAMETER, InputKind.BUFFER):
            name = names[str(spec.target)]
            kind = "param" if spec.kind is InputKind.PARAMETER else "buffer"
            role = roles.get(name, kind)
            if role == "buffer" and not node.users and spec.target not in updated:
                continue
            if name not in params:
                tensor = program.state_dict.get(str(spec.target))
                tensor = program.constants[str(spec.target)] if tensor is None else tensor
                if is_complex(tensor):  # its parts in a last dim, in the same memory
                    tensor = torch.view_as_real(tensor.detach())
                state[name] = tensor
                params[name] = builder.param(tensor_type(tensor), name, role=role, name=name)
            complex = is_complex(node.meta["val"])
            env[node] = split(lowering, params[name]) if complex else params[name]
        elif spec.kind is InputKind.USER_INPUT:
            name = next(inputs)
            if is_complex(node.meta["val"]):
                raise _complex(name, "give its parts, and call torch.view_as_complex")
            env[node] = builder.param(_type(node), name, role="input", name=name)
            given[node.name] = name
        else:
            env[node] = _constant(lowering, node, program.constants.get(str(spec.target)), state)
    outputs = lowering.run(program.graph, env)
    function = _finish(lowering, program, outputs, names, given)
    return function, state, lowering.losses


def _type(node: torch.fx.Node) -> TensorType:
    return tensor_type(node.meta["val"])


def _constant(
    c: Lowering, node: torch.fx.Node, tensor: Any, state: dict[str, Tensor]
) -> Value | None:
    """A tensor that the program made outside of tracing: written out when small."""
    if not isinstance(tensor, Tensor):
        return None  # tokens and the like
    if is_complex(tensor):
        raise _complex("a constant", "make it a buffer of the module (register_buffer)")
    type = _type(node)
    if type.numel <= LITERAL_ELEMENTS and not tensor.is_meta:
        values = tuple(tensor.detach().reshape(-1).tolist())
        if not type.shape:
            return c.constant(values[0], type.dtype)
        return c.emit("literal", [], {"values": values}, type)
    name = f"constants.{node.name}"
    state[name] = tensor
    return c.builder.param(type, name, role="buffer", name=name)


def _finish(
    c: Lowering, program: AtenProgram, outputs: Sequence[Any], names: Mapping[str, str],
    inputs: Mapping[str, str],
) -> Function:  # fmt: skip
    params = zip(c.builder.params, c.builder.param_attrs, strict=True)
    types = {attrs["name"]: value.type for value, attrs in params}
    results: list[Value] = []
    attrs: list[dict[str, Attr]] = []
    updates: dict[str, Value] = {}
    nodes = program.graph.output_node().args[0]
    assert isinstance(nodes, (list, tuple))
    specs = program.graph_signature.output_specs
    for value, spec, node in zip(outputs, specs, nodes, strict=True):
        if spec.kind in _MUTATIONS and not isinstance(value, Pair):
            name = names[str(spec.target)]
            updates[name] = c.cast(value, types[name].dtype)
        elif isinstance(value, Pair):
            raise _complex("an output", "return torch.view_as_real of it")
        elif spec.kind is OutputKind.USER_OUTPUT:
            results.append(value)
            attrs.append({"role": "output"})
        elif spec.kind is not OutputKind.TOKEN:
            at = node_location(node, _ROOT) if isinstance(node, torch.fx.Node) else NOWHERE
            raise CompileError(
                "W0302", f"the program changes {inputs.get(str(spec.target), 'a tensor')} in place",
                span=user_span(at.file, at.line),
                reason="an input belongs to the caller; only parameters and buffers may change",
                hint="work on a clone of the input",
            )  # fmt: skip
    results += updates.values()
    attrs += [{"role": "update", "updates": name} for name in updates]
    return c.builder.function("main", results, attrs)


def _complex(what: str, hint: str) -> CompileError:
    return CompileError("W0302", f"{what} is a complex tensor", hint=hint,
                        reason="inside of a program complex numbers are pairs of real ones")  # fmt: skip


def drop_stops(function: Function, active: frozenset[str] = frozenset()) -> Function:
    """Remove `stop_gradient` ops, but for those on values that depend on the values `active`."""
    names = set(active)
    env: dict[str, Value] = {}
    ops: list[Op] = []
    for op in function.ops:
        operands = tuple(env.get(v.name, v) for v in op.operands)
        if op.name == "stop_gradient" and operands[0].name not in names:
            env[op.result.name] = operands[0]
            continue
        if op.name != "stop_gradient" and any(v.name in names for v in operands):
            names.update(v.name for v in op.results)
        ops.append(op if operands == op.operands else op.with_(operands=operands))
    results = tuple(env.get(v.name, v) for v in function.results)
    return function.with_(ops=tuple(ops), results=results)


def drop_dead(function: Function) -> Function:
    """Remove ops that no result needs."""
    needed = {value.name for value in function.results}
    kept: list[Op] = []
    for op in reversed(function.ops):
        if any(value.name in needed for value in op.results):
            needed.update(value.name for value in op.operands)
            kept.append(op)
    return function.with_(ops=tuple(reversed(kept)))
