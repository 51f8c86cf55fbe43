"""OneFlow's table of legal placements is a theorem of the dimension algebra.

Yuan et al., OneFlow, 2021 (arXiv:2110.15032), table 3 and its source. A rule is written as
`operand placements -> result placements` on one mesh axis, in OneFlow's notation: S0, B, P.
That each derived rule is *true* is proved numerically in test_op_states.py; here, that the derived
rules are the listed ones, and, by trying all rules there are, that none is missing.
"""

from __future__ import annotations

from itertools import product

import pytest
import torch
from tests.runtime.examples import EXAMPLES, Case

from weft.ir.module import Attr, Op, Value
from weft.ir.opdef import OPS, signature_of
from weft.ir.types import B, Mesh, P, Placement, S, TensorType, local_shape
from weft.runtime.context import OpContext, results_of
from weft.runtime.shards import gather, scatter

Rules = set[str]


def op(name: str, ins: list[tuple[int, ...]], outs: list[tuple[int, ...]], **attrs: Attr) -> Op:
    """A float64 op on shapes."""
    operands = tuple(Value(f"x{i}", TensorType("f64", s)) for i, s in enumerate(ins))
    results = tuple(Value(f"y{i}", TensorType("f64", s)) for i, s in enumerate(outs))
    return Op(name, operands, results, attrs)


def show(placement: Placement) -> str:
    return f"S{placement.dim}" if placement.kind == "S" else placement.kind


def rule(ins: tuple[Placement, ...], outs: tuple[Placement, ...]) -> str:
    return f"{' '.join(map(show, ins))} -> {' '.join(map(show, outs))}"


def derived(op: Op) -> Rules:
    """All rules of one axis that an op's signature gives."""
    signature = signature_of(op)
    rules = set()
    for state in ("", *signature.states):
        ins, outs = signature.placements([state])
        rules.add(rule(tuple(p[0] for p in ins), tuple(p[0] for p in outs)))
    return rules


