"""What the kernel-time model sees of a kernel: physical times that never fall when a size doubles.

Every family (`gemm`, `attention`, `moe`, `rowwise`, `conv`) turns its sizes into columns of two sorts:

* `rising`: log2 of physical quantities: microseconds of matrix products in whole tiles and waves,
  of DRAM and of L2 traffic, of serial steps, and the sizes themselves. None of them falls when a size
  doubles, and the network is non-decreasing in each, so estimates never fall either.
* `free`: numbers that doubling a size leaves as they are (its mantissa, a ratio of splits). The
  network may use them as it likes.

A device enters by its datasheet alone, see `kernel_context.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Column = NDArray[np.float64]
Sizes = Mapping[str, Column]

#: below this a time is as good as nothing: kernels take a microsecond and more
_LEAST_US = 0.05
#: bound beyond which time grows in proportion to it, 0.1 s: the longest kernels of most devices. Times
#: stop there as columns, and the bound's excess over it is a factor of the answer. From 1 ms on, errors
#: on larger shapes than seen are 3 (gemm) to 14 (attention) points higher: efficiency still changes
SETTLED_US = 1e5


@dataclass(frozen=True)
class Rates:
    """Rates of a device for one format, per row.

    Attributes:
        sms: multiprocessors.
        flops: matrix products, FLOP per microsecond.
        vector: f32 rate outside matrix units, FLOP per microsecond.
        dram: bytes per microsecond.
        l2: bytes per microsecond between L2 and multiprocessors.
        l2_bytes: size of the L2 cache.
        clock: cycles per microsecond.
        act, weight, out: bytes per element.
    """

    sms: Column
    flops: Column
    vector: Column
    dram: Column
    l2: Column
    l2_bytes: Column
    clock: Column
    act: Column
    weight: Column
    out: Column


@dataclass(frozen=True)
class Features:
    """Columns of a batch: `rising` [rows, r], `free` [rows, f], and the bound [rows] in us."""

    rising: NDArray[np.float64]
    free: NDArray[np.float64]
    bound_us: Column


def _log(time_us: Column, more: float = _LEAST_US) -> Column:
    return np.log2(np.minimum(time_us, SETTLED_US) + more)


def _ceil(a: Column, b: float | Column) -> Column:
    return np.ceil(a / b)


def _mantissa(x: Column) -> Column:
    """In [0, 1): how far x is between two powers of two; doubling x does not change it."""
    return np.asarray(np.log2(np.frexp(x)[0] * 2))


#: output tiles of matrix kernels, from skinny to the largest of Hopper and Blackwell
_TILES = ((16, 64), (64, 64), (64, 128), (128, 64), (128, 128), (128, 256), (256, 128), (256, 256))
_SPLITS = (1, 2, 4, 8, 16)
_MIB = 2**20 / 1e6


def _matrix(
    b: Column, m: Column, n: Column, k: Column, rates: Rates
) -> tuple[list[Column], Column]:
    """Columns of b products [m, k] x [k, n], and the best of the tilings in us."""
    per_sm = rates.flops / rates.sms
    columns, best = [], np.full_like(m, np.inf)
    for bm, bn in _TILES:
        tiles = b * _ceil(m, bm) * _ceil(n, bn)
        step_us = 2.0 * bm * bn * 64 / per_sm
        whole = _ceil(tiles, rates.sms) * _ceil(k, 64) * step_us
        columns.append(_log(whole))
        split = np.minimum.reduce(
            [_ceil(tiles * s, rates.sms) * _ceil(k, 64 * s) * step_us for s in _SPLITS]
        )
        if (bm, bn) in ((64, 64), (128, 128), (128, 256)):
            columns.append(_log(split))
        traffic = tiles * k * (bm * rates.act + bn * rates.weight) / rates.l2
        best = np.minimum(best, np.maximum(split, traffic))
        if (bm, bn) in ((64, 64), (128, 128), (256, 128)):
            columns += [_log(traffic), np.log2(tiles)]
    return columns, best


def _uncached(w: Column, more: Column, r: Rates) -> list[Column]:
    """Time to load w bytes of weights of which L2 keeps nothing, as far as it does not.

    Benchmarks go round several copies of the weights, a fixed number or at most 5 that exceed L2. A
    cache that is a little too small for a round keeps next to nothing of it. Doubling w never
    makes a round smaller: 2 ceil(x / 2) >= ceil(x).
    """
    l2 = r.l2_bytes * _MIB
    enough = w * np.clip(np.ceil(l2 / w), 1, 5)
    rounds = (enough, enough + more, 6 * w, w)
    return [_log(np.clip((size / l2 - 1.02) * 6, 0, 1) * w / r.dram, 0.2) for size in rounds]


def gemm(x: Sizes, r: Rates) -> Features:
    """Products of B pairs [M, K] x [K, N]."""
    b, m, n, k = x["B"], x["M"], x["N"], x["K"]
    columns, best = _matrix(b, m, n, k, r)
    a_us, w_us, o_us = (
        b * m * k * r.act / r.dram,
        b * k * n * r.weight / r.dram,
        b * m * n * r.out / r.dram,
    )
    moved = a_us + w_us + o_us
    spill = np.maximum(moved - r.l2_bytes / r.dram, 0.0)
    bound = np.maximum(best, moved)
    flops_us = 2 * b * m * n * k / r.flops
    columns += [
        _log(bound), _log(bound, 2), _log(best + moved), _log(flops_us), _log(moved), _log(spill),
        _log(a_us), _log(w_us), _log(o_us), _log(_ceil(k, 64) / r.clock * 64),
        np.log2(b), np.log2(m), np.log2(n), np.log2(k), np.log2(b * m * n), np.log2(_ceil(m, 16)),
        np.log2(_ceil(m, 64)), np.log2(m * k), np.log2(n * k),
        *_uncached(b * n * k * r.weight, b * m * (k * r.act + n * r.out), r),
    ]  # fmt: skip
    return Features(
        np.stack(columns, 1), np.stack([_mantissa(m), _mantissa(n), _mantissa(k)], 1), bound
    )


def conv(x: Sizes, r: Rates) -> Features:
    """Convolution of B images H x H with Cin channels by Cout filters k x k, as a matrix product."""
    b, cin, cout, k = x["B"], x["Cin"], x["Cout"], x["k"]
    side = np.floor((x["H"] + 2 * x["pad"] - k) / x["stride"]) + 1
    side = np.maximum(side, 1.0)
    m, depth = b * side * side, cin * k * k
    one = np.ones_like(m)
    columns, best = _matrix(one, m, cout, depth, r)
    in_us = b * cin * x["H"] ** 2 * r.act / r.dram
    w_us, o_us = depth * cout * r.weight / r.dram, m * cout * r.out / r.dram
    moved = in_us + w_us + o_us
    bound = np.maximum(best, moved)
    columns += [
        _log(bound), _log(bound, 2), _log(best + moved), _log(2 * m * depth * cout / r.flops),
        _log(moved), _log(in_us), _log(w_us), _log(o_us), np.log2(m), np.log2(cout), np.log2(depth),
        np.log2(cin), np.log2(b), np.log2(x["H"]),
    ]  # fmt: skip
    free = [np.log2(k), k == 1, k == 3, k == 5, x["stride"] - 1.0, x["pad"],
            _mantissa(b), _mantissa(cin), _mantissa(cout)]  # fmt: skip
    return Features(np.stack(columns, 1), np.stack([np.asarray(f, float) for f in free], 1), bound)


def _pairs(sq: Column, skv: Column, window: Column, causal: Column) -> Column:
    """Query-key pairs of one head: the last query sees all skv keys, at most `window` of them."""
    seen = np.where(window > 0, np.minimum(window, skv), skv)
    first = np.maximum(skv - sq + 1, 1.0)
    rows = skv - first + 1
    ramp = np.clip(seen - first + 1, 0.0, rows)
    causal_pairs = ramp * (first + first + ramp - 1) / 2 + (rows - ramp) * seen
    return np.where(causal > 0, np.maximum(causal_pairs, seen), sq * seen)


#: MLA: latent 512 + 64 rotary for decode, 192-wide keys and 128-wide values for prefill
_MLA_WIDTH = 576


def attention(x: Sizes, r: Rates) -> Features:
    """Fused attention of B sequences; MLA where x["mla"] is 1."""
    b, heads, kvh, dim = x["B"], x["heads"], x["kv_heads"], x["head_dim"]
    sq, skv, mla, decode = x["sq"], x["skv"], x["mla"] > 0, x["decode"] > 0
    seen = np.where(x["window"] > 0, np.minimum(x["window"], skv), skv)
    pairs = _pairs(sq, skv, x["window"], x["causal"])
    key = np.where(mla & ~decode, dim / 3, dim)
    value = np.where(mla, np.where(decode, dim * 8 / 9, dim * 2 / 9), dim)
    kv_dim = np.where(mla & decode, key, key + value)
    kvh = np.where(mla & ~decode, heads, kvh)
    group = heads / kvh
    flops = 2 * b * heads * pairs * (key + value)
    flops_us = flops / r.flops
    q_us = b * heads * sq * (key * r.act + value * 2) / r.dram
    kv_us = b * kvh * np.minimum(skv, seen + sq) * kv_dim * r.weight / r.dram
    exp_us = b * heads * pairs / (r.sms * 16 * r.clock)
    columns = []
    best = np.full_like(b, np.inf)
    for bq, bk in ((16, 64), (64, 64), (128, 128), (256, 128)):
        rows = _ceil(sq * np.where(decode, group, 1.0), bq)
        ctas = b * np.where(decode, kvh, heads) * rows
        depth = _ceil(seen, bk)
        step_us = 2.0 * bq * bk * (key + value) / (r.flops / r.sms)
        whole = _ceil(ctas, r.sms) * depth * step_us
        split = np.minimum.reduce(
            [_ceil(ctas * s, r.sms) * _ceil(depth, s) * step_us for s in (1, 2, 4, 8, 16, 32)]
        )
        traffic = ctas * seen * kv_dim * r.weight / r.l2
        columns += [_log(whole), _log(split), np.log2(ctas), np.log2(_ceil(ctas, r.sms))]
        best = np.minimum(best, np.maximum(split, traffic))
        columns.append(_log(traffic))
    moved = q_us + kv_us
    bound = np.maximum(np.maximum(flops_us, moved), exp_us)
    # what one multiprocessor can load on its own: few heads cannot use the whole bandwidth
    lone = seen * kv_dim * r.weight / (r.dram / r.sms)
    columns += [
        _log(bound), _log(bound, 4), _log(best + moved + exp_us), _log(flops_us), _log(moved),
        _log(q_us), _log(kv_us), _log(exp_us), _log(lone), _log(np.maximum(moved - r.l2_bytes / r.dram, 0)),
        np.log2(b), np.log2(heads), np.log2(kvh), np.log2(dim), np.log2(sq), np.log2(skv),
        np.log2(seen), np.log2(b * heads), np.log2(b * kvh), np.log2(b * sq), np.log2(b * skv),
        _log(_ceil(seen, 64) / r.clock * 256),
    ]  # fmt: skip
    free = [
        _mantissa(b),
        _mantissa(sq),
        _mantissa(skv),
        _mantissa(heads),
        np.log2(dim / 64),
        group == 1,
        np.log2(group) / 2,
        np.minimum(group, 8) == group,
        x["window"] > 0,
        np.log2(x["window"] + 1) / 5,
    ]
    free = [np.asarray(column, float) for column in free]
    return Features(np.stack(columns, 1), np.stack(free, 1), bound)


def moe(x: Sizes, r: Rates) -> Features:
    """Fused mixture of experts: two products per expert (three matrices where gated)."""
    tokens, hidden, topk, experts = x["tokens"], x["hidden"], x["topk"], x["experts"]
    inter = x["inter"] / x["moe_tp"]
    local = np.maximum(experts / x["moe_ep"], 1.0)
    pairs = np.maximum(tokens * topk / x["moe_ep"], 1.0)
    chance = np.minimum(topk / experts, 1.0)
    active = local * -np.expm1(tokens * np.log1p(-np.minimum(chance, 1 - 1e-9)))
    active = np.maximum(active, np.minimum(1.0, local))
    gates = x["gated"] + 1.0
    columns = []
    best = np.full_like(tokens, np.inf)
    per_sm = r.flops / r.sms
    for bm in (16, 64, 128):
        rows = active + pairs / bm
        up, down = rows * _ceil(gates * inter, 128), rows * _ceil(hidden, 128)
        up_us = _ceil(up, r.sms) * _ceil(hidden, 64) * 2.0 * bm * 128 * 64 / per_sm
        down_us = _ceil(down, r.sms) * _ceil(inter, 64) * 2.0 * bm * 128 * 64 / per_sm
        traffic = (up * hidden + down * inter) * (bm * r.act + 128 * r.weight) / r.l2
        columns += [_log(up_us), _log(down_us), _log(up_us + down_us), _log(traffic),
                    np.log2(up), np.log2(down), np.log2(rows)]  # fmt: skip
        best = np.minimum(best, np.maximum(up_us + down_us, traffic))
    flops_us = 2 * pairs * hidden * inter * (gates + 1) / r.flops
    w_us = active * hidden * inter * (gates + 1) * r.weight / r.dram
    all_us = local * hidden * inter * (gates + 1) * r.weight / r.dram
    act_us = pairs * (2 * hidden * 2 + (gates + 1) * inter * 2) / r.dram
    moved = w_us + act_us
    bound = np.maximum(best, moved)
    columns += [
        _log(bound), _log(bound, 4), _log(bound, 16), _log(best + moved), _log(flops_us), _log(w_us),
        _log(all_us), _log(act_us), np.log2(tokens), np.log2(tokens * topk), np.log2(pairs), np.log2(active),
        np.log2(local), np.log2(experts), np.log2(topk), np.log2(hidden), np.log2(inter),
        _log(_ceil(hidden, 64) / r.clock * 64), _log(_ceil(inter, 64) / r.clock * 64),
        np.log2(tokens * hidden), np.log2(tokens * experts),
        _log(np.maximum(w_us - r.l2_bytes / r.dram, 0)),
    ]  # fmt: skip
    free = [x["skew"], np.log2(x["moe_ep"]), np.log2(x["moe_tp"]), _mantissa(tokens), _mantissa(hidden),
            _mantissa(inter), np.log2(topk) / 2, np.log2(experts) / 4]  # fmt: skip
    return Features(np.stack(columns, 1), np.stack(free, 1), bound)


def rowwise(x: Sizes, r: Rates) -> Features:
    """Elementwise ops, norms, softmax and their kin on `rows` x `cols` elements."""
    rows, cols = x["rows"], x["cols"]
    points = rows * cols
    in_bytes, out_bytes = points * x["n_in"] * r.act, points * x["n_out"] * r.out
    moved = (in_bytes + out_bytes) / r.dram
    l2_us = (in_bytes + out_bytes) / r.l2
    spill = np.maximum(in_bytes + out_bytes - r.l2_bytes, 0.0) / r.dram
    vector_us = points * 8 / r.vector
    bound = np.maximum(np.maximum(moved, vector_us), l2_us)
    columns = [
        _log(bound), _log(bound, 1), _log(bound, 4), _log(bound, 30), _log(moved), _log(l2_us),
        _log(spill), _log(spill, 2), np.log2(rows), np.log2(cols), np.log2(points), _log(out_bytes / r.dram),
        np.log2(_ceil(points, r.sms * 2048)), np.log2(_ceil(points, r.sms * 8192)),
        np.log2(_ceil(points, r.sms * 32768)), np.log2(_ceil(rows, r.sms)), np.log2(_ceil(rows, r.sms * 8)),
        np.log2(_ceil(cols, 1024)), np.log2(_ceil(cols, 4096)), np.log2(_ceil(rows, r.sms) * cols),
        np.log2(_ceil(rows, r.sms * 8) * cols), np.log2(_ceil(cols, 128)),
    ]  # fmt: skip
    return Features(np.stack(columns, 1), np.stack([_mantissa(rows), _mantissa(cols)], 1), bound)


#: family -> its features
FAMILIES: dict[str, Callable[[Sizes, Rates], Features]] = {
    "gemm": gemm, "conv": conv, "attention": attention, "moe": moe, "rowwise": rowwise,
}  # fmt: skip
