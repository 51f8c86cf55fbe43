"""The pass from a traced train step to its training-level program."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..ir.module import Module
from ..passes.base import Pass
from .joint import assemble


@dataclass(frozen=True)
class Differentiate(Pass):
    """The backward is written out, once for each distinct function.

    Before: an entry with a result of role `backward` (a loss that `backward()` was called on), and a
    parameter of role `grad` for each gradient that the step uses:

        func @main(%w: f32[4] {role = "param"}, %d_w: f32[4] {role = "grad", name = "w"}, ...)
          %loss = call(%x, %w) {callee = "block"} : f32[]
          %w1 = sgd_update(%w, %d_w, %step, %lr) : f32[4]

    After: both are gone, the gradient is computed.

          %loss, %saved = call(%x, %w) {callee = "block_forward"} : f32[], f32[4]
          %d_w = call(%w, %saved, %one) {callee = "block_backward"} : f32[4]
          %w1 = sgd_update(%w, %d_w, %step, %lr) : f32[4]

    Reverse mode, function by function: see `frontend/grad.py`.
    """

    name: ClassVar[str] = "differentiate"
    summary: ClassVar[str] = "write the backward out, once for each distinct function"
    levels: ClassVar[tuple[str, ...]] = ("logical",)

    def run(self, module: Module) -> Module:
        """The program with its backward. Raises CompileError W0302, W0304."""
        return assemble(module)
