"""Learned kernel times: `kernel_times(batch) -> Estimates`, from weights that ship with the package.

    log2 time = mean over the ensemble of networks (`kernel_net.py`) + what a calibration adds
    interval  = residual quantiles of held-out data x how hard a place is (`kernel_interval.py`)

The weights are one safetensors file, written by `benchmarks/train_costmodel.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from ..ir.errors import CompileError
from .kernel_interval import Intervals
from .kernel_net import Array, Net
from .kernel_query import Batch

#: version of the layout of the weights file
FORMAT = "weft-kernels-1"
#: a call of ATen on 64 elements takes 2.9 us on a server core
CALL_US = 2.9


@dataclass(frozen=True)
class Estimates:
    """Times of a batch in us: the estimate, and an interval that holds 9 of 10 measurements."""

    time_us: Array
    low_us: Array
    high_us: Array


@dataclass(frozen=True)
class Family:
    """Ensemble and intervals of one family."""

    members: tuple[Net, ...]
    intervals: Intervals

    def log2_us(self, batch: Batch) -> Array:
        """Mean of the members' log2 times; on a processor the bound and the cost of a call."""
        features = batch.features()
        host = np.array([context.device.vendor == "CPU" for context in batch.contexts])
        if host.any():
            own = host[batch.index]
            bound = np.log2(features.bound_us + CALL_US)
            if own.all():
                return np.asarray(bound)
            rest = np.flatnonzero(~own)
            bound[rest] = self.log2_us(batch.take(rest).compact())
            return np.asarray(bound)
        films = [net.films(batch.contexts) for net in self.members]
        each = [
            n.log2_us(features, f, batch.index) for n, f in zip(self.members, films, strict=True)
        ]
        return np.asarray(sum(each[1:], each[0]) / len(each))


@dataclass(frozen=True)
class Model:
    """All families, and where they come from."""

    families: Mapping[str, Family]
    info: Mapping[str, object]

    def centre_us(self, batch: Batch) -> Array:
        """Times of a batch, without intervals."""
        return rounded(self.families[batch.family].log2_us(batch))

    def estimates(self, batch: Batch) -> Estimates:
        """Times and intervals of a batch."""
        family = self.families[batch.family]
        centre = family.log2_us(batch)
        below, above = family.intervals.offsets(batch, family.members[0])
        return Estimates(rounded(centre), rounded(centre - below), rounded(centre + above))


def rounded(log2_us: Array) -> Array:
    """Microseconds with 6 digits: `exp2` may differ in the last bit between machines."""
    time_us = np.exp2(log2_us)
    step = np.exp2(np.floor(log2_us) - 20)
    return np.asarray(np.rint(time_us / step) * step)


@cache
def shipped() -> Model:
    """The model of the package."""
    return read_model(Path(str(files(__package__) / "weights" / "kernels.safetensors")))


def read_model(path: Path) -> Model:
    """A model from a weights file. Raises CompileError W1302 for a file of another format."""
    try:
        with safe_open(path, framework="numpy") as stream:
            info = json.loads((stream.metadata() or {}).get("weft", "{}"))
            arrays = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, json.JSONDecodeError) as error:
        raise CompileError(
            "W1302", f"{path}: the weights cannot be read", reason=str(error)
        ) from None
    if info.get("format") != FORMAT:
        raise CompileError("W1302", f"{path} does not hold weights of the format {FORMAT}")
    families = {}
    for name, entry in info["families"].items():
        members = []
        for member in range(entry["members"]):
            head = f"{name}.{member}."
            own = {k[len(head) :]: a.astype(float) for k, a in arrays.items() if k.startswith(head)}
            members.append(Net(own, tuple(entry["vocabulary"]), entry["layers"]))
        intervals = Intervals.from_json(
            entry["intervals"], arrays[f"{name}.hardness"].astype(float)
        )
        families[name] = Family(tuple(members), intervals)
    return Model(families, info)


def write_model(path: Path, families: Mapping[str, Family], info: Mapping[str, object]) -> None:
    """Write a weights file, whole or not at all."""
    arrays: dict[str, NDArray[np.float32]] = {}
    table = {}
    for name, family in families.items():
        for member, net in enumerate(family.members):
            for key, array in net.arrays.items():
                arrays[f"{name}.{member}.{key}"] = np.ascontiguousarray(array, np.float32)
        arrays[f"{name}.hardness"] = family.intervals.hardness.astype(np.float32)
        first = family.members[0]
        table[name] = {"members": len(family.members), "vocabulary": first.vocabulary,
                       "layers": first.layers, "intervals": family.intervals.to_json()}  # fmt: skip
    text = json.dumps({"format": FORMAT, **info, "families": table}, sort_keys=True)
    partial = path.with_suffix(".partial")
    save_file(arrays, partial, {"weft": text})
    partial.replace(path)


def kernel_times(batch: Batch) -> Estimates:
    """Times of a batch by the shipped model."""
    return shipped().estimates(batch)
