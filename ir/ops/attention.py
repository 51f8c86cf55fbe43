"""Attention: grouped heads, causal, masks, dropout; a split of `t` is combined by log-sum-exp."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..module import Attr, Op
from ..opdef import AttrSpec, define
from ..signature import Shape, Signature, instantiate
from ..types import B, P, TensorType
from .creation import PART, random_words, to_uniform

_Q, _K, _V, _OUT = "b (g r) s d", "b g t d", "b g t e", "b (g r) s e"
_MASK, _LSE = "b? (g r)? s? t?", "b (g r) s"
_ATTRS = {
    "causal": AttrSpec("bool", False, "query i sees keys j <= i"),
    "scale": AttrSpec("float", doc="factor of the scores"),
    "mask": AttrSpec("bool", False, "a mask operand follows v: bool (may see) or added scores"),
    "dropout": AttrSpec("float", 0.0, "probability; above 0 a seed operand comes last"),
    **PART,
}


def _extra(attrs: Mapping[str, Attr]) -> str:
    return (f", {_MASK}" if attrs.get("mask") else "") + (", _" if attrs.get("dropout") else "")


def _forward(ins: Sequence[Shape], outs: Sequence[Shape], attrs: Mapping[str, Attr]) -> Signature:
    line = f"{_Q}, {_K}, {_V}{_extra(attrs)} -> {_OUT}, {_LSE} ; t=lse"
    return instantiate(line, ins, outs, (), (P("sum"), B))


def _backward(ins: Sequence[Shape], outs: Sequence[Shape], attrs: Mapping[str, Attr]) -> Signature:
    line = f"{_OUT}, {_Q}, {_K}, {_V}, {_OUT}, {_LSE}{_extra(attrs)} -> {_Q}, {_K}, {_V}"
    return instantiate(line + " ; t=sum, s=sum", ins, outs)


def _scores(c: Any, q: Any, k: Any, mask: Any) -> Any:
    """Scores (b, g, r, s, t) in at least float32, masked ones at -inf."""
    wide = c.torch.promote_types(q.dtype, c.torch.float32)
    b, h, s, d = q.shape
    g, t = k.shape[1], k.shape[2]
    scores = (q.to(wide).reshape(b, g, h // g, s, d) * c.attrs["scale"]) @ (
        k.to(wide).transpose(-1, -2).unsqueeze(2)
    )
    if c.attrs["causal"]:
        rows = c.torch.arange(s, device=q.device).unsqueeze(-1) + c.offset("s")
        columns = c.torch.arange(t, device=q.device) + c.offset("t")
        scores = scores.masked_fill(columns > rows, float("-inf"))
    if mask is not None:
        heads = mask.unsqueeze(2) if mask.shape[1] == 1 else mask.unflatten(1, (g, h // g))
        if mask.dtype == c.torch.bool:
            scores = scores.masked_fill(~heads, float("-inf"))
        else:
            scores = scores + heads.to(wide)
    return scores


def _keep(c: Any, shape: tuple[int, ...], seed: Any) -> Any:
    """Dropout factors of the probabilities, by the logical position (b, h, s, t)."""
    b, g, r, s, t = shape
    index = c.torch.zeros((), dtype=c.torch.int64, device=seed.device)
    heads = c.size("g") * c.size("r")
    head = c.offset("g") * c.size("r") + c.offset("r")
    starts = (c.offset("b"), head, c.offset("s"), c.offset("t"))
    totals = (c.size("b"), heads, c.size("s"), c.size("t"))
    for count, start, total in zip((b, g * r, s, t), starts, totals, strict=True):
        index = (index * total).unsqueeze(-1) + c.torch.arange(count, device=seed.device) + start
    word, _ = random_words(c, seed, index.reshape(b, g, r, s, t))
    p = c.attrs["dropout"]
    return (to_uniform(c.torch, word) >= p) * (1.0 / (1.0 - p) if p < 1 else 0.0)


def _split(c: Any, rest: Sequence[Any]) -> tuple[Any, Any]:
    mask = rest[0] if c.attrs["mask"] else None
    return mask, rest[-1] if c.attrs["dropout"] else None


def _flash(c: Any, q: Any, k: Any, v: Any) -> bool:
    """Can PyTorch's fused CPU kernel compute this op, and may it?

    It aligns causal rows and columns at their first ones, knows one head size, and has no dropout.
    """
    a = c.attrs
    return (
        c.fused and q.device.type == "cpu" and q.dtype != c.torch.float64
        and not a["mask"] and not a["dropout"] and q.shape[-1] == v.shape[-1]
        and not (a["causal"] and (c.offset("s") or c.offset("t")))
    )  # fmt: skip


def _attention(c: Any, q: Any, k: Any, v: Any, *rest: Any) -> Any:
    if c.once(_flash, q, k, v):
        flash = c.torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
        return flash(q, k, v, 0.0, c.attrs["causal"], scale=c.attrs["scale"])
    mask, seed = _split(c, rest)
    scores = _scores(c, q, k, mask)
    lse = scores.logsumexp(-1)
    # a row that sees nothing has lse = -inf; its probabilities are 0, not NaN
    probs = (scores - lse.masked_fill(lse.isinf(), 0.0).unsqueeze(-1)).exp()
    if seed is not None:
        probs = probs * _keep(c, tuple(probs.shape), seed).to(probs.dtype)
    out = probs @ v.to(probs.dtype).unsqueeze(2)
    b, h, s, _ = q.shape
    return out.reshape(b, h, s, v.shape[-1]).to(q.dtype), lse.reshape(b, h, s)


def _attention_backward(
    c: Any, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any, *rest: Any
) -> Any:
    if c.once(_flash, q, k, v):
        return _flash_backward(c, dout, q, k, v, out, lse)
    mask, seed = _split(c, rest)
    scores = _scores(c, q, k, mask)
    b, g, r, s, t = scores.shape
    wide = scores.dtype
    lse = lse.reshape(b, g, r, s, 1)
    probs = (scores - lse.masked_fill(lse.isinf(), 0.0)).exp()
    grad = dout.to(wide).reshape(b, g, r, s, -1)
    delta = (grad * out.to(wide).reshape(grad.shape)).sum(-1, keepdim=True)
    dprobs = grad @ v.to(wide).transpose(-1, -2).unsqueeze(2)
    dropped = probs
    if seed is not None:
        keep = _keep(c, tuple(probs.shape), seed).to(wide)
        dprobs, dropped = dprobs * keep, probs * keep
    dscores = probs * (dprobs - delta) * c.attrs["scale"]
    dq = (dscores @ k.to(wide).unsqueeze(2)).reshape(q.shape)
    dk = (dscores.transpose(-1, -2) @ q.to(wide).reshape(b, g, r, s, -1)).sum(2)
    dv = (dropped.transpose(-1, -2) @ grad).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def _flash_backward(c: Any, dout: Any, q: Any, k: Any, v: Any, out: Any, lse: Any) -> Any:
    flash = c.torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    groups, repeats = k.shape[1], q.shape[1] // k.shape[1]
    if repeats > 1:  # this kernel wants as many key heads as query heads
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
    dq, dk, dv = flash(dout, q, k, v, out, lse, 0.0, c.attrs["causal"], scale=c.attrs["scale"])
    if repeats > 1:
        dk, dv = (x.unflatten(1, (groups, repeats)).sum(2) for x in (dk, dv))
    return dq, dk, dv


def _flops(products: float) -> Callable[[Signature], float]:
    """Each product contracts (s, t) with a head dim; d and e never appear in one product."""

    def flops(s: Signature) -> float:
        pairs = s.size("b") * s.size("g") * s.size("r") * s.size("s") * s.size("t")
        return products * pairs * (s.size("d") + s.size("e"))

    return flops


def _types(ins: Sequence[TensorType], attrs: Mapping[str, Attr]) -> Sequence[TensorType]:
    q, v = ins[0], ins[2]
    wide = "f64" if q.dtype == "f64" else "f32"
    return [TensorType(q.dtype, (*q.shape[:-1], v.shape[-1])), TensorType(wide, q.shape[:-1])]


def _seed_verify(op: Op) -> str:
    seed = op.operands[-1].type
    fits = not op.attrs.get("dropout") or seed.dtype in ("i64", "i32")
    return "" if fits else f"the seed is {seed}, not an integer"


define(name="attention", verify=_seed_verify, family="contraction", flops=_flops(2.0),
       doc="softmax(scale * q k^T + mask) v, and the log-sum-exp of the scores (natural logarithm)",
       signature=_forward, attrs=_ATTRS, dtypes="TTT.", types=_types, lse_results=(P("sum"), B),
       ref=_attention)  # fmt: skip
define(name="attention_backward", verify=_seed_verify, family="contraction", flops=_flops(5.0),
       doc="gradients of attention: (dout, q, k, v, out, lse, ...) -> dq, dk, dv. Dao et al., 2022",
       signature=_backward, attrs=_ATTRS, dtypes="TTTTTf.", types=lambda ins, attrs: [ins[1], ins[2], ins[3]],
       ref=_attention_backward)  # fmt: skip
