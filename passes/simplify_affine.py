"""Integer tensors that are affine in the digits of their indices, of any size, without data.

Positions, masks and index arithmetic of traced models are such tensors: `iota`, its reshapes and
broadcasts, sums, multiples, and what is gathered from one at another. An `Affine` says

    x[i0, i1, ...] = offset + sum over the factors (size, step) of all dims of  digit * step

where the index of each dim is written in the mixed radix of its factors, major first; a dim of size
1 has none. Plain affine functions have one factor a dim; `reshape` makes several of one, or one of
several. The factors are canonical (neighbours that read as one are merged), so equal tensors
compare equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

#: (size, step), size > 1
Factor = tuple[int, int]
Factors = tuple[Factor, ...]


@dataclass(frozen=True)
class Affine:
    """A tensor by its offset and, for each dim, its factors. A float offset has steps of 0 only."""

    offset: bool | int | float
    dims: tuple[Factors, ...]

    @property
    def uniform(self) -> bool:
        """Do all elements equal the offset?"""
        return all(step == 0 for factors in self.dims for _, step in factors)

    @property
    def shape(self) -> tuple[int, ...]:
        """The tensor's shape."""
        return tuple(prod(size for size, _ in factors) for factors in self.dims)

    @property
    def low(self) -> int:
        """The smallest element of an integer tensor."""
        steps = (step * (size - 1) for factors in self.dims for size, step in factors)
        return int(self.offset) + sum(step for step in steps if step < 0)

    @property
    def high(self) -> int:
        """The largest element of an integer tensor."""
        steps = (step * (size - 1) for factors in self.dims for size, step in factors)
        return int(self.offset) + sum(step for step in steps if step > 0)


def uniform(value: bool | int | float, shape: Sequence[int]) -> Affine:
    """A tensor filled with one value. A dim of size 0 has one factor of that size."""
    return Affine(value, tuple(((size, 0),) if size != 1 else () for size in shape))


def ramp(start: int, step: int, dim: int, shape: Sequence[int]) -> Affine:
    """start + step * (position along `dim`)."""
    dims = [((size, step if d == dim else 0),) if size != 1 else () for d, size in enumerate(shape)]
    return Affine(start, tuple(dims))


def canonical(factors: Sequence[Factor]) -> Factors:
    """The same digits with neighbours merged where they read as one."""
    out: list[Factor] = []
    for size, step in factors:
        if size == 1:
            continue
        if out and out[-1][1] == step * size:
            out[-1] = (out[-1][0] * size, step)
        else:
            out.append((size, step))
    return tuple(out)


