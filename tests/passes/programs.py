"""Random small programs of about 45 ops, with inputs, for tests that run them on several ranks.

Values are float64, with integer and bool ones in between, and stay below about 100 in size, so
that results may be compared to 1e-9. Sizes are small and odd, so that shards come out uneven. What
jumps on a rounding error (sort indices, comparisons of computed values) is not used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from math import log, prod
from random import Random

import torch
from torch import Generator, Tensor

from weft.ir.builder import Builder
from weft.ir.module import Attr, Function, Module, Value
from weft.ir.types import TensorType

SIZES = (2, 3, 4, 5, 6, 8)
#: values grow to this size before they are scaled down
_LARGE = 50.0

Shape = tuple[int, ...]


@dataclass
class Program:
    """A logical module and values for its entry's parameters."""

    module: Module
    inputs: list[Tensor]


@dataclass
class _Maker:
    """Grows one function; `pool` holds its float64 values, `bound` about how large they get."""

    rng: Random
    callees: list[Function] = field(default_factory=list)
    builder: Builder = field(default_factory=Builder)
    pool: list[Value] = field(default_factory=list)
    bound: dict[str, float] = field(default_factory=dict)
    extra: list[Value] = field(default_factory=list)  # results that nothing else should read
    fills: list[Callable[[Generator], Tensor]] = field(default_factory=list)
    read: set[str] = field(default_factory=set)

    # values -----------------------------------------------------------------------------------

    def param(self, shape: Shape, dtype: str = "f64", high: int = 2, **attrs: Attr) -> Value:
        """A new parameter: normal numbers, integers below `high`, or random bools."""
        type = TensorType(dtype, shape)

        def fill(g: Generator) -> Tensor:
            if dtype == "f64":
                return torch.randn(shape, generator=g, dtype=torch.float64)
            whole = torch.randint(0, high, shape, generator=g)
            return whole.bool() if dtype == "bool" else whole

        self.fills.append(fill)
        value = self.builder.param(type, f"p{len(self.builder.params)}", **attrs)
        self.bound[value.name] = 4.0
        return value

    def number(self, value: float, dtype: str = "f64") -> Value:
        return self.builder.constant(value, TensorType(dtype, ()))

    def some(self, rank: int | None = None, least: int = 0) -> Value:
        """A value of the pool, else a new parameter; recent values are more likely."""
        fits = [v for v in self.pool if rank in (None, len(v.type.shape))]
        fits = [v for v in fits if len(v.type.shape) >= least]
        if fits and self.rng.random() < 0.95:
            value = fits[max(self.rng.randrange(len(fits)), self.rng.randrange(len(fits)))]
        else:
            value = self.param(self.shape(rank if rank is not None else max(least, 2)))
        self.read.add(value.name)
        return value

    def shape(self, rank: int) -> Shape:
        sizes = SIZES if rank < 4 else SIZES[:3]
        return tuple(self.rng.choice(sizes) for _ in range(rank))

    def op(
        self, name: str, operands: list[Value], bound: float = 0.0, shape: Shape | None = None,
        dtype: str = "f64", **attrs: Attr,
    ) -> Value:  # fmt: skip
        """Append an op with one result; given a bound, the result is put into the pool."""
        types = None if shape is None else [TensorType(dtype, shape)]
        value = self.builder.one(name, operands, attrs, types=types)
        if bound:
            self.push(value, bound)
        return value

    def push(self, value: Value, bound: float) -> None:
        if bound > _LARGE:  # scaling is linear, so partial sums pass
            value = self.builder.one("mul", [value, self.number(4.0 / bound)])
            bound = 4.0
        self.pool.append(value)
        self.bound[value.name] = bound

    def size(self, *values: Value) -> float:
        return max(self.bound[value.name] for value in values)

    def dim(self, value: Value) -> int:
        return self.rng.randrange(len(value.type.shape))

    def seed(self) -> Value:
        return self.param((), "i64", 10**9, role="seed")

    def finish(self, name: str) -> Function:
        """The function; it returns every value that no op reads, but at least one."""
        ends = [v for v in self.pool if v.name not in self.read] or self.pool[-1:]
        ends = [*ends, *self.extra]
        return self.builder.function(name, ends, [{"role": "output"}] * len(ends))


