"""Random values for the parameters of a logical program."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from weft.ir.module import Module
from weft.runtime.context import TORCH_DTYPES


def random_inputs(module: Module, seed: int = 0) -> list[Tensor]:
    """Normal numbers, indices 0 and 1, random bools."""
    g = Generator().manual_seed(seed)
    out = []
    for value in module.entry.params:
        dtype = TORCH_DTYPES[value.type.dtype]
        if dtype.is_floating_point:
            out.append(torch.randn(value.type.shape, generator=g, dtype=torch.float64).to(dtype))
        else:
            out.append(torch.randint(0, 2, value.type.shape, generator=g).to(dtype))
    return out
