"""Hypothesis strategies: random valid logical programs, and random modules for the text form."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from hypothesis import strategies as st

from weft.ir.builder import Builder
from weft.ir.module import LEVELS, Attr, Function, Location, Module, Op, Value
from weft.ir.opdef import AttrSpec
from weft.ir.ops import OPS
from weft.ir.types import COMBINES, DTYPES, B, Mesh, P, S, TensorType

SIZES = (1, 2, 3, 4, 6)

# -- valid logical programs ------------------------------------------------------------------------

_UNARY = ("neg", "abs", "exp", "sin", "tanh", "relu", "silu", "gelu", "sigmoid")
_BINARY = ("add", "sub", "mul", "maximum", "minimum")
_COMPARE = ("lt", "ge", "eq")


class _Programs:
    """Draws one program: each `make_*` method appends ops to the builder, or returns nothing."""

    def __init__(self, draw: st.DrawFn, dtype: str) -> None:
        self.draw, self.dtype = draw, dtype
        self.b = Builder()
        self.floats: list[Value] = []

    def pick(self, rank: int = 0) -> Value:
        """A float value of at least this rank; a new parameter if there is none."""
        known = [value for value in self.floats if len(value.type.shape) >= rank]
        if known and self.draw(st.integers(0, 3)):
            return self.draw(st.sampled_from(known))
        shape = self.draw(st.lists(st.sampled_from(SIZES), min_size=rank, max_size=max(rank, 3)))
        return self.param(shape)

    def param(self, shape: Sequence[int], dtype: str = "") -> Value:
        """A new parameter; i64 ones hold indices below 2."""
        value = self.b.param(TensorType(dtype or self.dtype, tuple(shape)), role="input")
        if not dtype:
            self.floats.append(value)
        return value

    def size(self) -> int:
        return self.draw(st.sampled_from(SIZES))

    def dim(self, value: Value) -> int:
        return self.draw(st.integers(0, len(value.type.shape) - 1))

    def dims(self, value: Value) -> tuple[int, ...]:
        every = range(len(value.type.shape))
        return tuple(d for d in every if self.draw(st.booleans()))

    def unary(self) -> list[Value]:
        return [self.b.one(self.draw(st.sampled_from(_UNARY)), [self.pick()])]

    def binary(self) -> list[Value]:
        """Two operands that broadcast: the second has some dims of size 1, or fewer dims."""
        x = self.pick()
        shape = [size if self.draw(st.integers(0, 3)) else 1 for size in x.type.shape]
        y = self.like(tuple(shape[self.draw(st.integers(0, len(shape))) :]))
        return [self.b.one(self.draw(st.sampled_from(_BINARY)), [x, y])]

    def like(self, shape: tuple[int, ...]) -> Value:
        """A float value of this shape."""
        known = [value for value in self.floats if value.type.shape == shape]
        return self.draw(st.sampled_from(known)) if known else self.param(shape)

    def where(self) -> list[Value]:
        x = self.pick()
        y = self.like(x.type.shape)
        mask = self.b.one(self.draw(st.sampled_from(_COMPARE)), [x, y])
        return [self.b.one("where", [mask, y, x])]

    def matmul(self) -> list[Value]:
        x = self.pick(2)
        rank = len(x.type.shape)
        if rank == 3 and self.draw(st.booleans()):
            w = self.like((x.type.shape[0], x.type.shape[-1], self.size()))
            spec = "b m k, b k n -> b m n"
        else:
            w = self.like((self.size(), x.type.shape[-1]))
            rows = " ".join(f"m{i}" for i in range(rank - 1))
            spec = f"{rows} k, n k -> {rows} n"
        return [self.b.one("einsum", [x, w], {"spec": spec})]

    def reduce(self) -> list[Value]:
        x = self.pick()
        name = self.draw(st.sampled_from(("reduce_sum", "reduce_max", "reduce_min")))
        attrs = {"dims": self.dims(x), "keepdim": self.draw(st.booleans())}
        return [self.b.one(name, [x], attrs)]

    def reshape(self) -> list[Value]:
        """Merge two neighbours, or split a dim in two."""
        x = self.pick(1)
        shape, d = list(x.type.shape), self.dim(x)
        if self.draw(st.booleans()) and d:
            shape[d - 1 : d + 1] = [shape[d - 1] * shape[d]]
        else:
            factors = [f for f in range(1, shape[d] + 1) if shape[d] % f == 0]
            f = self.draw(st.sampled_from(factors))
            shape[d : d + 1] = [f, shape[d] // f]
        return [self.b.one("reshape", [x], types=[TensorType(self.dtype, tuple(shape))])]

    def permute(self) -> list[Value]:
        x = self.pick()
        order = self.draw(st.permutations(range(len(x.type.shape))))
        return [self.b.one("permute", [x], {"dims": tuple(order)})]

    def expand(self) -> list[Value]:
        x = self.pick()
        shape = tuple(3 if s == 1 and self.draw(st.booleans()) else s for s in x.type.shape)
        shape = (2, *shape) if len(shape) < 3 and self.draw(st.booleans()) else shape
        return [self.b.one("expand", [x], types=[TensorType(self.dtype, shape)])]

    def slice(self) -> list[Value]:
        x = self.pick(1)
        d = self.dim(x)
        start = self.draw(st.integers(0, x.type.shape[d] - 1))
        stop = self.draw(st.integers(start + 1, x.type.shape[d]))
        step = self.draw(st.integers(1, 2))
        return [self.b.one("slice", [x], {"dim": d, "start": start, "stop": stop, "step": step})]

    def pad(self) -> list[Value]:
        x = self.pick(1)
        rank = len(x.type.shape)
        low, high = (
            tuple(self.draw(st.integers(0, 2)) for _ in range(rank)) for _ in range(2)
        )
        return [self.b.one("pad", [x], {"low": low, "high": high, "value": 0.0})]

    def concat(self) -> list[Value]:
        x = self.pick(1)
        y = self.like(x.type.shape)
        return [self.b.one("concat", [x, y], {"dim": self.dim(x)})]

    def row(self) -> list[Value]:
        x = self.pick(1)
        name = self.draw(st.sampled_from(("softmax", "log_softmax", "logsumexp")))
        return [self.b.one(name, [x])]

    def norm(self) -> list[Value]:
        x = self.pick(1)
        weight = self.like(x.type.shape[-1:])
        if self.draw(st.booleans()):
            return [self.b.many("rms_norm", [x, weight], {"eps": 1e-2})[0]]
        return [self.b.many("layer_norm", [x, weight, weight], {"eps": 1e-2})[0]]

    def cumsum(self) -> list[Value]:
        x = self.pick(1)
        return [self.b.one("cumsum", [x], {"dim": self.dim(x)})]

    def sort(self) -> list[Value]:
        x = self.pick(1)
        return [self.b.many("sort", [x], {"dim": self.dim(x)})[0]]

    def embedding(self) -> list[Value]:
        table = self.like((self.draw(st.sampled_from((2, 4, 6))), self.size()))
        ids = self.param((self.size(), 2), "i64")
        return [self.b.one("embedding", [ids, table])]

    def cross_entropy(self) -> list[Value]:
        logits = self.like((self.size(), self.draw(st.sampled_from((2, 4, 6)))))
        labels = self.param(logits.type.shape[:1], "i64")
        return [self.b.many("cross_entropy", [logits, labels])[0]]

    def attention(self) -> list[Value]:
        b, s, t, d = (self.draw(st.sampled_from((1, 2, 4))) for _ in range(4))
        g, r = (self.draw(st.sampled_from((1, 2))) for _ in range(2))
        q, k = self.like((b, g * r, s, d)), self.like((b, g, t, d))
        causal = self.draw(st.booleans()) and s == t
        attrs: dict[str, Attr] = {"causal": causal, "scale": 0.5}
        return [self.b.many("attention", [q, k, k], attrs)[0]]

    def convolution(self) -> list[Value]:
        x = self.like((self.draw(st.sampled_from((1, 2))), 2, 4, 4))
        w = self.like((self.draw(st.sampled_from((2, 4))), 2, 3, 3))
        attrs: dict[str, Attr] = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1)}
        shape = (x.type.shape[0], w.type.shape[0], 4, 4)
        type = TensorType(self.dtype, shape)
        return [self.b.one("convolution", [x, w], attrs, types=[type])]

    def creation(self) -> list[Value]:
        shape = tuple(self.draw(st.lists(st.sampled_from(SIZES), min_size=1, max_size=3)))
        type = TensorType(self.dtype, shape)
        if self.draw(st.booleans()):
            return [self.b.one("iota", [], {"dim": len(shape) - 1}, types=[type])]
        return [self.b.constant(0.5, type)]

    def random(self) -> list[Value]:
        seed = self.b.constant(7, TensorType("i64", ()))
        x = self.pick(1)
        if self.draw(st.booleans()):
            return [self.b.one("dropout", [x, seed], {"p": 0.5})]
        return [self.b.one("uniform", [seed], types=[x.type])]

    def program(self, most: int) -> Module:
        makers = [
            self.unary, self.binary, self.where, self.matmul, self.reduce, self.reshape,
            self.permute, self.expand, self.slice, self.pad, self.concat, self.row, self.norm,
            self.cumsum, self.sort, self.embedding, self.cross_entropy, self.attention,
            self.convolution, self.creation, self.random,
        ]  # fmt: skip
        for _ in range(self.draw(st.integers(1, most))):
            made = self.draw(st.sampled_from(makers))()
            # small values only: sizes multiply through expand and concat
            self.floats += [value for value in made if prod(value.type.shape) <= 1024]
        results = [self.b.ops[-1].results[0]]
        results += [v for v in self.floats[-3:] if v not in results and v not in self.b.params]
        entry = self.b.function("main", results, [{"role": "output"}] * len(results))
        return Module("logical", (entry,))


@st.composite
def programs(draw: st.DrawFn, most: int = 8, dtype: str = "f64") -> Module:
    """A valid logical module of one function with at most about `most` ops.

    i64 parameters are indices into dims of size 2 or more; all others have the given float dtype.
    """
    return _Programs(draw, dtype).program(most)


# -- modules for the text form ---------------------------------------------------------------------

_WORDS = st.sampled_from(("x", "w0", "layers.0.mlp", "a b", "é", "", '"', "\\", "%", "@3", "split",
                          "true", "nan", "attrs", "return", "\n", "0", "\ud800"))  # fmt: skip
_TEXT = st.one_of(_WORDS, st.text(max_size=6))
_INTS = st.integers(-(2**63), 2**64 - 1)
_FLOATS = st.floats(allow_nan=False)
_VALUES: st.SearchStrategy[Attr] = st.recursive(
    st.one_of(st.booleans(), _INTS, _FLOATS, _TEXT),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=6,
)
_ATTRS = st.dictionaries(_TEXT, _VALUES, max_size=3)
_PLACEMENTS = st.one_of(
    st.just(B), st.integers(0, 9).map(S), st.sampled_from(COMBINES).map(P)
)
_TYPES = st.builds(
    TensorType,
    st.sampled_from(tuple(DTYPES)),
    st.lists(st.integers(0, 2**63 - 1), max_size=3).map(tuple),
    st.none() | st.lists(_PLACEMENTS, max_size=3).map(tuple),
)
_LOCATIONS = st.builds(Location, _TEXT, _TEXT, st.integers(-1, 2**40))
_STATES = st.one_of(_TEXT, st.sampled_from(("b", "partial(0)", "partial(0, 12)", "partial(x)")))
_KINDS: dict[str, st.SearchStrategy[Attr]] = {
    "int": _INTS, "float": st.one_of(_INTS, _FLOATS), "bool": st.booleans(), "str": _TEXT,
    "ints": st.lists(_INTS, max_size=3).map(tuple), "any": _VALUES,
}  # fmt: skip


def _op_attrs(specs: dict[str, AttrSpec]) -> st.SearchStrategy[dict[str, Attr]]:
    kinds = {name: _KINDS[spec.kind] for name, spec in specs.items()}
    return st.fixed_dictionaries({}, optional=kinds)


@st.composite
def _functions(draw: st.DrawFn, name: str) -> Function:
    names = iter(draw(st.lists(_TEXT, unique=True, min_size=8, max_size=16)))
    params = tuple(Value(next(names), type) for type in draw(st.lists(_TYPES, max_size=2)))
    values, ops = list(params), []
    for op in draw(st.lists(st.sampled_from(tuple(OPS)), max_size=3)):
        operands = draw(st.lists(st.sampled_from(values), max_size=3)) if values else []
        types = draw(st.lists(_TYPES, max_size=2))
        results = tuple(Value(next(names), type) for type in types)
        ops.append(
            Op(op, tuple(operands), results, draw(_op_attrs(dict(OPS[op].attrs))),
               draw(st.dictionaries(_TEXT, _STATES, max_size=2)),
               draw(st.just(Location()) | _LOCATIONS))
        )  # fmt: skip
        values += results
    returned = tuple(draw(st.lists(st.sampled_from(values), max_size=2)) if values else ())
    return Function(
        name, params, tuple(ops), returned, tuple(draw(_ATTRS) for _ in params),
        tuple(draw(_ATTRS) for _ in returned), draw(_ATTRS),
    )  # fmt: skip


@st.composite
def raw_modules(draw: st.DrawFn) -> Module:
    """A module in SSA form that need not make any other sense, at any level."""
    names = draw(st.lists(_TEXT, unique=True, max_size=3))
    axes = draw(st.dictionaries(_TEXT, st.integers(1, 9), max_size=3))
    mesh = draw(st.none() | _TEXT.map(lambda device: Mesh(tuple(axes.items()), device)))
    functions = tuple(draw(_functions(name)) for name in names)
    return Module(draw(st.sampled_from(LEVELS)), functions, mesh, draw(_ATTRS))
