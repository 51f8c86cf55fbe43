"""Schedules compute what the spmd program does, and end every value's life at its last use."""

from __future__ import annotations

from random import Random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.passes.equality import assert_close, lowered
from tests.passes.networks import transformer
from tests.passes.programs import random_program
from tests.passes.random_inputs import random_inputs

from weft.ir.builder import Builder
from weft.ir.module import Function, Module, Op, Value
from weft.ir.parser import parse_module
from weft.ir.types import B, Mesh, P, S, TensorType, local_bytes
from weft.ir.verify import verify
from weft.passes.fuse import Fuse
from weft.passes.inline import inline
from weft.passes.outline import Outline
from weft.passes.random_place import random_choices
from weft.passes.schedule import Schedule, is_asynchronous, place_updates
from weft.runtime.interpreter import evaluate
from weft.runtime.schedule_check import check

MESHES = (Mesh((("x", 2),)), Mesh((("x", 2), ("y", 2))), Mesh((("x", 3), ("y", 2))))


def schedule(spmd: Module, in_flight: int = 4) -> Module:
    """The schedule, checked by the verifier and by the check that runs before a step."""
    after = Schedule(in_flight=in_flight).run(spmd)
    verify(after)
    check(after)
    return after


def check_lives(function: Function) -> None:
    """Each value but parameters and results is freed once, right behind its last use."""
    kept = {value.name for value in (*function.params, *function.results)}
    source = {op.results[0].name: op.operands for op in function.ops if op.attrs.get("async")}
    last: dict[str, int] = {}
    freed: dict[str, int] = {}
    actions = [op for op in function.ops if op.name != "free"]
    index = -1
    for op in function.ops:
        if op.name == "free":
            for value in op.operands:
                assert value.name not in freed
                freed[value.name] = index
            continue
        index += 1
        reads = op.operands + (source[op.operands[0].name] if op.name == "wait" else ())
        last.update((value.name, index) for value in (*reads, *op.results))
    assert freed == {name: at for name, at in last.items() if name not in kept}
    assert len(actions) == index + 1


def running(function: Function) -> int:
    """The largest number of collectives that run at once."""
    now = most = 0
    for op in function.ops:
        now += bool(op.attrs.get("async")) - (op.name == "wait")
        most = max(most, now)
    assert now == 0
    return most


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(MESHES), st.integers(1, 4), st.booleans())
def test_random_schedules_mean_what_the_spmd_program_means(
    seed: int, mesh: Mesh, in_flight: int, fused: bool
) -> None:
    program = random_program(seed)
    spmd = lowered(program.module, mesh, random_choices(program.module, mesh, Random(seed)))
    after = schedule(Fuse().run(spmd) if fused else spmd, in_flight)
    check_lives(after.entry)
    assert running(after.entry) <= in_flight
    assert_close(evaluate(spmd, program.inputs), evaluate(after, program.inputs))
    kernels = {f.name for f in after.functions[1:]}
    calls = {str(op.attrs["callee"]) for op in after.entry.ops if op.name == "call"}
    assert kernels == calls
    assert all("kernel" in f.attrs for f in after.functions[1:])


def test_a_schedule_of_calls_means_what_the_spmd_program_means() -> None:
    module = Outline().run(transformer(3))
    for seed in range(3):
        spmd = lowered(module, MESHES[1], random_choices(module, MESHES[1], Random(seed)))
        after = schedule(spmd)
        inputs = random_inputs(module)
        assert_close(evaluate(module, inputs), evaluate(after, inputs), 1e-5)
        waits = sum(op.name == "wait" for op in after.entry.ops)
        assert waits == sum(is_asynchronous(op) for op in inline(spmd).entry.ops)


def test_frees_never_leave_more_bytes_alive() -> None:
    module = transformer(2)
    spmd = lowered(module, MESHES[1], random_choices(module, MESHES[1], Random(5)))
    ops = schedule(spmd).entry.ops
    with_frees = alive(ops, MESHES[1])
    without = alive([op for op in ops if op.name != "free"], MESHES[1])
    pairs = zip(with_frees, without, strict=True)
    assert all(a <= b for a, b in pairs)
    assert max(with_frees) < max(without) / 4


