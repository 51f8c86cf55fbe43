"""Generated kernels on a GPU against the best of PyTorch, in one call of under 8 minutes.

    python benchmarks/gpu/run.py                      on a GPU: torch >= 2.11, triton >= 3.6, nothing else
    TRITON_INTERPRET=1 python benchmarks/gpu/run.py   without: every case at a tiny size, checked only

Each case runs weft's kernel and its rivals on the same inputs: results are compared with a float64 (or
float32) reference first, then times are medians of CUDA events over rotated inputs that together are
larger than the L2 cache. The lines give the ratio to the best rival and the project's target for it.
"""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "benchmarks")]

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from regions import REGIONS, outputs_of, weft_module  # noqa: E402
from torch import Tensor  # noqa: E402

from weft.codegen import formats, interp  # noqa: E402
from weft.codegen.attention import Attention, attention_source, default_attention_tile  # noqa: E402
from weft.codegen.emit import emit_kernels, kernel_functions  # noqa: E402
from weft.codegen.expr import Graph  # noqa: E402
from weft.codegen.gemm import Gemm, Result, default_tile, gemm_source  # noqa: E402
from weft.codegen.hole import Tensor as Loaded  # noqa: E402
from weft.codegen.hole import leaf  # noqa: E402
from weft.codegen.linear_loss import LinearLoss, linear_loss_source  # noqa: E402
from weft.codegen.pointwise import gelu  # noqa: E402
from weft.codegen.source import KernelSource, generate  # noqa: E402
from weft.runtime.kernels import load_kernels  # noqa: E402

TINY = interp.enabled()
DEVICE = torch.device("cpu" if TINY else "cuda")
BF16 = torch.bfloat16
#: bytes that rotated inputs have at least: more than twice the 60 MB of L2 of an H200
ROTATED = 150e6
#: seconds after which cases are left out, below the 8 minutes of a call
LIMIT_S = 420
Call = Callable[..., Any]


@dataclass
class Case:
    """One comparison.

    Attributes:
        inputs: makes fresh inputs.
        mine: weft's kernel.
        reference: the same in high precision; the first result is compared.
        rivals: names and functions of the same inputs.
        target: the least that best rival's time / weft's time should be.
        error: allowed error, relative to the largest result.
    """

    name: str
    inputs: Callable[[], list[Tensor]]
    mine: Call
    reference: Call
    rivals: dict[str, Call] = field(default_factory=dict)
    target: float = 1.0
    error: float = 2e-2


