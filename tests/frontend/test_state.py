"""State of compiled programs on one rank: dicts, checkpoints, torch's own files, other modules."""

from __future__ import annotations

import pickle
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from tests.frontend.rank_worker import Net, batch, differ, net, step
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)

import weft
from weft.ir.errors import CompileError, RunError

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def adamw(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=lr)


def eager(steps: int) -> tuple[Net, torch.optim.Optimizer]:
    model = net()
    optimizer = adamw(model)
    for number in range(steps):
        step(model, optimizer, *batch(number))
    return model, optimizer


def compiled(steps: int) -> tuple[Any, Net, torch.optim.Optimizer]:
    model = net()
    optimizer = adamw(model)
    made = weft.compile(step)
    for number in range(steps):
        made(model, optimizer, *batch(number))
    return made, model, optimizer


def goes_on(made: Any, model: Net, optimizer: Any, twin: Net, other: Any, at: int) -> None:
    for number in range(at, at + 2):
        mine = made(model, optimizer, *batch(number))
        assert differ(mine, step(twin, other, *batch(number))) < 1e-5
    made.sync()
    for (name, a), b in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert differ(a, b) < 1e-4, name


def same(a: Any, b: Any, limit: float = 1e-5) -> None:
    assert type(a) is type(b) or isinstance(a, dict) and isinstance(b, dict)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            same(a[key], b[key], limit)
    elif isinstance(a, (list, tuple)):
        for x, y in zip(a, b, strict=True):
            same(x, y, limit)
    elif isinstance(a, Tensor):
        assert a.dtype == b.dtype and differ(a, b) <= limit
    else:
        assert a == b


def test_dicts_have_the_forms_of_torch() -> None:
    made, model, optimizer = compiled(2)
    theirs, other = eager(2)
    same(made.model_state_dict(), theirs.state_dict())
    assert list(made.model_state_dict()) == list(theirs.state_dict())
    same(made.optimizer_state_dict(), get_optimizer_state_dict(theirs, other))


@pytest.mark.parametrize("before", [0, 1])
def test_dicts_of_an_eager_program_are_taken(before: int) -> None:
    for numbered in (True, False):
        theirs, other = eager(2)
        state = other.state_dict() if numbered else get_optimizer_state_dict(theirs, other)
        made, model, optimizer = compiled(before)
        made.load_model_state_dict(deepcopy(theirs.state_dict()))
        made.load_optimizer_state_dict(deepcopy(state))
        goes_on(made, model, optimizer, theirs, other, 2)


def test_flat_dicts_go_round() -> None:
    made, model, optimizer = compiled(2)
    state = made.state_dict()
    other, again, theirs = compiled(1)
    other.load_state_dict(state)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, state[name])
    assert torch.equal(again.first.weight, model.first.weight)  # the model sees it at once
    with pytest.raises(RunError, match="missing"):
        other.load_state_dict({"embedding.weight": state["embedding.weight"]})


@pytest.mark.parametrize("numbered", [False, True])
@pytest.mark.parametrize("prefix", ["", "app."])
def test_checkpoints_of_eager_programs_are_read(
    tmp_path: Path, numbered: bool, prefix: str
) -> None:
    theirs, other = eager(2)
    states = other.state_dict() if numbered else get_optimizer_state_dict(theirs, other)
    state: dict[str, Any] = {"model": get_model_state_dict(theirs), "optim": states}
    dcp.save({"app": state} if prefix else state, checkpoint_id=tmp_path / "dcp", no_dist=True)
    made, model, optimizer = compiled(0)
    assert made.resume(tmp_path / "nothing") == 0
    assert made.resume(tmp_path / "dcp") == 2
    goes_on(made, model, optimizer, theirs, other, 2)
    assert made.bytes_read > 0


def test_eager_programs_read_what_a_plan_wrote(tmp_path: Path) -> None:
    made, model, optimizer = compiled(2)
    state = {"model": made.model_state_dict(), "optim": made.optimizer_state_dict()}
    dcp.save(state, checkpoint_id=tmp_path, no_dist=True)
    theirs, other = eager(1)
    target = {"model": get_model_state_dict(theirs),
              "optim": get_optimizer_state_dict(theirs, other)}  # fmt: skip
    dcp.load(target, checkpoint_id=tmp_path, no_dist=True)
    set_model_state_dict(theirs, target["model"])
    set_optimizer_state_dict(theirs, other, target["optim"])
    assert torch.equal(theirs.first.weight, model.first.weight)
    goes_on(made, model, optimizer, theirs, other, 2)


