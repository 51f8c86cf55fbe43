"""The fix-up behind ops whose split combines by log-sum-exp.

Where an axis splits a dim that combines by `lse`, each rank sees part of a row. Let
l_r be the log-sum-exp of rank r's part, and L = log(sum over r of exp(l_r)), which is what the
collective `lse_combine` computes. Then

    attention       out = sum over r of out_r * exp(l_r - L)
    logsumexp       L itself
    cross_entropy   loss = sum over r of loss_r + L, where loss_r = -logit[label] on the rank that
                    has the label and 0 on the others; L is added on one rank, 0 in ignored rows

    %o, %l = attention(%q, %k, %v) split [tp = t] : f32[b, h, s, d]{P(sum)}, f32[b, h, s]{B}
becomes
    %o_0, %l_0 = attention(%q, %k, %v) split [tp = t] : f32[b, h, s, d]{P(sum)}, f32[b, h, s]{B}
    %l = lse_combine(%l_0) {axis = "tp"} : f32[b, h, s]{B}
    ...
    %o = mul(%o_0, %scale) split [tp = partial(0)] : f32[b, h, s, d]{P(sum)}

**Types.** The op that is split keeps the types that its signature derives (`lse_results` on the
axis), and so do the ops of the fix-up: every placed rule holds at the spmd level too. What types do
not say is that `%l_0` holds one term per rank, although it is typed B on the axis: only
`lse_combine` over that axis, and the fix-up's `sub`, may read it. Likewise `%o_0` is a P(sum) whose
terms still lack a factor or a term: only the fix-up's `cast`, `mul` or `add` may read it. An axis
of one rank splits nothing and needs no fix-up. Milakov and Gimelshein, 2018; Dao et al., 2022.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from ..ir.errors import CompileError
from ..ir.module import Attr, Namer, Op, Value
from ..ir.opdef import full_attrs, signature_of
from ..ir.types import B, Mesh, P, Placement, TensorType
from .reshard import Placements

#: lowest finite number of a dtype: l - max(L, lowest) is -inf, not NaN, where nothing is seen
_LOWEST = {"f64": -1.7e308, "f32": -3.4e38, "bf16": -3.3e38, "f16": -65504.0}


def lse_axes(op: Op, mesh: Mesh) -> tuple[str, ...]:
    """The axes, of more than one rank, over which an op splits a dim that combines by `lse`."""
    if op.name not in FIXES or not op.split:
        return ()
    dims = signature_of(op).dims
    return tuple(
        name for name, size in mesh.axes
        if size > 1 and op.split.get(name) in dims and dims[op.split[name]].combine == "lse"
    )  # fmt: skip


def placement_of(value: Value) -> Placements:
    """The placement of a value. Raises CompileError W0203 where it has none."""
    if value.type.placement is None:
        raise CompileError("W0203", f"{value} has no placement", hint="run `apply` before `lower`")
    return value.type.placement


class Fixer:
    """Emits the ops behind one op whose split combines by log-sum-exp.

    Args:
        op: the op, and `axes`, its log-sum-exp axes of more than one rank.
        ops: the list to append to.
    """

    def __init__(
        self, op: Op, axes: tuple[str, ...], mesh: Mesh, namer: Namer, ops: list[Op]
    ) -> None:
        self.op, self.axes, self.mesh, self.namer, self.ops = op, axes, mesh, namer, ops

    def local(self) -> tuple[Value, ...]:
        """Emit the op itself under other names; its results are what each rank computes."""
        results = tuple(
            Value(self.namer(f"{value.name}_local"), value.type) for value in self.op.results
        )
        self.ops.append(self.op.with_(results=results))
        return results

    def emit(
        self,
        name: str,
        operands: Sequence[Value],
        type: TensorType,
        attrs: Mapping[str, Attr] | None = None,
        into: Value | None = None,
    ) -> Value:
        """Append an op with a signature, split as its operands' placements ask for.

        Args:
            type: dtype and shape of the result.
            into: the value that the op defines, a fresh one if absent.
        """
        bare = Op(name, tuple(operands), (Value("", type.placed(None)),), dict(attrs or {}))
        signature = signature_of(bare)
        states = []
        for axis in range(len(self.mesh.axes)):
            wanted = tuple((placement_of(value)[axis],) for value in operands)
            states.append(
                ""
                if all(p == (B,) for p in wanted)
                else next(s for s in signature.states if signature.placements((s,))[0] == wanted)
            )
        _, (placement,) = signature.placements(states)
        value = into or Value(self.fresh(), type.placed(placement))
        split = {n: s for n, s in zip(self.mesh.names, states, strict=True) if s}
        self.ops.append(bare.with_(results=(value,), split=split, loc=self.op.loc))
        return value

    def collective(
        self,
        name: str,
        operand: Value,
        attrs: Mapping[str, Attr],
        placement: Placements,
        into: Value | None = None,
    ) -> Value:
        """Append a collective or local placement change."""
        value = into or Value(self.fresh(), operand.type.placed(placement))
        self.ops.append(Op(name, (operand,), (value,), attrs, loc=self.op.loc))
        return value

    def changed(self, value: Value, axis: str, entry: Placement) -> Placements:
        """The placement of a value with another entry for one axis."""
        position = self.mesh.axis(axis)
        held = placement_of(value)
        return (*held[:position], entry, *held[position + 1 :])

    def partial(self, value: Value, axes: Sequence[str], into: Value | None = None) -> Value:
        """The value on one rank, zeros on the others of each axis; axes is not empty."""
        for axis in axes:
            last = into if axis == axes[-1] else None
            after = self.changed(value, axis, P("sum"))
            attrs: dict[str, Attr] = {"axis": axis, "combine": "sum"}
            value = self.collective("partial", value, attrs, after, last)
        return value

    def fresh(self) -> str:
        """A new name, after the op's first result."""
        return self.namer(f"{self.op.results[0].name}_fix")

    def scalar(self, value: float, dtype: str) -> Value:
        """A number as a tensor without dims."""
        return self.emit("constant", (), TensorType(dtype, ()), {"value": value})

    def total(self, lse: Value, into: Value) -> Value:
        """The log-sum-exp over all axes, as the value `into`."""
        for axis in self.axes[:-1]:
            lse = self.collective("lse_combine", lse, {"axis": axis}, placement_of(lse))
        self.ops.append(
            Op("lse_combine", (lse,), (into,), {"axis": self.axes[-1]}, loc=self.op.loc)
        )
        return into


