"""Constraints and micro-batches in the placement search."""

from __future__ import annotations

import pytest
from tests.passes.place_programs import llama_step, mlp_step

from weft.costmodel.cluster import parse_cluster
from weft.ir.errors import CompileError
from weft.ir.module import Module
from weft.ir.types import B, Mesh, S
from weft.passes.constraints import Constraints
from weft.passes.place import Place, PlacementResult, search, search_mesh
from weft.passes.price import price

CLUSTER = parse_cluster("1x4:h100")
MESH = Mesh((("dp", 2), ("tp", 2)), "h100")
STEP = mlp_step(1 << 14, 1024, 2048)


def placed(text: str, module: Module = STEP) -> PlacementResult:
    result = search_mesh(module, MESH, CLUSTER, constraints=Constraints.parse(text))
    assert result is not None and result.report[0].gap == 0
    return result


def stored(result: PlacementResult) -> dict[str, object]:
    entry = result.placed.entry
    return {
        str(attrs.get("name")): value.type.placement
        for value, attrs in zip(entry.params, entry.param_attrs, strict=True)
    }


def test_constraints_are_obeyed_and_cost_time() -> None:
    free = placed("")
    result = placed("param w1 : dp = S(1), tp = S(0); state * : * = B; op relu : tp = -")
    where = stored(result)
    assert where["w1"] == (S(1), S(0)) and where["mw1"] == where["vw2"] == (B, B)
    (relu,) = [op for op in result.placed.entry.ops if op.name == "relu"]
    assert "tp" not in relu.split
    assert result.objective_us >= free.objective_us - 1e-6
    again = price(result.placed, CLUSTER)
    assert again.total_us == pytest.approx(result.objective_us, rel=1e-6)


def test_the_plan_found_freely_is_found_again_under_its_own_placements() -> None:
    free = placed("")
    text = "; ".join(
        f"{attrs['role']} {attrs['name']} : dp = {value.type.placement[0]}, "
        f"tp = {value.type.placement[1]}"
        for value, attrs in zip(
            free.placed.entry.params, free.placed.entry.param_attrs, strict=True)
        if attrs["role"] in ("param", "state") and value.type.placement
    )  # fmt: skip
    assert placed(text).objective_us == pytest.approx(free.objective_us)


def test_a_forbidden_axis_is_not_used() -> None:
    result = placed("forbid tp")
    assert not any("tp" in op.split for op in result.placed.entry.ops)
    alone = search_mesh(STEP, Mesh((("dp", 2),), "h100"), CLUSTER)
    assert alone is not None
    assert result.objective_us == pytest.approx(alone.objective_us, rel=0.2)


def test_a_call_is_no_op_to_write_a_constraint_about() -> None:
    module = llama_step(
        layers=3, batch=8, seq=64, width=128, heads=4, kv=4, ffn=256, vocab=64
    )
    text = "value call : * = B"
    with pytest.raises(CompileError, match="about nothing"):
        placed(text, module)


def test_contradictions_are_named_with_a_least_set() -> None:
    text = "param w1 : dp = S(0); op einsum : dp = -|k|b|n; param w1 : dp = S(1); op relu : tp = -"
    with pytest.raises(CompileError) as error:
        placed(text)
    assert error.value.code == "W0402"
    message = str(error.value)
    assert "param w1 : dp = S(0)" in message and "param w1 : dp = S(1)" in message
    assert "einsum" not in message and "relu" not in message


def test_one_rule_that_nothing_obeys() -> None:
    with pytest.raises(CompileError, match="no placement obeys the constraint `op relu : dp = k`"):
        placed("op relu : dp = k")


@pytest.mark.parametrize(
    ("text", "hint"), [("param w3 : dp = B", "w"), ("op relo : dp = -", "relu")]
)
def test_a_constraint_about_nothing_is_refused(text: str, hint: str) -> None:
    with pytest.raises(CompileError, match="about nothing") as error:
        placed(text)
    assert f"did you mean '{hint}" in str(error.value)


def test_an_unknown_axis_is_refused_where_no_mesh_has_it() -> None:
    with pytest.raises(CompileError, match="no mesh has the axis 'pp'"):
        search(STEP, CLUSTER, [MESH], constraints=Constraints.parse("op * : pp = -"))


def test_a_memory_cap_is_kept_or_refused_with_the_least() -> None:
    free = placed("")
    cap = 0.95 * free.price.peak_bytes
    result = search_mesh(STEP, MESH, CLUSTER, constraints=Constraints(memory_bytes=cap))
    assert result is not None and result.price.peak_bytes <= cap
    assert result.lower_bound_us <= free.objective_us * (1 + 1e-9)
    with pytest.raises(CompileError, match="memory cap") as error:
        placed("memory 1 MB; state * : * = B")
    assert "the least found is" in str(error.value)


def test_the_pass_takes_constraints_as_text() -> None:
    done = Place(cluster="1x4:h100", mesh="dp=2,tp=2", constraints="param w1 : * = B").run(STEP)
    (w1,) = [v for v, a in zip(done.entry.params, done.entry.param_attrs, strict=True)
             if a.get("name") == "w1"]  # fmt: skip
    assert w1.type.placement == (B, B)


def phases_of(module: Module) -> tuple[str, ...]:
    """By what an op reads: updates, what follows the loss, what comes before it."""
    out, backward = [], False
    for op in module.entry.ops:
        late = op.name == "adamw_update" or (op.result.type.dtype == "f64" if len(op.results) == 1
                                             else False)  # fmt: skip
        out.append("update" if late else "backward" if backward else "forward")
        backward = backward or op.name == "reduce_sum"
    return tuple(out)


def test_one_micro_batch_is_the_plain_step() -> None:
    plain = placed("")
    result = search_mesh(STEP, MESH, CLUSTER, phases=phases_of(STEP), micro=1)
    assert result is not None
    assert result.objective_us == pytest.approx(plain.objective_us)


@pytest.mark.parametrize("micro", [2, 8])
def test_micro_batches_repeat_the_loop_and_not_the_update(micro: int) -> None:
    phases = phases_of(STEP)
    result = search_mesh(STEP, MESH, CLUSTER, phases=phases, micro=micro)
    assert result is not None and result.report[0].gap == 0 and result.phases is not None
    entry = result.placed.entry
    assert len(result.phases) == len(entry.ops)
    found = price(result.placed, CLUSTER, result.phases, micro)
    assert found.total_us == pytest.approx(result.objective_us, rel=1e-6)
    times = found.phase_us
    once = times.get("before", 0.0) + times["update"]
    assert found.total_us == pytest.approx(micro * (times["forward"] + times["backward"]) + once)
    kept = [p for op, p in zip(entry.ops, result.phases, strict=True) if op.name != "reshard"]
    assert tuple(kept) == phases
    made = {v.name: p for op, p in zip(entry.ops, result.phases, strict=True) for v in op.results}
    stored_names = {v.name for v in entry.params}
    for op, phase in zip(entry.ops, result.phases, strict=True):
        if op.name != "reshard":
            continue
        source = op.operands[0].name
        if phase == "before":
            assert source in stored_names  # a parameter, gathered once and kept
        if made.get(source) == "backward" and phase == "update":
            assert any(op.result.name in {v.name for v in other.operands}
                       for other in entry.ops if other.name == "adamw_update")  # fmt: skip
    plain = search_mesh(STEP, MESH, CLUSTER)
    assert plain is not None and result.objective_us <= micro * plain.objective_us
