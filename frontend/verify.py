"""Numerical equivalence of the dumps of a plan, in one process: `weft verify`.

Every dump is run by the reference interpreter on the same random inputs, in float64, so that a
difference means another program and not another rounding. Dumps whose entries have the same
interface are compared with the first of their kind. A dump before differentiation, whose gradients
are still marks, is evaluated with torch's autograd in their place, and what the dumps after it
compute is compared with that.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..ir.module import Attr, Function, Module, Op, Value
from ..ir.types import TensorType
from ..runtime.context import TORCH_DTYPES
from ..runtime.interpreter import evaluate, run_function
from ..runtime.lockstep_stages import evaluate_stages, whole_name

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
    return tuple(
        _random(value.type, attrs, given, _generator(seed, attrs))
        for value, attrs in zip(module.entry.params, module.entry.param_attrs, strict=True)
    )


def _generator(seed: int, attrs: Mapping[str, Attr]) -> torch.Generator:
    """One generator for each parameter, by its name: dumps with others around it agree."""
    name = f"{attrs.get('role', '')} {attrs.get('name', '')}"
    return torch.Generator().manual_seed(zlib.crc32(name.encode()) ^ seed)


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


def evaluate_marked(module: Module, inputs: Sequence[Tensor]) -> list[Tensor]:
    """Evaluate an entry whose gradients are marks, with torch's autograd in their place.

    A result of role `backward` is a loss, a parameter of role `grad` the gradient of the parameter
    `name` of loss `of`; see `frontend/differentiate.py`. Marks among the inputs are ignored.
    """
    entry = module.entry
    roles = [str(attrs.get("role", "")) for attrs in entry.param_attrs]
    place = {str(a.get("name")): i for i, a in enumerate(entry.param_attrs) if roles[i] != "grad"}
    marks = [i for i, role in enumerate(roles) if role == "grad"]
    wanted = {place[str(entry.param_attrs[i]["name"])] for i in marks}
    tensors = [t.detach().requires_grad_(i in wanted) for i, t in enumerate(inputs)]
    with torch.enable_grad():
        results = run_function(module, entry, tensors)
    losses = {
        attrs["of"]: value
        for value, attrs in zip(results, entry.result_attrs, strict=True)
        if attrs.get("role") == "backward"
    }
    filled = list(inputs)
    for number, loss in losses.items():
        of = [i for i in marks if entry.param_attrs[i]["of"] == number]
        xs = [tensors[place[str(entry.param_attrs[i]["name"])]] for i in of]
        grads = torch.autograd.grad(loss, xs, retain_graph=True, allow_unused=True)
        for i, x, grad in zip(of, xs, grads, strict=True):
            filled[i] = torch.zeros_like(x) if grad is None else grad
    return evaluate(module, filled)


def _named(module: Module, values: Sequence[Tensor]) -> dict[str, Tensor]:
    """Results by what they are: `loss`, `output 0`, `update NAME`."""
    out: dict[str, Tensor] = {}
    for value, attrs in zip(values, module.entry.result_attrs, strict=True):
        role = str(attrs.get("role", ""))
        if role == "update":
            out[f"update {attrs['updates']}"] = value
        elif role != "backward":
            out[f"{role} {sum(name.startswith(role) for name in out)}"] = value
    return out


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
    known: dict[tuple[str, ...], tuple[str, dict[str, Tensor], tuple[Tensor, ...]]] = {}
    marked: tuple[str, dict[str, Tensor]] | None = None
    whole: tuple[str, Module, tuple[Tensor, ...]] | None = None
    stages: list[Module] = []
    for name, module in dumps:
        key, wide = interface(module), widen(module)
        if "stages" in module.attrs:
            stages.append(wide)
            assert whole is not None
            if len(stages) == module.attrs["stages"]:
                yield Check(name, module.level, whole[0], _staged_difference(stages, *whole[1:]))
            continue
        part = "part" in module.attrs  # of the program: it is compared with itself at other levels
        has_marks = any(a.get("role") == "backward" for a in module.entry.result_attrs)
        run = evaluate_marked if has_marks else evaluate
        if key in known:
            first, expected, inputs = known[key]
            actual = _named(module, run(wide, inputs))
            yield Check(name, module.level, first, _difference(expected, actual))
            continue
        inputs = random_inputs(module, given, seed)
        if not part:
            whole = name, wide, inputs
        values = _named(module, run(wide, inputs))
        known[key] = name, values, inputs
        if marked is not None and not part:
            yield Check(name, module.level, marked[0], _difference(marked[1], values))
            continue
        if has_marks:
            marked = name, values
        yield Check(name, module.level, "", 0.0)


def _staged_difference(
    stages: Sequence[Module], whole: Module, inputs: Sequence[Tensor]
) -> float:
    """The largest relative error of all stages together against the whole program."""
    entry = whole.entry
    names = {v.name: whole_name(a) for v, a in zip(entry.params, entry.param_attrs, strict=True)}
    given = {names[v.name]: t for v, t in zip(entry.params, inputs, strict=True)}
    results, updates = evaluate_stages(stages, given)
    actual = [
        updates[names[str(attrs["updates"])]] if "updates" in attrs else results[number]
        for number, attrs in enumerate(entry.result_attrs)
    ]
    return difference(evaluate(whole, inputs), actual)


def _difference(expected: Mapping[str, Tensor], actual: Mapping[str, Tensor]) -> float:
    """The largest relative error over what both compute; another set of results is infinite.

    A parameter that the loss does not depend on is not updated after differentiation.
    """
    if not set(actual) <= set(expected) or not actual:
        return float("inf")
    return difference([expected[name] for name in actual], list(actual.values()))
