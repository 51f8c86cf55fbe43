"""Meshes, shards, placements, names and diagnostics."""

from itertools import product
from math import prod

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.ir.errors import CODES, CompileError, Span, WeftError
from weft.ir.module import Function, Location, Module, Namer, Op, Value
from weft.ir.types import (
    COMBINES,
    DTYPES,
    FLOATS,
    B,
    Mesh,
    P,
    S,
    TensorType,
    illegal_placement,
    local_bytes,
    local_range,
    local_shape,
    parts_of,
    shard_offset,
    shard_size,
)

MESHES = st.lists(st.integers(1, 4), max_size=3).map(
    lambda sizes: Mesh(tuple((f"x{i}", size) for i, size in enumerate(sizes)))
)


@given(st.integers(0, 50), st.integers(1, 9))
def test_parts_are_balanced_and_cover_a_dim(total: int, parts: int) -> None:
    sizes = [shard_size(total, parts, i) for i in range(parts)]
    assert sum(sizes) == total
    assert max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)
    assert [shard_offset(total, parts, i) for i in range(parts)] == [
        sum(sizes[:i]) for i in range(parts)
    ]


@given(MESHES)
def test_ranks_and_coordinates_are_inverse_and_row_major(mesh: Mesh) -> None:
    coords = list(mesh.coords())
    assert coords == sorted(coords)
    assert [mesh.rank(coord) for coord in coords] == list(range(mesh.size))
    assert [mesh.coord(rank) for rank in range(mesh.size)] == coords


@given(MESHES, st.data())
def test_groups_of_axes_partition_the_ranks(mesh: Mesh, data: st.DataObject) -> None:
    axes = [name for name in mesh.names if data.draw(st.booleans())]
    groups = {mesh.group(rank, axes) for rank in range(mesh.size)}
    assert sorted(rank for group in groups for rank in group) == list(range(mesh.size))
    for group in groups:
        assert list(group) == sorted(group)
        fixed = [i for i, name in enumerate(mesh.names) if name not in axes]
        assert len({tuple(mesh.coord(rank)[i] for i in fixed) for rank in group}) == 1


@given(MESHES, st.data())
def test_shards_tile_the_tensor(mesh: Mesh, data: st.DataObject) -> None:
    """The ranges of the ranks that differ in split axes cover each element once."""
    shape = tuple(data.draw(st.lists(st.integers(1, 6), max_size=2)))
    entries = st.sampled_from([B, P(), *(S(d) for d in range(len(shape)))])
    placement = tuple(data.draw(entries) for _ in mesh.axes)
    kind = TensorType("f32", shape, placement)
    split = [i for i, p in enumerate(placement) if p.kind == "S"]
    seen: dict[tuple[int, ...], int] = {}
    for coord in mesh.coords():
        if any(digit for i, digit in enumerate(coord) if i not in split):
            continue
        ranges = [local_range(kind, mesh, coord, d) for d in range(len(shape))]
        assert local_shape(kind, mesh, coord) == tuple(size for _, size in ranges)
        for element in product(*(range(o, o + n) for o, n in ranges)):
            seen[element] = seen.get(element, 0) + 1
    assert seen == {element: 1 for element in product(*map(range, shape))}


@given(MESHES, st.data())
def test_rank_zero_holds_the_largest_shard(mesh: Mesh, data: st.DataObject) -> None:
    shape = tuple(data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=2)))
    entries = st.sampled_from([B, *(S(d) for d in range(len(shape)))])
    kind = TensorType("bf16", shape, tuple(data.draw(entries) for _ in mesh.axes))
    bytes_each = [2 * prod(local_shape(kind, mesh, coord)) for coord in mesh.coords()]
    assert local_bytes(kind, mesh) == max(bytes_each)


def test_the_earlier_axis_is_the_outer_one() -> None:
    mesh = Mesh((("a", 2), ("b", 2)))
    kind = TensorType("f32", (7,), (S(0), S(0)))
    ranges = [local_range(kind, mesh, coord, 0) for coord in mesh.coords()]
    assert ranges == [(0, 2), (2, 2), (4, 2), (6, 1)]
    assert parts_of(kind, mesh, 0) == 4
    assert parts_of(TensorType("f32", (7,), (B, S(0))), mesh, 0) == 2


