"""Max pooling over windows of the spatial dims; the dims before them may be split."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import Any

from ..module import Attr, Op
from ..opdef import AttrSpec, define, full_attrs
from ..signature import Shape, Signature, SignatureError, instantiate
from ..types import TensorType

#: spatial dims -> ATen's operators
_FORWARD = {2: "max_pool2d_with_indices", 3: "max_pool3d_with_indices"}
_BACKWARD = {2: "max_pool2d_with_indices_backward", 3: "max_pool3d_with_indices_backward"}
_WINDOW = {
    "kernel": AttrSpec("ints", doc="for each spatial dim, of which there are 2 or 3"),
    "stride": AttrSpec("ints", doc="for each spatial dim"),
    "padding": AttrSpec("ints", doc="for each spatial dim, on both sides"),
    "dilation": AttrSpec("ints", doc="for each spatial dim"),
    "ceil": AttrSpec("bool", False, doc="keep a last window that is cut off"),
}


def _numbers(attrs: Mapping[str, Attr], name: str) -> tuple[int, ...]:
    value = attrs[name]
    assert isinstance(value, tuple)
    return tuple(item for item in value if isinstance(item, int))


def _pooled(size: int, kernel: int, stride: int, padding: int, dilation: int, ceil: bool) -> int:
    """How many windows of a dim there are; with `ceil` the last one starts inside."""
    room = size + 2 * padding - dilation * (kernel - 1) - 1
    count = (room + (stride - 1 if ceil else 0)) // stride + 1
    return count - int(ceil and (count - 1) * stride >= size + padding)


def _pooled_shape(shape: Shape, attrs: Mapping[str, Attr]) -> Shape:
    windows = [_numbers(attrs, name) for name in ("kernel", "stride", "padding", "dilation")]
    spatial = len(windows[0])
    if spatial not in _FORWARD or any(len(row) != spatial for row in windows):
        raise SignatureError("kernel, stride, padding and dilation have 2 or 3 numbers each")
    if len(shape) < spatial + 1:
        raise SignatureError(f"{list(shape)} has too few dims for {spatial} spatial ones")
    rows = list(zip(*windows, strict=True))
    if any(min(k, s, d) < 1 or not 0 <= 2 * p <= k for k, s, p, d in rows):
        raise SignatureError("windows are positive, and padding is at most half a window")
    ceil = bool(attrs.get("ceil", False))
    sizes = [_pooled(size, k, s, p, d, ceil)
             for size, (k, s, p, d) in zip(shape[-spatial:], rows, strict=True)]  # fmt: skip
    if any(size < 1 for size in sizes):
        raise SignatureError(f"the windows do not fit into {list(shape)}")
    return (*shape[:-spatial], *sizes)


def _signature(line: str, linear: tuple[tuple[int, ...], ...] = ()) -> Callable[..., Signature]:
    def signature(
        ins: Sequence[Shape], outs: Sequence[Shape], attrs: Mapping[str, Attr]
    ) -> Signature:
        spatial = range(len(_numbers(attrs, "kernel")))
        image, out = (" ".join(f"{name}{i}!" for i in spatial) for name in "xy")
        return instantiate(line.replace("IMAGE", image).replace("OUT", out), ins, outs, linear)

    return signature


def _first(s: Signature) -> float:
    """One operation for each element of the first operand."""
    return float(prod(s.size(name) for factors in s.operands[0] for name in factors))


def _window(c: Any) -> list[Any]:
    names = ("kernel", "stride", "padding", "dilation")
    return [*(list(c.attrs[name]) for name in names), c.attrs["ceil"]]


def _planes(x: Any, spatial: int) -> Any:
    """The tensor with one dim before its planes and the channels."""
    return x.reshape(-1, 1, *x.shape[-spatial:]) if x.dim() != spatial + 2 else x


def _max_pool(c: Any, x: Any) -> Any:
    spatial = len(c.attrs["kernel"])
    pool = getattr(c.torch.ops.aten, _FORWARD[spatial])
    y, index = pool(_planes(x, spatial), *_window(c))
    shape = (*x.shape[:-spatial], *y.shape[-spatial:])
    return y.reshape(shape), index.reshape(shape)


def _max_pool_backward(c: Any, dy: Any, x: Any, index: Any) -> Any:
    spatial = len(c.attrs["kernel"])
    pool = getattr(c.torch.ops.aten, _BACKWARD[spatial])
    planes = (_planes(tensor, spatial) for tensor in (dy, x))
    return pool(*planes, *_window(c), _planes(index, spatial)).reshape(x.shape)


def _types(ins: Sequence[TensorType], attrs: Mapping[str, Attr]) -> list[TensorType]:
    shape = _pooled_shape(ins[0].shape, attrs)
    return [TensorType(ins[0].dtype, shape), TensorType("i64", shape)]


def _backward_verify(op: Op) -> str:
    dy, x, index = (value.type.shape for value in op.operands)
    try:
        wanted = _pooled_shape(x, full_attrs(op.name, op.attrs))
    except SignatureError as error:
        return str(error)
    fits = dy == index == wanted
    return "" if fits else f"the windows give {list(wanted)}, not {list(dy)} and {list(index)}"


define(name="max_pool", family="row", dtypes="f", flops=_first, attrs=_WINDOW, types=_types,
       doc="maximum of each window, and where in its plane the first one is: x -> y, index",
       signature=_signature("a... IMAGE -> a... OUT, a... OUT"), ref=_max_pool)  # fmt: skip
define(name="max_pool_backward", family="row", dtypes="FFi", flops=_first, attrs=_WINDOW,
       verify=_backward_verify, linear=((0,),),
       doc="gradient of max_pool: (dy, x, index) -> dx",
       signature=_signature("a... OUT, a... IMAGE, a... OUT -> a... IMAGE", ((0,),)),
       types=lambda ins, attrs: [ins[1]], ref=_max_pool_backward)  # fmt: skip
