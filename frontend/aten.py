"""From ATen graphs to IR: one table entry per ATen overload, a small function that emits IR ops.

The entries live in the files `aten_*.py`. Composites that have an
entry (linear, scaled_dot_product_attention, layer_norm, ...) stay whole while torch decomposes a
graph; those without one are decomposed towards core ATen. What then still has no entry becomes an
opaque `aten` op: slower, never wrong.
"""

from __future__ import annotations

import json
import logging
import operator
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.fx import Graph, Node

from ..ir.builder import Builder
from ..ir.errors import CompileError, Span
from ..ir.module import NOWHERE, Attr, Location, Op, Value
from ..ir.ops import OPS
from ..ir.types import FLOATS, TensorType
from ..ir.verify import user_span
from ..runtime.context import WEFT_DTYPES, tensor_type
from .aten_decompose import decomposed
from .complex_pair import Pair, is_complex, lower_complex, part_types
from .locate import node_location

log = logging.getLogger("weft.trace")
#: operators without a rule and lines of the user's that were told of: once is enough
_TOLD: set[tuple[str, str]] = set()

Entry = Callable[..., Any]
#: overload name, e.g. `aten.add.Tensor` -> the function that emits its IR ops
TABLE: dict[str, Entry] = {}
Number = bool | int | float
Operand = Value | Number


#: operators without results that only check or report; a plan leaves them out
_CHECKS = ("aten._assert", "aten.sym_constrain", "aten._linalg_check_errors", "aten._print")


class Unsupported(Exception):
    """An entry cannot express this call; it becomes an opaque `aten` op."""


def aten(*targets: str) -> Callable[[Entry], Entry]:
    """Register a function as the entry of ATen overloads, called with the overload's arguments.

    Its parameters have the names, order and defaults of the ATen schema, after the `Lowering`.
    """

    def register(entry: Entry) -> Entry:
        for target in targets:
            if f"aten.{target}" in TABLE:
                raise ValueError(f"aten.{target} has two entries")
            TABLE[f"aten.{target}"] = entry
        return entry

    return register


