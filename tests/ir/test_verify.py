"""The verifier: each rule of each level is broken once, and the message shows the place."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from weft.ir.errors import CompileError
from weft.ir.module import Function, Location, Module, Op, Value
from weft.ir.parser import parse_module
from weft.ir.types import TensorType
from weft.ir.verify import RULES, excerpt, verify

LOGICAL = """\
weft 1 logical
func @main(%w: f32[4, 4] {role = "param", name = "w"}, %x: f32[8, 4] {role = "input"}, %i: i64[8]) -> (f32[4, 4] {role = "update", updates = "w"}, f32[8, 4]) {
  %0 = einsum(%x, %w) {spec = "b k, k n -> b n"} : f32[8, 4]
  %1 = call(%0) {callee = "act"} : f32[8, 4]
  %2, %3 = cross_entropy(%1, %i) : f32[8], f32[8]
  %4 = neg(%w) : f32[4, 4]
  return %4, %1
}
func @act(%a: f32[8, 4]) -> (f32[8, 4]) {
  %b = exp(%a) : f32[8, 4]
  return %b
}
"""  # noqa: E501

PLACED = """\
weft 1 placed
mesh [dp=2, tp=2] "cpu"
func @main(%w: f32[4, 4]{B, S(1)}, %x: f32[8, 4]{S(0), B}) -> (f32[4]{P(sum), S(0)}) {
  %0 = einsum(%x, %w) {spec = "b k, k n -> b n"} split [dp = b, tp = n] : f32[8, 4]{S(0), S(1)}
  %1 = reshard(%0) : f32[8, 4]{S(0), B}
  %2 = reshard(%1) : f32[8, 4]{S(0), S(1)}
  %3 = reduce_sum(%2) {dims = [0]} split [dp = a0, tp = a1] : f32[4]{P(sum), S(0)}
  return %3
}
"""

SPMD = """\
weft 1 spmd
mesh [dp=2, tp=2] "cpu"
func @main(%q: f32[2, 1, 4, 4]{S(0), B}, %k: f32[2, 1, 8, 4]{S(0), S(2)}, %x: f32[8, 4]{P(sum), B}, %n: f32[2, 1, 4]{S(0), B}) -> (f32[2, 1, 4, 4]{S(0), P(sum)}, f32[8, 4]{B, B}) {
  %o, %l = attention(%q, %k, %k) {scale = 0.5} split [dp = b, tp = t] : f32[2, 1, 4, 4]{S(0), P(sum)}, f32[2, 1, 4]{S(0), B}
  %L = lse_combine(%l) {axis = "tp"} : f32[2, 1, 4]{S(0), B}
  %d = sub(%l, %L) split [dp = a0] : f32[2, 1, 4]{S(0), B}
  %e = exp(%d) split [dp = a0] : f32[2, 1, 4]{S(0), B}
  %w = reshape(%e) split [dp = r0] : f32[2, 1, 4, 1]{S(0), B}
  %p = mul(%o, %w) split [dp = a0, tp = partial(0)] : f32[2, 1, 4, 4]{S(0), P(sum)}
  %s = reduce_scatter(%x) {axis = "dp", dim = 0} : f32[8, 4]{S(0), B}
  %t = shard(%s) {axis = "tp", dim = 0} : f32[8, 4]{S(0), S(0)}
  %g = all_gather(%t) {axis = "tp", dim = 0} : f32[8, 4]{S(0), B}
  %a = all_to_all(%g) {axis = "dp", source = 0, target = 1} : f32[8, 4]{S(1), B}
  %h = all_gather(%a) {axis = "dp", dim = 1} : f32[8, 4]{B, B}
  %m = partial(%h) {axis = "tp"} : f32[8, 4]{B, P(sum)}
  %r = all_reduce(%m) {axis = "tp"} : f32[8, 4]{B, B}
  return %p, %r
}
"""  # noqa: E501

#: to a stage of three ranks
CROSSING = 'send(%r) {to = 1, tag = 0, mesh = "tp=3", placement = "S(0)'

SCHEDULE = """\
weft 1 schedule
mesh [dp=2] "cpu"
func @main(%w: f32[4]{B} {role = "param"}, %g: f32[4]{P(sum)}, %n: f64[]{B}) -> (f32[4]{B} {role = "update", updates = "w"}) {
  %h = all_reduce(%g) {axis = "dp", async = true} : f32[4]{B}
  %z = neg(%w) : f32[4]{B}
  %k = call(%z) {callee = "k0"} : f32[4]{B}
  free(%z)
  %r = wait(%h) : f32[4]{B}
  free(%h, %k)
  %u = sgd_update(%w, %r, %n, %n) {inplace = true} : f32[4]{B}
  free(%r)
  return %u
}
func @k0(%a: f32[4]{B}) -> (f32[4]{B}) attrs {kernel = "k0"} {
  %b = exp(%a) : f32[4]{B}
  return %b
}
"""  # noqa: E501


def test_the_examples_are_valid() -> None:
    for text in (LOGICAL, PLACED, SPMD, SCHEDULE):
        verify(parse_module(text))


#: base text, what replaces what, once -> rule, code, part of the message
CASES: list[tuple[str, str, str, str, str, str]] = [
    # all levels
    (LOGICAL, '%4 = neg(%w)', '%4 = reshard(%w)', "known-op", "W0201", "belongs to placed"),
    (LOGICAL, ' {callee = "act"}', "", "attributes", "W0201", "needs the attribute 'callee'"),
    (LOGICAL, '"act"', '"atc"', "calls", "W0201", "no function @atc"),
    (LOGICAL, "call(%0)", "call(%w)", "calls", "W0201", "operand 0 is f32[4, 4], the callee's"),
    (LOGICAL, "call(%0)", "call(%0, %0)", "calls", "W0201", "2 operands, the callee has 1"),
    (LOGICAL, "%b = exp(%a)", '%b = call(%a) {callee = "act"}', "recursion", "W0201", "@act calls"),
    (LOGICAL, 'role = "input"', 'role = "imput"', "entry", "W0201", "unknown role 'imput'"),
    (LOGICAL, 'updates = "w"', 'updates = "v"', "entry", "W0201", "%v, which is no parameter"),
    (LOGICAL, ', updates = "w"', "", "entry", "W0201", "go together"),
    (LOGICAL, 'updates = "w"', 'updates = "x"', "entry", "W0201", "f32[4, 4] updates %x"),
    (LOGICAL, "f32[8, 4]) {\n  %0", 'f32[8, 4] {role = "loss", updates = "x"}) {\n  %0', "entry",
     "W0201", "go together"),
    (LOGICAL, "%4 = neg(%w)", "%4 = literal() {values = [1]}", "op", "W0201", "1 values for"),
    (LOGICAL, "spec = \"b k, k n -> b n\"", "spec = \"b k -> b n\"", "signature", "W0202", "expected 1"),
    (LOGICAL, "%x: f32[8, 4]", "%x: f32[8, 5]", "signature", "W0202", "dim k is 5 in one tensor"),
    (LOGICAL, ": f32[8], f32[8]", ": f32[8], f32[7]", "signature", "W0202", "cross_entropy of shapes"),
    (LOGICAL, ": f32[8], f32[8]", ": f32[8], f16[8]", "result-types", "W0202", "gives f32[8]"),
    (LOGICAL, "%i: i64[8]", "%i: f32[8]", "dtypes", "W0202", "operand 1 is f32, not an integer"),
    (LOGICAL, "%i: i64[8]", "%i: i64[1]", "broadcast", "W0202", "only pointwise"),
    # logical
    (LOGICAL, "logical\n", 'logical\nmesh [] "cpu"\n', "logical", "W0201", "no mesh"),
    (LOGICAL, "(%w) :", "(%w) split [tp = a0] :", "logical", "W0201", "neg has a split"),
    (LOGICAL, "%i: i64[8]", "%i: i64[8]{B}", "logical", "W0201", "%i has a placement"),
    # placed
    (PLACED, 'mesh [dp=2, tp=2] "cpu"\n', "", "mesh", "W0201", "a placed module needs a mesh"),
    (PLACED, "%x: f32[8, 4]{S(0), B}", "%x: f32[8, 4]", "placements", "W0203", "%x has no placement"),
    (PLACED, "{B, S(1)}", "{S(1)}", "placements", "W0203", "1 placements for 2 axes"),
    (PLACED, "{B, S(1)}", "{B, S(2)}", "placements", "W0203", "there is no dim 2"),
    (PLACED, "tp=2", "tp=8", "placements", "W0203", "size 4 cannot be cut into 8 parts"),
    (PLACED, "{B, S(1)}", "{P(sum), P(max)}", "placements", "W0203", "partial in max and sum"),
    (PLACED, "tp = n", "ep = n", "split", "W0203", "names the axis 'ep'"),
    (PLACED, "tp = n", "tp = m", "split", "W0203", "no dim m, only b, k, n"),
    (PLACED, "(%0) :", "(%0) split [tp = a0] :", "split", "W0203", "reshard has no signature"),
    (PLACED, "tp = n", "tp = k", "split-placements", "W0203", "%x, is {S(0), B}, the split needs"),
    (PLACED, "dp = b, tp = n", "dp = b", "split-placements", "W0203", "operand 1, %w"),
    (PLACED, "%0 = einsum(%x, %w) {spec = \"b k, k n -> b n\"} split [dp = b, tp = n]",
     "%0 = aten(%x) {target = \"f\"}", "split-placements", "W0203", "aten needs {B, B}"),
    (PLACED, "%1 = reshard(%0) : f32[8, 4]{S(0), B}", "%1 = reshard(%0) : f32[4, 8]{S(0), B}",
     "same-value", "W0202", "reshard turns f32[8, 4] into f32[4, 8]"),
    (PLACED, "reshard(%0)", "reshard(%0, %0)", "signature", "W0202", "has 1 operands, not 2"),
    # spmd
    (SPMD, "weft 1 spmd", "weft 1 placed", "known-op", "W0201", "belongs to spmd and schedule"),
    (SPMD, '%r = all_reduce(%m) {axis = "tp"}', "%r = reshard(%m)", "known-op", "W0201", "reshard"),
    (SPMD, '%r = all_reduce(%m) {axis = "tp"}', '%r = all_reduce(%m) {axis = "pp"}', "collective",
     "W0203", "the axis 'pp', the mesh has dp, tp"),
    (SPMD, '%r = all_reduce(%m) {axis = "tp"}', '%r = all_reduce(%m) {axis = "dp"}', "collective",
     "W0203", "wants P(sum) on axis dp, %m has B"),
    (SPMD, '{axis = "tp"} : f32[8, 4]{B, P(sum)}', '{axis = "tp"} : f32[8, 4]{S(0), P(sum)}',
     "collective", "W0203", "changes the placement on dp"),
    (SPMD, 'dim = 0} : f32[8, 4]{S(0), S(0)}', 'dim = 1} : f32[8, 4]{S(0), S(0)}', "collective",
     "W0203", "gives S(1) on axis tp"),
    (SPMD, '%a = all_to_all(%g)', '%a = all_to_all(%t)', "collective", "W0203",
     "changes the placement on tp"),
    (SPMD, '%a = all_to_all(%g) {axis = "dp", source = 0, target = 1} : f32[8, 4]{S(1), B}',
     '%a = all_to_all(%t) {axis = "dp", source = 0, target = 1} : f32[8, 4]{S(1), S(0)}',
     "collective", "W0203", "moves dim 0, which tp splits further in"),
    (SPMD, '%a = all_to_all(%g) {axis = "dp", source = 0, target = 1} : f32[8, 4]{S(1), B}',
     '%a = all_to_all(%g) {axis = "dp", source = 0, target = 0} : f32[8, 4]{S(0), B}',
     "collective", "W0203", "as its source and its target"),
    (SPMD, "  return %p, %r", f"  %y = {CROSSING}\"}} : f32[8, 4]{{B, B}}\n  return %p, %r", "", "", ""),
    (SPMD, "  return %p, %r", f"  %y = {CROSSING}, B\"}} : f32[8, 4]{{B, B}}\n  return %p, %r", "crossing",
     "W0203", "cannot be at the other end"),
    (SPMD, "sub(%l, %L)", "sub(%L, %l)", "lse-terms", "W0203", "sub reads %l"),
    (SPMD, "sub(%l, %L)", "sub(%l, %l)", "lse-terms", "W0203", "one term per rank of tp"),
    (SPMD, "sub(%l, %L)", "sub(%L, %L)", "lse-terms", "W0203", "mul reads %o"),
    (SPMD, "lse_combine(%l)", "lse_combine(%n)", "lse-terms", "W0203", "not one term per rank"),
    (SPMD, "exp(%d)", "neg(%d)", "lse-terms", "W0203", "neg reads %d"),
    (SPMD, "return %p", "return %o", "lse-terms", "W0203", "%o is returned"),
    (SPMD, 'lse_combine(%l) {axis = "tp"}', 'lse_combine(%l) {axis = "dp"}', "collective", "W0203",
     "wants B on axis dp"),
    (SPMD, '%h = all_gather(%a) {axis = "dp", dim = 1}',
     '%h = all_gather(%a) {axis = "dp", dim = 1, async = true}', "not-yet", "W0201", "async = true"),
    # schedule
    (SCHEDULE, ' attrs {kernel = "k0"}', "", "flat", "W0201", "@k0 is not inlined"),
    (SCHEDULE, "(f32[4]{B} {role = \"update\", updates = \"w\"})",
     "(f32[4]{B} {role = \"update\", updates = \"w\"}) attrs {kernel = \"x\"}", "flat", "W0201",
     "the entry is no kernel"),
    (SCHEDULE, "%b = exp(%a)", '%b = broadcast(%a) {axis = "dp"}', "flat", "W0201", "in a kernel"),
    (SCHEDULE, "%r = wait(%h)", "%r = wait(%k)", "lives", "W0201", "%k is nothing to wait for"),
    (SCHEDULE, "%r = wait(%h)", "%r = neg(%h)", "lives", "W0201", "what `wait` turns into one"),
    (SCHEDULE, "%r = wait(%h)", "%r = exp(%k)", "lives", "W0201", "%h is freed while %h"),
    (SCHEDULE, "  free(%h, %k)\n", "  %r2 = wait(%h) : f32[4]{B}\n", "lives", "W0201", "any more"),
    (SCHEDULE, "  free(%z)\n", "  free(%z, %z)\n", "lives", "W0201", "freed after it was freed"),
    (SCHEDULE, "  free(%z)\n", "  free(%w)\n", "lives", "W0201", "parameters belong to the caller"),
    (SCHEDULE, "  free(%z)\n", "  free(%g)\n", "lives", "W0201", "parameters belong to the caller"),
    (SCHEDULE, "free(%r)", "free(%u)", "lives", "W0201", "%u is used after it was freed"),
    (SCHEDULE, "  free(%r)\n", "  %v = neg(%w) : f32[4]{B}\n", "lives", "W0201", "was overwritten"),
    (SCHEDULE, "sgd_update(%w, %r,", "sgd_update(%w, %w,", "lives", "W0201", "reads elsewhere"),
    (SCHEDULE, ' {role = "update", updates = "w"}', "", "lives", "W0201", "not returned as its"),
    (SCHEDULE, "{inplace = true}", "", "", "", ""),
    (SCHEDULE, "  %r = wait(%h) : f32[4]{B}\n  free(%h, %k)\n  %u = sgd_update(%w, %r,",
     "  free(%k)\n  %r = neg(%w) : f32[4]{B}\n  %u = sgd_update(%w, %r,", "lives", "W0201",
     "%h is started and not waited for"),
]  # fmt: skip


@pytest.mark.parametrize(("base", "old", "new", "rule", "code", "part"), CASES)
def test_a_broken_rule_is_named(
    base: str, old: str, new: str, rule: str, code: str, part: str
) -> None:
    assert old in base
    module = parse_module(base.replace(old, new, 1))
    if not rule:  # a change that stays valid
        verify(module)
        return
    with pytest.raises(CompileError) as caught:
        verify(module, pass_name="place")
    text = str(caught.value)
    assert caught.value.code == code
    assert f"rule `{rule}` after the pass place" in text
    assert part in text


F32 = TensorType("f32", (2,))
X, Y = Value("x", F32), Value("y", F32)
NEG = Op("neg", (X,), (Y,))


def main(*ops: Op, results: tuple[Value, ...] = (Y,), name: str = "main") -> Function:
    return Function(name, (X,), ops, results)


#: modules that the text form cannot express -> rule, part of the message
MODULES = [
    (Module("final", (main(NEG),)), "level", "no level 'final'"),
    (Module("logical", ()), "functions", "no function"),
    (Module("logical", (main(NEG), main(NEG))), "functions", "@main is defined twice"),
    (Module("logical", (replace(main(NEG), param_attrs=({}, {})),)), "functions", "one record"),
    (Module("logical", (main(Op("nge", (X,), (Y,))),)), "known-op", "neg"),
    (Module("logical", (main(NEG.with_(attrs={"size": 1})),)), "attributes", "no attribute 'size'"),
    (
        Module("logical", (main(Op("cumsum", (X,), (Y,), {"dim": "0"})),)),
        "attributes",
        "not of kind int",
    ),
    (Module("logical", (main(NEG.with_(results=(Value("y", TensorType("f33", (2,))),))),)),
     "types", "unknown dtype 'f33'"),
    (Module("logical", (main(NEG.with_(results=(Value("y", TensorType("f32", (-2,))),))),)),
     "types", "negative size"),
    (Module("logical", (main(NEG, NEG),)), "ssa", "%y is defined twice"),
    (Module("logical", (main(NEG.with_(operands=(Y,))),)), "ssa", "%y is used before"),
    (Module("logical", (main(results=(Y,)),)), "ssa", "%y is used before"),
    (Module("logical", (main(NEG.with_(operands=(Value("x", TensorType("f32", (3,))),))),)),
     "ssa", "%x is used as f32[3], but it is defined as f32[2]"),
]  # fmt: skip


@pytest.mark.parametrize(("module", "rule", "part"), MODULES)
def test_what_the_text_form_excludes_is_found_too(module: Module, rule: str, part: str) -> None:
    with pytest.raises(CompileError) as caught:
        verify(module)
    assert f"rule `{rule}`" in str(caught.value)
    assert part in str(caught.value)


def test_every_rule_is_broken_by_an_example() -> None:
    broken = {case[3] for case in CASES} | {case[1] for case in MODULES}
    assert {rule.name for rules in RULES.values() for rule in rules} <= broken


def test_rules_have_a_name_of_their_own_and_a_doc() -> None:
    for rules in RULES.values():
        names = [rule.name for rule in rules]
        assert len(set(names)) == len(names)
        assert all(rule.doc for rule in rules)


def test_the_message_shows_ten_ops_and_marks_the_one_to_blame(tmp_path: Path) -> None:
    source = tmp_path / "net.py"
    source.write_text("import torch\n\n    y = torch.neg(x)\n")
    loc = Location("model.layers.3.mlp", str(source), 3)
    values = [X, *(Value(f"v{i}", F32) for i in range(30))]
    ops = [Op("neg", (a,), (b,), loc=loc) for a, b in zip(values, values[1:], strict=False)]
    ops[20] = ops[20].with_(attrs={"bad": 1})
    with pytest.raises(CompileError) as caught:
        verify(Module("logical", (main(*ops, results=(values[-1],)),)), pass_name="simplify")
    text = str(caught.value)
    assert f"at {source}:3:5\n        y = torch.neg(x)\n        ^^^^" in text
    assert "in model.layers.3.mlp" in text
    assert "func @main(%x: f32[2])" in text
    assert text.count(" = neg(") == 10
    lines = text.split("\n")
    (marked,) = (i for i, line in enumerate(lines) if set(line.strip()) == {"^"} and i > 4)
    assert lines[marked - 1].strip().startswith("%v20 = neg(%v19) {bad = 1}")


def test_an_excerpt_marks_the_header_and_the_return() -> None:
    function = main(NEG)
    assert excerpt(function, -1)[1].startswith("^^^^")
    assert set(excerpt(function, 1)[-1].strip()) == {"^"}
    assert excerpt(function, 1)[-2] == "  return %y"


def test_a_file_that_cannot_be_named_has_no_text() -> None:
    for name in ("a\0b.py", "\ud800.py"):
        loc = Location("net", name, 3)
        with pytest.raises(CompileError) as caught:
            verify(Module("logical", (main(NEG.with_(attrs={"bad": 1}, loc=loc)),)))
        assert caught.value.span is not None and caught.value.span.text == ""


def test_further_violations_are_counted() -> None:
    bad = NEG.with_(attrs={"bad": 1})
    ops = [bad.with_(results=(Value(f"v{i}", F32),)) for i in range(300)]
    with pytest.raises(CompileError, match="100 or more further violations"):
        verify(Module("logical", (main(*ops, results=(X,)),)))
