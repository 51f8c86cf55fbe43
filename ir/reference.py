"""The reference of the language, generated from the op table: `python -m weft.ir.reference`."""

from __future__ import annotations

from .errors import CODES
from .opdef import FAMILIES, OpDef
from .ops import OPS
from .verify import RULES

_HEAD = """# The IR

This page is generated from the op table (`python -m weft.ir.reference > docs/ir.md`).

A module is at one of four levels: **logical**, **placed**, **spmd**, **schedule**
(`architecture.md`). A type is a dtype, a global shape, and from the placed level on a placement per
mesh axis: `f32[8, 128]{S(0), B}`.

A signature names iteration dims: `a...` is any number of dims, `n!` must be whole on a rank,
`(g r)` is a factored dim, `b?` may be of size 1, `_` is a scalar, and `; k=sum` says how terms are
combined when a reduced dim is split. Ops without a fixed line derive it from their attributes.

## Text form

```
weft 1 placed
mesh [dp=2] "cpu"

func @main(%x: f32[8, 4]{S(0)} {role = "input"}) -> (f32[8]{S(0)} {role = "output"}) {
  %0 = neg(%x) split [dp = a0] : f32[8, 4]{S(0)} @0
  %1 = reduce_sum(%0) {dims = [1]} split [dp = a0] : f32[8]{S(0)}  // a comment
  return %1
}

loc @0 = "model.act" "net.py":12
```

An op has operands, attributes in `{}`, what each mesh axis splits in `split []`, result types and a
location. Values are `true`, `false`, numbers, JSON strings and lists. `weft.ir.parser.parse_module`
and `weft.ir.text.print_module` are inverse to each other at every level.
"""


def _signature(entry: OpDef) -> str:
    if entry.signature is None:
        return ""
    return f"`{entry.signature}`" if isinstance(entry.signature, str) else "by its attributes"


def _attributes(entry: OpDef) -> str:
    parts = []
    for name, spec in entry.attrs.items():
        default = "" if spec.default is None else f" = {spec.default}"
        parts.append(f"`{name}: {spec.kind}{default}`" + (f" {spec.doc}" if spec.doc else ""))
    return "; ".join(parts)


def _rules() -> list[tuple[str, list[str], str]]:
    """(name, levels, doc) of each rule of the verifier."""
    known: dict[str, tuple[str, list[str], str]] = {}
    for level, rules in RULES.items():
        for rule in rules:
            known.setdefault(rule.name, (rule.name, [], rule.doc))[1].append(level)
    return list(known.values())


def _escape(text: str) -> str:
    return text.replace("|", r"\|")


def reference() -> str:
    """The page as Markdown."""
    lines = [_HEAD]
    for family in FAMILIES:
        entries = [entry for entry in OPS.values() if entry.family == family]
        if not entries:
            continue
        lines += [f"## {family.capitalize()}", "", "| op | signature | attributes | |"]
        lines.append("| --- | --- | --- | --- |")
        for entry in entries:
            cells = (f"`{entry.name}`", _signature(entry), _attributes(entry), entry.doc)
            lines.append("| " + " | ".join(map(_escape, cells)) + " |")
        lines.append("")
    lines += ["## Rules", "", "What the verifier checks, in this order.", ""]
    lines += ["| rule | levels | |", "| --- | --- | --- |"]
    lines += [f"| `{name}` | {', '.join(levels)} | {doc} |" for name, levels, doc in _rules()]
    lines.append("")
    lines += ["## Diagnostics", "", "| code | |", "| --- | --- |"]
    lines += [f"| {code} | {text} |" for code, text in CODES.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
