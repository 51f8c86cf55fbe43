"""Train steps written by hand, for tests and benchmarks of the placement search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from weft.ir.builder import Builder
from weft.ir.module import Function, Module, Value
from weft.ir.types import TensorType


def f32(*shape: int) -> TensorType:
    return TensorType("f32", shape)


def ein(b: Builder, spec: str, x: Value, y: Value) -> Value:
    return b.one("einsum", [x, y], {"spec": spec})


def linear_grads(b: Builder, dy: Value, x: Value, w: Value) -> tuple[Value, Value]:
    """dx and dw of y = einsum("b s k, k n -> b s n")."""
    return ein(b, "b s n, k n -> b s k", dy, w), ein(b, "b s k, b s n -> k n", x, dy)


class Entry:
    """An entry function that knows its weights, optimizer states and updates."""

    def __init__(self) -> None:
        self.b = Builder()
        self.step = self.b.param(TensorType("f64", ()), "step", role="state", name="step")
        self.lr = self.b.param(TensorType("f64", ()), "lr", role="lr", name="lr.0")
        self.results: list[tuple[Value, dict[str, Any]]] = []

    def weight(self, name: str, *shape: int) -> Value:
        return self.b.param(f32(*shape), name.replace(".", "_"), role="param", name=name)

    def adamw(self, weight: Value, grad: Value) -> None:
        states = [
            self.b.param(weight.type, f"{kind}_{weight.name}", role="state", name=kind + weight.name)
            for kind in ("m", "v")
        ]
        new = self.b.many("adamw_update", [weight, grad, *states, self.step, self.lr])
        for value, old in zip(new, (weight, *states), strict=True):
            self.results.append((value, {"role": "update", "updates": old.name}))

    def module(self, loss: Value, callees: Sequence[Function] = ()) -> Module:
        one = self.b.constant(1.0, TensorType("f64", ()))
        step = self.b.one("add", [self.step, one])
        self.results.append((step, {"role": "update", "updates": self.step.name}))
        results = [(loss, {"role": "loss"}), *self.results]
        values, attrs = zip(*results, strict=True)
        return Module("logical", (self.b.function("main", values, attrs), *callees))


def mlp_step(batch: int, width: int, hidden: int) -> Module:
    """Two linear layers with a relu, the sum of squares as loss, AdamW."""
    e = Entry()
    b = e.b
    x = b.param(f32(batch, width), "x", role="input", name="x")
    w1, w2 = e.weight("w1", width, hidden), e.weight("w2", hidden, width)
    h = ein(b, "b k, k n -> b n", x, w1)
    a = b.one("relu", [h])
    y = ein(b, "b k, k n -> b n", a, w2)
    loss = b.one("reduce_sum", [b.one("mul", [y, y])], {"dims": (0, 1)})
    dy = b.one("mul", [y, b.constant(2.0, f32())])
    dw2 = ein(b, "b k, b n -> k n", a, dy)
    dh = b.one("relu_backward", [ein(b, "b n, k n -> b k", dy, w2), a])
    dw1 = ein(b, "b k, b n -> k n", x, dh)
    e.adamw(w1, dw1)
    e.adamw(w2, dw2)
    return e.module(loss)


def _heads(b: Builder, x: Value, heads: int) -> Value:
    batch, seq, width = x.type.shape
    split = b.one("reshape", [x], types=[f32(batch, seq, heads, width // heads)])
    return b.one("permute", [split], {"dims": (0, 2, 1, 3)})


def _merge(b: Builder, x: Value) -> Value:
    batch, heads, seq, d = x.type.shape
    return b.one("reshape", [b.one("permute", [x], {"dims": (0, 2, 1, 3)})],
                 types=[f32(batch, seq, heads * d)])  # fmt: skip


def _rope(b: Builder, x: Value, cos: Value, sin: Value, *, backward: bool = False) -> Value:
    """x * cos + rotate_half(x) * sin; the gradient turns the other way."""
    d = x.type.shape[-1]
    first = b.one("slice", [x], {"dim": 3, "start": 0, "stop": d // 2})
    second = b.one("slice", [x], {"dim": 3, "start": d // 2, "stop": d})
    if backward:
        turned = b.one("concat", [second, b.one("neg", [first])], {"dim": 3})
    else:
        turned = b.one("concat", [b.one("neg", [second]), first], {"dim": 3})
    return b.one("add", [b.one("mul", [x, cos]), b.one("mul", [turned, sin])])


BLOCK_WEIGHTS = ("n1", "wq", "wk", "wv", "wo", "n2", "wg", "wu", "wd")
SAVED = ("x", "h1", "r1", "q", "k", "v", "o", "lse", "m", "x1", "h2", "r2", "g", "u", "s", "f")


def block_shapes(width: int, heads: int, kv: int, ffn: int) -> dict[str, tuple[int, ...]]:
    d = width // heads
    return {
        "n1": (width,), "wq": (width, width), "wk": (width, kv * d), "wv": (width, kv * d),
        "wo": (width, width), "n2": (width,), "wg": (width, ffn), "wu": (width, ffn),
        "wd": (ffn, width),
    }  # fmt: skip


def block_forward(batch: int, seq: int, width: int, heads: int, kv: int, ffn: int) -> Function:
    """A Llama block; results: y, then the saved values."""
    b = Builder()
    x = b.param(f32(batch, seq, width), "x")
    d = width // heads
    cos, sin = (b.param(f32(1, 1, seq, d), n) for n in ("cos", "sin"))
    w = {n: b.param(f32(*s), n) for n, s in block_shapes(width, heads, kv, ffn).items()}
    spec = "b s k, k n -> b s n"
    h1, r1 = b.many("rms_norm", [x, w["n1"]])
    q = _rope(b, _heads(b, ein(b, spec, h1, w["wq"]), heads), cos, sin)
    k = _rope(b, _heads(b, ein(b, spec, h1, w["wk"]), kv), cos, sin)
    v = _heads(b, ein(b, spec, h1, w["wv"]), kv)
    o, lse = b.many("attention", [q, k, v], {"causal": True, "scale": d**-0.5})
    m = _merge(b, o)
    x1 = b.one("add", [x, ein(b, spec, m, w["wo"])])
    h2, r2 = b.many("rms_norm", [x1, w["n2"]])
    g, u = ein(b, spec, h2, w["wg"]), ein(b, spec, h2, w["wu"])
    s = b.one("silu", [g])
    f = b.one("mul", [s, u])
    y = b.one("add", [x1, ein(b, spec, f, w["wd"])])
    table = dict(x=x, h1=h1, r1=r1, q=q, k=k, v=v, o=o, lse=lse, m=m, x1=x1, h2=h2, r2=r2, g=g,
                 u=u, s=s, f=f)  # fmt: skip
    return b.function("block", [y, *(table[name] for name in SAVED if name != "x")])


def block_backward(batch: int, seq: int, width: int, heads: int, kv: int, ffn: int) -> Function:
    """Gradients of the block; results: dx, then those of the weights."""
    b = Builder()
    d = width // heads
    dy = b.param(f32(batch, seq, width), "dy")
    cos, sin = (b.param(f32(1, 1, seq, d), n) for n in ("cos", "sin"))
    w = {n: b.param(f32(*s), n) for n, s in block_shapes(width, heads, kv, ffn).items()}
    forward = block_forward(batch, seq, width, heads, kv, ffn)
    types = [forward.params[0].type, *(value.type for value in forward.results[1:])]
    s = {n: b.param(t, n) for n, t in zip(SAVED, types, strict=True)}
    df, dwd = linear_grads(b, dy, s["f"], w["wd"])
    ds, du = b.one("mul", [df, s["u"]]), b.one("mul", [df, s["s"]])
    dg = b.one("silu_backward", [ds, s["g"]])
    dh2g, dwg = linear_grads(b, dg, s["h2"], w["wg"])
    dh2u, dwu = linear_grads(b, du, s["h2"], w["wu"])
    dh2 = b.one("add", [dh2g, dh2u])
    dx1n, dn2 = b.many("rms_norm_backward", [dh2, s["x1"], w["n2"], s["r2"]],
                       types=[s["x1"].type, w["n2"].type])  # fmt: skip
    dx1 = b.one("add", [dy, dx1n])
    dm, dwo = linear_grads(b, dx1, s["m"], w["wo"])
    dout = _heads(b, dm, heads)
    dq, dk, dv = b.many(
        "attention_backward", [dout, s["q"], s["k"], s["v"], s["o"], s["lse"]],
        {"causal": True, "scale": d**-0.5},
    )  # fmt: skip
    dq = _merge(b, _rope(b, dq, cos, sin, backward=True))
    dk = _merge(b, _rope(b, dk, cos, sin, backward=True))
    dhq, dwq = linear_grads(b, dq, s["h1"], w["wq"])
    dhk, dwk = linear_grads(b, dk, s["h1"], w["wk"])
    dhv, dwv = linear_grads(b, _merge(b, dv), s["h1"], w["wv"])
    dh1 = b.one("add", [b.one("add", [dhq, dhk]), dhv])
    dxn, dn1 = b.many("rms_norm_backward", [dh1, s["x"], w["n1"], s["r1"]],
                      types=[s["x"].type, w["n1"].type])  # fmt: skip
    dx = b.one("add", [dx1, dxn])
    grads = dict(n1=dn1, wq=dwq, wk=dwk, wv=dwv, wo=dwo, n2=dn2, wg=dwg, wu=dwu, wd=dwd)
    return b.function("block_backward", [dx, *(grads[name] for name in BLOCK_WEIGHTS)])


def llama_step(
    *, layers: int, batch: int, seq: int, width: int, heads: int, kv: int, ffn: int, vocab: int
) -> Module:
    """A Llama train step with AdamW: the block and its gradient are functions."""
    forward = block_forward(batch, seq, width, heads, kv, ffn)
    backward = block_backward(batch, seq, width, heads, kv, ffn)
    e = Entry()
    b = e.b
    ids = b.param(TensorType("i64", (batch, seq)), "ids", role="input", name="ids")
    labels = b.param(TensorType("i64", (batch, seq)), "labels", role="input", name="labels")
    table, head = e.weight("embed", vocab, width), e.weight("head", width, vocab)
    last = e.weight("norm", width)
    d = width // heads
    angle = b.one("iota", [], {"dim": 2}, types=[f32(1, 1, seq, d)])
    cos, sin = b.one("cos", [angle]), b.one("sin", [angle])
    x = b.one("embedding", [ids, table])
    saved, weights = [], []
    for layer in range(layers):
        shapes = block_shapes(width, heads, kv, ffn)
        own = [e.weight(f"layers.{layer}.{n}", *shapes[n]) for n in BLOCK_WEIGHTS]
        out = b.many("call", [x, cos, sin, *own], {"callee": "block"},
                     types=[value.type for value in forward.results])  # fmt: skip
        saved.append([x, *out[1:]])
        weights.append(own)
        x = out[0]
    h, r = b.many("rms_norm", [x, last])
    logits = ein(b, "b s k, k n -> b s n", h, head)
    rows, lse = b.many("cross_entropy", [logits, labels])
    scale = b.constant(1.0 / (batch * seq), f32())
    loss = b.one("mul", [b.one("reduce_sum", [rows], {"dims": (0, 1)}), scale])
    drows = b.one("expand", [scale], types=[rows.type])
    dlogits = b.one("cross_entropy_backward", [drows, logits, labels, lse])
    dh, dhead = linear_grads(b, dlogits, h, head)
    dx, dlast = b.many("rms_norm_backward", [dh, x, last, r], types=[x.type, last.type])
    for own, kept in zip(reversed(weights), reversed(saved), strict=True):
        dx, *grads = b.many("call", [dx, cos, sin, *own, *kept], {"callee": "block_backward"},
                            types=[value.type for value in backward.results])  # fmt: skip
        for weight, grad in zip(own, grads, strict=True):
            e.adamw(weight, grad)
    dtable = b.one("embedding_backward", [dx, ids], types=[table.type])
    for weight, grad in ((table, dtable), (head, dhead), (last, dlast)):
        e.adamw(weight, grad)
    return e.module(loss, (forward, backward))
