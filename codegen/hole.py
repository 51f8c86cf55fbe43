"""Holes of skeletons: places of a hand-written kernel that expressions fill.

An expression of a hole is a DAG of `expr.Node` over one point of the tile that the skeleton holds:
`acc`, `a`, `score` and so on are leaves that it names, `row` and `column` are the logical indices
of the point, and a load reads a tensor of the hole at (row, column), at the row, at the column, or
a scalar, as its `rows` and `column` say.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from textwrap import dedent, indent

from .expr import Graph, Node, compute_dtype
from .printer import TL, Printer, number
from .source import _POINTER as POINTER
from .source import KernelSource, _wrapped


@dataclass(frozen=True)
class Tensor:
    """A tensor that a hole loads: its name in the text, its storage dtype, and its dims."""

    name: str
    dtype: str
    rows: bool = True
    column: bool = True

    def load(self, graph: Graph) -> Node:
        """The tensor at the point."""
        return graph.make("load", (), compute_dtype(self.dtype), (self.name, 0),
                          rows=self.rows, column=self.column)  # fmt: skip

    @property
    def stride(self) -> str:
        """The argument with its row stride; empty where it has none."""
        return f"{self.name}_s0" if self.rows and self.column else ""


def leaf(graph: Graph, name: str, dtype: str = "f32") -> Node:
    """A leaf that the skeleton names: `acc`, `a`, `b`, `score`, `grad`."""
    return graph.make(name, (), dtype, rows=True, column=True)


class Hole(Printer):
    """Prints the expressions of one hole.

    Args:
        prefix: of the names that it makes; two holes of a kernel must not share names.
        leaves: texts of the skeleton's leaves, `row` and `column` among them.
        tensors: what the hole loads.
        masks: texts that say whether the row, the column are inside; empty: they always are.
        bases: pointers of tensors that do not start at `NAME_ptr`.

    `outer` are lines that do not depend on the column, for holes within a loop along it.
    """

    def __init__(
        self, prefix: str, leaves: Mapping[str, str], tensors: Iterable[Tensor],
        masks: tuple[str, str], bases: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        super().__init__()
        self.prefix, self.leaves, self.masks, self.bases = prefix, leaves, masks, bases or {}
        self.tensors = {tensor.name: tensor for tensor in tensors}
        self.lines: list[str] = []
        self.outer: list[str] = []
        self.memo: dict[int, str] = {}

    def emit(self, node: Node) -> str:
        """See `Printer`."""
        if node.op == "const":
            return number(node.data[0], node.dtype)  # type: ignore[arg-type]
        if id(node) not in self.memo:
            stem, text = self._text(node)
            name = text
            if not text.isidentifier():
                name = self._name(f"{self.prefix}_{stem}")
                (self.lines if node.column else self.outer).append(f"{name} = {text}")
            self.memo[id(node)] = name
        return self.memo[id(node)]

    def leaf(self, node: Node) -> tuple[str, str]:
        """See `Printer`."""
        if node.op != "load":
            return node.op, self.leaves[node.op]
        tensor = self.tensors[str(node.data[0])]
        terms = [self.bases.get(tensor.name, f"{tensor.name}_ptr")]
        if node.rows:
            row = self.leaves["row"]
            terms.append(f"{row}.to(tl.int64) * {tensor.stride}" if tensor.stride else row)
        if node.column:
            terms.append(self.leaves["column"])
        inside = [m for m, used in zip(self.masks, (node.rows, node.column), strict=True) if used and m]
        mask = f", mask={' & '.join(inside)}" if inside else ""
        text = f"tl.load({' + '.join(terms)}{mask})"
        return tensor.name, text if tensor.dtype == node.dtype else f"{text}.to({TL[node.dtype]})"


#: what launches of skeletons share
MATRIX = '''\
def matrix(tensor):
    """The tensor as a matrix of its last dim, whose elements follow each other; else a copy."""
    tensor = tensor.reshape(-1, tensor.shape[-1]) if tensor.numel() else tensor.flatten(0, -2)
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] < 2 else tensor.contiguous()'''


@dataclass(frozen=True)
class Draft:
    """The parts of a skeleton's file.

    Attributes:
        doc: what the file computes, for a reader.
        arguments: name -> Triton type.
        constants: `tl.constexpr` arguments that `launch` passes as they stand.
        derived: `tl.constexpr` arguments that `launch` computes: name -> (value here, expression).
        body, launch: lines; `launch` starts with its `def`.
        aligned, warps, stages, kind, bytes_moved: see `KernelSource`.
    """

    name: str
    doc: str
    arguments: dict[str, str]
    constants: dict[str, int]
    derived: dict[str, tuple[int, str]]
    body: str
    launch: str
    aligned: tuple[str, ...]
    warps: int
    stages: int
    kind: str
    bytes_moved: int

    def source(self) -> KernelSource:
        """The standalone file."""
        constants = {**self.constants, **{name: value for name, (value, _) in self.derived.items()}}
        numbers = "\n".join(f"{name} = {value}" for name, value in self.constants.items())
        head = "\n".join(_wrapped([*self.arguments, *(f"{c}: tl.constexpr" for c in constants)]))
        text = (
            f'"""{self.doc}"""\n\nimport torch\nimport triton\nimport triton.language as tl\n\n'
            f"{numbers}\nNUM_WARPS = {self.warps}\nNUM_STAGES = {self.stages}\n\n\n"
            f"@triton.jit\ndef kernel(\n{head}\n):\n{indent(self.body.strip(chr(10)), '    ')}\n\n\n"
            f"{MATRIX}\n\n\n{self.launch.strip(chr(10))}\n"
        )
        return KernelSource(
            self.name, text, self.arguments, constants, self.aligned, self.warps, self.kind,
            self.bytes_moved, self.bytes_moved, self.stages,
        )  # fmt: skip

    @staticmethod
    def call(arguments: Sequence[str], constants: Iterable[str], derived: Mapping[str, tuple[int, str]],
             grid: str) -> str:  # fmt: skip
        """The text that starts the kernel."""
        named = [f"{name}={name}" for name in constants]
        named += [f"{name}={text}" for name, (_, text) in derived.items()]
        named += ["num_warps=NUM_WARPS", "num_stages=NUM_STAGES"]
        lines = "\n".join(_wrapped([*arguments, *named]))
        return f"kernel[{grid}](\n{lines}\n)"


def text(template: str, **blocks: str | Sequence[str]) -> str:
    """A template without its indentation. `<name>` becomes a block: its lines where it stands alone
    in a line, else its text."""
    inline = {f"<{name}>": block for name, block in blocks.items() if isinstance(block, str)}
    out = []
    for line in dedent(template).strip("\n").split("\n"):
        block = blocks.get(line.strip().removeprefix("<").removesuffix(">"), line.strip())
        lines = [block] if isinstance(block, str) else block
        space = line[: len(line) - len(line.lstrip())]
        for part in "\n".join(lines).split("\n") if lines else []:
            for name, value in inline.items():
                part = part.replace(name, value)
            out.append(space + part if part else "")
    return "\n".join(out)


__all__ = ["POINTER", "Draft", "Hole", "Tensor", "leaf", "text"]
