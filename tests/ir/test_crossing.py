"""What goes from rank to rank between meshes of different shape."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.ir.crossing import box_of, comments, far_attrs, op_pieces, pieces, wrong_ends
from weft.ir.module import Op, Value
from weft.ir.stage_ranks import StageRanks
from weft.ir.types import B, Mesh, P, Placement, S, TensorType, illegal_placement

SHAPES = st.lists(st.integers(1, 7), max_size=3).map(tuple)
MESHES = st.lists(st.integers(1, 3), max_size=3).map(
    lambda sizes: Mesh(tuple((f"x{i}", size) for i, size in enumerate(sizes)))
)


@st.composite
def ends(draw: st.DrawFn) -> tuple[TensorType, Mesh, TensorType, Mesh]:
    """A value on two meshes."""
    type = TensorType("f32", draw(SHAPES))
    out: list[Any] = []
    for mesh in (draw(MESHES), draw(MESHES)):
        placement: list[Placement] = []
        for index in range(len(mesh.axes)):
            states = [B, *(S(dim) for dim in range(len(type.shape)))]
            rest = [B] * (len(mesh.axes) - index - 1)
            legal = [s for s in states if not illegal_placement(type, mesh, [*placement, s, *rest])]
            placement.append(draw(st.sampled_from(legal)))
        out += [type.placed(placement), mesh]
    return tuple(out)


@given(ends())
def test_each_receiver_gets_its_shard_once_from_those_that_hold_it(
    given: tuple[TensorType, Mesh, TensorType, Mesh],
) -> None:
    source, mesh, target, other = given
    found = pieces(source, mesh, target, other)
    got = [np.zeros(target.shape, int) for _ in range(other.size)]
    sent: dict[int, int] = dict.fromkeys(range(mesh.size), 0)
    for piece in found:
        index = tuple(slice(start, stop) for start, stop in piece.box)
        got[piece.target][index] += 1
        held = box_of(source, mesh, mesh.coord(piece.source))
        assert all(a <= c < d <= b for (a, b), (c, d) in zip(held, piece.box, strict=True))
        sent[piece.source] += prod(stop - start for start, stop in piece.box)
    for place, counts in enumerate(got):
        wanted = np.zeros(target.shape, int)
        box = box_of(target, other, other.coord(place))
        wanted[tuple(slice(start, stop) for start, stop in box)] = 1
        assert (counts == wanted).all()
    for place in range(mesh.size):  # of equal copies none sends more than a piece beyond another
        box = box_of(source, mesh, mesh.coord(place))
        copies = [r for r in range(mesh.size) if box_of(source, mesh, mesh.coord(r)) == box]
        largest = max((p.bytes("u8") for p in found if p.source in copies), default=0)
        assert max(sent[r] for r in copies) - min(sent[r] for r in copies) <= largest


@given(ends())
def test_both_ends_mean_the_same_pieces(given: tuple[TensorType, Mesh, TensorType, Mesh]) -> None:
    source, mesh, target, other = given
    sent, got = Value("x", source), Value("y", target)
    send = Op("send", (sent,), (Value("s", source),), {"to": 1, **far_attrs(other, target)})
    recv = Op("recv", (), (got,), {"source": 0, **far_attrs(mesh, source)})
    assert not wrong_ends(send) and not wrong_ends(recv)
    assert op_pieces(send, mesh) == op_pieces(recv, other) == pieces(source, mesh, target, other)


def test_a_dump_says_the_pieces() -> None:
    type, mesh = TensorType("f32", (5, 2), (S(0),)), Mesh((("dp", 2),))
    far = far_attrs(Mesh((("tp", 3),)), TensorType("f32", (5, 2), (S(0),)))
    send = Op("send", (Value("x", type),), (Value("s", type),), {"to": 1, **far})
    assert comments([send, send], mesh) == [
        "to stage 1: f32[5, 2]{S(0)} -> f32[5, 2]{S(0)}: 0>0 [0:2, 0:2], 0>1 [2:3, 0:2], "
        "1>1 [3:4, 0:2], 1>2 [4:5, 0:2]"
    ]


@pytest.mark.parametrize(
    ("attrs", "words"),
    [
        ({"mesh": "two", "placement": "B"}, "is no mesh"),
        ({"mesh": "dp=0", "placement": "B"}, "is no mesh"),
        ({"mesh": "dp=999999999", "placement": "B"}, "more than"),
        ({"mesh": "dp=2, dp=2", "placement": "B, B"}, "an axis twice"),
        ({"mesh": "dp=2", "placement": "half"}, "no placements"),
        ({"mesh": "dp=2", "placement": "B, B"}, "2 placements for 1 axes"),
        ({"mesh": "dp=9", "placement": "S(0)"}, "cannot be cut into 9 parts"),
        ({"mesh": "dp=2", "placement": "P(sum)"}, "its sum comes first"),
    ],
)
def test_wrong_ends_are_told(attrs: dict[str, str], words: str) -> None:
    type = TensorType("f32", (5, 2), ())
    op = Op("send", (Value("x", type),), (Value("s", type),), {"to": 1, **attrs})
    assert words in wrong_ends(op)
    partial = Op("send", (Value("x", type.placed((P(),))),), (), {"to": 1, "mesh": "dp=2",
                                                                   "placement": "B"})  # fmt: skip
    assert "its sum comes first" in wrong_ends(partial)


@given(st.lists(MESHES, min_size=1, max_size=4))
def test_ranks_of_stages(meshes: list[Mesh]) -> None:
    ranks = StageRanks.of(meshes)
    rows = [(stage, place) for stage, mesh in enumerate(meshes) for place in range(mesh.size)]
    assert ranks.size == len(rows) and ranks.count == len(meshes)
    assert [(ranks.stage(rank), ranks.place(rank)) for rank in range(ranks.size)] == rows
    assert [ranks.rank(*row) for row in rows] == list(range(ranks.size))
    coords = [coord for mesh in meshes for coord in mesh.coords()]
    assert [ranks.coord(rank) for rank in range(ranks.size)] == coords
