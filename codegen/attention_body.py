"""What an attention is, and the bodies of its kernels; see `attention`."""

from __future__ import annotations

from dataclasses import dataclass

from .expr import Graph, Node
from .hole import Hole, Tensor, leaf, text
from .layout import power_of_two

LOG2_E, LN_2 = "1.4426950408889634", "0.6931471805599453"
#: tensors with the sequences and heads of keys; the others have those of queries
OF_KEYS = ("k", "v", "dk", "dv")
#: tensors with a number for each query
VECTORS = ("lse", "delta")


@dataclass(frozen=True)
class Modifier:
    """What becomes of a score.

    Attributes:
        score: an expression of the leaf `score`, of `row` and `column`, and of loads.
        gradient: from the leaf `grad`, the gradient of the result, to the one of the score; None
            where they are equal: added biases, and masks, whose probabilities are 0.
        tensors: what both load: `[b, h, s, t]` as their `rows` and `column` say.
    """

    score: Node
    gradient: Node | None = None
    tensors: tuple[Tensor, ...] = ()


def mask_modifier(graph: Graph, dtype: str, *, rows: bool = True, column: bool = True) -> Modifier:
    """The mask operand of the op `attention`: bool says what is seen, a float is added."""
    mask, score = Tensor("mask", dtype, rows, column), leaf(graph, "score")
    value = mask.load(graph)
    if dtype == "bool":
        return Modifier(graph.where(value, score, float("-inf")), None, (mask,))
    return Modifier(score + value, None, (mask,))


@dataclass(frozen=True)
class Attention:
    """An attention.

    Attributes:
        kind: `forward`, `dq`, `dkdv` or `decode`.
        heads, groups: heads of q, and of k and v.
        queries, keys: lengths it is made for; others run as well.
        d, e: head sizes of q and k, and of v.
        causal: query i sees keys j <= i + shift; `shift` is an argument of `launch`, to which, in
            variable length, the difference of the lengths is added: the last ones are aligned.
        scale: factor of the scores; None makes it and `shift` arguments of `launch`.
    """

    name: str
    kind: str
    dtype: str
    heads: int
    groups: int
    queries: int
    keys: int
    d: int
    e: int
    causal: bool = False
    varlen: bool = False
    sparse: bool = False
    modifier: Modifier | None = None
    scale: float | None = None
    shift: int = 0
    doc: str = ""


