"""Fuse: chains of pointwise and row-wise ops become kernel functions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from os.path import commonprefix

from ..ir.module import Function, Location, Module, Namer, Op, Value
from .base import Pass
from .products import attentions, join_products
from .regions import JOINS, Region, Regions, is_view, topological
from .space import parameters

#: a kernel's name holds at most this many op names, and as many parts of the module path
_NAME_OPS, _NAME_PATH = 4, 2


@dataclass(frozen=True)
class Fuse(Pass):
    """Chains of pointwise and row-wise ops become kernel functions that are called.

    before:  %g = silu(%a) : f32[8, 16]{S(0)} @1
             %y = mul(%g, %b) : f32[8, 16]{S(0)} @1
    after:   %y = call(%a, %b) {callee = "mlp_silu_mul"} : f32[8, 16]{S(0)} @1
             func @mlp_silu_mul(%a, %b) -> ... attrs {kernel = "mlp_silu_mul"} { ... return %y }

    A kernel function holds ops that share one iteration space (`passes/space.py`); which, says
    `passes/regions.py`. Its ops keep their types and splits, so the module means the same. Equal
    regions share one function. Optimizer updates stay apart unless `optimizers` is set, because
    `schedule` makes them run in place and the executor runs those of many parameters at once.
    On a GPU attention is a kernel: composed of ATen ops, it would write all scores. Products stay with
    the device's library unless `contractions` is set: then a product takes the region behind it as
    its epilogue (`passes/products.py`), and attention is a kernel on any device.
    """

    optimizers: bool = False
    contractions: bool = False

    name = "fuse"
    summary = "chains of pointwise and row-wise ops become kernel functions"
    levels = ("logical", "spmd")

    def run(self, module: Module) -> Module:
        return fuse(module, optimizers=self.optimizers, contractions=self.contractions)


def fuse(module: Module, *, optimizers: bool = False, contractions: bool = False) -> Module:
    """A module whose pointwise and row-wise chains are calls of kernel functions."""
    library = _Library(module)
    # on a GPU one op is worth a kernel too: launching a binary takes less than ATen's dispatcher
    alone = module.mesh is not None and module.mesh.device != "cpu"
    functions = [
        function if "kernel" in function.attrs
        else _rewrite(function, library, Regions(function, optimizers=optimizers, alone=alone),
                      contractions, contractions or alone)
        for function in module.functions
    ]  # fmt: skip
    return module.with_(functions=(*functions, *library.functions))


class _Library:
    """The kernel functions of a module: equal regions share one."""

    def __init__(self, module: Module) -> None:
        self.functions: list[Function] = []
        self._namer = Namer(tuple(function.name for function in module.functions))
        self._by_key: dict[object, str] = {}

    def callee(self, region: Region, params: Sequence[Value]) -> str:
        """The name of the kernel function of a region, made if there is none yet."""
        key = _key(region, params)
        if key not in self._by_key:
            name = self._namer(_kernel_name(region))
            self._by_key[key] = name
            self.functions.append(
                Function(name, tuple(params), region.ops, region.outputs, attrs={"kernel": name})
            )
        return self._by_key[key]


def _key(region: Region, params: Sequence[Value]) -> object:
    """Structure and types of a region, without names and locations."""
    number = {value.name: i for i, value in enumerate(params)}
    rows = []
    for op in region.ops:
        operands = tuple(number[value.name] for value in op.operands)
        for result in op.results:
            number[result.name] = len(number)
        types = tuple(result.type for result in op.results)
        attrs, split = tuple(sorted(op.attrs.items())), tuple(sorted(op.split.items()))
        # the repr tells 1 from 1.0 and from True, which compare as equal
        rows.append((op.name, operands, types, repr(attrs), split))
    return (
        tuple(value.type for value in params),
        tuple(rows),
        tuple(number[value.name] for value in region.outputs),
    )


def _common_path(ops: Sequence[Op]) -> str:
    paths = [op.loc.path.split(".") for op in ops if op.loc.path]
    return ".".join(commonprefix(paths)) if paths else ""  # works on lists of parts, too


def _kernel_name(region: Region) -> str:
    """Module path and ops: `layers_mlp_silu_mul`."""
    ops = [op for op in region.ops if not is_view(op)]
    parts = [part for part in _common_path(ops).split(".") if part and not part.isdigit()]
    words = [op.name for op in ops if op.name not in JOINS and op.name != "cast"]
    names = list(dict.fromkeys(words or [op.name for op in ops]))
    if len(names) > _NAME_OPS:
        names = [*names[: _NAME_OPS - 1], names[-1]]
    return re.sub(r"\W+", "_", "_".join((*parts[-_NAME_PATH:], *names)))


def _location(region: Region) -> Location:
    """The place of a region's last op, and the module path that its ops share."""
    last = next((op.loc for op in reversed(region.ops) if op.loc.file), region.ops[-1].loc)
    return replace(last, path=_common_path(region.ops) or last.path)


def _rewrite(
    function: Function, library: _Library, found: Regions, products: bool, attention: bool
) -> Function:
    regions = found.find()
    if products:
        regions = join_products(function, regions, found.readers)
    if attention:
        regions += attentions(function)
    if not regions:
        return function
    inside = {i for region in regions for i in region.members}
    nodes: list[tuple[int, Op]] = [(i, op) for i, op in enumerate(function.ops) if i not in inside]
    for region in regions:
        params = parameters(region.ops)
        attrs = {"callee": library.callee(region, params)}
        call = Op("call", tuple(params), region.outputs, attrs, loc=_location(region))
        nodes.append((region.members[-1], call))
    table = [
        (priority, [v.name for v in op.operands], [v.name for v in op.results])
        for priority, op in nodes
    ]
    ops = [nodes[n][1] for n in topological(table)]
    return function.with_(ops=_without_dead_views(function, ops))


def _without_dead_views(function: Function, ops: Sequence[Op]) -> tuple[Op, ...]:
    """Views that only kernels read were copied into them, and go."""
    live = {value.name for value in function.results}
    kept = []
    for op in reversed(ops):
        if is_view(op) and op.result.name not in live:
            continue
        live.update(value.name for value in op.operands)
        kept.append(op)
    return tuple(reversed(kept))