# productions: each grows the function by an op or a few ------------------------------------------


def _unary(m: _Maker) -> None:
    x = m.some()
    name = m.rng.choice(["neg", "abs", "tanh", "sigmoid", "relu", "silu", "gelu", "sin", "erf"])
    m.op(name, [x], m.size(x))


def _positive(m: _Maker) -> None:
    x = m.some()
    safe = m.op("add", [m.op("abs", [x]), m.number(1.0)])
    bound = {"sqrt": 8.0, "rsqrt": 1.0, "log": 4.0, "reciprocal": 1.0}
    name = m.rng.choice(sorted(bound))
    m.op(name, [safe], bound[name])


def _exp(m: _Maker) -> None:
    m.op("exp", [m.op("tanh", [m.some()])], 2.8)


def _partner(m: _Maker, x: Value) -> Value:
    """A value that broadcasts with x: from the pool, or a parameter with some dims of size 1."""
    fits = [v for v in m.pool if v.type.shape == x.type.shape]
    if fits and m.rng.random() < 0.7:
        value = m.rng.choice(fits)
        m.read.add(value.name)
        return value
    shape = x.type.shape[m.rng.randint(0, len(x.type.shape)) :]
    return m.param(tuple(n if m.rng.random() < 0.7 else 1 for n in shape))


def _binary(m: _Maker) -> None:
    x = m.some()
    y = _partner(m, x)
    operands = m.rng.sample([x, y], 2)
    name = m.rng.choice(["add", "sub", "mul", "maximum", "minimum", "div"])
    if name == "div":
        below = m.op("add", [m.op("abs", operands[1:]), m.number(1.0)])
        m.op(name, [operands[0], below], m.size(x, y))
    else:
        m.op(name, operands, m.size(x) * m.size(y) if name == "mul" else 2 * m.size(x, y))


def _where(m: _Maker) -> None:
    x = m.some()
    y, condition = _partner(m, x), m.param(x.type.shape, "bool")
    m.op("where", [condition, x, y], m.size(x, y))


def _where_iota(m: _Maker) -> None:
    """A mask made of positions, as causal masks are."""
    x = m.some(least=2)
    a, b = x.type.shape[-2:]
    rows = m.op("iota", [], shape=(a, b), dtype="i64", dim=0)
    columns = m.op("iota", [], shape=(a, b), dtype="i64", dim=1)
    mask = m.op("le", [columns, rows])
    if m.rng.random() < 0.5:
        m.op("where", [mask, x, m.number(0.0)], m.size(x))
    else:
        m.op("mul", [x, m.op("cast", [mask], shape=(a, b))], m.size(x))


def _reduce(m: _Maker) -> None:
    x = m.some(least=1)
    rank = len(x.type.shape)
    dims = tuple(sorted(m.rng.sample(range(rank), m.rng.randint(1, rank))))
    name = m.rng.choice(["reduce_sum", "reduce_sum", "reduce_max", "reduce_min"])
    scale = prod(x.type.shape[d] for d in dims) if name == "reduce_sum" else 1
    m.op(name, [x], m.size(x) * scale, dims=dims, keepdim=m.rng.random() < 0.5)


def _softmax(m: _Maker) -> None:
    x = m.some(least=1)
    name = m.rng.choice(["softmax", "log_softmax", "logsumexp", "logsumexp"])
    m.op(name, [x], 1.0 if name == "softmax" else 2 * m.size(x) + log(8))


def _norm(m: _Maker) -> None:
    x = m.some(least=2)
    weight, bias = m.param(x.type.shape[-1:]), m.param(x.type.shape[-1:])
    if m.rng.random() < 0.5:
        y, _, _ = m.builder.many("layer_norm", [x, weight, bias], {"eps": 1e-2})
    else:
        y, _ = m.builder.many("rms_norm", [x, weight], {"eps": 1e-2})
    m.push(y, 12.0)


def _norm_backward(m: _Maker) -> None:
    x = m.some(least=2)
    weight, dy = m.param(x.type.shape[-1:]), m.param(x.type.shape)
    _, rstd = m.builder.many("rms_norm", [x, weight], {"eps": 1e-2})
    types = [TensorType("f64", x.type.shape), TensorType("f64", weight.type.shape)]
    dx, dw = m.builder.many("rms_norm_backward", [dy, x, weight, rstd], types=types)
    m.push(dx, 20.0 * m.size(x))
    m.push(dw, 10.0 * prod(x.type.shape[:-1]))


