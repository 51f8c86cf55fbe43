"""ATen entries: contractions, convolutions, attention."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

from ..ir.module import Attr, Value
from .aten import Lowering, Number, Unsupported, aten

_BATCH = "abcdefgh"


def _einsum(c: Lowering, spec: str, x: Value, y: Value) -> Value:
    return c.emit("einsum", [x, y], {"spec": spec})


@aten("linear.default")
def linear(c: Lowering, x: Value, weight: Value, bias: Value | None = None) -> Value:
    if len(weight.type.shape) == 1:
        raise Unsupported("linear with a vector")
    rows = " ".join(_BATCH[: len(x.type.shape) - 1])
    y = _einsum(c, f"{rows} k, n k -> {rows} n".strip(), x, weight)
    return y if bias is None else c.emit("add", [y, bias])


@aten("mm.default")
def mm(c: Lowering, x: Value, y: Value) -> Value:
    return _einsum(c, "m k, k n -> m n", x, y)


@aten("bmm.default")
def bmm(c: Lowering, x: Value, y: Value) -> Value:
    return _einsum(c, "b m k, b k n -> b m n", x, y)


@aten("mv.default")
def mv(c: Lowering, x: Value, y: Value) -> Value:
    return _einsum(c, "m k, k -> m", x, y)


@aten("dot.default")
def dot(c: Lowering, x: Value, y: Value) -> Value:
    return c.reduce(c.emit("mul", [x, y]), [0])


@aten("matmul.default")
def matmul(c: Lowering, x: Value, y: Value) -> Value:
    left, right = x.type.shape, y.type.shape
    if len(left) == 1 and len(right) == 1:
        return dot(c, x, y)  # type: ignore[no-any-return]
    if len(left) == 1 or len(right) == 1 or len(right) == 2:
        rows = " ".join(_BATCH[: max(len(left) - 1, 0)])
        if len(left) == 1:
            batch = " ".join(_BATCH[: len(right) - 2])
            return _einsum(c, f"k, {batch} k n -> {batch} n", x, y)
        column, out = ("k", "") if len(right) == 1 else ("k n", "n")
        return _einsum(c, f"{rows} k, {column} -> {rows} {out}".strip(), x, y)
    batch_shape = c.out.shape[:-2]
    x = c.expand(x, (*batch_shape, *left[-2:])) if len(left) > 2 else x
    y = c.expand(y, (*batch_shape, *right[-2:]))
    batch = " ".join(_BATCH[: len(batch_shape)])
    own = batch if len(left) > 2 else ""
    return _einsum(c, f"{own} m k, {batch} k n -> {batch} m n".strip(), x, y)


def _plus(
    c: Lowering, bias: Value, product: Value, beta: Number, alpha: Number
) -> Value:
    if alpha != 1:
        product = c.apply("mul", product, alpha)
    if beta == 0:
        return product
    bias = c.apply("mul", bias, beta) if beta != 1 else bias
    return c.emit("add", [product, bias])


@aten("addmm.default")
def addmm(
    c: Lowering, bias: Value, x: Value, y: Value, *, beta: Number = 1, alpha: Number = 1
) -> Value:
    # GPT-2's Conv1D flattens (b, s) for this op; undo that, so that both dims may be split
    source = c.definition(x)
    if source is not None and source.name == "reshape":
        whole = source.operands[0]
        shape = whole.type.shape
        if len(shape) > 2 and shape[-1] == x.type.shape[-1]:
            rows = " ".join(_BATCH[: len(shape) - 1])
            product = _einsum(c, f"{rows} k, k n -> {rows} n", whole, y)
            if len(bias.type.shape) <= 1:
                return c.reshape(_plus(c, bias, product, beta, alpha), c.out.shape)
            return _plus(c, bias, c.reshape(product, c.out.shape), beta, alpha)
    return _plus(c, bias, mm(c, x, y), beta, alpha)


@aten("baddbmm.default")
def baddbmm(
    c: Lowering, bias: Value, x: Value, y: Value, *, beta: Number = 1, alpha: Number = 1
) -> Value:
    return _plus(c, bias, bmm(c, x, y), beta, alpha)


@aten("addmv.default")
def addmv(
    c: Lowering, bias: Value, x: Value, y: Value, *, beta: Number = 1, alpha: Number = 1
) -> Value:
    return _plus(c, bias, mv(c, x, y), beta, alpha)


@aten("einsum.default")
def einsum(c: Lowering, equation: str, operands: Sequence[Value], path: Any = None) -> Value:
    left, arrow, out = equation.replace(" ", "").partition("->")
    terms = left.split(",")
    if "." in equation or any(len(set(term)) != len(term) for term in terms):
        raise Unsupported("einsum with an ellipsis or a diagonal")
    if not arrow:
        letters = sorted(set(left) - {","})
        out = "".join(x for x in letters if left.count(x) == 1)
    value, term = operands[0], terms[0]
    for index in range(1, len(terms)):
        kept = set(out).union(*terms[index + 1 :])
        value, term = _alone(c, value, term, kept | set(terms[index]))
        other, name = _alone(c, operands[index], terms[index], kept | set(term))
        last = index == len(terms) - 1
        result = out if last else "".join(x for x in dict.fromkeys(term + name) if x in kept)
        spec = f"{' '.join(term)}, {' '.join(name)} -> {' '.join(result)}"
        value, term = _einsum(c, spec, value, other), result
    value, term = _alone(c, value, term, set(out))
    return c.permute(value, [term.index(x) for x in out])


def _alone(c: Lowering, x: Value, term: str, kept: set[str]) -> tuple[Value, str]:
    """Sum over the dims that nothing else has."""
    dims = [d for d, letter in enumerate(term) if letter not in kept]
    return c.reduce(x, dims), "".join(letter for letter in term if letter in kept)


def sizes_of(values: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One number for each spatial dim."""
    listed = [values] if isinstance(values, int) else list(values)
    return tuple(listed * rank if len(listed) == 1 else listed)


