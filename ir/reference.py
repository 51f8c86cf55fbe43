"""The reference of the language, generated from the op table: `python -m weft.ir.reference`."""

from __future__ import annotations

from .errors import CODES
from .opdef import FAMILIES, OpDef
from .ops import OPS

_HEAD = """# The IR

This page is generated from the op table (`python -m weft.ir.reference > docs/ir.md`).

A module is at one of four levels: **logical**, **placed**, **spmd**, **schedule**
(`architecture.md`). A type is a dtype, a global shape, and from the placed level on a placement per
mesh axis: `f32[8, 128]{S(0), B}`.

A signature names iteration dims: `a...` is any number of dims, `n!` must be whole on a rank,
`(g r)` is a factored dim, `b?` may be of size 1, `_` is a scalar, and `; k=sum` says how terms are
combined when a reduced dim is split. Ops without a fixed line derive it from their attributes.
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
    lines += ["## Diagnostics", "", "| code | |", "| --- | --- |"]
    lines += [f"| {code} | {text} |" for code, text in CODES.items()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(reference(), end="")
