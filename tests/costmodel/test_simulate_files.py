"""What a simulation writes and reads: timelines, Chakra traces, measured traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.unknown_fields import UnknownFieldSet
from tests.costmodel.pipelines import pipeline
from tests.costmodel.simulate_costs import Fixed, Sized
from tests.runtime.schedules import FORWARD_BACKWARD, TRAIN_STEP

from weft.costmodel.cluster import parse_cluster
from weft.costmodel.simulate import Simulation, simulate
from weft.ir.errors import RunError
from weft.ir.parser import parse_module
from weft.ir.trace_events import PREDICTED, Event
from weft.ir.types import Mesh
from weft.runtime.trace import merge, read_events

CLUSTER = parse_cluster("1x4:cpu")


def step(text: str = TRAIN_STEP) -> Simulation:
    module = parse_module(text)
    assert module.mesh is not None
    return simulate(module, CLUSTER, costs=Sized(module.mesh))


# -- timelines ------------------------------------------------------------------------------------


def test_a_predicted_timeline_reads_back_as_a_measured_one_does(tmp_path: Path) -> None:
    found = step()
    events = read_events(found.save_perfetto(tmp_path / "step.json.gz", ranks=range(4)))
    slices = [event for event in events if event["ph"] == "X"]
    assert {event["pid"] - PREDICTED for event in slices} == {0, 1, 2, 3}
    names = {e["args"]["name"] for e in events if e["ph"] == "M" and e["pid"] == PREDICTED + 3}
    assert {"rank 3, predicted", "compute", "axis dp, ranks 1, 3", "axis tp, ranks 2, 3"} <= names
    einsum = next(event for event in slices if event["name"] == "model.linear: einsum")
    assert einsum["args"]["source"] == "train.py:12" and einsum["cat"] == "compute"
    ends: dict[tuple[int, int], float] = {}
    for event in sorted(slices, key=lambda e: (e["pid"], e["tid"], e["ts"])):
        key = event["pid"], event["tid"]
        assert event["ts"] >= ends.get(key, 0.0) - 1e-9  # nothing on a track overlaps
        ends[key] = event["ts"] + event["dur"]
    assert max(ends.values()) == pytest.approx(found.step_us)
    busy = sum(e["dur"] for e in slices if e["pid"] == PREDICTED and e["tid"] == 0)
    waiting = found.waiting[0]
    assert busy == pytest.approx(found.step_us - waiting.bubble_us, rel=0.2)


def test_one_rank_of_each_class_is_shown_unless_asked() -> None:
    found = step()
    shown = {event["pid"] - PREDICTED for event in found.events()}
    assert shown == {ranks[0] for ranks in found.classes}


# -- measured traces ------------------------------------------------------------------------------


def measured(found: Simulation, factor: float, offset: float = 5e6) -> list[Event]:
    """The simulation as a measured trace, `factor` times as slow."""
    out = []
    for event in found.events(range(4)):
        event = {**event, "pid": event["pid"] - PREDICTED}
        if event["ph"] == "X":
            event["ts"], event["dur"] = offset + factor * event["ts"], factor * event["dur"]
        out.append(event)
    return out


def test_predicted_and_measured_actions_are_laid_side_by_side() -> None:
    found = step()
    same = found.compare(measured(found, 2.0))
    assert same.predicted_us == found.step_us
    assert same.measured_us == pytest.approx(2.0 * found.step_us)
    assert {row.ratio for row in same.rows if row.measured_us} == {0.5}
    transfers = [row for row in same.rows if row.transfer]
    assert {row.op.name for row in transfers} == {"all_reduce", "reduce_scatter", "all_gather"}
    einsums = [row for row in same.rows if row.op.name == "einsum"]
    assert len(einsums) == 2 * 4 and all(row.predicted_us > 0 for row in einsums)


def test_both_lie_in_one_file_from_zero_on(tmp_path: Path) -> None:
    found = step()
    path = found.save_perfetto(tmp_path / "both.json", measured=measured(found, 3.0))
    slices = [event for event in read_events(merge([path], tmp_path / "again.json")) if event["ph"] == "X"]
    for predicted in (True, False):
        part = [e for e in slices if (e["pid"] >= PREDICTED) == predicted]
        assert min(e["ts"] for e in part) == 0.0


def test_a_median_over_the_steps_of_the_trace() -> None:
    found = step()
    events: list[Event] = []
    for number, factor in enumerate((1.0, 4.0, 2.0)):
        for event in measured(found, factor, offset=1e7 * number):
            if event["ph"] == "X":
                event["args"] = {**event["args"], "step": number}
            events.append(event)
    assert found.compare(events).measured_us == pytest.approx(2.0 * found.step_us)


def changed(events: list[Event], **args: Any) -> list[Event]:
    last = max(i for i, event in enumerate(events) if event["ph"] == "X")
    event = events[last]
    new = {**event, "args": {**event["args"], **args}}
    return [*events[:last], {**new, **{k: v for k, v in args.items() if k in event}}]


def test_a_trace_of_another_plan_is_refused() -> None:
    found = step()
    good = measured(found, 1.0)
    for what in ({"action": 1000}, {"action": 0}, {"result": "%other"}, {"type": "f32[1]"},
                 {"name": "other: neg"}, {"pid": 17}):  # fmt: skip
        with pytest.raises(RunError, match="W1201.*does not match the plan"):
            found.compare(changed(good, **what))
    with pytest.raises(RunError, match="W1201"):
        found.compare(measured(step(FORWARD_BACKWARD), 1.0))
    with pytest.raises(RunError, match="no measured actions"):
        found.compare(found.events())


# -- Chakra ---------------------------------------------------------------------------------------


def schema() -> Any:
    """The messages of MLCommons' et_def.proto that the files use, built from their field numbers."""
    file = descriptor_pb2.FileDescriptorProto(name="et.proto", package="chakra", syntax="proto3")
    kinds = descriptor_pb2.FieldDescriptorProto

    def message(name: str, *fields: tuple[str, int, int, bool, str]) -> None:
        made = file.message_type.add(name=name)
        for field, number, kind, repeated, type_name in fields:
            label = kinds.LABEL_REPEATED if repeated else kinds.LABEL_OPTIONAL
            added = made.field.add(name=field, number=number, type=kind, label=label)  # type: ignore[arg-type]
            if type_name:
                added.type_name = f".chakra.{type_name}"

    text, u64 = kinds.TYPE_STRING, kinds.TYPE_UINT64
    message("Attribute", ("name", 1, text, False, ""), ("int32_val", 7, kinds.TYPE_INT32, False, ""),
            ("int64_val", 9, kinds.TYPE_INT64, False, ""), ("uint64_val", 13, u64, False, ""),
            ("bool_val", 27, kinds.TYPE_BOOL, False, ""), ("string_val", 29, text, False, ""))  # fmt: skip
    message("Metadata", ("version", 1, text, False, ""))
    message("Node", ("id", 1, u64, False, ""), ("name", 2, text, False, ""),
            ("type", 3, kinds.TYPE_INT32, False, ""), ("ctrl_deps", 4, u64, True, ""),
            ("data_deps", 5, u64, True, ""), ("start_time_micros", 6, u64, False, ""),
            ("duration_micros", 7, u64, False, ""), ("attr", 10, kinds.TYPE_MESSAGE, True, "Attribute"))  # fmt: skip
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {n: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"chakra.{n}"))
            for n in ("Metadata", "Node")}  # fmt: skip


