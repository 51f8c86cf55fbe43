"""An einsum of two operands as one (batched) matrix product with views around it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

from ..signature import Shape, parse_signature


def _arrange(have: list[str], want: list[str], shape: list[int], sizes: Mapping[str, int]) -> Any:
    """A function that permutes dims `have` to `want` and reshapes to `shape`; None: no change."""
    order = [have.index(name) for name in want]
    steps: list[Callable[[Any], Any]] = []
    if order == [1, 0]:
        steps.append(lambda t: t.t())
    elif order != sorted(order):
        steps.append(lambda t: t.permute(order))
    if shape != [sizes[name] for name in want]:
        steps.append(lambda t: t.reshape(shape))
    return _chain(steps)


def _chain(steps: list[Callable[[Any], Any]]) -> Any:
    if len(steps) < 2:
        return steps[0] if steps else None
    first, second = steps[0], _chain(steps[1:])
    return lambda t: second(first(t))


def _multiply(product: Any, left: Any, right: Any, last: Any) -> Callable[[Any, Any], Any]:
    """product(left(x), right(y)), then `last`; None stands for the identity."""
    inner = product
    if left and right:
        inner = lambda x, y: product(left(x), right(y))  # noqa: E731
    elif left:
        inner = lambda x, y: product(left(x), y)  # noqa: E731
    elif right:
        inner = lambda x, y: product(x, right(y))  # noqa: E731
    return (lambda x, y: last(inner(x, y))) if last else inner


def product_of(torch: Any, spec: str, x_shape: Shape, y_shape: Shape) -> Callable[[Any, Any], Any]:
    """The einsum of a spec on operands of given shapes, as a function of the operands.

    It is one (batched) matrix product with views around it. Everything that depends on the spec
    and shapes is found out here, so that a call costs little more than the product itself.
    """
    template = parse_signature(spec)
    x, y = ([item.names[0] for item in items] for items in template.operands)
    out = [item.names[0] for item in template.results[0]]
    alone = [
        [d for d, n in enumerate(own) if n not in other and n not in out]
        for own, other in ((x, y), (y, x))
    ]
    if alone[0] or alone[1]:  # dims that only one operand has are summed before the product
        return _presummed(torch, (x, y, out), alone, x_shape, y_shape)
    batch = [n for n in out if n in x and n in y]
    free = [n for n in out if n not in batch]
    if free and free[0] in y:  # the operand whose dims come first in the result is the left one
        swapped = product_of(torch, f"{' '.join(y) or '_'}, {' '.join(x) or '_'} -> "
                                    f"{' '.join(out)}", y_shape, x_shape)  # fmt: skip
        return lambda a, b: swapped(b, a)
    return _product(torch, x, y, out, dict(zip((*x, *y), (*x_shape, *y_shape), strict=True)))


def _product(
    torch: Any, x: list[str], y: list[str], out: list[str], sizes: Mapping[str, int]
) -> Callable[[Any, Any], Any]:
    """`product_of` for operands of which every dim is shared or kept."""
    batch = [n for n in out if n in x and n in y]
    free = [n for n in out if n not in batch]
    rows, columns = ([n for n in free if n in own] for own in (x, y))
    inner = [n for n in x if n in y and n not in out]

    def of(names: list[str]) -> list[int]:
        return [sizes[name] for name in names]

    last = _arrange(batch + rows + columns, out, of(out), sizes)
    if not inner and not (rows and columns):  # nothing is summed: elementwise
        left = _arrange(x, batch + rows, of(batch + rows) + [1] * len(columns), sizes)
        spread = [*of(batch), *[1] * len(rows), *of(columns)]
        right = _arrange(y, batch + columns, spread, sizes)
        return _multiply(torch.mul, left, right, last)
    k = prod(of(inner))
    if not batch:
        left = _arrange(x, rows + inner, [*of(rows), k], sizes)
        wide = [prod(of(columns))] if columns else []
        if rows and columns and y == columns + inner:  # as torch stores a weight
            right, product = _arrange(y, y, [*wide, k], sizes), torch.nn.functional.linear
        else:
            right, product = _arrange(y, inner + columns, [k, *wide], sizes), torch.matmul
        if len(columns) > 1:
            whole = of(rows + columns)
            last = _chain([lambda t: t.reshape(whole), *([last] if last else [])])
        return _multiply(product, left, right, last)
    plain = len(rows) == len(columns) == len(inner) == 1
    lead = of(batch) if plain else [prod(of(batch))]
    left = _arrange(x, batch + rows + inner, [*lead, prod(of(rows)), k], sizes)
    right = _arrange(y, batch + inner + columns, [*lead, k, prod(of(columns))], sizes)
    if not plain:
        whole = of(batch + rows + columns)
        last = _chain([lambda t: t.reshape(whole), *([last] if last else [])])
    return _multiply(torch.matmul, left, right, last)


def _presummed(
    torch: Any, names: tuple[list[str], ...], alone: list[list[int]], *shapes: Shape
) -> Callable[[Any, Any], Any]:
    """`product_of` after summing the dims `alone` of each operand."""
    kept = [[d for d in range(len(own)) if d not in gone]
            for own, gone in zip(names, alone, strict=False)]  # fmt: skip
    texts = [" ".join(own[d] for d in dims) or "_" for own, dims in zip(names, kept, strict=False)]
    spec = f"{texts[0]}, {texts[1]} -> {' '.join(names[2]) or '_'}"
    left, right = (tuple(shape[d] for d in dims) for shape, dims in zip(shapes, kept, strict=True))
    product = product_of(torch, spec, left, right)
    sums = [(lambda t, d=dims: t.sum(d)) if dims else None for dims in alone]
    return _multiply(product, sums[0], sums[1], None)
