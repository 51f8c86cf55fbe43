"""The dimension algebra: shapes, legal splits and placements follow from a signature's line."""

from math import prod

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tests.ir.strategies import SIZES, programs

from weft.ir.module import Module, Op, Value
from weft.ir.opdef import OPS, bytes_of, flops_of, full_attrs, signature_of
from weft.ir.signature import (
    Signature,
    SignatureError,
    instantiate,
    parse_signature,
    reshape_signature,
)
from weft.ir.types import B, Mesh, P, S, TensorType, illegal_placement, local_shape

MATMUL = "b... m k, b... k n -> b... m n ; k=sum"


def rows(signature: Signature, state: str) -> tuple[list[str], list[str]]:
    """Placements of operands and results on one axis, as text."""
    operands, results = signature.placements((state,))
    return [str(p) for (p,) in operands], [str(p) for (p,) in results]


def test_a_matmul_has_the_classical_rules() -> None:
    signature = instantiate(MATMUL, [(4, 6), (6, 8)], [(4, 8)], ((0,), (1,)))
    assert rows(signature, "m") == (["S(0)", "B"], ["S(0)"])
    assert rows(signature, "n") == (["B", "S(1)"], ["S(1)"])
    assert rows(signature, "k") == (["S(1)", "S(0)"], ["P(sum)"])
    assert rows(signature, "") == (["B", "B"], ["B"])
    assert rows(signature, "partial(0)") == (["P(sum)", "B"], ["P(sum)"])
    assert rows(signature, "partial(1)") == (["B", "P(sum)"], ["P(sum)"])
    assert set(signature.states) == {"m", "k", "n", "partial(0)", "partial(1)"}
    assert signature.points == 4 * 6 * 8


def test_variadic_dims_align_to_the_right_and_broadcast() -> None:
    signature = instantiate("a..., a... -> a...", [(5, 1, 3), (2, 3)], [(5, 2, 3)])
    assert signature.operands == ((("a0",), (), ("a2",)), (("a1",), ("a2",)))
    assert rows(signature, "a0") == (["S(0)", "B"], ["S(0)"])
    assert rows(signature, "a1") == (["B", "S(0)"], ["S(1)"])
    assert rows(signature, "a2") == (["S(2)", "S(1)"], ["S(2)"])


def test_batched_matmul_broadcasts_its_batch() -> None:
    signature = instantiate(MATMUL, [(7, 4, 6), (6, 8)], [(7, 4, 8)])
    assert rows(signature, "b0") == (["S(0)", "B"], ["S(0)"])


def test_an_optional_dim_of_size_one_is_not_split() -> None:
    line = "b s t, b? s? t? -> b s t"
    signature = instantiate(line, [(2, 3, 4), (1, 3, 4)], [(2, 3, 4)])
    assert rows(signature, "b") == (["S(0)", "B"], ["S(0)"])
    assert rows(signature, "s") == (["S(1)", "S(1)"], ["S(1)"])


def test_a_factored_dim_splits_by_its_major_factor_in_equal_parts() -> None:
    signature = instantiate("b (g r) d, b g d -> b (g r) d", [(2, 12, 5), (2, 3, 5)], [(2, 12, 5)])
    assert signature.size("r") == 4
    assert rows(signature, "g") == (["S(1)", "S(1)"], ["S(1)"])
    assert signature.illegal("g", 3) == ""
    assert "does not divide" in signature.illegal("g", 2)
    assert "not the major factor" in signature.illegal("r", 2)
    assert "r" not in signature.states


def test_a_minor_factor_is_major_where_the_others_have_size_one() -> None:
    signature = instantiate("(g r), g -> (g r)", [(8,), (1,)], [(8,)])
    assert signature.illegal("r", 3) == ""
    assert rows(signature, "r") == (["S(0)", "B"], ["S(0)"])


def test_windowed_dims_are_whole() -> None:
    signature = instantiate("n i (y*p), o i p! -> n o y! ; i=sum",
                            [(2, 3, 8), (4, 3, 3)], [(2, 4, 6)])  # fmt: skip
    assert set(signature.states) == {"n", "i", "o"}
    assert "whole" in signature.illegal("y", 2)
    assert "whole" in signature.illegal("p", 2)
    assert rows(signature, "i") == (["S(1)", "S(1)"], ["P(sum)"])