def test_an_empty_mesh_is_one_rank() -> None:
    assert Mesh().size == 1
    assert list(Mesh().coords()) == [()]
    assert Mesh().group(0, ()) == (0,)


def test_an_unknown_axis_is_a_key_error_that_names_the_axes() -> None:
    with pytest.raises(KeyError, match="only dp, tp"):
        Mesh((("dp", 2), ("tp", 2))).axis("pp")


@pytest.mark.parametrize(
    ("dtype", "shape", "placement", "reason"),
    [
        ("f32", (4, 4), (S(0), S(1)), ""),
        ("f32", (6,), (S(0), S(0)), ""),
        ("f32", (5,), (S(0), S(0)), "dim 0 of size 5 cannot be cut into 6 parts"),
        ("f32", (4,), (B,), "1 placements for 2 axes"),
        ("f32", (), (S(0), B), "there is no dim 0"),
        ("f32", (), (P("sum"), P("max")), "partial in max and sum at once"),
        ("f32", (), (P("avg"), B), "partial in avg, known: sum, max, min"),
        ("bool", (), (P("sum"), B), "a bool tensor cannot be a sum"),
        ("bool", (), (P("max"), B), ""),
    ],
)
def test_illegal_placements_have_a_reason(
    dtype: str, shape: tuple[int, ...], placement: tuple[object, ...], reason: str
) -> None:
    mesh = Mesh((("a", 2), ("b", 3)))
    kind = TensorType(dtype, shape)
    assert illegal_placement(kind, mesh, placement) == reason  # type: ignore[arg-type]


def test_types_know_their_size() -> None:
    kind = TensorType("bf16", (3, 5))
    assert (kind.numel, kind.bytes) == (15, 30)
    assert TensorType("f64", ()).bytes == 8
    assert set(DTYPES) >= FLOATS
    assert str(kind.placed((S(1), B, P("max")))) == "bf16[3, 5]{S(1), B, P(max)}"
    assert [str(P(c)) for c in COMBINES] == ["P(sum)", "P(max)", "P(min)"]


@given(st.lists(st.sampled_from(["", "x", "x_0", "y", "0"]), max_size=30))
def test_names_are_never_handed_out_twice(hints: list[str]) -> None:
    namer = Namer(("x", "1"))
    names = [namer(hint) for hint in hints]
    assert len({*names, "x", "1"}) == len(names) + 2


def test_a_function_knows_definitions_and_uses() -> None:
    kind = TensorType("f32", (2,))
    x, y, z = (Value(name, kind) for name in "xyz")
    first, second = Op("neg", (x,), (y,)), Op("add", (y, y), (z,))
    function = Function("f", (x,), (first, second), (z,))
    assert function.defs() == {"y": first, "z": second}
    assert function.uses() == {"x": [first], "y": [second]}
    assert function.last_uses() == [("x",), ("y",)]
    module = Module("logical", (function,))
    assert module.entry is module.function("f")
    assert list(module.walk()) == [(function, first), (function, second)]
    with pytest.raises(KeyError, match="@g"):
        module.function("g")


def test_locations_read_well() -> None:
    assert str(Location("net.fc", "a.py", 3)) == "net.fc (a.py:3)"
    assert str(Location("", "a.py", 3)) == "a.py:3"
    assert str(Location("net.fc")) == "net.fc"
    assert str(Location()) == ""


def test_a_diagnostic_shows_code_place_reason_and_hint() -> None:
    span = Span("a.py", 3, 5, "x = \tfoo(y)", 3)
    error = CompileError("W0101", "no foo", span=span, reason="it is not there", hint="write bar")
    assert isinstance(error, WeftError)
    assert str(error) == (
        "[W0101] no foo\n  at a.py:3:5\n    x =  foo(y)\n        ^^^\n"
        "  why: it is not there\n  try: write bar"
    )
    assert Span("a.py", 3, 5).render() == "a.py:3:5"


def test_an_unknown_code_is_refused() -> None:
    with pytest.raises(KeyError, match="W9999"):
        CompileError("W9999", "?")
    assert all(len(code) == 5 and text for code, text in CODES.items())