X, Y = (4, 6), (6, 8)
CUBE = (4, 6, 8)
SAME2 = {"S0 -> S0", "S1 -> S1", "B -> B"}
TABLE: list[tuple[str, Op, Rules]] = [
    ("matmul", op("einsum", [X, Y], [(4, 8)], spec="m k, k n -> m n"),
     {"S0 B -> S0", "B S1 -> S1", "S1 S0 -> P", "P B -> P", "B P -> P", "B B -> B"}),
    ("batched matmul", op("einsum", [CUBE, (4, 8, 6)], [(4, 6, 6)], spec="b m k, b k n -> b m n"),
     {"S0 S0 -> S0", "S1 B -> S1", "B S2 -> S2", "S2 S1 -> P", "P B -> P", "B P -> P",
      "B B -> B"}),
    ("linear 3-D", op("einsum", [CUBE, (10, 8)], [(4, 6, 10)], spec="b s k, n k -> b s n"),
     {"S0 B -> S0", "S1 B -> S1", "B S0 -> S2", "S2 S1 -> P", "P B -> P", "B P -> P", "B B -> B"}),
    ("weight gradient", op("einsum", [X, (4, 8)], [(6, 8)], spec="t k, t n -> k n"),
     {"S0 S0 -> P", "S1 B -> S0", "B S1 -> S1", "P B -> P", "B P -> P", "B B -> B"}),
    ("grouped gemm", op("einsum", [CUBE, (4, 8, 10)], [(4, 6, 10)], spec="e c h, e h f -> e c f"),
     {"S0 S0 -> S0", "S1 B -> S1", "B S2 -> S2", "S2 S1 -> P", "P B -> P", "B P -> P",
      "B B -> B"}),
    ("linear attention state",
     op("einsum", [(4, 6, 8), (4, 6, 10)], [(4, 8, 10)], spec="b s d, b s e -> b d e"),
     {"S0 S0 -> S0", "S1 S1 -> P", "S2 B -> S1", "B S2 -> S2", "P B -> P", "B P -> P",
      "B B -> B"}),
    *((f"nonlinear {name}", op(name, [X], [X]), SAME2)
      for name in ("exp", "gelu", "relu", "tanh", "sigmoid", "silu", "sqrt", "rsqrt")),
    *((f"linear {name}", op(name, [X], [X]), SAME2 | {"P -> P"}) for name in ("neg", "cast")),
    ("transpose", op("permute", [X], [(6, 4)], dims=(1, 0)),
     {"S0 -> S1", "S1 -> S0", "P -> P", "B -> B"}),
    ("reshape that splits a dim", op("reshape", [(4, 12)], [(4, 6, 2)]),
     {"S0 -> S0", "S1 -> S1", "P -> P", "B -> B"}),
    ("reshape that joins dims", op("reshape", [(4, 6, 2)], [(4, 12)]),
     {"S0 -> S0", "S1 -> S1", "P -> P", "B -> B"}),
    *((name, op(name, [X, X], [X]), {"S0 S0 -> S0", "S1 S1 -> S1", "P P -> P", "B B -> B"})
      for name in ("add", "sub")),
    ("add, broadcast", op("add", [X, (6,)], [X]),
     {"S0 B -> S0", "S1 S0 -> S1", "P P -> P", "B B -> B"}),
    ("mul", op("mul", [X, X], [X]),
     {"S0 S0 -> S0", "S1 S1 -> S1", "P B -> P", "B P -> P", "B B -> B"}),
    ("div", op("div", [X, X], [X]), {"S0 S0 -> S0", "S1 S1 -> S1", "P B -> P", "B B -> B"}),
    ("maximum", op("maximum", [X, X], [X]), {"S0 S0 -> S0", "S1 S1 -> S1", "B B -> B"}),
    ("reduce sum", op("reduce_sum", [CUBE], [(4, 8)], dims=(1,)),
     {"S0 -> S0", "S1 -> P", "S2 -> S1", "P -> P", "B -> B"}),
    ("reduce max", op("reduce_max", [CUBE], [(4, 8)], dims=(1,)),
     {"S0 -> S0", "S1 -> P", "S2 -> S1", "B -> B"}),
    ("reduce prod", op("reduce_prod", [CUBE], [(4, 8)], dims=(1,)),
     {"S0 -> S0", "S2 -> S1", "B -> B"}),
    ("softmax", op("softmax", [CUBE], [CUBE]), {"S0 -> S0", "S1 -> S1", "B -> B"}),
    ("layer norm", op("layer_norm", [CUBE, (8,), (8,)], [CUBE, (4, 6, 1), (4, 6, 1)]),
     {"S0 B B -> S0 S0 S0", "S1 B B -> S1 S1 S1", "B B B -> B B B"}),
    ("layer norm gradient",
     op("layer_norm_backward", [CUBE, CUBE, (8,), (4, 6, 1), (4, 6, 1)], [CUBE, (8,), (8,)]),
     {"S0 S0 B S0 S0 -> S0 P P", "S1 S1 B S1 S1 -> S1 P P", "P B B B B -> P P P",
      "B B B B B -> B B B"}),
    ("rms norm", op("rms_norm", [CUBE, (8,)], [CUBE, (4, 6, 1)]),
     {"S0 B -> S0 S0", "S1 B -> S1 S1", "B B -> B B"}),
    ("rms norm gradient", op("rms_norm_backward", [CUBE, CUBE, (8,), (4, 6, 1)], [CUBE, (8,)]),
     {"S0 S0 B S0 -> S0 P", "S1 S1 B S1 -> S1 P", "P B B B -> P P", "B B B B -> B B"}),
    ("batch norm", op("batch_norm", [CUBE, (6,), (6,), (6,), (6,)], [CUBE]),
     {"S0 B B B B -> S0", "S1 S0 S0 S0 S0 -> S1", "S2 B B B B -> S2", "B B B B B -> B"}),
    ("batch norm statistics", op("channel_squares", [CUBE, (6,)], [(6,)]),
     {"S0 B -> P", "S1 S0 -> S0", "S2 B -> P", "B B -> B"}),
    ("max pooling",
     op("max_pool", [CUBE], [(4, 3, 4)] * 2, kernel=(2, 2), stride=(2, 2), padding=(0, 0),
        dilation=(1, 1)),
     {"S0 -> S0 S0", "B -> B B"}),
    ("embedding", op("embedding", [(4,), (10, 8)], [(4, 8)]),
     {"S0 B -> S0", "B S1 -> S1", "B S0 -> P", "B P -> P", "B B -> B"}),
    ("sparse softmax cross entropy", op("cross_entropy", [X, (4,)], [(4,), (4,)]),
     {"S0 S0 -> S0 S0", "S1 B -> P B", "B B -> B B"}),
    ("attention", op("attention", [(2, 4, 6, 8)] * 3, [(2, 4, 6, 8), (2, 4, 6)], scale=1.0),
     {"S0 S0 S0 -> S0 S0", "S1 S1 S1 -> S1 S1", "S2 B B -> S2 S2",
      "B S2 S2 -> P B", "B B B -> B B"}),
    ("dropout", op("dropout", [X, ()], [X], p=0.5), {"S0 B -> S0", "S1 B -> S1", "P B -> P",
                                                     "B B -> B"}),
    ("adam", op("adam_update", [X, X, X, X, (), ()], [X, X, X]),
     {"S0 S0 S0 S0 B B -> S0 S0 S0", "S1 S1 S1 S1 B B -> S1 S1 S1", "B B B B B B -> B B B"}),
]  # fmt: skip


