"""The file of a kernel: a standalone module with the Triton kernel and its `launch`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from textwrap import indent

from ..ir.module import Function, Value
from ..ir.text import print_op
from ..ir.types import DTYPES, Mesh
from ..passes.space import COLUMN
from .kernel import Kernel, Output, build
from .layout import PERSISTENT, Layout, column_length, layout, local_size, places
from .printer import Body, param_groups

_TORCH = {
    "f64": "float64", "f32": "float32", "f16": "float16", "bf16": "bfloat16",
    "f8e4m3": "float8_e4m3fn", "f8e5m2": "float8_e5m2", "i64": "int64", "i32": "int32",
    "i16": "int16", "i8": "int8", "u8": "uint8", "bool": "bool",
}  # fmt: skip
#: Triton's names of pointer element types, in a signature for compilation ahead of time
_POINTER = {
    "f64": "*fp64", "f32": "*fp32", "f16": "*fp16", "bf16": "*bf16", "f8e4m3": "*fp8e4nv",
    "f8e5m2": "*fp8e5", "i64": "*i64", "i32": "*i32", "i16": "*i16", "i8": "*i8", "u8": "*u8",
    "bool": "*i1",
}  # fmt: skip


@dataclass(frozen=True)
class KernelSource:
    """A kernel, ready to be written and compiled.

    Attributes:
        name: the kernel's name, and its file's.
        text: the Python source.
        signature: Triton type of each argument of the kernel, in order, constants excluded.
        constants: the values of its `tl.constexpr` arguments.
        aligned: its integer arguments that are multiples of 16 wherever the tensors are contiguous
            and the column has the length that its type says.
        warps: warps of a program.
        kind: see `Layout`.
        bytes_moved: bytes that it reads and writes on the global shapes.
        bytes_unfused: the same when every op of it is a kernel of its own.
        launches_behind, bytes_behind: library calls that finish its sums over rows, and what they
            move.
        stages: tiles of a loop that are on their way at the same time; 0 is Triton's default.
    """

    name: str
    text: str
    signature: dict[str, str]
    constants: dict[str, int]
    aligned: tuple[str, ...]
    warps: int
    kind: str
    bytes_moved: int
    bytes_unfused: int
    stages: int = 0
    launches_behind: int = 0
    bytes_behind: int = 0


def generate(
    function: Function, mesh: Mesh | None = None, *, persistent: int = PERSISTENT,
    plan: Layout | None = None,
) -> KernelSource:  # fmt: skip
    """The Triton source of a kernel function.

    Args:
        mesh: the mesh of its module; tells how long a split column is on one rank.
        persistent: longest row that is kept in registers instead of being read again.
        plan: how it walks; by default what `layout` chooses.

    Raises CompileError W0901 where it cannot be generated.
    """
    kernel = build(function)
    plan = plan or layout(kernel, mesh, persistent)
    arguments = _arguments(kernel, plan)
    constants = {"BLOCK_M": plan.block_m, "BLOCK_N": plan.block_n}
    if plan.kind == "flat":
        del constants["BLOCK_M"]
    text = "\n".join(
        [
            _docstring(kernel, plan),
            "import torch",
            "import triton",
            "import triton.language as tl",
            "",
            *(f"{name} = {value}" for name, value in constants.items()),
            f"NUM_WARPS = {plan.warps}",
            "",
            "",
            "@triton.jit",
            "def kernel(",
            *_wrapped([*arguments, *(f"{c}: tl.constexpr" for c in constants)]),
            "):",
            *(f"    {line}" for line in Body(kernel, plan).print()),
            "",
            "",
            *_STRIDED,
            "",
            "",
            *_launch(kernel, plan, list(arguments), list(constants)),
            "",
        ]
    )
    moved, unfused = _traffic(function)
    aligned = _aligned(kernel, plan, arguments)
    behind = _behind(kernel, plan, mesh)
    return KernelSource(
        kernel.name, text, arguments, constants, aligned, plan.warps, plan.kind, moved, unfused,
        launches_behind=behind[0], bytes_behind=behind[1],
    )  # fmt: skip


def _aligned(kernel: Kernel, plan: Layout, arguments: Iterable[str]) -> tuple[str, ...]:
    """Numbers that are multiples of 16 on every rank, for contiguous tensors.

    A stride is one where it counts columns of a multiple of 16 elements. A split column has equal
    parts and a rest: both are multiples where the part and the whole are.
    """
    column = kernel.space.column
    size = column.size if column is not None else 1
    even = plan.columns % 16 == 0 and (bool(plan.tail) or size % 16 == 0)
    found = {"n_cols"} if even else set()
    for name, value in kernel.params:
        length = column_length(kernel, value)
        if length and (even if length == size else length % 16 == 0):
            found |= {f"{name}_s{g}" for g in param_groups(kernel, plan, value)}
    return tuple(name for name in arguments if name in found)


_STRIDED = '''\
def strided(tensor, *shape):
    """The tensor with its dims joined to `shape`; a copy only where that needs one."""
    tensor = tensor.reshape(shape)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] < 2 else tensor.contiguous()'''.split(
    "\n"
)


def _wrapped(names: list[str]) -> list[str]:
    """Indented lines of names, each followed by a comma."""
    lines: list[str] = []
    line = ""
    for name in names:
        if len(line) + len(name) > 92:
            lines, line = [*lines, line], ""
        line = f"{line} {name}," if line else f"    {name},"
    return [*lines, line]


def _arguments(kernel: Kernel, plan: Layout) -> dict[str, str]:
    """The kernel's arguments and their Triton types."""
    out = {f"{name}_ptr": _POINTER[value.type.dtype] for name, value in kernel.params}
    out.update({f"{o.name}_ptr": _POINTER[_stored(o)] for o in kernel.outputs})
    if plan.kind == "flat":
        return {**out, "n_cols": "i32"}
    for name, value in kernel.params:
        out.update({f"{name}_s{g}": "i32" for g in param_groups(kernel, plan, value)})
    out.update({f"size_{g}": "i32" for g in range(1, len(plan.groups))})
    out.update({"n_rows": "i32", "n_cols": "i32"})
    return {**out, "n_strips": "i32"} if plan.strips else out


