"""Random valid schedules of all ranks, and mutations that make one rank's schedule wrong."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from random import Random

from weft.ir.module import Function, Op, Value
from weft.ir.types import B, Mesh, P, Placement, S, TensorType
from weft.runtime.schedule_check import COLLECTIVES

Programs = dict[int, Function]
MESHES = [
    Mesh((("x", 2),)), Mesh((("x", 4),)), Mesh((("x", 2), ("y", 2))), Mesh((("x", 3), ("y", 2))),
    Mesh((("x", 2), ("y", 2), ("z", 2))),
]  # fmt: skip


# -- random valid schedules ----------------------------------------------------------------------


class Maker:
    """Writes one stage's program: computations, transfers, frees, updates in place."""

    def __init__(self, rng: Random, mesh: Mesh, stage: int = 0) -> None:
        self.rng, self.mesh, self.stage = rng, mesh, stage
        self.ops: list[Op] = []
        self.count = 0
        self.live: list[Value] = []
        self.open: list[tuple[Value, Value | None]] = []  # handle, operand
        whole = tuple([B] * len(mesh.axes))
        self.weight = Value("w", TensorType("f32", (12, 12), whole))
        self.momentum = Value("m", self.weight.type)
        self.scalar = Value("lr", TensorType("f64", (), whole))
        self.input = Value("x", self.weight.type)
        self.params = (self.weight, self.momentum, self.scalar, self.input)
        self.readable: list[Value] = [self.weight, self.input]

    def value(self, dtype: str = "f32", placement: Placement = B) -> Value:
        self.count += 1
        shape = self.rng.choice([(12, 12), (12, 24), (24,)])
        type = TensorType(dtype, shape, (placement, *([B] * (len(self.mesh.axes) - 1))))
        return Value(f"s{self.stage}.v{self.count}", type)

    def add(self, op: Op) -> None:
        self.ops.append(op)
        self.live.extend(op.results)

    def some(self) -> Value:
        handles = {handle for handle, _ in self.open}
        return self.rng.choice([*self.readable, *(v for v in self.live if v not in handles)])

    def compute(self) -> None:
        operands = (self.some(), self.some())
        name = self.rng.choice(["add", "mul", "einsum", "reshape"])
        operands = operands[:1] if name == "reshape" else operands
        self.add(Op(name, operands, (self.value(self.rng.choice(["f32", "bf16"])),)))

    def collective(self) -> None:
        name = self.rng.choice(sorted(COLLECTIVES))
        attrs: dict[str, bool | int | str] = {"axis": self.rng.choice(self.mesh.names)}
        if name in ("all_reduce", "reduce_scatter"):
            attrs["combine"] = self.rng.choice(["sum", "max", "min"])
        if name in ("all_gather", "reduce_scatter"):
            attrs["dim"] = 0
        if name == "all_to_all":
            attrs.update(source=0, target=1)
        if name == "broadcast":
            attrs["root"] = self.rng.randrange(2)
        self.transfer(Op(name, (self.some(),), (self.value("f32", S(0)),), attrs))

    def transfer(self, op: Op) -> None:
        if self.rng.random() < 0.6:
            self.add(op.with_(attrs={**op.attrs, "async": True}))
            self.open.append((op.results[0], op.operands[0] if op.operands else None))
        else:
            self.add(op)

    def wait(self) -> None:
        if not self.open:
            return
        handle, _ = self.open.pop(self.rng.randrange(len(self.open)))
        self.live.remove(handle)
        result = Value(f"{handle.name}.done", handle.type)
        self.add(Op("wait", (handle,), (result,)))
        if self.rng.random() < 0.8:
            self.ops.append(Op("free", (handle,), ()))

    def free(self) -> None:
        busy = {v for pair in self.open for v in pair}
        free = [value for value in self.live if value not in busy]
        if free:
            value = self.rng.choice(free)
            self.live.remove(value)
            self.ops.append(Op("free", (value,), ()))

    def finish(self) -> Function:
        while self.open:
            self.wait()
        views = {op.results[0] for op in self.ops if op.name == "reshape"}
        grad = next((v for v in self.live if v not in views), self.input)
        self.readable.remove(self.weight)
        results = tuple(replace(v, name=f"{v.name}1") for v in (self.weight, self.momentum))
        operands = (self.weight, grad, self.momentum, self.scalar, self.scalar)
        self.ops.append(Op("momentum_update", operands, results,
                           {"momentum": 0.9, "inplace": True}))  # fmt: skip
        loss = next((v for v in self.live if v not in views), self.input)
        roles = ({"role": "param"}, {"role": "state"}, {"role": "lr"}, {"role": "input"})
        updates = ({"role": "update", "updates": "w"}, {"role": "update", "updates": "m"})
        return Function("main", self.params, tuple(self.ops), (loss, *results), roles,
                        ({"role": "loss"}, *updates))  # fmt: skip


