"""From the parser's records to a module: names, types, locations and attributes are resolved."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from lark import Token

from .errors import CompileError, Span
from .module import LEVELS, NOWHERE, Attr, Function, Location, Module, Op, Value
from .opdef import attr_fits
from .ops import OPS
from .text import VERSION
from .type_text import SIZE_MAX, TypeTextError, near, read_type
from .types import Mesh, TensorType

#: Integers of a text have 64 bits, signed or unsigned.
_INT_MIN, _INT_MAX = -(2**63), 2**64 - 1
#: Lists in attributes nest at most so deep: the reader and all later passes recurse into them.
_MAX_NESTING = 32
#: A source line longer than this is not repeated in a message.
_MAX_SHOWN = 400


@dataclass(frozen=True, slots=True)
class OpText:
    """The tokens of one op; None where a part is absent."""

    results: list[Token] | None
    name: Token
    operands: list[Token] | None
    attrs: list[Any] | None
    split: list[Any] | None
    types: list[Token] | None
    loc: Token | None


@dataclass(frozen=True, slots=True)
class FunctionText:
    """The tokens of one function; `body` holds its ops and, last, the returned values."""

    name: Token
    params: list[Any] | None
    results: list[Any] | None
    attrs: list[Any] | None
    body: list[Any]


class Reader:
    """Resolves the records of one text."""

    def __init__(self, text: str, file: str) -> None:
        self.lines, self.file = text.split("\n"), file
        self.values: dict[str, Value] = {}
        self.locations: dict[str, Location] = {}

    # -- diagnostics ---------------------------------------------------------------------------

    def span(self, line: int, column: int, width: int = 1) -> Span:
        """A place in the text; places outside it move to its nearest line and column."""
        line = min(max(line, 1), len(self.lines))
        text = self.lines[line - 1].rstrip("\r")
        column = min(max(column, 1), len(text) + 1)
        width = max(1, min(width, len(text) - column + 1))
        return Span(self.file, line, column, text if len(text) <= _MAX_SHOWN else "", width)

    def span_of(self, token: Token, offset: int = 0) -> Span:
        """The place of a token, or of what stands `offset` characters into it."""
        width = 1 if offset else len(token)
        return self.span(token.line or 1, (token.column or 1) + offset, width)

    def end(self) -> Span:
        """The place behind the last character."""
        return self.span(len(self.lines), len(self.lines[-1]) + 1)

    def fail(self, code: str, token: Token, message: str, hint: str = "") -> NoReturn:
        """Raise a CompileError at a token."""
        raise CompileError(code, message, span=self.span_of(token), hint=hint)

    # -- words ---------------------------------------------------------------------------------

    def string(self, token: Token, skip: int = 0) -> str:
        """The text of a JSON string that starts `skip` characters into the token."""
        try:
            return str(json.loads(token[skip:]))
        except ValueError:
            self.fail("W0101", token, "not a JSON string", "escapes are those of JSON")

    def name(self, token: Token) -> str:
        """The name of a value, symbol or key."""
        skip = 1 if token.type in ("VALUE", "SYMBOL") else 0
        return self.string(token, skip) if token[skip] == '"' else str(token[skip:])

    def number(self, token: Token) -> int | float:
        """A number: an int where there is no point, exponent, `inf` or `nan`."""
        text = str(token)
        if text.lstrip("-") == "nan":
            return math.nan
        if text.lstrip("-").isdecimal():
            if len(text) > 21 or not _INT_MIN <= int(text) <= _INT_MAX:
                self.fail("W0101", token, "number too large", "integers have 64 bits")
            return int(text)
        value = float(text)
        if math.isinf(value) and not text.endswith("inf"):
            self.fail("W0101", token, "number too large", "write inf, or -inf, for infinity")
        return value

    def integer(self, token: Token, what: str, low: int = _INT_MIN) -> int:
        """An int from `low` on."""
        value = self.number(token) if token.type == "NUMBER" else None
        if not isinstance(value, int) or value < low or value > SIZE_MAX:
            self.fail("W0101", token, f"{str(token)[:40]!r} is not {what}")
        return value

    def type(self, token: Token) -> TensorType:
        """A tensor type."""
        try:
            return read_type(str(token))
        except TypeTextError as error:
            span = self.span_of(token, error.offset)
            raise CompileError(error.code, error.message, span=span, hint=error.hint) from None

    # -- attributes and splits -------------------------------------------------------------------

    def value(self, item: Any, depth: int, key: Token) -> Attr:
        """An attribute value that stands `depth` lists deep under `key`."""
        if isinstance(item, tuple):
            if depth >= _MAX_NESTING:
                self.fail("W0101", key, f"lists nest deeper than {_MAX_NESTING}")
            return tuple([self.value(part, depth + 1, key) for part in item])
        if item.type == "NUMBER":
            return self.number(item)
        if item.type == "STRING":
            return self.string(item)
        if item in ("true", "false"):
            return bool(item == "true")
        hint = 'values are true, false, numbers, "strings" and [lists]'
        self.fail("W0101", item, f"{str(item)!r} is not an attribute value", hint)

    def table(
        self, pairs: Sequence[Any] | None, read: Callable[[Any, Token], Any]
    ) -> dict[str, Any]:
        """`key = item` pairs as a dict, `read(item, key)` giving the values."""
        table: dict[str, Any] = {}
        for key, item in pairs or ():
            name = self.name(key)
            if name in table:
                self.fail("W0103", key, f"{name!r} is given twice")
            table[name] = read(item, key)
        return table

    def attrs(self, pairs: Sequence[Any] | None) -> dict[str, Attr]:
        """Attributes with free names, of a module, function, parameter or result."""
        return self.table(pairs, lambda item, key: self.value(item, 0, key))

    def op_attrs(self, op: str, pairs: Sequence[Any] | None) -> dict[str, Attr]:
        """Attributes that the op has, of the kinds that it wants."""
        specs = OPS[op].attrs

        def read(item: Any, key: Token) -> Attr:
            name = self.name(key)
            if name not in specs:
                hint = near(name, specs) or f"it has: {', '.join(specs) or 'none'}"
                self.fail("W0102", key, f"{op} has no attribute {name!r}", hint)
            value, kind = self.value(item, 0, key), specs[name].kind
            if not attr_fits(kind, value):
                self.fail("W0101", key, f"attribute {name!r} of {op} is not of kind {kind}")
            return value

        return self.table(pairs, read)

    def state(self, item: Any, key: Token) -> str:
        """What an axis splits."""
        if isinstance(item, tuple) or item.type == "NUMBER":
            hint = "write an iteration dim or partial(i, ...)"
            self.fail("W0101", key, f"axis {self.name(key)!r} has no state", hint)
        return self.string(item) if item.type == "STRING" else str(item)

    # -- programs ------------------------------------------------------------------------------

    def define(self, token: Token, type: TensorType) -> Value:
        """A new value of the current function."""
        name = self.name(token)
        if name in self.values:
            hint = "value names are unique in a function"
            self.fail("W0103", token, f"%{name} is defined twice", hint)
        value = self.values[name] = Value(name, type)
        return value

    def use(self, token: Token) -> Value:
        """A value of the current function."""
        name = self.name(token)
        value = self.values.get(name)
        if value is None:
            hint = near(name, self.values)
            self.fail("W0103", token, f"%{name} is used before it is defined", hint)
        return value

    def location(self, token: Token | None) -> Location:
        """The location that `@3` stands for."""
        if token is None:
            return NOWHERE
        loc = self.locations.get(self.name(token))
        if loc is None:
            self.fail("W0101", token, f"no `loc {token} = ...` at the end of the text")
        return loc

    def op(self, text: OpText) -> Op:
        """One op; its results become values of the current function."""
        name = str(text.name)
        if name not in OPS:
            self.fail("W0102", text.name, f"unknown op {name!r}", near(name, OPS))
        operands = tuple([self.use(token) for token in text.operands or ()])
        results, types = text.results or [], text.types or []
        if len(results) != len(types):
            message = f"{len(results)} results have {len(types)} types"
            self.fail("W0101", text.name, message, "each result has a type, after ':'")
        pairs = zip(results, types, strict=True)
        defined = tuple([self.define(token, self.type(type)) for token, type in pairs])
        return Op(
            name, operands, defined, self.op_attrs(name, text.attrs),
            self.table(text.split, self.state), self.location(text.loc),
        )  # fmt: skip

    def function(self, text: FunctionText) -> Function:
        """One function."""
        self.values = {}
        params, param_attrs = [], []
        for token, type, attrs in text.params or ():
            params.append(self.define(token, self.type(type)))
            param_attrs.append(self.attrs(attrs))
        *ops, returned = text.body
        body = tuple([self.op(op) for op in ops])
        results = tuple([self.use(token) for token in returned or ()])
        typed = text.results or []
        if len(typed) != len(results):
            message = f"the header has {len(typed)} result types, `return` {len(results)} values"
            self.fail("W0101", text.name, message)
        for (token, _), result in zip(typed, results, strict=True):
            if self.type(token) != result.type:
                self.fail("W0101", token, f"the returned %{result.name} is of type {result.type}")
        return Function(
            self.name(text.name), tuple(params), body, results, tuple(param_attrs),
            tuple(self.attrs(attrs) for _, attrs in typed), self.attrs(text.attrs),
        )  # fmt: skip

    def mesh(self, items: Sequence[Any] | None) -> Mesh | None:
        """The mesh line."""
        if items is None:
            return None
        pairs, device = items

        def size(item: Any, key: Token) -> int:
            return self.integer(item if isinstance(item, Token) else key, "the size of an axis", 1)

        return Mesh(tuple(self.table(pairs, size).items()), self.string(device))

    def read_locations(self, items: Iterable[Any]) -> None:
        """The table of locations."""
        for symbol, path, file, line in items:
            name = self.name(symbol)
            if name in self.locations:
                self.fail("W0103", symbol, f"@{name} is defined twice")
            where = Location(self.string(path), self.string(file), self.integer(line, "a line"))
            self.locations[name] = where

    def module(self, items: Sequence[Any]) -> Module:
        """The whole module."""
        version, level, mesh, attrs, *rest = items
        if str(version) != str(VERSION):
            hint = f"this weft reads version {VERSION}"
            self.fail("W0101", version, f"version {version} of the text form is not known", hint)
        if level not in LEVELS:
            hint = f"known: {', '.join(LEVELS)}"
            self.fail("W0102", level, f"unknown level {str(level)!r}", hint)
        self.read_locations(item for item in rest if not isinstance(item, FunctionText))
        functions: dict[str, Function] = {}
        for item in rest:
            if isinstance(item, FunctionText):
                function = self.function(item)
                if function.name in functions:
                    self.fail("W0103", item.name, f"@{function.name} is defined twice")
                functions[function.name] = function
        return Module(str(level), tuple(functions.values()), self.mesh(mesh), self.attrs(attrs))
