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

from ..ir.errors import CompileError
from ..ir.types import DTYPES
from .formats import BLOCK, HALF
from .gemm_body import Gemm, GemmBody, Result, Tile, pair
from .hole import POINTER, Draft, text
from .source import _TORCH as TORCH
from .source import KernelSource

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


class _Writer(GemmBody):
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
            given=", ".join(given), m_k=pair("M", "K", g.a_order == "mk"),
            n_k=pair("N", "K", g.b_order == "nk"), names=", ".join(r.name for r in g.results),
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
