"""Calls of compiled programs: what a trace and a plan are made for, and what differs between two."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import CompileError, Span
from .capture import VaryingDims
from .driver import Program
from .structure import Structure, flatten
from .trace import Captured

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Key:
    """What a plan is made for: names, shapes and dtypes of the tensors, all else, the mode."""

    tensors: tuple[tuple[str, Shape, torch.dtype], ...]
    body: str
    mode: tuple[object, ...]

    @property
    def shapes(self) -> tuple[Shape, ...]:
        """The shapes of the tensors."""
        return tuple(shape for _, shape, _ in self.tensors)

    @property
    def without_sizes(self) -> Key:
        """The key with -1 for all sizes: what calls of one symbolic program have in common."""
        rows = ((name, (-1,) * len(shape), dtype) for name, shape, dtype in self.tensors)
        return replace(self, tensors=tuple(rows))


@dataclass(frozen=True)
class Call:
    """One call of a compiled program.

    Attributes:
        program: the user's module or function.
        key: what a plan for the call is made for.
        tensors: its input tensors, in order.
        name_inputs: gives the user's names of the input tensors.
        capture: traces the program on these inputs, with the given dims as symbols; what is
            captured lowers to a program and the structure of its result.
    """

    program: Callable[..., Any]
    key: Key
    tensors: Sequence[Tensor]
    name_inputs: Callable[[], list[str]]
    capture: Callable[[VaryingDims], Captured[tuple[Program, Structure]]]

    @staticmethod
    def of(
        program: Callable[..., Any],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        mode: tuple[object, ...],
        name_inputs: Callable[[], list[str]],
        capture: Callable[[VaryingDims], Captured[tuple[Program, Structure]]],
    ) -> Call:
        """The call with these inputs."""
        tensors, names, structure = flatten((tuple(args), dict(kwargs)))
        rows = tuple((n, tuple(t.shape), t.dtype) for n, t in zip(names, tensors, strict=True))
        key = Key(rows, repr(structure.body), mode)
        return Call(program, key, tensors, name_inputs, capture)

    @property
    def title(self) -> str:
        """The program's name for people."""
        return getattr(self.program, "__qualname__", type(self.program).__qualname__)


@dataclass(frozen=True)
class Changes:
    """What differs between two calls.

    Attributes:
        sizes: (input, dim, size before, size now).
        others: what else differs, in words.
    """

    sizes: tuple[tuple[str, int, int, int], ...]
    others: tuple[str, ...]

    @staticmethod
    def between(old: Key, new: Key, names: Sequence[str]) -> Changes:
        """What is different in `new`, whose inputs have these names."""
        before = {path: (shape, dtype) for path, shape, dtype in old.tensors}
        sizes: list[tuple[str, int, int, int]] = []
        others: list[str] = []
        for name, (path, shape, dtype) in zip(names, new.tensors, strict=True):
            if path not in before:
                others.append(f"input {name} is new")
                continue
            was, was_dtype = before[path]
            if was_dtype != dtype:
                others.append(f"{name}.dtype was {was_dtype}, now it is {dtype}")
            if len(was) != len(shape):
                others.append(f"{name}.ndim was {len(was)}, now it is {len(shape)}")
                continue
            pairs = enumerate(zip(was, shape, strict=True))
            sizes += [(name, dim, a, b) for dim, (a, b) in pairs if a != b]
        if len(before) > len(new.tensors):
            others.append(f"there were {len(before)} input tensors, now {len(new.tensors)}")
        if old.mode != new.mode:
            others.append("train or eval mode, requires_grad or an optimizer's setting changed")
        if old.body != new.body and not others:
            others.append("an input that is no tensor changed")
        return Changes(tuple(sizes), tuple(others))

    def __str__(self) -> str:
        words = [f"{name}.shape[{dim}] was {a}, now it is {b}" for name, dim, a, b in self.sizes]
        return "; ".join((*words, *self.others)) or "the plan was dropped to keep memory small"

    def how_to_mark(self) -> str:
        """How to plan once for all sizes; empty where sizes are not all that changed."""
        if self.others or not self.sizes:
            return ""
        marks = " and ".join(
            f"torch._dynamo.mark_dynamic({name}, {dim})" for name, dim, _, _ in self.sizes
        )
        spec: dict[str | int, Any] = {}
        for name, dim, _, _ in self.sizes:
            inner = spec
            for part in name.split("."):
                inner = inner.setdefault(part, {})
            inner[dim] = _Text(f"torch.export.Dim('{name.rpartition('.')[2]}_{dim}')")
        return (
            f"{marks} before the call, or weft.compile(..., dynamic_shapes={spec}), "
            "traces and searches once for all sizes"
        )


def refuse_empty(names: Sequence[str], shapes: Sequence[Shape], span: Span | None = None) -> None:
    """Raise CompileError W0302 for an input without elements, such as a batch of size zero."""
    for name, shape in zip(names, shapes, strict=True):
        if 0 in shape:
            raise CompileError(
                "W0302", f"input {name} has no elements: its shape is {list(shape)}", span=span,
                reason=f"{name}.shape[{shape.index(0)}] is 0; there is nothing to compute on, and "
                "a mean over nothing is NaN, which a train step would write into the weights",
                hint="skip empty batches (drop_last=True in a DataLoader), or pad them",
            )  # fmt: skip


class _Text(str):
    """Prints as it is inside of a dict."""

    def __repr__(self) -> str:
        return str(self)