def valid(seed: int) -> tuple[Programs, Mesh]:
    """A random valid set of programs: one or two stages, each stage's ranks sharing a program."""
    rng = Random(seed)
    mesh = rng.choice(MESHES)
    stages = rng.choice([1, 1, 2])
    makers = [Maker(rng, mesh, stage) for stage in range(stages)]
    tag = 0
    for _ in range(rng.randint(8, 25)):
        if stages == 2 and rng.random() < 0.2:  # both sides in one global order: no deadlock
            source = rng.randrange(2)
            sender, receiver = makers[source], makers[1 - source]
            value = sender.some()
            token = Value(f"sent{tag}", value.type)
            sender.transfer(Op("send", (value,), (token,), {"to": 1 - source, "tag": tag}))
            receiver.transfer(
                Op("recv", (), (Value(f"got{tag}", value.type),), {"source": source, "tag": tag})
            )
            tag += 1
            continue
        for maker in makers:
            act = rng.choice(["compute", "compute", "collective", "collective", "wait", "free"])
            getattr(maker, act)()
    for maker in makers:
        maker.collective()
    functions = [maker.finish() for maker in makers]
    return {r: functions[r // mesh.size] for r in range(stages * mesh.size)}, mesh


# -- mutations of one rank's program --------------------------------------------------------------

Mutation = Callable[[Random, Function, int], Function | None]


def edit(function: Function, index: int, *new: Op) -> Function:
    """The program with the op at a position replaced by others."""
    ops = function.ops
    return function.with_(ops=(*ops[:index], *new, *ops[index + 1 :]))


def pick(rng: Random, function: Function, fits: Callable[[Op], bool]) -> int | None:
    found = [i for i, op in enumerate(function.ops) if fits(op)]
    return rng.choice(found) if found else None


def is_collective(op: Op) -> bool:
    return op.name in COLLECTIVES


def swap_collectives(rng: Random, function: Function, size: int) -> Function | None:
    """Two collectives of one group change places.

    (Of two groups they may: whether that deadlocks depends on the other ranks, see below.)
    """
    axis = rng.choice(["x", "y", "z"])
    found = [i for i, op in enumerate(function.ops) if op.attrs.get("axis") == axis]
    for first, second in rng.sample(list(zip(found, found[1:])), max(0, len(found) - 1)):
        between = {v for op in function.ops[first:second] for v in op.results}
        if between & set(function.ops[second].operands):
            continue
        ops = list(function.ops)
        ops.insert(first, ops.pop(second))
        return function.with_(ops=tuple(ops))
    return None


def swap_equal_all_reduces(rng: Random, function: Function, size: int) -> Function | None:
    """Two all_reduces of one type and axis, in the other order: gloo would mix them up."""
    index = pick(rng, function, lambda op: op.name == "all_reduce" and "async" not in op.attrs)
    if index is None:
        return None
    op = function.ops[index]
    twin = op.with_(results=(replace(op.results[0], name="twin"),))
    return edit(function, index, twin, op)


def with_twin(rng: Random, function: Function, size: int) -> Function | None:
    """The valid program that `swap_equal_all_reduces` differs from by the order alone."""
    index = pick(rng, function, lambda op: op.name == "all_reduce" and "async" not in op.attrs)
    if index is None:
        return None
    op = function.ops[index]
    return edit(function, index, op, op.with_(results=(replace(op.results[0], name="twin"),)))


def drop(rng: Random, function: Function, size: int) -> Function | None:
    """A collective is missing; what reads its result reads its operand instead."""
    index = pick(rng, function, lambda op: is_collective(op) and "async" not in op.attrs)
    if index is None:
        return None
    gone = function.ops[index]
    new = {gone.results[0]: gone.operands[0]}
    ops = [
        op.with_(operands=tuple(new.get(v, v) for v in op.operands))
        for op in function.ops
        if op is not gone and not (op.name == "free" and op.operands[0] in new)
    ]
    results = tuple(new.get(v, v) for v in function.results)
    return function.with_(ops=tuple(ops), results=results)


def retype(change: Callable[[TensorType], TensorType], result: bool) -> Mutation:
    def mutate(rng: Random, function: Function, size: int) -> Function | None:
        index = pick(rng, function, is_collective)
        if index is None:
            return None
        op = function.ops[index]
        (value,) = op.results if result else op.operands
        new = replace(value, type=change(value.type))
        side = {"results": (new,)} if result else {"operands": (new,)}
        return edit(function, index, op.with_(**side))

    return mutate


def set_attr(name: str, values: tuple[object, ...], *ops: str) -> Mutation:
    def mutate(rng: Random, function: Function, size: int) -> Function | None:
        index = pick(rng, function, lambda op: op.name in ops)
        if index is None:
            return None
        op = function.ops[index]
        others = [value for value in values if value != op.attrs.get(name)]
        return edit(function, index, op.with_(attrs={**op.attrs, name: rng.choice(others)}))

    return mutate


def another_op(rng: Random, function: Function, size: int) -> Function | None:
    index = pick(rng, function, is_collective)
    if index is None:
        return None
    op = function.ops[index]
    return edit(function, index, op.with_(name=rng.choice(sorted(COLLECTIVES - {op.name}))))


def early_free(rng: Random, function: Function, size: int) -> Function | None:
    """A value is freed before its last use, and not again."""
    uses = function.uses()
    readers = {name: [op for op in ops if op.name != "free"] for name, ops in uses.items()}
    index = pick(rng, function, lambda op: any(readers.get(v.name) for v in op.results))
    if index is None:
        return None
    value = next(v for v in function.ops[index].results if readers.get(v.name))
    ops = [op for op in function.ops if op != Op("free", (value,), ())]
    ops.insert(index + 1, Op("free", (value,), ()))
    return function.with_(ops=tuple(ops))


def double_free(rng: Random, function: Function, size: int) -> Function | None:
    index = pick(rng, function, lambda op: op.name == "free")
    if index is None:
        return None
    at = rng.randint(index + 1, len(function.ops))
    ops = function.ops
    return function.with_(ops=(*ops[:at], ops[index], *ops[at:]))


def drop_wait(rng: Random, function: Function, size: int) -> Function | None:
    index = pick(rng, function, lambda op: op.name == "wait")
    return None if index is None else edit(function, index)


def wait_twice(rng: Random, function: Function, size: int) -> Function | None:
    index = pick(rng, function, lambda op: op.name == "wait")
    if index is None:
        return None
    op = function.ops[index]
    return edit(function, index, op, op.with_(results=(replace(op.results[0], name="again"),)))


def read_handle(rng: Random, function: Function, size: int) -> Function | None:
    """A transfer is read before it is done."""
    index = pick(rng, function, lambda op: bool(op.attrs.get("async")))
    if index is None:
        return None
    op = function.ops[index]
    return edit(function, index, op, Op("neg", op.results, (Value("early", op.results[0].type),)))


def wait_without_start(rng: Random, function: Function, size: int) -> Function | None:
    index = pick(rng, function, lambda op: bool(op.attrs.get("async")))
    if index is None:
        return None
    op = function.ops[index]
    return edit(function, index, op.with_(attrs={**op.attrs, "async": False}))


def overwrite_early(rng: Random, function: Function, size: int) -> Function | None:
    """The in-place update moves before a reader of the old state."""
    last = function.ops[-1]
    reader = Op("neg", last.operands[:1], (Value("late", last.operands[0].type),))
    return function.with_(ops=(*function.ops, reader))


def free_in_flight(rng: Random, function: Function, size: int) -> Function | None:
    """The operand of a running transfer is freed."""
    kept = {v for v in (*function.params, *function.results)}
    index = pick(
        rng, function,
        lambda op: bool(op.attrs.get("async") and op.operands and op.operands[0] not in kept),
    )  # fmt: skip
    if index is None:
        return None
    op = function.ops[index]
    ops = [o for o in function.ops if o != Op("free", (op.operands[0],), ())]
    later = [o for o in ops[index + 1 :] if o.name == "free" or op.operands[0] not in o.operands]
    at = next(i for i, o in enumerate(ops) if o is op)
    return function.with_(ops=(*ops[: at + 1], Op("free", (op.operands[0],), ()), *later))


def drop_message(rng: Random, function: Function, size: int) -> Function | None:
    index = pick(rng, function, lambda op: op.name == "send" and "async" not in op.attrs)
    return None if index is None else edit(function, index)


def swap_messages(rng: Random, function: Function, size: int) -> Function | None:
    """Two sends to one stage, or two receives from one, change places."""
    kind = rng.choice(["send", "recv"])
    found = [i for i, op in enumerate(function.ops) if op.name == kind]
    for first, second in zip(found, found[1:], strict=False):
        made = {v for op in function.ops[first:second] for v in op.results}
        used = {v for op in function.ops[first + 1 : second + 1] for v in op.operands}
        ops = list(function.ops)
        if kind == "send" and not made & set(ops[second].operands):
            ops.insert(first, ops.pop(second))
        elif kind == "recv" and not used & set(ops[first].results):
            ops.insert(second, ops.pop(first))
        else:
            continue
        return function.with_(ops=tuple(ops))
    return None


def message_type(rng: Random, function: Function, size: int) -> Function | None:
    index = pick(rng, function, lambda op: op.name == "send")
    if index is None:
        return None
    op = function.ops[index]
    (value,) = op.operands
    narrow = replace(value, type=replace(value.type, dtype="i32"))
    return edit(function, index, op.with_(operands=(narrow,)))


MUTATIONS: dict[str, Mutation] = {
    "swap": swap_collectives,
    "drop": drop,
    "operand dtype": retype(lambda t: replace(t, dtype="i32"), False),
    "result dtype": retype(lambda t: replace(t, dtype="f64"), True),
    "operand shape": retype(lambda t: replace(t, shape=(*t.shape, 2)), False),
    "result shape": retype(lambda t: replace(t, shape=t.shape[::-1] + (3,)), True),
    "placement": retype(lambda t: t.placed([P("sum")] * 3), False),
    "reduce-op": set_attr("combine", ("sum", "max", "min"), "all_reduce", "reduce_scatter"),
    "axis": set_attr("axis", ("x", "y", "z"), *COLLECTIVES),
    "root": set_attr("root", (0, 1, 2), "broadcast"),
    "shift": set_attr("shift", (2, 3), "permute_ranks"),
    "dim": set_attr("dim", (0, 1), "all_gather", "reduce_scatter"),
    "op": another_op,
    "early free": early_free,
    "double free": double_free,
    "drop wait": drop_wait,
    "wait twice": wait_twice,
    "read a handle": read_handle,
    "wait without start": wait_without_start,
    "overwrite before the last read": overwrite_early,
    "free in flight": free_in_flight,
    "drop a message": drop_message,
    "swap messages": swap_messages,
    "message type": message_type,
    "tag": set_attr("tag", (1000, 1001), "send", "recv"),
}
