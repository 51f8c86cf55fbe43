"""Each rule of simplify: where it applies it keeps the results, and it leaves look-alikes alone."""

from __future__ import annotations

from collections import Counter

import pytest
from tests.passes.equality import assert_close
from tests.passes.random_inputs import random_inputs

from weft.ir.module import Module
from weft.ir.parser import parse_module
from weft.ir.verify import verify
from weft.passes.simplify import simplify
from weft.passes.simplify_rules import RULES
from weft.runtime.interpreter import evaluate

Case = tuple[str, str]
#: rule -> programs to which it applies, as (parameters, body)
CASES: dict[str, list[Case]] = {
    "fold": [
        ("", "%a = iota() : i64[4]; %b = reshape(%a) : i64[4, 1]; return %b"),
        ("", "%a = literal() {values = [1, 5, 2]} : i64[3]; %b = cumsum(%a) {dim = 0} : i64[3]; return %b"),
        ("", "%a = constant() {value = 2.5} : bf16[3]; %b = mul(%a, %a) : bf16[3]; return %b"),
        ("", "%a = constant() {value = 0.1} : f32[]; %b = constant() {value = 3.0} : f32[]; "
             "%c = div(%a, %b) : f32[]; %d = sub(%c, %a) : f32[]; return %d"),
        ("", "%a = iota() {start = 3, step = 2} : i64[5]; %b = flip(%a) {dim = 0} : i64[5]; return %b"),
        ("", "%a = constant() {value = 2} : i64[4]; %b = cumsum(%a) {dim = 0} : i64[4]; return %b"),
        ("", "%a = iota() : f32[2, 3]; %b = constant() {value = 7.0} : f32[]; %c = ge(%a, %b) : bool[2, 3]; return %c"),
    ],
    "common-subexpression": [
        ("%x: f32[4]", "%a = exp(%x) : f32[4]; %b = exp(%x) : f32[4]; %c = add(%a, %b) : f32[4]; return %c"),
        ("%x: f32[4]", "%a, %i = sort(%x) {dim = 0} : f32[4], i64[4]; %b, %j = sort(%x) {dim = 0} : f32[4], i64[4]; "
                       "return %a, %j"),
    ],
    "identity-view": [
        ("%x: f32[4, 2]", "%a = reshape(%x) : f32[4, 2]; return %a"),
        ("%x: f32[4, 2]", "%a = expand(%x) : f32[4, 2]; %b = cast(%a) : f32[4, 2]; return %b"),
        ("%x: f32[4, 4]", "%a = permute(%x) {dims = [0, 1]} : f32[4, 4]; return %a"),
        ("%x: f32[4]", "%a = slice(%x) {dim = 0, start = 0, stop = 4} : f32[4]; return %a"),
        ("%x: f32[4]", "%a = pad(%x) {low = [0], high = [0]} : f32[4]; return %a"),
        ("%x: f32[1, 4]", "%a = flip(%x) {dim = 0} : f32[1, 4]; %b = concat(%a) {dim = 0} : f32[1, 4]; return %b"),
        ("%x: f32[4]", "%a = reduce_sum(%x) {dims = []} : f32[4]; return %a"),
    ],
    "reshape-of-reshape": [("%x: f32[4, 2]", "%a = reshape(%x) : f32[8]; %b = reshape(%a) : f32[2, 4]; return %b")],
    "permute-of-permute": [
        ("%x: f32[2, 3, 4]", "%a = permute(%x) {dims = [1, 2, 0]} : f32[3, 4, 2]; "
                             "%b = permute(%a) {dims = [2, 1, 0]} : f32[2, 4, 3]; return %b"),
    ],
    "permute-of-unit-dims": [
        ("%x: f32[2, 1, 3]", "%a = permute(%x) {dims = [1, 0, 2]} : f32[1, 2, 3]; return %a"),
    ],
    "expand-of-expand": [
        ("%x: f32[1, 3]", "%a = expand(%x) : f32[2, 3]; %b = expand(%a) : f32[4, 2, 3]; return %b"),
    ],
    "expand-without-copies": [("%x: f32[3]", "%a = expand(%x) : f32[1, 1, 3]; return %a")],
    "cast-of-cast": [
        ("%x: bf16[3]", "%a = cast(%x) : f32[3]; %b = cast(%a) : bf16[3]; return %b"),
        ("%x: bool[3]", "%a = cast(%x) : i64[3]; %b = cast(%a) : f32[3]; return %b"),
    ],
    "slice-of-slice": [
        ("%x: f32[9]", "%a = slice(%x) {dim = 0, start = 1, stop = 9, step = 2} : f32[4]; "
                       "%b = slice(%a) {dim = 0, start = 1, stop = 4, step = 2} : f32[2]; return %b"),
    ],
    "slice-of-concat": [
        ("%x: f32[3], %y: f32[4]", "%a = concat(%x, %y) {dim = 0} : f32[7]; "
         "%b = slice(%a) {dim = 0, start = 3, stop = 7, step = 3} : f32[2]; return %b"),
    ],
    "take-of-range": [
        ("%x: f32[9, 2]", "%i = iota() {start = 2, step = 3} : i64[3]; %a = take(%x, %i) {dim = 0} : f32[3, 2]; return %a"),
        ("%x: f32[9, 2]", "%i = constant() {value = 4} : i64[1]; %a = take(%x, %i) {dim = 0} : f32[1, 2]; return %a"),
    ],
    "take-of-repeats": [
        ("%x: f32[3, 2]", "%i = literal() {values = [0, 0, 1, 1, 2, 2]} : i64[6]; %a = take(%x, %i) {dim = 0} : f32[6, 2]; return %a"),
        ("%x: f32[2, 300]", "%i = iota() : i64[900]; %n = constant() {value = 3} : i64[]; %d = floor_divide(%i, %n) : i64[900]; "
                            "%a = take(%x, %d) {dim = 1} : f32[2, 900]; return %a"),
    ],
    "double-negation": [
        ("%x: f32[3]", "%a = neg(%x) : f32[3]; %b = neg(%a) : f32[3]; return %b"),
        ("%x: bool[3]", "%a = logical_not(%x) : bool[3]; %b = logical_not(%a) : bool[3]; return %b"),
    ],
    "neutral-operand": [
        ("%x: f32[3]", "%o = constant() {value = 1.0} : f32[]; %a = mul(%o, %x) : f32[3]; %b = div(%a, %o) : f32[3]; return %b"),
        ("%x: f32[3]", "%o = constant() {value = 0.0} : f32[3]; %a = add(%x, %o) : f32[3]; %b = sub(%a, %o) : f32[3]; return %b"),
        ("%x: f32[3]", "%o = constant() {value = 1.0} : f32[]; %a = pow(%x, %o) : f32[3]; return %a"),
        ("%x: i64[3]", "%o = constant() {value = 1} : i64[]; %a = floor_divide(%x, %o) : i64[3]; return %a"),
        ("%x: bool[3]", "%o = constant() {value = true} : bool[]; %a = logical_and(%x, %o) : bool[3]; return %a"),
        ("%x: bool[3]", "%o = constant() {value = false} : bool[]; %a = logical_or(%o, %x) : bool[3]; return %a"),
    ],
    "square": [("%x: f32[3]", "%o = constant() {value = 2.0} : f32[]; %a = pow(%x, %o) : f32[3]; return %a")],
    "remainder-in-range": [
        ("%x: f32[6]", "%a = iota() {dim = 1} : i64[2, 3]; %r = iota() : i64[2, 1]; %s = add(%a, %r) : i64[2, 3]; "
                       "%n = constant() {value = 6} : i64[]; %m = remainder(%s, %n) : i64[2, 3]; "
                       "%i = reshape(%m) : i64[6]; %b = take(%x, %i) {dim = 0} : f32[6]; return %b"),
    ],
    "same-operands": [
        ("%x: bool[3]", "%a = logical_and(%x, %x) : bool[3]; return %a"),
        ("%c: bool[3], %x: f32[3]", "%a = where(%c, %x, %x) : f32[3]; %b = maximum(%a, %a) : f32[3]; return %b"),
    ],
    "known-condition": [
        ("%x: f32[3], %y: f32[2, 3]", "%c = constant() {value = true} : bool[]; %a = where(%c, %x, %y) : f32[2, 3]; return %a"),
    ],
    "no-dropout": [("%x: f32[3], %s: i64[]", "%a = dropout(%x, %s) {p = 0.0} : f32[3]; return %a")],
    "broadcast-operand": [
        ("%x: f32[2, 3], %y: f32[3]", "%a = expand(%y) : f32[2, 3]; %b = sub(%a, %x) : f32[2, 3]; return %b"),
        ("%c: bool[1], %x: f32[3], %y: f32[2, 3]",
         "%a = expand(%c) : bool[2, 3]; %b = where(%a, %x, %y) : f32[2, 3]; return %b"),
    ],
    "reduction-of-unit-dims": [
        ("%x: f32[3, 1]", "%a = reduce_max(%x) {dims = [1]} : f32[3]; return %a"),
        ("%x: f32[3, 1]", "%a = reduce_prod(%x) {dims = [1], keepdim = true} : f32[3, 1]; return %a"),
    ],
    "einsum-of-permute": [
        ("%x: f32[3, 2], %w: f32[4, 3]",
         "%a = permute(%x) {dims = [1, 0]} : f32[2, 3]; %b = permute(%w) {dims = [1, 0]} : f32[3, 4]; "
         '%c = einsum(%a, %b) {spec = "m k, k n -> m n"} : f32[2, 4]; return %c'),
    ],
    "mask-of-all": [
        ("%q: f32[1, 2, 3, 4], %k: f32[1, 2, 3, 4]",
         "%m = constant() {value = true} : bool[1, 1, 3, 3]; %o, %l = attention(%q, %k, %k, %m) "
         "{mask = true, scale = 0.5} : f32[1, 2, 3, 4], f32[1, 2, 3]; return %o, %l"),
        ("%q: f32[1, 2, 3, 4], %k: f32[1, 2, 3, 4]",
         "%m = constant() {value = 0.0} : f32[1, 1, 1, 3]; %o, %l = attention(%q, %k, %k, %m) "
         "{mask = true, scale = 0.5} : f32[1, 2, 3, 4], f32[1, 2, 3]; return %o, %l"),
    ],
    "causal-mask": [
        ("%q: f32[2, 2, 3, 4], %k: f32[2, 2, 3, 4]",
         "%i = iota() {dim = 2} : i64[1, 1, 3, 1]; %j = iota() {dim = 3} : i64[1, 1, 1, 3]; "
         "%m = le(%j, %i) : bool[1, 1, 3, 3]; %e = expand(%m) : bool[2, 1, 3, 3]; "
         "%o, %l = attention(%q, %k, %k, %e) {mask = true, scale = 0.5} : f32[2, 2, 3, 4], f32[2, 2, 3]; return %o, %l"),
        ("%q: f32[2, 2, 3, 4], %k: f32[2, 2, 3, 4]",
         "%i = iota() {dim = 2} : i64[1, 1, 3, 1]; %j = iota() {dim = 3} : i64[1, 1, 1, 3]; "
         "%h = gt(%j, %i) : bool[1, 1, 3, 3]; %n = logical_not(%h) : bool[1, 1, 3, 3]; "
         "%z = constant() {value = 0.0} : f32[]; %u = constant() {value = -inf} : f32[]; "
         "%m = where(%n, %z, %u) : f32[1, 1, 3, 3]; "
         "%o, %l = attention(%q, %k, %k, %m) {mask = true, scale = 0.5} : f32[2, 2, 3, 4], f32[2, 2, 3]; return %o, %l"),
        ("%q: f32[1, 2, 3, 4], %k: f32[1, 2, 3, 4], %d: f32[1, 2, 3, 4], %u: f32[1, 2, 3]",
         "%i = iota() {dim = 2} : i64[1, 1, 3, 1]; %j = iota() {dim = 3} : i64[1, 1, 1, 3]; "
         "%m = ge(%i, %j) : bool[1, 1, 3, 3]; "
         "%a, %b, %c = attention_backward(%d, %q, %k, %k, %d, %u, %m) {mask = true, scale = 0.5} "
         ": f32[1, 2, 3, 4], f32[1, 2, 3, 4], f32[1, 2, 3, 4]; return %a, %b, %c"),
    ],
}  # fmt: skip
#: programs to which the rule must not apply
ALIKE: list[tuple[str, str, str]] = [
    ("identity-view", "%x: f32[4, 4]", "%a = permute(%x) {dims = [1, 0]} : f32[4, 4]; return %a"),
    ("identity-view", "%x: f32[4]", "%a = pad(%x) {low = [1], high = [-1]} : f32[4]; return %a"),
    ("identity-view", "%x: f32[4]", "%a = flip(%x) {dim = 0} : f32[4]; return %a"),
    ("permute-of-unit-dims", "%x: f32[2, 1, 3]", "%a = permute(%x) {dims = [2, 1, 0]} : f32[3, 1, 2]; return %a"),
    ("cast-of-cast", "%x: f32[3]", "%a = cast(%x) : bf16[3]; %b = cast(%a) : f32[3]; return %b"),
    ("cast-of-cast", "%x: f32[3]", "%a = cast(%x) : i64[3]; %b = cast(%a) : f32[3]; return %b"),
    ("slice-of-slice", "%x: f32[4, 4]", "%a = slice(%x) {dim = 0, start = 1, stop = 4} : f32[3, 4]; "
                                        "%b = slice(%a) {dim = 1, start = 1, stop = 4} : f32[3, 3]; return %b"),
    ("slice-of-concat", "%x: f32[3], %y: f32[4]", "%a = concat(%x, %y) {dim = 0} : f32[7]; "
                                                  "%b = slice(%a) {dim = 0, start = 2, stop = 4} : f32[2]; return %b"),
    ("take-of-range", "%x: f32[4]", "%i = iota() {start = 3, step = -1} : i64[3]; %a = take(%x, %i) {dim = 0} : f32[3]; return %a"),
    ("take-of-repeats", "%x: f32[3]", "%i = literal() {values = [0, 1, 2, 0, 1, 2]} : i64[6]; %a = take(%x, %i) {dim = 0} : f32[6]; return %a"),
    ("take-of-repeats", "%x: f32[4]", "%i = literal() {values = [0, 0, 1, 1, 2, 2]} : i64[6]; %a = take(%x, %i) {dim = 0} : f32[6]; return %a"),
    ("neutral-operand", "%x: f32[3]", "%o = constant() {value = 1.0} : f32[]; %a = floor_divide(%x, %o) : f32[3]; return %a"),
    ("neutral-operand", "%x: f32[3]", "%o = constant() {value = 1.0} : f32[]; %a = div(%o, %x) : f32[3]; return %a"),
    ("neutral-operand", "%x: f32[3]", "%o = constant() {value = 0.0} : f32[]; %a = sub(%o, %x) : f32[3]; return %a"),
    ("neutral-operand", "%x: f32[3]", "%o = constant() {value = 1.0} : f32[2, 3]; %a = mul(%x, %o) : f32[2, 3]; return %a"),
    ("remainder-in-range", "", "%a = iota() {dim = 1} : i64[2, 3]; %r = iota() : i64[2, 1]; %s = add(%a, %r) : i64[2, 3]; "
                               "%n = constant() {value = 3} : i64[]; %m = remainder(%s, %n) : i64[2, 3]; return %m"),
    ("broadcast-operand", "%x: f32[1, 3], %y: f32[3]", "%a = expand(%y) : f32[2, 3]; %b = sub(%a, %x) : f32[2, 3]; return %b"),
    ("reduction-of-unit-dims", "%x: f32[1, 3]", "%a = reduce_max(%x) {dims = [1]} : f32[1]; return %a"),
    ("causal-mask", "%q: f32[1, 2, 3, 4], %k: f32[1, 2, 3, 4]",
     "%i = iota() {dim = 2} : i64[1, 1, 3, 1]; %j = iota() {dim = 3, start = 1} : i64[1, 1, 1, 3]; "
     "%m = le(%j, %i) : bool[1, 1, 3, 3]; %o, %l = attention(%q, %k, %k, %m) {mask = true, scale = 0.5} "
     ": f32[1, 2, 3, 4], f32[1, 2, 3]; return %o, %l"),
    ("causal-mask", "%q: f32[3, 2, 3, 4], %k: f32[3, 2, 3, 4]",
     "%i = iota() {dim = 0} : i64[3, 1, 1, 1]; %j = iota() {dim = 3} : i64[1, 1, 1, 3]; "
     "%m = le(%j, %i) : bool[3, 1, 1, 3]; %o, %l = attention(%q, %k, %k, %m) {mask = true, scale = 0.5} "
     ": f32[3, 2, 3, 4], f32[3, 2, 3]; return %o, %l"),
    ("common-subexpression", "%x: f32[4]",
     '%a = aten(%x) {target = "aten.sinh.default", args = "[\\"%0\\"]"} : f32[4]; '
     '%b = aten(%x) {target = "aten.sinh.default", args = "[\\"%0\\"]"} : f32[4]; return %a, %b'),
]  # fmt: skip


