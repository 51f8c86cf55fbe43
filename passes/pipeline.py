"""The text form of a pipeline: `simplify,outline[min_ops=4],place[cluster="2x2:cpu"],lower`.

    pipeline: pass ("," pass)*
    pass:     NAME ("[" option* "]")?
    option:   NAME "=" value

Blanks and commas separate passes, and options, alike. A value is `true` or `false`, a number, or a
string: bare when it holds letters, digits and `_.:+-` only, else in JSON quotes. `-` and `_` are
the same in an option's name. Options at their defaults are not printed.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from difflib import get_close_matches

from ..ir.errors import CompileError, Span
from .base import OptionValue, Pass, option_specs
from .registry import PASSES

_TOKEN = re.compile(r'[\s,]*([\[\]=]|"(?:[^"\\]|\\.)*"|[\w.:+-]+)', re.ASCII)
_BARE = re.compile(r"[\w.:+-]+", re.ASCII)


def print_pass(item: Pass) -> str:
    """One pass as text."""
    options = [f"{name}={_print_value(value)}" for name, value in item.options().items()]
    return item.name + (f"[{' '.join(options)}]" if options else "")


def print_pipeline(passes: Iterable[Pass]) -> str:
    """The text that `parse_pipeline` reads back."""
    return ",".join(map(print_pass, passes))


def _print_value(value: OptionValue) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return value if _BARE.fullmatch(value) else json.dumps(value)
    return repr(value)


def parse_pipeline(text: str, passes: Mapping[str, type[Pass]] = PASSES) -> tuple[Pass, ...]:
    """Read a pipeline of the passes in a table.

    Raises CompileError W0601 with the place and, for a typo, the near name.
    """
    reader = _Reader(text, passes)
    found = []
    while not reader.at_end():
        found.append(reader.read_pass())
    return tuple(found)


class _Reader:
    """A cursor over a pipeline's text."""

    def __init__(self, text: str, passes: Mapping[str, type[Pass]]) -> None:
        self.text, self.position, self.last = text, 0, 0
        self.passes = passes

    def at_end(self) -> bool:
        """Is only blank text left?"""
        return not self.text[self.position :].strip(" \t\r\n,")

    def peek(self) -> str:
        """The next token; empty at the end, or where no token starts."""
        match = _TOKEN.match(self.text, self.position)
        return match[1] if match else ""

    def take(self, wanted: str = "") -> str:
        """Consume the next token, which must be `wanted` if that is given."""
        match = _TOKEN.match(self.text, self.position)
        token = match[1] if match else ""
        if match is None or (wanted and token != wanted):
            self.last = self.position
            raise self.error(f"expected {wanted or 'a name or a value'} in a pipeline")
        self.last, self.position = match.start(1), match.end()
        return token

    def error(self, message: str, name: str = "", known: Iterable[str] = ()) -> CompileError:
        """A diagnostic at the token taken last."""
        known = tuple(known)
        near = get_close_matches(name, known, 1)
        line = self.text.replace("\n", " ")
        span = Span("<pipeline>", 1, self.last + 1, line, max(1, len(name)))
        reason = f"there are {', '.join(known)}" if known else ""
        hint = f"did you mean {near[0]!r}?" if near else ""
        return CompileError("W0601", message, span=span, reason=reason, hint=hint)

    def read_pass(self) -> Pass:
        """One pass with its options."""
        name = self.take()
        if name not in self.passes:
            raise self.error(f"no pass is called {name!r}", name, self.passes)
        cls = self.passes[name]
        options: dict[str, OptionValue] = {}
        if self.text[self.position : self.position + 1] == "[":
            self.take("[")
            while self.peek() != "]":
                key, value = self.read_option(cls)
                options[key] = value
            self.take("]")
        return cls(**options)

    def read_option(self, cls: type[Pass]) -> tuple[str, OptionValue]:
        """`name=value` of a pass."""
        specs = option_specs(cls)
        written = self.take()
        name = written.replace("-", "_")
        if name not in specs:
            raise self.error(f"pass {cls.name} has no option {written!r}", written, specs)
        self.take("=")
        token = self.take()
        return name, self._convert(f"{cls.name}[{name}]", specs[name][0], token)

    def _convert(self, what: str, kind: type, token: str) -> OptionValue:
        try:
            if kind is bool:
                return {"true": True, "false": False}[token]
            if kind is str:
                return str(json.loads(token)) if token.startswith('"') else token
            value: OptionValue = kind(token)
            return value
        except (ValueError, KeyError):
            raise self.error(f"{what} takes a {kind.__name__}, not {token}") from None
