"""Segments between transfers, and their compilation for CPUs."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.frontend import zoo
from tests.runtime.random_schedules import valid
from torch import Tensor, nn
from torch.nn import functional as F

import weft
from weft.ir.errors import CompileError
from weft.ir.module import Function, Module, Op, Value
from weft.ir.types import B, Mesh, TensorType
from weft.runtime import inductor
from weft.runtime.comm import COMMUNICATION
from weft.runtime.launch import launch
from weft.runtime.lifetimes import check_lifetimes
from weft.runtime.segments import Segment, segments

ROOT = Path(__file__).parents[2]
Compile = Callable[..., Callable[..., Sequence[Tensor]]]


def uncompiled(program: inductor.Run, takes: Sequence[Tensor]) -> inductor.Run:
    """In place of Inductor: the ops themselves."""
    return program


# -- segments -------------------------------------------------------------------------------------


def value(name: str) -> Value:
    return Value(name, TensorType("f32", (4,), (B,)))


def op(text: str, **attrs: bool) -> Op:
    """`z = add x y`"""
    results, _, call = text.rpartition("=")
    name, *operands = call.split()
    return Op(name, tuple(map(value, operands)), tuple(map(value, results.split())), attrs)


def cut(*ops: Op, kept: str = "") -> list[str]:
    """The pieces as text: `[op op] op`."""
    out = []
    for piece in segments(list(enumerate(ops)), kept.split()):
        if isinstance(piece, Segment):
            names = " ".join(o.name for _, o in piece.actions)
            out.append(f"{' '.join(piece.takes)} [{names}] {' '.join(piece.gives)}")
        else:
            out.append(" ".join(o.name for _, o in piece))
    return out


def test_a_transfer_of_what_was_there_starts_ahead() -> None:
    gather = op("h = all_gather p", **{"async": True})
    assert cut(op("a = exp x"), gather, op("b = neg a"), op("g = wait h"), op("c = add b g"),
               kept="c") == ["all_gather", "x [exp neg] b", "wait", "b g [add] c"]  # fmt: skip


def test_a_transfer_of_what_a_segment_makes_ends_it() -> None:
    start = op("h = all_gather a", **{"async": True})
    assert cut(op("a = exp x"), start, op("b = neg a"), kept="b") == [
        "x [exp] a", "all_gather", "a [neg] b"
    ]  # fmt: skip


def test_an_all_reduce_may_write_what_a_segment_reads() -> None:
    start = op("h = all_reduce x", **{"async": True})
    assert cut(op("a = exp x"), start, op("b = neg a"), kept="b") == [
        "x [exp] a", "all_reduce", "a [neg] b"
    ]  # fmt: skip


def test_updates_and_frees_follow_their_segment() -> None:
    update = op("w1 = sgd_update w a s s", inplace=True)
    assert cut(op("a = exp x"), update, op("free a"), op("b = neg x"), kept="b") == [
        "x [exp neg] a b", "sgd_update free"
    ]  # fmt: skip
    assert cut(op("a = exp x"), update, op("b = neg w1"), kept="b") == [
        "x [exp] a", "sgd_update", "w1 [neg] b"
    ]  # fmt: skip


@given(st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_the_new_order_of_random_schedules_is_valid(seed: int) -> None:
    for function in valid(seed)[0].values():
        kept = {result.name for result in function.results}
        pieces = segments(list(enumerate(function.ops)), kept)
        actions = [a for p in pieces for a in (p.actions if isinstance(p, Segment) else p)]
        assert sorted(index for index, _ in actions) == list(range(len(function.ops)))
        check_lifetimes(function.with_(ops=tuple(o for _, o in actions)))
        transfers = [o for o in function.ops if o.name in COMMUNICATION]
        assert transfers == [o for _, o in actions if o.name in COMMUNICATION]


def test_equal_segments_are_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[inductor.Run] = []

    def compile(program: inductor.Run, takes: Sequence[Tensor]) -> inductor.Run:
        made.append(program)
        return program

    monkeypatch.setattr(inductor, "_compile", compile)
    ops = (op("a = exp x"), op("b = neg a"), op("h = all_reduce b", **{"async": True}),
           op("c = wait h"), op("d = exp c"), op("e = neg d"), op("f = exp e"))  # fmt: skip
    function = Function("main", (value("x"),), ops, (value("e"), value("f")))
    mesh = Mesh((("x", 2),))
    compiler = inductor.Inductor(
        Module("schedule", (function,), mesh), mesh, (0,), torch.device("cpu")
    )
    roots = {name: frozenset({name}) for name in "xabhcdef"}
    first, transfer, second = compiler.pieces(list(enumerate(ops[:-1])), {"e"}, {}, roots)
    assert isinstance(first, Segment) and isinstance(second, Segment) and len(made) == 1
    assert first.run is not None and second.run is not None
    x = torch.randn(4)
    torch.testing.assert_close(second.run(x)[0], -x.exp())
    *_, third = compiler.pieces(list(enumerate(ops))[3:], {"e", "f"}, {}, roots)
    assert isinstance(third, Segment) and len(made) == 2, "another segment"


# -- results --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["bert", "resnet"])
def test_a_segment_means_what_its_actions_mean(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inductor, "_compile", uncompiled)
    losses = []
    for backend in inductor.BACKENDS:
        torch.manual_seed(0)
        model, inputs = zoo.ZOO[name]()
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)

        @weft.compile(cpu_backend=backend)
        def step(model: nn.Module, optimizer: torch.optim.Optimizer, **inputs: Tensor) -> Tensor:
            loss: Tensor = model(**inputs).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            return loss

        torch.manual_seed(1)
        losses.append([float(step(model, optimizer, **inputs).detach()) for _ in range(3)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-6)


class Net(nn.Module):
    """Norms, dropout, views and a buffer that changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(16, 16), nn.LayerNorm(16)
        self.batch = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        x = x + F.dropout(F.gelu(self.linear(self.norm(x))), 0.3)
        out: Tensor = self.batch(x.reshape(-1, 4, 4)).flatten(1)
        return out


