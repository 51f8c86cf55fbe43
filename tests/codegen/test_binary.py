"""The launcher of binaries, against a driver in C that keeps what it is asked to launch."""

from __future__ import annotations

import ctypes
import json
import logging
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.codegen.kit import load, only_kernel, program, samples
from tests.codegen.programs import PROGRAMS, tensor
from torch import Tensor

from weft.codegen.compile import available
from weft.codegen.emit import emit_kernels, kernel_functions
from weft.codegen.source import generate
from weft.ir.builder import Builder
from weft.ir.errors import RunError
from weft.ir.module import Function, Module, Value
from weft.ir.types import TensorType
from weft.passes.fuse import fuse
from weft.runtime.binary import Unfit, check_binary
from weft.runtime.cubin import BadCubin, read_cubin
from weft.runtime.device_driver import Driver, DriverError
from weft.runtime.kernels import load_kernels
from weft.runtime.wrapper import Kernel

COMPILER = shutil.which("cc")
pytestmark = pytest.mark.skipif(
    not available() or COMPILER is None, reason="Triton or a C compiler is missing"
)
STREAM = 77


class Launch(ctypes.Structure):
    """What the C driver keeps of a launch."""

    _fields_ = [
        ("grid", ctypes.c_uint32 * 3), ("block", ctypes.c_uint32 * 3), ("shared", ctypes.c_uint32),
        ("count", ctypes.c_uint32), ("function", ctypes.c_uint64), ("stream", ctypes.c_uint64),
        ("arguments", ctypes.c_uint8 * 8 * 64),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("driver") / "libcuda.so"
    source = Path(__file__).parent / "fake_cuda.c"
    assert COMPILER is not None
    subprocess.run([COMPILER, "-O1", "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return path


@pytest.fixture
def fake(library: Path) -> Iterator[ctypes.CDLL]:
    """The driver's library, with what it answers as at the start."""
    lib = ctypes.CDLL(str(library))
    settings = {"version": 13000, "capability": 90, "shared_optin": 232448, "load_error": 0,
                "launch_error": 0, "launches": 0, "dynamic_shared": 0}  # fmt: skip
    for name, value in settings.items():
        ctypes.c_int.in_dll(lib, name).value = value
    yield lib


def tell(lib: ctypes.CDLL, **answers: int) -> None:
    for name, value in answers.items():
        ctypes.c_int.in_dll(lib, name).value = value


def number(lib: ctypes.CDLL, name: str) -> int:
    return ctypes.c_int.in_dll(lib, name).value


def function_of(name: str, columns: int = 256) -> Function:
    return only_kernel(PROGRAMS[name]("bf16", (4, 8), columns))


def emitted(function: Function, folder: Path) -> dict[str, Any]:
    """The manifest entry of one kernel, written into a folder for an H100."""
    (entry,) = emit_kernels(Module("logical", (function,)), folder, "h100")["kernels"]
    return dict(entry)


def loaded(folder: Path, library: Path) -> Kernel:
    driver = Driver("cuda", str(library))
    (kernel,) = load_kernels(folder, driver=driver, stream=lambda device: STREAM).values()
    return kernel


def expect(lib: ctypes.CDLL, entry: dict[str, Any]) -> None:
    """Tell the driver how many arguments come, and how large they are."""
    ctypes.c_uint32.in_dll(lib, "arguments").value = len(entry["parameters"])
    sizes = (ctypes.c_uint32 * 64).in_dll(lib, "sizes")
    for i, (_, size) in enumerate(entry["parameters"]):
        sizes[i] = size


def launched(lib: ctypes.CDLL, entry: dict[str, Any]) -> tuple[tuple[int, ...], list[int]]:
    """Grid and arguments of the last launch."""
    last = Launch.in_dll(lib, "last")
    values = []
    for i, (_, size) in enumerate(entry["parameters"]):
        values.append(struct.unpack("<Q" if size == 8 else "<i", bytes(last.arguments[i])[:size])[0])
    return tuple(last.grid), values


def by_source(
    function: Function, operands: Sequence[Tensor], folder: Path
) -> tuple[tuple[int, ...], list[Any]]:
    """Grid and arguments that the source passes to Triton."""
    module = load(generate(function), folder)
    found: list[tuple[tuple[int, ...], list[Any]]] = []

    class Recorder:
        def __getitem__(self, grid: tuple[int, ...]) -> Any:
            return lambda *arguments, **options: found.append((grid, list(arguments)))

    module.kernel = Recorder()  # type: ignore[attr-defined]
    module.launch(*operands)
    ((grid, arguments),) = found
    return (*grid, 1, 1)[:3], arguments


NAMES = ["residual_rms_norm", "swiglu_packed", "rope", "cross_entropy", "adamw", "norm_backward"]


@pytest.mark.parametrize("name", NAMES)
def test_a_binary_gets_the_arguments_that_triton_would(
    name: str, library: Path, fake: ctypes.CDLL, tmp_path: Path
) -> None:
    """First by the host half, then from the buffer kept of it, on other tensors of the same form."""
    function = function_of(name)
    entry = emitted(function, tmp_path)
    expect(fake, entry)
    kernel = loaded(tmp_path, library)
    for call in range(3):
        operands = samples(function, seed=call)
        results = kernel(*operands)
        grid, values = launched(fake, entry)
        wanted_grid, wanted = by_source(function, operands, tmp_path)
        assert grid == wanted_grid
        assert number(fake, "launches") == call + 1
        known = {x.data_ptr() for x in (*operands, *results)}
        for got, value in zip(values, wanted, strict=False):
            if not isinstance(value, Tensor):
                assert got == value
            elif value.data_ptr() in known:  # not a result, which is another tensor each time
                assert got == value.data_ptr()
        assert values[len(wanted):] == [0] * entry["hidden_pointers"]
        for value, result in zip(function.results, results, strict=True):
            assert tuple(result.shape) == value.type.shape
    last = Launch.in_dll(fake, "last")
    assert (tuple(last.block), last.shared) == ((entry["threads"], 1, 1), entry["shared_bytes"])
    assert last.stream == STREAM and last.function > 1000
    assert ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(fake, "function_name"))) == b"kernel"


def test_updates_of_many_parameters_are_one_launch(
    library: Path, fake: ctypes.CDLL, tmp_path: Path
) -> None:
    """Each line of the kernel's table: addresses, size, first element of a chunk."""
    b = Builder()
    operands = [b.param(TensorType("f32", (4, 4)), name) for name in "pg"]
    operands += [b.param(TensorType("f64", ()), name) for name in ("step", "lr")]
    module = Module("logical", (b.function("main", [b.one("sgd_update", operands)]),))
    (entry,) = emit_kernels(module, tmp_path, "h100")["kernels"]
    assert entry["kind"] == "update" and entry["spill_bytes"] == 0
    expect(fake, entry)
    kernel = loaded(tmp_path, library)
    params, grads = ([torch.rand(n) for n in (70_000, 3, 0)] for _ in range(2))
    number_of = torch.tensor(1.0, dtype=torch.float64)
    assert kernel(params, grads, number_of, number_of) == ()
    grid, values = launched(fake, entry)
    assert grid == (3, 1, 1) and number(fake, "launches") == 1
    table = (ctypes.c_int64 * 12).from_address(values[0])
    where = [[x[i].data_ptr() for x in (params, grads)] for i in (0, 0, 1)]
    assert list(table) == [*where[0], 70_000, 0, *where[1], 70_000, 1 << 16, *where[2], 3, 0]


def test_results_and_pointers_follow_each_call(
    library: Path, fake: ctypes.CDLL, tmp_path: Path
) -> None:
    function = function_of("swiglu")
    entry = emitted(function, tmp_path)
    expect(fake, entry)
    kernel = loaded(tmp_path, library)
    for rows in (4, 4, 2, 4, 1):
        operands = [torch.randn(rows, 8, 256, dtype=torch.bfloat16) for _ in range(2)]
        (result,) = kernel(*operands)
        _, values = launched(fake, entry)
        assert values[:3] == [*(x.data_ptr() for x in operands), result.data_ptr()]
        assert values[3] == rows * 8 * 256 and result.shape == (rows, 8, 256)


def test_operands_that_a_binary_does_not_take_are_copied(
    library: Path, fake: ctypes.CDLL, tmp_path: Path
) -> None:
    """An address or a stride that is no multiple of 16 where the binary was told that it is one."""
    function = function_of("residual_rms_norm")
    entry = emitted(function, tmp_path)
    assert {"x_s0", "r_s0", "n_cols"} <= set(entry["multiple_of_16"])
    expect(fake, entry)
    kernel = loaded(tmp_path, library)
    x, r, w = samples(function)
    odd = torch.randn(4, 8, 257).bfloat16()[..., 1:]
    assert odd.data_ptr() % 16 and odd.stride(1) == 257
    kernel(x, r, w)
    for operands in ((odd, r, w), (x, odd, w), (x, r, odd[0, 0])):
        for _ in range(2):
            kernel(*operands)
            _, values = launched(fake, entry)
            assert all(address % 16 == 0 for address in values[:5])
            assert values[5:9] == [256, 256, 32, 256]


def test_nothing_is_launched_for_empty_tensors(
    library: Path, fake: ctypes.CDLL, tmp_path: Path
) -> None:
    function = function_of("swiglu")
    expect(fake, emitted(function, tmp_path))
    empty = torch.empty(0, 8, 256, dtype=torch.bfloat16)
    kernel = loaded(tmp_path, library)
    for _ in range(2):
        (result,) = kernel(empty, empty)
        assert result.shape == (0, 8, 256)
    assert number(fake, "launches") == 0


@pytest.mark.parametrize(
    ("answers", "words"),
    [
        ({"version": 11080}, "driver is of CUDA 11"),
        ({"capability": 80}, "compute capability 80"),
        ({"shared_optin": 8, "capability": 90}, None),
        ({"load_error": 209}, "error 209"),
    ],
)
def test_a_device_that_cannot_run_the_binary_runs_the_source(
    answers: dict[str, int], words: str | None, library: Path, fake: ctypes.CDLL, tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    function = function_of("swiglu")
    entry = emitted(function, tmp_path)
    if words is None:  # a kernel that needs much shared memory, on a device with less
        manifest = json.loads((tmp_path / "manifest.json").read_text())
        manifest["kernels"][0]["shared_bytes"] = 200_000
        (tmp_path / "manifest.json").write_text(json.dumps(manifest))
        words, answers = "200000 bytes of shared memory", {"shared_optin": 101376}
    expect(fake, entry)
    tell(fake, **answers)
    with caplog.at_level(logging.WARNING, "weft.kernels"):
        kernel = loaded(tmp_path, library)
    assert words in caplog.text and entry["name"] in caplog.text
    assert type(kernel).__name__ == "_Source"


def test_much_shared_memory_is_asked_for(library: Path, fake: ctypes.CDLL, tmp_path: Path) -> None:
    emitted(function_of("swiglu"), tmp_path)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    manifest["kernels"][0]["shared_bytes"] = 100_000
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    loaded(tmp_path, library)
    assert number(fake, "dynamic_shared") == 100_000


def test_a_failed_launch_is_an_error(library: Path, fake: ctypes.CDLL, tmp_path: Path) -> None:
    function = function_of("swiglu")
    expect(fake, emitted(function, tmp_path))
    kernel = loaded(tmp_path, library)
    operands = samples(function)
    kernel(*operands)
    tell(fake, launch_error=700)
    with pytest.raises(DriverError, match="700"):
        kernel(*operands)


def test_a_layout_that_is_not_the_binarys_is_refused(tmp_path: Path) -> None:
    entry = emitted(function_of("swiglu"), tmp_path)
    image = (tmp_path / entry["binary"]).read_bytes()
    check_binary(entry, image)
    fewer = {**entry, "signature": dict(list(entry["signature"].items())[:-1])}
    moved = {**entry, "parameters": [[offset + 8, size] for offset, size in entry["parameters"]]}
    for wrong in (fewer, moved, {**entry, "hidden_pointers": 1}, {**entry, "entry": "other"}):
        with pytest.raises(Unfit):
            check_binary(wrong, image)
    with pytest.raises(Unfit):
        check_binary(entry, image[:100])


def test_a_changed_binary_is_refused(library: Path, tmp_path: Path) -> None:
    entry = emitted(function_of("swiglu"), tmp_path)
    path = tmp_path / entry["binary"]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(RunError, match="W0701"):
        loaded(tmp_path, library)


def test_a_damaged_cubin_is_told(tmp_path: Path) -> None:
    entry = emitted(function_of("swiglu"), tmp_path)
    image = (tmp_path / entry["binary"]).read_bytes()
    assert read_cubin(image).threads == entry["threads"]
    for cut in (b"", image[:4], image[: len(image) // 2], b"\x7fELF\x02" + bytes(100)):
        with pytest.raises(BadCubin):
            read_cubin(cut)


def test_there_may_be_no_driver(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with pytest.raises(DriverError, match="no cuda driver"):
        Driver("cuda", str(tmp_path / "libcuda.so.1"))


def test_a_plan_runs_without_triton(library: Path, tmp_path: Path) -> None:
    """In a process where Triton cannot be imported: launches, and what falls back to ATen."""
    module = fuse(PROGRAMS["swiglu"]("bf16", (4, 8), 256))
    emit_kernels(module, tmp_path, "h100")
    script = f"""
import sys
sys.modules["triton"] = None
import torch
from weft.runtime.device_driver import Driver
from weft.runtime.kernels import load_kernels
driver = Driver("cuda", {str(library)!r})
(kernel,) = load_kernels({str(tmp_path)!r}, driver=driver, stream=lambda d: 0).values()
x = torch.randn(4, 8, 256).bfloat16()
print(kernel(x, x)[0].shape)
assert not any(name.startswith(("weft.codegen", "weft.passes")) for name in sys.modules)
driver._library.cuDriverGetVersion = lambda found: 1
print(load_kernels({str(tmp_path)!r}, driver=driver, stream=lambda d: 0))
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert run.stdout.splitlines() == ["torch.Size([4, 8, 256])", "{}"], run.stderr[-2000:]
    assert "runs ATen" in run.stderr


def persistent_product(b: Builder) -> list[Value]:
    """128 rows: the variant whose tensor descriptors live in memory of the launcher."""
    x, w = b.param(tensor("bf16", 2, 64, 128), "x"), b.param(tensor("bf16", 256, 128), "w")
    y = b.one("einsum", [x, w], {"spec": "a b k, n k -> a b n"})
    return [b.one("relu", [b.one("exp", [y])])]


def few_rows(b: Builder) -> list[Value]:
    """Two results of a product whose weight is the left operand."""
    x, w = b.param(tensor("bf16", 8, 128), "x"), b.param(tensor("bf16", 96, 128), "w")
    bias = b.param(tensor("f32", 96), "bias")
    y = b.one("einsum", [x, w], {"spec": "m k, n k -> m n"})
    y = b.one("add", [b.one("cast", [y], types=[tensor("f32", 8, 96)]), bias],
              types=[tensor("f32", 8, 96)])  # fmt: skip
    return [y, b.one("exp", [y])]


def causal_attention(b: Builder) -> list[Value]:
    q, k, v = (b.param(tensor("bf16", 2, h, 256, 64), name) for h, name in ((4, "q"), (2, "k"), (2, "v")))
    return list(b.op("attention", [q, k, v], {"causal": True, "scale": 0.125}))


@pytest.mark.parametrize(
    "make, grid", [(persistent_product, 1), (few_rows, 2), (causal_attention, 2)]
)
def test_contractions_are_launched_from_their_binaries(
    make: Callable[[Builder], list[Value]], grid: int, library: Path, fake: ctypes.CDLL, tmp_path: Path
) -> None:
    (function,) = kernel_functions(fuse(program(make), contractions=True))
    entry = emitted(function, tmp_path)
    assert not entry["fallback"], entry["reason"]
    assert entry["matrix"].startswith("HGMMA") and not entry["spill_bytes"]
    expect(fake, entry)
    kernel = loaded(tmp_path, library)
    for _ in range(2):
        operands = samples(function)
        results = kernel(*operands)
        assert [tuple(x.shape) for x in results] == [v.type.shape for v in function.results]
        blocks, values = launched(fake, entry)
        assert blocks[0] == grid
        assert [x.data_ptr() for x in results] == [
            value for name, value in zip(entry["signature"], values, strict=False)
            if name in ("out_ptr", "lse_ptr") or name.endswith("_out_ptr")
        ]  # fmt: skip
    assert number(fake, "launches") == 2