class Lowering:
    """Emits the IR ops of one ATen graph; entries of the table use its helpers.

    Attributes:
        builder: what ops are appended to.
        outs: the types of the current node's results, as torch says them.
        loc: the user's place of the current node.
    """

    def __init__(self, builder: Builder, prefix: str = "") -> None:
        self.builder, self.prefix = builder, prefix
        self.loc: Location = NOWHERE
        self.outs: tuple[TensorType, ...] = ()
        self.users: frozenset[int] = frozenset()  #: which results of the current node are read
        self.fixed_loc: Location | None = None
        self.losses: dict[int, Value] = {}  #: what `backward()` was called on, by its number
        self._defs: dict[str, Op] = {}
        self._seen_ops = 0
        self._seed: Value | None = None
        self._inside: list[str] = []  #: the operators that are being decomposed

    # -- emission ---------------------------------------------------------------------------------

    @property
    def out(self) -> TensorType:
        """The type of the current node's first result."""
        return self.outs[0]

    def many(
        self,
        name: str,
        operands: Sequence[Value],
        attrs: Mapping[str, Attr] | None = None,
        types: Sequence[TensorType] | None = None,
    ) -> tuple[Value, ...]:
        """Append an op of the IR; its results."""
        return self.builder.many(name, operands, attrs, types=types, loc=self.loc)

    def emit(
        self,
        name: str,
        operands: Sequence[Value],
        attrs: Mapping[str, Attr] | None = None,
        type: TensorType | None = None,
    ) -> Value:
        """Append an op of the IR with one result."""
        return self.builder.one(
            name, operands, attrs, types=None if type is None else [type], loc=self.loc
        )

    def definition(self, value: Value) -> Op | None:
        """The op that defines a value; None for a parameter."""
        for op in self.builder.ops[self._seen_ops :]:
            self._defs.update((result.name, op) for result in op.results)
        self._seen_ops = len(self.builder.ops)
        return self._defs.get(value.name)

    def constant(self, value: Number, dtype: str, shape: Sequence[int] = ()) -> Value:
        """A tensor filled with a number, converted to the dtype."""
        if dtype in FLOATS:
            value = float(value)
        else:
            value = bool(value) if dtype == "bool" else int(value)
        return self.emit("constant", [], {"value": value}, TensorType(dtype, tuple(shape)))

    def cast(self, x: Value, dtype: str) -> Value:
        """`x` as `dtype`."""
        if x.type.dtype == dtype:
            return x
        return self.emit("cast", [x], type=TensorType(dtype, x.type.shape))

    def operand(self, x: Operand, dtype: str) -> Value:
        """A value or a number as a value of `dtype`."""
        return self.cast(x, dtype) if isinstance(x, Value) else self.constant(x, dtype)

    def apply(self, name: str, *xs: Operand, dtype: str | None = None) -> Value:
        """A pointwise op on operands converted to `dtype` (by default the first value's)."""
        if dtype is None:
            dtype = next(x.type.dtype for x in xs if isinstance(x, Value))
        return self.emit(name, [self.operand(x, dtype) for x in xs])

    def reshape(self, x: Value, shape: Sequence[int]) -> Value:
        """`x` in another shape."""
        if x.type.shape == tuple(shape):
            return x
        return self.emit("reshape", [x], type=TensorType(x.type.dtype, tuple(shape)))

    def permute(self, x: Value, dims: Sequence[int]) -> Value:
        """`x` with its dims reordered."""
        if list(dims) == list(range(len(dims))):
            return x
        return self.emit("permute", [x], {"dims": tuple(dims)})

    def expand(self, x: Value, shape: Sequence[int]) -> Value:
        """`x` repeated along dims of size 1 and new leading dims."""
        if x.type.shape == tuple(shape):
            return x
        return self.emit("expand", [x], type=TensorType(x.type.dtype, tuple(shape)))

    def slice(self, x: Value, dim: int, start: int, stop: int, step: int = 1) -> Value:
        """Elements start, start + step, ... < stop of a dim."""
        if start == 0 and stop == x.type.shape[dim] and step == 1:
            return x
        return self.emit("slice", [x], {"dim": dim, "start": start, "stop": stop, "step": step})

    def reduce(
        self, x: Value, dims: Sequence[int], keepdim: bool = False, how: str = "reduce_sum"
    ) -> Value:
        """A reduction over dims."""
        if not dims:
            return x
        attrs: dict[str, Attr] = {"dims": tuple(sorted(dims)), "keepdim": keepdim}
        return self.emit(how, [x], attrs)

    def seed(self) -> Value:
        """The seed of the next random op.

        Seeds form a chain (each random op folds the chain's end twice, by 1 for itself and by 0
        for its successor), so repeated blocks stay equal: no op has a number of its own.
        """
        if self._seed is None:
            self._seed = self.builder.param(TensorType("i64", ()), "seed", role="seed", name="seed")
        own = self.emit("fold_seed", [self._seed], {"by": 1})
        self._seed = self.emit("fold_seed", [self._seed], {"by": 0})
        return own

    # -- graphs -----------------------------------------------------------------------------------

    def run(self, graph: Graph, env: dict[Node, Any]) -> Any:
        """Emit a graph whose placeholders are bound in `env`; what its output node holds."""
        for node in graph.nodes:
            if node.op == "output":
                return torch.fx.node.map_arg(node.args[0], lambda n: env[n])
            if node.op == "call_function":
                self.loc = self.fixed_loc or node_location(node, self.prefix)
                env[node] = self._node(node, env)
        raise ValueError("the graph has no output")

    def _node(self, node: Node, env: Mapping[Node, Any]) -> Any:
        args = torch.fx.node.map_arg(node.args, lambda n: env[n])
        kwargs = torch.fx.node.map_arg(node.kwargs, lambda n: env[n])
        if node.target is operator.getitem:
            values: Any = args
            return values[0][values[1]]
        target = str(node.target)
        if target == "with_effects" and str(args[1]).startswith(_CHECKS):
            return None, None  # the next effect's token, and no result
        if target.startswith(_CHECKS):
            return None
        if is_complex(node.meta.get("val")) or any(map(_has_pair, (*args, *kwargs.values()))):
            return self._complex_node(node, target, args, kwargs)
        self.outs = self._types(node)
        self.users = frozenset(
            int(user.args[1]) for user in node.users if user.target is operator.getitem  # type: ignore[arg-type]
        )
        entry = TABLE.get(target)
        if entry is not None:
            mark = len(self.builder.ops)
            try:
                result = entry(self, *args, **kwargs)
                self._check(target, result)
                return result
            except Unsupported as reason:
                self._drop(mark)
                log.info("%s: %s", target, reason)
        found = self._decomposed(node, target, args, kwargs)
        if found is not None:
            return found
        if self._inside:
            raise Unsupported(f"{target} has no entry")
        return self._opaque_op(node, target, args, kwargs)

    def _decomposed(
        self, node: Node, target: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        """What torch makes of an operator in smaller ones, if all of those have entries."""
        if target in self._inside:
            return None
        graph = decomposed(node.target, args, kwargs)
        if graph is None:
            return None
        mark, outs, loc = len(self.builder.ops), self.outs, self.fixed_loc
        self.fixed_loc = self.loc
        self._inside.append(target)
        placeholders = [n for n in graph[0].nodes if n.op == "placeholder"]
        try:
            result = self.run(graph[0], dict(zip(placeholders, graph[1], strict=True)))
            self.outs = outs
            self._check(target, result)
        except (Unsupported, CompileError) as reason:
            log.info("%s: %s", target, reason)
            self._drop(mark)
            return None
        finally:
            self.outs, self.fixed_loc = outs, loc
            self._inside.pop()
        return tuple(result) if isinstance(result, list) else result

    def _drop(self, mark: int) -> None:
        """Take back the ops since there were `mark`."""
        del self.builder.ops[mark:]
        self._seen_ops = min(self._seen_ops, mark)

    def _complex_node(
        self, node: Node, target: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        def real(*xs: Any, **named: Any) -> Any:
            self.outs = part_types(node.meta["val"])
            if target not in TABLE:
                raise Unsupported(f"{target} has no entry")
            return TABLE[target](self, *xs, **named)

        try:
            result = lower_complex(self, real, target, args, kwargs)
        except Unsupported:
            result = None
        if result is None:
            raise CompileError(
                "W0302", f"{target} of complex numbers is not supported", span=_span(self.loc),
                reason=f"it gives {_dtypes(node.meta['val'])}, and weft has no rule for it",
                hint="write it with the real and imaginary parts (torch.view_as_real)",
            )  # fmt: skip
        return result

    def _types(self, node: Node) -> tuple[TensorType, ...]:
        value = node.meta.get("val")
        values = value if isinstance(value, (tuple, list)) else (value,)
        types = []
        for item in values:
            if item is None:
                types.append(TensorType("bool", ()))  # a result that is not made
                continue
            static = isinstance(item, torch.Tensor) and all(type(s) is int for s in item.shape)
            if not static:
                raise self._dynamic(node)
            if item.dtype not in WEFT_DTYPES:
                raise CompileError("W0302", f"dtype {item.dtype} is not supported",
                                   span=_span(self.loc), hint="cast to a supported dtype")  # fmt: skip
            types.append(tensor_type(item))
        return tuple(types)

    def _dynamic(self, node: Node) -> CompileError:
        return CompileError(
            "W0301", f"the shape or value of {node.name} depends on the data",
            span=_span(self.loc), reason=f"{node.target} gives a different size for other values",
            hint="use a mask of fixed shape (torch.where) in place of selection by values",
        )  # fmt: skip

    def _check(self, target: str, result: Any) -> None:
        """An entry's result types must be those that torch computed."""
        results = result if isinstance(result, tuple) else (result,)
        for value, wanted in zip(results, self.outs, strict=False):
            if isinstance(value, Value) and value.type != wanted:
                raise Unsupported(f"entry gives {value.type}, torch gives {wanted}")

    # -- what has no entry ------------------------------------------------------------------------

    def _opaque_op(
        self, node: Node, target: str, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> Any:
        if not isinstance(node.target, torch._ops.OpOverload):
            raise CompileError(
                "W0302", f"{target} cannot be traced", span=_span(self.loc),
                reason="it is not an operator", hint="move it out of the traced function",
            )  # fmt: skip
        operands: list[Value] = []
        text = {"args": [_template(item, operands) for item in args],
                "kwargs": {key: _template(item, operands) for key, item in kwargs.items()}}  # fmt: skip
        place = f"{self.loc.file}:{self.loc.line}"
        if (target, place) not in _TOLD and os.environ.get("RANK", "0") == "0":
            _TOLD.add((target, place))
            log.warning("%s has no rule: it runs on whole operands (%s)", target, self.loc)
        value = node.meta.get("val")
        if isinstance(value, (tuple, list)):
            made = [item is not None for item in value]
            types = [type for type, is_made in zip(self.outs, made, strict=True) if is_made]
            results = iter(self.many("aten", operands, _opaque_attrs(target, text), types))
            return tuple(next(results) if is_made else None for is_made in made)
        return self.emit("aten", operands, _opaque_attrs(target, text), self.out)


def _dtypes(value: Any) -> str:
    items = value if isinstance(value, (tuple, list)) else (value,)
    return ", ".join(str(item.dtype) for item in items if isinstance(item, torch.Tensor))


def _has_pair(item: Any) -> bool:
    """Is an argument a complex value, or a list with one?"""
    return isinstance(item, Pair) or (isinstance(item, (list, tuple)) and any(map(_has_pair, item)))


def _opaque_attrs(target: str, text: Mapping[str, Any]) -> dict[str, Attr]:
    body = text["args"] if not text["kwargs"] else text
    return {"target": target, "args": json.dumps(body)}


def _template(item: Any, operands: list[Value]) -> Any:
    """An argument as JSON, values replaced by placeholders; see `OpContext.aten`."""
    if isinstance(item, Value):
        operands.append(item)
        return f"%{len(operands) - 1}"
    if isinstance(item, (list, tuple)):
        return [_template(entry, operands) for entry in item]
    if isinstance(item, torch.dtype):
        return {"dtype": WEFT_DTYPES[item]}
    if isinstance(item, torch.device):
        return {"device": ""}
    if isinstance(item, (torch.layout, torch.memory_format)):
        kind = "layout" if isinstance(item, torch.layout) else "memory_format"
        return {kind: str(item).removeprefix("torch.")}
    if isinstance(item, float) and item != item or item in (float("inf"), float("-inf")):
        return {"float": repr(item)}
    return item


def _span(loc: Location) -> Span | None:
    return user_span(loc.file, loc.line)


def dims_of(dims: int | Sequence[int] | None, rank: int) -> tuple[int, ...]:
    """Dims as non-negative numbers; None or an empty list means all."""
    if dims is None or (not isinstance(dims, int) and len(dims) == 0):
        return tuple(range(rank))
    listed = [dims] if isinstance(dims, int) else dims
    return tuple(dim % max(rank, 1) for dim in listed if rank)


def broken_entries() -> list[str]:
    """Table entries that name no overload of this PyTorch (some come and go with versions)."""
    missing = []
    for target in TABLE:
        space, packet, overload = target.split(".")
        if space == "aten" and not hasattr(getattr(torch.ops.aten, packet, None), overload):
            missing.append(target)
    return missing


__all__ = ["OPS", "TABLE", "Lowering", "Unsupported", "aten", "broken_entries", "dims_of"]