def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> tuple[Tensor, Tensor]:
    y = model(x)
    loss = (y - x.sin()).square().mean()
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss, y[:, ::2]


def test_a_compiled_step_equals_an_eager_one() -> None:
    found = []
    for backend in inductor.BACKENDS:
        torch.manual_seed(0)
        model = Net()
        step = weft.compile(train, cpu_backend=backend)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for number in range(3):
            x = torch.randn(8, 16, generator=torch.Generator().manual_seed(number))
            x = x if number < 2 else x.t().contiguous().t()  # other strides than before
            results = step(model, optimizer, x)
        found.append([*(r.detach() for r in results), *step.state_dict().values()])
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)


def test_two_ranks_equal_one_eager_process(tmp_path: Path) -> None:
    worker = str(Path(__file__).with_name("inductor_worker.py"))
    env = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}
    launch([worker, str(tmp_path / "out")], 2, env=env, timeout_s=300)
    for rank in range(2):
        report = torch.load(tmp_path / f"out.{rank}")
        assert report["compiled"] > 0
        torch.testing.assert_close(report["ours"], report["eager"], rtol=1e-5, atol=1e-5)


# -- what goes wrong ------------------------------------------------------------------------------


def test_actions_that_do_not_compile_run_one_by_one(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(program: inductor.Run, takes: Sequence[Tensor]) -> inductor.Run:
        raise NotImplementedError("not this one")

    monkeypatch.setattr(inductor, "_compile", refuse)
    function = weft.compile(lambda x: (x * 2).sin().exp(), cpu_backend="inductor")
    with caplog.at_level(logging.WARNING, "weft.inductor"):
        got = function(torch.ones(4))
    torch.testing.assert_close(got, (torch.ones(4) * 2).sin().exp())
    assert "[W0902]" in caplog.text and "not this one" in caplog.text


def test_results_that_inductor_makes_one_tensor_are_two(monkeypatch: pytest.MonkeyPatch) -> None:
    def merging(program: inductor.Run, takes: Sequence[Tensor]) -> inductor.Run:
        return lambda *tensors: [program(*tensors)[0]] * len(program(*tensors))

    monkeypatch.setattr(inductor, "_compile", merging)
    function = weft.compile(lambda x: ((x * 2).sin(), (x + x).sin()), cpu_backend="inductor")
    for _ in range(2):
        a, b = function(torch.ones(4))
        assert torch.equal(a, b) and a.data_ptr() != b.data_ptr()


def test_an_unknown_backend_is_refused() -> None:
    with pytest.raises(CompileError, match="W1001.*unknown cpu_backend 'inductr'"):
        weft.compile(lambda x: x, cpu_backend="inductr")