@pytest.mark.parametrize(("op", "rules"), [row[1:] for row in TABLE], ids=[r[0] for r in TABLE])
def test_signature_derives_exactly_the_listed_rules(op: Op, rules: Rules) -> None:
    assert derived(op) == rules


MESH = Mesh((("x", 2),))


def holds(case: Case, ins: tuple[Placement, ...], outs: tuple[Placement, ...]) -> bool:
    """Does a rule hold numerically? Operands are cut, partial ones into random terms."""
    op = case.op
    values = case.values()
    whole = results_of(op, OPS[op.name].ref(OpContext(op), *values))
    noise = torch.Generator().manual_seed(7)
    shards = [
        scatter(t, v.type.placed([p]), MESH, noise=noise)
        for t, v, p in zip(values, op.operands, ins, strict=True)
    ]
    types = [v.type.placed([p]) for v, p in zip(op.results, outs, strict=True)]
    rows = []
    for rank in range(2):
        tensors = [ranks[rank] for ranks in shards]
        operands = tuple(Value(v.name, TensorType(v.type.dtype, tuple(t.shape)))
                         for v, t in zip(op.operands, tensors, strict=True))  # fmt: skip
        results = tuple(Value(v.name, TensorType(v.type.dtype, local_shape(t, MESH, (rank,))))
                        for v, t in zip(op.results, types, strict=True))  # fmt: skip
        try:
            alone = op.with_(operands=operands, results=results)
            rows.append(results_of(op, OPS[op.name].ref(OpContext(alone), *tensors)))
        except (RuntimeError, ValueError):  # the local shapes fit no op
            return False
        if [t.shape for t in rows[-1]] != [v.type.shape for v in results]:
            return False
    for i, type in enumerate(types):
        if type.placement == (B,) and not torch.allclose(rows[0][i], rows[1][i]):
            return False
        if not torch.allclose(gather([row[i] for row in rows], type, MESH), whole[i]):
            return False
    return True


#: ops of one result whose shards do not depend on where they lie
SEARCHED = [
    case
    for name in ("einsum", "neg", "exp", "add", "sub", "mul", "div", "maximum", "where", "softmax",
                 "reduce_sum", "reduce_max", "permute", "cumsum", "silu_backward", "take",
                 "softmax_backward")
    for case in EXAMPLES[name][:2]
    if all(dtype == "f64" or name in ("where", "take") for _, dtype, _ in case.operands)
]  # fmt: skip


@pytest.mark.parametrize("case", SEARCHED, ids=str)
def test_no_rule_that_holds_is_missing(case: Case) -> None:
    op = case.op
    found = derived(op)

    def candidates(value: Value, maximum: bool) -> list[Placement]:
        sums = [P("sum")] if value.type.dtype == "f64" else []
        dims = [S(d) for d, size in enumerate(value.type.shape) if size > 1]
        return [B, *sums, *([P("max")] if maximum else []), *dims]

    ins = [candidates(v, False) for v in op.operands]
    extreme = op.name in ("reduce_max", "maximum")
    outs = [candidates(v, extreme) for v in op.results]
    for left in product(*ins):
        for right in product(*outs):
            if all(p == B for p in left) and right == (P("max"),):
                continue  # it holds, a copy being a term of a maximum, and is of no use
            if holds(case, left, right):
                assert rule(left, right) in found
