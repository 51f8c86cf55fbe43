"""Launching a kernel's binary: no Triton, nothing compiled, a few microseconds.

A kernel's file has a device half, the functions with `@triton.jit`, and a host half, `launch`, which
makes results, joins dims and computes the grid. Here the host half runs with a `Device` in the place
of the compiled function. The first call with operands of a form (dtypes, devices, shapes, strides)
runs it and notes what was launched: which arguments are memory of which operand or result, and the
numbers. A later call of the same form allocates the results, writes the addresses into the argument
buffer made then, and launches; so `launch` must depend on nothing but the form of its operands.
"""

from __future__ import annotations

import ast
import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .cubin import BadCubin, read_cubin
from .device_driver import Driver, DriverError

#: what binaries assume of the address of each tensor, and of their numbers that are declared so
ALIGNMENT = 16
#: forms of operands whose argument buffers are kept, the latest ones
_MOST_FORMS = 16
#: Triton type of a number -> size in bytes, and how it is packed
_NUMBERS = {
    "i1": "<?", "i8": "<b", "i16": "<h", "i32": "<i", "i64": "<q", "u8": "<B", "u16": "<H",
    "u32": "<I", "u64": "<Q", "fp32": "<f", "fp64": "<d",
}  # fmt: skip
_POINTER_BYTES = 8
#: Triton's pointer type -> dtypes of tensors
_POINTERS = {
    "*fp64": torch.float64, "*fp32": torch.float32, "*fp16": torch.float16, "*bf16": torch.bfloat16,
    "*fp8e4nv": torch.float8_e4m3fn, "*fp8e5": torch.float8_e5m2, "*i64": torch.int64,
    "*i32": torch.int32, "*i16": torch.int16, "*i8": torch.int8, "*u8": torch.uint8,
    "*i1": torch.bool,
}  # fmt: skip


class Unfit(ValueError):
    """The binary cannot run here, or not on these operands; the message says why."""


def check_binary(entry: Mapping[str, Any], image: bytes) -> None:
    """Raise Unfit where a binary's own argument layout is not what its manifest entry says."""
    declared = [_size_of(kind) for kind in entry["signature"].values()]
    declared += [_POINTER_BYTES] * entry["hidden_pointers"]
    layout = [tuple(pair) for pair in entry["parameters"]]
    if [size for _, size in layout] != declared:
        raise Unfit(f"{entry['name']}: the manifest's arguments are not the binary's parameters")
    if entry["backend"] != "cuda":
        return  # only a cubin says it in a form that is read here
    try:
        info = read_cubin(image)
    except BadCubin as error:
        raise Unfit(f"{entry['name']}: {error}") from None
    if list(info.parameters) != layout or info.entry != entry["entry"]:
        raise Unfit(f"{entry['name']}: the binary has other arguments than its manifest says")


def check_device(entry: Mapping[str, Any], driver: Driver) -> None:
    """Raise Unfit where the current device or its driver cannot run a binary."""
    if entry["backend"] != "cuda":
        return
    try:
        # a driver runs what any toolkit of its major version made (CUDA compatibility, 2.2)
        if driver.version() // 1000 < entry["cuda"] // 1000:
            raise Unfit(
                f"the driver is of CUDA {driver.version() // 1000}, the binary of "
                f"{entry['cuda'] // 1000}.{entry['cuda'] % 1000 // 10}"
            )
        capability, wanted = driver.capability(), int(entry["arch"])
        same = capability // 10 == wanted // 10 and capability >= wanted
        # from 9.0 on, Triton makes binaries of the features of one architecture alone
        if capability != wanted if wanted >= 90 else not same:
            raise Unfit(f"the device has compute capability {capability}, the binary {wanted}")
        if entry["shared_bytes"] > driver.shared_bytes():
            raise Unfit(
                f"the kernel needs {entry['shared_bytes']} bytes of shared memory, the device has "
                f"{driver.shared_bytes()}"
            )
    except DriverError as error:
        raise Unfit(str(error)) from None


def _size_of(kind: str) -> int:
    if kind.startswith("*"):
        return _POINTER_BYTES
    if kind not in _NUMBERS:
        raise Unfit(f"an argument of type {kind} is made by the host, which needs Triton")
    return struct.calcsize(_NUMBERS[kind])