def _window(stride: Any, padding: Any, dilation: Any, rank: int) -> dict[str, Attr]:
    return {"stride": sizes_of(stride, rank), "padding": sizes_of(padding, rank),
            "dilation": sizes_of(dilation, rank)}  # fmt: skip


def per_channel(c: Lowering, bias: Value, rank: int) -> Value:
    return c.reshape(bias, [bias.type.shape[0], *[1] * rank])


@aten("convolution.default")
def convolution(
    c: Lowering, x: Value, weight: Value, bias: Value | None, stride: Any, padding: Any,
    dilation: Any, transposed: bool, output_padding: Any, groups: int,
) -> Value:  # fmt: skip
    rank = len(weight.type.shape) - 2
    if len(x.type.shape) != rank + 2:
        raise Unsupported("convolution of one image without a batch dim")
    attrs = {**_window(stride, padding, dilation, rank), "groups": groups}
    # a transposed convolution is the gradient of one for its image
    name = "convolution_input_grad" if transposed else "convolution"
    y = c.emit(name, [x, weight], attrs, c.out)
    return y if bias is None else c.emit("add", [y, per_channel(c, bias, rank)])


@aten("conv1d.default", "conv2d.default", "conv3d.default")
def conv(
    c: Lowering, x: Value, weight: Value, bias: Value | None = None, stride: Any = 1,
    padding: Any = 0, dilation: Any = 1, groups: int = 1,
) -> Value:  # fmt: skip
    return convolution(c, x, weight, bias, stride, padding, dilation, False, 0, groups)  # type: ignore[no-any-return]




def _unrepeated(c: Lowering, x: Value) -> Value:
    """Heads before they were repeated for grouped queries: the op groups heads itself.

    Sees `(b g t d) -> (b g 1 t d) -> expand (b g r t d) -> (b (g r) t d)`.
    """
    merged = c.definition(x)
    if merged is None or merged.name != "reshape":
        return x
    spread = c.definition(merged.operands[0])
    if spread is None or spread.name != "expand":
        return x
    narrow, wide = spread.operands[0], spread.result.type.shape
    shape = narrow.type.shape
    if len(wide) != 5 or len(shape) != 5 or shape[2] != 1:
        return x
    if shape[:2] + shape[3:] != wide[:2] + wide[3:]:
        return x
    if x.type.shape != (wide[0], wide[1] * wide[2], *wide[3:]):
        return x
    return c.reshape(narrow, shape[:2] + shape[3:])


def _four(c: Lowering, x: Value) -> Value:
    """Batch dims folded into one, a missing head dim added."""
    shape = x.type.shape
    if len(shape) == 3:
        return c.reshape(x, (shape[0], 1, *shape[1:]))
    return c.reshape(x, (prod(shape[:-3]), *shape[-3:]))


@aten("scaled_dot_product_attention.default")
def attention(
    c: Lowering, query: Value, key: Value, value: Value, attn_mask: Value | None = None,
    dropout_p: float = 0.0, is_causal: bool = False, *, scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:  # fmt: skip
    if len(query.type.shape) < 3:
        raise Unsupported("attention without a batch dim")
    width = query.type.shape[-1]
    attrs: dict[str, Attr] = {"causal": is_causal, "scale": width**-0.5 if scale is None else scale}
    q, k, v = _four(c, query), _four(c, key), _four(c, value)
    plain_k, plain_v = _unrepeated(c, k), _unrepeated(c, v)
    if plain_k.type.shape[:2] == plain_v.type.shape[:2]:
        k, v = plain_k, plain_v
    operands = [q, k, v]
    if attn_mask is not None:
        shape = attn_mask.type.shape
        if len(shape) > 4 or len(query.type.shape) != 4:
            raise Unsupported("a mask with several batch dims")
        operands.append(c.reshape(attn_mask, (1,) * (4 - len(shape)) + shape))
        attrs["mask"] = True
    if dropout_p:
        operands.append(c.seed())
        attrs["dropout"] = dropout_p
    out, _ = c.many("attention", operands, attrs)
    return c.reshape(out, c.out.shape)
