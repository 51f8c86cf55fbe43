"""Placement search: time to a proven optimum of Llama train steps, and the solver alone on tables.

    python benchmarks/placement.py [--quick] [--json FILE] [--data DIR]

Each step is traced on the meta device, searched on one mesh, written down and priced again from
the placed module. Peers of the plan found: the same step on one rank, and the best plan on the
other candidate meshes. `--data` names a folder of pairwise cost tables (*.npz: `unary_of[i]` names
the table `u<k>` of variable i, rows of `edges` are (i, j, k) with the table `p<k>`; inf is
forbidden), on which the solver runs alone.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from transformers import LlamaConfig, LlamaForCausalLM

from weft.costmodel.cluster import parse_cluster
from weft.frontend.train_step import trace_module_train
from weft.ir.module import Module
from weft.ir.types import Mesh
from weft.passes.place import search_mesh
from weft.passes.place_network import FORBIDDEN, Network
from weft.passes.place_solve import solve

#: issue 1 of 5: a block's train step on a mesh of two axes
TARGET_S = 10.0
#: issue 4 of 5: each instance of pairwise tables
TABLES_TARGET_S = 3.0

#: name -> (layers, hidden, ffn, heads, kv heads, vocabulary, batch, sequence), cluster, mesh
STEPS: dict[str, tuple[tuple[int, ...], str, tuple[int, ...]]] = {
    "Llama 10M, 2x2:cpu": ((8, 256, 768, 8, 4, 256, 8, 128), "2x2:cpu", (2, 2)),
    "Llama 7B, 2x8:h100": ((32, 4096, 11008, 32, 32, 32000, 16, 4096), "2x8:h100", (2, 8)),
    "Llama 70B, 32x8:h100": ((80, 8192, 28672, 64, 8, 128256, 256, 4096), "32x8:h100", (32, 8)),
}


def traced(shape: tuple[int, ...]) -> Module:
    """The logical train step of a Llama in bf16, without weights."""
    layers, hidden, ffn, heads, kv, vocabulary, batch, length = shape
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=ffn,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv,
        max_position_embeddings=length, use_cache=False, attn_implementation="sdpa",
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).to(torch.bfloat16)
        ids = torch.zeros((batch, length), dtype=torch.int64)
    step = trace_module_train(model, (), {"input_ids": ids, "labels": ids}, optimizer="adamw")
    return step.module


def step_rows(name: str) -> list[dict[str, Any]]:
    """Search time, gap, the check against the price, and the plan against one rank."""
    shape, text, sizes = STEPS[name]
    cluster, module = parse_cluster(text), traced(shape)
    kind = cluster.device.kind
    mesh = Mesh(tuple(zip(("host", "dev"), sizes, strict=True)), kind)
    result = search_mesh(module, mesh, cluster)
    flat = search_mesh(module, Mesh((("rank", cluster.ranks),), kind), cluster)
    alone = search_mesh(module, Mesh((), kind), cluster)
    assert result is not None and flat is not None and alone is not None
    report = result.report[0]
    drift = abs(result.price.total_us / result.objective_us - 1)
    size = f"{report.variables} variables, width {report.treewidth}"
    priced = f"one rank: {alone.objective_us / 1e3:.4g} ms; one axis: {flat.objective_us / 1e3:.4g}"
    return [
        row(f"{name}: search", report.search_s, "s", TARGET_S, size),
        row(f"{name}: gap to the lower bound", report.gap, "", 0.0, "lower bound of the same run"),
        row(f"{name}: price against objective", drift, "", 1e-9, "placed module, priced again"),
        row(f"{name}: plan", result.objective_us / 1e3, "ms", alone.objective_us / 1e3, priced),
        row(f"{name}: memory of a rank", result.price.peak_bytes / 1e9, "GB",
            alone.price.peak_bytes / 1e9, "one rank"),
    ]  # fmt: skip


def table_rows(folder: Path, limit_s: float) -> list[dict[str, Any]]:
    """The solver alone."""
    rows = []
    for path in sorted(folder.glob("*.npz")):
        network = Network()
        with np.load(path, allow_pickle=False) as data:
            for number in data["unary_of"]:
                network.add_variable(_finite(data[f"u{number}"]))
            tables: dict[int, Any] = {}
            for i, j, number in data["edges"].tolist():
                if number not in tables:
                    tables[number] = _finite(data[f"p{number}"])
                network.add_cost(i, j, tables[number])
        solution = solve(network, limit_s)
        assert solution is not None
        what = f"{solution.variables} variables, width {solution.treewidth}"
        rows.append(row(f"{path.stem}: solve", solution.time_s, "s", TABLES_TARGET_S, what))
        gap = solution.cost - solution.lower_bound
        rows.append(row(f"{path.stem}: gap of {solution.cost:.0f} us", gap, "us",
                        1e-6 * solution.cost, "lower bound of the same run"))  # fmt: skip
    return rows


def _finite(table: Any) -> Any:
    return np.where(np.isfinite(table), table, FORBIDDEN)


def row(name: str, value: float, unit: str, target: float, reference: str) -> dict[str, Any]:
    """One line of the result (design.md, section 7); a smaller value is better."""
    return {"name": name, "value": float(f"{value:.6g}"), "unit": unit,
            "target": float(f"{target:.6g}"), "reference": reference,
            "holds": bool(value <= target)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="the smallest step only")
    parser.add_argument("--json", type=Path, help="write the rows to a file")
    parser.add_argument("--data", type=Path, help="a folder of pairwise cost tables")
    options = parser.parse_args()
    rows = table_rows(options.data, 30.0) if options.data else []
    for name in list(STEPS)[:1] if options.quick else STEPS:
        rows += step_rows(name)
    table = Table("measurement", "value", "target", "holds", "against")
    for r in rows:
        table.add_row(
            r["name"], f"{r['value']:.3g} {r['unit']}", f"<= {r['target']:.3g} {r['unit']}",
            "yes" if r["holds"] else "NO", r["reference"],
        )  # fmt: skip
    Console(width=130).print(table)
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