def _linear(m: _Maker) -> None:
    x = m.some(least=1)
    *_, k = x.type.shape
    n = m.rng.choice(SIZES)
    names = " ".join(f"b{i}" for i in range(len(x.type.shape) - 1))
    turned = m.rng.random() < 0.5
    w = m.param((n, k) if turned else (k, n))
    spec = f"{names} k, {'n k' if turned else 'k n'} -> {names} n"
    m.op("einsum", [x, w], 4 * k * m.size(x), spec=spec)


def _products(m: _Maker) -> None:
    """A product of two computed values: attention scores, or the gradient of a weight."""
    x = m.some(rank=3)
    y = m.some(rank=3)
    if y.type.shape[0] != x.type.shape[0] or y.type.shape[2] != x.type.shape[2]:
        y = m.param((x.type.shape[0], m.rng.choice(SIZES), x.type.shape[2]))
    if m.rng.random() < 0.5:
        m.op("einsum", [x, y], 8 * m.size(x) * m.size(y), spec="b s d, b t d -> b s t")
    else:
        z = m.param((*x.type.shape[:2], m.rng.choice(SIZES)))
        m.op("einsum", [x, z], 64 * 4 * m.size(x), spec="b s k, b s n -> n k")


def _attention(m: _Maker) -> None:
    q = m.some(rank=4)
    b, h, s, d = q.type.shape
    g = m.rng.choice([n for n in range(1, h + 1) if h % n == 0])
    attrs: dict[str, Attr] = {"scale": 0.5, "causal": m.rng.random() < 0.4}
    t = s if attrs["causal"] else m.rng.choice(SIZES)
    k, v = m.param((b, g, t, d)), m.param((b, g, t, m.rng.choice(SIZES)))
    rest: list[Value] = []
    if m.rng.random() < 0.4:
        attrs["mask"] = True
        full = (b, h, s, t)
        shape = tuple(n if m.rng.random() < 0.6 else 1 for n in full)
        rest.append(m.param(shape, "bool"))
    if m.rng.random() < 0.3:
        attrs["dropout"] = 0.25
        rest.append(m.seed())
    out, lse = m.builder.many("attention", [q, k, v, *rest], attrs)
    if m.rng.random() < 0.5:
        dout = m.param(out.type.shape)
        types = [TensorType("f64", x.type.shape) for x in (q, k, v)]
        operands = [dout, q, k, v, out, lse, *rest]
        grads = m.builder.many("attention_backward", operands, attrs, types=types)
        for grad in grads:
            m.push(grad, 20 * m.size(q))
    m.push(out, 8.0)
    m.extra.append(lse)  # rows that see nothing are -inf


def _cross_entropy(m: _Maker) -> None:
    logits = m.some(least=2)
    *rows, n = logits.type.shape
    ignore = m.rng.choice([-100, 1])
    labels = m.param(tuple(rows), "i64", n)
    attrs: dict[str, Attr] = {"ignore_index": ignore}
    loss, lse = m.builder.many("cross_entropy", [logits, labels], attrs)
    if m.rng.random() < 0.6:
        dloss = m.param(loss.type.shape)
        operands = [dloss, logits, labels, lse]
        grad = m.builder.one("cross_entropy_backward", operands, attrs)
        m.push(grad, 8.0)
    m.push(loss, 2 * m.size(logits) + 3)
    m.push(lse, m.size(logits) + 3)


def _embedding(m: _Maker) -> None:
    ids = m.param(m.shape(m.rng.randint(1, 2)), "i64", 3)
    table = m.some(rank=2)
    if table.type.shape[0] < 3:
        table = m.param((m.rng.choice(SIZES[1:]), m.rng.choice(SIZES)))
    y = m.op("embedding", [ids, table], m.size(table))
    if m.rng.random() < 0.5:
        attrs: dict[str, Attr] = {"padding_idx": m.rng.choice([-1, 1])}
        m.op("embedding_backward", [m.param(y.type.shape), ids], 100.0,
             shape=table.type.shape, **attrs)  # fmt: skip


