"""The compiler's own time on long programs: text, verifier, passes, static check.

    python benchmarks/compiler.py [--quick] [--json FILE]

One decoder layer of a Llama is traced, and put behind itself as often as a row needs; the train
step that is placed is the demo's. The targets are bounds that the project set: at thousands of ops
each of these steps stays far below the time of tracing. Each figure is the best of several runs,
which is what a busy machine cannot add to.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch
from llama import Shape, on_meta
from rows import Row, arguments, finish, show, timed
from transformers import LlamaForCausalLM

from weft.costmodel.cluster import parse_cluster
from weft.frontend.trace import trace_forward
from weft.frontend.train_step import trace_module_train
from weft.ir.module import Function, Module, Op, Value
from weft.ir.parser import parse_module
from weft.ir.text import print_module
from weft.ir.types import B, Mesh, TensorType
from weft.ir.verify import verify
from weft.passes.fuse import fuse
from weft.passes.lower import lower
from weft.passes.outline import Outline
from weft.passes.place import search_mesh
from weft.passes.random_place import RandomPlace
from weft.passes.schedule import Schedule
from weft.passes.simplify import simplify
from weft.runtime.schedule_check import check

Result = TypeVar("Result")
#: the demo's model, batch and length
DEMO, BATCH, LENGTH = Shape(384, 1024, 6, 6, 6, 256), 8, 128
CLUSTER = "1x4:cpu"
BOUND = "a bound of the project"


def demo() -> tuple[LlamaForCausalLM, dict[str, torch.Tensor]]:
    """The demo's model and inputs."""
    return on_meta(DEMO, BATCH, LENGTH, torch.float32)


def decoder_layer() -> Function:
    """One layer of it as a flat program: weights, hidden states and rotary tables to hidden states."""
    model, _ = demo()
    x = torch.empty(BATCH, LENGTH, DEMO.hidden, device="meta")
    tables = (torch.empty(BATCH, LENGTH, DEMO.hidden // DEMO.heads, device="meta"),) * 2
    traced = trace_forward(model.model.layers[0], (x,), {"position_embeddings": tables})
    return traced.module.entry


def stack(layer: Function, count: int) -> Module:
    """`count` layers behind each other, each with weights of its own."""
    params = dict(zip(layer.params, layer.param_attrs, strict=True))
    weights = [value for value, attrs in params.items() if attrs["role"] == "param"]
    x, *tables = (value for value, attrs in params.items() if attrs["role"] == "input")
    all_params, ops, last = {value: params[value] for value in (x, *tables)}, [], x
    for index in range(count):

        def renamed(value: Value, prefix: str = f"layers.{index}") -> Value:
            return Value(f"{prefix}.{value.name}", value.type)

        new = {x: last, **{value: value for value in tables}}
        for value in weights:
            new[value] = renamed(value)
            all_params[new[value]] = {**params[value], "name": new[value].name}
        for op in layer.ops:
            new |= {value: renamed(value) for value in op.results}
            path = f"layers.{index}.{op.loc.path}".rstrip(".")
            ops.append(op.with_(operands=tuple(new[value] for value in op.operands),
                                results=tuple(new[value] for value in op.results),
                                loc=replace(op.loc, path=path)))  # fmt: skip
        last = new[layer.results[0]]
    entry = Function(
        "main", tuple(all_params), tuple(ops), (last,), tuple(all_params.values()), layer.result_attrs
    )
    return Module("logical", (entry,))


def best(run: Callable[[], Result], repeats: int) -> tuple[float, Result]:
    """Seconds of the fastest run, and what the last one returned."""
    seconds, result = zip(*(timed(run) for _ in range(repeats)), strict=True)
    return min(seconds), result[-1]


def text_rows(module: Module, repeats: int) -> list[Row]:
    """Printing, reading and verifying a flat program."""
    ops = len(module.entry.ops)
    print_s, text = best(lambda: print_module(module), repeats)
    parse_s, again = best(lambda: parse_module(text), repeats)
    verify_s, _ = best(lambda: verify(module), repeats)
    assert again == module
    size = f"{BOUND}; {len(text) / 1e6:.2f} MB"
    return [
        Row(f"parse {ops:,} ops", parse_s, "s", 5.0, size),
        Row(f"print {ops:,} ops", print_s, "s", parse_s, "parsing them"),
        Row(f"verify {ops:,} ops", verify_s, "s", parse_s, "parsing them"),
    ]


def pass_rows(layer: Function, repeats: int) -> list[Row]:
    """Passes over flat programs."""
    long, deep = stack(layer, 112), simplify(stack(layer, 80))
    simplify_s, _ = best(lambda: simplify(long), repeats)
    outline_s, outlined = best(lambda: Outline().run(deep), repeats)
    fuse_s, fused = best(lambda: fuse(long), repeats)
    assert len(outlined.functions) > 1 and len(fused.functions) > 1
    return [
        Row(f"simplify {len(long.entry.ops):,} ops", simplify_s, "s", 5.0, BOUND),
        Row("outline 80 layers", outline_s, "s", 5.0, f"{BOUND}; {len(deep.entry.ops):,} ops"),
        Row(f"fuse {len(long.entry.ops):,} ops", fuse_s, "s", 10.0, BOUND),
    ]


def placed_rows(layer: Function, repeats: int) -> list[Row]:
    """Placing the demo's train step; lowering and scheduling a deep one that is placed at random."""
    model, inputs = demo()
    step = trace_module_train(model, (), inputs, optimizer="adamw").module
    cluster = parse_cluster(CLUSTER)
    mesh = Mesh((("rank", cluster.ranks),), cluster.device.kind)
    place_s, found = best(lambda: search_mesh(step, mesh, cluster), 1)
    assert found is not None
    deep = simplify(stack(layer, 80))
    placed = RandomPlace(mesh=str(cluster.ranks)).run(deep)
    lower_s, spmd = best(lambda: lower(placed), repeats)
    schedule_s, schedule = best(lambda: Schedule().run(spmd), repeats)
    size = f"{found.report[0].variables} variables, width {found.report[0].width}"
    return [
        Row(f"place the demo's Llama, {CLUSTER}", place_s, "s", 10.0, f"{BOUND}; {size}"),
        Row(f"lower {len(placed.entry.ops):,} ops, placed at random", lower_s, "s"),
        Row(f"schedule {len(schedule.entry.ops):,} actions", schedule_s, "s", 5.0, BOUND),
    ]


def check_rows(ranks: int, collectives: int) -> list[Row]:
    """The static check for many ranks of one program."""
    mesh = Mesh((("dp", ranks // 100), ("tp", 100)))
    x = Value("x", TensorType("f32", (4,), (B, B)))
    ops = tuple(
        Op("all_reduce", (x,), (Value(f"r{i}", x.type),), {"axis": mesh.names[i % 2]})
        for i in range(collectives)
    )
    function = Function("main", (x,), ops, ())
    check_s, _ = timed(lambda: check(dict.fromkeys(range(ranks), function), mesh))
    return [Row(f"check {ranks:,} ranks of {collectives:,} collectives", check_s, "s", 1.0, BOUND)]


def main() -> int:
    """Measure, print, write; 1 when a target is missed."""
    options = arguments(__doc__, "one run of each instead of five").parse_args()
    torch.set_num_threads(1)
    repeats = 1 if options.quick else 5
    layer = decoder_layer()
    rows = text_rows(stack(layer, 93), repeats) + pass_rows(layer, repeats)
    rows += placed_rows(layer, repeats) + check_rows(10_000, 2000)
    show(rows)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
