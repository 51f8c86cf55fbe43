"""Which part of each value a micro-batch holds: the dimension algebra over time.

One function is walked in program order. The operands' placements decide an op's state: a dim of its
signature, `partial(...)`, or '' (the same in every micro-batch). No communication is possible, so
what does not fit has two ways out:

* a value that the inputs alone decide (a mask, a count of labels) is computed for the whole batch,
  once, before the loop: its ops are written again, on whole operands;
* an op that reads a sum over the batch, and no part of it, waits until all micro-batches have added
  to the sum: it is *late*, and belongs to the update.

What is the same for all micro-batches but has the batch in its shape (positions, expanded weights)
is written again as the part that its reader needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..ir.module import Attr, Function, Namer, Op, Value
from ..ir.opdef import OPS, signature_of
from ..ir.signature import Signature
from ..ir.types import DTYPES, B, P, Placement, S

#: parameters of the entry that can be known for the whole batch before a step
BEFORE = frozenset({"input", "seed", "lr", "buffer", "state"})


class Infeasible(Exception):
    """An op that cannot be computed in micro-batches."""

    def __init__(self, op: Op | None, reason: str) -> None:
        super().__init__(reason)
        self.op, self.reason = op, reason


class Flip(Exception):
    """A parameter of the function should be a part of the batch: walk again."""

    def __init__(self, index: int, dim: int) -> None:
        super().__init__(index, dim)
        self.index, self.dim = index, dim


class Mixed(Exception):
    """A function of which a part does not fit: inline its calls and walk again."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.name = name


@dataclass(frozen=True)
class Cut:
    """Where the batch is cut: micro-batch k begins at `starts[k]` of `batch`."""

    batch: int
    starts: tuple[int, ...]

    def divides(self, size: int) -> bool:
        """Is every cut between two elements of a dim of this size?"""
        return all(size * start % self.batch == 0 for start in self.starts)


@dataclass(frozen=True)
class Fit:
    """How an op is computed over time."""

    state: str
    operands: tuple[Placement, ...]
    results: tuple[Placement, ...]
    callee: str = ""


@dataclass
class Walked:
    """A function after its walk.

    Attributes:
        function: with the ops that were written again.
        held: the placement of each value.
        states: the state of each op.
        late: names of values that are known only after the last micro-batch.
    """

    function: Function
    held: dict[str, Placement]
    states: list[str]
    late: set[str]

    @property
    def results(self) -> tuple[Placement, ...]:
        """Placements of the results."""
        return tuple(self.held[value.name] for value in self.function.results)


#: (callee, placements of the operands) -> the callee's walk under its new name
Callees = Callable[[str, tuple[Placement, ...]], tuple[str, Walked]]


def major(factors: Sequence[str], signature: Signature) -> str:
    """The factor that a contiguous part of a tensor dim is a part of; '' for a broadcast dim."""
    large = [name for name in factors if signature.size(name) > 1]
    return (large or list(factors) or [""])[0]