def program(params: str, body: str) -> Module:
    """A module of one function; result types are taken from the body."""
    *ops, last = body.split("; ")
    types: dict[str, str] = {}
    for param in filter(None, params.split(", %")):
        name, type = param.lstrip("%").split(": ")
        types[name] = type
    for line in ops:
        names, _, rest = line.partition(" = ")
        shown = rest.rsplit(" : ", 1)[1]
        split = shown.replace("], ", "];").split(";")
        types.update(zip((n.strip("% ") for n in names.split(",")), split, strict=True))
    outs = ", ".join(types[name.strip("% ")] for name in last.removeprefix("return ").split(","))
    lines = "\n".join(f"  {line}" for line in (*ops, last))
    module = parse_module(f"weft 1 logical\n\nfunc @main({params}) -> ({outs}) {{\n{lines}\n}}\n")
    verify(module)
    return module


def compare(module: Module) -> Counter[str]:
    """Simplify, compare the results on random inputs; which rules were applied?"""
    applied: Counter[str] = Counter()
    after = simplify(module, applied=applied)
    verify(after)
    inputs = random_inputs(module)
    assert_close(evaluate(module, inputs), evaluate(after, inputs), 1e-6)
    assert len(after.entry.ops) <= len(module.entry.ops) + 1
    return applied


def test_every_rule_has_a_case() -> None:
    assert set(CASES) == {"fold", "common-subexpression", *(rule.name for rule in RULES)}


@pytest.mark.parametrize(
    ("rule", "case"), [(rule, case) for rule, cases in CASES.items() for case in cases]
)
def test_a_rule_keeps_the_results(rule: str, case: Case) -> None:
    assert compare(program(*case))[rule] > 0


@pytest.mark.parametrize(("rule", "params", "body"), ALIKE)
def test_a_rule_leaves_look_alikes_alone(rule: str, params: str, body: str) -> None:
    assert compare(program(params, body))[rule] == 0


def test_the_result_of_a_rule_is_what_one_would_write_by_hand() -> None:
    x = "%x: f32[3, 2], %w: f32[4, 3]"
    after = simplify(program(x, CASES["einsum-of-permute"][0][1]))
    (op,) = after.entry.ops
    assert op.attrs["spec"] == "k m, n k -> m n"
    after = simplify(program(*CASES["causal-mask"][1]))
    (op,) = after.entry.ops
    assert dict(op.attrs) == {"causal": True, "scale": 0.5}
