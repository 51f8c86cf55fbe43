"""The executor on one rank: generated source, memory, updates in place, failures, halves."""

from __future__ import annotations

import gc
import hashlib
import json
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.runtime.schedules import FORWARD_BACKWARD, TRAIN_STEP, random_schedule
from torch import Tensor

from weft.ir.errors import RunError
from weft.ir.module import Function, Module, Op, Value
from weft.ir.ops.optimizer import OVERWRITES
from weft.ir.parser import parse_module
from weft.ir.types import Mesh, TensorType
from weft.runtime.comm import Comm
from weft.runtime.executor import Executor, peak_bytes
from weft.runtime.interpreter import evaluate
from weft.runtime.kernel_manifest import FORMAT
from weft.runtime.kernels import load_kernels
from weft.runtime.sections import after_tangents
from weft.runtime.trace import Trace, read_events
from weft.runtime.wrapper import HOIST_BYTES

ONE = Mesh((("x", 1), ("y", 1)))


def alone(text: str) -> Module:
    """A test schedule for a mesh of one rank."""
    return parse_module(text.replace("dp=2, tp=2", "dp=1, tp=1"))


def run(executor: Executor, values: dict[str, Tensor]) -> list[Tensor]:
    """One step with values for all entry parameters, by name."""
    for slot, value in enumerate(executor.kept):
        executor.state[slot] = values[value.name].clone()
    return executor.run([values[value.name] for value in executor.fed])


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 100_000))
def test_a_random_schedule_equals_the_logical_program(seed: int) -> None:
    case = random_schedule(seed, ONE)
    want = evaluate(case.logical, case.inputs)
    names = [value.name for value in case.logical.entry.params]
    executor = Executor(case.schedule)
    got = iter(run(executor, dict(zip(names, case.inputs, strict=True))))
    kept = [value.name for value in executor.kept]
    for number, attrs in enumerate(case.schedule.entry.result_attrs):
        updates = attrs.get("updates")
        found = next(got) if updates is None else executor.state[kept.index(str(updates))]
        torch.testing.assert_close(found, want[number], rtol=1e-9, atol=1e-9)


def test_the_source_has_a_line_for_each_action_with_the_users_place() -> None:
    source = Executor(alone(TRAIN_STEP)).source
    assert "# einsum, model.linear (train.py:12)" in source
    assert ".wait()" in source and "del v" in source
    assert "constant" not in source  # known before the first step


def test_a_free_ends_the_memory_of_a_value() -> None:
    executor = Executor(alone(TRAIN_STEP))
    seen: list[weakref.ref[Tensor]] = []
    alive: list[int] = []
    space = executor.wrapper.sections[0].run.__globals__  # type: ignore[union-attr]
    for name, function in list(space.items()):
        if name[:1] == "f" and name[1:].isdigit():

            def watch(*operands: Tensor, call=function) -> object:  # type: ignore[no-untyped-def]
                out = call(*operands)
                alive.append(sum(ref() is not None for ref in seen))
                seen.extend(weakref.ref(t) for t in [out] if isinstance(t, Tensor))
                return out

            space[name] = watch
    gc.disable()
    try:
        executor.run([torch.ones(7, 5), torch.tensor(0.1, dtype=torch.float64)])
    finally:
        gc.enable()
    assert len(seen) > 6 and max(alive) <= 5


def update_module(name: str, **attrs: float | bool) -> Module:
    """Two parameters updated by an optimizer, in place, one after the other."""
    count = len(OVERWRITES[name])
    type, scalar = TensorType("f32", (3, 4), ()), TensorType("f64", (), ())
    step, lr = Value("step", scalar), Value("lr", scalar)
    params: list[Value] = [step, lr]
    roles: list[dict[str, str]] = [{"role": "state", "name": "step"}, {"role": "lr"}]
    ops, results, updates = [], [], []
    for i in range(2):
        kept = [Value(f"k{i}{j}", type) for j in range(count)]
        grad = Value(f"g{i}", type)
        params += [*kept, grad]
        roles += [{"role": "param"}] + [{"role": "state"}] * (count - 1) + [{"role": "input"}]
        new = tuple(Value(f"n{i}{j}", type) for j in range(count))
        ops.append(Op(name, (kept[0], grad, *kept[1:], step, lr), new, {**attrs, "inplace": True}))
        results += new
        updates += [{"role": "update", "updates": value.name} for value in kept]
    entry = Function(
        "main", tuple(params), tuple(ops), tuple(results), tuple(roles), tuple(updates)
    )
    return Module("schedule", (entry,), Mesh())


