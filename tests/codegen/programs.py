"""Programs that each become one kernel: name -> maker of (module), with the kernels of a Llama."""

from __future__ import annotations

from collections.abc import Callable

from tests.codegen.kit import program

from weft.ir.builder import Builder
from weft.ir.module import Module, Value
from weft.ir.types import TensorType


def tensor(dtype: str, *shape: int) -> TensorType:
    """A type without a placement."""
    return TensorType(dtype, shape)


def cast(b: Builder, x: Value, dtype: str) -> Value:
    """x in another dtype."""
    return b.one("cast", [x], types=[tensor(dtype, *x.type.shape)])


def scalar(b: Builder, value: float, dtype: str = "f32") -> Value:
    """A number."""
    return b.constant(value, tensor(dtype))


def residual_rms_norm(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """h = x + r; y = h * rsqrt(mean(h * h) + eps) * w, as Llama composes it."""

    def make(b: Builder) -> list[Value]:
        x, r = b.param(tensor(dtype, *rows, n), "x"), b.param(tensor(dtype, *rows, n), "r")
        w = b.param(tensor(dtype, n), "w")
        h = b.one("add", [x, r])
        f = cast(b, h, "f32")
        square = b.one("pow", [f, scalar(b, 2.0)])
        dims = {"dims": (len(rows),), "keepdim": True}
        mean = b.one("mul", [b.one("reduce_sum", [square], dims), scalar(b, 1 / n)])
        rstd = b.one("rsqrt", [b.one("add", [mean, scalar(b, 1e-5)])])
        y = cast(b, b.one("mul", [f, rstd]), dtype)
        return [b.one("mul", [w, y]), h]

    return program(make, "model.layers.0.input_layernorm")


def layer_norm(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """gelu(layer_norm(x + r)) with all three results of the norm."""

    def make(b: Builder) -> list[Value]:
        x, r = b.param(tensor(dtype, *rows, n), "x"), b.param(tensor(dtype, *rows, n), "r")
        w, c = b.param(tensor(dtype, n), "weight"), b.param(tensor(dtype, n), "bias")
        y, mean, rstd = b.many("layer_norm", [b.one("add", [x, r]), w, c])
        return [b.one("gelu", [y]), mean, rstd]

    return program(make, "bert.encoder.layer.0.output")


def rms_norm(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """The rms_norm op alone."""

    def make(b: Builder) -> list[Value]:
        x, w = b.param(tensor(dtype, *rows, n), "x"), b.param(tensor(dtype, n), "w")
        return list(b.many("rms_norm", [x, w], {"eps": 1e-6}))

    return program(make)


def masked_softmax(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """softmax(where(mask, x * scale, -inf)): scores of attention."""

    def make(b: Builder) -> list[Value]:
        x, mask = b.param(tensor(dtype, *rows, n), "x"), b.param(tensor("bool", n), "mask")
        low = scalar(b, -1e30, dtype)
        y = b.one("where", [mask, b.one("mul", [x, scalar(b, 0.125, dtype)]), low],
                  types=[x.type])  # fmt: skip
        return [b.one("softmax", [y])]

    return program(make)


def log_softmax_pair(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """log_softmax with its backward, and softmax's backward."""

    def make(b: Builder) -> list[Value]:
        x, dy = b.param(tensor(dtype, *rows, n), "x"), b.param(tensor(dtype, *rows, n), "dy")
        y = b.one("log_softmax", [x])
        first = b.one("log_softmax_backward", [dy, y])
        return [first, b.one("softmax_backward", [dy, b.one("softmax", [x])])]

    return program(make)


def swiglu(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """silu(gate) * up."""

    def make(b: Builder) -> list[Value]:
        gate, up = b.param(tensor(dtype, *rows, n), "gate"), b.param(tensor(dtype, *rows, n), "up")
        return [b.one("mul", [b.one("silu", [gate]), up])]

    return program(make, "model.layers.3.mlp")


def swiglu_packed(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """silu(gate) * up, both being halves of one tensor."""

    def make(b: Builder) -> list[Value]:
        x, last = b.param(tensor(dtype, *rows, 2 * n), "x"), len(rows)
        gate = b.one("slice", [x], {"dim": last, "start": 0, "stop": n})
        up = b.one("slice", [x], {"dim": last, "start": n, "stop": 2 * n})
        return [b.one("mul", [b.one("silu", [gate]), up])]

    return program(make)


def swiglu_backward(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """Gradients of silu(gate) * up."""

    def make(b: Builder) -> list[Value]:
        dy, gate, up = (b.param(tensor(dtype, *rows, n), name) for name in ("dy", "gate", "up"))
        dup = b.one("mul", [dy, b.one("silu", [gate])])
        return [b.one("silu_backward", [b.one("mul", [dy, up]), gate]), dup]

    return program(make)


def rotate_half(b: Builder, x: Value) -> Value:
    """(-second half, first half) of the last dim."""
    last, n = len(x.type.shape) - 1, x.type.shape[-1]
    low = b.one("slice", [x], {"dim": last, "start": 0, "stop": n // 2})
    high = b.one("slice", [x], {"dim": last, "start": n // 2, "stop": n})
    return b.one("concat", [b.one("neg", [high]), low], {"dim": last})


def rope(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """Rotary embedding of q[b, h, s, n], a permuted view of [b, s, h, n]."""
    batch, seq = rows[0], rows[-1]
    heads = 3

    def make(b: Builder) -> list[Value]:
        q = b.param(tensor(dtype, batch, seq, heads, n), "q")
        cos, sin = (b.param(tensor(dtype, 1, seq, n), name) for name in ("cos", "sin"))
        q = b.one("permute", [q], {"dims": (0, 2, 1, 3)})
        c, s = (b.one("reshape", [x], types=[tensor(dtype, 1, 1, seq, n)]) for x in (cos, sin))
        return [b.one("add", [b.one("mul", [q, c]), b.one("mul", [rotate_half(b, q), s])])]

    return program(make, "model.layers.0.self_attn")


def rope_pair(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """Rotary embedding of queries and keys, whose heads no op relates."""
    batch, seq = rows[0], rows[-1]

    def make(b: Builder) -> list[Value]:
        cos, sin = (b.param(tensor(dtype, seq, n), name) for name in ("cos", "sin"))
        out = []
        for name in ("q", "k"):
            x = b.param(tensor(dtype, batch, 3, seq, n), name)
            out.append(
                b.one("add", [b.one("mul", [x, cos]), b.one("mul", [rotate_half(b, x), sin])])
            )
        return out

    return program(make, "model.layers.0.self_attn")


def mean_loss(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """Sum of losses over the number of labels that count: one row without rows."""

    def make(b: Builder) -> list[Value]:
        loss, labels = b.param(tensor(dtype, n), "loss"), b.param(tensor("i64", n), "labels")
        counts = cast(b, b.one("ne", [labels, scalar(b, 3, "i64")]), "f32")
        whole = b.one("reduce_sum", [cast(b, loss, "f32")], {"dims": (0,)})
        return [b.one("div", [whole, b.one("reduce_sum", [counts], {"dims": (0,)})])]

    return program(make, "loss")


def rope_backward(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """Gradient of rope: the halves come back through pads."""
    batch, seq = rows[0], rows[-1]

    def make(b: Builder) -> list[Value]:
        dy = b.param(tensor(dtype, batch, seq, n), "dy")
        cos, sin = (b.param(tensor(dtype, seq, n), name) for name in ("cos", "sin"))
        g = b.one("mul", [dy, sin])
        first = b.one("slice", [g], {"dim": 2, "start": 0, "stop": n // 2})
        second = b.one("slice", [g], {"dim": 2, "start": n // 2, "stop": n})
        high = b.one("pad", [b.one("neg", [first])], {"low": (0, 0, n // 2), "high": (0, 0, 0)})
        low = b.one("pad", [second], {"low": (0, 0, 0), "high": (0, 0, n // 2)})
        return [b.one("add", [b.one("mul", [dy, cos]), b.one("add", [high, low])])]

    return program(make)


def cross_entropy(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """Loss and log-sum-exp of each row, and the gradient of the logits."""

    def make(b: Builder) -> list[Value]:
        x, labels = b.param(tensor(dtype, *rows, n), "logits"), b.param(tensor("i64", *rows), "y")
        dloss = b.param(tensor(dtype, *rows), "dloss")
        loss, lse = b.many("cross_entropy", [x, labels], {"ignore_index": 3})
        dx = b.one("cross_entropy_backward", [dloss, x, labels, lse], {"ignore_index": 3})
        return [loss, lse, dx]

    return program(make, "lm_head")


def adamw(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """One AdamW update."""

    def make(b: Builder) -> list[Value]:
        p, g, m = (b.param(tensor(dtype, *rows, n), name) for name in "pgm")
        v = b.one("mul", [g, g])  # second moments are not negative
        step, lr = b.param(tensor("f64"), "step"), b.param(tensor("f64"), "lr")
        attrs = {"beta1": 0.9, "beta2": 0.95, "eps": 1e-8, "weight_decay": 0.1}
        step = b.one("add", [b.one("abs", [step]), scalar(b, 1.0, "f64")])
        return list(b.many("adamw_update", [p, g, m, v, step, lr], attrs))

    return program(make)


def momentum(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """One update of SGD with Nesterov momentum."""

    def make(b: Builder) -> list[Value]:
        p, g, m = (b.param(tensor(dtype, *rows, n), name) for name in "pgm")
        step, lr = b.param(tensor("f64"), "step"), b.param(tensor("f64"), "lr")
        attrs = {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "dampening": 0.0}
        return list(b.many("momentum_update", [p, g, m, step, lr], attrs))

    return program(make)


def norm_backward(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """Gradients of a norm's operand and of its weight, which is a sum over all rows."""
    dims = tuple(range(len(rows)))

    def make(b: Builder) -> list[Value]:
        dy, x = b.param(tensor(dtype, *rows, n), "dy"), b.param(tensor(dtype, *rows, n), "x")
        w, rstd = b.param(tensor(dtype, n), "w"), b.param(tensor("f32", *rows, 1), "rstd")
        hat = b.one("mul", [cast(b, x, "f32"), rstd])
        wide = cast(b, dy, "f32")
        dw = b.one("reduce_sum", [b.one("mul", [wide, hat])], {"dims": dims})
        g = b.one("mul", [wide, cast(b, w, "f32")])
        last = {"dims": (len(rows),), "keepdim": True}
        inner = b.one("reduce_sum", [b.one("mul", [g, hat])], last)
        inner = b.one("mul", [inner, scalar(b, 1 / n)])
        dx = b.one("mul", [rstd, b.one("sub", [g, b.one("mul", [hat, inner])])])
        return [cast(b, dx, dtype), dw]

    return program(make, "model.norm")


def bias_gelu_backward(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """Gradients through gelu(x + bias): of x, and of the bias as a sum over all rows."""
    dims = tuple(range(len(rows)))

    def make(b: Builder) -> list[Value]:
        dy, x = b.param(tensor(dtype, *rows, n), "dy"), b.param(tensor(dtype, *rows, n), "x")
        h = b.one("add", [x, b.param(tensor(dtype, n), "bias")])
        dx = b.one("gelu_backward", [dy, h])
        return [dx, b.one("reduce_sum", [dx], {"dims": dims, "keepdim": True})]

    return program(make)


def layer_norm_backward(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """Gradients of layer_norm, of which that of x meets the residual's."""

    def make(b: Builder) -> list[Value]:
        dy, x, r = (b.param(tensor(dtype, *rows, n), name) for name in ("dy", "x", "residual"))
        w = b.param(tensor(dtype, n), "w")
        mean, rstd = (b.param(tensor("f32", *rows, 1), name) for name in ("mean", "rstd"))
        dx, dw, db = b.many("layer_norm_backward", [dy, x, w, mean, rstd])
        return [b.one("add", [dx, r]), dw, db]

    return program(make, "bert.encoder.layer.0.output")


def rms_norm_backward(dtype: str, rows: tuple[int, ...], n: int) -> Module:
    """The rms_norm_backward op alone."""

    def make(b: Builder) -> list[Value]:
        dy, x = b.param(tensor(dtype, *rows, n), "dy"), b.param(tensor(dtype, *rows, n), "x")
        w, rstd = b.param(tensor(dtype, n), "w"), b.param(tensor("f32", *rows, 1), "rstd")
        return list(b.many("rms_norm_backward", [dy, x, w, rstd]))

    return program(make)


#: programs with sums over all rows, whose column must fit into registers
ROW_SUMS = ("norm_backward", "bias_gelu_backward", "layer_norm_backward", "rms_norm_backward")
#: name -> maker of a module from (dtype, row dims, columns)
PROGRAMS: dict[str, Callable[[str, tuple[int, ...], int], Module]] = {
    f.__name__: f
    for f in (
        residual_rms_norm, layer_norm, rms_norm, masked_softmax, log_softmax_pair, swiglu,
        swiglu_packed, swiglu_backward, rope, rope_pair, rope_backward, mean_loss, cross_entropy, adamw, momentum,
        norm_backward, bias_gelu_backward, layer_norm_backward, rms_norm_backward,
    )
}  # fmt: skip
