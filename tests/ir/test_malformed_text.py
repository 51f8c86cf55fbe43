"""Malformed text ends in a diagnostic with a code, a line, a column and a way out."""

import random
import re

import pytest
from tests.ir.test_verify import LOGICAL, PLACED, SCHEDULE, SPMD

from weft.ir.errors import CompileError
from weft.ir.parser import parse_module
from weft.ir.verify import verify

GOOD = """\
weft 1 placed
mesh [dp=2] "cpu"
attrs {x = [1, [2.5]]}
func @main(%w: f32[4, 4]{S(0)} {role = "param"}, %x: f32[8, 4]{B}) -> (f32[8]{B}) {
  %0 = einsum(%x, %w) {spec = "b k, k n -> b n"} split [dp = b] : f32[8, 4]{B} @0
  %1 = reduce_sum(%0) {dims = [1], keepdim = false} : f32[8]{B}
  return %1
}
loc @0 = "net" "net.py":3
"""

#: what replaces what in GOOD, once -> code, line, column, a part of the message or the hint
CASES = [
    ("weft 1", "weft 2", "W0101", 1, 6, "version 2"),
    ("weft 1", "weft", "W0101", 1, 6, "expected a number"),
    ("placed", "plcaed", "W0102", 1, 8, "known: logical, placed"),
    ("[dp=2]", "[dp=0]", "W0101", 2, 10, "size of an axis"),
    ("[dp=2]", "[dp=2.5]", "W0101", 2, 10, "size of an axis"),
    ("[dp=2]", "[dp=[2]]", "W0101", 2, 7, "size of an axis"),
    ("[dp=2]", "[dp=2, dp=2]", "W0103", 2, 13, "given twice"),
    ('"cpu"', '"cp', "W0101", 2, 13, "unexpected character"),
    ('"cpu"', r'"c\pu"', "W0101", 2, 13, "JSON"),
    ("[1, [2.5]]", "1e999", "W0101", 3, 12, "too large"),
    ("[1, [2.5]]", "9" * 30, "W0101", 3, 12, "too large"),
    ("[1, [2.5]]", "9" * 5000, "W0101", 3, 12, "too large"),
    ("[1, [2.5]]", "yes", "W0101", 3, 12, "not an attribute value"),
    ("[1, [2.5]]", "[" * 40 + "]" * 40, "W0101", 3, 8, "nest deeper"),
    ("[1, [2.5]]", "[" * 5000 + "]" * 5000, "W0101", 3, 8, "nest deeper"),
    ("x = [1", "x = 1, x = [1", "W0103", 3, 15, "given twice"),
    ("f32[4, 4]", "f33[4, 4]", "W0102", 4, 16, "did you mean f32"),
    ("f32[4, 4]", "f32[4, -4]", "W0101", 4, 23, "size of a dim"),
    ("f32[4, 4]", "f32[4, 99999999999999999999999]", "W0101", 4, 23, "too large"),
    ("f32[4, 4]", "f32 4, 4]", "W0101", 4, 16, "expected a type"),
    ("S(0)", "R(0)", "W0101", 4, 26, "not a placement"),
    ("S(0)", "P(avg)", "W0101", 4, 26, "P(sum), P(max)"),
    ("S(0)", "S(-1)", "W0101", 4, 26, "not a placement"),
    ("%x:", "%w:", "W0103", 4, 50, "defined twice"),
    ("-> (f32[8]{B})", "-> (f32[9]{B})", "W0101", 4, 72, "returned %1 is of type f32[8]{B}"),
    ("-> (f32[8]{B})", "-> ()", "W0101", 4, 6, "0 result types"),
    ("(%x, %w)", "(%x, %v)", "W0103", 5, 19, "used before"),
    ("einsum", "ensum", "W0102", 5, 8, "did you mean einsum"),
    (" : f32[8, 4]{B} @0", " @0", "W0101", 5, 8, "1 results have 0 types"),
    ("@0\n", "@7\n", "W0101", 5, 80, "no `loc @7"),
    ("dp = b", "dp = 3", "W0101", 5, 57, "no state"),
    ("%1 =", "%0 =", "W0103", 6, 3, "defined twice"),
    ("dims = [1]", "dims = 1", "W0101", 6, 24, "not of kind ints"),
    ("dims = [1]", "dims = [true]", "W0101", 6, 24, "not of kind ints"),
    ("dims = [1]", "dim = [1]", "W0102", 6, 24, "did you mean dims"),
    ("keepdim = false", "keepdim = 0", "W0101", 6, 36, "not of kind bool"),
    ("return %1", "return %2", "W0103", 7, 10, "used before"),
    ("return %1", "", "W0101", 8, 1, "unexpected '}'"),
    ("}\nloc", "loc", "W0101", 8, 1, "unexpected 'loc'"),
    ("loc @0", "func @main() -> () {return} loc @0", "W0103", 9, 6, "defined twice"),
    (":3", ":3\nloc @0 = \"\" \"\":1", "W0103", 10, 5, "defined twice"),
    (":3", ":x", "W0101", 9, 25, "expected a number"),
    (":3", ":3\n\0", "W0101", 10, 1, "unexpected character"),
]


