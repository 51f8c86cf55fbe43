"""`plan.simulate()` and `weft simulate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from tests.frontend.targets import net

import weft
from weft.frontend.cli import main
from weft.frontend.cli_simulate import parse_what_if
from weft.frontend.options import OPTIONS
from weft.ir.trace_events import PREDICTED, read_events

PIPELINE = "simplify,outline,differentiate,simplify,random-place[mesh=2x2 seed=3],lower,fuse,schedule"


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(a) for a in arguments])


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A train step on four ranks, placed at random, so that all links are used."""
    model, args, _ = net()
    options = OPTIONS.with_({"pipeline": PIPELINE})
    plan = weft.plan(model, args, cluster="2x2:cpu", optimizer="sgd", options=options)
    path = tmp_path_factory.mktemp("simulate") / "out"
    plan.save(path)
    return path


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A forward on one rank, and a trace of three steps of it."""
    folder = tmp_path_factory.mktemp("alone")
    weft.plan(torch.nn.Linear(8, 4), (torch.ones(2, 8),)).save(folder / "out")
    with weft.load(folder / "out") as exe:
        exe.load_weights()
        with exe.program.tracing(folder / "trace.json"):
            for _ in range(3):
                exe.step(torch.ones(2, 8))
    return folder / "out", folder / "trace.rank0.json"


def test_a_plan_and_its_artifact_are_predicted_alike(artifact: Path) -> None:
    shown = invoke("simulate", artifact)
    assert shown.exit_code == 0, shown.output
    for word in ("2x2:cpu, 4 ranks", "step", "bubble", "memory at the peak", "critical path", "param"):
        assert word in shown.output, word
    found = json.loads(invoke("simulate", artifact, "--json").output)
    predicted = json.loads((artifact / "plan.json").read_text())["predicted"]
    assert found["step_us"] == pytest.approx(predicted["step_us"])
    assert found["peak_bytes"] == predicted["memory_bytes"]
    shares = [row["share"] for row in found["critical_path"]]
    assert 0.5 < sum(shares) <= 1.0 + 1e-9 and shares == sorted(shares, reverse=True)


def test_what_if_and_another_cluster_leave_the_plan_as_it_is(artifact: Path) -> None:
    found = json.loads(invoke("simulate", artifact, "--what-if", "device=2x", "--what-if",
                              "inter=1.5", "--json").output)  # fmt: skip
    assert set(found["what_if"]) == {"device=2x", "inter=1.5x"}
    assert all(step_us < found["step_us"] for step_us in found["what_if"].values())
    other = json.loads(invoke("simulate", artifact, "--cluster", "1x4:cpu", "--json").output)
    assert other["cluster"] == "1x4:cpu" and other["peak_bytes"] == found["peak_bytes"]
    assert other["step_us"] != found["step_us"]


def test_files_for_perfetto_and_chakra(artifact: Path, tmp_path: Path) -> None:
    shown = invoke("simulate", artifact, "--perfetto", tmp_path / "p.json.gz", "--chakra", tmp_path / "et")
    assert shown.exit_code == 0, shown.output
    events = read_events(tmp_path / "p.json.gz")
    assert any(e["name"].endswith(": einsum") and "source" in e["args"] for e in events if e["ph"] == "X")
    assert read_events(artifact / "timeline.json.gz") == events
    assert sorted(p.name for p in (tmp_path / "et").glob("*.et")) == [f"weft.{r}.et" for r in range(4)]


def test_a_measured_trace_beside_the_prediction(alone: tuple[Path, Path], tmp_path: Path) -> None:
    path, trace = alone
    shown = invoke("simulate", path, "--trace", trace, "--perfetto", tmp_path / "both.json")
    assert shown.exit_code == 0 and "predicted / measured" in shown.output, shown.output
    found: dict[str, Any] = json.loads(invoke("simulate", path, "--trace", trace, "--json").output)
    assert found["trace"]["measured_us"] > 0 and found["trace"]["predicted_us"] == found["step_us"]
    (einsum,) = [row for row in found["trace"]["actions"] if row["op"] == "einsum"]
    assert einsum["ratio"] == pytest.approx(einsum["predicted_us"] / einsum["measured_us"])
    pids = {event["pid"] for event in read_events(tmp_path / "both.json")}
    assert pids == {0, PREDICTED}


def test_traces_of_other_plans_and_broken_files_are_refused(
    artifact: Path, alone: tuple[Path, Path], tmp_path: Path
) -> None:
    good = alone[1].read_bytes()
    cut, other, numbers = (tmp_path / name for name in ("cut.json", "other.json", "numbers.json.gz"))
    cut.write_bytes(good[: len(good) // 2])
    other.write_text('{"traceEvents": [{"ph": "X", "name": "GC", "ts": 1, "dur": 2}]}')
    numbers.write_bytes(b"\x1f\x8b123")
    cases = [(alone[0], cut), (alone[0], other), (alone[0], numbers), (alone[0], tmp_path / "none"),
             (alone[0], tmp_path), (artifact, alone[1])]  # fmt: skip
    for path, trace in cases:
        shown = invoke("simulate", path, "--trace", trace)
        assert shown.exit_code == 2, (trace, shown.output)
        assert "Traceback" not in shown.output
        if trace is not tmp_path:  # click says that a folder is no file
            assert "W1201" in shown.output, (trace, shown.output)


@pytest.mark.parametrize("text", ["", "inter", "inter=", "inter=x", "inter=-2x", "network=2x", "inter=2xx"])
def test_what_if_in_other_words_is_refused(text: str) -> None:
    with pytest.raises(weft.CompileError, match="W1001"):
        parse_what_if(text)
    assert parse_what_if("inter=2x") == ("inter", 2.0) and parse_what_if("device=1.5") == ("device", 1.5)


def test_bad_clusters_and_folders_are_refused(artifact: Path, tmp_path: Path) -> None:
    for arguments, code in (
        ((artifact, "--cluster", "1x8:cpu"), "W0501"), ((artifact, "--cluster", "4x1:h1000"), "W0501"),
        ((tmp_path,), "W0701"), ((artifact, "--what-if", "inter=0x"), "W1001"),
    ):  # fmt: skip
        shown = invoke("simulate", *arguments)
        assert shown.exit_code == 2 and code in shown.output, shown.output


def test_compiled_programs_are_simulated_through_their_plan() -> None:
    compiled = weft.compile(torch.nn.Linear(8, 4))
    compiled(torch.ones(2, 8))
    found = compiled.plan.simulate()
    assert found.ranks == 1 and found.step_us > 0
    assert "einsum" in {step.op.name for step in found.critical_path}