def _stored(output: Output) -> str:
    """The dtype in which the kernel stores a result: sums over rows are stored strip by strip."""
    return output.node.dtype if output.node.op == "row_sum" else output.value.type.dtype


def _docstring(kernel: Kernel, plan: Layout) -> str:
    function = kernel.function
    places_ = dict.fromkeys(str(op.loc) for op in function.ops if str(op.loc))
    lines = [f'"""Kernel {kernel.name}, {plan.kind}.', ""]
    if places_:
        lines += ["From", *(f"    {place}" for place in list(places_)[:6]), ""]
    lines += ["Computes"]
    lines += [f"    {print_op(op.with_(split={}))}" for op in function.ops]
    results = ", ".join(f"%{value.name}" for value in function.results)
    lines += [f"    return {results}", '"""', ""]
    return "\n".join(line.replace("\\", "\\\\") for line in lines)


def _launch(kernel: Kernel, plan: Layout, arguments: list[str], constants: list[str]) -> list[str]:
    """The lines of `launch`."""
    names = [name for name, _ in kernel.params]
    device = next(
        (name for name, value in kernel.params if places(kernel, value)),
        names[0],  # a scalar may be on another device than the tensors are
    )
    lines = _sizes(kernel, plan)
    sums = _row_sums(kernel)
    for dtype, group in sums.items():
        shape = f"{len(group)}, n_strips, n_cols"
        lines.append(f"{_sums(dtype)} = torch.empty(({shape}), dtype=torch.{_TORCH[dtype]}, "
                     f"device={device}.device)")  # fmt: skip
        lines += [f"{o.name} = {_sums(dtype)}[{i}]" for i, o in enumerate(group)]
    for output in kernel.outputs:
        if output.node.op != "row_sum":
            made = f"({_shape(kernel, output).strip()}), dtype=torch.{_TORCH[_stored(output)]}"
            lines.append(f"{output.name} = torch.empty({made}, device={device}.device)")
    work = _views(kernel, plan)
    values = [_argument(kernel, plan, argument) for argument in arguments]
    options = [f"{name}={name}" for name in constants] + ["num_warps=NUM_WARPS"]
    work += [f"grid = ({_grid(plan)},)"]
    call = ["kernel[grid]("] + [f"    {value}," for value in (*values, *options)] + [")"]
    total = "n_cols" if plan.kind == "flat" else "n_rows * n_cols"
    lines += [f"if {total}:", *(indent(line, "    ") for line in work + call)]
    for dtype, group in sums.items():
        lines.append(f"{_sums(dtype)} = {_sums(dtype)}.sum(1)")
        for wanted in dict.fromkeys(o.value.type.dtype for o in group):
            cast = f"{_sums(dtype)}_{wanted}"
            lines.append(f"{cast} = {_sums(dtype)}.to(torch.{_TORCH[wanted]})")
            lines += [
                f"{o.name} = {cast}[{i}].reshape(({_shape(kernel, o).strip()}))"
                for i, o in enumerate(group) if o.value.type.dtype == wanted
            ]  # fmt: skip
    lines.append(f"return ({', '.join(o.name for o in kernel.outputs)},)")
    doc = f'"""Run the kernel: ({", ".join(_shown(v) for _, v in kernel.params)}) -> ' \
          f'({", ".join(_shown(o.value) for o in kernel.outputs)})."""'  # fmt: skip
    return [f"def launch({', '.join(names)}):", *(f"    {line}" for line in [doc, *lines])]


def _sums(dtype: str) -> str:
    """The tensor of `launch` that holds sums over rows of a compute dtype."""
    return f"sums_{dtype}"


def _row_sums(kernel: Kernel) -> dict[str, list[Output]]:
    """Sums over rows by compute dtype: those of one dtype share a tensor, so that one call ends them."""
    found: dict[str, list[Output]] = {}
    for output in kernel.outputs:
        if output.node.op == "row_sum":
            found.setdefault(output.node.dtype, []).append(output)
    return found


