"""Sorts of rows that are undone again go; those that matter stay. Digits divide as numbers do."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weft.ir.module import Module
from weft.ir.parser import parse_module
from weft.ir.verify import verify
from weft.passes.simplify import simplify
from weft.passes.simplify_affine import Affine, canonical, divide
from weft.runtime.interpreter import evaluate

SORT = "%k, %p = sort(%e) {dim = 0} : i64[6], i64[6]; %a = take(%x, %p) {dim = 0} : f64[6, 2]; "
SCATTERED = (
    "%z = constant() {value = 0} : i64[6]; %i = iota() : i64[6]; "
    "%q = scatter(%z, %p, %i) {dim = 0} : i64[6]; "
)
#: what is done to sorted rows %a, of which %b are put back in order
UNDONE = {
    "pointwise": SORT + "%b = exp(%a) : f64[6, 2]; " + SCATTERED,
    "the keys": SORT + "%f = cast(%k) : f64[6]; %r = reshape(%f) : f64[6, 1]; "
                "%b = mul(%a, %r) : f64[6, 2]; " + SCATTERED,
    "products": SORT + "%g = grouped_product(%a, %w, %k) : f64[6, 2]; "
                "%b = softmax(%g) : f64[6, 2]; " + SCATTERED,
    "sorted back": SORT + "%b = neg(%a) : f64[6, 2]; %s, %q = sort(%p) {dim = 0} : i64[6], i64[6]; ",
    "views of positions": SORT + "%b = neg(%a) : f64[6, 2]; %n = constant() {value = 6} : i64[]; "
                          "%m = remainder(%p, %n) : i64[6]; %c = reshape(%m) : i64[6, 1]; "
                          "%z = constant() {value = 3} : i64[6, 1]; %i = iota() : i64[6, 1]; "
                          "%t = scatter(%z, %c, %i) {dim = 0} : i64[6, 1]; %q = reshape(%t) : i64[6]; ",
}  # fmt: skip
#: programs that look alike, but need the sort
NEEDED = {
    "not put back": SORT + "return %a",
    "put back twice": SORT + SCATTERED + "%b = take(%a, %q) {dim = 0} : f64[6, 2]; "
                      "%y = take(%b, %q) {dim = 0} : f64[6, 2]; return %y",
    "a running sum": SORT + SCATTERED + "%b = cumsum(%a) {dim = 0} : f64[6, 2]; "
                     "%y = take(%b, %q) {dim = 0} : f64[6, 2]; return %y",
    "rows by another order": SORT + SCATTERED + "%r, %o = sort(%x1) {dim = 0} : f64[6], i64[6]; "
                             "%y = take(%a, %o) {dim = 0} : f64[6, 2]; return %y",
    "added to unsorted rows": SORT + SCATTERED + "%b = add(%a, %x) : f64[6, 2]; "
                              "%y = take(%b, %q) {dim = 0} : f64[6, 2]; return %y",
    "positions turned around": SORT + "%z = constant() {value = 0} : i64[6]; "
                               "%i = iota() {start = 5, step = -1} : i64[6]; "
                               "%q = scatter(%z, %p, %i) {dim = 0} : i64[6]; "
                               "%y = take(%a, %q) {dim = 0} : f64[6, 2]; return %y",
}  # fmt: skip


def program(body: str) -> Module:
    lines = body.replace("; ", "\n")
    params = "%x: f64[6, 2], %x1: f64[6], %e: i64[6], %w: f64[3, 2, 2]"
    types = "-> (f64[6, 2])"
    return parse_module(f"weft 1 logical\nfunc @main({params}) {types} {{\n{lines}\n}}\n")


def check(before: Module) -> set[str]:
    """Simplify; the results stay equal, to the last bit. Returns the names of the ops left."""
    after = simplify(before)
    verify(after)
    g = torch.Generator().manual_seed(0)
    values = [torch.randn(*v.type.shape, generator=g, dtype=torch.float64) if v.type.dtype == "f64"
              else torch.tensor([2, 0, 1, 2, 0, 0]) for v in before.entry.params]  # fmt: skip
    for a, b in zip(evaluate(before, values), evaluate(after, values), strict=True):
        assert torch.equal(a, b)
    return {op.name for _, op in after.walk()}


@pytest.mark.parametrize("name", UNDONE)
def test_rows_that_are_put_back_in_order_are_not_sorted(name: str) -> None:
    body = UNDONE[name] + "%y = take(%b, %q) {dim = 0} : f64[6, 2]; return %y"
    assert check(program(body)).isdisjoint({"sort", "take", "scatter"})


@pytest.mark.parametrize("name", NEEDED)
def test_a_sort_that_shows_stays(name: str) -> None:
    assert "sort" in check(program(NEEDED[name]))


def _numbers(x: Affine) -> np.ndarray:
    out = np.array(x.offset)
    for factors in x.dims:
        line = np.array([0])
        for size, step in factors:
            line = (line[:, None] + np.arange(size) * step).reshape(-1)
        out = out[..., None] + line
    return out


FACTORS = st.tuples(st.sampled_from((1, 2, 3, 4, 6)), st.sampled_from((0, 1, 2, 3, 4, 6, 8, -1)))


@given(st.integers(-3, 9), st.lists(st.lists(FACTORS, max_size=3), max_size=2), st.integers(1, 9))
def test_quotients_of_formulas(offset: int, dims: list[list[tuple[int, int]]], by: int) -> None:
    x = Affine(offset, tuple(canonical(factors) for factors in dims))
    parts = divide(x, by)
    if parts is not None:
        assert np.array_equal(_numbers(parts[0]), _numbers(x) // by)
        assert np.array_equal(_numbers(parts[1]), _numbers(x) % by)
    else:  # one ramp that fits is always divided
        assert offset or dims != [[(6, 1)]] or 6 % by
