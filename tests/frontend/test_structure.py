"""Nested inputs and outputs come apart and together again."""

from __future__ import annotations

from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from weft.frontend.structure import flatten
from weft.frontend.trace import trace_forward
from weft.runtime.interpreter import evaluate

Pair = namedtuple("Pair", ["left", "right"])


@dataclass
class Batch:
    """A dataclass that nothing registered."""

    ids: Any
    rest: Any = None


LEAVES = st.one_of(st.none(), st.integers(), st.text(max_size=3), st.builds(lambda n: torch.full(
    (2,), float(n)), st.integers(0, 9)))  # fmt: skip
NESTED = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.text("abc", min_size=1, max_size=2), inner, max_size=3),
        st.tuples(inner, inner),
        st.builds(Pair, inner, inner),
        st.builds(Batch, inner, inner),
        st.builds(lambda d: OrderedDict(d), st.dictionaries(st.text("xy", min_size=1), inner)),
    ),
    max_leaves=8,
)


def same(a: Any, b: Any) -> bool:
    """Equality that sees tensors as values."""
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and torch.equal(a, b)
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, Batch):
        return same(a.ids, b.ids) and same(a.rest, b.rest)
    return bool(a == b)


@given(NESTED)
def test_flatten_then_build_is_the_identity(value: Any) -> None:
    tensors, names, structure = flatten(value)
    assert len(tensors) == len(names) == structure.count
    assert len(set(names)) == len(names)
    assert same(structure.build(tensors), value)
    with pytest.raises(ValueError):
        structure.build([*tensors, torch.zeros(1)])


class Nested(nn.Module):
    """Takes and gives nested things, with constants among them."""

    def forward(self, batch: Batch, scale: float = 1.0, *, extra: dict[str, Tensor]) -> Batch:
        total = batch.ids * scale + extra["b"]
        return Batch({"sum": total, "name": "x", "pair": Pair(total, None)}, batch.rest)


def test_programs_take_and_give_nested_things() -> None:
    x, y, z = torch.ones(2), torch.full((2,), 2.0), torch.full((2,), 5.0)
    traced = trace_forward(Nested(), (Batch(x, [z]), 3.0), {"extra": {"b": y}})
    assert traced.input_names == ("batch.ids", "batch.rest.0", "extra.b")
    out = traced.outputs.build(evaluate(traced.module, [x, z, y]))
    assert isinstance(out, Batch) and out.ids["name"] == "x" and out.ids["pair"].right is None
    torch.testing.assert_close(out.ids["sum"], torch.full((2,), 5.0))
    torch.testing.assert_close(out.rest[0], z)


def test_one_tensor_given_twice_stays_two_inputs() -> None:
    class Difference(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a - 2 * b

    x = torch.ones(3)
    traced = trace_forward(Difference(), (x, x))
    (out,) = evaluate(traced.module, [torch.full((3,), 7.0), torch.full((3,), 3.0)])
    torch.testing.assert_close(out, torch.ones(3))


def test_functions_with_modules_and_tensors_of_their_own() -> None:
    big, small = torch.randn(100), torch.tensor([1.0, 2.0])
    net = nn.Linear(2, 2)

    def function(model: nn.Module, x: Tensor) -> Tensor:
        return model(x * small) + big.sum()

    traced = trace_forward(function, (net, torch.ones(3, 2)))
    roles = {str(a["name"]): a["role"] for a in traced.module.entry.param_attrs}
    assert roles["weight"] == roles["bias"] == "param" and roles["x"] == "input"
    values = [traced.tensors.get(name, torch.ones(3, 2)).detach() for name in roles]
    (out,) = evaluate(traced.module, values)
    torch.testing.assert_close(out, function(net, torch.ones(3, 2)).detach())
