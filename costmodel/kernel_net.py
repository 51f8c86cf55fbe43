"""The network behind kernel times: non-decreasing by construction, and exact arithmetic.

    h0 = (min(rising, most) - mean) / spread                     [rows, r]
    h' = act(h W * gate(context) + shift(context) + free F)      W >= 0, gate > 0
    log2 time = offset(context) + sum over layers of h s + log2 max(bound / SETTLED_US, 1)   s >= 0

`act` is a third each of max(x, 0), min(x, 0) and clip(x, -1, 1), all non-decreasing, so time never falls
when a rising input grows (Runje and Shankaranarayana, Constrained Monotonic Neural Networks, 2023). Times
among the inputs stop at SETTLED_US, sizes at the largest of training, and the last term takes over
with the slope of the bound: large kernels stay at the efficiency of the largest known.

Every answer is the same on every machine: weights, inputs and activations are multiples of 2^-14,
2^-10 and 2^-12, so sums of products are exact in float64 whatever the order.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .kernel_context import Context, numbers
from .kernel_features import SETTLED_US, Features

Array = NDArray[np.float64]

_WEIGHT, _INPUT, _HIDDEN = 2.0**14, 2.0**10, 2.0**12
#: no activation is larger
_FREE = 1e9


def limits(width: int) -> tuple[Array, Array]:
    """Least and most that each unit of a layer passes on: max(x, 0), min(x, 0), clip(x, -1, 1)."""
    third = width // 3
    low, high = np.full(width, -_FREE), np.full(width, _FREE)
    low[:third], high[third : 2 * third] = 0.0, 0.0
    low[2 * third :], high[2 * third :] = -1.0, 1.0
    return low, high


def settled(bound_us: Array) -> Array:
    """log2 of what a bound has beyond SETTLED_US."""
    return np.asarray(np.log2(np.maximum(bound_us / SETTLED_US, 1.0)))


def _grid(x: Array, step: float) -> Array:
    return np.rint(x * step) / step


def _silu(x: Array) -> Array:
    return x / (1.0 + np.exp(-x))


@dataclass(frozen=True)
class Net:
    """One member of the ensemble of a family.

    Attributes:
        arrays: weights by name, see `fold`.
        vocabulary: tokens in the order of the rows of `tok`.
        layers: number of hidden layers.
        timing: the mode of timing that it was trained for; '' for all.
        devices: those of its training; only kept where `timing` is given.
    """

    arrays: Mapping[str, Array]
    vocabulary: tuple[str, ...]
    layers: int
    timing: str = ""
    devices: tuple[str, ...] = ()

    @cached_property
    def _numbers(self) -> dict[str, int]:
        return {token: i for i, token in enumerate(self.vocabulary)}

    def knows(self, context: Context) -> bool:
        """Whether every token of a context was there in training."""
        return all(token in self._numbers for token in context.tokens())

    def films(self, contexts: Sequence[Context]) -> list[Array]:
        """Per layer, gates and shifts [contexts, 2 width]; last, offsets [contexts, 1]."""
        a = self.arrays
        table = np.array([numbers(context) for context in contexts])
        sheet = np.clip((table - a["centre"]) / a["scale"], -3, 3)
        tokens = np.zeros((len(contexts), len(self.vocabulary)))
        for i, context in enumerate(contexts):
            for token in context.tokens():
                if token in self._numbers:
                    tokens[i, self._numbers[token]] = 1
        hidden = np.concatenate([sheet, tokens @ a["tok"]], 1)
        for name in ("c1", "c2"):
            hidden = _silu(hidden @ a[f"{name}.weight"].T + a[f"{name}.bias"])
        out = []
        for layer in range(self.layers):
            film = hidden @ a[f"films.{layer}.weight"].T + a[f"films.{layer}.bias"]
            width = film.shape[1] // 2
            gate = np.exp(np.clip(film[:, :width], -3, 3))
            out.append(_grid(np.concatenate([gate, film[:, width:]], 1), _HIDDEN))
        offset = hidden @ a["out.weight"].T + a["out.bias"] + a["offset"]
        return [*out, _grid(offset, _HIDDEN)]

    def log2_us(self, features: Features, films: Sequence[Array], index: NDArray[np.intp]) -> Array:
        """log2 of microseconds, [rows]."""
        a = self.arrays
        hidden = _grid(np.minimum(features.rising, a["most"]) * a["gain"] - a["shift"], _INPUT)
        free = _grid(features.free, _INPUT)
        total = films[-1][index, 0] + hidden @ a["s.0"]
        for layer in range(self.layers):
            film = films[layer][index]
            width = film.shape[1] // 2
            hidden = (hidden @ a[f"w.{layer}"]) * film[:, :width] + film[:, width:]
            hidden = _grid(np.clip(hidden + free @ a[f"f.{layer}"], *limits(width)), _HIDDEN)
            total = total + hidden @ a[f"s.{layer + 1}"]
        return np.asarray(total + _grid(settled(features.bound_us), _HIDDEN))


def fold(
    arrays: Mapping[str, Array],
    extras: Mapping[str, Array],
    vocabulary: tuple[str, ...],
    layers: int,
) -> Net:
    """A network from trained arrays: signs taken off rising weights, everything put on its grid."""
    out = dict(arrays)
    for name, array in arrays.items():
        kind = name.split(".")[0]
        if kind in ("w", "s"):
            out[name] = _grid(np.abs(array), _WEIGHT)
        elif kind == "f":
            out[name] = _grid(array, _WEIGHT)
    out |= {name: extras[name] for name in ("most", "offset", "centre", "scale")}
    out["gain"] = 1 / extras["spread"]
    out["shift"] = extras["mean"] / extras["spread"]
    kept = {
        n: a if n.split(".")[0] in "wsf" else a.astype(np.float32).astype(float)
        for n, a in out.items()
    }
    return Net(kept, vocabulary, layers)
