"""Optimizer updates: pointwise, so any dim may be split and ZeRO stages are placements."""

from __future__ import annotations

from typing import Any

from ..opdef import AttrSpec, define

_INPLACE = AttrSpec("bool", False, "schedule level: the results may overwrite param and state")
_ADAM = {
    "inplace": _INPLACE,
    "beta1": AttrSpec("float", 0.9, doc="decay of the mean"),
    "beta2": AttrSpec("float", 0.999, doc="decay of the mean square"),
    "eps": AttrSpec("float", 1e-8, doc="added to avoid a division by 0"),
    "weight_decay": AttrSpec("float", 0.0, doc="share of the parameter"),
    "maximize": AttrSpec("bool", False, doc="ascend instead"),
}  # fmt: skip

#: for each result, the operand whose storage it takes under `inplace = true`
OVERWRITES: dict[str, tuple[int, ...]] = {
    "adam_update": (0, 2, 3), "adamw_update": (0, 2, 3), "sgd_update": (0,),
    "momentum_update": (0, 2),
}  # fmt: skip


def _widen(c: Any, x: Any) -> Any:
    """Updates are computed in at least float32, and rounded once, when they are stored."""
    return x if x.dtype.itemsize >= 4 else x.float()


def _adam(decoupled: bool) -> Any:
    def ref(c: Any, p: Any, g: Any, m: Any, v: Any, step: Any, lr: Any) -> Any:
        a, stored = c.attrs, (p.dtype, m.dtype, v.dtype)
        p, g, m, v = (_widen(c, x) for x in (p, g, m, v))
        if a["maximize"]:
            g = -g
        if a["weight_decay"]:
            if decoupled:
                p = p * (1 - lr * a["weight_decay"]).to(p.dtype)
            else:
                g = g + a["weight_decay"] * p
        m = m + (g - m) * (1 - a["beta1"])  # torch's lerp
        v = v * a["beta2"] + (g * g) * (1 - a["beta2"])
        t = step.to(c.torch.float64)
        step_size = lr / (1 - a["beta1"] ** t)
        denominator = v.sqrt() / (1 - a["beta2"] ** t).sqrt().to(v.dtype) + a["eps"]
        p = p - step_size.to(p.dtype) * (m / denominator)
        return tuple(x.to(dtype) for x, dtype in zip((p, m, v), stored))

    return ref


_PMV = "a..., a..., a..., a..., _, _ -> a..., a..., a..."
define(name="adam_update", family="optimizer", flops_per_point=15, signature=_PMV, attrs=_ADAM,
       types=lambda ins, attrs: [ins[0], ins[2], ins[3]], ref=_adam(False),
       doc="Adam: (param, grad, m, v, step, lr) -> param, m, v; `step` counts from 1, both scalars "
           "are f64. Kingma and Ba, 2015; weight decay as an L2 term")  # fmt: skip
define(name="adamw_update", family="optimizer", flops_per_point=16, signature=_PMV, attrs=_ADAM,
       types=lambda ins, attrs: [ins[0], ins[2], ins[3]], ref=_adam(True),
       doc="AdamW: as adam_update, weight decay apart from the gradient. Loshchilov and Hutter, "
           "2019")  # fmt: skip


def _sgd(c: Any, p: Any, g: Any, *rest: Any) -> Any:
    a = c.attrs
    *state, step, lr = rest
    stored = p.dtype
    p, g, state = _widen(c, p), _widen(c, g), [_widen(c, x) for x in state]
    if a["maximize"]:
        g = -g
    if a["weight_decay"]:
        g = g + a["weight_decay"] * p
    if not state:
        return (p - lr.to(p.dtype) * g).to(stored)
    (buffer,) = state
    # the first step sets the buffer to the gradient, without dampening, as torch does
    damp = (1.0 - a["dampening"] * (step > 1).to(c.torch.float64)).to(p.dtype)
    buffer = a["momentum"] * buffer + damp * g
    g = g + a["momentum"] * buffer if a["nesterov"] else buffer
    return (p - lr.to(p.dtype) * g).to(stored), buffer.to(rest[0].dtype)


_SGD = {
    "inplace": _INPLACE,
    "weight_decay": AttrSpec("float", 0.0, doc="share of the parameter"),
    "maximize": AttrSpec("bool", False, doc="ascend instead"),
}  # fmt: skip
define(name="sgd_update", family="optimizer", flops_per_point=4, attrs=_SGD,
       signature="a..., a..., _, _ -> a...", types=lambda ins, attrs: [ins[0]], ref=_sgd,
       doc="plain gradient descent: (param, grad, step, lr) -> param")  # fmt: skip
define(name="momentum_update", family="optimizer", flops_per_point=7,
       attrs={**_SGD, "momentum": AttrSpec("float", doc="decay of the buffer"),
              "dampening": AttrSpec("float", 0.0, doc="share of the gradient that is left out"),
              "nesterov": AttrSpec("bool", False, doc="look ahead")},
       signature="a..., a..., a..., _, _ -> a..., a...",
       types=lambda ins, attrs: [ins[0], ins[2]], ref=_sgd,
       doc="SGD with momentum: (param, grad, buffer, step, lr) -> param, buffer; the buffer starts "
           "at 0")  # fmt: skip
