"""Hand-written logical programs with repeated blocks, shaped like traces of known networks."""

from __future__ import annotations

from weft.ir.builder import Builder
from weft.ir.module import Function, Location, Module, Value
from weft.ir.types import TensorType


class Net:
    """A builder with a current module path and a few layers."""

    def __init__(self, dtype: str = "f32") -> None:
        self.b = Builder()
        self.dtype = dtype
        self.path = "model"
        self.updates: list[tuple[Value, str]] = []

    def type(self, *shape: int) -> TensorType:
        return TensorType(self.dtype, shape)

    def weight(self, name: str, *shape: int, role: str = "param") -> Value:
        full = f"{self.path}.{name}"
        return self.b.param(self.type(*shape), full.replace(".", "_"), role=role, name=full)

    def op(self, name: str, *operands: Value, types=None, path: str = "", **attrs) -> Value:
        loc = Location(f"{self.path}.{path}".strip("."), "net.py", 7)
        return self.b.many(name, operands, attrs, types=types, loc=loc, hint=name)[0]

    def constant(self, value: float, dtype: str = "") -> Value:
        return self.op("constant", value=value, types=[TensorType(dtype or self.dtype, ())])

    def linear(self, x: Value, name: str, out: int) -> Value:
        w = self.weight(f"{name}.weight", out, x.type.shape[-1])
        wt = self.op("permute", w, dims=(1, 0), path=name)
        return self.op("einsum", x, wt, spec="b s k, k n -> b s n", path=name)

    def norm(self, x: Value, name: str) -> Value:
        """RMS norm composed of small ops, as it is traced from transformers."""
        w = self.weight(f"{name}.weight", x.type.shape[-1])
        square = self.op("mul", x, x, path=name)
        total = self.op("reduce_sum", square, dims=(2,), keepdim=True, path=name)
        mean = self.op("mul", total, self.constant(1.0 / x.type.shape[-1]), path=name)
        rstd = self.op("rsqrt", self.op("add", mean, self.constant(1e-5), path=name), path=name)
        return self.op("mul", self.op("mul", x, rstd, path=name), w, path=name)

    def module(self, *outputs: Value) -> Module:
        roles = [{"role": "output"}] * len(outputs)
        roles += [{"role": "update", "updates": name} for _, name in self.updates]
        values = [*outputs, *(value for value, _ in self.updates)]
        return Module("logical", (self.b.function("main", values, roles),))


def transformer(
    layers: int, *, shared_in_first: bool = True, width: int = 8, seq: int = 4, heads: int = 2
) -> Module:
    """A Llama-like decoder; the first layer casts the rotary tables for all, as CSE leaves it."""
    n = Net()
    ids = n.b.param(TensorType("i64", (2, seq)), "ids", role="input")
    x = n.op("embedding", ids, n.weight("embed.weight", 32, width))
    cos = n.weight("rotary.cos", seq, width // heads, role="buffer")
    positions = n.op("cast", n.op("iota", dim=0, types=[TensorType("i64", (seq,))]),
                     types=[n.type(seq)])  # fmt: skip
    scaled = n.op("mul", n.op("reshape", positions, types=[n.type(seq, 1)]), cos)
    table = None if shared_in_first else n.op("sin", scaled)
    for layer in range(layers):
        n.path = f"model.layers.{layer}"
        h = n.norm(x, "input_layernorm")
        parts = []
        for part in "qkv":
            y = n.linear(h, f"self_attn.{part}_proj", width)
            y = n.op("reshape", y, types=[n.type(2, seq, heads, width // heads)], path="self_attn")
            parts.append(n.op("permute", y, dims=(0, 2, 1, 3), path="self_attn"))
        if table is None:
            table = n.op("sin", scaled, path="self_attn")
        q, k = (n.op("mul", y, table, path="self_attn") for y in parts[:2])
        y = n.op("attention", q, k, parts[2], scale=0.5, causal=True, path="self_attn")
        y = n.op("permute", y, dims=(0, 2, 1, 3), path="self_attn")
        y = n.op("reshape", y, types=[n.type(2, seq, width)], path="self_attn")
        x = n.op("add", x, n.linear(y, "self_attn.o_proj", width))
        h = n.norm(x, "post_attention_layernorm")
        gate = n.op("silu", n.linear(h, "mlp.gate_proj", 2 * width), path="mlp")
        up = n.op("mul", gate, n.linear(h, "mlp.up_proj", 2 * width), path="mlp")
        x = n.op("add", x, n.linear(up, "mlp.down_proj", width))
    n.path = "model"
    return n.module(n.linear(n.norm(x, "norm"), "lm_head", 32))


def encoder_decoder(encoders: int, decoders: int, width: int = 4) -> Module:
    """Two different stacks; each decoder layer also reads the encoder's result."""
    n = Net()
    x = n.b.param(n.type(2, 3, width), "source", role="input")
    y = n.b.param(n.type(2, 3, width), "target", role="input")
    for layer in range(encoders):
        n.path = f"encoder.{layer}"
        x = n.op("add", x, n.op("gelu", n.linear(n.norm(x, "norm"), "fc", width)))
    for layer in range(decoders):
        n.path = f"decoder.{layer}"
        cross = n.op("mul", n.linear(x, "key", width), n.linear(y, "query", width))
        y = n.op("add", y, n.op("tanh", n.linear(cross, "out", width)))
    return n.module(n.norm(y, "final"))


def residual_stages(blocks: tuple[int, ...] = (3, 4, 2), channels: int = 4) -> Module:
    """ResNet-like: the first block of a stage changes the width; running means are updated."""
    n = Net()
    x = n.b.param(n.type(2, 3, channels), "x", role="input")
    width = channels
    for stage, count in enumerate(blocks):
        for block in range(count):
            n.path = f"stages.{stage}.{block}"
            inner = width * 2 if block == 0 else width
            y = n.linear(x, "conv1", inner)
            mean = n.op("reduce_sum", y, dims=(0, 1), keepdim=False, path="bn")
            running = n.weight("bn.running_mean", inner, role="buffer")
            kept = n.op("mul", running, n.constant(0.9), path="bn")
            n.updates.append((n.op("add", kept, mean, path="bn"), running.name))
            y = n.op("relu", n.op("sub", y, mean, path="bn"))
            y = n.linear(y, "conv2", inner)
            shortcut = n.linear(x, "down", inner) if block == 0 else x
            x = n.op("relu", n.op("add", y, shortcut))
            width = inner
    n.path = "head"
    return n.module(n.linear(x, "fc", 5))


def mlp_function(layers: int, width: int = 4) -> Function:
    """x -> relu(x w) repeated, without roles or paths."""
    b = Builder()
    x = b.param(TensorType("f32", (3, width)), "x")
    for layer in range(layers):
        w = b.param(TensorType("f32", (width, width)), f"w{layer}")
        x = b.one("relu", [b.one("einsum", [x, w], {"spec": "b k, k n -> b n"})])
    return b.function("main", [x])
