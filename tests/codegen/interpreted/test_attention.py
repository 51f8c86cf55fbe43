"""Attention kernels in Triton's interpreter against float64 references. Needs TRITON_INTERPRET=1."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.codegen.kit import TORCH
from tests.codegen.skeletons import graph, module_of
from torch import Tensor

from weft.codegen.attention import (
    Attention,
    AttentionTile,
    Modifier,
    attention_source,
    mask_modifier,
)
from weft.codegen.hole import leaf

TILE = AttentionTile(16, 32, 4, 1, splits=3)
#: f32 sums of a row; bf16 rounds probabilities and scores' gradients, 2^-9 of each, before they are
#: multiplied, and results: their sum is bounded by that of magnitudes
ERROR = {"f32": 1e-5, "bf16": 2.0**-7}


def close(got: Tensor, expected: Tensor, dtype: str) -> None:
    assert got.shape == expected.shape
    got = got.double()
    assert torch.equal(got.isinf(), expected.isinf())
    finite = expected.isfinite()
    if finite.any():
        scale = max(1.0, float(expected[finite].abs().max()))
        assert (got - expected)[finite].abs().max() <= ERROR[dtype] * scale


@dataclass
class Problem:
    """Random operands `[b, h, s, d]` and the float64 results of attention and of its gradients."""

    q: Tensor
    k: Tensor
    v: Tensor
    dout: Tensor

    def __init__(self, b: int, heads: int, groups: int, s: int, t: int, d: int, e: int, dtype: str) -> None:
        generator = torch.Generator().manual_seed(s * 64 + t)

        def draw(*shape: int) -> Tensor:  # stored [b, s, h, d], as projections make it
            x = torch.randn(shape[0], shape[2], shape[1], shape[3] + 8, generator=generator)
            return x.to(TORCH[dtype])[..., : shape[3]].transpose(1, 2)

        self.q, self.dout = draw(b, heads, s, d), draw(b, heads, s, e)
        self.k, self.v = draw(b, groups, t, d), draw(b, groups, t, e)

    def reference(self, scale: float, bias: Tensor, cap: float = 0.0) -> list[Tensor]:
        """out, lse, dq, dk, dv for scores to which `bias` (s, t) is added; `cap` bends them first."""
        q, k, v, dout = (x.double() for x in (self.q, self.k, self.v, self.dout))
        groups, repeats = k.shape[1], q.shape[1] // k.shape[1]
        k, v = (x.repeat_interleave(repeats, 1) for x in (k, v))
        scores = scale * q @ k.transpose(2, 3)
        bent = torch.tanh(scores / cap) if cap else torch.zeros(())
        scores = (cap * bent if cap else scores) + bias
        lse = scores.logsumexp(-1)
        p = (scores - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp()
        out = p @ v
        gap = dout @ v.transpose(2, 3) - (dout * out).sum(-1, keepdim=True)
        dscores = p * gap * (1 - bent * bent) * scale
        pairs = (dscores.transpose(2, 3) @ q, p.transpose(2, 3) @ dout)
        return [out, lse, dscores @ k, *(x.unflatten(1, (groups, repeats)).sum(2) for x in pairs)]


def launch(attention: Attention, *operands: object, tile: AttentionTile = TILE) -> tuple[Tensor, ...]:
    source = attention_source(attention, tile)
    return tuple(module_of(source.name, source.text).launch(*operands))


def causal_bias(s: int, t: int, shift: int) -> Tensor:
    seen = torch.arange(t) <= torch.arange(s)[:, None] + shift
    return torch.zeros(s, t, dtype=torch.float64).masked_fill(~seen, float("-inf"))


def run_all(problem: Problem, expected: list[Tensor], dtype: str, scale: float, shift: int,
            *rest: object, **options: object) -> None:  # fmt: skip
    """Forward and both gradients of a problem."""
    q, k, v, dout = problem.q, problem.k, problem.v, problem.dout
    base = dict(dtype=dtype, heads=q.shape[1], groups=k.shape[1], queries=q.shape[2], keys=k.shape[2],
                d=q.shape[3], e=v.shape[3], **options)  # fmt: skip
    out, lse = launch(Attention("a", "forward", **base), q, k, v, scale, shift, *rest)  # type: ignore[arg-type]
    close(out, expected[0], dtype)
    close(lse, expected[1], "f32" if dtype == "f32" else "bf16")
    dq, delta = launch(Attention("b", "dq", **base), dout, q, k, v, out, lse, scale, shift, *rest)  # type: ignore[arg-type]
    dk, dv = launch(Attention("c", "dkdv", **base), dout, q, k, v, lse, delta, scale, shift, *rest)  # type: ignore[arg-type]
    for got, wanted in zip((dq, dk, dv), expected[2:], strict=True):
        close(got, wanted, dtype)


@settings(max_examples=8, deadline=None)
@given(st.integers(1, 2), st.sampled_from([(2, 1), (2, 2)]), st.sampled_from([0, 1, 16, 37]),
       st.sampled_from([1, 32, 50]), st.sampled_from([(16, 16), (24, 16)]), st.sampled_from(["f32", "bf16"]),
       st.sampled_from([None, 0, 5, -3]))  # fmt: skip
def test_attention_and_gradients_equal_the_reference(
    b: int, heads: tuple[int, int], s: int, t: int, sizes: tuple[int, int], dtype: str, shift: int | None
) -> None:
    problem = Problem(b, *heads, s, t, *sizes, dtype)
    bias = torch.zeros(s, t) if shift is None else causal_bias(s, t, shift)
    expected = problem.reference(0.3, bias)
    run_all(problem, expected, dtype, 0.3, shift or 0, causal=shift is not None)


@pytest.mark.parametrize("kind", ["bool", "f32", "keys", "queries"])
def test_masks_are_modifiers(kind: str) -> None:
    problem = Problem(2, 2, 1, 20, 35, 16, 16, "f32")
    generator = torch.Generator().manual_seed(3)
    if kind == "queries":  # a bias that only the log-sum-exp shows, its rows apart in memory
        mask = torch.randn(20, 2, generator=generator).t().reshape(2, 1, 20, 1)
        modifier = mask_modifier(graph, "f32", column=False)
    elif kind == "keys":
        mask = torch.randn(2, 1, 1, 35, generator=generator)
        modifier = mask_modifier(graph, "f32", rows=False)
    elif kind == "f32":
        mask = torch.randn(1, 2, 20, 35, generator=generator)
        modifier = mask_modifier(graph, "f32")
    else:
        mask = torch.rand(2, 1, 20, 35, generator=generator) < 0.5
        mask[:, :, 3] = False  # a query that sees nothing
        modifier = mask_modifier(graph, "bool")
    bias = torch.zeros(mask.shape).masked_fill(~mask, float("-inf")) if kind == "bool" else mask
    run_all(problem, problem.reference(0.25, bias.double()), "f32", 0.25, 0, mask, modifier=modifier)


def test_a_modifier_has_a_gradient() -> None:
    """Soft-capped scores with a bias that falls with the distance: cap * tanh(score / cap) - slope * gap."""
    score, cap = leaf(graph, "score"), 2.0
    bent = 1.0 - 2.0 / (graph.unary("exp", score * (2.0 / cap)) + 1.0)
    row = graph.make("row", (), "i32", (0,), rows=True, column=False)
    column = graph.make("column", (), "i32", (0,), rows=False, column=True)
    modifier = Modifier(bent * cap + (column - row).to("f32") * 0.1,
                        leaf(graph, "grad") * (1.0 - bent * bent))  # fmt: skip
    problem = Problem(1, 2, 1, 19, 40, 16, 16, "f32")
    gap = torch.arange(40).double() - torch.arange(19).double()[:, None]
    run_all(problem, problem.reference(0.5, gap * 0.1, cap), "f32", 0.5, 0, modifier=modifier)


def test_sequences_of_any_length_share_a_call() -> None:
    lengths, seen = [5, 0, 33], [9, 4, 33]
    parts = [Problem(1, 2, 1, s, t, 16, 16, "bf16") for s, t in zip(lengths, seen, strict=True)]
    cu = [torch.tensor([0, *n]).cumsum(0).int() for n in (lengths, seen)]

    def joined(name: str) -> Tensor:
        return torch.cat([getattr(p, name)[0].transpose(0, 1) for p in parts])

    base = dict(dtype="bf16", heads=2, groups=1, queries=33, keys=33, d=16, e=16, causal=True, varlen=True)
    q, k, v, dout = (joined(name) for name in ("q", "k", "v", "dout"))
    rest = (0.3, 0, *cu, 33, 33)
    out, lse = launch(Attention("a", "forward", **base), q, k, v, *rest)  # type: ignore[arg-type]
    dq, delta = launch(Attention("b", "dq", **base), dout, q, k, v, out, lse, *rest)  # type: ignore[arg-type]
    dk, dv = launch(Attention("c", "dkdv", **base), dout, q, k, v, lse, delta, *rest)  # type: ignore[arg-type]
    for i, part in enumerate(parts):
        s, t = lengths[i], seen[i]
        expected = part.reference(0.3, causal_bias(s, t, t - s))
        at, of = slice(int(cu[0][i]), int(cu[0][i + 1])), slice(int(cu[1][i]), int(cu[1][i + 1]))
        close(lse[:, at], expected[1][0], "bf16")
        found = (out[at], dq[at], dk[of], dv[of])
        for got, wanted in zip(found, (expected[0], *expected[2:]), strict=True):
            close(got.transpose(0, 1), wanted[0], "bf16")


def test_a_block_list_is_a_mask_of_blocks() -> None:
    s, t, tile = 40, 70, AttentionTile(16, 16, 4, 1)
    visits = torch.tensor([[1, 0, 1, 0, 1], [0, 0, 0, 0, 0], [0, 1, 0, 0, 1]]).bool()
    seen = visits.repeat_interleave(16, 0)[:s].repeat_interleave(16, 1)[:, :t]
    bias = torch.zeros(s, t, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    problem = Problem(1, 2, 1, s, t, 16, 16, "f32")
    expected = problem.reference(0.3, bias)

    def lists(of: Tensor) -> tuple[Tensor, Tensor]:
        visit = torch.cat([torch.zeros(1, dtype=torch.int64), of.sum(1).cumsum(0)]).int()
        return visit, of.nonzero()[:, 1].int()

    base = dict(dtype="f32", heads=2, groups=1, queries=s, keys=t, d=16, e=16, sparse=True)
    q, k, v, dout = problem.q, problem.k, problem.v, problem.dout
    rows, columns = lists(visits), lists(visits.t())
    out, lse = launch(Attention("a", "forward", **base), q, k, v, 0.3, 0, *rows, tile=tile)  # type: ignore[arg-type]
    dq, delta = launch(Attention("b", "dq", **base), dout, q, k, v, out, lse, 0.3, 0, *rows, tile=tile)  # type: ignore[arg-type]
    dk, dv = launch(Attention("c", "dkdv", **base), dout, q, k, v, lse, delta, 0.3, 0, *columns, tile=tile)  # type: ignore[arg-type]
    for got, wanted in zip((out, lse, dq, dk, dv), expected, strict=True):
        close(got, wanted, "f32")


@settings(max_examples=8, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 31, 32, 90]), min_size=1, max_size=3), st.sampled_from([1, 2, 8]),
       st.sampled_from(["f32", "bf16"]))  # fmt: skip
def test_decoding_sees_what_a_cache_holds(lengths: list[int], splits: int, dtype: str) -> None:
    problem = Problem(len(lengths), 4, 2, 1, 96, 16, 16, dtype)
    tile = AttentionTile(16, 32, 4, 1, splits=splits)
    attention = Attention("d", "decode", dtype, 4, 2, 1, 96, 16, 16)
    out, lse = launch(attention, problem.q[:, :, 0], problem.k, problem.v,
                      torch.tensor(lengths, dtype=torch.int32), 0.3, tile=tile)  # fmt: skip
    seen = torch.arange(96) < torch.tensor(lengths)[:, None, None, None]
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, float("-inf"))
    expected = problem.reference(0.3, bias)
    close(out, expected[0][:, :, 0], dtype)
    close(lse, expected[1][:, :, 0], dtype)
