"""Reading the text of a tensor type, `bf16[8, 4096]{S(0), P(sum)}`, with the offset of an error."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from functools import lru_cache

from .types import COMBINES, DTYPES, B, P, Placement, S, TensorType

#: Sizes are signed 64-bit numbers.
SIZE_MAX = 2**63 - 1


class TypeTextError(Exception):
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
        raise TypeTextError(offset, "W0101", f"{word!r} is not {what}")
    if len(word) > 20 or int(word) > SIZE_MAX:
        raise TypeTextError(offset, "W0101", f"{what} is too large: at most 2**63 - 1")
    return int(word)


def _placement(word: str, offset: int) -> Placement:
    if word == "B":
        return B
    if match := _SPLIT.fullmatch(word):
        return S(_size(match[1], offset + 2, "a tensor dim"))
    match = _PARTIAL.fullmatch(word)
    if match and match[1] in COMBINES:
        return P(match[1])
    hint = "write S(dim), B, or P(sum), P(max), P(min), one for each mesh axis"
    raise TypeTextError(offset, "W0101", f"{word!r} is not a placement", hint)


@lru_cache(maxsize=65536)
def read_type(text: str) -> TensorType:
    """The type that a text says. Raises TypeTextError."""
    match = _TYPE.fullmatch(text)
    if match is None:
        raise TypeTextError(0, "W0101", f"cannot read the type {text!r}")
    dtype, dims, placements = match.groups()
    if dtype not in DTYPES:
        hint = near(dtype, DTYPES) or f"known: {', '.join(DTYPES)}"
        raise TypeTextError(0, "W0102", f"unknown dtype {dtype!r}", hint)
    shape = tuple(_size(word, at, "the size of a dim") for at, word in _parts(dims, match.start(2)))
    if placements is None:
        return TensorType(dtype, shape)
    placed = tuple(_placement(word, at) for at, word in _parts(placements, match.start(3)))
    return TensorType(dtype, shape, placed)
