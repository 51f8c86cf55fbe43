"""Train steps of a Llama as pipeline stages, written down at schedule level by hand.

The simulator's benchmark is about thousands of devices and one given plan, so it does not search one
(`passes/stage_schedule.py` writes what a search finds): Megatron's tensor parallelism in each block,
batches split over `dp`, gradients added up over the micro-batches and scattered over `dp` for sharded
AdamW states.
"""

from __future__ import annotations

from typing import NamedTuple

from weft.ir.builder import Builder
from weft.ir.module import Attr, Function, Location, Module, Value
from weft.ir.types import B, Mesh, P, Placement, S, TensorType
from weft.passes.schedule import add_frees


class Model(NamedTuple):
    """Sizes of a Llama."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    key_heads: int
    vocabulary: int


def one_f_one_b(stage: int, stages: int, micro: int) -> list[tuple[str, int]]:
    """The order of a stage: its warm-up, then forward and backward in turn (Narayanan et al., 2019)."""
    warm = min(micro, stages - 1 - stage)
    order = [("F", k) for k in range(warm)]
    for k in range(micro - warm):
        order += [("F", warm + k), ("B", k)]
    return order + [("B", k) for k in range(micro - warm, micro)]


def gpipe(stage: int, stages: int, micro: int) -> list[tuple[str, int]]:
    """All forwards, then all backwards (Huang et al., 2019)."""
    return [("F", k) for k in range(micro)] + [("B", k) for k in reversed(range(micro))]


class Stage:
    """Writes one stage's program.

    Args:
        batch: sequences of a micro-batch, all ranks of `dp` together.
        length: tokens of a sequence.
        ends: give the first stage the embedding, the last one the head.
    """

    def __init__(
        self, model: Model, mesh: Mesh, stage: int, stages: int, batch: int, length: int,
        ends: bool = True,
    ) -> None:  # fmt: skip
        self.model, self.mesh, self.stage, self.stages = model, mesh, stage, stages
        self.batch, self.length = batch, length
        self.builder = Builder()
        self.weights: dict[str, Value] = {}
        self.gradients: dict[str, Value] = {}
        self.path = ""
        self.types: dict[tuple[str, tuple[int, ...], Placement, Placement], TensorType] = {}
        layers = range(stage * model.layers // stages, (stage + 1) * model.layers // stages)
        self.layers = list(layers)
        for layer in self.layers:
            self._weights(layer)
        if ends and stage == 0:
            self.weight("embed", (model.vocabulary, model.hidden), 1)
        if ends and stage == stages - 1:
            self.weight("head", (model.hidden, model.vocabulary), 1)

    # -- pieces ---------------------------------------------------------------------------------

    def type(self, shape: tuple[int, ...], dp: Placement, tp: Placement, dtype: str = "bf16") -> TensorType:
        key = (dtype, shape, dp, tp)
        return self.types.setdefault(key, TensorType(dtype, shape, (dp, tp)))

    def weight(self, name: str, shape: tuple[int, ...], dim: int | None) -> None:
        type = self.type(shape, B, B if dim is None else S(dim))
        self.weights[name] = self.builder.param(type, name, role="param", name=name)

    def _weights(self, layer: int) -> None:
        m = self.model
        keys = m.hidden // m.heads * m.key_heads
        for name, shape, dim in (
            ("norm1", (m.hidden,), None), ("q", (m.hidden, m.hidden), 1),
            ("k", (m.hidden, keys), 1), ("v", (m.hidden, keys), 1), ("o", (m.hidden, m.hidden), 0),
            ("norm2", (m.hidden,), None), ("gate", (m.hidden, m.intermediate), 1),
            ("up", (m.hidden, m.intermediate), 1), ("down", (m.intermediate, m.hidden), 0),
        ):  # fmt: skip
            self.weight(f"layers.{layer}.{name}", shape, dim)

    def op(
        self, name: str, operands: list[Value], *types: TensorType, **more: dict[str, Attr]
    ) -> tuple[Value, ...]:
        return self.builder.many(
            name, operands, more.get("attrs"), types=types, split=more.get("split"),  # type: ignore[arg-type]
            loc=Location(self.path, "llama.py", 1),
        )  # fmt: skip

    def one(self, name: str, operands: list[Value], type: TensorType, **more: dict[str, Attr]) -> Value:
        return self.op(name, operands, type, **more)[0]

    def tokens(self, width: int, tp: Placement) -> TensorType:
        """The type of an activation with `width` features."""
        return self.type((self.batch, self.length, width), S(0), tp)

    def linear(self, x: Value, name: str, column: bool) -> Value:
        """x @ w; a row-parallel one is summed over `tp`."""
        w = self.weights[name]
        out = self.one(
            "einsum", [x, w], self.tokens(w.type.shape[1], S(2) if column else P()),
            attrs={"spec": "b s k, k n -> b s n"}, split={"dp": "b", "tp": "n" if column else "k"},
        )  # fmt: skip
        return out if column else self.summed(out)

    def summed(self, x: Value) -> Value:
        """Sum over `tp`, waited for at once: the next op needs it."""
        whole = self.tokens(x.type.shape[2], B)
        start = self.one("all_reduce", [x], whole, attrs={"axis": "tp", "async": True})
        return self.one("wait", [start], whole)

    def linear_backward(self, dy: Value, x: Value, name: str, column: bool) -> Value:
        """The gradient of x, before its sum over `tp`; that of w is added to what is there."""
        w = self.weights[name]
        width = x.type.shape[2]
        dx = self.one(
            "einsum", [dy, w], self.tokens(width, P() if column else S(2)),
            attrs={"spec": "b s n, k n -> b s k"}, split={"dp": "b", "tp": "n" if column else "k"},
        )  # fmt: skip
        partial = self.type(w.type.shape, P(), S(1 if column else 0))
        dw = self.one(
            "einsum", [x, dy], partial, attrs={"spec": "b s k, b s n -> k n"},
            split={"dp": "b", "tp": "n" if column else "k"},
        )  # fmt: skip
        self.gradient(name, dw)
        return dx

    def gradient(self, name: str, dw: Value) -> None:
        before = self.gradients.get(name)
        split: dict[str, Attr] = {"dp": "partial(0, 1)", "tp": "a0"}
        self.gradients[name] = (
            dw if before is None else self.one("add", [before, dw], dw.type, split=split)
        )

    def pointwise(self, name: str, *operands: Value) -> Value:
        type = operands[0].type
        tp = "a2" if type.placement == (S(0), S(2)) else ""
        split: dict[str, Attr] = {"dp": "a0", "tp": tp} if tp else {"dp": "a0"}
        return self.one(name, list(operands), type, split=split)

    def norm(self, x: Value, name: str) -> tuple[Value, Value]:
        rows = self.type((*x.type.shape[:2], 1), S(0), B, "f32")
        y, scale = self.op("rms_norm", [x, self.weights[name]], x.type, rows, split={"dp": "a0"})
        return y, scale

    def norm_backward(self, dy: Value, x: Value, name: str, scale: Value) -> Value:
        w = self.weights[name]
        partial = self.type(w.type.shape, P(), B)
        dx, dw = self.op("rms_norm_backward", [dy, x, w, scale], x.type, partial, split={"dp": "a0"})
        self.gradient(name, dw)
        return dx

    # -- blocks ---------------------------------------------------------------------------------

    def heads(self, x: Value, count: int) -> Value:
        """(b, s, h d) -> (b, h, s, d), two views."""
        b, s, width = x.type.shape
        split: dict[str, Attr] = {"dp": "a0", "tp": "a2"}
        y = self.one("reshape", [x], self.type((b, s, count, width // count), S(0), S(2)), split=split)
        type = self.type((b, count, s, width // count), S(0), S(1))
        return self.one("permute", [y], type, attrs={"dims": (0, 2, 1, 3)}, split=split)

    def joined(self, x: Value) -> Value:
        b, count, s, width = x.type.shape
        split: dict[str, Attr] = {"dp": "a0", "tp": "a1"}
        type = self.type((b, s, count, width), S(0), S(2))
        y = self.one("permute", [x], type, attrs={"dims": (0, 2, 1, 3)}, split=split)
        return self.one("reshape", [y], self.tokens(count * width, S(2)), split={"dp": "a0", "tp": "a2"})

    def forward(self, layer: int, x: Value) -> tuple[Value, dict[str, Value]]:
        """A block, and what its backward reads."""
        m, at = self.model, f"layers.{layer}."
        self.path = f"model.layers.{layer}.self_attn"
        saved = {"x": x}
        saved["y"], saved["scale1"] = self.norm(x, at + "norm1")
        for name, count in (("q", m.heads), ("k", m.key_heads), ("v", m.key_heads)):
            saved[name] = self.heads(self.linear(saved["y"], at + name, True), count)
        q = saved["q"].type
        saved["out"], saved["lse"] = self.op(
            "attention", [saved["q"], saved["k"], saved["v"]], q,
            self.type(q.shape[:3], S(0), S(1), "f32"),
            attrs={"causal": True, "scale": 0.1}, split={"dp": "b", "tp": "g"},
        )  # fmt: skip
        saved["rows"] = self.joined(saved["out"])
        z = self.pointwise("add", x, self.linear(saved["rows"], at + "o", False))
        self.path = f"model.layers.{layer}.mlp"
        saved["z"] = z
        saved["n"], saved["scale2"] = self.norm(z, at + "norm2")
        saved["gate"] = self.linear(saved["n"], at + "gate", True)
        saved["up"] = self.linear(saved["n"], at + "up", True)
        saved["act"] = self.pointwise("mul", self.pointwise("silu", saved["gate"]), saved["up"])
        return self.pointwise("add", z, self.linear(saved["act"], at + "down", False)), saved

    def backward(self, layer: int, dy: Value, saved: dict[str, Value]) -> Value:
        """The gradient of a block's input."""
        at = f"layers.{layer}."
        self.path = f"model.layers.{layer}.mlp"
        dact = self.linear_backward(dy, saved["act"], at + "down", False)
        dup = self.pointwise("mul", dact, self.pointwise("silu", saved["gate"]))
        dgate = self.pointwise("mul", self.pointwise("mul", dact, saved["up"]), saved["gate"])
        dn = self.linear_backward(dup, saved["n"], at + "up", True)
        other = self.linear_backward(dgate, saved["n"], at + "gate", True)
        partial: dict[str, Attr] = {"dp": "a0", "tp": "partial(0, 1)"}
        dn = self.summed(self.one("add", [dn, other], dn.type, split=partial))
        dz = self.pointwise("add", dy, self.norm_backward(dn, saved["z"], at + "norm2", saved["scale2"]))
        self.path = f"model.layers.{layer}.self_attn"
        drows = self.linear_backward(dz, saved["rows"], at + "o", False)
        dout = self.heads(drows, self.model.heads)
        operands = [dout, *(saved[name] for name in ("q", "k", "v", "out", "lse"))]
        types = [saved[name].type for name in ("q", "k", "v")]
        grads = self.op("attention_backward", operands, *types,
                        attrs={"causal": True, "scale": 0.1}, split={"dp": "b", "tp": "g"})  # fmt: skip
        total: Value | None = None
        for name, dv in zip(("q", "k", "v"), grads, strict=True):
            part = self.linear_backward(self.joined(dv), saved["y"], at + name, True)
            total = part if total is None else self.one("add", [total, part], part.type, split=partial)
        assert total is not None
        dx = self.norm_backward(self.summed(total), saved["x"], at + "norm1", saved["scale1"])
        return self.pointwise("add", dz, dx)

    # -- the step -------------------------------------------------------------------------------

    def receive(self, source: int, tag: int) -> Value:
        """Start to receive an activation, or its gradient."""
        attrs: dict[str, Attr] = {"source": source, "tag": tag, "async": True}
        return self.one("recv", [], self.tokens(self.model.hidden, B), attrs=attrs)

    def send(self, value: Value, to: int, tag: int) -> Value:
        attrs: dict[str, Attr] = {"to": to, "tag": tag, "async": True}
        return self.one("send", [value], value.type, attrs=attrs)

    def step(self, order: list[tuple[str, int]]) -> Function:
        """The program of the stage: what it receives is asked for one micro-batch ahead."""
        arrives = [
            (kind, k) for kind, k in order
            if (self.stage > 0 if kind == "F" else self.stage < self.stages - 1)
        ]  # fmt: skip
        asked: dict[tuple[str, int], Value] = {}
        saved: dict[int, list[dict[str, Value]]] = {}
        sent: list[Value] = []
        ends: dict[int, Value] = {}
        for item in order:
            ahead = [item, *arrives[arrives.index(item) + 1 :][:1]] if item in arrives else arrives[:1]
            for kind, k in ahead:
                if (kind, k) not in asked:
                    source = self.stage - 1 if kind == "F" else self.stage + 1
                    asked[kind, k] = self.receive(source, 2 * k + (kind == "B"))
            kind, k = item
            start = asked.get(item)
            given = None
            if item in arrives and start is not None:
                given = self.one("wait", [start], start.type)
            while len(sent) > 1:
                old = sent.pop(0)
                self.one("wait", [old], old.type)
            if kind == "F":
                x = self.embedded() if given is None else given
                saved[k] = []
                for layer in self.layers:
                    x, kept = self.forward(layer, x)
                    saved[k].append(kept)
                ends[k] = x
                if self.stage < self.stages - 1:
                    sent.append(self.send(x, self.stage + 1, 2 * k))
            else:
                dy = self.loss_gradient(ends.pop(k)) if given is None else given
                for layer, kept in zip(reversed(self.layers), reversed(saved.pop(k)), strict=True):
                    dy = self.backward(layer, dy, kept)
                if self.stage:
                    sent.append(self.send(dy, self.stage - 1, 2 * k + 1))
        for old in sent:
            self.one("wait", [old], old.type)
        return self.updated()

    def embedded(self) -> Value:
        """The first stage's input: rows of the embedding, whole on each rank of `tp`."""
        self.path = "model.embed_tokens"
        if "embed" not in self.weights:
            return self.one("constant", [], self.tokens(self.model.hidden, B), attrs={"value": 0.0})
        if "ids" not in self.weights:
            ids = self.type((self.batch, self.length), S(0), B, "i64")
            self.weights["ids"] = self.builder.param(ids, "ids", role="input", name="ids")
        operands = [self.weights["ids"], self.weights["embed"]]
        part = self.one("embedding", operands, self.tokens(self.model.hidden, S(2)),
                        split={"dp": "a0", "tp": "d"})  # fmt: skip
        attrs: dict[str, Attr] = {"axis": "tp", "dim": 2}
        return self.one("all_gather", [part], self.tokens(self.model.hidden, B), attrs=attrs)

    def loss_gradient(self, x: Value) -> Value:
        """The head, and the gradient of its input."""
        self.path = "lm_head"
        if "head" not in self.weights:
            return self.pointwise("exp", x)
        logits = self.linear(x, "head", True)
        return self.summed(self.linear_backward(self.pointwise("exp", logits), x, "head", True))

    def updated(self) -> Function:
        """Gradients scattered over `dp`, sharded AdamW, new weights gathered."""
        builder, results, roles = self.builder, [], []
        whole = self.type((), B, B, "f64")
        step = builder.param(whole, "step", role="state", name="step")
        lr = builder.param(whole, "lr", role="lr", name="lr.0")
        for name, dw in self.gradients.items():
            self.path = f"model.{name}"
            w = self.weights[name]
            tp = (w.type.placement or (B, B))[1]
            shard, wide = self.type(w.type.shape, S(0), tp), self.type(w.type.shape, S(0), tp, "f32")
            attrs: dict[str, Attr] = {"axis": "dp", "dim": 0, "async": True}
            start = self.one("reduce_scatter", [dw], shard, attrs=attrs)
            g = self.one("wait", [start], shard)
            mine = self.one("shard", [w], shard, attrs={"axis": "dp", "dim": 0})
            m, v = (builder.param(wide, f"{k}.{name}", role="state", name=f"{k}/{name}") for k in "mv")
            new, m1, v1 = self.op(
                "adamw_update", [mine, g, m, v, step, lr], shard, wide, wide,
                attrs={"inplace": True}, split={"dp": "a0"},
            )  # fmt: skip
            start = self.one("all_gather", [new], w.type, attrs=attrs)
            results += [self.one("wait", [start], w.type), m1, v1]
            roles += [{"role": "update", "updates": value.name} for value in (w, m, v)]
        function = builder.function("main", results, roles)
        return function.with_(ops=tuple(add_frees(function, function.ops)))


def train_step(
    model: Model, mesh: Mesh, stages: int, micro: int, batch: int, length: int,
    schedule: str = "1F1B", ends: bool = True,
) -> list[Module]:  # fmt: skip
    """The schedule-level modules of all stages. See `Stage`."""
    order = {"1F1B": one_f_one_b, "GPipe": gpipe}[schedule]
    return [
        Module(
            "schedule",
            (Stage(model, mesh, i, stages, batch, length, ends).step(order(i, stages, micro)),),
            mesh,
        )
        for i in range(stages)
    ]
