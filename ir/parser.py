"""Reading the text form: `parse_module(print_module(m)) == m`, and malformed text ends in a diagnostic.

Two steps. The LALR parser turns the text into small records of tokens (no state, no checks); the
reader then resolves names, types and locations, and knows the place of each token for its messages.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NoReturn

from lark import Lark, Token, Transformer, v_args
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from .errors import CompileError, Span
from .module import LEVELS, NOWHERE, Attr, Function, Location, Module, Op, Value
from .opdef import attr_fits
from .ops import OPS
from .text import VERSION
from .types import COMBINES, DTYPES, B, Mesh, P, Placement, S, TensorType

#: Numbers of a text are 64-bit, signed or unsigned; sizes are signed.
_INT_MIN, _INT_MAX, _SIZE_MAX = -(2**63), 2**64 - 1, 2**63 - 1
#: Lists in attributes nest at most so deep: the reader and all later passes recurse into them.
_MAX_NESTING = 32
#: A source line longer than this is not repeated in a message.
_MAX_SHOWN = 400
#: What the parser's terminals are called in messages.
_TERMINALS = {
    "NAME": "a word", "NUMBER": "a number", "STRING": "a string", "VALUE": "a value such as %x",
    "SYMBOL": "a symbol such as @main", "TYPE": "a type such as f32[8, 4]", "STATE": "partial(...)",
    "EQUAL": "'='", "COMMA": "','", "COLON": "':'", "LPAR": "'('", "RPAR": "')'", "LSQB": "'['",
    "RSQB": "']'", "LBRACE": "'{'", "RBRACE": "'}'", "$END": "the end of the text",
    "__ANON_0": "'->'",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class _OpText:
    results: list[Token] | None
    name: Token
    operands: list[Token] | None
    attrs: list[Any] | None
    split: list[Any] | None
    types: list[Token] | None
    loc: Token | None


@dataclass(frozen=True, slots=True)
class _FunctionText:
    name: Token
    params: list[Any] | None
    results: list[Any] | None
    attrs: list[Any] | None
    body: list[Any]


class _Records(Transformer[Token, Any]):
    """The parse as records of tokens."""

    def start(self, items: list[Any]) -> list[Any]:
        return items

    def mesh(self, items: list[Any]) -> list[Any]:
        return items

    @v_args(inline=True)
    def attrs(self, pairs: list[Any]) -> list[Any]:
        return pairs

    def list(self, items: list[Any]) -> tuple[Any, ...]:
        return tuple(items[0]) if items and items[0] is not None else ()

    def pairs(self, items: list[Any]) -> list[Any]:
        return items

    items = values = types = params = results = pair = param = result = loc = pairs

    def op(self, items: list[Any]) -> _OpText:
        return _OpText(*items)

    def func(self, items: list[Any]) -> _FunctionText:
        name, params, results, attrs, *body = items
        return _FunctionText(name, params, results, attrs, body)


@lru_cache(maxsize=1)
def _lark() -> Lark:
    grammar = (Path(__file__).parent / "grammar.lark").read_text(encoding="utf-8")
    return Lark(
        grammar, parser="lalr", lexer="contextual", transformer=_Records(), maybe_placeholders=True,
        propagate_positions=False,
    )  # fmt: skip


class _TypeError(Exception):
    """A malformed type: an offset into its text, a code, a message and a hint."""

    def __init__(self, offset: int, code: str, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.offset, self.code, self.message, self.hint = offset, code, message, hint


def near(word: str, known: Iterable[str]) -> str:
    """A hint that names the closest known words; empty when none is close."""
    close = difflib.get_close_matches(word, list(known), n=3)
    return f"did you mean {' or '.join(close)}?" if close else ""


_TYPE = re.compile(r"(\w+)\[([^\]]*)\](?: ?\{([^}]*)\})?")
_SPLIT = re.compile(r"S\((\d+)\)")
_PARTIAL = re.compile(r"P\((\w+)\)")


def _parts(text: str, start: int) -> Iterable[tuple[int, str]]:
    """Comma-separated words with their offsets; nothing for blank text."""
    if not text.strip():
        return
    for part in text.split(","):
        word = part.strip()
        yield start + part.find(word), word
        start += len(part) + 1


def _size(word: str, offset: int, what: str) -> int:
    if not re.fullmatch(r"\d+", word, re.ASCII):
        raise _TypeError(offset, "W0101", f"{word!r} is not {what}")
    if len(word) > 20 or int(word) > _SIZE_MAX:
        raise _TypeError(offset, "W0101", f"{what} is too large: at most 2**63 - 1")
    return int(word)


def _placement(word: str, offset: int) -> Placement:
    if word == "B":
        return B
    if match := _SPLIT.fullmatch(word):
        return S(_size(match[1], offset + 2, "a tensor dim"))
    match = _PARTIAL.fullmatch(word)
    if match and match[1] in COMBINES:
        return P(match[1])
    raise _TypeError(offset, "W0101", f"{word!r} is not a placement",
                     "write S(dim), B, or P(sum), P(max), P(min), one for each mesh axis")  # fmt: skip


@lru_cache(maxsize=65536)
def _read_type(text: str) -> TensorType:
    match = _TYPE.fullmatch(text)
    if match is None:
        raise _TypeError(0, "W0101", f"cannot read the type {text!r}")
    dtype, dims, placements = match.groups()
    if dtype not in DTYPES:
        raise _TypeError(0, "W0102", f"unknown dtype {dtype!r}",
                         near(dtype, DTYPES) or f"known: {', '.join(DTYPES)}")  # fmt: skip
    shape = tuple(_size(word, at, "the size of a dim") for at, word in _parts(dims, match.start(2)))
    if placements is None:
        return TensorType(dtype, shape)
    placed = tuple(_placement(word, at) for at, word in _parts(placements, match.start(3)))
    return TensorType(dtype, shape, placed)


class _Reader:
    """Resolves the records of one text."""

    def __init__(self, text: str, file: str) -> None:
        self.lines, self.file = text.split("\n"), file
        self.values: dict[str, Value] = {}
        self.locations: dict[str, Location] = {}

    # -- diagnostics ---------------------------------------------------------------------------

    def span(self, line: int, column: int, width: int = 1) -> Span:
        line = min(max(line, 1), len(self.lines))
        text = self.lines[line - 1].rstrip("\r")
        column = min(max(column, 1), len(text) + 1)
        width = max(1, min(width, len(text) - column + 1))
        return Span(self.file, line, column, text if len(text) <= _MAX_SHOWN else "", width)

    def fail(
        self, code: str, token: Token, message: str, hint: str = "", reason: str = ""
    ) -> NoReturn:
        span = self.span(token.line or 1, token.column or 1, len(token))
        raise CompileError(code, message, span=span, hint=hint, reason=reason)

    def syntax(self, error: UnexpectedInput) -> CompileError:
        """The diagnostic for a text that does not follow the grammar."""
        hint = ""
        if isinstance(error, UnexpectedToken) and error.token.type != "$END":
            token = error.token
            span = self.span(token.line or 1, token.column or 1, len(token))
            message = f"unexpected {str(token)[:40]!r}"
            expected = set(error.accepts or error.expected)
        elif isinstance(error, UnexpectedCharacters):
            span = self.span(error.line, error.column)
            message = f"unexpected character {error.char!r}"
            expected = set(error.allowed or ())
        else:
            span = self.span(len(self.lines), len(self.lines[-1]) + 1)
            message, expected = "the text ends too early", set(getattr(error, "expected", ()))
        words = sorted(_TERMINALS.get(name, f"'{name.lower()}'") for name in expected - {"WS", "COMMENT"})
        if words:
            hint = f"expected {', '.join(words[:-1])} or {words[-1]}" if words[1:] else f"expected {words[0]}"
        return CompileError("W0101", message, span=span, hint=hint)

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
        value = self.number(token) if token.type == "NUMBER" else None
        if not isinstance(value, int) or value < low or value > _SIZE_MAX:
            self.fail("W0101", token, f"{str(token)[:40]!r} is not {what}")
        return value

    def type(self, token: Token) -> TensorType:
        try:
            return _read_type(str(token))
        except _TypeError as error:
            span = self.span(token.line or 1, (token.column or 1) + error.offset)
            raise CompileError(error.code, error.message, span=span, hint=error.hint) from None

    # -- attributes and splits -------------------------------------------------------------------

    def value(self, item: Any, depth: int, key: Token) -> Attr:
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
        self.fail("W0101", item, f"{str(item)!r} is not an attribute value",
                  "values are true, false, numbers, \"strings\" and [lists]")  # fmt: skip

    def dict(self, pairs: Sequence[Any] | None, read: Callable[[Any, Token], Any]) -> dict[str, Any]:
        table: dict[str, Any] = {}
        for key, item in pairs or ():
            name = self.name(key)
            if name in table:
                self.fail("W0103", key, f"{name!r} is given twice")
            table[name] = read(item, key)
        return table

    def attrs(self, pairs: Sequence[Any] | None) -> dict[str, Attr]:
        return self.dict(pairs, lambda item, key: self.value(item, 0, key))

    def op_attrs(self, op: str, pairs: Sequence[Any] | None) -> dict[str, Attr]:
        """Attributes that the op has, of the kinds that it wants."""
        specs = OPS[op].attrs

        def read(item: Any, key: Token) -> Attr:
            name = self.name(key)
            if name not in specs:
                self.fail("W0102", key, f"{op} has no attribute {name!r}",
                          near(name, specs) or f"it has: {', '.join(specs) or 'none'}")  # fmt: skip
            value = self.value(item, 0, key)
            if not attr_fits(specs[name].kind, value):
                self.fail("W0101", key, f"attribute {name!r} of {op} is not of kind {specs[name].kind}")
            return value

        return self.dict(pairs, read)

    def state(self, item: Any, key: Token) -> str:
        if isinstance(item, tuple) or item.type == "NUMBER":
            self.fail("W0101", key, f"axis {self.name(key)!r} has no state",
                      "write an iteration dim or partial(i, ...)")  # fmt: skip
        return self.string(item) if item.type == "STRING" else str(item)

    # -- programs ------------------------------------------------------------------------------

    def define(self, token: Token, type: TensorType) -> Value:
        name = self.name(token)
        if name in self.values:
            self.fail("W0103", token, f"%{name} is defined twice", "value names are unique in a function")
        value = self.values[name] = Value(name, type)
        return value

    def use(self, token: Token) -> Value:
        name = self.name(token)
        value = self.values.get(name)
        if value is None:
            self.fail("W0103", token, f"%{name} is used before it is defined", near(name, self.values))
        return value

    def location(self, token: Token | None) -> Location:
        if token is None:
            return NOWHERE
        loc = self.locations.get(self.name(token))
        if loc is None:
            self.fail("W0101", token, f"no `loc {token} = ...` at the end of the text")
        return loc

    def op(self, text: _OpText) -> Op:
        name = str(text.name)
        if name not in OPS:
            self.fail("W0102", text.name, f"unknown op {name!r}", near(name, OPS))
        operands = tuple([self.use(token) for token in text.operands or ()])
        results, types = text.results or [], text.types or []
        if len(results) != len(types):
            self.fail("W0101", text.name, f"{len(results)} results have {len(types)} types",
                      "each result has a type, after ':'")  # fmt: skip
        pairs = zip(results, types, strict=True)
        defined = tuple([self.define(token, self.type(type)) for token, type in pairs])
        return Op(
            name, operands, defined, self.op_attrs(name, text.attrs),
            self.dict(text.split, self.state), self.location(text.loc),
        )  # fmt: skip

    def function(self, text: _FunctionText) -> Function:
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
            self.fail("W0101", text.name,
                      f"the header has {len(typed)} result types, `return` {len(results)} values")  # fmt: skip
        for (token, _), result in zip(typed, results, strict=True):
            if self.type(token) != result.type:
                self.fail("W0101", token, f"the returned %{result.name} is of type {result.type}")
        return Function(
            self.name(text.name), tuple(params), body, results, tuple(param_attrs),
            tuple(self.attrs(attrs) for _, attrs in typed), self.attrs(text.attrs),
        )  # fmt: skip

    def mesh(self, items: Sequence[Any] | None) -> Mesh | None:
        if items is None:
            return None
        pairs, device = items

        def size(item: Any, key: Token) -> int:
            return self.integer(item if isinstance(item, Token) else key, "the size of an axis", 1)

        return Mesh(tuple(self.dict(pairs, size).items()), self.string(device))

    def read_locations(self, items: Iterable[Any]) -> None:
        for symbol, path, file, line in items:
            name = self.name(symbol)
            if name in self.locations:
                self.fail("W0103", symbol, f"@{name} is defined twice")
            where = Location(self.string(path), self.string(file), self.integer(line, "a line"))
            self.locations[name] = where

    def module(self, items: Sequence[Any]) -> Module:
        version, level, mesh, attrs, *rest = items
        if str(version) != str(VERSION):
            self.fail("W0101", version, f"version {version} of the text form is not known",
                      f"this weft reads version {VERSION}")  # fmt: skip
        if level not in LEVELS:
            self.fail("W0102", level, f"unknown level {str(level)!r}", f"known: {', '.join(LEVELS)}")
        self.read_locations(item for item in rest if not isinstance(item, _FunctionText))
        functions: dict[str, Function] = {}
        for item in rest:
            if isinstance(item, _FunctionText):
                function = self.function(item)
                if function.name in functions:
                    self.fail("W0103", item.name, f"@{function.name} is defined twice")
                functions[function.name] = function
        return Module(str(level), tuple(functions.values()), self.mesh(mesh), self.attrs(attrs))


def parse_module(text: str, file: str = "<text>") -> Module:
    """Read a module from its text form.

    Args:
        text: what `print_module` writes, or a person.
        file: the name that messages give as the place.

    Raises:
        CompileError: W0101 malformed text, W0102 unknown op, dtype, level or attribute, W0103 a
            name that is undefined or defined twice; always with line and column.
    """
    reader = _Reader(text, file)
    try:
        records: Any = _lark().parse(text)
    except UnexpectedInput as error:
        raise reader.syntax(error) from None
    return reader.module(records)