@pytest.mark.parametrize(("old", "new", "code", "line", "column", "part"), CASES)
def test_a_mistake_is_named_at_its_place(
    old: str, new: str, code: str, line: int, column: int, part: str
) -> None:
    text = GOOD.replace(old, new, 1)
    assert text != GOOD
    with pytest.raises(CompileError) as caught:
        parse_module(text, "in.weft")
    error = caught.value
    assert error.span is not None
    assert (error.code, error.span.line, error.span.column) == (code, line, column)
    assert part in str(error)
    assert f"in.weft:{line}:{column}" in str(error)


@pytest.mark.parametrize("text", ["", "\n\n", "weft", "weft 1 placed func", GOOD[:-30], "//"])
def test_a_text_that_ends_too_early_is_reported_at_its_end(text: str) -> None:
    with pytest.raises(CompileError) as caught:
        parse_module(text)
    span = caught.value.span
    assert caught.value.code == "W0101"
    assert span is not None
    assert span.line == text.count("\n") + 1


def test_the_caret_points_at_the_token() -> None:
    with pytest.raises(CompileError) as caught:
        parse_module(GOOD.replace("einsum", "ensum"))
    lines = str(caught.value).split("\n")
    (shown,) = (i for i, line in enumerate(lines) if "ensum(" in line)
    assert lines[shown + 1].index("^") == lines[shown].index("ensum(")
    assert lines[shown + 1].count("^") == len("ensum")


def test_a_very_long_line_is_not_repeated_in_the_message() -> None:
    with pytest.raises(CompileError) as caught:
        parse_module(GOOD.replace("einsum(", "ensum(" + " " * 100_000))
    assert len(str(caught.value)) < 1000


TOKEN = re.compile(r'"[^"\n]*"|[\w.]+|\s+|.', re.DOTALL)
ALPHABET = '{}[]()<>=,:;@%"\\/.-+*! \n\t\0abcSBP0123456789é²\u2028\ud800'


def mutate(text: str, rng: random.Random) -> str:
    """Delete, repeat, swap or replace characters, tokens or lines."""
    level = rng.choice(("char", "token", "line"))
    parts = (
        list(text) if level == "char" else TOKEN.findall(text) if level == "token"
        else text.splitlines(keepends=True)
    )  # fmt: skip
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, other = rng.randrange(len(parts)), rng.randrange(len(parts))
        match rng.randrange(5):
            case 0:
                del parts[at]
            case 1:
                parts.insert(other, parts[at])
            case 2:
                parts[at], parts[other] = parts[other], parts[at]
            case 3:
                parts[at] = "".join(rng.choices(ALPHABET, k=rng.randint(1, 3)))
            case 4:
                parts.insert(at, rng.choice(ALPHABET))
        if not parts:
            break
    return "".join(parts)


def test_ten_thousand_mutations_parse_or_end_in_a_diagnostic() -> None:
    rng = random.Random(0)
    rejected = 0
    for _ in range(10_000):
        text = mutate(GOOD, rng)
        try:
            parse_module(text)
        except CompileError as error:
            rejected += 1
            assert error.code in ("W0101", "W0102", "W0103")
            assert error.span is not None
            assert 1 <= error.span.line <= text.count("\n") + 1
            line = text.split("\n")[error.span.line - 1]
            assert 1 <= error.span.column <= len(line) + 1
    assert 5_000 < rejected < 10_000  # mutations matter, and some are harmless


@pytest.mark.parametrize("base", [LOGICAL, PLACED, SPMD, SCHEDULE])
def test_what_still_parses_is_verified_or_ends_in_a_diagnostic(base: str) -> None:
    rng = random.Random(1)
    parsed = refused = 0
    for _ in range(1500):
        try:
            module = parse_module(mutate(base, rng))
        except CompileError:
            continue
        parsed += 1
        try:
            verify(module)
        except CompileError as error:
            refused += 1
            assert error.code in ("W0201", "W0202", "W0203")
    assert parsed > refused > 10