def host_half(path: Path) -> tuple[dict[str, Any], Callable[..., Sequence[Tensor]]]:
    """The names of a kernel's file without Triton and what needs it, and its `launch`."""
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    tree.body = [node for node in tree.body if not _of_triton(node)]
    helpers = SimpleNamespace(
        cdiv=lambda a, b: -(-a // b), next_power_of_2=_next_power_of_2,
        set_allocator=lambda allocator: None,  # `_scratch` is the memory that kernels ask for
    )  # fmt: skip
    space: dict[str, Any] = {"__name__": path.stem, "triton": helpers}
    exec(compile(tree, str(path), "exec"), space)  # noqa: S102: a file of the artifact, hash checked
    launch: Callable[..., Sequence[Tensor]] = space["launch"]
    return space, launch


def _next_power_of_2(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()


def _of_triton(node: ast.stmt) -> bool:
    if isinstance(node, ast.Import):
        return any(alias.name.startswith("triton") for alias in node.names)
    if isinstance(node, ast.ImportFrom):
        return (node.module or "").startswith("triton")
    return isinstance(node, ast.FunctionDef) and bool(node.decorator_list)


@dataclass
class Form:
    """A launch whose numbers are known.

    Attributes:
        results: (size, strides, dtype, device) of each result.
        sources: for each pointer: its slot, the operand (or, counted behind them, the result) whose
            memory it is, and how far behind its first element it points.
        slots: the arguments, 8 bytes each.
        call: arguments of `cuLaunchKernel` up to the stream, and behind it.
    """

    results: list[tuple[torch.Size, tuple[int, ...], torch.dtype, torch.device]]
    sources: list[tuple[int, int, int]]
    slots: Any
    call: tuple[tuple[Any, ...], tuple[Any, ...]]


class BinaryKernel:
    """A kernel of an artifact, `kernel(*operands) -> results`, which runs its binary.

    Args:
        entry: its entry in the manifest.
        path: its source.
        image: the binary.
        driver: the device's driver.
        stream: the handle of the stream to launch on, for a device.

    Raises Unfit where this device cannot run it. Calls raise Unfit where operands have another form
    than the binary was made for, and DriverError where the launch fails. One kernel may be called
    from several threads.
    """

    def __init__(
        self, entry: Mapping[str, Any], path: Path, image: bytes, driver: Driver,
        stream: Callable[[torch.device], int],
    ) -> None:  # fmt: skip
        check_binary(entry, image)
        check_device(entry, driver)
        self.entry, self.driver, self.stream = entry, driver, stream
        self._kinds = list(entry["signature"].items())
        self._aligned = frozenset(entry["multiple_of_16"])
        self._space, self._launch = host_half(path)
        self._space["kernel"] = self
        try:
            self._function = driver.load(image, entry["entry"], entry["shared_bytes"])
        except DriverError as error:
            raise Unfit(str(error)) from None
        self._noted: list[tuple[tuple[int, ...], tuple[Any, ...]]] = []
        self._forms: dict[object, Form] = {}
        self._lock = Lock()

    def __call__(self, *operands: Tensor) -> Sequence[Tensor]:
        """Run the kernel on the current stream."""
        key = tuple([(x.dtype, x.device, x.shape, x.stride()) for x in operands])
        form = self._forms.get(key)
        if form is None:
            return self._first(operands, key)
        results = [torch.empty_strided(size, strides, dtype=dtype, device=device)
                   for size, strides, dtype, device in form.results]  # fmt: skip
        memory = [x.data_ptr() for x in (*operands, *results)]
        with self._lock:
            for slot, source, offset in form.sources:
                address = memory[source] + offset
                if address % ALIGNMENT:
                    break
                form.slots[slot] = address
            else:
                before, behind = form.call
                stream = ctypes.c_void_p(self.stream(form.results[0][3]))
                self._check(self.driver.launch(*before, stream, *behind))
                return results
        return self._first(operands, None)

    def run(self, *operands: Any) -> Sequence[Tensor]:
        """Run the host half, whatever it takes: updates take lists of tensors."""
        with self._lock:
            return self._run(operands)

    def _first(self, operands: Sequence[Tensor], key: object) -> Sequence[Tensor]:
        """Run the host half, and note the launch under `key` where it is one that can be noted."""
        operands = [_fit(x, _device_of(operands)) for x in operands]
        with self._lock:
            try:
                results = self._run(operands)
            except ValueError:  # a view whose strides are not what the binary was made for
                operands = [x.contiguous() for x in operands]
                results = self._run(operands)
            if key is not None and (form := self._form(operands, results)) is not None:
                if len(self._forms) >= _MOST_FORMS:
                    del self._forms[next(iter(self._forms))]
                if tuple([(x.dtype, x.device, x.shape, x.stride()) for x in operands]) == key:
                    self._forms[key] = form
        return results

    def _run(self, operands: Sequence[Any]) -> Sequence[Tensor]:
        self._noted = []
        return self._launch(*operands)

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """What `launch` calls in the place of Triton's function."""

        def launch(*arguments: Any, **options: Any) -> None:
            self._note(grid, arguments, options)

        return launch

    def _note(
        self, grid: tuple[int, ...], arguments: tuple[Any, ...], options: Mapping[str, Any]
    ) -> None:
        constants = {**self.entry["constants"], "num_warps": self.entry["warps"]}
        for name, value in options.items():
            if constants.get(name, value) != value:
                raise Unfit(f"the binary was made for another {name}")
        if len(arguments) != len(self._kinds):
            raise Unfit("the source passes another number of arguments than the binary has")
        slots = (ctypes.c_uint64 * (len(arguments) + self.entry["hidden_pointers"]))()
        for slot, ((name, kind), value) in enumerate(zip(self._kinds, arguments, strict=True)):
            slots[slot] = self._pack(name, kind, value)
        sizes = [*grid, 1, 1][:3]
        if all(sizes):
            scratch = self._scratch(sizes, slots, arguments)
            before, behind = self._call(sizes, slots)
            device = next(x.device for x in arguments if isinstance(x, Tensor))
            stream = ctypes.c_void_p(self.stream(device))
            self._check(self.driver.launch(*before, stream, *behind))
            del scratch
        self._noted.append((tuple(sizes), (slots, arguments)))

    def _pack(self, name: str, kind: str, value: Any) -> int:
        if kind.startswith("*"):
            if not isinstance(value, Tensor) or value.dtype != _POINTERS[kind]:
                raise Unfit(f"{name} is no tensor of type {kind[1:]}")
            if value.data_ptr() % ALIGNMENT:
                raise Unfit(f"{name} does not begin at a multiple of {ALIGNMENT} bytes")
            return int(value.data_ptr())
        if name in self._aligned and value % ALIGNMENT:
            raise Unfit(f"{name} is {value}, not a multiple of {ALIGNMENT}")
        try:
            packed = struct.pack(_NUMBERS[kind], value)
        except struct.error:
            raise Unfit(f"{name} is {value}, which a {kind} cannot hold") from None
        return int.from_bytes(packed, "little")

    def _scratch(self, sizes: Sequence[int], slots: Any, arguments: Sequence[Any]) -> Tensor | None:
        """Memory for descriptors that the kernel makes itself; the first hidden pointer."""
        size = self.entry["scratch_bytes"] * sizes[0] * sizes[1] * sizes[2]
        if not size:
            return None
        device = next(x.device for x in arguments if isinstance(x, Tensor))
        scratch = torch.empty(size, dtype=torch.uint8, device=device)
        slots[len(self._kinds)] = scratch.data_ptr()
        return scratch

    def _call(self, sizes: Sequence[int], slots: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """The arguments of the driver's launch before and behind the stream."""
        start, step = ctypes.addressof(slots), ctypes.sizeof(ctypes.c_uint64)
        places = (ctypes.c_void_p * len(slots))(*(start + i * step for i in range(len(slots))))
        block = (self.entry["threads"], 1, 1)
        numbers = tuple(ctypes.c_uint(n) for n in (*sizes, *block, self.entry["shared_bytes"]))
        return (self._function, *numbers), (places, None)

    def _form(self, operands: Sequence[Tensor], results: Sequence[Tensor]) -> Form | None:
        """What was launched as a form; None where more happens than one launch into new results."""
        if len(self._noted) != 1 or self.entry["scratch_bytes"]:
            return None
        ((sizes, (slots, arguments)),) = self._noted
        if not all(sizes):
            return None
        owners = [x.untyped_storage().data_ptr() for x in (*operands, *results)]
        written = set()
        sources = []
        for slot, value in enumerate(arguments):
            if not isinstance(value, Tensor):
                continue
            memory = value.untyped_storage().data_ptr()
            if memory not in owners:
                return None  # a copy that the host half made
            source = owners.index(memory)
            written.add(source)
            first = (*operands, *results)[source].data_ptr()
            sources.append((slot, source, value.data_ptr() - first))
        fresh = set(range(len(operands), len(owners)))
        if not fresh <= written or len({owners[i] for i in fresh}) != len(fresh):
            return None  # a result is computed behind the launch, or is an operand
        shapes = [(x.size(), x.stride(), x.dtype, x.device) for x in results]
        return Form(shapes, sources, slots, self._call(sizes, slots))

    def _check(self, status: int) -> None:
        if status:
            raise DriverError(f"the launch of {self.entry['name']} returned error {status}")


def _device_of(operands: Sequence[Tensor]) -> torch.device:
    """Where the tensors are; scalars may be on the host."""
    return next((x.device for x in operands if x.device.type != "cpu"), operands[0].device)


def _fit(x: Tensor, device: torch.device) -> Tensor:
    """A tensor on the device, at an address that binaries take."""
    x = x.to(device)
    return x.clone() if x.numel() and x.data_ptr() % ALIGNMENT else x


def current_stream(device: torch.device) -> int:
    """The handle of torch's current stream on a device."""
    # what torch's own compiled code calls: a third of the time of torch.cuda.current_stream
    handle: int = torch._C._cuda_getCurrentRawStream(device.index or 0)
    return handle
