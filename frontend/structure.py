"""Nested inputs and outputs as flat lists of tensors.

Containers are what pytree knows (tuples, lists, dicts, named tuples, registered classes such as
the outputs of transformers) and any other dataclass. Leaves that are no tensors stay in the
structure as constants.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import free_unbacked_symbols
from torch.utils import _pytree as pytree

from ..ir.errors import CompileError


@dataclass(frozen=True)
class _Hole:
    """Where tensor `index` of the flat list goes."""

    index: int


@dataclass(frozen=True)
class _Fields:
    """A dataclass that pytree does not know, taken apart."""

    kind: type
    values: dict[str, Any]


@dataclass(frozen=True)
class Structure:
    """The shape of a nested object: what remains when its tensors are taken out."""

    body: Any
    count: int

    def build(self, tensors: Sequence[Any]) -> Any:
        """The nested object with these tensors in it. Raises ValueError on a wrong count."""
        if len(tensors) != self.count:
            raise ValueError(f"expected {self.count} tensors, got {len(tensors)}")
        return _build(self.body, tensors)

    def map_constants(self, function: Callable[[Any], Any]) -> Structure:
        """The structure with `function` of each leaf that is no tensor."""
        return Structure(_map(self.body, function), self.count)


def flatten(obj: Any) -> tuple[list[Tensor], list[str], Structure]:
    """Take the tensors out of a nested object.

    Returns the tensors, a name for each from its place (`labels`, `batch.0`; the name of an object
    that is itself a tensor is empty), and the structure to build it again. Raises CompileError
    W0301 for the symbols that stand for numbers from tensors while a program is traced; those
    that stand for sizes are constants.
    """
    tensors: list[Tensor] = []
    names: list[str] = []
    try:
        body = _take(obj, "", tensors, names)
    except RecursionError:
        raise CompileError(
            "W0302", "inputs or outputs are nested too deeply",
            reason="a list, dict or dataclass holds itself, or hundreds of levels",
            hint="pass the tensors in a flatter structure",
        ) from None  # fmt: skip
    return tensors, names, Structure(body, len(tensors))


def _take(obj: Any, path: str, tensors: list[Tensor], names: list[str]) -> Any:
    if isinstance(obj, torch.Tensor):
        tensors.append(obj)
        names.append(path)
        return _Hole(len(tensors) - 1)
    if _is_plain_dataclass(obj):
        values = {
            field.name: _take(getattr(obj, field.name), _join(path, field.name), tensors, names)
            for field in fields(obj)
            if field.init
        }
        return _Fields(type(obj), values)
    if isinstance(obj, (torch.SymInt, torch.SymFloat, torch.SymBool)) and (
        free_unbacked_symbols(obj)
    ):
        raise CompileError(
            "W0301", "the program returns a number that it took from a tensor",
            hint="return the tensor itself, and call .item() on the result",
        )  # fmt: skip
    leaves, spec = pytree.tree_flatten_with_path(obj, is_leaf=lambda x: _stops(x, obj))
    if len(leaves) == 1 and not leaves[0][0]:
        return obj  # a leaf that is no tensor: a constant
    taken = [
        _take(leaf, _join(path, ".".join(map(_key, keys))), tensors, names)
        for keys, leaf in leaves
    ]
    return pytree.tree_unflatten(taken, spec)


def _stops(value: Any, root: Any) -> bool:
    return value is not root and (isinstance(value, Tensor) or _is_plain_dataclass(value))


def _is_plain_dataclass(obj: Any) -> bool:
    known = type(obj) in pytree.SUPPORTED_NODES
    return is_dataclass(obj) and not isinstance(obj, type) and not known


def _join(path: str, key: str) -> str:
    return f"{path}.{key}" if path and key else path or key


def _key(entry: Any) -> str:
    for attribute in ("key", "idx", "name"):
        if hasattr(entry, attribute):
            return str(getattr(entry, attribute))
    return str(entry)


def _build(body: Any, tensors: Sequence[Any]) -> Any:
    if isinstance(body, _Hole):
        return tensors[body.index]
    if isinstance(body, _Fields):
        values = {name: _build(value, tensors) for name, value in body.values.items()}
        return body.kind(**values)
    leaf = (_Hole, _Fields)
    return pytree.tree_map(
        lambda item: _build(item, tensors) if isinstance(item, leaf) else item,
        body,
        is_leaf=lambda item: isinstance(item, leaf),
    )


def _map(body: Any, function: Callable[[Any], Any]) -> Any:
    def leaf(item: Any) -> Any:
        if isinstance(item, _Hole):
            return item
        if isinstance(item, _Fields):
            return _Fields(item.kind, {k: _map(v, function) for k, v in item.values.items()})
        return function(item)

    return pytree.tree_map(leaf, body, is_leaf=lambda item: isinstance(item, (_Hole, _Fields)))
