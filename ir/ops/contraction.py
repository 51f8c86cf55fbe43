"""Contractions: matrix products in einsum notation, and convolutions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import Any

from ..module import Attr, Op
from ..opdef import AttrSpec, define
from ..signature import Shape, Signature, SignatureError, instantiate, parse_signature
from ..types import TensorType


def _spec(attrs: Mapping[str, Attr]) -> str:
    return str(attrs["spec"])


def _einsum(ins: Sequence[Shape], outs: Sequence[Shape], attrs: Mapping[str, Attr]) -> Signature:
    spec = _spec(attrs)
    template = parse_signature(spec)
    names = {n for tensor in template.operands for item in tensor for n in item.names}
    kept = {n for tensor in template.results for item in tensor for n in item.names}
    reduced = sorted(names - kept)
    text = spec + (" ; " + ", ".join(f"{n}=sum" for n in reduced) if reduced else "")
    return instantiate(text, ins, outs, ((0,), (1,)))


def _einsum_types(ins: Sequence[TensorType], attrs: Mapping[str, Attr]) -> Sequence[TensorType]:
    template = parse_signature(_spec(attrs))
    sizes: dict[str, int] = {}
    for items, tensor in zip(template.operands, ins, strict=True):
        for item, size in zip(items, tensor.shape, strict=True):
            sizes[item.names[0]] = size
    shape = tuple(sizes[item.names[0]] for item in template.results[0])
    return [TensorType(ins[0].dtype, shape)]


def _einsum_verify(op: Op) -> str:
    try:
        template = parse_signature(_spec(op.attrs))
    except SignatureError as error:
        return str(error)
    for tensor in (*template.operands, *template.results):
        names = [name for item in tensor for name in item.names]
        plain = all(len(i.names) == 1 and not i.variadic and not i.whole for i in tensor)
        if not plain or len(set(names)) != len(names):
            return "an einsum spec has plain dims only, each at most once in a tensor"
    names = {n for tensor in template.operands for item in tensor for n in item.names}
    if any(name not in names for item in template.results[0] for name in item.names):
        return "a result dim of the einsum spec is in no operand"
    return ""


@dataclass(frozen=True)
class _Product:
    """How an einsum becomes one matrix product: computed once per spec.

    `x` is brought to (batch, rows, inner) and `y` to (batch, inner, columns) by a permutation and
    a grouping of dims; dims that only one operand has and the result lacks are summed first.
    """

    sums: tuple[tuple[int, ...], tuple[int, ...]]
    orders: tuple[tuple[int, ...], tuple[int, ...]]
    counts: tuple[int, int, int, int]  #: numbers of batch, row, column and inner dims
    result: tuple[int, ...]  #: permutation of (batch, rows, columns) dims to the result's


@lru_cache(maxsize=None)
def _product(spec: str) -> _Product:
    template = parse_signature(spec)
    x, y = ([item.names[0] for item in items] for items in template.operands)
    out = [item.names[0] for item in template.results[0]]
    batch = [n for n in out if n in x and n in y]
    rows = [n for n in out if n not in y]
    columns = [n for n in out if n not in x]
    inner = [n for n in x if n in y and n not in out]
    sums = tuple(
        tuple(d for d, n in enumerate(own) if n not in other and n not in out)
        for own, other in ((x, y), (y, x))
    )
    x, y = ([n for n in own if n in other or n in out] for own, other in ((x, y), (y, x)))
    made = batch + rows + columns
    return _Product(
        (sums[0], sums[1]),
        (tuple(map(x.index, batch + rows + inner)), tuple(map(y.index, batch + inner + columns))),
        (len(batch), len(rows), len(columns), len(inner)),
        tuple(map(made.index, out)),
    )


def _is_identity(order: tuple[int, ...]) -> bool:
    return order == tuple(range(len(order)))


def einsum(x: Any, y: Any, spec: str) -> Any:
    """The product that a spec names, as one (batched) matrix product: `torch.einsum`, but nothing
    is parsed twice, and matrices that are already matrices are not reshaped."""
    plan = _product(spec)
    batch, rows, columns, inner = plan.counts
    tensors = [x, y]
    for i in (0, 1):
        if plan.sums[i]:
            tensors[i] = tensors[i].sum(plan.sums[i])
        if not _is_identity(plan.orders[i]):
            tensors[i] = tensors[i].permute(plan.orders[i])
    x, y = tensors
    if not inner and not (rows and columns):  # no sum: an elementwise product
        out = x.reshape(*x.shape, *(1,) * columns) * y.reshape(
            *y.shape[:batch], *(1,) * rows, *y.shape[batch:])
    else:
        shape = (*x.shape[: batch + rows], *y.shape[batch + inner :])
        if plan.counts[1:] != (1, 1, 1) or batch > 1:
            lead = (prod(x.shape[:batch]),) if batch else ()
            m, k = prod(x.shape[batch : batch + rows]), prod(x.shape[batch + rows :])
            x = x.reshape(*lead, m, k)
            y = y.reshape(*lead, k, prod(y.shape[batch + inner :]))
        out = x @ y
        if out.shape != shape:
            out = out.reshape(shape)
    return out if _is_identity(plan.result) else out.permute(plan.result)


define(
    name="einsum", family="contraction", flops_per_point=2.0,
    doc="Product of two tensors, summed over the dims that the result lacks: matrix products, "
        "batched or not, with any operand transposed. `spec` is the signature itself.",
    signature=_einsum, types=_einsum_types, verify=_einsum_verify,
    linear=((0,), (1,)),
    attrs={"spec": AttrSpec("str", doc="e.g. `b s k, n k -> b s n`")},
    ref=lambda c, x, y: einsum(x, y, c.attrs["spec"]),
)  # fmt: skip

_CONV = {
    "stride": AttrSpec("ints"), "padding": AttrSpec("ints"), "dilation": AttrSpec("ints"),
    "groups": AttrSpec("int", 1),
}  # fmt: skip


def _conv_args(c: object) -> tuple[list[int], list[int], list[int], bool, list[int], int]:
    attrs = c.attrs  # type: ignore[attr-defined]
    stride, padding, dilation = (list(attrs[k]) for k in ("stride", "padding", "dilation"))
    return stride, padding, dilation, False, [0] * len(stride), attrs["groups"]


def _windows(ins: Sequence[Shape], attrs: Mapping[str, Attr], line: str) -> str:
    """Spell the windowed dims out for the number of spatial dims; groups keep channels whole."""
    spatial = len(attrs["stride"])  # type: ignore[arg-type]
    image = " ".join(f"(y{i}*p{i})" for i in range(spatial))
    kernel = " ".join(f"p{i}!" for i in range(spatial))
    out = " ".join(f"y{i}!" for i in range(spatial))
    line = line.replace("IMAGE", image).replace("KERNEL", kernel).replace("OUT", out)
    if attrs.get("groups", 1) != 1:
        return line.replace("Ci", "ci!", 1).replace("Ci", "cg!").replace("Co", "co!")
    return line.replace("Ci", "ci").replace("Co", "co")


def _conv(line: str, linear: tuple[tuple[int, ...], ...]):  # type: ignore[no-untyped-def]
    def signature(
        ins: Sequence[Shape], outs: Sequence[Shape], attrs: Mapping[str, Attr]
    ) -> Signature:
        text = _windows(ins, attrs, line)
        body, _, combine = text.partition(";")
        if attrs.get("groups", 1) != 1:  # grouped channels are whole: nothing of them to combine
            combine = ", ".join(p for p in combine.split(",") if p.strip().startswith("n="))
        return instantiate(body + ";" + combine, ins, outs, linear)

    return signature


define(
    name="convolution", family="contraction", flops_per_point=2.0,
    doc="Convolution of an image with a kernel, any number of spatial dims.",
    signature=_conv("n Ci IMAGE, Co Ci KERNEL -> n Co OUT ; ci=sum", ((0,), (1,))),
    linear=((0,), (1,)), attrs=_CONV,
    ref=lambda c, x, w: c.torch.ops.aten.convolution(x, w, None, *_conv_args(c)),
)  # fmt: skip
define(
    name="convolution_input_grad", family="contraction", flops_per_point=2.0,
    doc="Gradient of convolution for its image: (dy, w) -> dx.",
    signature=_conv("n Co OUT, Co Ci KERNEL -> n Ci IMAGE ; co=sum", ((0,), (1,))),
    linear=((0,), (1,)), attrs=_CONV,
    ref=lambda c, dy, w: c.torch.ops.aten.convolution_backward(
        dy, dy.new_empty(c.shape()), w, None, *_conv_args(c), [True, False, False])[0],
)  # fmt: skip
define(
    name="convolution_weight_grad", family="contraction", flops_per_point=2.0,
    doc="Gradient of convolution for its kernel: (dy, x) -> dw.",
    signature=_conv("n Co OUT, n Ci IMAGE -> Co Ci KERNEL ; n=sum", ((0,), (1,))),
    linear=((0,), (1,)), attrs=_CONV,
    ref=lambda c, dy, x: c.torch.ops.aten.convolution_backward(
        dy, x, x.new_empty(c.shape()), None, *_conv_args(c), [False, True, False])[1],
)  # fmt: skip
