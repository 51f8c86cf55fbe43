"""Constraints: their text form, and what they are about."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.ir.errors import CompileError
from weft.ir.types import B, Mesh, P, S
from weft.passes.constraints import KINDS, Constraints, Rule, Selection, forbid

globs = st.text("abc.*?1", min_size=1, max_size=8)
axes = st.sampled_from(["dp", "tp", "*"])
choices = st.sampled_from(["S(0)", "S(-1)", "S(*)", "B", "P(sum)", "-", "k", "partial(0, 1)"])
rules = st.builds(
    Rule, st.sampled_from(KINDS), globs, axes, st.lists(choices, min_size=1, max_size=3).map(tuple)
)
memories = st.none() | st.integers(1, 10**13).map(float)


@given(st.lists(rules, max_size=5, unique=True), memories)
def test_the_text_form_reads_back(found: list[Rule], memory: float | None) -> None:
    constraints = Constraints(tuple(found), memory)
    assert Constraints.parse(str(constraints)) == constraints
    assert Constraints.parse(str(constraints).replace("\n", "; ")) == constraints


def test_statements() -> None:
    text = """
    param model.layers.*.q_proj.weight : tp = S(0), dp = B|S(1)   # Megatron, ZeRO
    op attention : tp = -
    memory 40 GB
    """
    q, dp, attention = Constraints.parse(text).rules
    assert Constraints.parse(text).memory_bytes == 40e9
    assert q.selects("model.layers.7.q_proj.weight") and not q.selects("model.norm.weight")
    assert (q.axis, dp.axis, dp.allowed) == ("tp", "dp", ("B", "S(1)"))
    assert attention.selects("model.layers.0.attn", "attention")
    assert attention.admits_states(("b", ""), ("dp", "tp"))
    assert not attention.admits_states(("", "b"), ("dp", "tp"))


def test_a_module_selects_all_that_is_below_it() -> None:
    rule = Rule("op", "model.layers.1", "*", ("-",))
    assert rule.selects("model.layers.1.mlp.up") and rule.selects("model.layers.1")
    assert not rule.selects("model.layers.10") and not rule.selects("model")


def test_dims_count_from_both_ends() -> None:
    last = Rule("value", "*", "tp", ("S(-1)",))
    assert last.admits((B, S(2)), ("dp", "tp"), 3) and not last.admits((B, S(2)), ("dp", "tp"), 4)
    parts = Rule("value", "*", "*", ("P(*)", "B"))
    assert parts.admits((B, P("sum")), ("dp", "tp"), 2)
    assert not parts.admits((S(0), B), ("dp", "tp"), 2)


def test_forbidding_an_axis_is_about_ops_and_all_that_is_stored() -> None:
    constraints = Constraints.parse("forbid tp : model.embed")
    assert constraints == forbid("tp", "model.embed")
    chosen = Selection(constraints, Mesh((("dp", 2), ("tp", 2)), "cpu"))
    (state,) = chosen.about("state", "model.embed.weight")
    assert not state.admits((B, S(0)), ("dp", "tp"), 2) and chosen.about("op", "model.head") == ()


def test_an_axis_that_the_mesh_does_not_have_says_nothing() -> None:
    constraints = Constraints.parse("op * : tp = -") + Constraints.parse("memory 1e9; memory 2e9")
    assert Selection(constraints, Mesh((("dp", 4),), "cpu")).empty
    assert constraints.memory_bytes == 1e9


@pytest.mark.parametrize(
    "text", ["parm * : dp = B", "param * dp = B", "param * : dp", "param * : dp = |B", "memory 3 elephants",
             "param * : dp = B tp = B"],
)  # fmt: skip
def test_what_cannot_be_read_is_said(text: str) -> None:
    with pytest.raises(CompileError, match="cannot read the constraint") as error:
        Constraints.parse(text)
    assert error.value.code == "W0601" and error.value.hint
