"""Random chains in one iteration space: large kernels of every walk. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory

from hypothesis import given, settings
from hypothesis import strategies as st
from tests.codegen.kit import program, run_and_compare, samples
from tests.codegen.programs import cast, rotate_half, scalar, tensor

from weft.codegen.emit import kernel_functions
from weft.ir.builder import Builder
from weft.ir.module import Module, Value
from weft.passes.fuse import fuse


class Chain:
    """Grows a chain of ops over values of shape `rows + (n,)`, which stay of about size 1."""

    def __init__(self, b: Builder, rng: Random, dtype: str) -> None:
        self.b, self.rng, self.dtype = b, rng, dtype
        self.rows = tuple(rng.choice((1, 2, 3, 5)) for _ in range(rng.randint(1, 3)))
        self.n = rng.choice((2, 6, 10, 34))
        self.shape = (*self.rows, self.n)
        self.pool = [b.param(tensor(dtype, *self.shape), "x")]

    def some(self) -> Value:
        pool = self.pool
        return pool[max(self.rng.randrange(len(pool)), self.rng.randrange(len(pool)))]

    def partner(self) -> Value:
        """A value of the pool, or a new operand: a vector, a row of scalars, one scalar."""
        kind = self.rng.randrange(6)
        shape = {0: (self.n,), 1: (*self.rows, 1), 2: (self.rows[-1], self.n), 3: (1,)}.get(kind)
        return self.some() if shape is None else self.b.param(tensor(self.dtype, *shape), "p")

    def grow(self) -> None:
        """Add one value."""
        steps = (self.unary, self.binary, self.binary, self.row, self.statistic, self.rotate,
                 self.mask, self.half)  # fmt: skip
        self.pool.append(self.rng.choice(steps)())

    def unary(self) -> Value:
        return self.b.one(
            self.rng.choice(("tanh", "sigmoid", "silu", "gelu", "sin")), [self.some()]
        )

    def binary(self) -> Value:
        name = self.rng.choice(("add", "sub", "mul", "maximum"))
        operands = self.rng.sample([self.some(), self.partner()], 2)
        types = [tensor(self.dtype, *self.shape)]
        return self.b.one("tanh", [self.b.one(name, operands, types=types)])

    def row(self) -> Value:
        name = self.rng.choice(("softmax", "rms_norm", "softmax_backward"))
        if name == "rms_norm":
            weight = self.b.param(tensor(self.dtype, self.n), "w")
            y, _ = self.b.many(name, [self.some(), weight], {"eps": 1e-2})
            return self.b.one("tanh", [y])
        return self.b.one(name, [self.some() for _ in range(1 + name.endswith("backward"))])

    def statistic(self) -> Value:
        """x minus its mean, the mean without the column for a while."""
        x, last = self.some(), len(self.rows)
        total = self.b.one("reduce_sum", [x], {"dims": (last,), "keepdim": False})
        mean = self.b.one("mul", [total, scalar(self.b, 1 / self.n, self.dtype)])
        mean = self.b.one("reshape", [mean], types=[tensor(self.dtype, *self.rows, 1)])
        wide = self.b.one("expand", [mean], types=[x.type])
        return self.b.one("sub", [x, wide])

    def rotate(self) -> Value:
        return rotate_half(self.b, self.some())

    def mask(self) -> Value:
        """Some columns kept, by their position."""
        at = self.b.one("iota", [], {"dim": 0}, types=[tensor("i64", self.n)])
        keep = self.b.one("le", [at, scalar(self.b, self.n // 2, "i64")])
        x = self.some()
        return self.b.one("where", [keep, x, scalar(self.b, 0.5, self.dtype)], types=[x.type])

    def half(self) -> Value:
        """The first half of the columns, put behind a padding."""
        x, last = self.some(), len(self.rows)
        part = self.b.one("slice", [x], {"dim": last, "start": 0, "stop": self.n // 2})
        low = (*(0 for _ in self.rows), self.n - self.n // 2)
        high = tuple(0 for _ in low)
        part = self.b.one("tanh", [part])
        return self.b.one("pad", [part], {"low": low, "high": high, "value": 0.25})


def chain(seed: int, dtype: str, length: int) -> Module:
    def make(b: Builder) -> list[Value]:
        grown = Chain(b, Random(seed), dtype)
        for _ in range(length):
            grown.grow()
        results = [grown.pool[-1], grown.some()]
        if dtype == "f32":
            results.append(cast(b, results[0], "bf16"))
        rows = tuple(range(len(grown.rows)))
        results.append(b.one("reduce_sum", [results[0]], {"dims": rows}))
        return list({value.name: value for value in results}.values())

    return program(make)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["f64", "f32"]), st.sampled_from([1, 8192]))
def test_a_random_chain_equals_its_reference(seed: int, dtype: str, persistent: int) -> None:
    with TemporaryDirectory() as folder:
        for function in kernel_functions(fuse(chain(seed, dtype, 8))):
            inputs = samples(function, seed)
            run_and_compare(function, inputs, Path(folder), persistent=persistent)


def test_the_random_chains_become_large_kernels_of_every_walk() -> None:
    seen: Counter[str] = Counter()
    for seed in range(40):
        for function in kernel_functions(fuse(chain(seed, "f32", 8))):
            seen["large"] += len(function.ops) >= 15
            seen["row sums"] += any(len(v.type.shape) == 1 for v in function.results)
    assert seen["large"] >= 20 and seen["row sums"] >= 10
