"""Odd values and mutations of texts, bytes and JSON, from a random generator."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from random import Random
from typing import Any

#: what people and broken tools write where a number should be
NUMBERS: tuple[Any, ...] = (
    0, -1, 1, 2, 3, 7, 2**31, 2**63, 2**64, 10**9, 10**30, 10**400, -(10**20), 0.0, -0.5, 1.5, 1e308,
    1e-320, float("nan"), float("inf"), float("-inf"), True, False,
)  # fmt: skip
#: characters that break readers: quotes, separators, controls, other scripts, surrogates' neighbours
CHARACTERS = "x:+.-_=[]{}\"'\\/ \n\r\t\0\x7f0123456789eE#,;%@\u0661\u00d7\u202e\ufeff\U0001f9f6\ud7ff"
TEXTS = (
    "", " ", "cpu", "h100", "nan", "inf", "None", "true", "..", "../../etc/passwd", "/etc/passwd", "x" * 5000,
    "\0", "\u0661x\u0662:cpu", "2x2", "2x8:h100", "adamw", "%s%n", "$(touch pwned)", "9" * 5000, "[[[[",
)  # fmt: skip


def odd(random: Random, depth: int = 2) -> Any:
    """Anything that JSON or Python can hold."""
    kind = random.randrange(7 if depth else 4)
    match kind:
        case 0:
            return random.choice(NUMBERS)
        case 1:
            return random.choice(TEXTS)
        case 2:
            return None
        case 3:
            return "".join(random.choices(CHARACTERS, k=random.randrange(12)))
        case 4:
            return [odd(random, depth - 1) for _ in range(random.randrange(4))]
        case 5:
            return {str(odd(random, 0))[:20]: odd(random, depth - 1) for _ in range(random.randrange(3))}
    return nested(random.choice((3, 50, 2000)))


@contextmanager
def deep() -> Iterator[None]:
    """Room on the stack to write down what is nested deeply; who reads it has less."""
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(20_000)
    try:
        yield
    finally:
        sys.setrecursionlimit(limit)


def nested(depth: int) -> list[Any]:
    """Lists in lists."""
    out: list[Any] = []
    for _ in range(depth):
        out = [out]
    return out


def mutate_text(random: Random, text: str) -> str:
    """A few edits: characters, numbers, lines."""
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        at = random.randrange(len(text) + 1)
        match random.randrange(7):
            case 0:
                text = text[:at] + random.choice(CHARACTERS) + text[at:]
            case 1:
                text = text[:at] + text[at + random.choice((1, 1, 5)) :]
            case 2:
                text = text[:at] + str(random.choice(NUMBERS[:11])) + text[at:]
            case 3:
                text = text[:at] + random.choice(TEXTS[:12]) + text[at + 1 :]
            case 4:
                digits = [i for i, c in enumerate(text) if c.isdigit()]
                if digits:
                    i = random.choice(digits)
                    text = text[:i] + str(random.choice((0, 1, 3, 9, -1, 10**9))) + text[i + 1 :]
            case 5:
                lines = text.split("\n")
                i = random.randrange(len(lines))
                lines[i:i] = random.choice(([], [lines[i]], [lines[random.randrange(len(lines))]]))
                if random.random() < 0.5:
                    lines.pop(random.randrange(len(lines)))
                text = "\n".join(lines)
            case 6:
                text = text[:at]
    return text


def mutate_bytes(random: Random, data: bytes) -> bytes:
    """A flipped bit, a cut, a longer end, other bytes in the middle."""
    if not data:
        return random.randbytes(random.randrange(1, 40))
    at = random.randrange(len(data))
    match random.randrange(5):
        case 0:
            return data[:at] + bytes([data[at] ^ (1 << random.randrange(8))]) + data[at + 1 :]
        case 1:
            return data[:at]
        case 2:
            return data + random.randbytes(random.randrange(1, 40))
        case 3:
            return data[:at] + random.randbytes(8) + data[at + 8 :]
    return random.randbytes(random.randrange(40))


def mutate_json(random: Random, value: Any) -> Any:
    """The value with one part somewhere inside removed, replaced, or added."""
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice(list(value))
        match random.randrange(6):
            case 0:
                return {k: v for k, v in value.items() if k != key}
            case 1:
                return {**value, key: odd(random)}
            case 2:
                return {**value, str(odd(random, 0)): odd(random)}
        return {**value, key: mutate_json(random, value[key])}
    if isinstance(value, list) and value and random.random() < 0.85:
        index = random.randrange(len(value))
        match random.randrange(5):
            case 0:
                return value[:index] + value[index + 1 :]
            case 1:
                return [*value[:index], odd(random), *value[index + 1 :]]
            case 2:
                return value * 2
        return [*value[:index], mutate_json(random, value[index]), *value[index + 1 :]]
    if isinstance(value, str) and random.random() < 0.6:
        return mutate_text(random, value)
    return odd(random)
