"""Shards and the simulated collectives: each collective changes a placement, not the value."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.ir.errors import RunError
from weft.ir.module import Attr, Op, Value
from weft.ir.types import B, Mesh, P, Placement, S, TensorType, local_shape, parts_of
from weft.runtime.collectives import lse_combine, run_collective
from weft.runtime.shards import gather, local, scatter

MESHES = [
    Mesh((("x", n),)) for n in (2, 3)
] + [Mesh((("x", 2), ("y", 3))), Mesh((("x", 2), ("y", 2), ("z", 2)))]  # fmt: skip


@st.composite
def placed(draw: st.DrawFn) -> tuple[TensorType, Mesh]:
    mesh = draw(st.sampled_from(MESHES))
    options: list[Placement] = [B, P("sum"), P("max"), P("min"), S(0), S(1)]
    placement = draw(st.tuples(*(st.sampled_from(options) for _ in mesh.axes)))
    # terms of a sum of maxima are not maxima of sums: one kind of partial at a time
    kinds = {p.combine for p in placement if p.kind == "P"}
    if len(kinds) > 1:
        placement = tuple(B if p.kind == "P" else p for p in placement)
    shape = draw(st.tuples(st.integers(8, 11), st.integers(8, 11)))
    return TensorType("f64", shape, placement), mesh


def tensor(type: TensorType) -> torch.Tensor:
    return torch.randn(type.shape, dtype=torch.float64)


@settings(deadline=None)
@given(placed())
def test_gather_inverts_scatter_and_shards_have_their_local_shape(
    case: tuple[TensorType, Mesh],
) -> None:
    type, mesh = case
    whole = tensor(type)
    for noise in (None, torch.Generator().manual_seed(0)):
        shards = scatter(whole, type, mesh, noise=noise)
        for coord, shard in zip(mesh.coords(), shards, strict=True):
            assert tuple(shard.shape) == local_shape(type, mesh, coord)
            if noise is None:
                assert torch.equal(shard, local(whole, type, mesh, coord))
        torch.testing.assert_close(gather(shards, type, mesh, check=True), whole)


def moves(type: TensorType, mesh: Mesh, axis: int) -> list[tuple[str, dict[str, Attr], Placement]]:
    """All collectives on one axis that a type allows: (op, attributes, placement after)."""
    placement = type.placement or ()
    held = placement[axis]
    inner = {p.dim for p in placement[axis + 1 :] if p.kind == "S"}
    free = [d for d in range(len(type.shape)) if d not in inner]
    out: list[tuple[str, dict[str, Attr], Placement]] = []
    if held.kind == "P":
        combine: dict[str, Attr] = {"combine": held.combine}
        out.append(("all_reduce", combine, B))
        out += [("reduce_scatter", {**combine, "dim": d}, S(d)) for d in free]
    elif held.kind == "B":
        out += [("shard", {"dim": d}, S(d)) for d in free]
        out += [("partial", {"combine": c}, P(c)) for c in ("sum", "max", "min")]
        out += [("broadcast", {"root": 1}, B), ("permute_ranks", {"shift": 1}, B)]
    elif held.dim in free:
        out.append(("all_gather", {"dim": held.dim}, B))
        out += [("all_to_all", {"source": held.dim, "target": d}, S(d))
                for d in free if d != held.dim]  # fmt: skip
        out += [("partial", {"combine": c}, P(c)) for c in ("sum", "max", "min")]
    return out


@settings(deadline=None)
@given(placed(), st.data())
def test_each_collective_keeps_the_value(
    case: tuple[TensorType, Mesh], data: st.DataObject
) -> None:
    type, mesh = case
    kinds = {p.combine for p in type.placement or () if p.kind == "P"}
    axis = data.draw(st.integers(0, len(mesh.axes) - 1))
    whole = tensor(type)
    shards = scatter(whole, type, mesh, noise=torch.Generator().manual_seed(1))
    for name, attrs, after in moves(type, mesh, axis):
        placement = list(type.placement or ())
        placement[axis] = after
        target = type.placed(placement)
        if after.kind == "P" and kinds - {after.combine}:
            continue
        if any(parts_of(target, mesh, d) > size for d, size in enumerate(type.shape)):
            continue
        op = Op(name, (Value("a", type),), (Value("b", target),),
                {"axis": mesh.names[axis], **attrs})  # fmt: skip
        moved = run_collective(op, shards, mesh)
        for coord, piece in zip(mesh.coords(), moved, strict=True):
            assert tuple(piece.shape) == local_shape(target, mesh, coord)
        torch.testing.assert_close(gather(moved, target, mesh, check=True), whole)


def test_permute_ranks_is_a_ring_in_each_group() -> None:
    mesh = Mesh((("x", 2), ("y", 3)))
    op = Op("permute_ranks", (), (), {"axis": "y", "shift": 1})
    moved = run_collective(op, [torch.tensor(r) for r in range(6)], mesh)
    assert [int(t) for t in moved] == [2, 0, 1, 5, 3, 4]


def test_lse_combine_is_minus_infinity_only_where_all_ranks_are() -> None:
    low = float("-inf")
    values = [torch.tensor([low, low, 1.0]), torch.tensor([low, 2.0, 1.0])]
    (first, second) = lse_combine(values, Mesh((("x", 2),)), ["x"])
    assert torch.equal(first, second)
    torch.testing.assert_close(first, torch.tensor([low, 2.0, 1.0 + 0.6931472]))


def test_collectives_of_bools() -> None:
    mesh = Mesh((("x", 2),))
    type = TensorType("bool", (4,), (P("max"),))
    parts = [torch.tensor([True, False, True, False]), torch.tensor([True, True, False, False])]
    op = Op("all_reduce", (Value("a", type),), (), {"axis": "x", "combine": "max"})
    assert run_collective(op, parts, mesh)[1].tolist() == [True, True, True, False]


def test_send_and_receive_match_by_stage_and_tag_in_order() -> None:
    mesh, mail = Mesh((("x", 2),)), {}  # type: ignore[var-annotated]
    for number in (1, 2):
        send = Op("send", (), (), {"to": 1, "tag": 5})
        run_collective(send, [torch.tensor(number)] * 2, mesh, mail, stage=0)
    receive = Op("recv", (), (), {"source": 0, "tag": 5})
    got = [run_collective(receive, [], mesh, mail, stage=1) for _ in range(2)]
    assert [[int(t) for t in ranks] for ranks in got] == [[1, 1], [2, 2]]
    with pytest.raises(RunError, match="tag 5"):
        run_collective(receive, [], mesh, mail, stage=1)


def bad_gathers() -> Sequence[tuple[list[torch.Tensor], TensorType, str]]:
    one, two = torch.ones(3), torch.full((3,), 2.0)
    return [
        ([one, two], TensorType("f32", (3,), (B,)), "differ along axis x"),
        ([one, torch.ones(4)], TensorType("f32", (3,), (B,)), "differ along axis x"),
        ([one, one], TensorType("f32", (5,), (S(0),)), "make up"),
    ]


@pytest.mark.parametrize(("shards", "type", "message"), bad_gathers())
def test_gather_rejects(shards: list[torch.Tensor], type: TensorType, message: str) -> None:
    with pytest.raises(RunError, match=message):
        gather(shards, type, Mesh((("x", 2),)), check=True)


def test_scatter_rejects_another_shape() -> None:
    with pytest.raises(RunError, match="W0804"):
        scatter(torch.ones(3), TensorType("f32", (4,), (B,)), Mesh((("x", 2),)))
