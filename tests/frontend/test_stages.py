"""Plans of stages: what is written, simulated, explained, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests.passes.pipeline_models import contrastive, normalized, tied
from torch import nn

import weft
from weft.costmodel.cluster import parse_cluster
from weft.costmodel.cluster_json import cluster_of
from weft.costmodel.cluster_stages import stage_clusters
from weft.frontend.options import OPTIONS
from weft.frontend.verify import verify_dumps
from weft.ir.errors import CompileError, WeftError
from weft.ir.text import print_module
from weft.runtime.artifact import Artifact
from weft.runtime.schedule_check import check


def planned(case: Any = tied, **options: Any) -> weft.Plan:
    torch.manual_seed(0)
    model, optimizer, step, batch = case()
    return weft.plan(step, (model, optimizer, *batch), **options)


@pytest.fixture(scope="module")
def plan() -> weft.Plan:
    return planned(cluster="2x2:cpu", stages=2, micro=2)


def test_an_artifact_holds_a_schedule_for_each_stage(plan: weft.Plan, tmp_path: Path) -> None:
    plan.save(tmp_path / "out")
    artifact = Artifact.open(tmp_path / "out")
    assert artifact.info["ranks"] == 4 and "2 stages of" in artifact.info["mesh"]
    schedules = artifact.schedules()
    assert [print_module(m) for m in schedules] == [print_module(m) for m in plan.schedules]
    assert [module.attrs["stage"] for module in schedules] == [0, 1]
    size = plan.mesh.size
    check({rank: schedules[rank // size].entry for rank in range(2 * size)}, plan.mesh)


def test_a_tied_parameter_that_is_held_in_parts_is_gathered_once_for_both_stages() -> None:
    """The other stage's copy and this stage's reader share it: search and price say the same."""
    plan = planned(cluster="2x2:h100", stages=2, micro=2)
    given = {**plan.weights, **plan.inputs}
    assert all(check.holds for check in verify_dumps([(d.name, d.module) for d in plan.dumps], given))
    readers = [op.name for op in plan.schedules[0].entry.ops
               if "words.weight" in [value.name for value in op.operands]]  # fmt: skip
    assert len([name for name in readers if name not in ("adamw_update", "free")]) == 1


def test_all_stages_together_equal_the_program(plan: weft.Plan) -> None:
    given = {**plan.weights, **plan.inputs}
    checks = list(verify_dumps([(d.name, d.module) for d in plan.dumps], given))
    assert all(check.holds for check in checks)
    assert checks[-1].name == "stage1-schedule" and checks[-1].against


def test_the_step_of_all_ranks_is_simulated(plan: weft.Plan) -> None:
    assert plan.simulation.step_us > 0
    summary = plan.summary()
    assert "2 stages of" in summary and "stage 1" in summary
    assert "part1" in plan.explain("blocks.2")
    assert "head" not in plan.explain("blocks.0.up")


@pytest.mark.parametrize(
    ("options", "shape", "kinds"),
    [
        ({"cluster": "1x4:cpu", "meshes": "3+1"}, "stages of dev=3, one rank", ["cpu", "cpu"]),
        ({"cluster": "1x1:h100+1x2:cpu", "stages": 2}, "stages of one rank, dev=2", ["h100", "cpu"]),
    ],
)
def test_stages_have_meshes_and_devices_of_their_own(
    options: dict[str, Any], shape: str, kinds: list[str], tmp_path: Path
) -> None:
    plan = planned(micro=2, **options)
    assert shape in plan.summary() and plan.ranks == parse_cluster(options["cluster"]).ranks
    assert [mesh.device for mesh in plan.stage_ranks.meshes] == kinds
    checks = list(verify_dumps([(d.name, d.module) for d in plan.dumps], {**plan.weights, **plan.inputs}))
    assert all(check.holds for check in checks) and checks[-1].against
    assert plan.simulation.step_us > 0
    plan.save(tmp_path / "out")
    artifact = Artifact.open(tmp_path / "out")
    assert artifact.info["ranks"] == plan.ranks
    assert [print_module(m) for m in artifact.schedules()] == [print_module(m) for m in plan.schedules]
    assert cluster_of(artifact.info) == plan.cluster


def test_fast_devices_get_more_of_the_program() -> None:
    """Five equal layers: one on the CPU, the rest on a device of hundreds of times its speed."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(512, 512), nn.Tanh()) for _ in range(5)))
    x = torch.randn(512, 512)
    counts = []
    for cluster in ("1x1:h100+1x1:cpu", "1x1:cpu+1x1:h100"):
        plan = weft.plan(model, (x,), cluster=cluster, stages=2)
        counts.append(tuple(
            sum(a.get("role") == "param" for a in m.entry.param_attrs) for m in plan.schedules
        ))  # fmt: skip
    assert counts == [(8, 2), (2, 8)]