def test_a_run_that_resumes_equals_one_that_went_through(tmp_path: Path) -> None:
    def run(dropout: float, steps: range, resume: bool) -> list[float]:
        model = net(dropout)
        optimizer = adamw(model)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
        made = weft.compile(step)
        torch.manual_seed(7)
        if resume:
            torch.manual_seed(8)
            assert made.resume(tmp_path) == steps.start
            scheduler.load_state_dict(made.extra["scheduler"])
            optimizer.param_groups[0]["lr"] = scheduler.get_last_lr()[0]
        losses = []
        for number in steps:
            losses.append(float(made(model, optimizer, *batch(number))))
            scheduler.step()
            if number == 2 and not resume:
                made.save(tmp_path, number + 1, extra={"scheduler": scheduler.state_dict()})
        return losses

    whole = run(0.5, range(6), False)
    assert run(0.5, range(3, 6), True) == whole[3:]


def test_a_module_and_its_optimizer_go_to_a_train_step_and_back(tmp_path: Path) -> None:
    theirs, other = eager(2)
    module = weft.compile(theirs)
    assert list(module.state_dict()) == list(net().state_dict())
    module.save(tmp_path / "module", 2, other, asynchronous=True)
    module.wait()
    made, model, optimizer = compiled(1)
    assert made.load(tmp_path / "module") == 2
    goes_on(made, model, optimizer, theirs, other, 2)
    made.save(tmp_path / "step", 4)
    fresh = net()
    twin = adamw(fresh)
    again = weft.compile(fresh)
    assert again.load(tmp_path / "step", twin) == 4
    for a, b in zip(fresh.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
    same(get_optimizer_state_dict(fresh, twin), made.optimizer_state_dict(), 0.0)


def test_hugging_face_files_go_in_and_out(tmp_path: Path) -> None:
    made, model, optimizer = compiled(2)
    made.save_pretrained(tmp_path)
    other, again, _ = compiled(0)
    other.load_pretrained(tmp_path)
    other(again, adamw(again, 0.0), *batch(3))
    assert torch.equal(again.embedding.weight, model.embedding.weight)


def test_what_cannot_be_loaded_is_said(tmp_path: Path) -> None:
    made, _, _ = compiled(1)
    with pytest.raises(RunError) as caught:
        made.load(tmp_path)
    assert caught.value.code == "W1101"
    dcp.save({"model": {"other": torch.ones(3)}}, checkpoint_id=tmp_path / "a", no_dist=True)
    with pytest.raises(RunError) as caught:
        made.load(tmp_path / "a")
    assert caught.value.code == "W1102" and "not in the checkpoint" in str(caught.value)
    with pytest.raises(RunError, match="no optimizer state"):
        made.load_optimizer_state_dict({"state": {"first.weight": {"sum": torch.ones(12, 8)}}})
    with pytest.raises(RunError) as caught:
        made.save(tmp_path, 1, extra={"tensor": torch.ones(1)})
    assert caught.value.code == "W1105"
    with pytest.raises(CompileError, match="no state before its first call"):
        weft.compile(step).state_dict()
    plain = weft.compile(lambda x: x + 1)
    plain(torch.ones(2))
    with pytest.raises(CompileError, match="is no train step"):
        plain.state_dict()


def test_pickles_in_torchs_files_make_nothing_else(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.mkdir, (tmp_path / "exploded",)

    made, _, _ = compiled(1)
    dcp.save({"model": made.model_state_dict()}, checkpoint_id=tmp_path / "a", no_dist=True)
    good = (tmp_path / "a" / ".metadata").read_bytes()
    for bad in (pickle.dumps(Bomb()), good[: len(good) // 2], b"", pickle.dumps({"a": 1})):
        (tmp_path / "a" / ".metadata").write_bytes(bad)
        with pytest.raises(RunError) as caught:
            made.load(tmp_path / "a")
        assert caught.value.code == "W1103"
    assert not (tmp_path / "exploded").exists()


def test_writing_into_the_model_between_steps_is_seen() -> None:
    made, model, optimizer = compiled(1)
    theirs, other = eager(1)
    for each in (model, theirs):
        each.load_state_dict({n: t * 0.5 for n, t in net().state_dict().items() if t.ndim}, strict=False)
        each.second.bias.data = torch.ones(8)
    goes_on(made, model, optimizer, theirs, other, 1)


@pytest.mark.parametrize("stepped_by", ["eager", "weft"])
def test_a_parameter_that_joins_adam_late_is_refused(stepped_by: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[0].weight.requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, x: Tensor) -> Tensor:
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    compiled = weft.compile(step)
    run = step if stepped_by == "eager" else compiled
    for _ in range(2):
        run(model, optimizer, torch.ones(2, 4))
    model[0].weight.requires_grad_(True)
    with pytest.raises(CompileError, match="W0303.*0.weight joins the training after 2 steps"):
        compiled(model, optimizer, torch.ones(2, 4))