def test_a_reduced_dim_without_a_combine_cannot_be_split() -> None:
    signature = instantiate("a n -> a", [(4, 6)], [(4,)])
    assert signature.states == ("a",)
    assert "no combine" in signature.illegal("n", 2)


def test_an_lse_combine_gives_the_placements_after_its_fix_up() -> None:
    line = "s t, t e -> s e, s ; t=lse"
    signature = instantiate(line, [(4, 6), (6, 5)], [(4, 5), (4,)], (), (P("sum"), B))
    assert rows(signature, "t") == (["S(1)", "S(0)"], ["P(sum)", "B"])
    assert rows(signature, "s") == (["S(0)", "B"], ["S(0)", "S(0)"])


def test_scalars_have_no_dims() -> None:
    signature = instantiate("_ -> a...", [()], [(4, 5)])
    assert rows(signature, "a0") == (["B"], ["S(0)"])


def test_a_dim_cannot_be_cut_into_more_parts_than_elements() -> None:
    signature = instantiate("a... -> a...", [(3, 5)], [(3, 5)])
    assert signature.illegal("a0", 3) == ""
    assert "3 cannot be cut into 4 parts" in signature.illegal("a0", 4)
    assert "no dim b" in signature.illegal("b", 2)
    assert "not linear" in signature.illegal("partial(0)", 2)


def test_two_axes_on_one_dim_multiply_their_parts() -> None:
    signature = instantiate("a... -> a...", [(5, 8)], [(5, 8)])
    assert signature.check(("a0", "a0"), (2, 2)) == ""
    assert "cut into 6 parts" in signature.check(("a0", "a0"), (2, 3))
    assert signature.check(("a0", "a1", ""), (5, 8, 99)) == ""


def test_several_axes_give_one_placement_each() -> None:
    signature = instantiate(MATMUL, [(4, 6), (6, 8)], [(4, 8)])
    operands, results = signature.placements(("m", "", "k"))
    assert operands == ((S(0), B, S(1)), (B, B, S(0)))
    assert results == ((S(0), B, P("sum")),)


def test_chunkable_dims_are_larger_than_one_and_combinable() -> None:
    signature = instantiate("a... n!, n! -> a... n!", [(1, 4, 6), (6,)], [(1, 4, 6)])
    assert signature.chunkable == ("a1",)


@pytest.mark.parametrize(
    ("line", "ins", "outs", "part"),
    [
        ("a, a -> a", [(3,), (4,)], [(3,)], "dim a is 3 in one tensor and 4"),
        ("a -> a", [(3,)], [(4,)], "dim a is 3 in one tensor and 4"),
        ("a -> a", [(3,), (3,)], [(3,)], "expected 1 operands and 1 results, got 2 and 1"),
        ("a b -> a", [(3,)], [(3,)], "rank 1 does not fit"),
        ("a -> a", [(3, 3)], [(3,)], "rank 2 does not fit"),
        ("(g r), g -> g", [(7,), (2,)], [(2,)], "7 is not a multiple of 2"),
        ("(g r), g, r -> g", [(8,), (2,), (3,)], [(2,)], "(g r) is 6, but the tensor dim is 8"),
        ("a..., a... -> a...", [(3,), (4,)], [(4,)], "in one tensor and"),
        ("a..., a... -> a...", [(3,), (1,)], [(1,)], "expected 3"),
    ],
)
def test_shapes_that_do_not_fit_are_named(
    line: str, ins: list[tuple[int, ...]], outs: list[tuple[int, ...]], part: str
) -> None:
    with pytest.raises(SignatureError) as caught:
        instantiate(line, ins, outs)
    assert part in str(caught.value)


@pytest.mark.parametrize("line", ["a b", "a -> b ; b", "a -> b ; b=avg", "a $ -> b", "(a -> b)"])
def test_a_malformed_line_is_refused(line: str) -> None:
    with pytest.raises(SignatureError):
        parse_signature(line)


# -- reshape -----------------------------------------------------------------------------------


