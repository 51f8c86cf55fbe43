"""What an op is: one table entry with its doc, signature, attributes, verifier and semantics.

`ref` is the reference semantics. The IR never imports torch: `ref` receives a context that carries
it (`c.torch`), so an entry stays complete and a dump still opens without torch. The same `ref` runs
on whole tensors and on shards: where the position of a shard matters, it asks `c.offset(dim)`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any, Protocol

from .module import Attr, Op, Value
from .signature import Dim, DimMap, Shape, Signature, SignatureError, instantiate
from .types import FLOATS, Placement, TensorType

FAMILIES = (
    "contraction", "pointwise", "reduction", "row", "movement", "indexing", "creation", "random",
    "optimizer", "collective", "control", "opaque",
)  # fmt: skip


#: the operand dtypes of families whose ops do not say more: see `OpDef.dtypes`
DTYPE_RULES = {"contraction": "T", "pointwise": "T", "row": "F", "movement": "T", "random": "i",
               "optimizer": "f"}  # fmt: skip
_DTYPE_KINDS = {"f": "a float", "i": "an integer", "b": "bool"}


class Context(Protocol):
    """What a reference semantics may ask."""

    torch: Any  #: the torch module
    device: Any  #: where an op without operands creates its results
    fused: bool  #: whether a fused kernel of the device may be used
    attrs: Mapping[str, Attr]

    def offset(self, dim: str) -> int:
        """First global index of this rank's part of an iteration dim; 0 where it is not split."""

    def size(self, dim: str) -> int:
        """Global size of an iteration dim."""

    def shape(self, result: int = 0) -> tuple[int, ...]:
        """Local shape of a result."""

    def dtype(self, result: int = 0) -> Any:
        """torch dtype of a result."""

    def once(self, build: Callable[..., Any], *operands: Any) -> Any:
        """`build(self, *operands)` of the first call: for what depends on shapes only."""

    def index(self, tensor: int, device: Any = None) -> Any:
        """Global linear index (int64) of each element of this rank's part of result `tensor`."""


@dataclass(frozen=True, slots=True)
class AttrSpec:
    """An attribute: its kind (`int`, `float`, `bool`, `str`, `ints`, `any`) and default."""

    kind: str
    default: Attr | None = None  #: None: the attribute is required
    doc: str = ""


def attr_fits(kind: str, value: Attr) -> bool:
    """Is an attribute value of this kind? An int may stand for a float; a bool is no int."""
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    match kind:
        case "int":
            return number and isinstance(value, int)
        case "float":
            return number
        case "bool":
            return isinstance(value, bool)
        case "str":
            return isinstance(value, str)
        case "ints":
            return isinstance(value, tuple) and all(attr_fits("int", item) for item in value)
    return kind == "any"


SignatureFn = Callable[[Sequence[Shape], Sequence[Shape], Mapping[str, Attr]], Signature]
TypeRule = Callable[[Sequence[TensorType], Mapping[str, Attr]], Sequence[TensorType]]


