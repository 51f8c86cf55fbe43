"""Row-wise ops: the last dim is whole, or combined by log-sum-exp."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..module import Attr, Op
from ..opdef import AttrSpec, define
from ..types import B, P, TensorType


def _same(ins: Sequence[TensorType], attrs: Mapping[str, Attr]) -> Sequence[TensorType]:
    return [ins[0]]


def _rows(ins: Sequence[TensorType], attrs: Mapping[str, Attr]) -> Sequence[TensorType]:
    return [TensorType(ins[0].dtype, ins[0].shape[:-1])]


define(name="softmax", family="row", flops_per_point=12,
       doc="exp(x) / sum of exp(x) along the last dim",
       signature="a... n! -> a... n!", types=_same, ref=lambda c, x: x.softmax(-1))  # fmt: skip
define(name="softmax_backward", family="row", flops_per_point=4,
       doc="gradient of softmax from its result: (dy, y) -> dx",
       signature="a... n!, a... n! -> a... n!", types=_same, linear=((0,),),
       ref=lambda c, dy, y: c.torch.ops.aten._softmax_backward_data(
           dy, y, -1, y.dtype))  # fmt: skip
define(name="log_softmax", family="row", flops_per_point=12, doc="x - log(sum of exp(x))",
       signature="a... n! -> a... n!", types=_same, ref=lambda c, x: x.log_softmax(-1))  # fmt: skip
define(name="log_softmax_backward", family="row", flops_per_point=10,
       doc="gradient of log_softmax from its result: (dy, y) -> dx",
       signature="a... n!, a... n! -> a... n!", types=_same, linear=((0,),),
       ref=lambda c, dy, y: c.torch.ops.aten._log_softmax_backward_data(
           dy, y, -1, y.dtype))  # fmt: skip
define(name="logsumexp", family="row", flops_per_point=10, doc="log(sum of exp(x)) of the last dim",
       signature="a... n -> a... ; n=lse", types=_rows, lse_results=(B,),
       ref=lambda c, x: x.logsumexp(-1))  # fmt: skip


def _layer_norm(c: Any, x: Any, weight: Any, bias: Any) -> Any:
    wide = c.dtype(1)  # f32 for narrow floats, where the CPU kernel would give narrow statistics
    out, mean, rstd = c.torch.ops.aten.native_layer_norm(
        x.to(wide), x.shape[-1:], weight.to(wide), bias.to(wide), c.attrs["eps"]
    )
    return out.to(x.dtype), mean, rstd


def _layer_norm_types(ins: Sequence[TensorType], attrs: Mapping[str, Attr]) -> list[TensorType]:
    stats = TensorType("f32" if ins[0].dtype != "f64" else "f64", (*ins[0].shape[:-1], 1))
    return [TensorType(ins[0].dtype, ins[0].shape), stats, stats]


def _layer_norm_backward(c: Any, dy: Any, x: Any, weight: Any, mean: Any, rstd: Any) -> Any:
    # the CPU kernel reads mean and rstd as if they were contiguous, whatever their strides
    mean, rstd, wide = mean.contiguous(), rstd.contiguous(), rstd.dtype
    w = weight.to(wide)
    dx, dw, db = c.torch.ops.aten.native_layer_norm_backward(
        dy.to(wide), x.to(wide), x.shape[-1:], mean, rstd, w, w, [True, True, True]
    )
    return dx.to(x.dtype), dw.to(weight.dtype), db.to(weight.dtype)


def _stats_verify(op: Op) -> str:
    wrong = [value for value in op.operands[3:] if value.type.shape[-1] != 1]
    return f"statistics of rows have a last dim of size 1, not {wrong[0].type}" if wrong else ""


_EPS = {"eps": AttrSpec("float", 1e-5, doc="added to avoid a division by 0")}
define(name="layer_norm", family="row", dtypes="f", flops_per_point=8, attrs=_EPS,
       doc="(x - mean) * rstd * weight + bias over the last dim; also mean and rstd of each row",
       signature="a... n!, n!, n! -> a... n!, a... one!, a... one!",
       types=_layer_norm_types, ref=_layer_norm)  # fmt: skip
define(name="layer_norm_backward", family="row", dtypes="f", verify=_stats_verify, flops_per_point=14,
       doc="gradients of layer_norm: (dy, x, weight, mean, rstd) -> dx, dweight, dbias",
       signature="a... n!, a... n!, n!, a... one!, a... one! -> a... n!, n!, n! ; a=sum",
       linear=((0,),), types=lambda ins, attrs: [ins[1], ins[2], ins[2]],
       ref=_layer_norm_backward)  # fmt: skip


def _rms_norm(c: Any, x: Any, weight: Any) -> Any:
    wide = x if x.dtype == c.torch.float64 else x.float()
    rstd = (wide.square().mean(-1, keepdim=True) + c.attrs["eps"]).rsqrt()
    return (wide * rstd).to(x.dtype) * weight, rstd


def _rms_norm_backward(c: Any, dy: Any, x: Any, weight: Any, rstd: Any) -> Any:
    wide = rstd.dtype
    hat = x.to(wide) * rstd
    g = (dy * weight).to(wide)
    dx = rstd * (g - hat * (g * hat).mean(-1, keepdim=True))
    rows = tuple(range(x.dim() - 1))
    dw = (dy.to(wide) * hat).sum(rows) if rows else dy.to(wide) * hat
    return dx.to(x.dtype), dw.to(weight.dtype)


define(name="rms_norm", family="row", dtypes="f", flops_per_point=6, attrs=_EPS,
       doc="x * rsqrt(mean(x * x) + eps) * weight over the last dim; also the factor of each row",
       signature="a... n!, n! -> a... n!, a... one!",
       types=lambda ins, attrs: _layer_norm_types(ins, attrs)[:2], ref=_rms_norm)  # fmt: skip
define(name="rms_norm_backward", family="row", dtypes="f", verify=_stats_verify, flops_per_point=10,
       doc="gradients of rms_norm: (dy, x, weight, rstd) -> dx, dweight",
       signature="a... n!, a... n!, n!, a... one! -> a... n!, n! ; a=sum",
       linear=((0,),), types=lambda ins, attrs: [ins[1], ins[2]], ref=_rms_norm_backward)  # fmt: skip


def _pick(c: Any, logits: Any, labels: Any) -> tuple[Any, Any, Any]:
    """(index of the label in this rank's columns, does this rank have it, is it to be ignored)."""
    local = labels - c.offset("n")
    here = (local >= 0) & (local < logits.shape[-1])
    return local.clamp(0, logits.shape[-1] - 1), here, labels == c.attrs["ignore_index"]


def _cross_entropy(c: Any, logits: Any, labels: Any) -> Any:
    index, here, ignored = _pick(c, logits, labels)
    lse = logits.to(c.dtype(1)).logsumexp(-1)
    picked = logits.gather(-1, index.unsqueeze(-1)).squeeze(-1).to(lse.dtype)
    loss = c.torch.where(here, -picked, c.torch.zeros_like(picked))
    if logits.shape[-1] == c.size("n"):
        loss = loss + lse
    return loss.masked_fill(ignored, 0.0).to(logits.dtype), lse


def _cross_entropy_backward(c: Any, dloss: Any, logits: Any, labels: Any, lse: Any) -> Any:
    index, here, ignored = _pick(c, logits, labels)
    grad = (logits - lse.unsqueeze(-1)).exp()
    grad.scatter_add_(-1, index.unsqueeze(-1), -here.to(grad.dtype).unsqueeze(-1))
    return (grad * dloss.masked_fill(ignored, 0.0).unsqueeze(-1)).to(logits.dtype)


def _cross_entropy_types(ins: Sequence[TensorType], attrs: Mapping[str, Attr]) -> list[TensorType]:
    dtype, rows = ins[0].dtype, ins[0].shape[:-1]
    return [TensorType(dtype, rows), TensorType("f64" if dtype == "f64" else "f32", rows)]


_IGNORE = {"ignore_index": AttrSpec("int", -100, doc="label of rows to leave out")}
define(name="cross_entropy", family="row", dtypes="fi", flops_per_point=12, attrs=_IGNORE,
       doc="-log softmax(logits)[label] of each row, 0 where the label is ignored; also the "
           "log-sum-exp of each row in at least f32. A part of n gives the term -logit[label] if "
           "it has the label, and its own log-sum-exp: `lower` adds the total log-sum-exp to one "
           "of the terms",
       signature="a... n, a... -> a..., a... ; n=lse", lse_results=(P("sum"), B),
       types=_cross_entropy_types,
       ref=_cross_entropy)  # fmt: skip
define(name="cross_entropy_backward", family="row", dtypes="ffif", flops_per_point=10, attrs=_IGNORE,
       doc="gradient of cross_entropy: (dloss, logits, labels, lse) -> dlogits",
       signature="a..., a... n, a..., a... -> a... n", linear=((0,),),
       types=lambda ins, attrs: [ins[1]], ref=_cross_entropy_backward)  # fmt: skip
