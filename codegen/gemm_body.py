"""What a matrix product is, and the body of its kernel; see `gemm`."""

from __future__ import annotations

from dataclasses import dataclass

from .expr import Node
from .formats import BLOCK, HALF, PLAIN, Format
from .hole import Hole, Tensor, text
from .printer import TL


@dataclass(frozen=True)
class Result:
    """A result of the epilogue: its name, its dtype, and what it is at (row, column)."""

    name: str
    dtype: str
    node: Node


@dataclass(frozen=True)
class Gemm:
    """A matrix product.

    Attributes:
        m, n, k: sizes it is made for; others run as well, if what is a multiple of 16 stays one.
        dtype: of the operands as they are multiplied.
        results: of the epilogue, all `[m, n]`; its leaf is `acc`.
        tensors: what the holes load.
        a_prologue, b_prologue: what is multiplied instead of the leaves `a` and `b`.
        a_order, b_order: dims as stored, outermost first: `mk` or `km`; `nk` or `kn`.
        format: how b is stored.
        a_scaled: has each row of a an f32 scale, as quantized activations have?
        groups: number of weights of a grouped product; 0 for one weight.
        indexed: of a grouped product: does an index say where rows are?
        doc: what is computed, for a reader.
    """

    name: str
    m: int
    n: int
    k: int
    dtype: str
    results: tuple[Result, ...]
    tensors: tuple[Tensor, ...] = ()
    a_prologue: Node | None = None
    b_prologue: Node | None = None
    a_order: str = "mk"
    b_order: str = "nk"
    format: Format = PLAIN
    a_scaled: bool = False
    groups: int = 0
    indexed: bool = False
    doc: str = ""


@dataclass(frozen=True)
class Tile:
    """How a product is cut: a tile's sizes, warps, stages, and the variants."""

    m: int
    n: int
    k: int
    warps: int
    stages: int
    persistent: bool = False
    swapped: bool = False
    splits: int = 1


