"""What can be known about a value without running the program: the domain of constant folding."""

from __future__ import annotations

from dataclasses import dataclass
from math import isinf, isnan
from typing import Any

import numpy as np
import numpy.typing as npt

from ..ir.types import FLOATS
from .simplify_affine import Affine

Array = npt.NDArray[Any]
#: elements of a tensor that is known by its data
SMALL = 256
#: integers up to this size are exact in f32 and f64
EXACT = 1 << 24
NUMPY = {"f64": np.float64, "f32": np.float32, "i64": np.int64, "i32": np.int32, "i16": np.int16,
          "i8": np.int8, "u8": np.uint8, "bool": np.bool_}  # fmt: skip


@dataclass(frozen=True)
class Below:
    """True where `of` <= 0."""

    of: Affine


@dataclass(frozen=True)
class Choice:
    """`yes` where `test` holds, else `no`."""

    test: Below
    yes: float
    no: float


@dataclass(frozen=True, eq=False)
class Small:
    """A tensor by its data."""

    data: Array


Fact = Affine | Below | Choice | Small


def rounded(value: bool | int | float, dtype: str) -> bool | int | float | None:
    """A number as torch fills a tensor of `dtype` with it.

    None for those that are not folded: f8, NaN, integers out of range. Half-precision numbers are
    rounded to f32 first, as torch does.
    """
    if dtype == "bool":
        return bool(value)
    if isinstance(value, float) and (isnan(value) or (isinf(value) and dtype not in FLOATS)):
        return None
    if dtype not in FLOATS:
        info = np.iinfo(NUMPY[dtype])
        return int(value) if info.min <= int(value) <= info.max else None
    if dtype == "f64":
        return float(value)
    with np.errstate(over="ignore"):
        single = np.float32(value)
        if dtype == "f32":
            return float(single)
        if dtype == "f16":
            return float(np.float16(single))
    if dtype != "bf16" or not np.isfinite(single):
        return float(single) if dtype == "bf16" else None
    bits = int(single.view(np.uint32))  # half to even on the upper 16 bits
    bits = (bits + 0x7FFF + (bits >> 16 & 1)) & 0xFFFF0000
    return float(np.uint32(bits).view(np.float32))