def alive(ops: list[Op] | tuple[Op, ...], mesh: Mesh) -> list[int]:
    """Local bytes behind each action but frees. A handle's buffer is its result's, and what is
    updated in place has that of its parameter."""
    now, curve = 0, []
    for op in ops:
        if op.name == "free":
            now -= sum(
                local_bytes(v.type, mesh) for v in op.operands if not v.name.endswith("_start")
            )
            curve[-1] = now
        else:
            counted = not (op.attrs.get("async") or op.attrs.get("inplace"))
            now += sum(local_bytes(v.type, mesh) for v in op.results if counted)
            curve.append(now)
    return curve


# -- optimizer updates -----------------------------------------------------------------------------

_LINE = Mesh((("dp", 2),))


def step(layers: int, *, read_old: bool = False, sharded: bool = True) -> Module:
    """x -> x w0 -> ... and updates of all weights at the end, from gradients that come backwards."""
    b = Builder()
    one = TensorType("f64", (), (B,))
    x = b.param(TensorType("f64", (4, 4), (B,)), "x", role="input")
    n, lr = b.param(one, "step", role="state"), b.param(one, "lr", role="lr")
    type = TensorType("f64", (4, 4), (S(0) if sharded else B,))
    weights = [b.param(type, f"w{i}", role="param", name=f"w{i}") for i in range(layers)]
    full = []
    for w in weights:
        dim = {"axis": "dp", "dim": 0}
        full.append(b.many("all_gather", [w], dim, types=[x.type])[0] if sharded else w)
        x = b.many("einsum", [x, full[-1]], {"spec": "m k, k n -> m n"}, types=[x.type])[0]
    y, gradients = x, []
    for w in full[::-1]:
        part = b.many("partial", [x], {"axis": "dp"}, types=[TensorType("f64", (4, 4), (P(),))])[0]
        name, attrs = ("reduce_scatter", {"dim": 0}) if sharded else ("all_reduce", {})
        gradients.append(b.many(name, [part], {"axis": "dp", **attrs}, types=[type])[0])
        x = b.many("einsum", [x, w], {"spec": "m n, k n -> m k"}, types=[x.type])[0]
    split = {"dp": "a0"} if sharded else {}
    new = [
        b.many("sgd_update", [w, g, n, lr], types=[type], split=split)[0]
        for w, g in zip(weights, gradients[::-1], strict=True)
    ]
    old = [b.many("neg", [weights[0]], types=[type], split=split)[0]] if read_old else []
    outputs = [{"role": "output"}] * (1 + len(old))
    roles = [{"role": "update", "updates": w.name} for w in weights]
    return Module("spmd", (b.function("main", [y, *old, *new], [*outputs, *roles]),), _LINE)


@pytest.mark.parametrize("sharded", [True, False])
def test_updates_run_in_place_as_soon_as_their_gradient_is_there(sharded: bool) -> None:
    module = step(6, sharded=sharded)
    verify(module)
    after = schedule(module, in_flight=2)
    updates = [op for op in after.entry.ops if op.name == "sgd_update"]
    assert all(op.attrs.get("inplace") for op in updates) and len(updates) == 6
    assert [op.operands[0].name for op in updates][0] == "w5"
    names = [op.name for op in after.entry.ops]
    last_product = max(i for i, name in enumerate(names) if name == "einsum")
    assert sum(name == "sgd_update" for name in names[:last_product]) >= 3
    inputs = random_inputs(module)
    assert_close(evaluate(module, inputs), evaluate(after, inputs))


def test_a_step_with_early_updates_needs_less_memory() -> None:
    curves = []
    module = step(24, sharded=False)
    after = schedule(module)
    curves.append(max(alive(after.entry.ops, _LINE)))
    updates_last = sorted(after.entry.ops, key=lambda op: op.name == "sgd_update")
    late = Function("main", after.entry.params, tuple(o for o in updates_last if o.name != "free"),
                    after.entry.results)  # fmt: skip
    curves.append(max(alive(_with_frees(late), _LINE)))
    assert curves[0] < curves[1] / 1.5


def _with_frees(function: Function) -> list[Op]:
    kept = {value.name for value in (*function.params, *function.results)}
    source = {op.results[0].name: op.operands for op in function.ops if op.attrs.get("async")}
    out: list[Op] = []
    for op in reversed(function.ops):
        reads = op.operands + (source[op.operands[0].name] if op.name == "wait" else ())
        dying = [v for v in dict.fromkeys((*reads, *op.results)) if v.name not in kept]
        kept.update(value.name for value in dying)
        out += [Op("free", tuple(dying), ()), op] if dying else [op]
    return out[::-1]