def _behind(kernel: Kernel, plan: Layout, mesh: Mesh | None) -> tuple[int, int]:
    """(library calls that end the sums over rows, bytes that they move)."""
    calls = moved = 0
    for dtype, group in _row_sums(kernel).items():
        casts = {o.value.type.dtype for o in group} - {dtype}
        rows = prod(local_size(extent, mesh) for extent in kernel.space.rows)
        strips = min(plan.strips, -(-rows // plan.block_m))
        line = len(group) * plan.columns * DTYPES[dtype]
        calls += 1 + len(casts)
        # partial sums are written by the kernel, whose results count elsewhere, and read once
        moved += 2 * strips * line + len(casts) * 2 * line
    return calls, moved


def _shape(kernel: Kernel, output: Output) -> str:
    """The shape of a result in `launch`, each size followed by a comma."""
    rank = len(output.value.type.shape)
    return "".join(f"{_dim(kernel, output.value, d)}, " for d in range(rank))


def _shown(value: Value) -> str:
    return str(value.type.placed(None))


def _sizes(kernel: Kernel, plan: Layout) -> list[str]:
    """Sizes of the dims of the space, read from the tensors that have them."""
    found: dict[int, str] = {}
    column = kernel.space.column
    for name, value in kernel.params:
        for d, place in enumerate(kernel.space.maps[value.name]):
            if place is None or (place == COLUMN and column and value.type.shape[d] != column.size):
                continue
            found.setdefault(place, f"{name}.shape[{d}]")
    lines = [f"d{row} = {found[row]}" for row in range(len(kernel.space.rows))]
    size = found.get(COLUMN, str(column.size) if column else "1")
    lines.append(f"n = {size}")
    lines.append(f"n_cols = {' * '.join([*(f'd{row}' for row in plan.tail), 'n'])}")
    if plan.kind != "flat":
        rows = [f"d{row}" for dims in plan.groups for row in dims]
        lines.append(f"n_rows = {' * '.join(rows) or '1'}")
    if plan.strips:
        lines.append(f"n_strips = min({plan.strips}, triton.cdiv(n_rows, BLOCK_M))")
    return lines


def _dim(kernel: Kernel, value: Value, d: int) -> str:
    """The size of a tensor dim in `launch`."""
    place = kernel.space.maps[value.name][d]
    if place is None:
        return "1"
    if place != COLUMN:
        return f"d{place}"
    column = kernel.space.column
    length = value.type.shape[d]
    return "n" if column is not None and length == column.size else str(length)


def _views(kernel: Kernel, plan: Layout) -> list[str]:
    """Lines that join the dims of each parameter as the kernel walks them."""
    lines = []
    for name, value in kernel.params:
        have = places(kernel, value)
        if not have:
            continue
        if plan.kind == "flat":
            lines.append(f"{name} = {name}.contiguous()")
            continue
        shape = [
            " * ".join(f"d{row}" for row in plan.groups[g])
            for g in param_groups(kernel, plan, value)
        ]
        length = column_length(kernel, value)
        column = kernel.space.column
        if length:
            whole = column is not None and length == column.size
            shape.append("n_cols" if whole else str(length))
        # a tensor without the column is read by rows alone, whatever its last stride
        join = "strided(" + name + ", " if length else f"{name}.reshape("
        lines.append(f"{name} = {join}{', '.join(shape)})")
    return lines


def _argument(kernel: Kernel, plan: Layout, argument: str) -> str:
    """What `launch` passes for an argument of the kernel."""
    if argument in ("n_rows", "n_cols", "n_strips"):
        return argument
    if argument.endswith("_ptr"):
        return argument[: -len("_ptr")]
    stem, _, number = argument.rpartition("_")
    if stem == "size":
        return " * ".join(f"d{row}" for row in plan.groups[int(number)])
    value = dict(kernel.params)[stem]
    position = param_groups(kernel, plan, value).index(int(number[1:]))
    return f"{stem}.stride({position})"


def _grid(plan: Layout) -> str:
    if plan.kind == "flat":
        return "triton.cdiv(n_cols, BLOCK_N)"
    rows = "n_strips" if plan.strips else "triton.cdiv(n_rows, BLOCK_M)"
    return f"{rows} * triton.cdiv(n_cols, BLOCK_N)" if plan.kind == "tile" else rows


def _traffic(function: Function) -> tuple[int, int]:
    """(bytes of the kernel, bytes of its ops one by one), on the global shapes."""
    fused = sum(value.type.bytes for value in (*function.params, *function.results))
    unfused = 0
    for op in function.ops:
        if op.name in ("constant", "expand", "reshape", "permute", "slice"):
            continue  # views and numbers move nothing
        operands = {value.name: value for value in op.operands}
        unfused += sum(value.type.bytes for value in operands.values())
        unfused += sum(value.type.bytes for value in op.results)
    return fused, unfused
