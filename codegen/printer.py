"""The text of a kernel's body: Triton source from expressions.

Every value in the text is broadcastable to [BLOCK_M, BLOCK_N]: a value that varies along rows only
is [BLOCK_M, 1], along the column only [1, BLOCK_N]; in a flat kernel all are [BLOCK_N].
"""

from __future__ import annotations

from collections.abc import Mapping
from math import inf, isnan
from struct import pack, unpack

from ..ir.module import Value
from ..passes.space import COLUMN
from .expr import COMPARISONS, Node, Number, neutral
from .kernel import Kernel, Output
from .layout import Layout, column_length, nodes_of, places

#: storage dtype -> Triton's name
TL = {
    "f64": "tl.float64", "f32": "tl.float32", "f16": "tl.float16", "bf16": "tl.bfloat16",
    "f8e4m3": "tl.float8e4nv", "f8e5m2": "tl.float8e5", "i64": "tl.int64", "i32": "tl.int32",
    "i16": "tl.int16", "i8": "tl.int8", "u8": "tl.uint8", "bool": "tl.int1",
}  # fmt: skip

#: node -> source; the operands are names or numbers
SOURCES: Mapping[str, str] = {
    "add": "{0} + {1}", "sub": "{0} - {1}", "mul": "{0} * {1}", "div": "{0} / {1}",
    "div_trunc": "{0} // {1}", "neg": "-{0}",
    "eq": "{0} == {1}", "ne": "{0} != {1}", "lt": "{0} < {1}", "le": "{0} <= {1}",
    "gt": "{0} > {1}", "ge": "{0} >= {1}",
    "and": "{0} & {1}", "or": "{0} | {1}", "xor": "{0} ^ {1}", "not": "{0} == 0",
    "where": "tl.where({0}, {1}, {2})",
    "maximum": "tl.maximum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "minimum": "tl.minimum({0}, {1}, propagate_nan=tl.PropagateNan.ALL)",
    "abs": "tl.abs({0})", "exp": "tl.exp({0})", "log": "tl.log({0})", "sqrt": "tl.sqrt({0})",
    "rsqrt": "tl.rsqrt({0})", "sin": "tl.sin({0})", "cos": "tl.cos({0})", "erf": "tl.erf({0})",
    "floor": "tl.floor({0})", "ceil": "tl.ceil({0})",
}  # fmt: skip
#: operators, which give a number beside a tensor the tensor's dtype
_OPERATORS = frozenset({"add", "sub", "mul", "div", "div_trunc"}) | COMPARISONS
_COMBINE = {"sum": "{0} + {1}", "max": "tl.maximum({0}, {1})", "min": "tl.minimum({0}, {1})"}
_INDENT = "    "


def number(value: Number, dtype: str) -> str:
    """A number as Python source."""
    if dtype == "bool":
        return str(bool(value))
    if isinstance(value, float) and (isnan(value) or value in (inf, -inf)):
        return f'float("{value}")'
    return f"({value!r})" if value < 0 else repr(value)


def _exact_in_f32(value: Number) -> bool:
    try:
        return bool(unpack("f", pack("f", value))[0] == value)
    except OverflowError:
        return False