@pytest.mark.parametrize(
    ("name", "attrs"),
    [
        ("adamw_update", {"weight_decay": 0.1, "beta1": 0.8}),
        ("adam_update", {"weight_decay": 0.1, "maximize": True}),
        ("sgd_update", {"weight_decay": 0.1}),
        ("sgd_update", {"maximize": True}),
        ("momentum_update", {"momentum": 0.9, "dampening": 0.5, "weight_decay": 0.1}),
        ("momentum_update", {"momentum": 0.9, "nesterov": True, "maximize": True}),
    ],
)
@pytest.mark.parametrize("count", [1.0, 3.0])
def test_updates_write_in_place_what_their_semantics_say(
    name: str, attrs: dict[str, float | bool], count: float
) -> None:
    module = update_module(name, **attrs)
    executor = Executor(module)
    assert executor.source.count(f"# {name}") == 1  # the two run as one
    values = {v.name: torch.rand(3, 4) for v in module.entry.params if v.type.shape}
    values |= {"step": torch.tensor(count).double(), "lr": torch.tensor(0.01).double()}
    want = evaluate(module, [values[v.name] for v in module.entry.params])
    for slot, value in enumerate(executor.kept):
        executor.state[slot] = values[value.name].clone()
    before = [tensor.data_ptr() for tensor in executor.state]
    executor.run([values[value.name] for value in executor.fed])
    assert [tensor.data_ptr() for tensor in executor.state] == before
    names = [value.name for value in executor.kept]
    for attrs_, tensor in zip(module.entry.result_attrs, want, strict=True):
        got = executor.state[names.index(str(attrs_["updates"]))]
        torch.testing.assert_close(got, tensor, rtol=1e-5, atol=1e-7)


def one_function(ops: str, results: str, attrs: str = "") -> Module:
    return parse_module(f"""weft 1 schedule
mesh [] "cpu"

func @main(%w: f32[4, 4]{{}} {{role = "param", name = "w"}}, %x: f32[4, 4]{{}} {{role = "input"}}) -> ({results}) {{
{ops}
}}

loc @1 = "model.layer" "user.py":7
""")


def test_a_new_state_never_shares_memory_with_a_result_a_constant_or_the_old_state() -> None:
    module = one_function(
        '  %t = permute(%w) {dims = [1, 0]} : f32[4, 4]{}\n  return %t, %t, %w',
        'f32[4, 4]{} {role = "update", updates = "w"}, f32[4, 4]{} {role = "output"}, '
        'f32[4, 4]{} {role = "output"}',
    )  # fmt: skip
    executor = Executor(module)
    w = torch.arange(16.0).reshape(4, 4)
    results = run(executor, {"w": w, "x": w})
    assert torch.equal(executor.state[0], w.T) and executor.state[0].is_contiguous()
    executor.state[0].zero_()
    assert torch.equal(results[0], w.T) and torch.equal(results[1], w)

    zeros = one_function(
        '  %z = constant() {value = 0.0} : f32[4, 4]{}\n  return %z',
        'f32[4, 4]{} {role = "update", updates = "w"}',
    )  # fmt: skip
    executor = Executor(zeros)
    executor.run([w])
    executor.state[0] += 1
    executor.run([w])
    assert torch.equal(executor.state[0], torch.zeros(4, 4))


def test_a_state_updated_in_place_can_be_an_output_too() -> None:
    module = update_module("sgd_update")
    entry = module.entry
    entry = entry.with_(
        results=(*entry.results, entry.results[0]),
        result_attrs=(*entry.result_attrs, {"role": "output"}),
    )
    executor = Executor(module.with_(functions=(entry,)))
    values = {v.name: torch.ones(v.type.shape) for v in entry.params}
    values |= {"step": torch.ones(()).double(), "lr": torch.tensor(0.5).double()}
    (first,) = run(executor, values)
    executor.run([values[value.name] for value in executor.fed])
    assert torch.equal(first, torch.full((3, 4), 0.5))  # the second step did not touch it
    assert torch.equal(executor.state[1], torch.zeros(3, 4))


def test_large_constants_are_made_anew_each_step() -> None:
    size = HOIST_BYTES // 4 + 1
    text = f"  %z = constant() {{value = 1.0}} : f32[{size}]{{}}\n  return %z"
    executor = Executor(one_function(text, f'f32[{size}]{{}} {{role = "output"}}'))
    assert not executor.wrapper.constants
    assert executor.run([torch.ones(4, 4)])[0].sum() == size


def test_an_error_in_an_action_names_rank_action_module_path_and_line() -> None:
    module = one_function(
        '  %i = cast(%x) : i64[4, 4]{}\n'
        '  %y = gather(%w, %i) {dim = 0} : f32[4, 4]{} @1\n  return %y',
        'f32[4, 4]{} {role = "output"}',
    )  # fmt: skip
    executor = Executor(module)
    with pytest.raises(RunError) as error:
        executor.run([torch.full((4, 4), 9.0)])
    assert error.value.code == "W0803"
    assert "rank 0 failed in gather (%y) of model.layer (user.py:7)" in str(error.value)
    assert isinstance(error.value.__cause__, (RuntimeError, IndexError))


