"""Placed to spmd: reshards become collectives, and log-sum-exp splits get their fix-up.

    %y = einsum(%x, %w) {...} split [tp = k] : f32[8, 4]{P(sum)}
    %r = reshard(%y) : f32[8, 4]{B}
becomes
    %y = einsum(%x, %w) {...} split [tp = k] : f32[8, 4]{P(sum)}
    %r = all_reduce(%y) {axis = "tp", combine = "sum"} : f32[8, 4]{B}

Reshards of one value share their steps: each placement on the way is a copy that later reshards may
start from, the planner takes the cheapest start.

Log-sum-exp. Where an axis splits a dim that combines by `lse`, each rank sees part of a row. Let
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
from dataclasses import dataclass
from typing import ClassVar

from ..costmodel.cluster import parse_cluster
from ..costmodel.collectives import collective_cost
from ..ir.errors import CompileError
from ..ir.module import Attr, Function, Module, Namer, Op, Value
from ..ir.opdef import full_attrs, signature_of
from ..ir.types import B, Mesh, P, TensorType
from .base import Pass
from .reshard import Placements, StepCost, default_cost, plan_from

#: lowest finite number of a dtype: l - max(L, lowest) is -inf, not NaN, where nothing is seen
_LOWEST = {"f64": -1.7e308, "f32": -3.4e38, "bf16": -3.3e38, "f16": -65504.0}


def lse_axes(op: Op, mesh: Mesh) -> tuple[str, ...]:
    """The axes, of more than one rank, over which an op splits a dim that combines by `lse`."""
    if op.name not in _FIXES or not op.split:
        return ()
    dims = signature_of(op).dims
    return tuple(
        name for name, size in mesh.axes
        if size > 1 and op.split.get(name) in dims and dims[op.split[name]].combine == "lse"
    )  # fmt: skip


def lower(module: Module, cost: StepCost | None = None) -> Module:
    """The spmd module of a placed one. Raises CompileError.

    Args:
        cost: times of collectives; by default those of the module's `cluster` attribute.
    """
    mesh = module.mesh or Mesh()
    step_cost = cost or module_cost(module)
    functions = tuple(_Lowering(f, mesh, step_cost).run() for f in module.functions)
    return module.with_(level="spmd", functions=functions)


def module_cost(module: Module) -> StepCost:
    """The collectives' cost on the module's cluster, or on one host of GPUs where none is named."""
    text = module.attrs.get("cluster")
    if not isinstance(text, str) or module.mesh is None:
        return default_cost
    cluster = parse_cluster(text)
    # a mesh of another size was put on by hand: the links of its axes are not known
    return (
        collective_cost(cluster, module.mesh) if cluster.ranks == module.mesh.size else default_cost
    )


@dataclass(frozen=True)
class Lower(Pass):
    """Reshards become collectives, log-sum-exp splits get their fix-up: see `passes/lower.py`.

    Before:  %r = reshard(%y) : f32[8, 4]{B}
    After:   %r = all_reduce(%y) {axis = "tp", combine = "sum"} : f32[8, 4]{B}
    """

    name: ClassVar[str] = "lower"
    summary: ClassVar[str] = "turn reshards into the cheapest collectives"
    levels: ClassVar[tuple[str, ...]] = ("placed",)

    def run(self, module: Module) -> Module:
        """The spmd module. Raises CompileError."""
        return lower(module)


class _Lowering:
    """Lowers one function."""

    def __init__(self, function: Function, mesh: Mesh, cost: StepCost) -> None:
        self.function, self.mesh, self.cost = function, mesh, cost
        taken = [p.name for p in function.params]
        taken += [result.name for op in function.ops for result in op.results]
        self.namer = Namer(tuple(taken))
        self.ops: list[Op] = []
        #: value -> the value it was resharded from, and that value's copies by placement
        self.origin: dict[str, str] = {}
        self.copies: dict[str, dict[Placements, Value]] = {}
        self.renamed: dict[str, Value] = {}

    def run(self) -> Function:
        """The lowered function."""
        for op in self.function.ops:
            operands = tuple(self.renamed.get(v.name, v) for v in op.operands)
            op = op.with_(operands=operands)
            axes = lse_axes(op, self.mesh)
            if op.name == "reshard":
                self._reshard(op)
            elif axes:
                _FIXES[op.name](_Fixer(self, op, axes))
            else:
                self.ops.append(op)
        results = tuple(self.renamed.get(v.name, v) for v in self.function.results)
        return self.function.with_(ops=tuple(self.ops), results=results)

    def _reshard(self, op: Op) -> None:
        """Emit the cheapest steps from any copy at hand; readers then use where they end."""
        (held,) = op.operands
        root = self.origin.get(held.name, held.name)
        copies = self.copies.setdefault(root, {_placement(held): held})
        target = _placement(op.result)
        start, steps, _ = plan_from(held.type, self.mesh, tuple(copies), target, self.cost)
        current = list(copies.values())[start]
        for number, step in enumerate(steps, start=1):
            last = number == len(steps)
            name = op.result.name if last else self.namer(f"{op.result.name}_s")
            value = Value(name, held.type.placed(step.placement))
            self.ops.append(Op(step.op, (current,), (value,), step.attrs, loc=op.loc))
            copies[step.placement] = current = value
            self.origin[name] = root
        self.renamed[op.result.name] = current


def _placement(value: Value) -> Placements:
    if value.type.placement is None:
        raise CompileError("W0203", f"{value} has no placement", hint="run `apply` before `lower`")
    return value.type.placement


class _Fixer:
    """Emits the ops behind one op whose split combines by log-sum-exp."""

    def __init__(self, lowering: _Lowering, op: Op, axes: tuple[str, ...]) -> None:
        self.lowering, self.op, self.axes = lowering, op, axes
        self.mesh = lowering.mesh

    def local(self) -> tuple[Value, ...]:
        """Emit the op itself under other names; its results are what each rank computes."""
        results = tuple(
            Value(self.lowering.namer(f"{value.name}_local"), value.type)
            for value in self.op.results
        )
        self.lowering.ops.append(self.op.with_(results=results))
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
            wanted = tuple((_placement(value)[axis],) for value in operands)
            states.append(
                ""
                if all(p == (B,) for p in wanted)
                else next(s for s in signature.states if signature.placements((s,))[0] == wanted)
            )
        _, (placement,) = signature.placements(states)
        value = into or Value(self.fresh(), type.placed(placement))
        split = {n: s for n, s in zip(self.mesh.names, states, strict=True) if s}
        self.lowering.ops.append(bare.with_(results=(value,), split=split, loc=self.op.loc))
        return value

    def collective(
        self, name: str, operand: Value, attrs: Mapping[str, Attr], placement: Placements
    ) -> Value:
        """Append a collective or local placement change."""
        value = Value(self.fresh(), operand.type.placed(placement))
        self.lowering.ops.append(Op(name, (operand,), (value,), attrs, loc=self.op.loc))
        return value

    def fresh(self) -> str:
        """A new name, after the op's first result."""
        return self.lowering.namer(f"{self.op.results[0].name}_fix")

    def scalar(self, value: float, dtype: str) -> Value:
        """A number as a tensor without dims."""
        return self.emit("constant", (), TensorType(dtype, ()), {"value": value})

    def total(self, lse: Value, into: Value) -> Value:
        """The log-sum-exp over all axes, as the value `into`."""
        for axis in self.axes[:-1]:
            lse = self.collective("lse_combine", lse, {"axis": axis}, _placement(lse))
        self.lowering.ops.append(
            Op("lse_combine", (lse,), (into,), {"axis": self.axes[-1]}, loc=self.op.loc)
        )
        return into


