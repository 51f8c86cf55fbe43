"""The generated kernels of a Llama block's train step: what they move and what they need.

Traces forward and backward of one block at 7B shapes (bf16, batch 1, 2,048 tokens) without weights,
fuses it, and compiles every kernel for sm_90. Traffic is compared with the same ops run one by one,
each of which reads and writes memory, as eager PyTorch does for composed ops. No GPU is needed, so
nothing is timed.

    python benchmarks/kernels_static.py [--quick] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from weft.codegen.compile import Binary, available, compile_kernel
from weft.codegen.emit import kernel_functions
from weft.codegen.source import KernelSource, generate
from weft.frontend.train_step import trace_module_train
from weft.ir.module import Module
from weft.passes.fuse import fuse
from weft.passes.simplify import Simplify

TARGET = "cuda:90"
#: a thread may use at most 255 registers; at 128, 512 threads still fill a quarter of an SM
MAX_REGISTERS = 128
#: stack that the argument reduction of libdevice's sin and cos takes for itself
TRIGONOMETRY = 40
#: fused traffic of the whole block, as a part of the traffic of its ops one by one
MAX_TRAFFIC = 0.5


@dataclass(frozen=True)
class Kernel:
    """One kernel of the block, and how often the train step calls it."""

    source: KernelSource
    calls: int
    binary: Binary | None


def block(hidden: int, intermediate: int, heads: int, tokens: int) -> Module:
    """The training-level program of a Llama with one block."""
    config = LlamaConfig(
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=1,
        num_attention_heads=heads, num_key_value_heads=heads, vocab_size=32000,
        max_position_embeddings=tokens, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        ids = torch.zeros(1, tokens, dtype=torch.long)
    traced = trace_module_train(model, (), {"input_ids": ids, "labels": ids}, optimizer="adamw")
    return fuse(Simplify().run(traced.module))


def kernels_of(module: Module) -> list[Kernel]:
    """The kernels of a fused module, the ones that move most first."""
    calls: dict[str, int] = {}
    for _, op in module.walk():
        if op.name == "call":
            calls[str(op.attrs["callee"])] = calls.get(str(op.attrs["callee"]), 0) + 1
    out = []
    for function in kernel_functions(module):
        source = generate(function, module.mesh)
        binary = compile_kernel(source, TARGET) if available() else None
        out.append(Kernel(source, calls[function.name], binary))
    return sorted(out, key=lambda kernel: -kernel.calls * kernel.source.bytes_moved)


def row(
    name: str, value: float, unit: str, target: float | None = None, reference: str = ""
) -> dict[str, Any]:
    """A row of the result: `target` is an upper bound."""
    holds = None if target is None else bool(value <= target)
    return {"name": name, "value": value, "unit": unit, "target": target, "reference": reference,
            "holds": holds}  # fmt: skip


def rows_of(kernels: list[Kernel]) -> list[dict[str, Any]]:
    """The rows of the result."""
    moved = sum(k.calls * k.source.bytes_moved for k in kernels)
    unfused = sum(k.calls * k.source.bytes_unfused for k in kernels)
    reference = f"{unfused / 1e6:.0f} MB when each op is a kernel of its own"
    rows = [
        row("block: fused traffic", moved / unfused, "of unfused", MAX_TRAFFIC, reference),
        row("block: kernels", len(kernels), "kernels"),
    ]
    for kernel in kernels:
        source, name = kernel.source, kernel.source.name
        ratio = source.bytes_moved / source.bytes_unfused
        rows.append(row(f"{name}: traffic", ratio, "of unfused", 1.0,
                        f"{source.bytes_unfused / 1e6:.0f} MB unfused"))  # fmt: skip
        if kernel.binary is not None:
            needs = kernel.binary.resources
            rows.append(row(f"{name}: registers", needs.registers, "a thread", MAX_REGISTERS,
                            "255 at most on sm_90"))  # fmt: skip
            allowed = TRIGONOMETRY if "tl.sin(" in source.text or "tl.cos(" in source.text else 0
            rows.append(row(f"{name}: stack and spills", needs.spill_bytes, "bytes a thread",
                            allowed, TARGET))  # fmt: skip
    return rows


def show(kernels: list[Kernel]) -> None:
    """Print a table for people."""
    table = Table("kernel", "walks", "calls", "MB", "MB unfused", "registers", "spills", "shared")
    for kernel in kernels:
        source, needs = kernel.source, kernel.binary.resources if kernel.binary else None
        table.add_row(
            source.name, source.kind, str(kernel.calls), f"{source.bytes_moved / 1e6:.1f}",
            f"{source.bytes_unfused / 1e6:.1f}",
            *(map(str, (needs.registers, needs.spill_bytes, needs.shared_bytes)) if needs
              else ("no triton", "", "")),
        )  # fmt: skip
    Console(width=130).print(table)


def main() -> None:
    """Measure, print, and write JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a small block")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows as JSON")
    options = parser.parse_args()
    shape = (512, 1376, 8, 256) if options.quick else (4096, 11008, 32, 2048)
    kernels = kernels_of(block(*shape))
    show(kernels)
    rows = rows_of(kernels)
    first = rows[0]
    print(f"{first['name']}: {first['value']:.2f} {first['unit']} ({first['reference']}), "
          f"target {first['target']}")  # fmt: skip
    for broken in (r for r in rows if r["holds"] is False):
        print(f"NOT MET {broken['name']}: {broken['value']} > {broken['target']}")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