@st.composite
def reshapes(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Two shapes of one size, without zeros."""
    primes = draw(st.lists(st.sampled_from((1, 2, 2, 3, 5)), max_size=6))

    def group(order: list[int]) -> tuple[int, ...]:
        shape: list[int] = []
        for prime in order:
            if shape and draw(st.booleans()):
                shape[-1] *= prime
            else:
                shape.append(prime)
        return tuple(shape)

    return group(primes), group(draw(st.permutations(primes)))


@settings(max_examples=300, deadline=None)
@given(reshapes())
def test_a_reshape_is_a_common_refinement(shapes: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    before, after = shapes
    operand, result, sizes = reshape_signature(before, after)
    assert len(operand) == len(before) and len(result) == len(after)
    groups = {name for name in sizes if name[0] == "w"}
    for shape, factors in ((before, operand), (after, result)):
        order = list(dict.fromkeys(name for names in factors for name in names))
        assert order == list(sizes)  # factors appear in row-major order on both sides
        for size, names in zip(shape, factors, strict=True):
            if not groups.intersection(names):
                assert prod(sizes[name] for name in names) == size
    assert prod(sizes.values()) == prod(before)


def test_a_reshape_that_changes_the_size_is_refused() -> None:
    with pytest.raises(SignatureError, match="changes the size"):
        reshape_signature((2, 3), (5,))


def test_merged_dims_split_by_their_major_part() -> None:
    operand, result, sizes = reshape_signature((4, 3, 5), (12, 5))
    assert operand == (("r0",), ("r1",), ("r2",))
    assert result == (("r0", "r1"), ("r2",))
    assert sizes == {"r0": 4, "r1": 3, "r2": 5}


# -- shards ------------------------------------------------------------------------------------


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(programs(most=5), st.sampled_from((2, 3, 4)))
def test_the_shards_of_a_legal_split_fit_the_signature(module: Module, parts: int) -> None:
    """Cut all tensors as a state says: on each rank the local shapes fit the same line."""
    mesh = Mesh((("x", parts),))
    for op in module.entry.ops:
        signature = signature_of(op)
        for state in signature.states:
            if signature.illegal(state, parts):
                continue
            ins, outs = signature.placements((state,))
            types = [
                value.type.placed(placement)
                for value, placement in zip((*op.operands, *op.results), (*ins, *outs), strict=True)
            ]
            assert not any(illegal_placement(t, mesh, t.placement or ()) for t in types)
            for coord in mesh.coords():
                shapes = [local_shape(type, mesh, coord) for type in types]
                count = len(op.operands)
                attrs = full_attrs(op.name, op.attrs)
                OPS[op.name].bind(shapes[:count], shapes[count:], attrs)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(programs(most=4))
def test_work_is_never_negative_and_zero_only_for_ops_that_move_or_make(module: Module) -> None:
    for op in module.entry.ops:
        assert flops_of(op) >= 0
        if OPS[op.name].family in ("contraction", "row"):
            assert flops_of(op) > 0


def test_the_work_and_bytes_of_ops_are_those_counted_by_hand() -> None:
    b, h, s, t, d = 2, 4, 16, 32, 8
    q, kv = TensorType("bf16", (b, h, s, d)), TensorType("bf16", (b, h, t, d))
    lse = TensorType("f32", (b, h, s))
    attention = Op(
        "attention",
        (Value("q", q), Value("k", kv), Value("v", kv)),
        (Value("o", q), Value("l", lse)),
        full_attrs("attention", {"scale": 1.0}),
    )
    assert flops_of(attention) == 2 * 2 * b * h * s * t * d  # two products
    assert bytes_of(attention) == 2 * (2 * b * h * s * d + 2 * b * h * t * d) + 4 * b * h * s
    image, kernel = TensorType("f32", (b, 3, 10, 10)), TensorType("f32", (5, 3, 3, 3))
    out = TensorType("f32", (b, 5, 8, 8))
    attrs = full_attrs("convolution", {"stride": (1, 1), "padding": (0, 0), "dilation": (1, 1)})
    conv = Op("convolution", (Value("x", image), Value("w", kernel)), (Value("y", out),), attrs)
    assert flops_of(conv) == 2 * b * 5 * 8 * 8 * 3 * 3 * 3
    assert bytes_of(conv) == 4 * (b * 3 * 100 + 5 * 27 + b * 5 * 64)


@pytest.mark.parametrize("size", SIZES)
def test_a_matmul_costs_two_operations_per_point(size: int) -> None:
    signature = instantiate("m k, k n -> m n ; k=sum", [(size, 5), (5, 7)], [(size, 7)])
    assert 2.0 * signature.points == 2.0 * size * 5 * 7
