"""Cluster specifications: shorthand and TOML, broken in every way that comes to mind."""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import Any

import torch

import weft
from weft.costmodel.cluster import meshes, parse_cluster

from .values import CHARACTERS, NUMBERS, TEXTS, deep, mutate_bytes, mutate_text, odd

_SHORT = ("2x8:h100", "1x4:cpu", "1x1:cpu", "16x8:a100+4x4:h100", "3x5:cpu", "64x8:b200")
_FILE: dict[str, Any] = {
    "name": "mine",
    "groups": [{"device": "h100", "hosts": 2, "devices": 4}],
    "links": {"intra": {"bytes_per_s": 3e11, "latency_s": 2e-6}, "inter": {"bytes_per_s": 5e10}},
    "device": {"memory_bytes": 8e10, "launch_us": 4.0, "flops_per_s": {"bf16": 9e14, "f32": 6e13}},
}


def _toml(value: Any) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case float() | int():
            return str(value)
        case None:
            return "2026-01-01"
        case list() | tuple():
            return "[" + ", ".join(map(_toml, value)) + "]"
        case dict():
            return "{" + ", ".join(f"{_quoted(k)} = {_toml(v)}" for k, v in value.items()) + "}"
    return _quoted(str(value))


def _quoted(text: str) -> str:
    plain = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + "".join(c if c >= " " and c != "\x7f" else f"\\u{ord(c):04x}" for c in plain) + '"'


def _edited(random: Random, table: Any) -> Any:
    """One value somewhere below replaced, removed or added."""
    if isinstance(table, dict) and table and random.random() < 0.8:
        key = random.choice(list(table))
        match random.randrange(5):
            case 0:
                return {k: v for k, v in table.items() if k != key}
            case 1:
                return {**table, random.choice(("hosts", "kind", "", "bf16", "é")): odd(random)}
        return {**table, key: _edited(random, table[key])}
    if isinstance(table, list) and table and random.random() < 0.8:
        return [_edited(random, table[0]), *table[random.randrange(2) :]]
    return random.choice((random.choice(NUMBERS), odd(random)))


def _shorthand(random: Random) -> Any:
    match random.randrange(8):
        case 0:
            return "".join(random.choices(CHARACTERS, k=random.randrange(30)))
        case 1:
            return f"{random.choice(NUMBERS)}x{random.choice(NUMBERS)}:{random.choice(('cpu', 'h100'))}"
        case 2:
            return "+".join(random.choices(_SHORT, k=random.choice((2, 3, 2000))))
        case 3:
            return random.choice((odd(random), random.choice(TEXTS)))
    return mutate_text(random, random.choice(_SHORT))


def _file(random: Random, folder: Path) -> str:
    path = folder / "cluster.toml"
    match random.randrange(8):
        case 0:
            return random.choice((str(folder / "absent.toml"), "\0.toml", "x" * 300 + ".toml", ".toml"))
        case 1:
            path.mkdir()
        case 2:
            path.write_bytes(mutate_bytes(random, _text(_FILE).encode()))
        case 3:
            path.write_text("a = " + "[" * random.choice((10, 5000, 100_000)), encoding="utf-8")
        case 4:
            path.write_text(mutate_text(random, _text(_FILE)), encoding="utf-8", errors="replace")
        case 5:
            count = random.choice((0, 1, 1000))
            path.write_text(_text({**_FILE, "groups": _FILE["groups"] * count}), encoding="utf-8")
        case _:
            path.write_text(_text(_edited(random, _FILE)), encoding="utf-8", errors="replace")
    return str(path)


def _text(table: Any) -> str:
    if not isinstance(table, dict):
        return _toml(table)
    return "".join(f"{_quoted(str(key))} = {_toml(value)}\n" for key, value in table.items())


def run(random: Random, folder: Path) -> None:
    """Read a broken specification, and use what is accepted."""
    with deep():
        text = _file(random, folder) if random.random() < 0.5 else _shorthand(random)
    cluster = parse_cluster(text)
    for mesh in meshes(cluster):
        for axis in mesh.names:
            cluster.axis_link(mesh, axis)
    if cluster.ranks <= 16 and random.random() < 0.2:
        plan = weft.plan(torch.nn.Linear(4, 4), (torch.ones(4, 4),), cluster=text)
        str(plan.summary())