def test_an_update_whose_old_state_is_read_later_is_not_in_place_before_that() -> None:
    module = step(3, read_old=True)
    after = schedule(module)
    names = [op.name for op in after.entry.ops]
    updates = [op for op in after.entry.ops if op.name == "sgd_update"]
    old = next(op for op in updates if op.operands[0].name == "w0")
    # it is moved behind the reader, so it may overwrite its state
    assert names.index("neg") < after.entry.ops.index(old)
    inputs = random_inputs(module)
    assert_close(evaluate(module, inputs), evaluate(after, inputs))


def _update(body: str, results: str, outputs: str) -> list[bool]:
    """Which updates of a one-rank program are in place?"""
    text = f"""weft 1 spmd
mesh [dp=1] "cpu"

func @main(%w: f32[4]{{B}} {{role = "param"}}, %g: f32[4]{{B}}, %n: f64[]{{B}}, %lr: f64[]{{B}}) -> ({outputs}) {{
{body}
  return {results}
}}
"""
    after = schedule(parse_module(text))
    return [bool(op.attrs.get("inplace")) for op in after.entry.ops if op.name == "sgd_update"]


_NEW = 'f32[4]{B} {role = "update", updates = "w"}'


@pytest.mark.parametrize(
    ("why", "body", "results", "outputs", "wanted"),
    [
        ("nothing reads the old state", "%v = sgd_update(%w, %g, %n, %lr) : f32[4]{B}",
         "%v", _NEW, [True]),
        ("a view of the old state is returned",
         "%o = reshape(%w) : f32[2, 2]{B}\n%v = sgd_update(%w, %g, %n, %lr) : f32[4]{B}",
         "%o, %v", "f32[2, 2]{B}, " + _NEW, [False]),
        ("a copy of the old state is returned",
         "%o = exp(%w) : f32[4]{B}\n%v = sgd_update(%w, %g, %n, %lr) : f32[4]{B}",
         "%o, %v", "f32[4]{B}, " + _NEW, [True]),
        ("the old state is the gradient", "%v = sgd_update(%w, %w, %n, %lr) : f32[4]{B}",
         "%v", _NEW, [False]),
        ("the result replaces nothing", "%v = sgd_update(%w, %g, %n, %lr) : f32[4]{B}",
         "%v", "f32[4]{B}", [False]),
        ("the state is a view", "%o = cast(%w) : f32[4]{B}\n%v = sgd_update(%o, %g, %n, %lr) : f32[4]{B}",
         "%v", _NEW, [False]),
        ("two updates in a row", "%u = sgd_update(%w, %g, %n, %lr) : f32[4]{B}\n"
         "%v = sgd_update(%u, %g, %n, %lr) : f32[4]{B}", "%v", _NEW, [False, False]),
    ],
)  # fmt: skip
def test_in_place_only_when_nothing_can_see_it(
    why: str, body: str, results: str, outputs: str, wanted: list[bool]
) -> None:
    assert _update(body, results, outputs) == wanted, why


def test_a_kernel_that_reads_a_parameter_does_not_keep_it_from_being_overwritten() -> None:
    text = """weft 1 spmd
mesh [dp=1] "cpu"

func @main(%w: f32[4]{B} {role = "param"}, %x: f32[4]{B}, %n: f64[]{B}, %lr: f64[]{B}) -> (f32[4]{B} {role = "output"}, f32[4]{B} {role = "output"}, f32[4]{B} {role = "update", updates = "w"}) {
  %a, %b = call(%x, %w) {callee = "k"} : f32[4]{B}, f32[4]{B}
  %v = sgd_update(%w, %a, %n, %lr) : f32[4]{B}
  %c = exp(%a) : f32[4]{B}
  return %c, %x, %v
}

func @k(%x: f32[4]{B}, %w: f32[4]{B}) -> (f32[4]{B}, f32[4]{B}) attrs {kernel = "k"} {
  %y = mul(%x, %w) : f32[4]{B}
  %z = reshape(%w) : f32[4]{B}
  return %y, %z
}
"""
    names = ("%c, %x, %v", "%c, %b, %v")
    wanted = (True, False)  # the second result of the kernel is a view of %w
    for returned, inplace in zip(names, wanted, strict=True):
        after = schedule(parse_module(text.replace("return %c, %x, %v", f"return {returned}")))
        update = next(op for op in after.entry.ops if op.name == "sgd_update")
        assert bool(update.attrs.get("inplace")) == inplace