@dataclass(frozen=True)
class OpDef:
    """One op. A field without a default must be given: a missing one fails at import.

    Attributes:
        name: the op's name in the text form.
        family: one of `FAMILIES`.
        doc: one sentence, shown in the IR reference.
        signature: a signature line, or a function of (operand shapes, result shapes, attrs) for
            ops whose line depends on their attributes or arity; None for ops without one
            (collectives, calls): those have rules of their own in the verifier.
        ref: reference semantics, `ref(context, *operands)` -> tensor or tuple of tensors.
        attrs: the attributes.
        linear: groups of operands in which the op is jointly linear.
        types: result types from operand types and attrs; None where the result type is given.
        lse_results: the results' placements after the fix-up that `lower` adds where a dim is
            combined by `lse`; empty for the ops that never need it.
        flops_per_point: floating-point operations per point of the iteration space.
        flops: the same for ops whose work is not proportional to their iteration space.
        dtypes: a letter for each operand: `f` is a float, `i` an integer, `b` a bool, `.` anything;
            equal capitals (`F` for floats, `T` for anything) are equal dtypes. The last letter also
            holds for further operands. Empty: the default of the family, `DTYPE_RULES`.
        verify: more checks, once shapes and dtypes fit; returns a reason, or ''.
        levels: the levels where the op may appear.
    """

    name: str
    family: str
    doc: str
    signature: str | SignatureFn | None
    ref: Callable[..., Any]
    attrs: Mapping[str, AttrSpec] = field(default_factory=dict)
    linear: tuple[tuple[int, ...], ...] = ()
    types: TypeRule | None = None
    lse_results: tuple[Placement, ...] = ()
    flops_per_point: float = 1.0
    flops: Callable[[Signature], float] | None = None
    dtypes: str = ""
    verify: Callable[[Op], str] | None = None
    levels: tuple[str, ...] = ("logical", "placed", "spmd", "schedule")

    def __post_init__(self) -> None:
        if self.family not in FAMILIES:
            raise ValueError(f"op {self.name}: unknown family {self.family}")
        if not self.doc or not self.name:
            raise ValueError(f"op {self.name!r}: a name and a doc are required")

    def wrong_dtypes(self, dtypes: Sequence[str]) -> str:
        """Why operands of these dtypes do not fit; empty when they do."""
        rule = self.dtypes or DTYPE_RULES.get(self.family, ".")
        known: dict[str, str] = {}
        for number, dtype in enumerate(dtypes):
            letter = rule[min(number, len(rule) - 1)]
            kind = "f" if dtype in FLOATS else "b" if dtype == "bool" else "i"
            wanted = letter.lower()
            if wanted in _DTYPE_KINDS and kind != wanted:
                return f"operand {number} is {dtype}, not {_DTYPE_KINDS[wanted]}"
            if letter.isupper() and known.setdefault(letter, dtype) != dtype:
                return f"operand {number} is {dtype}, an earlier one {known[letter]}"
        return ""

    def bind(
        self, ins: Sequence[Shape], outs: Sequence[Shape], attrs: Mapping[str, Attr]
    ) -> Signature:
        """The signature on given shapes. Raises SignatureError where they do not fit."""
        if self.signature is None:
            raise SignatureError(f"{self.name} has no signature")
        if callable(self.signature):
            return self.signature(ins, outs, attrs)
        return instantiate(self.signature, ins, outs, self.linear, self.lse_results)


OPS: dict[str, OpDef] = {}


def define(**fields: Any) -> OpDef:
    """Add an entry to the op table."""
    entry = OpDef(**fields)
    if entry.name in OPS:
        raise ValueError(f"op {entry.name} is defined twice")
    OPS[entry.name] = entry
    return entry


def full_attrs(name: str, attrs: Mapping[str, Attr]) -> dict[str, Attr]:
    """The attributes of an op called `name`, with the defaults of those that are not given."""
    specs = OPS[name].attrs
    defaults = {key: spec.default for key, spec in specs.items() if spec.default is not None}
    return {**defaults, **attrs}


def signature_of(op: Op) -> Signature:
    """The signature of an op on its (global) shapes and dtypes. Raises SignatureError, KeyError.

    Dtypes decide only where sums pass: not to or from bool, nor from floats to integers.
    """
    ins = tuple(value.type.shape for value in op.operands)
    outs = tuple(value.type.shape for value in op.results)
    kinds = "".join(map(_kind, (*op.operands, *op.results)))
    return _bind(op.name, ins, outs, tuple(sorted(op.attrs.items())), kinds)


def bytes_of(op: Op) -> int:
    """Bytes that an op moves on its global shapes: each operand read once, each result written."""
    return sum(value.type.bytes for value in (*op.operands, *op.results))


def flops_of(op: Op) -> float:
    """Floating-point operations of an op on its global shapes; 0 without a signature."""
    entry = OPS[op.name]
    if entry.signature is None:
        return 0.0
    signature = signature_of(op)
    if entry.flops is not None:
        return entry.flops(signature)
    return entry.flops_per_point * signature.points


@lru_cache(maxsize=65536)
def _bind(
    name: str,
    ins: tuple[Shape, ...],
    outs: tuple[Shape, ...],
    attrs: tuple[tuple[str, Attr], ...],
    kinds: str,
) -> Signature:
    signature = OPS[name].bind(ins, outs, full_attrs(name, dict(attrs)))
    linear = tuple(group for group in signature.linear if _sums_pass(group, kinds, len(ins)))
    return signature if linear == signature.linear else replace(signature, linear=linear)


def _kind(value: Value) -> str:
    dtype = value.type.dtype
    return "f" if dtype in FLOATS else "b" if dtype == "bool" else "i"


def _sums_pass(group: tuple[int, ...], kinds: str, operands: int) -> bool:
    """Is an op that is linear in real numbers linear in the dtypes at hand?"""
    before, after = {kinds[i] for i in group}, set(kinds[operands:])
    return "b" not in before | after and not ("f" in before and "i" in after)


def maps_signature(
    dims: Mapping[str, Dim],
    operands: Sequence[DimMap],
    results: Sequence[DimMap],
    linear: tuple[tuple[int, ...], ...] = (),
) -> Signature:
    """A signature given by its maps, for ops whose line depends on their attributes."""
    return Signature(dict(dims), tuple(operands), tuple(results), linear)