class Printer:
    """Prints expressions: each node once, into a name. `leaf` says what a load, an index or a
    reduction is."""

    def __init__(self) -> None:
        self.count = 0

    def emit(self, node: Node) -> str:
        """Print what computes a node, once; returns its name, or its text where it is a number."""
        raise NotImplementedError

    def leaf(self, node: Node) -> tuple[str, str]:
        """(stem of the name, text) of a node that depends on the kernel's loops."""
        raise NotImplementedError

    def _name(self, stem: str) -> str:
        # one counter for the whole kernel: Triton forbids a name to change its type across a loop
        self.count += 1
        return f"{stem}_{self.count}"

    def _text(self, node: Node) -> tuple[str, str]:
        if node.op == "cast":
            return "cast", f"{self.emit(node.args[0])}.to({TL[node.dtype]})"
        if node.op == "round":
            narrow = TL[str(node.data[0])]
            return "round", f"{self.emit(node.args[0])}.to({narrow}).to({TL[node.dtype]})"
        if node.op not in SOURCES:
            return self.leaf(node)
        source = SOURCES[node.op]
        if node.op in ("maximum", "minimum") and not node.dtype.startswith("f"):
            source = source.replace(", propagate_nan=tl.PropagateNan.ALL", "")
        return node.op, source.format(*(self._operand(node, i) for i in range(len(node.args))))

    def _operand(self, node: Node, position: int) -> str:
        """An operand's text; a number that would lose its dtype is written as a tensor."""
        arg = node.args[position]
        if arg.op != "const":
            return self.emit(arg)
        text = number(arg.data[0], arg.dtype)  # type: ignore[arg-type]
        values = node.args[1:] if node.op == "where" else node.args
        alone = all(other.op == "const" for other in values)
        inexact = arg.dtype == "f64" and not _exact_in_f32(arg.data[0])  # type: ignore[arg-type]
        if alone or (inexact and node.op not in _OPERATORS):
            return f"tl.full([], {text}, {TL[arg.dtype]})"
        return text