def _fix_attention(fix: _Fixer) -> None:
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


def _fix_logsumexp(fix: _Fixer) -> None:
    (local,) = fix.local()
    fix.total(local, fix.op.result)


def _fix_cross_entropy(fix: _Fixer) -> None:
    """Add L to the terms, on one rank, in the rows that are not ignored."""
    loss, lse = fix.op.results
    labels = fix.op.operands[1]
    local_loss, local_lse = fix.local()
    total = fix.total(local_lse, lse)
    ignore = full_attrs(fix.op.name, fix.op.attrs)["ignore_index"]
    assert isinstance(ignore, int)
    code = fix.scalar(ignore, labels.type.dtype)
    counts = fix.emit("ne", (labels, code), TensorType("bool", labels.type.shape))
    zero = fix.scalar(0.0, loss.type.dtype)
    if total.type.dtype != loss.type.dtype:
        total = fix.emit("cast", (total,), TensorType(loss.type.dtype, loss.type.shape))
    term = fix.emit("where", (counts, total, zero), loss.type)
    for position, axis in enumerate(fix.mesh.names):  # axes of one rank are partial too
        if _placement(local_loss)[position] != P("sum"):
            continue
        held = _placement(term)
        after = (*held[:position], P("sum"), *held[position + 1 :])
        term = fix.collective("partial", term, {"axis": axis, "combine": "sum"}, after)
    fix.emit("add", (local_loss, term), loss.type, into=loss)


#: op -> its fix-up
_FIXES: dict[str, Callable[[_Fixer], None]] = {
    "attention": _fix_attention,
    "logsumexp": _fix_logsumexp,
    "cross_entropy": _fix_cross_entropy,
}

__all__ = ["Lower", "lower", "lse_axes", "module_cost"]
