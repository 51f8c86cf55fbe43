"""Time until a plan for a new batch is ready: under dynamic dims against a new trace and search.

    python benchmarks/dynamic.py [--quick] [--json FILE]
"""

from __future__ import annotations

import sys
import time
from typing import Any

import torch
from rows import Row, arguments, finish, show
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel

from weft.frontend.api import step_program
from weft.frontend.driver import Progress, plan_program
from weft.frontend.dynamic_graph import SymbolicProgram
from weft.frontend.options import OPTIONS
from weft.frontend.train_step import capture_train_step
from weft.ir.module import Module

#: what a new size may cost of a new trace and search
SHARE = 1 / 5
SIZES = ((8, 32), (12, 24), (7, 48), (9, 17))


def step(model: Any, optimizer: torch.optim.Optimizer, ids: Tensor) -> Tensor:
    loss: Tensor = model(input_ids=ids, labels=ids).loss
    loss.backward()
    optimizer.step()
    return loss


def measure(layers: int, cluster: str) -> tuple[float, float]:
    """Seconds of a trace and search, and of a new size under dynamic dims: means over sizes."""
    config = GPT2Config(n_layer=layers, n_embd=64, n_head=4, vocab_size=512, n_positions=64,
                        bos_token_id=0, eos_token_id=0, use_cache=False)  # fmt: skip
    model = GPT2LMHeadModel(config)
    optimizer = torch.optim.AdamW(model.parameters())
    batches = [torch.randint(0, 512, size) for size in SIZES]

    def plan(captured: Any, ids: Tensor, known: list[Module]) -> Module:
        program = step_program("step", captured, [ids], {})
        made = plan_program(program, cluster, "", OPTIONS, Progress(False), known)
        return made.module("placed")

    varying = [{0: (0, None), 1: (0, None)}]
    once = capture_train_step(step, model, optimizer, [batches[0]], {}, varying)
    symbolic = SymbolicProgram(once.program, ("ids",))

    def lower(ids: Tensor) -> Any:
        shapes = [tuple(ids.shape)]
        assert not symbolic.misfit(shapes)
        return once.lower(symbolic.at(shapes), symbolic.outputs_at(once.outputs, shapes))

    known = [plan(lower(batches[0]), batches[0], [])]  # the first size: its cost is not counted
    again, new = 0.0, 0.0
    for ids in batches[1:]:
        start = time.perf_counter()
        plan(capture_train_step(step, model, optimizer, [ids], {}).lowered(), ids, [])
        middle = time.perf_counter()
        plan(lower(ids), ids, known)
        again, new = again + middle - start, new + time.perf_counter() - middle
    return again / len(batches[1:]), new / len(batches[1:])


def main() -> int:
    options = arguments(__doc__, "two layers and one cluster").parse_args()
    layers = 2 if options.quick else 6
    rows = []
    for cluster in ("1x1:cpu", "2x2:cpu")[1 if options.quick else 0 :]:
        again, new = measure(layers, cluster)
        name = f"GPT-2, {layers} layers, {cluster}"
        rows.append(Row(f"{name}: new size, of a new trace and search", new / again, "", SHARE,
                        f"{again:.3g} s for the trace and search in this run"))  # fmt: skip
        rows.append(Row(f"{name}: new size", new, "s"))
    show(rows)
    return finish(rows, options.json)


if __name__ == "__main__":
    sys.exit(main())
