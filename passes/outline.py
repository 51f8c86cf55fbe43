"""Outline: repeated blocks of the entry become one function that is called many times.

Blocks are found by structure; module paths only break ties and give names. Four steps:

1. `layout`: ops that many blocks may share (on parameters or on inputs, not on both: masks,
   rotary tables, seeds) move to the front, ops on parameters alone (casts, transposes of weights)
   to their only user. Constants leave the sequence: each function gets copies of its own.
2. `outline_words`: repeats of the remaining word of ops, the largest saving first; of the rotations
   of a repeat, the one whose boundaries fewest bytes cross.
3. Copies with the same internal dataflow, checked op by op, become calls of one function.
4. `Finder._extend`: a neighbour that is a copy but for foreign ops in between (what the first layer
   computes for all of them) becomes a call as well, the foreign ops go before or behind it.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.module import Module
from .base import Pass
from .outline_core import layout
from .outline_find import Finder
from .outline_write import Writer


@dataclass(frozen=True)
class Outline(Pass):
    """Repeated blocks of the entry become one function that is called many times.

    before:  %1 = einsum(%x, %w0) {...} : f32[8, 4]    // model.layers.0.fc
             %2 = relu(%1) : f32[8, 4]
             %3 = einsum(%2, %w1) {...} : f32[8, 4]    // model.layers.1.fc
             %4 = relu(%3) : f32[8, 4]
    after:   %2 = call(%x, %w0) {callee = "layers"} : f32[8, 4]    // model.layers.0
             %4 = call(%2, %w1) {callee = "layers"} : f32[8, 4]    // model.layers.1
             func @layers(%x: f32[8, 4], %w0: f32[4, 4]) -> (f32[8, 4])
               attrs {path = "model.layers.0"} { ... }

    `min_ops` is the least number of ops of a block whose copies feed each other, `min_apart` of one
    whose copies do not: a short pattern that happens to occur twice is no block. Optimizer updates
    need not feed each other: those of each layer are a block.
    """

    min_ops: int = 3
    min_apart: int = 12

    name = "outline"
    summary = "repeated blocks become functions, found by structure"
    levels = ("logical",)

    def run(self, module: Module) -> Module:
        entry = module.entry
        front, core = layout(entry)
        blocks = Finder(core).find(self.min_ops, self.min_apart)
        if not blocks:
            return module
        return Writer(module, front, core, blocks).write()
