"""Programs with symbols for sizes: the conditions they hold under, and their copies without symbols.

torch traces a program once with a symbol for each size that may vary. Whatever the program, or an
operator, asks about a size while it is traced (`if x.shape[0] > 8`) becomes a condition. For sizes
that meet all conditions the program is the one that was traced, and a graph without symbols follows
by evaluating each size: no Python of the user's runs again. Sizes 0 and 1 never stand for a symbol.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.fx import Graph, Node
from torch.utils._sympy.interp import sympy_interp
from torch.utils._sympy.printers import PythonPrinter
from torch.utils._sympy.reference import PythonReferenceAnalysis

from .capture import AtenProgram
from .dynamic_dims import Bounds
from .locate import is_internal
from .structure import Structure

Shape = tuple[int, ...]
#: torch's symbols for numbers, and what they stand for
_KINDS: dict[type, type] = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
_NUMBERS = tuple(_KINDS)


@dataclass(frozen=True)
class Condition:
    """What a program asked about sizes while it was traced; it held then.

    Attributes:
        expression: over symbols.
        place: the user's `file:line` that asked; empty where an operator did.
    """

    expression: Any
    place: str


@dataclass(frozen=True)
class Symbol:
    """A size that may vary, within bounds: dim `dim` of input `tensor`."""

    tensor: int
    dim: int
    bounds: Bounds


class SymbolicProgram:
    """A captured program some sizes of which are symbols.

    Args:
        program: what `capture` gave for varying dims.
        names: the user's names of the inputs.

    Attributes:
        symbols: the sizes that may vary.
    """

    def __init__(self, program: AtenProgram, names: Sequence[str]) -> None:
        self.program, self.names = program, tuple(names)
        env = _shape_env(program.graph.nodes)
        self.symbols: dict[Any, Symbol] = {}
        self.conditions: list[Condition] = []
        self.shapes = _input_shapes(program)
        self._replaced: dict[Any, Any] = {}
        if env is None:
            return
        self._replaced = dict(env.replacements)
        for symbol, sources in env.var_to_sources.items():
            tensor, dim = _place_of(sources[0])
            allowed = env.var_to_range[symbol]
            high = int(allowed.upper) if allowed.upper.is_Integer else None
            self.symbols[symbol] = Symbol(tensor, dim, Bounds(int(allowed.lower), high))
        self.conditions = [Condition(g.expr, _place(g.sloc.framework_loc)) for g in env.guards]

    def varies(self, tensor: int, dim: int) -> bool:
        """Is the size of a dim of an input still a symbol, after tracing?"""
        return not isinstance(self.shapes[tensor][dim], int)

    def fixed_by(self, tensor: int, dim: int) -> Condition | None:
        """What made a dim that might have varied a number."""
        own = next((s for s, at in self.symbols.items() if (at.tensor, at.dim) == (tensor, dim)), None)
        for condition in self.conditions:
            if own in condition.expression.free_symbols and condition.expression.is_Equality:
                return condition
        return None

    def misfit(self, shapes: Sequence[Shape]) -> str:
        """Why inputs of these shapes cannot run the program; empty when they can."""
        sizes = {s: shapes[at.tensor][at.dim] for s, at in self.symbols.items()}
        for condition in self.conditions:
            if not _value(condition.expression, sizes):
                where = f" ({condition.place})" if condition.place else ""
                return f"the program was traced for {self.text(condition.expression)}{where}"
        for symbol, at in self.symbols.items():
            if symbol not in self._replaced and not at.bounds.hold(sizes[symbol]):
                return f"{self.text(symbol)} is {sizes[symbol]}, the traced program is for {at.bounds}"
        for tensor, (shape, wanted) in enumerate(zip(shapes, self.shapes, strict=True)):
            for dim, (size, expression) in enumerate(zip(shape, wanted, strict=True)):
                if size != _value(expression, sizes):
                    what = f"{self.names[tensor]}.shape[{dim}]"
                    return f"{what} is {size}, the traced program has {self.text(expression)} there"
        return ""

    def text(self, expression: Any) -> str:
        """A condition or size in terms of the inputs, as Python."""
        if isinstance(expression, int):
            return str(expression)
        names = {
            symbol: type(symbol)(f"{self.names[at.tensor]}.shape[{at.dim}]", integer=True)
            for symbol, at in self.symbols.items()
        }
        return str(PythonPrinter().doprint(expression.xreplace(names)))

    def at(self, shapes: Sequence[Shape]) -> AtenProgram:
        """The program for inputs of these shapes, without symbols. They must fit."""
        number = self._numbers(shapes)
        graph = Graph()
        made: dict[Node, Any] = {}
        for node in self.program.graph.nodes:
            value = node.meta.get("val")
            if isinstance(value, _NUMBERS):
                made[node] = number(value)
                continue
            copy = graph.node_copy(node, made.__getitem__)
            copy.meta = {**node.meta, "val": _without_symbols(value, number)}
            made[node] = copy
        return replace(self.program, graph=graph)

    def outputs_at(self, outputs: Structure, shapes: Sequence[Shape]) -> Structure:
        """The structure of the result, with numbers for the sizes among its constants."""
        number = self._numbers(shapes)
        return outputs.map_constants(lambda x: number(x) if isinstance(x, _NUMBERS) else x)

    def _numbers(self, shapes: Sequence[Shape]) -> Callable[[Any], Any]:
        sizes = {s: shapes[at.tensor][at.dim] for s, at in self.symbols.items()}
        known: dict[Any, Any] = {}

        def number(symbol: Any) -> Any:
            expression = symbol.node.expr
            if expression not in known:
                known[expression] = _KINDS[type(symbol)](_value(expression, sizes))
            return known[expression]

        return number


def _value(expression: Any, sizes: dict[Any, Any]) -> Any:
    """An expression with numbers for its symbols."""
    if isinstance(expression, int):
        return expression
    return sympy_interp(PythonReferenceAnalysis, sizes, expression)


def _shape_env(nodes: Iterable[Node]) -> Any:
    """What torch recorded about the symbols of a graph."""
    values = (node.meta.get("val") for node in nodes)
    modes = (getattr(value, "fake_mode", None) for value in values)
    return next((mode.shape_env for mode in modes if mode is not None), None)


def _input_shapes(program: AtenProgram) -> list[tuple[Any, ...]]:
    """Sizes of the inputs: numbers and expressions."""
    placeholders = [node for node in program.graph.nodes if node.op == "placeholder"]
    inputs = set(program.graph_signature.user_inputs)
    return [
        tuple(map(_size, node.meta["val"].shape))
        for node in placeholders
        if node.name in inputs
    ]


def _size(size: Any) -> Any:
    """A number, or an expression where it varies."""
    if not isinstance(size, torch.SymInt):
        return size
    return int(size.node.expr) if size.node.expr.is_number else size.node.expr


def _place_of(source: Any) -> tuple[int, int]:
    """(input, dim) of what a symbol stands for: `tensors[input].size()[dim]`."""
    return int(source.base.index), int(source.idx)


def _place(frame: Any) -> str:
    if not isinstance(frame, traceback.FrameSummary) or is_internal(frame.filename):
        return ""
    return f"{frame.filename}:{frame.lineno}"


def _without_symbols(value: Any, number: Callable[[Any], Any]) -> Any:
    """What a node gives, with numbers for symbols."""
    if isinstance(value, (list, tuple)):
        return tuple(_without_symbols(item, number) for item in value)
    if isinstance(value, _NUMBERS):
        return number(value)
    if not isinstance(value, torch.Tensor) or all(isinstance(s, int) for s in value.shape):
        return value
    shape = [number(s) if isinstance(s, torch.SymInt) else s for s in value.shape]
    return torch.empty(shape, dtype=value.dtype, device="meta")
