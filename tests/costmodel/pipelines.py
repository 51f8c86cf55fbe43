"""Small pipelines at schedule level: a forward is a `neg`; a backward, a `mul`, reads its result."""

from __future__ import annotations

from weft.ir.module import Attr, Function, Location, Module, Op, Value
from weft.ir.types import B, Mesh, S, TensorType
from weft.passes.schedule import add_frees

Order = list[tuple[str, int]]


def gpipe(stage: int, stages: int, micro: int) -> Order:
    """F0 F1 F2 ... B2 B1 B0"""
    return [("F", k) for k in range(micro)] + [("B", k) for k in reversed(range(micro))]


def one_f_one_b(stage: int, stages: int, micro: int) -> Order:
    """The last stage runs F0 B0 F1 B1 ..., each earlier one starts one forward more at first."""
    warm = min(micro, stages - 1 - stage)
    order = [("F", k) for k in range(warm)]
    for k in range(micro - warm):
        order += [("F", warm + k), ("B", k)]
    return order + [("B", k) for k in range(micro - warm, micro)]


class Writer:
    """Writes one stage. Receives are asked for `ahead` transfers ahead, sends waited for as many
    behind; without `ahead` at the begin and at the end, so that no transfer holds up a stage that
    has work."""

    def __init__(self, mesh: Mesh, rows: int, ahead: int | None = 1) -> None:
        self.ahead = ahead
        self.type = TensorType("f32", (rows, 4), (S(0),) * min(1, len(mesh.axes)))
        if len(mesh.axes) > 1:
            self.type = self.type.placed((S(0), *([B] * (len(mesh.axes) - 1))))
        self.ops: list[Op] = []

    def add(self, name: str, operands: tuple[Value, ...], result: str, **attrs: Attr) -> Value:
        value = Value(result, self.type)
        self.ops.append(Op(name, operands, (value,), attrs, loc=Location(f"model.{result[0]}")))
        return value

    def stage(self, stage: int, stages: int, order: Order) -> Function:
        x = Value("x", self.type)
        arrives = [i for i in order if (stage > 0 if i[0] == "F" else stage < stages - 1)]
        asked: dict[tuple[str, int], Value] = {}
        sent: list[Value] = []
        kept: dict[int, Value] = {}
        ahead = len(order) if self.ahead is None else self.ahead
        for kind, k in order:
            now = arrives.index((kind, k)) + 1 if (kind, k) in arrives else 0
            later = arrives[max(0, now - 1) : now + ahead]
            for item in later:
                if item not in asked:
                    source = stage - 1 if item[0] == "F" else stage + 1
                    tag = 2 * item[1] + (item[0] == "B")
                    name = f"r{item[0]}{item[1]}"
                    asked[item] = self.add("recv", (), name, source=source, tag=tag, **{"async": True})
            given = x
            if (kind, k) in arrives:
                given = self.add("wait", (asked[kind, k],), f"got{kind}{k}")
            while len(sent) > ahead:
                old = sent.pop(0)
                self.add("wait", (old,), f"{old.name}.done")
            if kind == "F":
                made = kept[k] = self.add("neg", (given,), f"F{k}")
            else:
                made = self.add("mul", (given if given != x else kept[k], kept[k]), f"B{k}")
            to = stage + 1 if kind == "F" else stage - 1
            if 0 <= to < stages:
                tag = 2 * k + (kind == "B")
                sent.append(self.add("send", (made,), f"s{kind}{k}", to=to, tag=tag, **{"async": True}))
        for old in sent:
            self.add("wait", (old,), f"{old.name}.done")
        function = Function("main", (x,), tuple(self.ops), (), ({"role": "input", "name": "x"},))
        return function.with_(ops=tuple(add_frees(function, self.ops)))


def pipeline(
    order: str, stages: int, micro: int, mesh: Mesh, rows: int = 8, ahead: int | None = 1
) -> list[Module]:
    """The modules of all stages, scheduled by `GPipe` or `1F1B`; see `Writer` for `ahead`."""
    plan = {"GPipe": gpipe, "1F1B": one_f_one_b}[order]
    return [
        Module("schedule", (Writer(mesh, rows, ahead).stage(i, stages, plan(i, stages, micro)),), mesh)
        for i in range(stages)
    ]
