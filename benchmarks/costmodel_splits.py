"""Ways to hold rows back that are as hard as a new machine or a new model.

config   a fifth of the model configurations (gemm: pairs N, K; attention: heads and widths; ...)
large    every shape whose bound exceeds all that is kept: the largest twelfth of each context
device:X all rows of device X, and with `far:X` those of its siblings as well
"""

from __future__ import annotations

import numpy as np
from costmodel_data import Table
from numpy.typing import NDArray

from weft.costmodel.kernel_interval import SIBLING_DISTANCE
from weft.costmodel.kernel_support import distance

Mask = NDArray[np.bool_]

#: columns that make a configuration: what a row's model decides, not its batch
_CONFIG = {
    "gemm": ("N", "K"),
    "attention": ("heads", "kv_heads", "head_dim", "window"),
    "moe": ("hidden", "inter", "topk", "experts"),
    "rowwise": ("cols",),
    "conv": ("Cin", "Cout", "k"),
}


def config(table: Table, seed: int = 0, share: float = 0.2) -> Mask:
    """A share of the configurations, whatever device and implementation."""
    columns = [table.batch.sizes[name] for name in _CONFIG[table.batch.family]]
    groups = np.unique(np.stack(columns, 1), axis=0, return_inverse=True)[1]
    chosen = np.random.default_rng(seed).random(groups.max() + 1) < share
    return chosen[groups]


def large(table: Table) -> Mask:
    """Products above 2^38 multiply-adds; elsewhere the largest twelfth of each context by bound."""
    if table.batch.family == "gemm":
        s = table.batch.sizes
        return np.asarray(s["B"] * s["M"] * s["N"] * s["K"] > 2.0**38)
    bound = table.batch.features().bound_us
    out = np.zeros(len(table), bool)
    for context in range(len(table.batch.contexts)):
        rows = table.batch.index == context
        if rows.any():
            out |= rows & (bound > np.quantile(bound[rows], 11 / 12))
    return out


def device(table: Table, name: str, siblings: bool) -> Mask:
    """Rows of a device, or of it and of all devices near it."""
    sheets = {c.device.name: c.device for c in table.batch.contexts}
    if name not in sheets:
        return np.zeros(len(table), bool)
    near = [
        d.name == name or (siblings and distance(d, sheets[name]) < SIBLING_DISTANCE)
        for d in sheets.values()
    ]
    gone = {n for n, away in zip(sheets, near, strict=True) if away}
    return np.array([c.device.name in gone for c in table.batch.contexts])[table.batch.index]
