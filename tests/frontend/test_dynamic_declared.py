"""Dynamic dims as users declare them: marks, torch.export.Dim, bounds, and what the log says."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.export import Dim

import weft
from weft.frontend import tracings
from weft.frontend.entries import KEPT_PLANS
from weft.ir.errors import CompileError


def double(x: Tensor, y: Tensor) -> Tensor:
    return (x * 2).sum(0) + y.sum(0)


def guarded(x: Tensor) -> Tensor:
    if x.shape[0] > 8:
        return x * 2
    return x + 1


def fixed(x: Tensor) -> Tensor:
    return x + torch.ones(6, 1)


def args(x: int, y: int = 3) -> tuple[Tensor, Tensor]:
    return torch.randn(x, 4), torch.randn(y, 4)


def told(caplog: pytest.LogCaptureFixture) -> list[logging.LogRecord]:
    """What was said of recompiles; other logs may be on."""
    return [record for record in caplog.records if record.name == "weft.recompiles"]


def traces(compiled: Any) -> int:
    return int(compiled.compiler.tracings.count)


def test_an_unmarked_size_is_traced_again_and_the_log_says_how_to_mark_it(
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiled = weft.compile(double)
    with caplog.at_level(logging.INFO, "weft.recompiles"):
        compiled(*args(5))
        assert not told(caplog)
        compiled(*args(6))
    assert traces(compiled) == 2
    (record,) = told(caplog)
    assert record.levelno == logging.INFO
    text = record.getMessage()
    assert text.startswith("double is traced and planned again: x.shape[0] was 5, now it is 6.")
    assert "torch._dynamo.mark_dynamic(x, 0)" in text
    assert "dynamic_shapes={'x': {0: torch.export.Dim('x_0')}}" in text


def test_other_changes_are_told_too(caplog: pytest.LogCaptureFixture) -> None:
    def program(batch: dict[str, Tensor], scale: float) -> Tensor:
        return batch["x"] * scale

    compiled = weft.compile(program)
    with caplog.at_level(logging.INFO, "weft.recompiles"):
        compiled({"x": torch.ones(3)}, 1.0)
        compiled({"x": torch.ones(3)}, 2.0)
        compiled({"x": torch.ones(3, dtype=torch.float64)}, 2.0)
        compiled({"x": torch.ones(3, 2, dtype=torch.float64)}, 2.0)
        compiled({"x": torch.ones(4, 2, dtype=torch.float64)}, 2.0)
    first, second, third, fourth = (record.getMessage() for record in told(caplog))
    assert "an input that is no tensor changed" in first
    assert "batch.x.dtype was torch.float32, now it is torch.float64" in second
    assert "batch.x.ndim was 1, now it is 2" in third
    assert "dynamic_shapes={'batch': {'x': {0: torch.export.Dim('x_0')}}}" in fourth


def test_many_traces_of_one_program_end_in_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    compiled = weft.compile(guarded)
    with caplog.at_level(logging.WARNING, "weft.recompiles"):
        for rows in range(2, tracings.MANY_TRACES + 5):
            compiled(torch.ones(rows, 2))
    (record,) = told(caplog)
    assert record.levelno == logging.WARNING
    assert "guarded was traced 8 times, and is again: x.shape[0] was 9, now it is 10" in caplog.text
    assert "torch._dynamo.mark_dynamic(x, 0)" in caplog.text


def test_a_condition_on_a_size_has_a_trace_for_each_side(caplog: pytest.LogCaptureFixture) -> None:
    compiled = weft.compile(guarded, dynamic_shapes={"x": {0: Dim("rows")}})
    with caplog.at_level(logging.INFO, "weft.recompiles"):
        for rows in (4, 7, 9, 30, 8, 3, 9):
            x = torch.randn(rows, 2)
            assert torch.equal(compiled(x), guarded(x)), rows
    assert traces(compiled) == 2
    (record,) = told(caplog)
    line = guarded.__code__.co_firstlineno + 1
    assert f"the program was traced for x.shape[0] <= 8 ({__file__}:{line})" in record.getMessage()


def test_a_dim_that_the_program_fixes_is_told(caplog: pytest.LogCaptureFixture) -> None:
    def by_hand(x: Tensor) -> Tensor:
        return x.sum() * int(x.shape[0])

    compiled = weft.compile(by_hand)
    for rows in (4, 5, 4):
        x = torch.ones(rows, 2)
        torch._dynamo.mark_dynamic(x, 0)
        assert compiled(x) == by_hand(x)
    assert traces(compiled) == 2
    place = f"{__file__}:{by_hand.__code__.co_firstlineno + 1}"
    wanted = "x.shape[0] is marked dynamic, but {} fixes it to {} by x.shape[0] == {} ({})"
    said = [record.getMessage() for record in told(caplog)]
    for text, rows in zip(said, (4, 5), strict=True):
        assert text.startswith(wanted.format(compiled.__qualname__, rows, rows, place))


def test_what_cannot_be_traced_with_symbols_is_traced_without(
    caplog: pytest.LogCaptureFixture,
) -> None:
    compiled = weft.compile(fixed, dynamic_shapes={"x": {0: Dim("rows")}})
    assert torch.equal(compiled(torch.ones(6, 2)), fixed(torch.ones(6, 2)))
    assert "x.shape[0] is marked dynamic, but fixed fixes it to 6 by x.shape[0] == 6" in caplog.text
    with pytest.raises(RuntimeError, match="broadcast"):  # the user's own mistake
        compiled(torch.ones(5, 2))
    assert "fixed cannot be traced with dynamic dims, each size is traced" in caplog.text


def test_maybe_mark_dynamic_and_mark_static() -> None:
    compiled = weft.compile(double)
    for rows in (4, 6, 5):
        x, y = args(rows)
        torch._dynamo.maybe_mark_dynamic(x, 0)
        torch.testing.assert_close(compiled(x, y), double(x, y))
    assert traces(compiled) == 1
    x, y = args(7)
    torch._dynamo.mark_static(x, 0)
    compiled(x, y)
    assert traces(compiled) == 1  # the trace there is serves a static size as well
    static = weft.compile(double)
    for rows in (4, 5):
        x, y = args(rows)
        torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_static(x, 0)
        static(x, y)
    assert traces(static) == 2


def test_unmarked_inputs_of_the_same_size_follow() -> None:
    compiled = weft.compile(lambda x, y: (x + y).sum(), dynamic_shapes={"x": {0: Dim.AUTO}})
    for rows in (4, 6, 5):
        compiled(*args(rows, rows))
    assert traces(compiled) == 1


def test_bounds_of_marks_hold() -> None:
    compiled = weft.compile(double)
    x, y = args(8)
    torch._dynamo.mark_dynamic(x, 0, min=4, max=16)
    for rows in (4, 16):
        compiled(*args(rows))
    compiled(x, y)
    for rows in (3, 17):
        with pytest.raises(CompileError, match=rf"x.shape\[0\] is {rows}, out of its bounds") as e:
            compiled(*args(rows))
        assert e.value.code == "W0306" and "4 to 16" in e.value.reason
    assert traces(compiled) == 3  # 4 and 16 came before the mark


def test_bounds_of_marks_hold_for_sizes_that_have_a_plan() -> None:
    compiled = weft.compile(double)
    for high, refused in ((None, False), (6, True), (9, False)):
        compiled(*args(3)), compiled(*args(3))
        x, y = args(5)
        torch._dynamo.mark_dynamic(x, 0, max=high)
        compiled(x, y)
        for _ in range(2):
            if refused:
                with pytest.raises(CompileError, match=r"x.shape\[0\] is 8, out of its bounds"):
                    compiled(*args(8))
            else:
                compiled(*args(8))


def test_bounds_and_names_of_dims_hold() -> None:
    rows = Dim("rows", min=2, max=8)
    compiled = weft.compile(double, dynamic_shapes={"x": (2 * rows, None), "y": {0: rows}})
    for size in (4, 2, 8):
        torch.testing.assert_close(compiled(*(a := args(2 * size, size))), double(*a))
    assert traces(compiled) == 1
    with pytest.raises(CompileError, match=r"x.shape\[0\] is 18, out of its bounds"):
        compiled(*args(18, 9))
    with pytest.raises(CompileError, match=r"x.shape\[0\] is 7, but y.shape\[0\] is 3") as error:
        compiled(*args(7, 3))
    assert error.value.code == "W0306" and "which makes it 6" in error.value.reason


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"z": {0: Dim("b")}}, "the program has no tensor input 'z'"),
        ({"x": {5: Dim("b")}}, "does not fit 2 dims"),
        ({"x": {0: "batch"}}, "is no dim"),
        ({"x": "batch"}, "does not fit 2 dims"),
        (3, "dynamic_shapes is int"),
    ],
)
def test_dynamic_shapes_that_do_not_fit_are_diagnosed(shapes: Any, message: str) -> None:
    with pytest.raises(CompileError, match=message) as error:
        weft.compile(double, dynamic_shapes=shapes)(*args(4))
    assert error.value.code == "W1001" and error.value.hint


def test_forms_of_dynamic_shapes() -> None:
    def program(x: Tensor, *rest: Tensor, **named: Tensor) -> Tensor:
        return sum((t.sum() for t in (*rest, *named.values())), x.sum())

    b = Dim("b")
    forms = [
        {"x": (b, Dim.STATIC), "rest": ({0: b},), "named": {"y": [b, None]}},
        {"x": {0: Dim.DYNAMIC(max=64)}, "y": {0: Dim.AUTO}, "rest": None},
    ]
    for shapes in forms:
        compiled = weft.compile(program, dynamic_shapes=shapes)
        for rows in (4, 5, 3):
            given = torch.randn(rows, 4), torch.randn(rows, 4)
            result = compiled(*given, y=given[1])
            torch.testing.assert_close(result, program(*given, y=given[1]))
        assert traces(compiled) == 1, shapes
    compiled = weft.compile(double, dynamic_shapes=({0: b}, None))
    for rows in (4, 5):
        compiled(*args(rows))
    assert traces(compiled) == 1


def test_plans_that_were_not_used_for_long_are_dropped() -> None:
    compiled = weft.compile(guarded, dynamic_shapes={"x": {0: Dim("rows")}})
    for rows in range(9, 9 + KEPT_PLANS + 3):
        compiled(torch.ones(rows, 1))
    assert len(compiled.compiler.entries) == KEPT_PLANS
    assert torch.equal(compiled(torch.ones(9, 1)), guarded(torch.ones(9, 1)))
    assert traces(compiled) == 1
