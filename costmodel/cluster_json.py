"""A cluster with all its numbers as JSON: an artifact is priced with the links it was planned for,
whatever became of the file that named them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, is_dataclass
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

from ..ir.errors import CompileError
from .cluster import Cluster, parse_cluster

#: key of plan.json
KEY = "cluster_numbers"


def to_json(cluster: Cluster) -> dict[str, Any]:
    """A cluster as nested dicts and lists of texts and numbers."""
    return asdict(cluster)


def cluster_of(info: Mapping[str, Any]) -> Cluster:
    """The cluster that an artifact was planned for, from its plan.json.

    An artifact without the numbers names a cluster of known kinds. Raises CompileError W0501 where
    they are no cluster.
    """
    if KEY not in info:
        return parse_cluster(str(info["cluster"]))
    try:
        cluster: Cluster = _read(info[KEY], Cluster, "cluster")
    except (ValueError, RecursionError) as error:
        raise CompileError(
            "W0501", "the cluster of the artifact cannot be read", reason=str(error)[:200],
            hint="compile again, or name another one with --cluster",
        ) from None
    return cluster


def _read(value: Any, kind: Any, where: str) -> Any:
    """A value of a type from JSON. Raises ValueError that says where it is another one."""
    origin, args = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        (some,) = (arg for arg in args if arg is not NoneType)
        return None if value is None else _read(value, some, where)
    if is_dataclass(kind) and isinstance(kind, type):
        return _record(value, kind, where)
    if origin in (tuple, Sequence):
        return _row(value, args, where)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is no table")
        return {str(key): _read(item, args[1], f"{where}.{key}") for key, item in value.items()}
    return _plain(value, kind, where)


def _record(value: Any, kind: type, where: str) -> Any:
    hints = get_type_hints(kind)
    names = [field.name for field in fields(kind)]
    if not isinstance(value, dict) or set(value) != set(names):
        raise ValueError(f"{where} needs {', '.join(names)}")
    return kind(**{name: _read(value[name], hints[name], f"{where}.{name}") for name in names})


def _row(value: Any, args: Sequence[Any], where: str) -> tuple[Any, ...]:
    if not isinstance(value, (list, tuple)):
        raise ValueError(f"{where} is no list")
    kinds = args if len(args) == 2 and args[1] is not Ellipsis else [args[0]] * len(value)
    if len(kinds) != len(value) or (where == "cluster.groups" and not value):
        raise ValueError(f"{where} has {len(value)} entries")
    pairs = zip(value, kinds, strict=True)
    return tuple(_read(item, kind, f"{where}[{k}]") for k, (item, kind) in enumerate(pairs))


def _plain(value: Any, kind: Any, where: str) -> Any:
    """A text or a number; rates and counts of devices are above zero, nothing is below."""
    if kind is str and isinstance(value, str):
        return value
    whole = kind is int and isinstance(value, int)
    if isinstance(value, bool) or not (whole or (kind is float and isinstance(value, (int, float)))):
        raise ValueError(f"{where} is no {kind.__name__}")
    if not math.isfinite(value) or value < 0 or (value == 0 and where.endswith(_POSITIVE)):
        raise ValueError(f"{where} is {value}")
    return value if kind is int else float(value)


#: what others divide by
_POSITIVE = ("bytes_per_s", "memory_bytes", ".hosts", ".devices")


__all__ = ["KEY", "cluster_of", "to_json"]
