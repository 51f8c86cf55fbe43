"""Random legal placements: what no search would choose must still compute the same.

A tool to test lowering, runtimes and kernels with: any seed gives a valid placed module.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import ClassVar

from ..ir.errors import CompileError
from ..ir.module import Function, Module, Op
from ..ir.opdef import OPS, signature_of
from ..ir.types import Mesh, TensorType, illegal_placement
from .apply import Choices, FunctionChoices, apply
from .base import Pass
from .reshard import Placements, legal_placements

_AXES = "xyzw"


def legal_split(op: Op, mesh: Mesh, states: tuple[str, ...]) -> bool:
    """Can an op be split so, its signature and the dtypes of its values allowing?"""
    signature = signature_of(op)
    if signature.check(states, mesh.sizes):
        return False
    ins, outs = signature.placements(states)
    return not any(
        illegal_placement(value.type, mesh, placement)
        for value, placement in zip((*op.operands, *op.results), (*ins, *outs), strict=True)
    )


def random_split(op: Op, mesh: Mesh, rng: Random) -> tuple[str, ...]:
    """A legal split of an op, uniformly among all: one state per axis."""
    if OPS[op.name].signature is None:
        return ("",) * len(mesh.axes)
    states = ("", *signature_of(op).states)
    while True:  # no split at all is legal, so this ends
        split = tuple(rng.choice(states) for _ in mesh.axes)
        if legal_split(op, mesh, split):
            return split


def random_choices(module: Module, mesh: Mesh, rng: Random) -> Choices:
    """Choices for a whole module, each uniformly random among the legal ones.

    Parameters of the entry are cut or whole, never partial, and what it returns is whole, but for
    updates: that is what a runtime stores and hands out. Other functions take and return partial
    sums and maxima as well.
    """
    entry = module.entry.name
    return Choices({f.name: _function(f, mesh, rng, f.name == entry) for f in module.functions})


def _function(function: Function, mesh: Mesh, rng: Random, entry: bool) -> FunctionChoices:
    combines = () if entry else ("sum", "max")

    def place(type: TensorType) -> Placements:
        return rng.choice(legal_placements(type, mesh, combines))

    return FunctionChoices(
        splits=tuple(random_split(op, mesh, rng) for op in function.ops),
        params=tuple(place(value.type) for value in function.params),
        results=() if entry else tuple(place(value.type) for value in function.results),
    )


def parse_mesh(text: str, device: str = "cpu") -> Mesh:
    """`2x4` -> a mesh with axes x and y. Raises CompileError W0601."""
    sizes = text.split("x")
    if not all(size.isdecimal() and int(size) > 0 for size in sizes) or len(sizes) > len(_AXES):
        raise CompileError(
            "W0601", f"random-place: {text!r} is no mesh", hint="write its sizes as 2x2x2"
        )
    return Mesh(tuple((_AXES[i], int(size)) for i, size in enumerate(sizes)), device)


@dataclass(frozen=True)
class RandomPlace(Pass):
    """Random legal splits and placements, made explicit by reshards.

    Before:  %y = exp(%x) : f32[8, 4]
    After:   %x_r = reshard(%x) : f32[8, 4]{S(1)}
             %y = exp(%x_r) split [x = a1] : f32[8, 4]{S(1)}
    """

    seed: int = 0
    mesh: str = "2x2"

    name: ClassVar[str] = "random-place"
    summary: ClassVar[str] = "random legal placements, to test what comes after"
    levels: ClassVar[tuple[str, ...]] = ("logical",)

    def run(self, module: Module) -> Module:
        """The placed module. Raises CompileError."""
        mesh = parse_mesh(self.mesh)
        return apply(module, mesh, random_choices(module, mesh, Random(self.seed)))


__all__ = ["RandomPlace", "legal_split", "parse_mesh", "random_choices", "random_split"]
