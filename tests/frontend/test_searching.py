"""`weft.search` and the budget of `weft.plan`: what users give, what they are told."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import weft
from weft.costmodel.cluster import parse_cluster
from weft.frontend.options import OPTIONS
from weft.frontend.search_text import unit_words
from weft.frontend.searched import seconds_of
from weft.frontend.searching import PlanSearch
from weft.frontend.verify import verify_dumps

CLUSTER = "2x1:a100"


class Net(nn.Module):
    """Equal layers with a residual."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(512, 512) for _ in range(6))

    def forward(self, x: Tensor, wanted: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + torch.relu(layer(x))
        return (x - wanted).square().mean()


def given() -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    with torch.device("meta"):
        x = torch.zeros(256, 512)
        return Net(), (x, x)


@pytest.fixture(scope="module")
def found() -> Iterator[PlanSearch]:
    net, inputs = given()
    yield weft.search(net, inputs, cluster=CLUSTER, optimizer="sgd", stages=2, lr=0.1)


def test_the_explanation_names_stages_losers_and_the_bound(found: PlanSearch) -> None:
    text = found.explain()
    keys = [line.split()[0] for line in text.splitlines()]
    assert keys[0] == "plan" and keys.count("stage") == 2 and keys[-2:] == ["searched", "bound"]
    assert "layers.0" in text and "layers.5" in text
    assert 1 <= keys.count("rejected") <= 5
    assert "could not win by their bound" in text


def test_the_plan_has_what_was_searched(found: PlanSearch) -> None:
    plan = found.plan()
    best = found.result.best.pipeline
    assert len(plan.schedules) == len(best.stages) == 2
    assert plan.explain().count("rejected") == found.explain().count("rejected")
    if found.result.best.simulated_us is not None:
        assert plan.simulation.step_us == pytest.approx(found.result.best.simulated_us, rel=0.1)


def test_a_budget_searches_the_number_of_stages() -> None:
    net, inputs = given()
    plan = weft.plan(net, inputs, cluster=CLUSTER, optimizer="sgd", budget="60s", lr=0.1)
    assert "search" in plan.meta and "bound" in plan.explain()
    alone = weft.plan(net, inputs, cluster=CLUSTER, optimizer="sgd", lr=0.1)
    assert "search" not in alone.meta


@pytest.mark.parametrize("text, seconds", [("10s", 10.0), ("2 min", 120.0), (" 500ms", 0.5),
                                           ("3", 3.0), (2.5, 2.5), ("inf", float("inf"))])  # fmt: skip
def test_budgets(text: Any, seconds: float) -> None:
    assert seconds_of(text) == seconds


@pytest.mark.parametrize("text", ["", "soon", "-3s", 0, "10 parsecs", float("nan"), None, [10]])
def test_what_is_no_budget(text: Any) -> None:
    with pytest.raises(weft.CompileError) as error:
        seconds_of(text)
    assert error.value.code == "W1001"


@pytest.mark.parametrize("wrong", [
    {"stages": 0}, {"stages": "2"}, {"micro": True}, {"order": "zigzag"}, {"constraints": "what?"},
])  # fmt: skip
def test_wishes_that_are_none(wrong: dict[str, Any]) -> None:
    net, inputs = given()
    with pytest.raises(weft.CompileError) as error:
        weft.search(net, inputs, cluster=CLUSTER, optimizer="sgd", lr=0.1, **wrong)
    assert error.value.code in ("W1001", "W0601")


def test_a_link_of_no_bandwidth_is_refused(tmp_path: Any) -> None:
    file = tmp_path / "dead.toml"
    file.write_text(
        '[[groups]]\ndevice = "a100"\nhosts = 2\ndevices = 1\n[links.inter]\nbytes_per_s = 0\n'
    )
    net, inputs = given()
    with pytest.raises(weft.CompileError, match="must be a positive number"):
        weft.search(net, inputs, cluster=str(file), optimizer="sgd", lr=0.1)


def test_numbered_units_are_told_as_runs() -> None:
    names = ["embed", "layers.0", "layers.1", "layers.2", "norm", "other.4", "other.6"]
    assert unit_words(names) == "embed, layers.0 to 2, norm, other.4, other.6"


def test_no_budget_is_the_default() -> None:
    assert OPTIONS.budget == ""


def test_the_explanation_says_what_is_exposed_and_how_far_the_bound_is(found: PlanSearch) -> None:
    rows = dict(line.split(maxsplit=1) for line in found.explain().splitlines())
    assert rows["plan"].startswith("2 stages of ") and " layers" in rows["plan"]
    replay = found.result.best.replay
    assert replay is not None and "compute waits" in rows["exposed"]
    assert ("other stages" in rows["exposed"]) == (replay.bubble > 0)
    best, lower = found.result.best.pipeline.step_us, found.result.lower_bound_us
    assert f"takes {best / lower:.3g} times as long" in rows["bound"]


def test_a_mixed_cluster_gives_a_plan_that_runs() -> None:
    """Stages on groups of different devices, with meshes of their own; the groups in the best order."""
    torch.manual_seed(0)
    net, x = Net(), torch.randn(8, 512)
    found = weft.search(net, (x, x), cluster="1x2:cpu+1x1:cpu", optimizer="sgd", micro=2, lr=0.1)
    plan, best = found.plan(), found.result.best
    assert [str(own) for own in best.layout.shares] == list(best.layout.kinds)
    assert [mesh.size for mesh in plan.stage_ranks.meshes] == [own.ranks for own in best.layout.shares]
    assert plan.cluster == parse_cluster("1x2:cpu+1x1:cpu").in_order(best.layout.line)
    assert plan.simulation.step_us == pytest.approx(best.simulated_us)
    checks = list(verify_dumps([(d.name, d.module) for d in plan.dumps], {**plan.weights, **plan.inputs}))
    assert all(check.holds for check in checks) and checks[-1].against