class Body(Printer):
    """Prints the body of one kernel.

    `lines` is the text so far. Where there is a loop, `inner` are the lines of the one under
    construction; what does not vary along it (`axis`: the column, or the rows) goes before it.
    """

    def __init__(self, kernel: Kernel, layout: Layout) -> None:
        super().__init__()
        self.kernel, self.layout = kernel, layout
        self.values = {name: value for name, value in kernel.params}
        self.lines: list[str] = []
        self.inner: list[str] | None = None
        self.axis = "rows" if layout.strips else "column"
        self.outer_memo: dict[int, str] = {}
        self.inner_memo: dict[int, str] = {}

    def print(self) -> list[str]:
        """The lines of the body."""
        kind = self.layout.kind
        if kind == "flat":
            self._flat_header()
        elif kind == "looped":
            self.lines += ["pid = tl.program_id(0)", *self._row_lines("pid")]
            self._looped()
            return self.lines
        elif self.layout.strips:
            self._strip()
            return self.lines
        else:
            self.lines += self._column_lines()
            self.lines += self._row_lines("pid // blocks" if kind == "tile" else "pid")
        for output in self.kernel.outputs:
            self.store(output)
        return self.lines

    # ---- headers ----

    def _flat_header(self) -> None:
        self.lines += [
            "col = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)",
            "in_cols = col < n_cols",
        ]

    def _column_lines(self) -> list[str]:
        lines = ["pid = tl.program_id(0)"]
        if self.layout.kind == "tile":
            lines += [
                "blocks = tl.cdiv(n_cols, BLOCK_N)",
                "col = (pid % blocks) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]",
            ]
        else:
            lines += ["col = tl.arange(0, BLOCK_N)[None, :]"]
        return [*lines, "in_cols = col < n_cols"]

    def _row_lines(self, block: str) -> list[str]:
        """Rows of a block, and the index of each group of row dims."""
        block = block if block.isidentifier() else f"({block})"
        lines = [
            f"row = {block} * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]",
            "in_rows = row < n_rows",
        ]
        groups = len(self.layout.groups)
        for g in reversed(range(groups)):
            inner = " * ".join(f"size_{k}" for k in range(g + 1, groups))
            text = "row"
            if inner:
                text += f" // ({inner})" if "*" in inner else f" // {inner}"
            if g:
                text += f" % size_{g}"
            text = f"({text})" if " " in text else text
            lines.append(f"row_{g} = {text}.to(tl.int64)")
        return lines

    # ---- loops ----

    def _looped(self) -> None:
        reductions = [node for node in nodes_of(self.kernel) if node.op == "reduce"]
        for depth in sorted({node.depth for node in reductions}):
            self._reduction_loop([node for node in reductions if node.depth == depth])
        rows = [output for output in self.kernel.outputs if self._without_column(output.value)]
        for output in rows:
            self.store(output)
        rest = [output for output in self.kernel.outputs if output not in rows]
        if rest:
            self._open_loop()
            for output in rest:
                self.store(output)
            self._close_loop()

    def _strip(self) -> None:
        """Programs walk every `n_strips`-th block of rows, and keep sums over their rows."""
        self.lines += self._column_lines()
        first = "pid // blocks" if self.layout.kind == "tile" else "pid"
        sums = [output for output in self.kernel.outputs if output.node.op == "row_sum"]
        names = {}
        for output in sums:
            names[output.name] = self._name("acc_rows")
            dtype = TL[output.node.dtype]
            self.lines.append(f"{names[output.name]} = tl.zeros([BLOCK_M, BLOCK_N], dtype={dtype})")
        self.inner, self.inner_memo = [], {}
        for output in self.kernel.outputs:
            if output.node.op != "row_sum":
                self.store(output)
        for output in sums:
            x, name = self._operand(output.node, 0), names[output.name]
            self.inner.append(f"{name} = {name} + tl.where(in_rows & in_cols, {x}, 0)")
        self.lines.append(f"for block in range({first}, tl.cdiv(n_rows, BLOCK_M), n_strips):")
        self.lines += [_INDENT + line for line in self._row_lines("block") + self.inner]
        self.inner = None
        for output in sums:
            at = f"{output.name}_ptr + ({first}) * n_cols + col"
            total = f"tl.sum({names[output.name]}, axis=0, keep_dims=True)"
            self.lines.append(f"tl.store({at}, {total}, mask=in_cols)")

    def _without_column(self, value: Value) -> bool:
        return COLUMN not in self.kernel.space.maps[value.name]

    def _reduction_loop(self, nodes: list[Node]) -> None:
        sums = []
        for node in nodes:
            kind, length = str(node.data[0]), int(node.data[1])
            start = number(neutral(kind, node.dtype), node.dtype)
            name = self._name(f"acc_{kind}")
            self.lines.append(f"{name} = tl.full([BLOCK_M, BLOCK_N], {start}, {TL[node.dtype]})")
            sums.append((node, name, kind, length, start))
        self._open_loop()
        assert self.inner is not None
        for node, name, kind, length, start in sums:
            x = f"tl.where({self._in_columns(0, length)}, {self.emit(node.args[0])}, {start})"
            self.inner.append(f"{name} = {_COMBINE[kind].format(name, x)}")
        self._close_loop()
        for node, name, kind, _, _ in sums:
            final = self._name(kind)
            self.lines.append(f"{final} = tl.{kind}({name}, axis=1, keep_dims=True)")
            self.outer_memo[id(node)] = final

    def _open_loop(self) -> None:
        self.inner, self.inner_memo = [], {}

    def _close_loop(self) -> None:
        assert self.inner is not None
        self.lines.append("for start in range(0, n_cols, BLOCK_N):")
        head = ["col = start + tl.arange(0, BLOCK_N)[None, :]", "in_cols = col < n_cols"]
        self.lines += [_INDENT + line for line in head + self.inner]
        self.inner = None

    # ---- expressions ----

    def emit(self, node: Node) -> str:
        """Print what computes a node, once; returns its name, or its text where it is a number."""
        if node.op == "const":
            return number(node.data[0], node.dtype)  # type: ignore[arg-type]
        inside = self.inner is not None and getattr(node, self.axis)
        memo = self.inner_memo if inside else self.outer_memo
        if id(node) not in memo:
            stem, text = self._text(node)
            target = self.lines
            if inside:
                assert self.inner is not None
                target = self.inner
            name = self._name(stem)
            target.append(f"{name} = {text}")
            memo[id(node)] = name
        return memo[id(node)]

    def leaf(self, node: Node) -> tuple[str, str]:
        """See `Printer`."""
        if node.op == "load":
            return str(node.data[0]), self._load(node)
        if node.op == "column":
            return "at", self._shifted(int(node.data[0]))
        if node.op == "row":
            group = next(g for g, dims in enumerate(self.layout.groups) if node.data[0] in dims)
            return "at", f"row_{group}.to(tl.int32)"
        kind, length = str(node.data[0]), int(node.data[1])
        start = number(neutral(kind, node.dtype), node.dtype)
        x = f"tl.where({self._in_columns(0, length)}, {self._operand(node, 0)}, {start})"
        return kind, f"tl.{kind}({x}, axis=1, keep_dims=True)"

    # ---- memory ----

    def _shifted(self, shift: int) -> str:
        if not shift:
            return "col"
        return f"col + {shift}" if shift > 0 else f"col - {-shift}"

    def _in_columns(self, shift: int, length: int) -> str:
        """Where column + shift is one of `length` columns."""
        column = self.kernel.space.column
        whole = column is None or length == column.size
        if shift == 0:
            return "in_cols" if whole else f"col < {length}"
        upper = f"col < {length - shift}"
        return upper if shift > 0 else f"(col >= {-shift}) & ({upper})"

    def _load(self, node: Node) -> str:
        # what lies outside of the mask needs no value: reductions and stores have masks themselves
        name, shift = str(node.data[0]), int(node.data[1])
        value = self.values[name]
        terms, masks = [f"{name}_ptr"], []
        if self.layout.kind != "flat":
            groups = param_groups(self.kernel, self.layout, value)
            terms += [f"row_{g} * {name}_s{g}" for g in groups]
            masks += ["in_rows"] if groups else []
        if COLUMN in self.kernel.space.maps[value.name]:
            terms.append(f"({self._shifted(shift)})" if shift < 0 else self._shifted(shift))
            masks.append(self._in_columns(shift, column_length(self.kernel, value)))
        pointer = " + ".join(terms)
        if not masks:
            text = f"tl.load({pointer})"
        else:
            mask = masks[0] if len(masks) == 1 else " & ".join(
                m if m.isidentifier() or m.startswith("(") else f"({m})" for m in masks
            )  # fmt: skip
            text = f"tl.load({pointer}, mask={mask})"
        return text if value.type.dtype == node.dtype else f"{text}.to({TL[node.dtype]})"

    def store(self, output: Output) -> None:
        """Print the store of a result: results are contiguous."""
        value = output.value
        length = column_length(self.kernel, value)
        terms, masks = [f"{output.name}_ptr"], []
        if self.layout.kind != "flat":
            masks.append("in_rows")
            column = self.kernel.space.column
            whole = column is not None and length == column.size
            size = ("n_cols" if whole else str(length)) if length else ""
            terms.append(f"row.to(tl.int64) * {size}" if size else "row")
        if length:
            terms.append("col")
            mask = self._in_columns(0, length)
            masks.append(mask if mask.isidentifier() else f"({mask})")
        text = self.emit(output.node)
        if output.node.op == "const":
            text = f"tl.full([], {text}, {TL[output.node.dtype]})"
        if output.node.dtype != value.type.dtype:
            text = f"{text}.to({TL[value.type.dtype]})"
        mask = f", mask={' & '.join(masks)}" if masks else ""  # every program stores a scalar
        line = f"tl.store({' + '.join(terms)}, {text}{mask})"
        (self.lines if self.inner is None else self.inner).append(line)


def param_groups(kernel: Kernel, layout: Layout, value: Value) -> list[int]:
    """The row groups that a parameter varies along, in its own order."""
    have = places(kernel, value)
    order = [(have.index(dims[0]), g) for g, dims in enumerate(layout.groups) if dims[0] in have]
    return [g for _, g in sorted(order)]