def test_only_the_tail_of_the_program_moves() -> None:
    module = step(4)
    moved = place_updates(module.entry, module.entry.ops, {})
    assert [op for op in moved if op.name != "sgd_update"] == [
        op for op in module.entry.ops if op.name != "sgd_update"
    ]
    seen: set[str] = {value.name for value in module.entry.params}
    for op in moved:
        assert {value.name for value in op.operands} <= seen
        seen.update(value.name for value in op.results)


# -- collectives -----------------------------------------------------------------------------------


def gathers(count: int) -> Module:
    """All weights are gathered first, and used one after the other."""
    b = Builder()
    whole = TensorType("f32", (4, 4), (B,))
    x = b.param(whole, "x")
    weights = [b.param(TensorType("f32", (4, 4), (S(0),)), f"w{i}") for i in range(count)]
    dim = {"axis": "dp", "dim": 0}
    full = [b.many("all_gather", [w], dim, types=[whole])[0] for w in weights]
    for w in full:
        x = b.many("einsum", [x, w], {"spec": "m k, k n -> m n"}, types=[whole])[0]
    return Module("spmd", (b.function("main", [x]),), _LINE)


@pytest.mark.parametrize("in_flight", [1, 2, 4])
def test_gathers_run_ahead_but_do_not_pile_up(in_flight: int) -> None:
    ops = schedule(gathers(10), in_flight).entry.ops
    whole, now, most, ahead = 64, 0, 0, 0
    for op in ops:
        now += op.name == "all_gather"
        now -= op.name == "einsum"
        most = max(most, now)
        ahead += op.name == "all_gather" and now > 1
    assert most == in_flight or (in_flight == 1 and most <= 2)
    assert ahead > 0 or in_flight == 1
    assert max(alive(ops, _LINE)) <= (in_flight + 3) * whole


def test_a_reduction_starts_where_its_operand_is_there_and_ends_where_it_is_read() -> None:
    b = Builder()
    part, whole = TensorType("f32", (4,), (P(),)), TensorType("f32", (4,), (B,))
    p, x = b.param(part, "p"), b.param(whole, "x")
    y = b.many("exp", [x], types=[whole])[0]
    z = b.many("neg", [y], types=[whole])[0]
    r = b.many("all_reduce", [p], {"axis": "dp"}, types=[whole])[0]
    out = b.many("add", [z, r], types=[whole])[0]
    module = Module("spmd", (b.function("main", [out]),), _LINE)
    names = [op.name for op in schedule(module).entry.ops if op.name != "free"]
    assert names == ["all_reduce", "exp", "neg", "wait", "add"]


def test_the_same_program_gives_the_same_schedule() -> None:
    module = random_program(11).module
    spmd = lowered(module, MESHES[2], random_choices(module, MESHES[2], Random(1)))
    assert Schedule().run(spmd) == Schedule().run(spmd)


def test_a_result_nobody_reads_is_still_waited_for() -> None:
    b = Builder()
    p = b.param(TensorType("f32", (4,), (P(),)), "p")
    b.many("all_reduce", [p], {"axis": "dp"}, types=[TensorType("f32", (4,), (B,))])
    x = b.param(TensorType("f32", (4,), (B,)), "x")
    module = Module("spmd", (b.function("main", [x]),), _LINE)
    after = schedule(module)
    check_lives(after.entry)
    assert [op.name for op in after.entry.ops] == ["all_reduce", "wait", "free"]
    assert torch.equal(evaluate(after, [torch.ones(4), torch.ones(4)])[0], torch.ones(4))


def test_the_lives_of_a_long_step_are_right() -> None:
    module = step(1500)
    assert len(module.entry.ops) > 8000
    check_lives(schedule(module).entry)


def test_values_are_named_by_what_they_are() -> None:
    ops = schedule(gathers(1)).entry.ops
    start = next(op for op in ops if op.attrs.get("async"))
    wait = next(op for op in ops if op.name == "wait")
    assert start.results == (Value(f"{wait.results[0].name}_start", wait.results[0].type),)