def _reshape(m: _Maker) -> None:
    x = m.some(least=1)
    shape = list(x.type.shape)
    d = m.dim(x)
    if len(shape) > 1 and d and m.rng.random() < 0.5:
        shape[d - 1 : d + 1] = [shape[d - 1] * shape[d]]
    else:
        outer = m.rng.choice([f for f in range(1, shape[d] + 1) if shape[d] % f == 0])
        shape[d : d + 1] = [outer, shape[d] // outer]
    m.op("reshape", [x], m.size(x), shape=tuple(shape))


def _permute(m: _Maker) -> None:
    x = m.some(least=2)
    rank = len(x.type.shape)
    m.op("permute", [x], m.size(x), dims=tuple(m.rng.sample(range(rank), rank)))


def _expand(m: _Maker) -> None:
    x = m.some()
    shape = tuple(m.rng.choice(SIZES) if n == 1 else n for n in x.type.shape)
    if len(shape) < 3 and m.rng.random() < 0.7:
        shape = (m.rng.choice(SIZES), *shape)
    m.op("expand", [x], m.size(x), shape=shape)


def _slice(m: _Maker) -> None:
    x = m.some(least=1)
    d = m.dim(x)
    n = x.type.shape[d]
    start = m.rng.randrange(n)
    stop, step = m.rng.randint(start + 1, n), m.rng.randint(1, 2)
    m.op("slice", [x], m.size(x), dim=d, start=start, stop=stop, step=step)


def _pad(m: _Maker) -> None:
    x = m.some(least=1)
    d, rank = m.dim(x), len(x.type.shape)
    low = tuple(m.rng.randint(0, 2) if i == d else 0 for i in range(rank))
    high = tuple(1 if i == d else 0 for i in range(rank))
    m.op("pad", [x], m.size(x), low=low, high=high, value=m.rng.choice([0.0, 1.5]))


def _concat(m: _Maker) -> None:
    x = m.some(least=1)
    d = m.dim(x)
    shape = list(x.type.shape)
    shape[d] = m.rng.choice(SIZES)
    y = m.param(tuple(shape))
    m.op("concat", m.rng.sample([x, y, x], m.rng.randint(2, 3)), m.size(x, y), dim=d)


def _flip(m: _Maker) -> None:
    x = m.some(least=1)
    m.op("flip", [x], m.size(x), dim=m.dim(x))


def _gather(m: _Maker) -> None:
    x = m.some(least=1)
    d = m.dim(x)
    shape = list(x.type.shape)
    n, shape[d] = shape[d], m.rng.choice(SIZES)
    index = m.param(tuple(shape), "i64", n)
    if m.rng.random() < 0.5:
        m.op("gather", [x, index], m.size(x), dim=d)
    else:
        source = m.param(tuple(shape))
        m.op("scatter_add", [x, index, source], m.size(x) + 32, dim=d)


def _take(m: _Maker) -> None:
    x = m.some(least=1)
    d = m.dim(x)
    index = m.param((m.rng.choice(SIZES),), "i64", x.type.shape[d])
    y = m.op("take", [x, index], m.size(x), dim=d)
    if m.rng.random() < 0.5:
        m.read.add(y.name)
        m.op("take_backward", [y, index], 8 * m.size(x), shape=x.type.shape, dim=d)


def _scan(m: _Maker) -> None:
    x = m.some(least=1)
    d = m.dim(x)
    if m.rng.random() < 0.5:
        m.op("cumsum", [x], 8 * m.size(x), dim=d)
    else:
        values, _ = m.builder.many("sort", [x], {"dim": d, "descending": m.rng.random() < 0.5})
        m.push(values, m.size(x))


def _random(m: _Maker) -> None:
    seed = m.op("fold_seed", [m.seed()], by=m.rng.randrange(9))
    if m.rng.random() < 0.5:
        x = m.some()
        m.op("dropout", [x, seed], 2 * m.size(x), p=0.4)
    else:
        m.op(m.rng.choice(["uniform", "normal"]), [seed], 6.0, shape=m.shape(2))


def _literal(m: _Maker) -> None:
    shape = m.shape(m.rng.randint(1, 2))
    values = tuple(m.rng.uniform(-2, 2) for _ in range(prod(shape)))
    m.op("literal", [], 2.0, shape=shape, values=values)


def _convolution(m: _Maker) -> None:
    n, c, o, h = (m.rng.choice(SIZES[:4]) for _ in range(4))
    x = m.some(rank=3)
    if x.type.shape[2] < 3:
        x = m.param((n, c, h + 2))
    n, c, h = x.type.shape
    groups = m.rng.choice([1, 1, 1, c])
    attrs: dict[str, Attr] = {"stride": (1,), "padding": (1,), "dilation": (1,), "groups": groups}
    o = o * groups
    w = m.param((o, c // groups, 3))
    y = m.op("convolution", [x, w], 12 * c * m.size(x), shape=(n, o, h), **attrs)
    if m.rng.random() < 0.5:
        dy = m.param(y.type.shape)
        m.op("convolution_input_grad", [dy, w], 200.0, shape=x.type.shape, **attrs)
        m.op("convolution_weight_grad", [dy, x], 200 * m.size(x), shape=w.type.shape, **attrs)


def _opaque(m: _Maker) -> None:
    x = m.some(least=1)
    m.op("aten", [x], m.size(x), shape=x.type.shape, target="aten.roll.default",
         args='["%0", [1], [0]]')  # fmt: skip


def _call(m: _Maker) -> None:
    """A call of another function, whose parameters come from the pool where they fit."""
    if not m.callees:
        return
    callee = m.rng.choice(m.callees)
    operands = []
    for param in callee.params:
        fits = [v for v in m.pool if v.type == param.type]
        if fits and m.rng.random() < 0.7:
            operands.append(m.rng.choice(fits))
            m.read.add(operands[-1].name)
        else:
            operands.append(m.param(param.type.shape, param.type.dtype))
    types = [value.type for value in callee.results]
    results = m.builder.many("call", operands, {"callee": callee.name}, types=types)
    m.extra.extend(results)


PRODUCTIONS = (
    _unary, _positive, _exp, _binary, _binary, _where, _where_iota, _reduce, _reduce, _softmax,
    _norm, _norm_backward, _linear, _linear, _products, _attention, _attention, _cross_entropy,
    _cross_entropy, _embedding, _reshape, _reshape, _permute, _expand, _slice, _pad, _concat, _flip,
    _gather, _take, _scan, _random, _literal, _convolution, _opaque, _call, _call,
)  # fmt: skip


def _grow(m: _Maker, count: int) -> None:
    m.pool.append(m.param(m.shape(m.rng.choice([1, 2, 3, 3, 4]))))
    for _ in range(count):
        m.rng.choice(PRODUCTIONS)(m)


def _update(m: _Maker) -> list[Value]:
    """An optimizer update; returns its results, in the order of the parameters they replace."""
    grad = m.some()
    shape = grad.type.shape
    p, a = (m.param(shape, role="param") for _ in range(2))
    step, lr = m.param((), role="state"), m.param((), role="lr")
    bounded = m.op("add", [m.op("abs", [step]), m.number(1.0)])
    if m.rng.random() < 0.5:
        v = m.op("abs", [m.param(shape)])
        results = m.builder.many("adamw_update", [p, grad, a, v, bounded, lr], {"eps": 0.1})[:2]
    else:
        results = m.builder.many("momentum_update", [p, grad, a, bounded, lr], {"momentum": 0.9})
    assert len(results) == 2
    return [p, a, *results]


def random_program(seed: int, ops: int = 6) -> Program:
    """A random logical module of about `ops` productions, and inputs for it."""
    rng = Random(seed)
    callees: list[Function] = []
    if rng.random() < 0.4:
        inner = _Maker(rng)
        _grow(inner, rng.randint(1, 3))
        callees.append(inner.finish("block"))
    m = _Maker(rng, callees)
    _grow(m, rng.randint(max(1, ops // 2), ops))
    updates = _update(m) if rng.random() < 0.3 else []
    entry = m.finish("main")
    if updates:
        p, a, *results = updates
        attrs = [{"role": "update", "updates": v.name} for v in (p, a)]
        entry = entry.with_(
            results=(*entry.results, *results), result_attrs=(*entry.result_attrs, *attrs)
        )
    g = Generator().manual_seed(seed)
    return Program(Module("logical", (entry, *callees)), [fill(g) for fill in m.fills])


__all__ = ["Program", "random_program"]
