"""Contractions: matrix products in einsum notation, and convolutions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..module import Attr, Op
from ..opdef import AttrSpec, define, full_attrs
from ..signature import Shape, Signature, SignatureError, instantiate, parse_signature
from ..types import TensorType
from .product import product_of


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
        here = [name for item in tensor for name in item.names]
        plain = all(len(i.names) == 1 and not i.variadic and not i.whole for i in tensor)
        if not plain or len(set(here)) != len(here):
            return "an einsum spec has plain dims only, each at most once in a tensor"
    names = {n for tensor in template.operands for item in tensor for n in item.names}
    if any(name not in names for item in template.results[0] for name in item.names):
        return "a result dim of the einsum spec is in no operand"
    return ""


def _einsum_ref(c: Any, x: Any, y: Any) -> Any:
    return c.once(_bound, x, y)(x, y)


def _bound(c: Any, x: Any, y: Any) -> Callable[[Any, Any], Any]:
    return product_of(c.torch, c.attrs["spec"], tuple(x.shape), tuple(y.shape))


define(
    name="einsum", family="contraction", flops_per_point=2.0,
    doc="Product of two tensors, summed over the dims that the result lacks: matrix products, "
        "batched or not, with any operand transposed. `spec` is the signature itself.",
    signature=_einsum, types=_einsum_types, verify=_einsum_verify,
    linear=((0,), (1,)),
    attrs={"spec": AttrSpec("str", doc="e.g. `b s k, n k -> b s n`")},
    ref=_einsum_ref,
)  # fmt: skip

_CONV = {
    "stride": AttrSpec("ints", doc="for each spatial dim"),
    "padding": AttrSpec("ints", doc="for each spatial dim, on both sides"),
    "dilation": AttrSpec("ints", doc="for each spatial dim"),
    "groups": AttrSpec("int", 1, doc="groups of channels"),
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


def _ints(value: Attr) -> tuple[int, ...]:
    """The numbers of an attribute of kind `ints`."""
    assert isinstance(value, tuple)
    return tuple(item for item in value if isinstance(item, int))


def _conv_verify(image: int, kernel: int, out: int) -> Callable[[Op], str]:
    """Check the sizes of a convolution; the arguments say which of (operands, result) is which."""

    def verify(op: Op) -> str:
        attrs = full_attrs(op.name, op.attrs)
        shapes = [value.type.shape for value in (*op.operands, *op.results)]
        windows = [_ints(attrs[name]) for name in ("stride", "padding", "dilation")]
        spatial = len(shapes[image]) - 2
        if any(len(window) != spatial for window in windows):
            return f"stride, padding and dilation need {spatial} numbers each"
        columns = [shapes[image][2:], shapes[kernel][2:], shapes[out][2:], *windows]
        for row in zip(*columns, strict=True):
            size, taps, result, stride, padding, dilation = row
            if stride < 1 or dilation < 1 or padding < 0:
                return "stride and dilation are positive, padding is not negative"
            wanted = (size + 2 * padding - dilation * (taps - 1) - 1) // stride + 1
            if result != wanted:
                return f"{size} pixels and {taps} taps give {wanted} pixels, not {result}"
        (groups,), channels = _ints((attrs["groups"],)), shapes[kernel][1]
        if groups < 1 or shapes[image][1] != channels * groups or shapes[kernel][0] % groups:
            return f"the channels do not fit {groups} groups"
        return ""

    return verify


define(
    name="convolution", family="contraction", flops_per_point=2.0,
    doc="Convolution of an image with a kernel, any number of spatial dims.",
    signature=_conv("n Ci IMAGE, Co Ci KERNEL -> n Co OUT ; ci=sum", ((0,), (1,))),
    linear=((0,), (1,)), attrs=_CONV, verify=_conv_verify(0, 1, 2),
    ref=lambda c, x, w: c.torch.ops.aten.convolution(x, w, None, *_conv_args(c)),
)  # fmt: skip
define(
    name="convolution_input_grad", family="contraction", flops_per_point=2.0,
    doc="Gradient of convolution for its image: (dy, w) -> dx.",
    signature=_conv("n Co OUT, Co Ci KERNEL -> n Ci IMAGE ; co=sum", ((0,), (1,))),
    linear=((0,), (1,)), attrs=_CONV, verify=_conv_verify(2, 1, 0),
    ref=lambda c, dy, w: c.torch.ops.aten.convolution_backward(
        dy, dy.new_empty(c.shape()), w, None, *_conv_args(c), [True, False, False])[0],
)  # fmt: skip
define(
    name="convolution_weight_grad", family="contraction", flops_per_point=2.0,
    doc="Gradient of convolution for its kernel: (dy, x) -> dw.",
    signature=_conv("n Co OUT, n Ci IMAGE -> Co Ci KERNEL ; n=sum", ((0,), (1,))),
    linear=((0,), (1,)), attrs=_CONV, verify=_conv_verify(1, 2, 0),
    ref=lambda c, dy, x: c.torch.ops.aten.convolution_backward(
        dy, x, x.new_empty(c.shape()), None, *_conv_args(c), [False, True, False])[1],
)  # fmt: skip
