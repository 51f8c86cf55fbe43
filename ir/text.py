"""Printing: one text form for all levels, which `parser.py` reads back without loss.

    weft 1 placed
    mesh [dp=2, tp=2] "cpu"
    attrs {cluster = "2x2:cpu"}

    func @main(%x: f32[8, 4]{S(0), B} {role = "input"}) -> (f32[8, 4]{S(0), B}) {
      %0 = neg(%x) split [dp = a0] : f32[8, 4]{S(0), B} @0
      return %0
    }

    loc @0 = "model.act" "net.py":12

Only what differs from an empty default is printed. `//` starts a comment. Attribute values are
`true`, `false`, integers, floats (with a point, an exponent, `inf` or `nan`), JSON strings and
lists. Names that are not plain words are JSON strings: `%"a b"`, `@"f-1"`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping

from .crossing import comments
from .module import NOWHERE, Attr, Function, Location, Module, Op, Value
from .types import TensorType

#: Version of the text form; the first line of every text says it.
VERSION = 1

_NAME = re.compile(r"[A-Za-z0-9_.]+", re.ASCII)
_KEY = re.compile(r"[A-Za-z_]\w*", re.ASCII)
_STATE = re.compile(r"[A-Za-z_]\w*|partial\(\d+(, \d+)*\)", re.ASCII)
#: Words that read as a number or a bool where an attribute value may stand.
_WORDS = frozenset({"true", "false", "inf", "nan"})


def quote(text: str) -> str:
    """A JSON string, pure ASCII."""
    return json.dumps(text)


def print_value(value: Value) -> str:
    """`%name`."""
    return f"%{value.name}" if _NAME.fullmatch(value.name) else f"%{quote(value.name)}"


def print_symbol(name: str) -> str:
    """`@name`."""
    return f"@{name}" if _NAME.fullmatch(name) else f"@{quote(name)}"


def _key(name: str) -> str:
    return name if _KEY.fullmatch(name) else quote(name)


def print_attr(value: Attr) -> str:
    """An attribute value. Raises TypeError for other types."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return quote(value)
        case tuple():
            return "[" + ", ".join(map(print_attr, value)) + "]"
    raise TypeError(f"not an attribute value: {value!r}")


def print_attrs(attrs: Mapping[str, Attr]) -> str:
    """` {key = value, ...}` with a leading space, or nothing."""
    if not attrs:
        return ""
    pairs = (f"{_key(name)} = {print_attr(value)}" for name, value in attrs.items())
    return " {" + ", ".join(pairs) + "}"


def _print_state(state: str) -> str:
    plain = _STATE.fullmatch(state) and state not in _WORDS
    return state if plain else quote(state)


def _print_split(split: Mapping[str, str]) -> str:
    if not split:
        return ""
    pairs = (f"{_key(axis)} = {_print_state(state)}" for axis, state in split.items())
    return " split [" + ", ".join(pairs) + "]"


def _values(values: Iterable[Value]) -> str:
    return ", ".join(map(print_value, values))


def print_op(op: Op, locations: dict[Location, int] | None = None) -> str:
    """One op on one line. With `locations`, its location's number is printed and recorded there."""
    head = f"{_values(op.results)} = " if op.results else ""
    text = f"{head}{op.name}({_values(op.operands)}){print_attrs(op.attrs)}{_print_split(op.split)}"
    if op.results:
        text += " : " + ", ".join(str(value.type) for value in op.results)
    if locations is not None and op.loc != NOWHERE:
        text += f" @{locations.setdefault(op.loc, len(locations))}"
    return text


def print_header(function: Function) -> str:
    """`func @name(...) -> (...) attrs {...} {`."""
    params = ", ".join(
        f"{print_value(value)}: {_typed(value.type, attrs)}"
        for value, attrs in zip(function.params, function.param_attrs, strict=True)
    )
    results = ", ".join(
        _typed(value.type, attrs)
        for value, attrs in zip(function.results, function.result_attrs, strict=True)
    )
    attrs = f" attrs{print_attrs(function.attrs)}" if function.attrs else ""
    return f"func {print_symbol(function.name)}({params}) -> ({results}){attrs} {{"


def _typed(type: TensorType, attrs: Mapping[str, Attr]) -> str:
    return f"{type}{print_attrs(attrs)}"


def print_return(function: Function) -> str:
    """`return %a, %b`."""
    return "return " + _values(function.results) if function.results else "return"


def print_function(function: Function, locations: dict[Location, int] | None = None) -> str:
    """A whole function, without the locations it refers to."""
    lines = [print_header(function)]
    lines += [f"  {print_op(op, locations)}" for op in function.ops]
    return "\n".join([*lines, f"  {print_return(function)}", "}"])


def print_module(module: Module) -> str:
    """The text form of a module; `parse_module` reads it back to an equal module."""
    lines = [f"weft {VERSION} {module.level}"]
    if module.mesh is not None:
        axes = ", ".join(f"{_key(name)}={size}" for name, size in module.mesh.axes)
        lines.append(f"mesh [{axes}] {quote(module.mesh.device)}")
    if module.attrs:
        lines.append(f"attrs{print_attrs(module.attrs)}")
    locations: dict[Location, int] = {}
    for function in module.functions:
        lines += ["", print_function(function, locations)]
    if module.mesh is not None and module.functions:
        crossing = comments(module.entry.ops, module.mesh)
        lines += ["", *(f"// {line}" for line in crossing)] if crossing else []
    if locations:
        lines.append("")
    for loc, number in locations.items():
        lines.append(f"loc @{number} = {quote(loc.path)} {quote(loc.file)}:{loc.line}")
    return "\n".join(lines) + "\n"
