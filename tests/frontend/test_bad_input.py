"""Mistakes at run time: each ends in a diagnostic with a code, the reason and a way out."""

from __future__ import annotations

import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor, nn

import weft
from weft.frontend.cli import main
from weft.frontend.options import Options
from weft.ir.errors import CompileError, RunError, WeftError

ROOT = Path(__file__).parents[2]


class Net(nn.Module):
    """A linear layer, and a logarithm that makes NaN of negative numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.linear(x)
        return torch.log(hidden).sum()


class Masked(nn.Module):
    """Writes infinities down on purpose, as masks do."""

    def forward(self, x: Tensor) -> Tensor:
        mask = torch.ones(4, 4, dtype=torch.bool).tril()
        return torch.softmax(x.masked_fill(~mask, float("-inf")), -1).sum()


def has_a_way_out(error: WeftError) -> bool:
    return bool(error.code and error.reason and error.hint)


def net(bias: float = 10.0) -> Net:
    torch.manual_seed(0)
    module = Net()
    nn.init.constant_(module.linear.bias, bias)
    return module


def traced(module: nn.Module) -> Any:
    return weft.compile(module, progress=False, logs=("nan",))


def test_nan_is_traced_to_the_first_action_that_made_it() -> None:
    with torch.no_grad(), pytest.raises(RunError, match="log .* made the first NaN") as error:
        traced(net(-10.0))(torch.randn(2, 4))
    line = next(n for n, text in enumerate(Path(__file__).read_text().splitlines(), 1) if "torch.log(" in text)
    assert f"test_bad_input.py:{line}" in str(error.value)
    assert "was finite" in error.value.reason and has_a_way_out(error.value)


def test_inf_is_traced_too() -> None:
    module = net()
    nn.init.zeros_(module.linear.weight)
    nn.init.zeros_(module.linear.bias)
    with torch.no_grad(), pytest.raises(RunError, match="log .* made the first Inf"):
        traced(module)(torch.randn(2, 4))


def test_nan_in_inputs_and_parameters_is_told_before_the_step() -> None:
    x = torch.randn(2, 4)
    x[1, 2] = float("nan")
    with torch.no_grad(), pytest.raises(RunError, match="input 'x' holds NaN .* at \\[1, 2\\]") as error:
        traced(net())(x)
    assert error.value.code == "W0804" and has_a_way_out(error.value)
    with torch.no_grad(), pytest.raises(RunError, match="param 'linear.bias' holds NaN"):
        traced(net(float("nan")))(torch.randn(2, 4))


def test_masks_of_infinities_are_no_error() -> None:
    x = torch.randn(4, 4)
    with torch.no_grad():
        assert torch.allclose(traced(Masked())(x), Masked()(x))


def test_nan_is_found_in_the_backward_and_in_updates() -> None:
    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
        loss = torch.sqrt(model(x).abs()).sum()  # infinite gradient at 0
        loss.backward()
        optimizer.step()
        return loss

    model = nn.Linear(4, 3)
    nn.init.zeros_(model.weight)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    compiled = weft.compile(step, progress=False, logs=("nan",))
    with pytest.raises(RunError, match="made the first (NaN|Inf)") as error:
        compiled(model, optimizer, torch.randn(2, 4))
    assert "update" not in error.value.message


def test_the_environment_turns_it_on() -> None:
    assert Options.from_environment({"WEFT_LOGS": "place,nan"}).trace_nan
    assert Options.from_environment({"WEFT_LOGS": "+nan"}).trace_nan
    assert not Options.from_environment({"WEFT_LOGS": "place"}).trace_nan


def test_weft_run_traces_nan(tmp_path: Path) -> None:
    weft.plan(net(-10.0), (torch.randn(2, 4),)).save(tmp_path / "out")
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "WEFT_LOGS": "nan", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "weft", "run", str(tmp_path / "out")],
        env=env, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode and "made the first NaN" in done.stdout + done.stderr


def test_a_model_that_does_not_fit_is_told_by_how_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "huge.py"
    target.write_text(
        "import torch\n"
        "def model():\n"
        "    with torch.device('meta'):\n"
        "        return torch.nn.Linear(2**18, 2**18), (torch.empty(4, 2**18),), {}\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    run = CliRunner().invoke(
        main, ["compile", "huge:model", "--cluster", "1x2:h100", "-o", str(tmp_path / "out")]
    )
    text = " ".join(run.output.split())
    assert run.exit_code and "W0402" in text
    assert "do not fit" in text and "GB" in text and "use more devices" in text
    assert not (tmp_path / "out").exists()


def test_another_dtype_plans_again_and_equals_eager() -> None:
    module = nn.Embedding(5, 3)
    compiled = weft.compile(module, progress=False)
    with torch.no_grad():
        for dtype in (torch.int64, torch.int32):
            ids = torch.tensor([0, 4, 2], dtype=dtype)
            assert torch.equal(compiled(ids), module(ids))
    assert len(compiled.compiler.entries) == 2


def test_a_tensor_on_another_device_is_refused() -> None:
    compiled = weft.compile(nn.Linear(4, 3), progress=False)
    with torch.no_grad():
        compiled(torch.randn(2, 4))
        with pytest.raises(WeftError, match="meta") as error:
            compiled(torch.empty(2, 4, device="meta"))
    assert has_a_way_out(error.value)


def test_a_wrong_dtype_at_a_saved_plan_is_refused(tmp_path: Path) -> None:
    weft.plan(nn.Linear(4, 3), (torch.randn(2, 4),)).save(tmp_path / "out")
    with weft.load(tmp_path / "out") as exe:
        exe.load_weights()
        with pytest.raises(RunError, match="expected f32\\[2, 4\\], got float64\\[2, 4\\]") as error:
            exe.step(torch.randn(2, 4, dtype=torch.float64))
    assert error.value.code == "W0804" and has_a_way_out(error.value)


def faces(marked: bool) -> dict[str, Any]:
    """A module, a function and a train step that take rows of 4 numbers."""
    shapes = {"x": {0: torch.export.Dim("rows")}} if marked else None

    def scaled(x: Tensor) -> Tensor:
        return x * 2

    def train(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
        loss: Tensor = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    class Scale(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = nn.Linear(4, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    module, function, step = (
        weft.compile(t, dynamic_shapes=shapes, progress=False) for t in (Scale(4, 3), scaled, train)
    )
    return {"module": module, "function": function, "step": partial(step, model, optimizer)}


@pytest.mark.parametrize("marked", [False, True])
@pytest.mark.parametrize("face", ["module", "function", "step"])
def test_a_batch_of_size_zero_is_refused_at_the_call(face: str, marked: bool) -> None:
    compiled = faces(marked)[face]
    for rows in (2, 2):  # the first call, and one behind a plan
        with pytest.raises(CompileError, match=r"input x has no elements: .* \[0, 4\]") as error:
            compiled(torch.empty(0, 4))
        assert error.value.code == "W0302" and has_a_way_out(error.value)
        span = error.value.span
        assert span is not None and span.file == __file__ and span.text.strip() == "compiled(torch.empty(0, 4))"
        compiled(torch.ones(rows, 4))


def test_a_sequence_of_length_zero_is_refused_ahead_of_time_too() -> None:
    with pytest.raises(CompileError, match="input batch.ids has no elements") as error:
        weft.plan(lambda batch: batch["ids"] * 2, ({"ids": torch.ones(3, 0)},))
    assert error.value.code == "W0302" and "batch.ids.shape[1] is 0" in error.value.reason


def test_a_hook_that_reads_values_is_refused_at_its_line() -> None:
    module = nn.Linear(4, 3)
    module.register_forward_hook(lambda m, args, out: out / out.max().item())
    with torch.no_grad(), pytest.raises(CompileError, match="test_bad_input.py") as error:
        weft.compile(module, progress=False)(torch.randn(2, 4))
    assert error.value.code == "W0301" and has_a_way_out(error.value)


def test_an_input_that_is_changed_in_place_is_refused() -> None:
    def forward(x: Tensor) -> Tensor:
        x.add_(1)
        return x * 2

    with pytest.raises(CompileError, match="changes x in place") as error:
        weft.compile(forward, progress=False)(torch.randn(3))
    assert error.value.code == "W0302" and has_a_way_out(error.value)


def test_a_parameter_that_is_changed_in_the_forward_is_refused_or_followed() -> None:
    class Decays(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.mul_(0.5)
            return x * self.weight

    ours, theirs = Decays(), Decays()
    compiled, x = weft.compile(ours, progress=False), torch.randn(3)
    with torch.no_grad():
        try:
            assert torch.equal(compiled(x), theirs(x))
            assert torch.equal(ours.weight, theirs.weight)
        except CompileError as error:
            assert has_a_way_out(error)


@pytest.mark.parametrize("ask", [weft.plan, weft.search])
def test_a_plan_for_an_empty_batch_is_refused_at_the_users_line(ask: Any) -> None:
    with pytest.raises(CompileError, match="no elements") as caught:
        ask(nn.Linear(4, 4), (torch.ones(0, 4),), cluster="1x2:cpu")
    assert caught.value.code == "W0302" and caught.value.span is not None
    assert caught.value.span.file == __file__