def module_of(source: KernelSource) -> Call:
    """The `launch` of a kernel's file."""
    path = Path(tempfile.mkdtemp()) / f"{source.name}.py"
    path.write_text(source.text, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(source.name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    launch: Call = module.launch
    return launch


def normal(*shape: int, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def first(result: Any) -> Tensor:
    tensor: Tensor = result if isinstance(result, Tensor) else result[0]
    return tensor


def tuned(function: Call) -> Call:
    """A function as Inductor compiles it, with everything that it can search."""
    return torch.compile(function, mode="max-autotune-no-cudagraphs", dynamic=False)


def products() -> Iterator[Case]:
    for m, n, k in [(48, 64, 32)] if TINY else [(4096, 4096, 4096), (8192, 11008, 4096)]:
        graph = Graph()
        bare = Gemm("bare", m, n, k, "bf16", (Result("c", "bf16", leaf(graph, "acc") * 1.0),))
        yield Case(
            f"product {m}x{n}x{k} against cuBLAS", lambda m=m, n=n, k=k: [normal(m, k), normal(n, k)],
            module_of(gemm_source(bare, default_tile(bare))), lambda a, b: a.float() @ b.float().T,
            {"cuBLAS": lambda a, b: a @ b.T}, 0.95,
        )  # fmt: skip
        bias, residual = Loaded("bias", "bf16", rows=False), Loaded("residual", "bf16")
        value = gelu(graph, leaf(graph, "acc") + bias.load(graph), "tanh") + residual.load(graph)
        spec = Gemm("fused", m, n, k, "bf16", (Result("c", "bf16", value),), (bias, residual))

        def fused(a: Tensor, b: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
            return F.gelu(F.linear(a, b, bias), approximate="tanh") + residual

        yield Case(
            f"product + bias + gelu + residual {m}x{n}x{k}",
            lambda m=m, n=n, k=k: [normal(m, k), normal(n, k), normal(n), normal(m, n)],
            module_of(gemm_source(spec, default_tile(spec))),
            lambda *x: fused(*(t.float() for t in x)),
            {"Inductor max-autotune": tuned(fused), "eager": fused}, 1.08,
        )  # fmt: skip


def few_rows() -> Iterator[Case]:
    n, k = (64, 256) if TINY else (4096, 4096)
    for m, target in ((1, 3.0), (16, 3.0), (64, 2.0)):
        graph = Graph()
        spec = Gemm("int4", m, n, k, "bf16", (Result("c", "bf16", leaf(graph, "acc") * 1.0),),
                    format=formats.int4())  # fmt: skip

        def inputs(m: int = m) -> list[Tensor]:
            weight = torch.randn(n, k).to(BF16)
            packed = [x.to(DEVICE) for x in formats.pack_int4(weight)]
            return [normal(m, k), *packed, formats.unpack_int4(*packed, k).to(BF16)]

        launch = module_of(gemm_source(spec, default_tile(spec)))
        yield Case(
            f"int4 weights, {m} rows, against bf16", inputs,
            lambda a, p, s, z, w, launch=launch: launch(a, p, s, z),
            lambda a, p, s, z, w: a.float() @ w.float().T,
            {"cuBLAS bf16": lambda a, p, s, z, w: a @ w.T}, target,
        )  # fmt: skip


def attention() -> Iterator[Case]:
    sizes = [(1, 2, 1, 48, 32)] if TINY else [(4, 32, 8, 4096, 128), (1, 16, 16, 8192, 64)]
    for batch, heads, groups, length, d in sizes:
        spec = Attention("attention", "forward", "bf16", heads, groups, length, length, d, d, causal=True)
        launch = module_of(attention_source(spec, default_attention_tile(spec)))
        shapes = [(batch, h, length, d) for h in (heads, groups, groups)]

        def extern(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

        def backend(kind: Any, extern: Call = extern) -> Call:
            def run(*x: Tensor) -> Tensor:
                with torch.nn.attention.sdpa_kernel([kind]):
                    return first(extern(*x))
            return run

        kinds = torch.nn.attention.SDPBackend
        yield Case(
            f"attention, causal, {heads}/{groups} heads of {d}, {length} tokens",
            lambda shapes=shapes: [normal(*shape) for shape in shapes],
            lambda q, k, v, d=d, launch=launch: launch(q, k, v, d**-0.5, 0),
            lambda q, k, v: extern(q.float(), k.float(), v.float()),
            {"cuDNN": backend(kinds.CUDNN_ATTENTION), "flash": backend(kinds.FLASH_ATTENTION)}, 0.75,
        )  # fmt: skip


def losses() -> Iterator[Case]:
    rows, vocabulary, k = (16, 96, 32) if TINY else (8192, 32000, 4096)
    spec = LinearLoss("loss", rows, vocabulary, k, "bf16")

    def plain(x: Tensor, w: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy((x @ w.T).float(), labels, reduction="none")

    yield Case(
        "linear + cross-entropy against the unchunked one",
        lambda: [normal(rows, k), normal(vocabulary, k) * k**-0.5,
                 torch.randint(0, vocabulary, (rows,), device=DEVICE)],
        module_of(linear_loss_source(spec)),
        lambda x, w, labels: plain(x.float(), w.float(), labels),
        {"eager": plain, "Inductor": tuned(plain)}, 1 / 1.10,
    )  # fmt: skip


def row_cases() -> Iterator[tuple[Case, int]]:
    """Row kernels with the bytes that they move; through the artifact's launcher on a GPU."""
    for region in REGIONS:
        small = region.smaller() if TINY else region
        module = weft_module(small, backward=False)
        calls = [op for op in module.entry.ops if op.name == "call"]
        if len(calls) != 1 or len(module.entry.ops) != 1:
            continue  # ops outside of the kernel are not its time
        (function,) = kernel_functions(module)
        source = generate(function)
        order = [value.name for value in module.entry.params]
        places = [order.index(value.name) for value in calls[0].operands]
        results = [value.name for value in calls[0].results]
        main_result = results.index(module.entry.results[0].name)
        launch = module_of(source)
        if not TINY:
            folder = tempfile.mkdtemp()
            emit_kernels(module, folder, "h200")
            launch = load_kernels(folder, DEVICE)[source.name]
        eager = region.function
        case = Case(
            f"{eager.__name__}", lambda small=small: small.samples(DEVICE),
            lambda *x, launch=launch, places=places, r=main_result: launch(
                *(x[i] for i in places))[r],
            lambda *x, eager=eager: outputs_of(eager(*(
                t.float() if t.is_floating_point() else t for t in x)))[0],
            {"eager": eager, "torch.compile": torch.compile(eager, dynamic=False)}, 1.1,
        )  # fmt: skip
        yield case, source.bytes_moved


def check(case: Case) -> float:
    """The error of weft's result relative to the largest element of the reference."""
    inputs = case.inputs()
    got, wanted = first(case.mine(*inputs)).double(), first(case.reference(*inputs)).double()
    return float((got - wanted.reshape(got.shape)).abs().max() / wanted.abs().max().clamp_min(1e-6))


def median_us(run: Call, sets: Sequence[Sequence[Tensor]], seconds: float = 0.4) -> float:
    """Median time of a call on rotated inputs, by CUDA events."""
    turn = itertools.cycle(sets)
    for _ in range(3):
        run(*next(turn))
    torch.cuda.synchronize()
    start = time.perf_counter()
    run(*next(turn))
    torch.cuda.synchronize()
    count = max(10, min(200, int(seconds / max(1e-6, time.perf_counter() - start))))
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
              for _ in range(count)]  # fmt: skip
    for before, behind in events:
        inputs = next(turn)
        before.record()
        run(*inputs)
        behind.record()
    torch.cuda.synchronize()
    return statistics.median(a.elapsed_time(b) for a, b in events) * 1e3


def rotated(case: Case) -> list[list[Tensor]]:
    sets = [case.inputs()]
    size = sum(x.numel() * x.element_size() for x in sets[0])
    return sets + [case.inputs() for _ in range(min(16, int(ROTATED / size)))]


def measure(case: Case) -> dict[str, Any]:
    """Check a case, and on a GPU time it; what is printed of it."""
    row: dict[str, Any] = {"case": case.name, "error": check(case), "target": case.target}
    row["right"] = row["error"] <= case.error
    if TINY:
        return row
    sets = rotated(case)
    row["weft_us"] = median_us(case.mine, sets)
    for name, rival in case.rivals.items():
        try:
            row[f"{name}_us"] = median_us(rival, sets)
        except RuntimeError as error:  # a backend that does not take these inputs
            row[name] = str(error).splitlines()[0][:80]
    times = {n: row[f"{n}_us"] for n in case.rivals if f"{n}_us" in row}
    row["best"], best = min(times.items(), key=lambda item: item[1])
    row["ratio"] = best / row["weft_us"]
    row["holds"] = row["ratio"] >= case.target
    return row


def copy_bytes_per_s() -> float:
    """Bandwidth of a copy of 1 GiB, read and written."""
    x = torch.empty(1 << 30, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.numel() / (median_us(y.copy_, [[x]]) * 1e-6)


def peak_bytes(run: Call, inputs: Sequence[Tensor]) -> int:
    """Memory that a call takes on top of its inputs."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run(*inputs)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def launch_us(case: Case) -> float:
    """Host time of a launch through the artifact's launcher, its results' allocation included."""
    inputs = case.inputs()
    for _ in range(20):
        case.mine(*inputs)
    best = []
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(50):
            case.mine(*inputs)
        best.append((time.perf_counter() - start) / 50 * 1e6)
    return min(best)


def report(row: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    rows.append(row)
    shown = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
    print(json.dumps(shown), flush=True)


def summaries(rows_of: list[tuple[dict[str, Any], int]], small: Case) -> Iterator[dict[str, Any]]:
    """Bandwidths and the mean ratio of the row kernels, memory of the loss, the launch."""
    copy = copy_bytes_per_s()
    parts = [size / (row["weft_us"] * 1e-6) / copy for row, size in rows_of]
    ratios = [row["ratio"] for row, _ in rows_of]
    yield {"case": "row kernels: part of the copy bandwidth", "copy_tb_per_s": copy / 1e12,
           "ratio": statistics.median(parts), "least": min(parts), "target": 0.9,
           "holds": statistics.median(parts) >= 0.9}  # fmt: skip
    mean = statistics.geometric_mean(ratios)
    yield {"case": "row kernels: geometric mean against the faster of eager and torch.compile",
           "ratio": mean, "target": 1.1, "holds": mean >= 1.1}  # fmt: skip
    (loss,) = losses()
    inputs = loss.inputs()
    part = peak_bytes(loss.mine, inputs) / peak_bytes(loss.rivals["eager"], inputs)
    yield {"case": "linear + cross-entropy: memory of the unchunked one", "ratio": part,
           "target": 1 / 3, "holds": part <= 1 / 3}  # fmt: skip
    host = launch_us(small)
    yield {"case": "launch, host time", "us": host, "target": 3.0, "holds": host <= 3.0}


def main() -> int:
    """Run all cases; 1 where a result is wrong."""
    start = time.perf_counter()
    interp.install()
    torch.manual_seed(0)
    rows: list[dict[str, Any]] = []
    row_rows: list[tuple[dict[str, Any], int]] = []
    small = None
    for case, size in row_cases():
        report(measure(case), rows)
        row_rows.append((rows[-1], size))
        small = small or case
    for case in itertools.chain(products(), few_rows(), attention(), losses()):
        if time.perf_counter() - start < LIMIT_S:
            report(measure(case), rows)
    if not TINY and small is not None:
        for row in summaries(row_rows, small):
            report(row, rows)
    if folder := os.environ.get("OUT"):
        (Path(folder) / "gpu.json").write_text(json.dumps(rows, indent=1) + "\n")
    print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s")
    return int(not all(row.get("right", True) for row in rows))


if __name__ == "__main__":
    sys.exit(main())