class GemmBody:
    """Writes the body of one kernel."""

    def __init__(self, gemm: Gemm, tile: Tile) -> None:
        self.gemm, self.tile = gemm, tile
        self.int4 = gemm.format.name == "int4"
        # the left operand's own dim is dim 0 of the tile, the right one's is dim 1
        first, second = "[:, None]", "[None, :]"
        self.m_at, self.n_at = (second, first) if tile.swapped else (first, second)
        self.before: list[str] = []
        self.storage = gemm.format.storage or gemm.dtype
        self.sums = "i32" if gemm.dtype == "i8" else "f32"
        self.step = str(BLOCK) if self.int4 else "BLOCK_K"


    def body(self) -> str:
        """The kernel's lines."""
        return text(
            self.persistent() if self.tile.persistent else """
            pid = tl.program_id(0)
            tiles_n = tl.cdiv(N, BLOCK_N)
            <where>
            in_cols = col < N
            k_a = tl.arange(0, BLOCK_K)<k_a_at>
            k_b = tl.arange(0, BLOCK_K)<k_b_at>
            <pointers>
            <before>
            acc = tl.zeros(<shape>, dtype=<sums>)
            for k0 in range(first_k, last_k, <step>):
                <loads>
            <after>
            """,
            where=self.grouped_tile() if self.gemm.groups else self.plain_tile(),
            pointers=self.pointers(), loads=self.loads(), before=self.before,
            after=self.split_end() if self.tile.splits > 1 else self.epilogue(),
            k_a_at=self.n_at, k_b_at=self.m_at, sums=TL[self.sums], step=self.step,
            shape="[BLOCK_N, BLOCK_M]" if self.tile.swapped else "[BLOCK_M, BLOCK_N]",
        )  # fmt: skip

    def plain_tile(self) -> str:
        split = self.tile.splits > 1
        return text(
            """
            tiles_m = tl.cdiv(M, BLOCK_M)
            <split>
            # programs that run at the same time share rows of a and columns of b
            band = tile // (GROUP_M * tiles_n)
            height = min(tiles_m - band * GROUP_M, GROUP_M)
            tile_m = band * GROUP_M + (tile % (GROUP_M * tiles_n)) % height
            tile_n = (tile % (GROUP_M * tiles_n)) // height
            <index>
            in_rows = row < M
            """,
            split=[
                "tile = pid // SPLITS", "split = pid % SPLITS",
                f"part = tl.cdiv(tl.cdiv(K, {self.step}), SPLITS) * {self.step}",
                "first_k = split * part", "last_k = min(K, first_k + part)",
            ] if split else ["tile = pid", "first_k = 0", "last_k = K"],
            index=self.index("tile_m * BLOCK_M"),
        )  # fmt: skip

    def index(self, first_row: str) -> list[str]:
        return [f"row = ({first_row} + tl.arange(0, BLOCK_M)){self.m_at}",
                f"col = (tile_n * BLOCK_N + tl.arange(0, BLOCK_N)){self.n_at}"]  # fmt: skip

    def grouped_tile(self) -> str:
        """Programs of a group's rows and one column of tiles follow each other: they share b."""
        return text(
            """
            tiles = tl.num_programs(0) // tiles_n
            tile_m = pid % tiles
            tile_n = pid // tiles
            ids = tl.arange(0, GROUPS_2)
            # the rows of no group come last, and their sums are 0
            begins = tl.load(offsets_ptr + ids, mask=ids <= GROUPS, other=0)
            ends = tl.load(offsets_ptr + ids + 1, mask=ids < GROUPS, other=0)
            ends = tl.where(ids == GROUPS, M, ends)
            last_tile = tl.cumsum((ends - begins + BLOCK_M - 1) // BLOCK_M, 0)
            group = tl.sum((last_tile <= tile_m).to(tl.int32), 0)
            if group > GROUPS:
                return
            own = ids == group
            done = tl.sum(tl.where(ids == group - 1, last_tile, 0), 0)
            start = tl.sum(tl.where(own, begins, 0), 0) + (tile_m - done) * BLOCK_M
            first_k = 0
            last_k = tl.where(group < GROUPS, K, 0)
            <index>
            in_rows = row < tl.sum(tl.where(own, ends, 0), 0)
            b_ptr += group.to(tl.int64) * b_group_stride
            <gather>
            """,
            index=self.index("start"),
            gather="row = tl.load(index_ptr + row, mask=in_rows, other=0)" if self.gemm.indexed else [],
        )

    def pointers(self) -> list[str]:
        g = self.gemm
        half = "first_k // 2" if self.int4 else "first_k"
        return [
            f"a_tile = a_ptr + {_place('row', '(first_k + k_a)', 'a_stride', g.a_order == 'mk')}",
            f"b_tile = b_ptr + {_place('col', f'({half} + k_b)', 'b_stride', g.b_order == 'nk')}",
        ]

    def loads(self) -> list[str]:
        """One step of the loop along k. int4 has two tiles of weights for each tile of bytes."""
        g = self.gemm
        self.before.clear()
        b_mask = "in_cols" if self.int4 else "in_b"
        lines = [] if self.int4 else [
            "in_b = in_cols", "if not EVEN_K:", "    in_b = in_cols & (k0 + k_b < K)",
        ]  # fmt: skip
        lines.append(f"b{self.raw('b', '')} = tl.load(b_tile, mask={b_mask}, other=0.0)")
        for part in ("low", "high") if self.int4 else ("",):
            tail = f"_{part}" if part else ""
            at = f" + {HALF}" if part == "high" else ""
            a_at = at and (at if g.a_order == "mk" else f" + {HALF} * a_stride")
            lines += [
                f"in_a{tail} = in_rows", "if not EVEN_K:",
                f"    in_a{tail} = in_rows & (k0{at} + k_a < K)",
                f"a{self.raw('a', tail)} = tl.load(a_tile{a_at}, mask=in_a{tail}, other=0.0)",
                *self.prologue("a", tail, at), *self.prologue("b", tail, at), self.dot(tail),
            ]  # fmt: skip
        move = {"a": (self.step, g.a_order == "mk"),
                "b": ("BLOCK_K", g.b_order == "nk")}  # fmt: skip
        for name, (step, along) in move.items():
            lines.append(f"{name}_tile += {step if along else f'{step} * {name}_stride'}")
        return lines

    def raw(self, name: str, tail: str) -> str:
        """The end of the name of an operand as it was loaded: it needs another name if it changes."""
        g = self.gemm
        same = g.a_prologue is None if name == "a" else g.b_prologue is None and self.storage == g.dtype
        return tail if same else f"{tail}_raw"

    def dot(self, tail: str) -> str:
        """Sums of e4m3 products in the matrix unit of sm_90 have 14 bits: each step starts anew."""
        left, right = (f"b{tail}", f"a{tail}") if self.tile.swapped else (f"a{tail}", f"b{tail}")
        options = f", out_dtype={TL[self.sums]}"
        if self.gemm.dtype == "f32":
            options += ', input_precision="ieee"'
        if self.gemm.dtype == "f8e4m3":
            options += ", max_num_imprecise_acc=BLOCK_K"
        return f"acc = tl.dot({left}, {right}, acc{options})"

    def prologue(self, name: str, tail: str, at: str) -> list[str]:
        """From what was loaded to an operand of the product."""
        g, dtype = self.gemm, TL[self.gemm.dtype]
        raw, out = f"{name}{self.raw(name, tail)}", f"{name}{tail}"
        if name == "b" and self.int4:
            return self.decode(tail, at)
        node = g.a_prologue if name == "a" else g.b_prologue
        if node is None:
            return [] if raw == out else [f"{out} = {raw}.to({dtype})"]
        own, inside = ("row", f"in_a{tail}") if name == "a" else ("col", "in_b")
        leaves = {name: f"{raw}.to(tl.float32)", "row": own, "column": f"(k0{at} + k_{name})"}
        hole = Hole(f"{name}{tail}", leaves, g.tensors, (inside, ""))
        value = hole.emit(node)
        # what no row or column has must be 0, whatever the expression makes of it
        result = f"{out} = tl.where({inside}, {value}, 0.0).to({dtype})"
        self.before += [line.replace(inside, "in_rows" if name == "a" else "in_cols") for line in hole.outer]
        return [*hole.lines, result]

    def decode(self, tail: str, at: str) -> list[str]:
        """int4: 128 + q is the bf16 number with the bits 0x4300 | q, and 1024 + q is f16's 0x6400 | q,
        so that no conversion is needed."""
        g, part = self.gemm, tail[1:]
        bits, offset = ("0x4300", "128.0") if g.dtype == "bf16" else ("0x6400", "1024.0")
        nibble = "b_raw & 0xF" if part == "low" else "b_raw >> 4"
        group = f"(k0{at}) // {g.format.group} * N + col"
        return [
            f"scale_{part} = tl.load(b_scale_ptr + {group}, mask=in_cols, other=0)",
            f"zero_{part} = tl.load(b_zero_ptr + {group}, mask=in_cols, other=0) + {offset}",
            f"code_{part} = (({nibble}).to(tl.int16) | {bits}).to({TL[g.dtype]}, bitcast=True)",
            f"b_{part} = (code_{part} - zero_{part}.to({TL[g.dtype]})) * scale_{part}",
        ]

    def split_end(self) -> str:
        return text(
            """
            at = tl.arange(0, BLOCK_M)<m> * BLOCK_N + tl.arange(0, BLOCK_N)<n>
            sums = sums_ptr + tile.to(tl.int64) * (SPLITS * BLOCK_M * BLOCK_N) + at
            tl.store(sums + split * (BLOCK_M * BLOCK_N), acc)
            tl.debug_barrier()
            before = tl.atomic_add(count_ptr + tile, 1, sem="acq_rel")
            if before == SPLITS - 1:
                total = tl.load(sums, cache_modifier=".cg")
                for other in range(1, SPLITS):
                    total += tl.load(sums + other * (BLOCK_M * BLOCK_N), cache_modifier=".cg")
                <epilogue>
            """,
            m=self.m_at, n=self.n_at, epilogue=self.epilogue("total"),
        )  # fmt: skip

    def epilogue(self, acc: str = "acc") -> list[str]:
        """Scales, the expressions, and the stores."""
        g = self.gemm
        value = acc if self.sums == "f32" else f"{acc}.to(tl.float32)"
        if g.format.scaled:
            value += " * tl.load(b_scale_ptr + col, mask=in_cols, other=0)"
        if g.a_scaled:
            value += " * tl.load(a_scale_ptr + row, mask=in_rows, other=0)"
        lines = [] if value.isidentifier() else [f"scaled = {value}"]
        leaves = {"acc": "scaled" if lines else value, "row": "row", "column": "col"}
        hole = Hole("c", leaves, g.tensors, ("in_rows", "in_cols"))
        values = [(r, hole.emit(r.node)) for r in g.results]
        stores = []
        for result, name in values:
            number = f"{name}.to({TL[result.dtype]})"
            if self.tile.persistent:
                stores.append(f"c_desc.store([tile_m * BLOCK_M, tile_n * BLOCK_N], {number})")
            else:
                at = f"{result.name}_ptr + row.to(tl.int64) * N + col"
                stores.append(f"tl.store({at}, {number}, mask=in_rows & in_cols)")
        return [*lines, *hole.outer, *hole.lines, *stores]

    def persistent(self) -> str:
        g = self.gemm
        self.before.clear()
        mk, nk = g.a_order == "mk", g.b_order == "nk"
        a_at, b_at = pair("tile_m * BLOCK_M", "k0", mk), pair("tile_n * BLOCK_N", "k0", nk)
        work = [f"a{self.raw('a', '')} = a_desc.load([{a_at}]){'' if mk else '.T'}",
                f"b{self.raw('b', '')} = b_desc.load([{b_at}]){'.T' if nk else ''}"]
        masks = []
        if g.a_prologue is not None:
            masks.append("in_a = in_rows & (k0 + k_a < K)")
        if g.b_prologue is not None:
            masks.append("in_b = in_cols & (k0 + k_b < K)")
        work += [*masks, *self.prologue("a", "", ""), *self.prologue("b", "", ""), self.dot("")]
        a_desc = _descriptor("a", pair("M", "K", mk), pair("BLOCK_M", "BLOCK_K", mk))
        b_desc = _descriptor("b", pair("N", "K", nk), pair("BLOCK_N", "BLOCK_K", nk))
        return text(
            """
            <descriptors>
            tiles_m = tl.cdiv(M, BLOCK_M)
            tiles_n = tl.cdiv(N, BLOCK_N)
            k_a = tl.arange(0, BLOCK_K)<k_a_at>
            k_b = tl.arange(0, BLOCK_K)<k_b_at>
            for tile in range(tl.program_id(0), tiles_m * tiles_n, tl.num_programs(0)):
                band = tile // (GROUP_M * tiles_n)
                height = min(tiles_m - band * GROUP_M, GROUP_M)
                tile_m = band * GROUP_M + (tile % (GROUP_M * tiles_n)) % height
                tile_n = (tile % (GROUP_M * tiles_n)) // height
                <index>
                in_rows = row < M
                in_cols = col < N
                <before>
                acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=<sums>)
                for k0 in range(0, K, BLOCK_K):
                    <work>
                <epilogue>
            """,
            descriptors=[a_desc, b_desc, _descriptor(g.results[0].name, "M, N", "BLOCK_M, BLOCK_N",
                                                     "c_desc", "N")],
            index=self.index("tile_m * BLOCK_M"), work=work, before=self.before,
            epilogue=self.epilogue(),
        )  # fmt: skip


def _place(own: str, k: str, stride: str, k_last: bool) -> str:
    """Offset of (own index, k) in an operand whose last dim is k, or the other."""
    outer, inner = (own, k) if k_last else (k, own)
    return f"{outer}.to(tl.int64) * {stride} + {inner}"


def pair(own: str, k: str, k_last: bool) -> str:
    return f"{own}, {k}" if k_last else f"{k}, {own}"


def _descriptor(name: str, shape: str, block: str, to: str = "", stride: str = "") -> str:
    stride = stride or f"{name}_stride"
    return (f"{to or f'{name}_desc'} = tl.make_tensor_descriptor("
            f"{name}_ptr, [{shape}], [{stride}, 1], [{block}])")  # fmt: skip