def test_micro_batches_hold_fewer_activations() -> None:
    """The peak of one rank: parameters and states stay, activations shrink."""

    class Wide(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers(x).square().mean()  # type: ignore[no-any-return]

    x = torch.randn(4096, 8)
    whole = weft.plan(Wide(), (x,), optimizer="sgd", lr=0.1)
    parts = weft.plan(Wide(), (x,), optimizer="sgd", lr=0.1, micro=8)
    assert parts.timeline.peak_bytes < 0.4 * whole.timeline.peak_bytes


def test_a_forward_pass_has_no_backward_slots() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(6)))
    plan = weft.plan(model, (torch.randn(6, 8),), cluster="1x2:cpu", stages=2, micro=3)
    names = [op.name for op in plan.schedules[0].entry.ops]
    assert names.count("send") == 3 and "recv" not in names
    checks = list(verify_dumps([(d.name, d.module) for d in plan.dumps], {**plan.weights, **plan.inputs}))
    assert all(check.holds for check in checks)


@pytest.mark.parametrize(
    ("case", "options", "code", "words"),
    [
        (tied, {"cluster": "16x1:cpu", "stages": 16}, "W0404", "cut into 16 stages"),
        (tied, {"cluster": "2x1:cpu", "stages": 2, "micro": 6}, "W0404", "batch of 5"),
        (tied, {"cluster": "3x1:cpu", "stages": 2}, "W0404", "cannot share the 3 devices"),
        (tied, {"stages": 2}, "W0404", "cannot share the 1 devices"),
        (tied, {"cluster": "2x2:cpu", "meshes": "3+1"}, "W0404", "3 devices does not fit behind 0"),
        (tied, {"cluster": "1x4:cpu", "meshes": "3+2"}, "W0404", "have 5 devices"),
        (tied, {"cluster": "1x4:cpu", "meshes": "3+1", "stages": 3}, "W1001", "do not fit together"),
        (tied, {"cluster": "1x4:cpu", "meshes": "3+one"}, "W0501", "'one' of a stage"),
        (tied, {"cluster": "1x1:h100+1x3:a100", "meshes": "2+2"}, "W0404", "does not fit behind 0 of 1x1"),
        (tied, {"cluster": "1x1:h100+1x3:a100", "stages": 3}, "W0404", "3 stages cannot share"),
        (tied, {"cluster": "1x1:h100+1x3:a100"}, "W0501", "one mesh cannot lie on"),
        (tied, {"micro": 0}, "W1001", "option micro"),
        (tied, {"micro": 2.0}, "W1001", "option micro"),
        (tied, {"micro": 2, "options": OPTIONS.with_({"pipeline": "simplify"})}, "W1001", "exclude"),
        (tied, {"micro": 2, "order": "best"}, "W1001", "no pipeline schedule 'best'"),
        (tied, {"cluster": "2x1:cpu", "stages": 2, "chunks": 2}, "W0404", "1F1B has no virtual"),
        (contrastive, {"micro": 2}, "W0404", "cannot be computed in 2 micro-batches"),
        (normalized, {"micro": 2}, "W0404", "cannot be computed in 2 micro-batches"),
    ],
)
def test_what_cannot_be_cut_so_is_told(case: Any, options: dict[str, Any], code: str, words: str) -> None:
    with pytest.raises(CompileError) as caught:
        planned(case, **options)
    error = caught.value
    assert error.code == code and words in error.message and error.reason and error.hint


def test_a_module_with_its_loss_outside_is_refused() -> None:
    compiled = weft.compile(nn.Linear(4, 4), micro=2)
    with pytest.raises(WeftError, match="loss is computed outside") as caught:
        compiled(torch.randn(4, 4))
    assert caught.value.code == "W0404"


def test_a_stage_has_whole_hosts_or_an_equal_part_of_one() -> None:
    mixed = parse_cluster("2x8:h100+1x8:a100")
    assert list(map(str, stage_clusters(mixed, 3))) == ["1x8:h100", "1x8:h100", "1x8:a100"]
    assert list(map(str, stage_clusters(mixed, 3, [16, 4, 4]))) == ["2x8:h100", "1x4:a100", "1x4:a100"]
    shares = {
        ("4x8:h100", 2): "2x8:h100", ("4x8:h100", 8): "1x4:h100", ("1x8:h100", 4): "1x2:h100",
    }  # fmt: skip
    for (text, stages), share in shares.items():
        assert [str(own) for own in stage_clusters(parse_cluster(text), stages)] == [share] * stages