@dataclass
class Bodies:
    """Writes the body of one kernel."""

    a: Attention

    # ---- pieces ----

    def base(self, name: str) -> str:
        """The line that finds a tensor's sequence and head."""
        keys = name in OF_KEYS
        head = "group" if keys else "head"
        terms = [f"{name}_ptr", f"batch.to(tl.int64) * {name}_b", f"{head}.to(tl.int64) * {name}_h"]
        if self.a.varlen:
            start = "k_start" if keys else "q_start"
            terms.append(start if name in VECTORS else f"{start}.to(tl.int64) * {name}_s")
        return f"{name}_at = {' + '.join(terms)}"

    def load(self, name: str, place: str, dim: str, inside: str, flip: bool = False) -> str:
        """The text that loads a tile of rows at `place`; flipped, the head dim comes first."""
        size = self.a.d if dim == "d" else self.a.e
        row, column = ("[None, :]", "[:, None]") if flip else ("[:, None]", "[None, :]")
        masks = [f"({inside}){row}"] if inside else []
        masks += [] if size == max(16, power_of_two(size)) else [f"(dims_{dim} < {dim.upper()}){column}"]
        mask = f", mask={' & '.join(masks)}, other=0.0" if masks else ""
        return f"tl.load({name}_at + {place}{row} * {name}_s + dims_{dim}{column}{mask})"

    def store(self, name: str, value: str, place: str, dim: str, inside: str) -> str:
        """The text that stores a tile of rows at `place`."""
        at, _, mask = self.load(name, place, dim, inside).partition(", mask=")
        return f"{at.replace('load', 'store', 1)}, {value}, mask={mask.replace(', other=0.0', '')}"

    def sequences(self) -> list[str]:
        """Lengths of the sequence at hand."""
        if not self.a.varlen:
            return ["q_len = S", "k_len = T"]
        return [
            "q_start = tl.load(cu_q_ptr + batch)", "k_start = tl.load(cu_k_ptr + batch)",
            "q_len = tl.load(cu_q_ptr + batch + 1) - q_start",
            "k_len = tl.load(cu_k_ptr + batch + 1) - k_start",
            "shift += k_len - q_len",
        ]  # fmt: skip

    def score(self, row: str, column: str) -> list[str]:
        """From the dot product to the score in base 2."""
        if self.a.modifier is None:
            return [f"score = score * (scale * {LOG2_E})"]
        lines, value = self.hole("s", self.a.modifier.score, row, column)
        return ["natural = score * scale", *lines, f"score = {value} * {LOG2_E}"]

    def gradient(self, row: str, column: str) -> list[str]:
        """From the score's gradient to that of the dot product, the scale aside."""
        if self.a.modifier is None or self.a.modifier.gradient is None:
            return []
        lines, value = self.hole("g", self.a.modifier.gradient, row, column)
        return [*lines, f"dscore = {value}"]

    def hole(self, prefix: str, node: Node, row: str, column: str) -> tuple[list[str], str]:
        """Lines that compute an expression of the modifier, and its name."""
        assert self.a.modifier is not None
        tensors = self.a.modifier.tensors
        place = "{0}_ptr + batch.to(tl.int64) * {0}_b + head * {0}_h"
        hole = Hole(
            prefix, {"score": "natural", "grad": "dscore", "row": row, "column": column}, tensors,
            (f"({row} < q_len)", f"({column} < k_len)"), {t.name: place.format(t.name) for t in tensors},
        )  # fmt: skip
        value = hole.emit(node)
        return [*hole.outer, *hole.lines], value

    def seen(self, row: str, column: str) -> list[str]:
        """Which scores of a tile there are, and count."""
        lines = [f"seen = ({column} < k_len) & ({row} < q_len)"]
        if self.a.causal:
            lines.append(f"seen = seen & ({column} <= {row} + shift)")
        return lines

    def block_list(self, loop: str, block: str) -> tuple[str, list[str]]:
        """The loop over the other side's blocks: all, or those of the list."""
        if not self.a.sparse:
            return loop, []
        visits = "for place in range(tl.load(visit_ptr + block), tl.load(visit_ptr + block + 1)):"
        return visits, [f"start = tl.load(blocks_ptr + place) * {block}"]

    def dot(self, left: str, right: str, acc: str = "") -> str:
        """The text of a product of tiles."""
        precision = ', input_precision="ieee"' if self.a.dtype == "f32" else ""
        return f"tl.dot({left}, {right}{', ' + acc if acc else ''}{precision})"

    def head(self, own: str) -> list[str]:
        """Where the program is: its sequence, heads, and the dims."""
        of_keys = own == "k"
        lines = ["block = tl.program_id(0)", "pair = tl.program_id(1)"]
        lines += ["batch = pair // GROUPS", "group = pair % GROUPS"] if of_keys else [
            "batch = pair // HEADS", "head = pair % HEADS", "group = head // (HEADS // GROUPS)"]
        lines += self.sequences()
        lines += [f"if block * BLOCK_{'N' if of_keys else 'M'} >= {own}_len:", "    return"]
        return [*lines, *self.dims()]

    def dims(self) -> list[str]:
        """Indices of the head dims."""
        return ["dims_d = tl.arange(0, BLOCK_D)", "dims_e = tl.arange(0, BLOCK_E)"]

    def softmax_step(self) -> list[str]:
        """One block of keys: what was summed is scaled to the new maximum."""
        return [
            "new = tl.maximum(top, tl.max(score, 1))",
            'safe = tl.where(new == float("-inf"), 0.0, new)',
            "p = tl.exp2(score - safe[:, None])",
            "kept = tl.exp2(top - safe)",
            "total = total * kept + tl.sum(p, 1)",
            "top = new",
        ]

    def end(self) -> list[str]:
        """The results of a program of queries."""
        return [
            "out = acc / tl.where(total == 0, 1.0, total)[:, None]",
            f'lse = tl.where(total == 0, float("-inf"), (top + tl.log2(total)) * {LN_2})',
        ]

    # ---- kernels ----

    def forward(self) -> str:
        """A block of queries meets all blocks of keys."""
        a = self.a
        loop = "for start in range(first, last, BLOCK_N):"
        edges = ["end = k_len", "whole = k_len // BLOCK_N * BLOCK_N"]
        if a.causal:
            edges += ["end = max(0, min(k_len, (block + 1) * BLOCK_M + shift))",
                      "whole = max(0, min(whole, (block * BLOCK_M + shift + 1) // BLOCK_N * BLOCK_N))"]
        rounds = "for edge in tl.static_range(2):  # blocks that all see, then those at an edge"
        bounds = ["first = whole if edge else 0", "last = end if edge else whole"]
        place = ["col = start + tl.arange(0, BLOCK_N)"]
        if a.sparse:
            rounds, edges = "for edge in tl.static_range(1, 2):", []
            bounds = ["first = tl.load(visit_ptr + block)", "last = tl.load(visit_ptr + block + 1)"]
            loop = "for place in range(first, last):"
            place = ["start = tl.load(blocks_ptr + place) * BLOCK_N", *place]
        return text(
            """
            <head>
            row = block * BLOCK_M + tl.arange(0, BLOCK_M)
            <bases>
            q = <q>
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
            <edges>
            <rounds>
                <bounds>
                <loop>
                    <place>
                    if edge:
                        k = <k_edge>
                        v = <v_edge>
                    else:
                        k = <k>
                        v = <v>
                    score = <dot>
                    <score>
                    if edge:
                        <seen>
                        score = tl.where(seen, score, float("-inf"))
                    <softmax>
                    acc = <acc>
            <end>
            <out>
            tl.store(lse_at + row, lse, mask=row < q_len)
            """,
            head=self.head("q"), bases=[self.base(name) for name in ("q", "k", "v", "out", "lse")],
            edges=edges, bounds=bounds, place=place, score=self.score("row[:, None]", "col[None, :]"),
            seen=self.seen("row[:, None]", "col[None, :]"), softmax=self.softmax_step(), end=self.end(),
            rounds=rounds, loop=loop,
            q=self.load("q", "row", "d", "row < q_len"),
            k_edge=self.load("k", "col", "d", "col < k_len", True),
            v_edge=self.load("v", "col", "e", "col < k_len"),
            k=self.load("k", "col", "d", "", True),
            v=self.load("v", "col", "e", ""),
            dot=self.dot("q", "k"),
            acc=self.dot("p.to(v.dtype)", "v", "acc * kept[:, None]"),
            out=self.store("out", "out.to(out_ptr.dtype.element_ty)", "row", "e", "row < q_len"),
        )  # fmt: skip

    def decode(self) -> str:
        """Programs share a cache. The last one to finish merges: see the split of `gemm`."""
        return text(
            """
            split = tl.program_id(0)
            pair = tl.program_id(1)
            batch = pair // GROUPS
            group = pair % GROUPS
            repeat = tl.arange(0, BLOCK_M)
            head = group * (HEADS // GROUPS) + repeat
            in_heads = repeat < HEADS // GROUPS
            k_len = tl.load(lengths_ptr + batch)
            <dims>
            k_at = k_ptr + batch.to(tl.int64) * k_b + group.to(tl.int64) * k_h
            v_at = v_ptr + batch.to(tl.int64) * v_b + group.to(tl.int64) * v_h
            q_at = q_ptr + batch.to(tl.int64) * q_b
            q = <q>
            top = tl.full([BLOCK_M], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_M], tl.float32)
            acc = tl.zeros([BLOCK_M, BLOCK_E], tl.float32)
            part = tl.cdiv(tl.cdiv(k_len, BLOCK_N), SPLITS) * BLOCK_N
            for start in range(split * part, min(k_len, (split + 1) * part), BLOCK_N):
                col = start + tl.arange(0, BLOCK_N)
                k = <k>
                v = <v>
                score = <dot> * (scale * <log2_e>)
                score = tl.where((col < k_len)[None, :], score, float("-inf"))
                <softmax>
                acc = <acc>
            local = repeat[:, None] * BLOCK_E + dims_e[None, :]
            sums = sums_ptr + pair.to(tl.int64) * (SPLITS * BLOCK_M * BLOCK_E) + local
            tops = tops_ptr + pair * (SPLITS * BLOCK_M * 2) + repeat
            tl.store(sums + split * (BLOCK_M * BLOCK_E), acc)
            tl.store(tops + split * (BLOCK_M * 2), top)
            tl.store(tops + split * (BLOCK_M * 2) + BLOCK_M, total)
            tl.debug_barrier()
            before = tl.atomic_add(count_ptr + pair, 1, sem="acq_rel")
            if before == SPLITS - 1:
                top = tl.load(tops, cache_modifier=".cg")
                total = tl.load(tops + BLOCK_M, cache_modifier=".cg")
                acc = tl.load(sums, cache_modifier=".cg")
                for other in range(1, SPLITS):
                    its_top = tl.load(tops + other * (BLOCK_M * 2), cache_modifier=".cg")
                    its_total = tl.load(tops + other * (BLOCK_M * 2) + BLOCK_M, cache_modifier=".cg")
                    its_acc = tl.load(sums + other * (BLOCK_M * BLOCK_E), cache_modifier=".cg")
                    new = tl.maximum(top, its_top)
                    safe = tl.where(new == float("-inf"), 0.0, new)
                    kept = tl.exp2(top - safe)
                    added = tl.exp2(its_top - safe)
                    total = total * kept + its_total * added
                    acc = acc * kept[:, None] + its_acc * added[:, None]
                    top = new
                <end>
                out_at = out_ptr + batch.to(tl.int64) * out_b
                <out>
                tl.store(lse_ptr + batch * HEADS + head, lse, mask=in_heads)
            """,
            dims=self.dims(), softmax=self.softmax_step(), end=self.end(),
            log2_e=LOG2_E,
            q=self.load("q", "head", "d", "in_heads").replace("q_s", "q_h"),
            k=self.load("k", "col", "d", "col < k_len", True),
            v=self.load("v", "col", "e", "col < k_len"),
            dot=self.dot("q", "k"),
            acc=self.dot("p.to(v.dtype)", "v", "acc * kept[:, None]"),
            out=self.store("out", "out.to(out_ptr.dtype.element_ty)", "head", "e", "in_heads").replace(
                "out_s", "out_h"),
        )  # fmt: skip

    def dq(self) -> str:
        """The gradient of a block of queries, and delta."""
        a = self.a
        end = "max(0, min(k_len, (block + 1) * BLOCK_M + shift))" if a.causal else "k_len"
        loop, place = self.block_list("for start in range(0, end, BLOCK_N):", "BLOCK_N")
        return text(
            """
            <head>
            row = block * BLOCK_M + tl.arange(0, BLOCK_M)
            <bases>
            q = <q>
            dout = <dout>
            out = <out>
            delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
            tl.store(delta_at + row, delta, mask=row < q_len)
            lse = tl.load(lse_at + row, mask=row < q_len, other=0.0)
            lse = tl.where(lse == float("-inf"), 0.0, lse) * <log2_e>
            acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
            <bounds>
            <loop>
                <place>
                col = start + tl.arange(0, BLOCK_N)
                k = <k>
                v = <v>
                score = <dot>
                <score>
                <seen>
                p = tl.where(seen, tl.exp2(score - lse[:, None]), 0.0)
                dscore = p * (<dp> - delta[:, None])
                <gradient>
                acc = <acc>
            <dq>
            """,
            head=self.head("q"), bounds=f"end = {end}", place=place,
            bases=[self.base(n) for n in ("q", "k", "v", "dout", "out", "dq", "lse", "delta")],
            score=self.score("row[:, None]", "col[None, :]"),
            seen=self.seen("row[:, None]", "col[None, :]"),
            gradient=self.gradient("row[:, None]", "col[None, :]"),
            loop=loop, log2_e=LOG2_E,
            q=self.load("q", "row", "d", "row < q_len"),
            dout=self.load("dout", "row", "e", "row < q_len"),
            out=self.load("out", "row", "e", "row < q_len"),
            k=self.load("k", "col", "d", "col < k_len", True),
            v=self.load("v", "col", "e", "col < k_len", True),
            dot=self.dot("q", "k"),
            dp=self.dot("dout", "v"),
            acc=self.dot("dscore.to(k.dtype)", "tl.trans(k)", "acc"),
            dq=self.store("dq", "(acc * scale).to(q.dtype)", "row", "d", "row < q_len"),
        )  # fmt: skip

    def dkdv(self) -> str:
        """The gradients of a block of keys, for all heads that share it."""
        a = self.a
        first = "max(0, block * BLOCK_N - shift) // BLOCK_M * BLOCK_M" if a.causal else "0"
        loop, place = self.block_list("for start in range(first, q_len, BLOCK_M):", "BLOCK_M")
        return text(
            """
            <head>
            col = block * BLOCK_N + tl.arange(0, BLOCK_N)
            <bases>
            k = <k>
            v = <v>
            dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
            dv = tl.zeros([BLOCK_N, BLOCK_E], tl.float32)
            <bounds>
            for repeat in range(HEADS // GROUPS):
                head = group * (HEADS // GROUPS) + repeat
                <inner>
                <loop>
                    <place>
                    row = start + tl.arange(0, BLOCK_M)
                    q = <q>
                    dout = <dout>
                    lse = tl.load(lse_at + row, mask=row < q_len, other=0.0)
                    lse = tl.where(lse == float("-inf"), 0.0, lse) * <log2_e>
                    delta = tl.load(delta_at + row, mask=row < q_len, other=0.0)
                    score = <dot>
                    <score>
                    <seen>
                    p = tl.where(seen, tl.exp2(score - lse[None, :]), 0.0)
                    dv = <add_v>
                    dscore = p * (<dp> - delta[None, :])
                    <gradient>
                    dk = <add_k>
            <dk>
            <dv>
            """,
            head=self.head("k"), bounds=f"first = {first}", place=place,
            bases=[self.base(name) for name in ("k", "v", "dk", "dv")],
            inner=[self.base(name) for name in ("q", "dout", "lse", "delta")],
            score=self.score("row[None, :]", "col[:, None]"),
            seen=self.seen("row[None, :]", "col[:, None]"),
            gradient=self.gradient("row[None, :]", "col[:, None]"),
            loop=loop, log2_e=LOG2_E,
            k=self.load("k", "col", "d", "col < k_len"),
            v=self.load("v", "col", "e", "col < k_len"),
            q=self.load("q", "row", "d", "row < q_len", True),
            dout=self.load("dout", "row", "e", "row < q_len"),
            dot=self.dot("k", "q"),
            add_v=self.dot("p.to(dout.dtype)", "dout", "dv"),
            dp=self.dot("v", "tl.trans(dout)"),
            add_k=self.dot("dscore.to(q.dtype)", "tl.trans(q)", "dk"),
            dk=self.store("dk", "(dk * scale).to(k.dtype)", "col", "d", "col < k_len"),
            dv=self.store("dv", "dv.to(v.dtype)", "col", "e", "col < k_len"),
        )  # fmt: skip