def _cut(factors: list[Factor], size: int) -> list[Factor] | None:
    """Take the minor factors that make up `size` off the end of a list, major first."""
    taken: list[Factor] = []
    while size > 1:
        if not factors:
            return None
        count, step = factors.pop()
        if size % count == 0:
            taken.append((count, step))
            size //= count
        elif count % size == 0:
            factors.append((count // size, step * size))
            taken.append((size, step))
            size = 1
        else:
            return None
    return taken[::-1]


def reshape(x: Affine, shape: Sequence[int]) -> Affine | None:
    """The same elements in another shape; None where the digits do not line up."""
    if x.uniform:
        return uniform(x.offset, shape)
    factors = [factor for dim in x.dims for factor in dim]
    dims: list[Factors] = []
    for size in reversed(shape):
        taken = _cut(factors, size)
        if taken is None:
            return None
        dims.append(canonical(taken))
    return Affine(x.offset, tuple(reversed(dims)))


def expand(x: Affine, shape: Sequence[int]) -> Affine:
    """Repeat dims of size 1, and new leading dims."""
    extra = len(shape) - len(x.dims)
    dims = [
        x.dims[d - extra] if d >= extra and x.dims[d - extra] else ((size, 0),) if size != 1 else ()
        for d, size in enumerate(shape)
    ]
    return Affine(x.offset, tuple(dims))


def combine(x: Affine, y: Affine, scale_x: int, scale_y: int, offset: int | float) -> Affine | None:
    """scale_x * x + scale_y * y of tensors that broadcast, with a given offset."""
    rank = max(len(x.dims), len(y.dims))
    dims: list[Factors] = []
    for d in range(-rank, 0):
        left = x.dims[d] if -d <= len(x.dims) else ()
        right = y.dims[d] if -d <= len(y.dims) else ()
        merged = _refine(left, right)
        if merged is None:
            return None
        dims.append(canonical([(size, scale_x * a + scale_y * b) for size, a, b in merged]))
    return Affine(offset, tuple(dims))


def _refine(left: Factors, right: Factors) -> list[tuple[int, int, int]] | None:
    """The common digits of two dims as (size, left step, right step); one may be broadcast."""
    if not left or not right:
        return [(size, step if left else 0, 0 if left else step) for size, step in left or right]
    a, b = list(left), list(right)
    out: list[tuple[int, int, int]] = []
    while a and b:
        (n, s), (m, t) = a.pop(), b.pop()
        size = min(n, m)
        if size == 0 or n % size or m % size:
            return None
        out.append((size, s, t))
        if n > size:
            a.append((n // size, s * size))
        if m > size:
            b.append((m // size, t * size))
    return out[::-1] if not a and not b else None


def scale(x: Affine, by: int) -> Affine:
    """x * by, for integers."""
    dims = [canonical([(size, step * by) for size, step in factors]) for factors in x.dims]
    return Affine(int(x.offset) * by, tuple(dims))


def divide(x: Affine, by: int) -> tuple[Affine, Affine] | None:
    """(x // by, x % by) of integers by a positive one; None where digits do not line up.

    Digits whose step is a multiple of `by` make the quotient; the others must stay below it.
    """
    dims = [[part for factor in factors for part in _cut_step(factor, by)] for factors in x.dims]
    above, rest = divmod(int(x.offset), by)
    high = [canonical([(n, s // by if s % by == 0 else 0) for n, s in dim]) for dim in dims]
    low = [canonical([(n, s if s % by else 0) for n, s in dim]) for dim in dims]
    quotient, remainder = Affine(above, tuple(high)), Affine(rest, tuple(low))
    return (quotient, remainder) if remainder.low >= 0 and remainder.high < by else None


def _cut_step(factor: Factor, by: int) -> list[Factor]:
    """A factor cut where its digits reach `by`."""
    size, step = factor
    if step > 0 and by % step == 0 and step < by and size % (by // step) == 0:
        return [(size // (by // step), by), (by // step, step)]
    return [factor]


def slice_dim(x: Affine, dim: int, start: int, step: int, count: int) -> Affine | None:
    """`count` elements start, start + step, ... of a dim."""
    factors = x.dims[dim]
    if count == 1:
        fixed = _at(factors, start)
        kept: Factors = ()
    elif len(factors) == 1:
        fixed = start * factors[0][1]
        kept = ((count, factors[0][1] * step),)
    elif start == 0 and step == 1 and count == prod(size for size, _ in factors):
        return x
    else:
        return None
    offset = x.offset if not fixed else int(x.offset) + fixed
    return Affine(offset, (*x.dims[:dim], kept, *x.dims[dim + 1 :]))


def _at(factors: Factors, index: int) -> int:
    """What a dim adds at an index."""
    total = 0
    for size, step in reversed(factors):
        index, digit = divmod(index, size)
        total += digit * step
    return total


def concat(parts: Sequence[Affine], dim: int) -> Affine | None:
    """Tensors joined along a dim, if they continue each other."""
    first = parts[0]
    sizes = [part.shape[dim] for part in parts]
    if all(part.uniform for part in parts):
        step = 0 if len({part.offset for part in parts}) == 1 else None
    else:
        known = [part.dims[dim] for part in parts if part.dims[dim]]
        step = known[0][0][1] if known and len(known[0]) == 1 else None
    if step is None and sizes[0] == 1:
        step = int(parts[1].offset) - int(first.offset)
    position = 0
    for part, size in zip(parts, sizes, strict=True):
        others = (*part.dims[:dim], *part.dims[dim + 1 :])
        if others != (*first.dims[:dim], *first.dims[dim + 1 :]) or step is None:
            return None
        if size != 1 and part.dims[dim] != ((size, step),):
            return None
        if part.offset != (first.offset if step == 0 else int(first.offset) + step * position):
            return None
        position += size
    joined = canonical([(position, step or 0)])
    return Affine(first.offset, (*first.dims[:dim], joined, *first.dims[dim + 1 :]))


def compose(x: Factors, index: Affine) -> tuple[int, tuple[Factors, ...]] | None:
    """What a dim with factors `x` adds at each element of `index`: (offset, factors of its dims).

    The digits of the index must map to digits of the dim without carries; None otherwise. All
    elements of the index are in range.
    """
    weights: list[tuple[int, int, int]] = []  # (weight, size, step), minor first
    weight = 1
    for size, step in reversed(x):
        weights.append((weight, size, step))
        weight *= size
    highest = [0] * len(weights)
    offset = _at(x, int(index.offset))
    for k, (weight, size, _) in enumerate(weights):
        highest[k] = int(index.offset) // weight % size
    dims: list[Factors] = []
    for factors in index.dims:
        out: list[Factor] = []
        todo = list(factors)
        while todo:
            size, step = todo.pop()
            if step == 0:
                out.append((size, 0))
                continue
            k = max((k for k, (w, _, _) in enumerate(weights) if step % w == 0), default=-1)
            if step < 0 or k < 0:
                return None
            weight, limit, gain = weights[k]
            stride = step // weight
            if highest[k] + stride * (size - 1) < limit:
                highest[k] += stride * (size - 1)
                out.append((size, gain * stride))
            elif limit % stride == 0 and size % (limit // stride) == 0 and size * stride > limit:
                inner = limit // stride  # this digit wraps: the rest counts in the next one
                todo += [(size // inner, step * inner), (inner, step)]
            else:
                return None
        dims.append(canonical(out[::-1]))
    return offset, tuple(dims)