def test_kernel_functions_run_the_given_kernel_or_their_body() -> None:
    text = """weft 1 schedule
mesh [] "cpu"

func @main(%x: f32[4, 4]{} {role = "input"}) -> (f32[4, 4]{} {role = "output"}, f32[4, 4]{} {role = "output"}) {
  %y, %z = call(%x) {callee = "twice"} : f32[4, 4]{}, f32[4, 4]{}
  return %y, %z
}

func @twice(%a: f32[4, 4]{}) -> (f32[4, 4]{}, f32[4, 4]{}) attrs {kernel = "k0"} {
  %b = add(%a, %a) : f32[4, 4]{}
  %c = exp(%b) : f32[4, 4]{}
  return %b, %a
}
"""
    module, x = parse_module(text), torch.rand(4, 4)
    body = Executor(module).run([x])
    assert torch.equal(body[0], 2 * x) and torch.equal(body[1], x)
    calls: list[torch.Size] = []

    def launch(a: Tensor) -> tuple[Tensor, ...]:
        calls.append(a.shape)
        return a * 2, a.clone()

    compiled = Executor(module, kernels={"k0": launch}).run([x])
    assert torch.equal(compiled[0], body[0]) and calls == [torch.Size((4, 4))]


def test_kernels_are_loaded_from_files_that_match_their_manifest(tmp_path: Path) -> None:
    text = "def launch(x):\n    return (x + 1,)\n"
    (tmp_path / "k0.py").write_text(text)
    entry = {"name": "k0", "fallback": "", "source": "k0.py",
             "source_sha256": hashlib.sha256(text.encode()).hexdigest()}  # fmt: skip
    other = {"name": "k1", "fallback": "aten", "reason": "too large"}
    (tmp_path / "manifest.json").write_text(json.dumps({"format": FORMAT, "kernels": [entry, other]}))
    kernels = load_kernels(tmp_path)
    assert list(kernels) == ["k0"] and torch.equal(
        kernels["k0"](torch.ones(2))[0], torch.full((2,), 2.0)
    )
    (tmp_path / "k0.py").write_text(text + "#")
    with pytest.raises(RunError, match="W0701"):
        load_kernels(tmp_path)
    assert load_kernels(tmp_path / "none") == {}


def test_begin_hands_its_values_to_finish_once() -> None:
    module = alone(FORWARD_BACKWARD)
    executor = Executor(module)
    w, x, dy = torch.randn(5, 6), torch.randn(7, 5), torch.randn(7, 6)
    want = evaluate(module, [w, x, dy])
    executor.state[0] = w
    for _ in range(2):
        (y,) = executor.begin([x])
        got = [y, *executor.finish([dy])]
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b)
    with pytest.raises(RunError, match="without begin"):
        executor.finish([dy])
    with pytest.raises(RunError, match="two halves"):
        executor.run([x, dy])


def test_actions_move_behind_the_outputs_only_when_they_must() -> None:
    entry = parse_module(FORWARD_BACKWARD).entry
    late = [entry.ops[i] for i in sorted(after_tangents(entry, {"dy"}))]
    assert late[0].name == "shard"  # it stood first, and needs the tangent
    assert "permute" not in [op.name for op in late]
    assert "relu" not in [op.name for op in late]


def test_the_planned_peak_counts_live_values_and_not_views() -> None:
    module = parse_module(TRAIN_STEP)
    # parameters 140 B, x 4 x 5, loss and update scalars; y, q of 4 x 3 live together
    peak = peak_bytes(module.entry, Mesh((("dp", 2), ("tp", 2))), (0, 0))
    entry = module.entry
    unfreed = entry.with_(ops=tuple(op for op in entry.ops if op.name != "free"))
    assert peak < peak_bytes(unfreed, Mesh((("dp", 2), ("tp", 2))), (0, 0))
    view = one_function(
        "  %t = permute(%w) {dims = [1, 0]} : f32[4, 4]{}\n  %y = neg(%t) : f32[4, 4]{}\n  return %y",
        'f32[4, 4]{} {role = "output"}',
    )
    assert peak_bytes(view.entry, Mesh(), ()) == 3 * 64


def test_a_trace_is_a_chrome_trace_with_the_module_paths(tmp_path: Path) -> None:
    executor = Executor(alone(TRAIN_STEP))
    trace = Trace(0)
    for _ in range(2):
        executor.run([torch.ones(7, 5), torch.tensor(0.1, dtype=torch.float64)], trace=trace)
    events = read_events(trace.write(tmp_path / "trace.json"))
    slices = [event for event in events if event["ph"] == "X"]
    assert {event["args"]["step"] for event in slices} == {0, 1}
    first = next(event for event in slices if event["name"] == "model.linear: einsum")
    assert first["args"]["source"] == "train.py:12" and first["dur"] >= 0
    starts = [e["ts"] for e in slices if e["cat"] == "compute"]
    assert starts == sorted(starts)


def test_a_module_of_another_level_or_world_is_refused() -> None:
    logical = Module("logical", (parse_module(TRAIN_STEP).entry,), Mesh())
    with pytest.raises(RunError, match="W0804"):
        Executor(logical)
    with pytest.raises(RunError, match="W0801"):
        Executor(parse_module(TRAIN_STEP))
    with pytest.raises(RunError, match="W0801"):
        Comm(Mesh((("x", 2),)))
