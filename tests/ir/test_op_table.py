"""The op table is complete, and the language knows no torch."""

import subprocess
import sys

import pytest

from weft.ir.module import LEVELS
from weft.ir.opdef import AttrSpec, OpDef, attr_fits, define
from weft.ir.ops import OPS
from weft.ir.ops.optimizer import OVERWRITES
from weft.ir.signature import parse_signature


@pytest.mark.parametrize("name", OPS)
def test_an_entry_is_complete(name: str) -> None:
    entry = OPS[name]
    assert entry.doc[0] != " " and entry.doc.isprintable()
    assert callable(entry.ref)
    assert entry.levels and set(entry.levels) <= set(LEVELS)
    if isinstance(entry.signature, str):
        template = parse_signature(entry.signature)
        names = {n for t in (*template.operands, *template.results) for i in t for n in i.names}
        assert {dim for dim, _ in template.combine} <= names
    for spec in entry.attrs.values():
        assert spec.doc and spec.kind in ("int", "float", "bool", "str", "ints", "any")
        assert spec.default is None or attr_fits(spec.kind, spec.default)


def test_the_table_has_the_ops_of_each_family() -> None:
    assert len(OPS) >= 70
    assert {entry.family for entry in OPS.values()} == {
        "contraction", "pointwise", "reduction", "row", "movement", "indexing", "creation",
        "random", "optimizer", "collective", "control", "opaque",
    }  # fmt: skip


def test_each_optimizer_update_says_what_it_overwrites() -> None:
    names = {name for name, entry in OPS.items() if entry.family == "optimizer"}
    assert set(OVERWRITES) == names
    assert all("inplace" in OPS[name].attrs for name in names)


def test_an_op_cannot_be_defined_twice_or_without_a_doc() -> None:
    fields = {"name": "neg", "family": "pointwise", "doc": "-x", "signature": "a -> a"}
    with pytest.raises(ValueError, match="defined twice"):
        define(**fields, ref=abs)
    with pytest.raises(TypeError, match="ref"):
        OpDef(**fields)
    with pytest.raises(ValueError, match="doc"):
        OpDef(**{**fields, "doc": ""}, ref=abs)
    with pytest.raises(ValueError, match="family"):
        OpDef(**{**fields, "family": "pontwise"}, ref=abs)


@pytest.mark.parametrize(
    ("rule", "dtypes", "reason"),
    [
        ("T", ["f32", "f32", "f32"], ""),
        ("T", ["f32", "f32", "i64"], "operand 2 is i64, an earlier one f32"),
        ("F", ["i64", "i64"], "operand 0 is i64, not a float"),
        ("fi", ["bf16", "i64"], ""),
        ("fi", ["bf16", "bool"], "operand 1 is bool, not an integer"),
        ("bT", ["f32", "f32", "f32"], "operand 0 is f32, not bool"),
        ("bT", ["bool", "f32", "f64"], "operand 2 is f64, an earlier one f32"),
        ("TTT.", ["f32", "f32", "f32", "bool", "i64"], ""),
        ("", [], ""),
    ],
)
def test_dtype_rules_say_what_does_not_fit(rule: str, dtypes: list[str], reason: str) -> None:
    entry = OpDef("test", "opaque", "an op", None, abs, dtypes=rule)
    assert entry.wrong_dtypes(dtypes) == reason


@pytest.mark.parametrize(
    ("kind", "good", "bad"),
    [
        ("int", (1, -3), (True, 1.0, "1", (1,))),
        ("float", (1, 0.5), (True, "1", (1.0,))),
        ("bool", (True, False), (0, 1, "true")),
        ("str", ("", "a"), (1, ("a",))),
        ("ints", ((), (1, 2)), (1, (1.0,), ("a",), (True,), ((1,),))),
        ("any", (1, 1.0, True, "a", (1, "a")), ()),
    ],
)
def test_kinds_of_attributes(kind: str, good: tuple[object, ...], bad: tuple[object, ...]) -> None:
    assert all(attr_fits(kind, value) for value in good)  # type: ignore[arg-type]
    assert not any(attr_fits(kind, value) for value in bad)  # type: ignore[arg-type]


def test_an_attribute_without_a_default_is_required() -> None:
    assert AttrSpec("int").default is None


def test_the_language_does_not_import_torch() -> None:
    code = (
        "import sys, weft.ir.ops, weft.ir.parser, weft.ir.verify, weft.ir.builder;"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
