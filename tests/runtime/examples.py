"""Example operands for every op of the table: `EXAMPLES[op name]` is a list of cases.

Sizes are odd on purpose, so that shards come out uneven. Values are float64.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Generator, Tensor

from weft.ir.module import Attr, Op, Value
from weft.ir.ops import OPS
from weft.ir.types import TensorType
from weft.runtime.context import TORCH_DTYPES

Shape = tuple[int, ...]
Fill = Callable[[Generator, Shape], Tensor]


def normal(g: Generator, shape: Shape) -> Tensor:
    return torch.randn(shape, generator=g, dtype=torch.float64)


def positive(g: Generator, shape: Shape) -> Tensor:
    return torch.rand(shape, generator=g, dtype=torch.float64) + 0.5


def truth(g: Generator, shape: Shape) -> Tensor:
    return torch.rand(shape, generator=g) < 0.5


def mostly(g: Generator, shape: Shape) -> Tensor:
    """A bool mask under which every row sees its first key."""
    mask = torch.rand(shape, generator=g) < 0.7
    mask[..., 0] = True
    return mask


def some_rows_see_nothing(g: Generator, shape: Shape) -> Tensor:
    mask = mostly(g, shape)
    mask[..., 1, :] = False
    return mask


def below(high: int, low: int = 0) -> Fill:
    return lambda g, shape: torch.randint(low, high, shape, generator=g)


def labels(high: int) -> Fill:
    """Class numbers, some of which are the ignored -100."""

    def fill(g: Generator, shape: Shape) -> Tensor:
        out = torch.randint(0, high, shape, generator=g)
        out.view(-1)[::3] = -100
        return out

    return fill


def value(number: float) -> Fill:
    return lambda g, shape: torch.full(shape, number)


@dataclass(frozen=True)
class Case:
    """One example: operands as (shape, dtype, how to fill it)."""

    name: str
    operands: tuple[tuple[Shape, str, Fill], ...]
    results: tuple[TensorType, ...]
    attrs: dict[str, Attr] = field(default_factory=dict)
    note: str = ""

    @property
    def op(self) -> Op:
        """The logical op."""
        ins = [Value(f"x{i}", TensorType(d, s)) for i, (s, d, _) in enumerate(self.operands)]
        outs = [Value(f"y{i}", type) for i, type in enumerate(self.results)]
        return Op(self.name, tuple(ins), tuple(outs), self.attrs)

    def values(self, seed: int = 0) -> list[Tensor]:
        """Operand values."""
        g = Generator().manual_seed(seed)
        return [fill(g, shape).to(TORCH_DTYPES[dtype]) for shape, dtype, fill in self.operands]

    def __str__(self) -> str:
        shapes = " ".join("x".join(map(str, shape)) or "scalar" for shape, _, _ in self.operands)
        return f"{self.name}-{shapes}-{self.note}".strip("-").replace(" ", ",")


EXAMPLES: dict[str, list[Case]] = {}
#: ops that have no meaning on one rank alone, or none without a target
WITHOUT_EXAMPLE = frozenset({
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast", "permute_ranks",
    "lse_combine", "send", "recv", "shard", "partial", "reshard", "wait", "free", "call", "aten",
})  # fmt: skip


def case(
    name: str,
    operands: Sequence[tuple[Any, ...]],
    results: Sequence[tuple[Any, ...]] | None = None,
    note: str = "",
    **attrs: Attr,
) -> None:
    """Add a case. An operand is (shape, fill, dtype = f64), a result (shape, dtype = f64)."""
    ins = tuple((o[0], o[2] if len(o) > 2 else "f64", o[1]) for o in operands)
    if results is None:
        rule = OPS[name].types
        assert rule is not None, name
        defaults = {k: s.default for k, s in OPS[name].attrs.items() if s.default is not None}
        outs = tuple(rule([TensorType(d, s) for s, d, _ in ins], {**defaults, **attrs}))
    else:
        outs = tuple(TensorType(r[1] if len(r) > 1 else "f64", r[0]) for r in results)
    EXAMPLES.setdefault(name, []).append(Case(name, ins, outs, attrs, note))


def _pointwise() -> None:
    x = ((5, 6), normal)
    for name in ("neg", "abs", "sign", "exp", "expm1", "sin", "cos", "tanh", "erf", "sigmoid",
                 "relu", "silu", "softplus", "floor", "ceil", "round", "isfinite",
                 "stop_gradient"):  # fmt: skip
        case(name, [x])
        case(name, [((), normal)])
    for name in ("log", "log1p", "sqrt", "rsqrt", "reciprocal"):
        case(name, [((5, 6), positive)])
    for approximate in ("none", "tanh"):
        case("gelu", [x], note=approximate, approximate=approximate)
        case("gelu_backward", [x, x], note=approximate, approximate=approximate)
    case("stop_gradient", [x])
    case("logical_not", [((5, 6), truth, "bool")])
    case("cast", [x], [((5, 6), "f32")])
    case("cast", [x], [((5, 6), "i64")], note="to-int")
    case("cast", [((5, 6), truth, "bool")], [((5, 6),)], note="from-bool")
    for name in ("add", "sub", "mul", "div", "floor_divide", "remainder", "maximum", "minimum",
                 "eq", "ne", "lt", "le", "gt", "ge"):  # fmt: skip
        case(name, [x, x])
        case(name, [((4, 5, 6), normal), ((5, 1), normal)])
        case(name, [((), normal), x])
    case("add", [((5, 6), below(9), "i64"), ((6,), below(9), "i64")], note="int")
    case("pow", [((5, 6), positive), ((6,), normal)])
    for name in ("logical_and", "logical_or"):
        case(name, [((5, 6), truth, "bool"), ((1, 6), truth, "bool")])
    case("bitwise_xor", [((5, 6), below(99), "i64"), ((1, 6), below(99), "i64")])
    case("where", [((5, 6), truth, "bool"), x, x])
    case("where", [((5, 1), truth, "bool"), ((), normal), x])
    for name in ("silu_backward", "tanh_backward", "sigmoid_backward", "relu_backward"):
        case(name, [x, x])


def _contractions() -> None:
    for spec, a, b, out in (
        ("m k, k n -> m n", (5, 6), (6, 7), (5, 7)),
        ("b s k, n k -> b s n", (3, 5, 6), (7, 6), (3, 5, 7)),
        ("b s n, b s k -> n k", (3, 5, 7), (3, 5, 6), (7, 6)),
        ("b h s d, b h t d -> b h s t", (3, 2, 5, 4), (3, 2, 6, 4), (3, 2, 5, 6)),
        ("b h s d, b h t d -> t b s h", (3, 2, 5, 4), (3, 2, 6, 4), (6, 3, 5, 2)),
        ("e t k, e k f -> e t f", (4, 5, 6), (4, 6, 3), (4, 5, 3)),
        ("i, j -> i j", (5,), (6,), (5, 6)),
        ("i, i -> _", (7,), (7,), ()),
        ("i j, j i -> i j", (5, 6), (6, 5), (5, 6)),
        ("i j r, j k -> i k", (5, 6, 3), (6, 4), (5, 4)),
        ("i j, k l -> i", (5, 6), (3, 2), (5,)),
        ("_, i -> i", (), (5,), (5,)),
    ):
        case("einsum", [(a, normal), (b, normal)], [(out,)], note=spec.replace(" ", "_"), spec=spec)
    for note, attrs, x, w, y in (
        ("2d", {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)},
         (5, 3, 7, 8), (4, 3, 3, 3), (5, 4, 7, 8)),
        ("strided", {"stride": (2, 2), "padding": (3, 3), "dilation": (1, 1)},
         (3, 3, 9, 8), (5, 3, 7, 7), (3, 5, 5, 4)),
        ("1d", {"stride": (2,), "padding": (0,), "dilation": (2,)}, (3, 4, 11), (5, 4, 3),
         (3, 5, 4)),
        ("grouped", {"stride": (1,), "padding": (1,), "dilation": (1,), "groups": 2},
         (3, 4, 6), (6, 2, 3), (3, 6, 6)),
        ("3d", {"stride": (1, 1, 1), "padding": (0, 0, 0), "dilation": (1, 1, 1)},
         (3, 2, 4, 4, 4), (3, 2, 2, 2, 2), (3, 3, 3, 3, 3)),
    ):  # fmt: skip
        case("convolution", [(x, normal), (w, normal)], [(y,)], note, **attrs)
        case("convolution_input_grad", [(y, normal), (w, normal)], [(x,)], note, **attrs)
        case("convolution_weight_grad", [(y, normal), (x, normal)], [(w,)], note, **attrs)
    # some rows belong to no group
    group = ((7,), below(5, -1), "i64")
    case("grouped_product", [((7, 5), normal), ((4, 5, 6), normal), group])
    case("grouped_weight_grad", [((7, 6), normal), ((7, 5), normal), group], [((4, 5, 6),)])


def _attention() -> None:
    seed = ((), below(10**9), "i64")
    for note, heads, kv, s, t, extra, attrs in (
        ("plain", 4, 4, 5, 7, [], {}),
        ("causal", 4, 4, 6, 6, [], {"causal": True}),
        ("gqa", 6, 2, 5, 5, [], {"causal": True}),
        ("mqa", 4, 1, 5, 5, [], {}),
        ("mask", 4, 2, 5, 7, [((3, 1, 5, 7), mostly, "bool")], {"mask": True}),
        ("blind-rows", 4, 2, 5, 7, [((3, 1, 5, 7), some_rows_see_nothing, "bool")], {"mask": True}),
        ("added-mask", 4, 4, 5, 7, [((1, 4, 1, 7), normal)], {"mask": True}),
        ("key-mask", 4, 2, 5, 7, [((3, 1, 1, 7), mostly, "bool")], {"mask": True}),
        ("dropout", 4, 2, 5, 6, [seed], {"dropout": 0.3, "causal": True}),
        ("mqa-dropout", 4, 1, 5, 6, [seed], {"dropout": 0.3}),
        ("everything", 4, 2, 6, 6, [((1, 1, 6, 6), mostly, "bool"), seed],
         {"mask": True, "dropout": 0.3, "causal": True}),
    ):  # fmt: skip
        q, k, v = ((3, heads, s, 4), normal), ((3, kv, t, 4), normal), ((3, kv, t, 3), normal)
        out = ((3, heads, s, 3), normal)
        lse = ((3, heads, s), value(2.0))
        case("attention", [q, k, v, *extra], note=note, scale=0.5, **attrs)
        grads = [out, q, k, v, out, lse, *extra]
        case("attention_backward", grads, note=note, scale=0.5, **attrs)


def _rows() -> None:
    x, rows = ((3, 5, 7), normal), ((3, 5, 1), positive)
    vector = ((7,), normal)
    for name in ("softmax", "log_softmax", "logsumexp"):
        case(name, [x])
        case(name, [vector])
    for name in ("softmax_backward", "log_softmax_backward"):
        case(name, [x, x])
    case("layer_norm", [x, vector, vector])
    case("layer_norm_backward", [x, x, vector, ((3, 5, 1), normal), rows],
         [x[:1], ((7,),), ((7,),)])  # fmt: skip
    case("rms_norm", [x, vector], eps=1e-6)
    case("rms_norm_backward", [x, x, vector, rows], [x[:1], ((7,),)])
    ids = ((3, 5), labels(7), "i64")
    case("cross_entropy", [x, ids])
    case("cross_entropy", [((5, 7), normal), ((5,), below(7), "i64")], ignore_index=3, note="3")
    case("cross_entropy_backward", [((3, 5), normal), x, ids, ((3, 5), positive)])


def _channels() -> None:
    for note, shape in (("2d", (3, 5, 4, 2)), ("flat", (5, 3)), ("1d", (5, 3, 7))):
        x, vector = (shape, normal), ((shape[1],), normal)
        case("channel_squares", [x, vector], note=note)
        case("batch_norm", [x, vector, (vector[0], positive), vector, vector], note=note, eps=1e-3)
        case("batch_norm_sums", [x, x, vector], note=note)
        case("batch_norm_backward", [x, x, vector, (vector[0], positive), *[vector] * 3],
             note=note, eps=1e-3)  # fmt: skip


def _pooling() -> None:
    for note, x, y, attrs in (
        ("plain", (3, 5, 6, 7), (3, 5, 3, 3), {"kernel": (2, 2), "stride": (2, 2)}),
        ("overlap", (3, 5, 6, 7), (3, 5, 3, 4),
         {"kernel": (3, 3), "stride": (2, 2), "padding": (1, 1)}),
        ("ceil", (5, 6, 8), (5, 3, 4), {"kernel": (2, 3), "stride": (2, 2), "ceil": True}),
        ("dilated", (3, 5, 6, 7), (3, 5, 4, 3),
         {"kernel": (2, 3), "stride": (1, 1), "dilation": (2, 2)}),
        ("3d", (3, 5, 4, 4, 5), (3, 5, 2, 2, 2), {"kernel": (2, 2, 2), "stride": (2, 2, 2)}),
    ):  # fmt: skip
        spatial = len(attrs["kernel"])
        attrs = {"padding": (0,) * spatial, "dilation": (1,) * spatial, **attrs}
        case("max_pool", [(x, normal)], note=note, **attrs)
        places = (y, below(4), "i64")
        case("max_pool_backward", [(y, normal), (x, normal), places], note=note, **attrs)


def _movement() -> None:
    shapes: list[tuple[Shape, Shape]] = [
        ((6, 4), (24,)), ((5, 12), (5, 3, 4)), ((2, 3, 5), (6, 5)), ((4, 6), (4, 1, 6)),
        ((6, 4), (4, 6)), ((1, 5), (5,)), ((4, 6, 5), (8, 15)), ((8, 15), (4, 6, 5)),
    ]  # fmt: skip
    for a, b in shapes:
        note = "x".join(map(str, b))
        case("reshape", [(a, normal)], [(b,)], note=note)
    case("reshape", [((6, 4), truth, "bool")], [((2, 3, 4), "bool")], note="bool")
    case("permute", [((3, 5, 6), normal)], dims=(2, 0, 1))
    for a, b in (((5, 1), (5, 6)), ((6,), (5, 6)), ((), (5,)), ((1, 5, 1), (4, 5, 1))):
        case("expand", [(a, normal)], [(b,)])
    x = ((5, 6, 7), normal)
    case("slice", [x], dim=1, start=1, stop=6, step=2)
    case("slice", [x], dim=2, start=0, stop=3)
    case("pad", [x], low=(0, 1, 0), high=(0, 2, -1))
    case("pad", [x], low=(1, 0, 0), high=(0, 0, 0), value=3.0, note="threes")
    case("concat", [x, ((5, 2, 7), normal), ((5, 1, 7), normal)], dim=1)
    case("flip", [x], dim=1)


def _indexing() -> None:
    table = ((7, 6), normal)
    case("embedding", [((5, 3), below(7), "i64"), table])
    for skip in (-1, 2):
        case("embedding_backward", [((5, 3, 6), normal), ((5, 3), below(7), "i64")], [((7, 6),)],
             note=f"skip{skip}", padding_idx=skip)  # fmt: skip
    x = ((5, 4, 6), normal)
    index, source = ((5, 3, 6), below(4), "i64"), ((5, 3, 6), normal)
    case("gather", [x, index], dim=1)
    case("gather", [((5, 4), normal), ((5, 2), below(4), "i64")], dim=1)
    once = (
        (5, 3, 6),
        lambda g, shape: torch.rand((5, 4, 6), generator=g).argsort(1)[:, :3],
        "i64",
    )
    case("scatter", [x, once, source], dim=1)
    case("scatter_add", [x, index, source], dim=1)
    case("take", [x, ((3,), below(4), "i64")], dim=1)
    case("take_backward", [((5, 3, 6), normal), ((3,), below(4), "i64")], [((5, 4, 6),)], dim=1)


def _reductions() -> None:
    x = ((5, 6, 7), normal)
    for name in ("reduce_sum", "reduce_max", "reduce_min", "reduce_prod"):
        case(name, [x], dims=(1,), note="1")
        case(name, [x], dims=(0, 2), keepdim=True, note="0,2")
        case(name, [x], dims=(0, 1, 2), note="all")
        case(name, [x], dims=(), note="none")
    case("reduce_sum", [((5, 6), truth, "bool")], [((5,), "i64")], dims=(1,), note="count")
    case("reduce_max", [((5, 6), truth, "bool")], dims=(1,), note="any")
    case("argmax", [x], dims=(1,))
    case("argmax", [x], dims=(2,), keepdim=True, note="keep")
    case("cumsum", [x], dim=1)
    case("cumsum", [((5, 6), truth, "bool")], [((5, 6), "i64")], dim=1, note="bool")
    case("sort", [x], dim=1)
    case("sort", [x], dim=2, descending=True)
    case("topk", [x], [((5, 3, 7),), ((5, 3, 7), "i64")], dim=1, k=3)


def _creation() -> None:
    case("constant", [], [((5, 6),)], value=1.5)
    case("constant", [], [((5,), "bool")], value=True, note="bool")
    case("literal", [], [((2, 3), "i64")], values=(1, 2, 3, 4, 5, 6))
    case("literal", [], [((),)], values=(2.5,), note="scalar")
    for dim in (0, 1):
        case("iota", [], [((5, 6), "i64")], dim=dim, start=3, step=-2, note=str(dim))
    seed = ((), below(10**9), "i64")
    for name in ("uniform", "normal"):
        case(name, [seed], [((5, 7),)])
        case(name, [seed], [((3, 5, 7), "f32")])
    case("dropout", [((5, 6), normal), seed], p=0.4)
    case("fold_seed", [seed], by=3)


def _optimizers() -> None:
    p, scalar = ((5, 6), normal), lambda number: ((), value(number))
    moments = [((5, 6), normal), ((5, 6), positive)]
    for name in ("adam_update", "adamw_update"):
        case(name, [p, p, *moments, scalar(3.0), scalar(0.01)])
        case(name, [p, p, *moments, scalar(3.0), scalar(0.01)], note="decay", weight_decay=0.1,
             maximize=True)  # fmt: skip
    case("sgd_update", [p, p, scalar(1.0), scalar(0.1)], weight_decay=0.1)
    case("momentum_update", [p, p, p, scalar(2.0), scalar(0.1)], momentum=0.9, dampening=0.1,
         nesterov=True)  # fmt: skip


for _build in (_pointwise, _contractions, _attention, _rows, _channels, _pooling, _movement,
               _indexing, _reductions, _creation, _optimizers):  # fmt: skip
    _build()
CASES = [case for cases in EXAMPLES.values() for case in cases]
