"""Matrix products `c[m, n] = epilogue(sum over k of a[m, k] b[n, k])` as one Triton skeleton.

Holes: a prologue on a (rows m, column k), a prologue on b (rows n, column k), and an epilogue on the
accumulator (rows m, column n) with any number of results. Variants, which combine where it is said:

- plain: a program makes one tile, its operands fetched ahead by asynchronous copies;
- persistent: one program an SM walks the tiles and moves them through tensor descriptors, which
  devices with the bulk copy engine do without threads; not with int4, groups or a split;
- swapped: the weight is the left operand, so that few rows m fill the short side of the matrix
  instruction (wgmma has 64 rows but as few as 8 columns);
- split k: `splits` programs share a tile. Each writes its sums to a buffer of its own and counts
  itself, and the last one adds up all sums in order. The count has acquire and release semantics
  and the barrier before it orders the stores of a program's other threads, so the last one sees
  every sum, which it reads past the L1 cache; nobody waits for anybody, and the result does not
  depend on who is last;
- grouped: rows are sorted by group, `offsets` says where groups start and the last one ends, and
  each group has a weight of its own; the rows behind have no group, and sums of 0. Offsets stay on
  the device: as many programs start as tiles may be needed. With `indexed`, rows are where an index
  of all of them says: gathered when read and scattered when written.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..ir.errors import CompileError
from ..ir.types import DTYPES
from .expr import Node
from .formats import BLOCK, HALF, PLAIN, Format
from .hole import POINTER, Draft, Hole, Tensor, text
from .printer import TL
from .source import _TORCH as TORCH
from .source import KernelSource


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
        a, b: dtypes of the operands as they are multiplied; they differ in no format.
        results: of the epilogue, all `[m, n]`; its leaf is `acc`.
        tensors: what the holes load.
        a_prologue, b_prologue: what is multiplied instead of the leaves `a` and `b`.
        a_order, b_order: dims as stored, outermost first: `mk` or `km`; `nk` or `kn`.
        format: how b is stored.
        a_scaled: has each row of a an f32 scale, as quantized activations have?
        groups: number of weights of a grouped product; 0 for one weight.
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


#: Rows m up to which the weight is the left operand: wgmma's left side has 64 rows.
FEW_ROWS = 64


def default_tile(gemm: Gemm, target: str = "cuda:90") -> Tile:
    """A tile that compiles without spills; a search may find faster ones.

    128 x 256 keeps 128 sums in each of 256 threads, the most that leaves registers for the rest, and
    reads 1/128 + 1/256 elements for each product; without descriptors the pointers of such a tile
    spill. AMD's CDNA 3 has 64 KiB of shared memory, which two stages fill.
    """
    hip, bulk = target.startswith("hip"), target in ("cuda:90", "cuda:100")
    size = DTYPES[gemm.dtype]
    if size > 2:  # no matrix unit computes f32 exactly
        return Tile(64, 64, 32, 8, 2)
    k = HALF if size == 2 else BLOCK
    if gemm.m <= FEW_ROWS and not gemm.groups:
        rows = max(16, 1 << max(0, gemm.m - 1).bit_length())
        return Tile(rows, 64, k, 4, 2 if hip else 4, swapped=True)
    plain = gemm.format.name == "plain" and gemm.a_prologue is None and gemm.b_prologue is None
    if plain and bulk and not gemm.groups and len(gemm.results) == 1 and _whole_vectors(gemm):
        return Tile(128, 256, k, 8, 3, persistent=True)
    return Tile(128, 128, k, 8, 2 if hip else 3)


def _whole_vectors(gemm: Gemm) -> bool:
    """Are all rows multiples of 16 bytes, as tensor descriptors need them?"""
    lasts = (gemm.k if gemm.a_order == "mk" else gemm.m, gemm.k if gemm.b_order == "nk" else gemm.n)
    rows = [last * DTYPES[gemm.dtype] for last in lasts]
    rows += [gemm.n * DTYPES[result.dtype] for result in gemm.results]
    return all(row % 16 == 0 for row in rows)


def gemm_source(gemm: Gemm, tile: Tile | None = None) -> KernelSource:
    """The Triton source of a matrix product.

    `launch(a, b, [b_scale, [b_zero]], [a_scale], [offsets, [index]], *tensors)` returns the results.

    Raises CompileError W0901 where a format or an epilogue does not fit the variant.
    """
    tile = tile or default_tile(gemm)
    problem = _problem(gemm, tile)
    if problem:
        raise CompileError("W0901", f"product {gemm.name} cannot be generated", reason=problem,
                           hint="take the plain variant of the skeleton")  # fmt: skip
    return _Writer(gemm, tile).draft().source()


def _problem(gemm: Gemm, tile: Tile) -> str:
    int4 = gemm.format.name == "int4"
    if int4 and (gemm.b_order != "nk" or gemm.b_prologue is not None or tile.k != HALF):
        return f"int4 weights are [n, k], have no prologue, and tiles of {HALF} columns"
    plain = not int4 and not gemm.groups and tile.splits == 1 and not tile.swapped
    if tile.persistent and not plain:
        return "the persistent variant has no int4, groups, swap or split"
    if tile.persistent and not (len(gemm.results) == 1 and _whole_vectors(gemm)):
        return "the persistent variant has one result, and rows of multiples of 16 bytes"
    if gemm.groups and tile.splits > 1:
        return "groups are not split along k"
    if gemm.indexed and not gemm.groups:
        return "rows have an index only where they have groups"
    if gemm.dtype == "i8" and gemm.format.storage != "i8":
        return "rows of i8 are multiplied with weights of i8"
    if not all(result.node.rows and result.node.column for result in gemm.results):
        return "a result does not vary along both dims"
    return ""


class _Writer:
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

    # ---- arguments ----

    def arguments(self) -> dict[str, str]:
        g = self.gemm
        out = {"a_ptr": POINTER[g.dtype], "b_ptr": POINTER[self.storage]}
        if g.format.name != "plain":
            out["b_scale_ptr"] = "*fp32" if g.format.scaled else POINTER[g.dtype]
        if self.int4:
            out["b_zero_ptr"] = POINTER[g.dtype]
        if g.a_scaled:
            out["a_scale_ptr"] = "*fp32"
        if g.groups:
            out["offsets_ptr"] = "*i32"
        if g.indexed:
            out["index_ptr"] = "*i64"
        out.update({f"{t.name}_ptr": POINTER[t.dtype] for t in g.tensors})
        out.update({f"{r.name}_ptr": POINTER[r.dtype] for r in g.results})
        if self.tile.splits > 1:
            out.update({"sums_ptr": f"*{'i32' if self.sums == 'i32' else 'fp32'}", "count_ptr": "*i32"})
        out.update(dict.fromkeys(("M", "N", "K", "a_stride", "b_stride"), "i32"))
        if g.groups:
            out["b_group_stride"] = "i64"
        return out | {t.stride: "i32" for t in g.tensors if t.stride}

    def aligned(self) -> tuple[str, ...]:
        g = self.gemm
        # the number of rows may be another on each rank; only rows that lie side by side need it
        sizes = {"M": g.m if g.a_order == "km" else 1, "N": g.n, "K": g.k}
        k_bytes = -(-g.k // BLOCK) * HALF if self.int4 else g.k
        sizes["a_stride"] = g.k if g.a_order == "mk" else g.m
        sizes["b_stride"] = k_bytes if g.b_order == "nk" else g.n
        sizes["b_group_stride"] = g.n * k_bytes
        of_k = self.in_prologue()
        sizes |= {t.stride: g.k if t.name in of_k else g.n for t in g.tensors if t.stride}
        return tuple(name for name in self.arguments() if sizes.get(name, 1) % 16 == 0)

    def in_prologue(self) -> set[str]:
        """Tensors that a prologue loads: their column is k."""
        stack = [node for node in (self.gemm.a_prologue, self.gemm.b_prologue) if node is not None]
        found = set()
        while stack:
            node = stack.pop()
            stack += node.args
            found |= {str(node.data[0])} if node.op == "load" else set()
        return found

    # ---- the kernel ----

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
        a_at, b_at = _pair("tile_m * BLOCK_M", "k0", mk), _pair("tile_n * BLOCK_N", "k0", nk)
        work = [f"a{self.raw('a', '')} = a_desc.load([{a_at}]){'' if mk else '.T'}",
                f"b{self.raw('b', '')} = b_desc.load([{b_at}]){'.T' if nk else ''}"]
        masks = []
        if g.a_prologue is not None:
            masks.append("in_a = in_rows & (k0 + k_a < K)")
        if g.b_prologue is not None:
            masks.append("in_b = in_cols & (k0 + k_b < K)")
        work += [*masks, *self.prologue("a", "", ""), *self.prologue("b", "", ""), self.dot("")]
        a_desc = _descriptor("a", _pair("M", "K", mk), _pair("BLOCK_M", "BLOCK_K", mk))
        b_desc = _descriptor("b", _pair("N", "K", nk), _pair("BLOCK_N", "BLOCK_K", nk))
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

    # ---- the file ----

    def draft(self) -> Draft:
        """All of it."""
        g, tile = self.gemm, self.tile
        constants = {"BLOCK_M": tile.m, "BLOCK_N": tile.n, "BLOCK_K": tile.k}
        derived: dict[str, tuple[int, str]] = {}
        if not tile.persistent:
            step = BLOCK if self.int4 else tile.k
            derived["EVEN_K"] = (int(g.k % step == 0), f"K % {self.step} == 0")
        if tile.splits > 1:
            constants["SPLITS"] = tile.splits
        if g.groups:
            derived["GROUPS"] = (g.groups, "len(b)")
            two = 1 << g.groups.bit_length()
            derived["GROUPS_2"] = (two, "triton.next_power_of_2(len(b) + 1)")
        else:
            constants["GROUP_M"] = 8
        sizes = [DTYPES[t.dtype] * (g.m if t.rows else 1) * (g.n if t.column else 1) for t in g.tensors]
        sizes += [DTYPES[r.dtype] * g.m * g.n for r in g.results]
        weight = max(1, g.groups) * g.n * g.k * DTYPES[self.storage] // (2 if self.int4 else 1)
        moved = g.m * g.k * DTYPES[g.dtype] + weight + sum(sizes)
        variant = [name for name, on in (
            ("persistent", tile.persistent), ("swapped", tile.swapped), ("split", tile.splits > 1),
            ("grouped", bool(g.groups))) if on]  # fmt: skip
        doc = f"Product {g.name}: {', '.join(variant) or 'plain'}, {g.format.name} weights.\n\n{g.doc}\n"
        return Draft(
            g.name, doc, self.arguments(), constants, derived, self.body(),
            self.launch(constants, derived), self.aligned(), tile.warps, tile.stages, "gemm", moved,
        )  # fmt: skip

    def launch(self, constants: dict[str, int], derived: dict[str, tuple[int, str]]) -> str:
        g, tile = self.gemm, self.tile
        given = ["a", "b"]
        given += [name for name in ("b_scale", "b_zero", "a_scale", "offsets", "index")
                  if f"{name}_ptr" in self.arguments()]  # fmt: skip
        given += [t.name for t in g.tensors]
        values = [self.value(name) for name in self.arguments()]
        tiles = "triton.cdiv(M, BLOCK_M) * triton.cdiv(N, BLOCK_N)"
        extra = []
        if g.groups:  # a group, and the rest, has at most one tile that is not full
            tiles = "(M // BLOCK_M + len(b) + 1) * triton.cdiv(N, BLOCK_N)"
        if tile.splits > 1:
            sums = "torch.int32" if self.sums == "i32" else "torch.float32"
            extra = [f"tiles = {tiles}",
                     f"sums = torch.empty(tiles * SPLITS * BLOCK_M * BLOCK_N, dtype={sums}, device=a.device)",
                     "count = torch.zeros(tiles, dtype=torch.int32, device=a.device)"]
            tiles = "tiles * SPLITS"
        if tile.persistent:
            extra = [f"described(a, b, {g.results[0].name})",
                     "# tensor descriptors live in memory that Triton asks for",
                     "triton.set_allocator(lambda size, align, stream: "
                     "torch.empty(size, dtype=torch.int8, device=a.device))",
                     f"programs = min({tiles}, processors(a.device))"]
            tiles = "programs"
        return text(
            """
            <processors>
            def launch(<given>):
                \"\"\"Run the kernel: a [<m_k>], b [<n_k>] -> (<names>).\"\"\"
                a = matrix(a)
                <weight>
                <tensors>
                <m_k> = a.shape
                N = <columns>
                <results>
                if M * N:
                    <extra>
                    <call>
                return (<names>,)
            """,
            processors=PROCESSORS.split("\n") if tile.persistent else [],
            weight=["b = b.contiguous()" if g.groups else "b = matrix(b)"],
            tensors=[f"{t.name} = matrix({t.name})" if t.stride else f"{t.name} = {t.name}.contiguous()"
                     for t in g.tensors],
            results=[f"{r.name} = torch.empty((M, N), dtype=torch.{TORCH[r.dtype]}, device=a.device)"
                     for r in g.results],
            extra=extra, call=Draft.call(values, constants, derived, f"({tiles},)"),
            given=", ".join(given), m_k=_pair("M", "K", g.a_order == "mk"),
            n_k=_pair("N", "K", g.b_order == "nk"), names=", ".join(r.name for r in g.results),
            columns=f"b.shape[{-2 if g.b_order == 'nk' else -1}]",
        )  # fmt: skip

    def value(self, argument: str) -> str:
        """What `launch` passes for an argument."""
        fixed = {"a_stride": "a.stride(0)", "b_stride": "b.stride(-2)", "b_group_stride": "b.stride(0)"}
        if argument in fixed:
            return fixed[argument]
        if argument.endswith("_s0"):
            return f"{argument[:-3]}.stride(0)"
        return argument.removesuffix("_ptr")


def _place(own: str, k: str, stride: str, k_last: bool) -> str:
    """Offset of (own index, k) in an operand whose last dim is k, or the other."""
    outer, inner = (own, k) if k_last else (k, own)
    return f"{outer}.to(tl.int64) * {stride} + {inner}"


def _pair(own: str, k: str, k_last: bool) -> str:
    return f"{own}, {k}" if k_last else f"{k}, {own}"


def _descriptor(name: str, shape: str, block: str, to: str = "", stride: str = "") -> str:
    stride = stride or f"{name}_stride"
    return (f"{to or f'{name}_desc'} = tl.make_tensor_descriptor("
            f"{name}_ptr, [{shape}], [{stride}, 1], [{block}])")  # fmt: skip


PROCESSORS = '''\
def described(*matrices):
    """Raise ValueError where a tensor descriptor cannot name a matrix."""
    for x in matrices:
        if not x.numel() or x.data_ptr() % 16 or x.stride(0) * x.element_size() % 16:
            raise ValueError("no rows, or rows not at multiples of 16 bytes: take another variant")


def processors(device):
    """Programs that run at the same time."""
    if device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count

'''


__all__ = ["FEW_ROWS", "Gemm", "Result", "Tile", "default_tile", "gemm_source"]
