"""How far a query is from what the weights have seen: datasheets, names and sizes."""

from __future__ import annotations

from functools import cache

import numpy as np

from .datasheet import Datasheet
from .kernel_context import Context, numbers


@cache
def _place(device: Datasheet) -> tuple[float, ...]:
    """A device as a point: the datasheet numbers of a bf16 product."""
    return tuple(numbers(Context("gemm", device, "bf16")))


def distance(a: Datasheet, b: Datasheet) -> float:
    """Datasheet distance: 0 for equal numbers, below 1 for siblings, above 2 across generations."""
    return float(np.linalg.norm(np.subtract(_place(a), _place(b))))