class Walk:
    """Walks one function.

    Args:
        params: the placement of each parameter.
        callees: walks the functions that it calls.
        entry: is it the entry? Only there ops may be late, or computed for the whole batch.
    """

    def __init__(
        self,
        function: Function,
        params: Sequence[Placement],
        cut: Cut,
        callees: Callees,
        entry: bool = False,
    ) -> None:
        self.function, self.cut, self.callees, self.entry = function, cut, callees, entry
        self.held = {v.name: p for v, p in zip(function.params, params, strict=True)}
        self.index = {v.name: i for i, v in enumerate(function.params)}
        self.makers: dict[str, Op] = {}
        self.free: set[str] = set()
        if entry:
            roles = [str(attrs.get("role", "")) for attrs in function.param_attrs]
            pairs = zip(function.params, roles, strict=True)
            self.free.update(value.name for value, role in pairs if role in BEFORE)
        self.namer = Namer(
            (*self.held, *(value.name for op in function.ops for value in op.results))
        )
        self.late: set[str] = set()
        self.ops: list[Op] = []
        self.states: list[str] = []
        self.copies: dict[tuple[str, int], Value] = {}
        self.wholes: dict[str, Value] = {}
        self.extra: list[tuple[Value, Mapping[str, Attr]]] = []

    def run(self) -> Walked:
        """The walk. Raises Infeasible, Flip, Mixed."""
        for op in self.function.ops:
            self._step(op)
        function = self.function.with_(
            ops=tuple(self.ops),
            params=(*self.function.params, *(value for value, _ in self.extra)),
            param_attrs=(*self.function.param_attrs, *(attrs for _, attrs in self.extra)),
        )
        return Walked(function, self.held, self.states, self.late)

    def _emit(self, op: Op, fit: Fit) -> None:
        if fit.callee:
            op = op.with_(attrs={**op.attrs, "callee": fit.callee})
        self.ops.append(op)
        self.states.append(fit.state)
        for value, placement in zip(op.results, fit.results, strict=True):
            self.held[value.name] = placement
            self.makers[value.name] = op
            if all(operand.name in self.free for operand in op.operands):
                self.free.add(value.name)

    def _step(self, op: Op) -> None:
        if any(value.name in self.late for value in op.operands):
            self._defer(op, "")
            return
        fit = self._fit(op, op.operands)
        if isinstance(fit, str) and self.entry:
            reason = fit
            for kinds in ("P", "SP"):
                operands = tuple(self._known_before(value, kinds) for value in op.operands)
                if isinstance(fit, str) and operands != op.operands:
                    fit = self._fit(op, operands)
                    op = op if isinstance(fit, str) else op.with_(operands=operands)
            if isinstance(fit, str):
                if any(self.held[value.name].kind == "S" for value in op.operands):
                    if op.name == "call":
                        raise Mixed(str(op.attrs["callee"]))
                    raise Infeasible(op, reason)
                self._defer(op, reason)
                return
        if isinstance(fit, str):
            raise Mixed(self.function.name)
        if self.entry and self._better_late(op, fit):
            self._defer(op, "")
            return
        wanted = zip(op.operands, fit.operands, strict=True)
        operands = tuple(
            self._part(value, placement.dim, op)
            if placement.kind == "S" and self.held[value.name] == B
            else value
            for value, placement in wanted
        )
        self._emit(op.with_(operands=operands), fit)

    def _better_late(self, op: Op, fit: Fit) -> bool:
        """Would an op on partial sums only make what is added up larger, or less exact?"""
        terms = [v.type for v in op.operands if self.held[v.name].kind == "P"]
        if not terms or op.name == "call":
            return False
        widest = max(DTYPES[type.dtype] for type in terms)
        results = [value.type for value in op.results]
        if any(DTYPES[type.dtype] < widest for type in results):
            return True
        if any(DTYPES[type.dtype] > widest for type in results):
            return False
        return sum(t.bytes for t in results) > sum(t.bytes for t in terms)

    def _defer(self, op: Op, reason: str) -> None:
        """Compute an op once, behind the last micro-batch."""
        if not self.entry:
            raise Mixed(self.function.name)
        operands = tuple(
            self._known_before(value, "S") if value.name not in self.late else value
            for value in op.operands
        )
        for value in operands:
            if self.held[value.name].kind == "S":
                raise Infeasible(op, reason or (
                    f"it reads {value}, a part of the batch, and a value that is known only when "
                    "all of the batch was computed"))  # fmt: skip
        fit = self._whole_fit(op)
        self._emit(op.with_(operands=operands), fit)
        self.late.update(value.name for value in op.results)
        self.free.difference_update(value.name for value in op.results)

    def _whole_fit(self, op: Op) -> Fit:
        ins, outs = (B,) * len(op.operands), (B,) * len(op.results)
        callee = self.callees(str(op.attrs["callee"]), ins)[0] if op.name == "call" else ""
        return Fit("", ins, outs, callee)

    # -- states ---------------------------------------------------------------------------------

    def _fit(self, op: Op, operands: Sequence[Value]) -> Fit | str:
        """How an op is computed on operands as they are held, or why it cannot."""
        held = tuple(self.held[value.name] for value in operands)
        if op.name == "call":
            return self._fit_call(op, held)
        if all(placement == B for placement in held):
            return Fit("", held, (B,) * len(op.results))
        if OPS[op.name].signature is None:
            return f"{op.name} works on the whole batch: weft does not know its dims"
        signature = signature_of(op)
        terms = [i for i, placement in enumerate(held) if placement.kind == "P"]
        if any(placement.kind == "S" for placement in held):
            if terms:
                return (f"{operands[terms[0]]} is decided by all of the batch, and needed for each "
                        "part of it")  # fmt: skip
            return self._fit_dim(signature, held)
        state = f"partial({', '.join(map(str, terms))})"
        if any(held[i].combine != "sum" for i in terms) or state not in signature.states:
            return f"{op.name} cannot be computed term by term of a sum over the batch"
        return Fit(state, held, (P(),) * len(op.results))

    def _fit_dim(self, signature: Signature, held: Sequence[Placement]) -> Fit | str:
        names = {
            major(factors[placement.dim], signature)
            for factors, placement in zip(signature.operands, held, strict=True)
            if placement.kind == "S"
        }
        if len(names) > 1:
            return f"the batch is two of its dims at once, {' and '.join(sorted(names))}"
        (name,) = names
        reason = self._uncut(signature, name)
        if reason:
            return reason
        ins, outs = signature.placements((name,))
        for tensor, placement, wanted in zip(signature.operands, held, ins, strict=True):
            if placement.kind == "S" and placement != wanted[0]:
                return f"dim {placement.dim} of an operand is the batch, and so is {wanted[0]}"
            if wanted[0].kind == "S" and major(tensor[wanted[0].dim], signature) != name:
                return f"the batch is not the major factor of dim {wanted[0].dim}"
        return Fit(name, tuple(p[0] for p in ins), tuple(p[0] for p in outs))

    def _uncut(self, signature: Signature, name: str) -> str:
        """Why an iteration dim cannot be cut over time; empty when it can."""
        if not name:
            return "the batch is broadcast"
        reason = signature.illegal(name, 1)
        if reason:
            return reason
        if signature.dims[name].combine == "lse":
            return f"dim {name} is a log-sum-exp over the batch"
        if not self.cut.divides(signature.size(name)):
            return f"dim {name} of size {signature.size(name)} cannot be cut where the batch is"
        return ""

    def _fit_call(self, op: Op, held: tuple[Placement, ...]) -> Fit | str:
        while True:
            try:
                name, walked = self.callees(str(op.attrs["callee"]), held)
            except Flip as flip:
                if held[flip.index] != B:
                    return "it needs a value both whole and in parts"
                held = (*held[: flip.index], S(flip.dim), *held[flip.index + 1 :])
            except (Mixed, Infeasible) as error:
                return str(error)
            else:
                return Fit("", held, walked.results, name)

    # -- values written again -------------------------------------------------------------------

    def _known_before(self, value: Value, kinds: str) -> Value:
        """A value for the whole batch where inputs alone decide it; others as they are."""
        if self.held[value.name].kind not in kinds or value.name not in self.free:
            return value
        return self._whole(value)

    def _whole(self, value: Value) -> Value:
        """A value for the whole batch, computed before the loop."""
        if self.held[value.name] == B or value.name in self.wholes:
            return self.wholes.get(value.name, value)
        if value.name in self.index:
            return self._whole_param(value)
        op = self.makers[value.name]
        operands = tuple(self._whole(operand) for operand in op.operands)
        results = tuple(Value(self.namer(f"{v.name}_whole"), v.type) for v in op.results)
        copy = op.with_(operands=operands, results=results)
        if op.name == "call":
            copy = copy.with_(attrs={**op.attrs, "callee": self._original(op)})
        self._emit(copy, self._whole_fit(copy))
        for old, new in zip(op.results, results, strict=True):
            self.wholes[old.name] = new
        return self.wholes[value.name]

    def _whole_param(self, value: Value) -> Value:
        """Another parameter of the entry that is the whole of an input."""
        attrs = self.function.param_attrs[self.index[value.name]]
        whole = Value(self.namer(f"{value.name}_whole"), value.type)
        self.extra.append((whole, attrs))
        self.held[whole.name] = B
        self.free.add(whole.name)
        self.wholes[value.name] = whole
        return whole

    def _original(self, op: Op) -> str:
        return str(op.attrs["callee"]).partition("#")[0]

    def _part(self, value: Value, dim: int, reader: Op) -> Value:
        """The part of a value that is the same in all micro-batches but has the batch in `dim`."""
        key = value.name, dim
        if key in self.copies:
            return self.copies[key]
        if value.name in self.index:
            if not self.cut.divides(value.type.shape[dim]):
                raise Infeasible(reader, f"dim {dim} of {value} cannot be cut where the batch is")
            raise Flip(self.index[value.name], dim)
        op = self.makers[value.name]
        if op.name == "call":
            raise Mixed(self._original(op))
        if OPS[op.name].signature is None:
            raise Infeasible(reader, f"it needs a part of {value}, which {op.name} gives as a whole")
        signature = signature_of(op)
        number = [v.name for v in op.results].index(value.name)
        name = major(signature.results[number][dim], signature)
        reason = self._uncut(signature, name)
        if reason:
            raise Infeasible(reader, f"it needs a part of {value}: {reason}")
        ins, outs = signature.placements((name,))
        operands = tuple(
            self._part(v, wanted[0].dim, reader) if wanted[0].kind == "S" else v
            for v, wanted in zip(op.operands, ins, strict=True)
        )
        results = tuple(Value(self.namer(f"{v.name}_part"), v.type) for v in op.results)
        fit = Fit(name, tuple(p[0] for p in ins), tuple(p[0] for p in outs))
        self._emit(op.with_(operands=operands, results=results), fit)
        self.copies[key] = results[number]
        return results[number]


__all__ = ["BEFORE", "Callees", "Cut", "Fit", "Flip", "Infeasible", "Mixed", "Walk", "Walked", "major"]

