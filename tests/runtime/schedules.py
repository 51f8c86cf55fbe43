"""Schedules for tests of the static check and of the executor."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from tests.passes.programs import random_program
from torch import Tensor

from weft.ir.module import Module
from weft.ir.types import Mesh
from weft.passes.apply import apply
from weft.passes.fuse import Fuse
from weft.passes.lower import Lower
from weft.passes.random_place import random_choices
from weft.passes.schedule import Schedule


@dataclass
class Case:
    """A random logical program, values for its parameters, and a schedule of it."""

    logical: Module
    inputs: list[Tensor]
    schedule: Module


def random_schedule(seed: int, mesh: Mesh, ops: int = 6) -> Case:
    """A random program under random placements, lowered; with kernel functions for odd seeds."""
    program = random_program(seed, ops)
    placed = apply(program.module, mesh, random_choices(program.module, mesh, Random(seed)))
    spmd = Lower().run(placed)
    return Case(
        program.module, program.inputs, Schedule().run(Fuse().run(spmd) if seed % 2 else spmd)
    )


#: a linear layer trained with AdamW; dp splits the batch, tp the features, the states are sharded
TRAIN_STEP = """weft 1 schedule
mesh [dp=2, tp=2] "cpu"

func @main(%w: f32[5, 6]{B, S(1)} {role = "param", name = "w"},
 %m: f32[5, 6]{S(0), S(1)} {role = "state", name = "exp_avg/w"},
 %v: f32[5, 6]{S(0), S(1)} {role = "state", name = "exp_avg_sq/w"},
 %step: f64[]{B, B} {role = "state", name = "step"},
 %x: f32[7, 5]{S(0), B} {role = "input", name = "x"},
 %lr: f64[]{B, B} {role = "lr", name = "lr.0"})
 -> (f32[]{B, B} {role = "loss"}, f32[5, 6]{B, S(1)} {role = "update", updates = "w"},
 f32[5, 6]{S(0), S(1)} {role = "update", updates = "m"},
 f32[5, 6]{S(0), S(1)} {role = "update", updates = "v"},
 f64[]{B, B} {role = "update", updates = "step"}) {
  %one = constant() {value = 1.0} : f64[]{B, B}
  %s = add(%step, %one) : f64[]{B, B}
  %y = einsum(%x, %w) {spec = "b k, k n -> b n"} split [dp = b, tp = n] : f32[7, 6]{S(0), S(1)} @1
  %q = mul(%y, %y) split [dp = a0, tp = a1] : f32[7, 6]{S(0), S(1)}
  %l = reduce_sum(%q) {dims = [0, 1]} split [dp = a0, tp = a1] : f32[]{P(sum), P(sum)}
  free(%q)
  %l1.start = all_reduce(%l) {axis = "dp", async = true} : f32[]{B, P(sum)} @1
  %two = constant() {value = 2.0} : f32[]{B, B}
  %dy = mul(%y, %two) split [dp = a0, tp = a1] : f32[7, 6]{S(0), S(1)}
  free(%y)
  %l1 = wait(%l1.start) : f32[]{B, P(sum)}
  free(%l1.start, %l)
  %loss.start = all_reduce(%l1) {axis = "tp", async = true} : f32[]{B, B}
  %g = einsum(%x, %dy) {spec = "b k, b n -> k n"} split [dp = b, tp = n] : f32[5, 6]{P(sum), S(1)}
  free(%dy)
  %gs.start = reduce_scatter(%g) {axis = "dp", dim = 0, async = true} : f32[5, 6]{S(0), S(1)} @1
  %ws = shard(%w) {axis = "dp", dim = 0} : f32[5, 6]{S(0), S(1)}
  %gs = wait(%gs.start) : f32[5, 6]{S(0), S(1)}
  free(%gs.start, %g)
  %w1, %m1, %v1 = adamw_update(%ws, %gs, %m, %v, %s, %lr) {weight_decay = 0.1, inplace = true} split [dp = a0, tp = a1] : f32[5, 6]{S(0), S(1)}, f32[5, 6]{S(0), S(1)}, f32[5, 6]{S(0), S(1)}
  free(%gs)
  %w2.start = all_gather(%w1) {axis = "dp", dim = 0, async = true} : f32[5, 6]{B, S(1)}
  %loss = wait(%loss.start) : f32[]{B, B}
  free(%loss.start, %l1)
  %w2 = wait(%w2.start) : f32[5, 6]{B, S(1)}
  free(%w2.start, %w1)
  return %loss, %w2, %m1, %v1, %s
}

loc @1 = "model.linear" "train.py":12
"""

#: relu(x w) and its gradients; the schedule starts work for the backward half before the output
FORWARD_BACKWARD = """weft 1 schedule
mesh [dp=2, tp=2] "cpu"

func @main(%w: f32[5, 6]{S(1), B} {role = "param", name = "w"},
 %x: f32[7, 5]{B, S(0)} {role = "input", name = "x"},
 %dy: f32[7, 6]{B, B} {role = "tangent", name = "y"})
 -> (f32[7, 6]{B, B} {role = "output"}, f32[5, 6]{S(1), B} {role = "grad", name = "w"},
 f32[7, 5]{B, S(0)} {role = "grad", name = "x"}) {
  %dx.s = shard(%dy) {axis = "tp", dim = 0} : f32[7, 6]{B, S(0)}
  %dys = shard(%dx.s) {axis = "dp", dim = 1} : f32[7, 6]{S(1), S(0)}
  free(%dx.s)
  %h = einsum(%x, %w) {spec = "b k, k n -> b n"} split [dp = n, tp = b] : f32[7, 6]{S(1), S(0)}
  %r = relu(%h) split [dp = a1, tp = a0] : f32[7, 6]{S(1), S(0)}
  free(%h)
  %y1.start = all_gather(%r) {axis = "dp", dim = 1, async = true} : f32[7, 6]{B, S(0)}
  %xt = permute(%x) {dims = [1, 0]} split [tp = a0] : f32[5, 7]{B, S(1)}
  %y1 = wait(%y1.start) : f32[7, 6]{B, S(0)}
  free(%y1.start)
  %y = all_gather(%y1) {axis = "tp", dim = 0} : f32[7, 6]{B, B}
  free(%y1)
  %g = relu_backward(%dys, %r) split [dp = a1, tp = a0] : f32[7, 6]{S(1), S(0)}
  free(%r, %dys)
  %dwp = einsum(%xt, %g) {spec = "k b, b n -> k n"} split [dp = n, tp = b] : f32[5, 6]{S(1), P(sum)}
  %dw.start = all_reduce(%dwp) {axis = "tp", async = true} : f32[5, 6]{S(1), B}
  %dxp = einsum(%g, %w) {spec = "b n, k n -> b k"} split [dp = n, tp = b] : f32[7, 5]{P(sum), S(0)}
  %dw = wait(%dw.start) : f32[5, 6]{S(1), B}
  free(%dw.start, %dwp, %g, %xt)
  %dx = all_reduce(%dxp) {axis = "dp"} : f32[7, 5]{B, S(0)}
  return %y, %dw, %dx
}
"""
