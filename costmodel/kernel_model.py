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
from .datasheet import datasheets
from .kernel_context import Context
from .kernel_interval import Intervals
from .kernel_net import Array, Net
from .kernel_query import Batch
from .kernel_support import distance

#: version of the layout of the weights file
FORMAT = "weft-kernels-2"
#: datasheet distance up to which a network of few devices is asked: within a generation (H100 and H200
#: 0.7, L40S and RTX PRO 6000 1.5, A100 and A30 1.4; V100 and A100 2.2)
_NEAR = 2.0
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
    """Ensemble and intervals of one family; the first member serves all contexts."""

    members: tuple[Net, ...]
    intervals: Intervals

    def log2_us(self, batch: Batch) -> Array:
        """Mean of the members' log2 times; on a processor the bound and the cost of a call."""
        routes = [self.members_for(context) for context in batch.contexts]
        if len(set(routes)) > 1:
            out = np.empty(len(batch.index))
            number = {route: i for i, route in enumerate(dict.fromkeys(routes))}
            of_row = np.array([number[route] for route in routes])[batch.index]
            for i in range(len(number)):
                rows = np.flatnonzero(of_row == i)
                if len(rows):
                    out[rows] = self.log2_us(batch.take(rows).compact())
            return out
        features = batch.features()
        if not routes[0]:
            return np.asarray(np.log2(features.bound_us + CALL_US))
        nets = [self.members[i] for i in routes[0]]
        each = [n.log2_us(features, n.films(batch.contexts), batch.index) for n in nets]
        return np.asarray(sum(each[1:], each[0]) / len(each))

    def members_for(self, context: Context) -> tuple[int, ...]:
        """Members that estimate a context: those for its timing if its device is near theirs, else
        those for all; none for a processor."""
        if context.device.vendor == "CPU":
            return ()
        special = tuple(i for i, net in enumerate(self.members) if _is_for(net, context))
        return special or tuple(i for i, net in enumerate(self.members) if not net.timing)


def _is_for(net: Net, context: Context) -> bool:
    if not net.timing or net.timing != context.timing:
        return False
    known = datasheets()
    return any(distance(known[name], context.device) < _NEAR for name in net.devices)


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
        for member in range(len(entry["members"])):
            head = f"{name}.{member}."
            own = {k[len(head) :]: a.astype(float) for k, a in arrays.items() if k.startswith(head)}
            own_info = entry["members"][member]
            words, devices = tuple(own_info["vocabulary"]), tuple(own_info["devices"])
            members.append(Net(own, words, entry["layers"], own_info["timing"], devices))
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
        members = [
            {"vocabulary": n.vocabulary, "timing": n.timing, "devices": n.devices}
            for n in family.members
        ]
        table[name] = {"members": members, "layers": first.layers,
                       "intervals": family.intervals.to_json()}  # fmt: skip
    text = json.dumps({"format": FORMAT, **info, "families": table}, sort_keys=True)
    partial = path.with_suffix(".partial")
    save_file(arrays, partial, {"weft": text})
    partial.replace(path)


def kernel_times(batch: Batch) -> Estimates:
    """Times of a batch by the shipped model."""
    return shipped().estimates(batch)