def messages(path: Path) -> list[bytes]:
    """The length-delimited messages of a file."""
    data, at, out = path.read_bytes(), 0, []
    while at < len(data):
        size = shift = 0
        while True:
            byte = data[at]
            at += 1
            size |= (byte & 0x7F) << shift
            shift += 7
            if not byte & 0x80:
                break
        out.append(data[at : at + size])
        at += size
    assert at == len(data)
    return out


def nodes(path: Path) -> list[Any]:
    kinds = schema()
    first, *rest = messages(path)
    assert kinds["Metadata"].FromString(first).version == "0.0.4"
    found = [kinds["Node"].FromString(data) for data in rest]
    assert [node.id for node in found] == list(range(len(found)))
    for node in found:  # dependencies lie behind, and nothing is unknown to the schema
        assert all(d < node.id for d in (*node.ctrl_deps, *node.data_deps))
        assert not len(UnknownFieldSet(node))
    return found


def attributes(node: Any) -> dict[str, Any]:
    out = {}
    for attr in node.attr:
        values = [value for field, value in attr.ListFields() if field.name != "name"]
        out[attr.name] = values[0] if values else 0
    return out


def test_chakra_traces_read_back_with_the_protobuf_library(tmp_path: Path) -> None:
    found = step()
    found.save_chakra(tmp_path / "et")
    assert {p.name for p in (tmp_path / "et").iterdir()} == {
        "groups.json", *(f"weft.{rank}.et" for rank in range(4))
    }
    groups = json.loads((tmp_path / "et" / "groups.json").read_text())
    assert sorted(groups.values()) == [[0, 1], [0, 2], [1, 3], [2, 3]]
    ops = found.program(0).ops
    for rank in range(4):
        rows = nodes(tmp_path / "et" / f"weft.{rank}.et")
        actions = [op for op in ops if op.name not in ("free", "wait")]
        assert len(rows) == len(actions)
        for node, op in zip(rows, actions, strict=True):
            facts = attributes(node)
            assert node.name.endswith(op.name) and ops[facts["weft_action"]] is op
            if op.name == "reduce_scatter":
                assert node.type == 7 and facts["comm_type"] == 7
                assert facts["comm_size"] == 4 * 5 * 3  # f32[5, 6], columns over tp
                assert rank in groups[facts["pg_name"]]
            elif op.name == "einsum":
                assert node.type == 4 and facts["num_ops"] > 0
        starts = {i: s for i, s, _ in found.actions(rank)}
        update = next(n for n in rows if n.name.endswith("adamw_update"))
        scatter = next(n for n in rows if n.name.endswith("reduce_scatter"))
        assert scatter.id in update.data_deps
        assert update.start_time_micros == round(starts[attributes(update)["weft_action"]])


def test_transfers_between_stages_name_both_ends(tmp_path: Path) -> None:
    modules = pipeline("1F1B", 2, 3, Mesh((("dp", 2),)))
    found = simulate(modules, CLUSTER, costs=Fixed({"neg": 1.0, "mul": 2.0, "send": 1.0, "recv": 1.0}))
    found.save_chakra(tmp_path)
    sends: dict[tuple[int, int, int], int] = {}
    receives: dict[tuple[int, int, int], int] = {}
    for rank in range(4):
        for node in nodes(tmp_path / f"weft.{rank}.et"):
            if node.type in (5, 6):
                facts = attributes(node)
                ends = facts["comm_src"], facts["comm_dst"], facts["comm_tag"]
                (sends if node.type == 5 else receives)[ends] = facts["comm_size"]
    assert sends == receives and len(sends) == 2 * 2 * 3
