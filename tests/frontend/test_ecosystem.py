"""DeviceMesh in, DTensor out, and weft as a backend of torch.compile."""

from __future__ import annotations

import json
import os
import tomllib
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from weft.frontend import dynamo_backend
from weft.ir.errors import RunError
from weft.ir.parser import parse_module
from weft.runtime.launch import launch
from weft.runtime.program import Program

ROOT = Path(__file__).parents[2]
PATH = {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'src'}"}


def test_a_device_mesh_is_used_and_state_comes_out_as_dtensors(tmp_path: Path) -> None:
    worker = str(Path(__file__).with_name("ecosystem_worker.py"))
    launch([worker, str(tmp_path / "out")], 4, env=PATH, timeout_s=180)
    for rank in range(4):
        found = json.loads((tmp_path / f"out.{rank}.json").read_text())
        for ours, theirs in found["losses"]:
            assert ours == pytest.approx(theirs, rel=1e-5)
        assert found["mesh"] == "(('dp', 2), ('tp', 2))"
        assert found["same groups"] and found["same mesh"]
        assert found["dtensors"] and found["equal"]
        assert found["equal shards"]
        assert found["placements"]["w"] == "(Replicate(), Shard(dim=1))"
        assert found["placements"]["exp_avg/w"] == "(Shard(dim=0), Shard(dim=1))"
        assert found["part"] == "W0501"


ONE_RANK = """weft 1 schedule
mesh [] "cpu"

func @main(%w: f32[2]{} {role = "param", name = "w"}) -> (f32[2]{} {role = "output"}) {
  return %w
}
"""


def test_one_rank_has_no_dtensors_and_says_what_to_take() -> None:
    program = Program(parse_module(ONE_RANK))
    with pytest.raises(RunError, match="take state_dict\\(\\) as it is"):
        program.state_dict(dtensor=True)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(6, 8), nn.LayerNorm(8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        hidden = self.norm(torch.relu(self.first(x)))
        return {"out": self.second(hidden), "mean": hidden.mean()}


@pytest.fixture
def model() -> nn.Module:
    torch.manual_seed(0)
    torch._dynamo.reset()
    return Net()


def test_torch_compile_runs_the_forward_by_weft(model: nn.Module) -> None:
    assert "weft" in torch._dynamo.list_backends(exclude_tags=())
    compiled = torch.compile(model, backend="weft", options={"progress": False})
    with torch.no_grad():
        for rows in (4, 4, 5):  # another batch size too
            x = torch.randn(rows, 6)
            got, want = compiled(x), model(x)
            assert torch.allclose(got["out"], want["out"], atol=1e-6)
            assert torch.allclose(got["mean"], want["mean"], atol=1e-6)


def test_torch_compile_trains_through_the_joint_plan(model: nn.Module) -> None:
    compiled, x = torch.compile(model, backend="weft", options={"progress": False}), torch.randn(4, 6)
    compiled(x)["out"].square().sum().backward()
    got = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad()
    model(x)["out"].square().sum().backward()
    for name, p in model.named_parameters():
        assert got[name] is not None and p.grad is not None
        assert torch.allclose(got[name], p.grad, atol=1e-5), name


def test_graph_breaks_make_several_plans() -> None:
    torch._dynamo.reset()

    def program(x: Tensor) -> Tensor:
        y = torch.tanh(x) * 2
        torch._dynamo.graph_break()
        return y + 1

    x = torch.randn(5)
    compiled = torch.compile(program, backend="weft", options={"progress": False})
    assert torch.allclose(compiled(x), program(x))


def test_the_entry_point_names_the_backend() -> None:
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    home, _, name = points["torch_dynamo_backends"]["weft"].partition(":")
    assert getattr(import_module(home), name) is dynamo_backend.weft