def _fix_attention(fix: Fixer) -> None:
    """out_r * exp(l_r - L), in the dtype of the log-sum-exp; 0 where no rank sees anything."""
    out, lse = fix.op.results
    local_out, local_lse = fix.local()
    total = fix.total(local_lse, lse)
    finite = fix.emit("maximum", (total, fix.scalar(_LOWEST[lse.type.dtype], lse.type.dtype)),
                      lse.type)  # fmt: skip
    scale = fix.emit("exp", (fix.emit("sub", (local_lse, finite), lse.type),), lse.type)
    column = TensorType(lse.type.dtype, (*lse.type.shape, 1))
    scale = fix.emit("reshape", (scale,), column)
    if out.type.dtype == lse.type.dtype:
        fix.emit("mul", (local_out, scale), out.type, into=out)
        return
    wide = TensorType(lse.type.dtype, out.type.shape)
    product = fix.emit("mul", (fix.emit("cast", (local_out,), wide), scale), wide)
    fix.emit("cast", (product,), out.type, into=out)


def _fix_logsumexp(fix: Fixer) -> None:
    (local,) = fix.local()
    fix.total(local, fix.op.result)


def _fix_cross_entropy(fix: Fixer) -> None:
    """Add L to the terms, on one rank, in the rows that are not ignored."""
    loss, lse = fix.op.results
    labels = fix.op.operands[1]
    local_loss, local_lse = fix.local()
    total = fix.total(local_lse, lse)
    ignore = full_attrs(fix.op.name, fix.op.attrs)["ignore_index"]
    assert isinstance(ignore, int)
    code = fix.scalar(ignore, labels.type.dtype)
    counts = fix.emit("ne", (labels, code), TensorType("bool", labels.type.shape))
    wide = TensorType(lse.type.dtype, loss.type.shape)
    term = fix.emit("where", (counts, total, fix.scalar(0.0, wide.dtype)), wide)
    # axes of one rank are partial as well
    axes = [
        axis
        for axis, entry in zip(fix.mesh.names, placement_of(loss), strict=True)
        if entry == P("sum")
    ]
    term = fix.partial(term, axes)
    if loss.type.dtype == wide.dtype:
        fix.emit("add", (local_loss, term), wide, into=loss)
        return
    # the terms are far larger than their sum: rounded one by one, they would lose it
    terms = fix.emit("add", (fix.emit("cast", (local_loss,), wide), term), wide)
    for axis in axes:
        after = fix.changed(terms, axis, B)
        terms = fix.collective("all_reduce", terms, {"axis": axis, "combine": "sum"}, after)
    fix.partial(fix.emit("cast", (terms,), loss.type), axes, into=loss)


#: op -> its fix-up
FIXES: dict[str, Callable[[Fixer], None]] = {
    "attention": _fix_attention,
    "logsumexp": _fix_logsumexp,
    "cross_entropy": _fix_cross_entropy,
}

__all__ = ["FIXES", "Fixer", "lse_axes", "placement_of"]
