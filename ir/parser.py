"""Reading the text form: `parse_module(print_module(m)) == m`; malformed text ends in a diagnostic.

Two steps. The LALR parser turns the text into small records of tokens (no state, no checks); the
reader (`reader.py`) resolves names, types and locations, and knows each token's place for messages.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from lark import Lark, Token, Transformer
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken

from .errors import CompileError
from .module import Module
from .reader import FunctionText, OpText, Reader

#: What the parser's terminals are called in messages.
_TERMINALS = {
    "NAME": "a word", "NUMBER": "a number", "STRING": "a string", "VALUE": "a value such as %x",
    "SYMBOL": "a symbol such as @main", "TYPE": "a type such as f32[8, 4]", "STATE": "partial(...)",
    "EQUAL": "'='", "COMMA": "','", "COLON": "':'", "LPAR": "'('", "RPAR": "')'", "LSQB": "'['",
    "RSQB": "']'", "LBRACE": "'{'", "RBRACE": "'}'", "$END": "the end of the text",
    "_ARROW": "'->'",
}  # fmt: skip


class _Records(Transformer[Token, Any]):
    """The parse as records of tokens."""

    def array(self, items: list[Any]) -> tuple[Any, ...]:
        """A list in an attribute; a tuple, to tell it from tokens."""
        return tuple(items[0] or ())

    def attrs(self, items: list[Any]) -> Any:
        """`{...}`: its pairs."""
        return items[0]

    def op(self, items: list[Any]) -> OpText:
        """One op."""
        return OpText(*items)

    def func(self, items: list[Any]) -> FunctionText:
        """One function."""
        name, params, results, attrs, *body = items
        return FunctionText(name, params, results, attrs, body)

    def start(self, items: list[Any]) -> list[Any]:
        """All other rules: the list of their parts."""
        return items

    mesh = loc = pairs = pair = items = values = types = params = param = start
    results = result = start


@lru_cache(maxsize=1)
def _lark() -> Lark:
    grammar = (Path(__file__).parent / "grammar.lark").read_text(encoding="utf-8")
    return Lark(
        grammar, parser="lalr", lexer="contextual", transformer=_Records(), maybe_placeholders=True
    )


def _syntax(reader: Reader, error: UnexpectedInput) -> CompileError:
    """The diagnostic for a text that does not follow the grammar."""
    if isinstance(error, UnexpectedToken) and error.token.type != "$END":
        span = reader.span_of(error.token)
        message, expected = f"unexpected {str(error.token)[:40]!r}", set(error.expected)
    elif isinstance(error, UnexpectedCharacters):
        span = reader.span(error.line, error.column)
        message, expected = f"unexpected character {error.char!r}", set(error.allowed or ())
    else:
        span = reader.end()
        message, expected = "the text ends too early", set(getattr(error, "expected", ()))
    names = sorted(expected - {"WS", "COMMENT"})
    words = [_TERMINALS.get(name, f"'{name.lower()}'") for name in names]
    hint = " or ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))
    return CompileError("W0101", message, span=span, hint=f"expected {hint}" if hint else "")


def parse_module(text: str, file: str = "<text>") -> Module:
    """Read a module from its text form.

    Args:
        text: what `print_module` writes, or a person.
        file: the name that messages give as the place.

    Raises:
        CompileError: W0101 malformed text, W0102 unknown op, dtype, level or attribute, W0103 a
            name that is undefined or defined twice; always with line and column.
    """
    reader = Reader(text, file)
    try:
        records: Any = _lark().parse(text)
    except UnexpectedInput as error:
        raise _syntax(reader, error) from None
    return reader.module(records)
