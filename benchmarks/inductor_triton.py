"""Triton sources that torch.compile's Inductor would emit on an H200, made without a GPU.

The graph is traced on fake CUDA tensors and lowered by `GraphLowering`, which asks the device for
its properties, torch for a CUDA runtime and Triton for a driver: those questions are answered from a
table here, nothing runs. Kernels are compiled for sm_90 in every configuration that Inductor would
time, and the one with the fewest spills, then registers, counts: the best that tuning could choose.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import triton
from torch._dynamo.device_interface import CudaInterface
from torch._inductor import config
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.graph import GraphLowering
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from triton.backends.compiler import GPUTarget

from weft.codegen.binary import Resources, resources
from weft.codegen.compile import _settings

TARGET = GPUTarget("cuda", 90, 32)


class H200:
    """What torch says of the device (CUDA C++ programming guide, compute capability 9.0)."""

    name, major, minor, gcnArchName, warp_size = "NVIDIA H200", 9, 0, "", 32
    multi_processor_count, regs_per_multiprocessor = 132, 65536
    max_threads_per_multi_processor, max_threads_per_block = 2048, 1024
    total_memory, L2_cache_size = 141 * 10**9, 50 * 2**20
    shared_memory_per_block, shared_memory_per_block_optin = 49152, 232448


class _Driver:
    """Triton's driver, as far as a compiler asks for it."""

    def get_current_target(self) -> GPUTarget:
        return TARGET

    def get_current_device(self) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cuda", 0)


def pretend() -> None:
    """Answer torch's, Inductor's and Triton's questions about the device, for this process."""
    def properties(device: object = None) -> type[H200]:
        return H200

    cuda: Any = torch.cuda
    cuda.is_available, cuda.is_initialized = lambda: True, lambda: True
    cuda.device_count, cuda.current_device = lambda: 1, lambda: 0
    cuda.get_device_properties = cuda._get_device_properties = properties
    cuda.get_device_capability = lambda device=None: (9, 0)
    cuda._lazy_init, cuda.synchronize = lambda: None, lambda device=None: None
    cuda.is_bf16_supported = lambda *options: True
    torch.version.cuda = "12.9"
    for owner in (CudaInterface, CudaInterface.Worker):
        owner.get_device_properties = staticmethod(properties)  # type: ignore[method-assign]
    CudaInterface.get_compute_capability = staticmethod(lambda device=None: 90)  # type: ignore[method-assign]
    CudaInterface.is_available = staticmethod(lambda: True)  # type: ignore[method-assign]
    CudaInterface.current_device = staticmethod(lambda: 0)  # type: ignore[method-assign]
    triton.runtime.driver.set_active(_Driver())


@dataclass(frozen=True)
class Emitted:
    """What Inductor makes of a region: kernel launches (library calls among them), bytes that its
    scheduler counts for them, and the needs of each Triton kernel."""

    launches: int
    bytes_moved: int
    needs: tuple[Resources, ...]


def emit(function: Callable[..., Any], inputs: Sequence[torch.Tensor]) -> Emitted:
    """Lower a function of meta tensors; `pretend` was called before."""
    table, mode = select_decomp_table(), FakeTensorMode()
    with FakeTensorMode():  # autograd wants a device guard, which there is for the CPU alone
        graph = make_fx(function, decomposition_table=table)(*_like(inputs, "cpu"))
    graph.graph.eliminate_dead_code()
    for node in graph.graph.nodes:
        if "device" in node.kwargs:
            node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()
    with mode, torch.no_grad(), config.patch(compile_threads=1):
        fakes = _like(inputs, "cuda")
        graph = make_fx(graph, decomposition_table=table)(*fakes)
        lowering = GraphLowering(graph, example_inputs=fakes, is_inference=True)
        with (V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()),
              V.set_fake_mode(mode)):  # fmt: skip
            lowering.run(*fakes)
            code = lowering.codegen()[0]
            moved = lowering.count_bytes()[0]
    text = code if isinstance(code, str) else code.value
    kernels = re.findall(r"async_compile\.triton\('(\w+)', '''(.*?)'''", text, re.S)
    body = text.split("def call(")[-1]
    launches = len(re.findall(r"\.run\(", body))
    launches += len(re.findall(r"extern_kernels\.|= torch\.ops\.aten\.", body))
    needs = tuple(_needs(name, source) for name, source in kernels)
    return Emitted(launches, int(moved), needs)


def _like(tensors: Sequence[torch.Tensor], device: str) -> list[torch.Tensor]:
    return [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device) for x in tensors]


def _needs(name: str, source: str) -> Resources:
    """The needs of a kernel in its best configuration."""
    with TemporaryDirectory() as folder, _settings(Path(folder)):
        path = Path(folder) / f"{name}.py"
        path.write_text(_plain(source), encoding="utf-8")
        space: dict[str, Any] = {"__name__": name, "__file__": str(path)}
        exec(compile(path.read_text(), str(path), "exec"), space)
        return min((_compiled(space[name], config_, Path(folder)) for config_ in space["CONFIGS"]),
                   key=lambda need: (need.spill_bytes, need.registers))  # fmt: skip


def _plain(source: str) -> str:
    """A kernel's source with its heuristics' configurations as the list `CONFIGS`."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if "set_driver_to_gpu" not in ast.unparse(node)]
    (kernel,) = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    heuristics, jit = kernel.decorator_list
    kernel.decorator_list = [jit]
    ask = f"CONFIGS = configurations({ast.unparse(heuristics)}({kernel.name}))"
    helper = "def configurations(tuned):\n    return [(c, tuned.triton_meta) for c in tuned.configs]\n"
    return f"{helper}\n{ast.unparse(tree)}\n\n{ask}\n"


def _compiled(function: Any, choice: tuple[Any, dict[str, Any]], folder: Path) -> Resources:
    chosen, meta = choice
    names = list(meta["signature"])
    constants = {**meta.get("constants", {}), **chosen.kwargs}
    constants = {k if isinstance(k, str) else names[k[0]]: v for k, v in constants.items()}
    signature = {n: "constexpr" if n in constants else kind for n, kind in meta["signature"].items()}
    attrs = dict(meta["configs"][0])
    source = triton.compiler.ASTSource(function, signature, constexprs=constants, attrs=attrs)
    options = {"num_warps": chosen.num_warps, "num_stages": chosen.num_stages}
    compiled = triton.compile(source, target=TARGET, options=options)
    return resources(compiled.asm["cubin"], int(compiled.metadata.shared), folder)
