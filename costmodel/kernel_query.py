"""A batch of kernel calls of one family: contexts, and sizes as columns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from .kernel_context import Context, rates_of
from .kernel_features import FAMILIES, Features


@dataclass(frozen=True)
class Batch:
    """Kernel calls.

    Attributes:
        family: one of `kernel_features.FAMILIES`.
        contexts: the distinct contexts.
        index: [rows], each row's context.
        sizes: name -> [rows], as the family's function names them.
    """

    family: str
    contexts: tuple[Context, ...]
    index: NDArray[np.intp]
    sizes: Mapping[str, NDArray[np.float64]]

    def features(self) -> Features:
        """The model's view of the rows."""
        return self._features

    @cached_property
    def _features(self) -> Features:
        return FAMILIES[self.family](self.sizes, rates_of(self.contexts, self.index))

    def take(self, rows: NDArray[np.intp]) -> Batch:
        """Some of the rows."""
        sizes = {name: column[rows] for name, column in self.sizes.items()}
        return Batch(self.family, self.contexts, self.index[rows], sizes)

    def compact(self) -> Batch:
        """The same rows, without contexts that no row has."""
        used, index = np.unique(self.index, return_inverse=True)
        return Batch(self.family, tuple(self.contexts[i] for i in used), index, self.sizes)
