"""Numerical equivalence of the dumps of a plan, in one process: `weft verify`.

Every dump is run by the reference interpreter on the same random inputs, in float64, so that a
difference means another program and not another rounding. Dumps whose entries have the same
interface (forward-only dumps, and train-step dumps) are compared with the first of their kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ir.module import Attr, Function, Module, Op, Value
from ..ir.types import TensorType
from ..runtime.context import TORCH_DTYPES
from ..runtime.interpreter import evaluate

#: dtypes that are computed in float64
_WIDENED = frozenset({"f32", "f16", "bf16"})
#: float64 rounding over a train step; measured differences are below 1e-10
TOLERANCE = 1e-7


def widen(module: Module) -> Module:
    """The same program in float64: each f32, f16 and bf16 type becomes f64."""
    cache: dict[Value, Value] = {}

    def value(v: Value) -> Value:
        if v not in cache:
            wide = v.type.dtype in _WIDENED
            cache[v] = Value(v.name, replace(v.type, dtype="f64")) if wide else v
        return cache[v]

    def op(o: Op) -> Op:
        return o.with_(operands=tuple(map(value, o.operands)), results=tuple(map(value, o.results)))

    def function(f: Function) -> Function:
        return f.with_(
            params=tuple(map(value, f.params)),
            ops=tuple(map(op, f.ops)),
            results=tuple(map(value, f.results)),
        )

    return module.with_(functions=tuple(map(function, module.functions)))


def random_inputs(module: Module, given: Mapping[str, Tensor], seed: int = 0) -> tuple[Tensor, ...]:
    """A tensor for each entry parameter: `given` by name where there, else random.

    Integer inputs that are not given are small non-negative numbers (0 and 1), which are valid
    indices almost everywhere.
    """
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        _random(value.type, attrs, given, generator)
        for value, attrs in zip(module.entry.params, module.entry.param_attrs, strict=True)
    )


def _random(
    type: TensorType,
    attrs: Mapping[str, Attr],
    given: Mapping[str, Tensor],
    generator: torch.Generator,
) -> Tensor:
    role, name = str(attrs.get("role", "")), str(attrs.get("name", ""))
    dtype = torch.float64 if type.dtype in _WIDENED else TORCH_DTYPES[type.dtype]
    if name in given and tuple(given[name].shape) == type.shape:
        return given[name].to(dtype)
    if role == "seed":
        return torch.tensor(1234, dtype=dtype)
    if role == "lr":
        return torch.tensor(1e-3, dtype=dtype)
    if role == "state" and not type.shape:
        return torch.tensor(3.0, dtype=dtype)
    if not dtype.is_floating_point:
        return torch.randint(0, 2, type.shape, generator=generator).to(dtype)
    noise = torch.randn(type.shape, generator=generator, dtype=torch.float64)
    if role == "state":  # second moments are never negative
        return (noise * 0.1).abs().to(dtype)
    return (noise * 0.1).to(dtype)


def interface(module: Module) -> tuple[str, ...]:
    """What identifies an entry's meaning: roles and names of its results and of its parameters."""
    results = [f"{a.get('role', '')}" for a in module.entry.result_attrs]
    params = [f"{a.get('role', '')}:{a.get('name', '')}" for a in module.entry.param_attrs]
    return (*params, "->", *results)


def difference(expected: Sequence[Tensor], actual: Sequence[Tensor]) -> float:
    """The largest relative error: per tensor, the largest difference over the largest value."""
    worst = 0.0
    for a, b in zip(expected, actual, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel() == 0:
            continue
        wide, other = a.to(torch.float64), b.to(torch.float64)
        if not torch.equal(wide.isnan(), other.isnan()):
            return float("inf")
        gap = torch.where(wide == other, 0.0, (wide - other).abs()).nan_to_num(0.0).max().item()
        worst = max(worst, gap / max(wide.nan_to_num(0.0).abs().max().item(), 1e-12))
    return worst


@dataclass(frozen=True)
class Check:
    """One dump against the first of its kind; the first itself has `against` empty."""

    name: str
    level: str
    against: str
    error: float

    @property
    def holds(self) -> bool:
        """Is it the same program?"""
        return self.error <= TOLERANCE


def verify_dumps(
    dumps: Sequence[tuple[str, Module]], given: Mapping[str, Tensor], seed: int = 0
) -> Iterator[Check]:
    """Compare all dumps; yields one row each, as soon as it is known."""
    known: dict[tuple[str, ...], tuple[str, list[Tensor], tuple[Tensor, ...]]] = {}
    for name, module in dumps:
        key = interface(module)
        wide = widen(module)
        if key not in known:
            inputs = random_inputs(module, given, seed)
            known[key] = (name, evaluate(wide, inputs), inputs)
            yield Check(name, module.level, "", 0.0)
            continue
        first, expected, inputs = known[key]
        yield Check(name, module.level, first, difference(expected, evaluate(wide, inputs)))
