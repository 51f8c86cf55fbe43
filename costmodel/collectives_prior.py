"""The analytic time of collectives on GPUs: the least over algorithms and protocols.

NCCL (its tuning model, nccl/src/graph/tuning.cc, has the same form): a collective costs a base,
its steps, and its bytes over a bandwidth; the protocols LL, LL128 and Simple trade latency of a
step against bandwidth; NVLS reduces in the switch. Between hosts all_reduce goes up and down a
double binary tree (Sanders, Speck and Traeff, 2009): 2 log2(hosts) steps, 2 (m-1)/m of the bytes.
All-reduces of inference engines read all peers' buffers (one-shot) or reduce and gather
(two-shot), and fall back to NCCL. DeepEP's normal kernels are bound by the multiprocessors they
may use, its low-latency kernels by messages.

The parameters are fitted (`benchmarks/train_collectives.py`); `START` has where the fit begins,
and how far it may go, in logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .collectives_query import COLLECTIVES, IMPLS, NETWORKS, SHAPES, TIMINGS, Query

Array = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]
_PLAIN = COLLECTIVES[:5]  # those of NCCL
#: Ampere's clock in MHz: latencies are counted in its cycles
_CLOCK = 1410
#: experts that a token goes to (DeepSeek-V3)
_TOP_K = 8


@dataclass(frozen=True)
class Columns:
    """Queries as arrays; the first four are indices into the tables of `collectives_query`."""

    collective: Ints
    impl: Ints
    timing: Ints
    shape: Ints
    bytes: Array
    ranks: Array
    local: Array
    hosts: Array
    gb_per_s: Array
    network: Array
    multiprocessors: Array
    experts: Array
    generation: Array
    element_bytes: Array
    latency_scale: Array
    clock: Array
    memory: Array
    joined: Ints
    peer: Ints
    arm: Ints

    def take(self, index: npt.NDArray[np.generic]) -> Columns:
        """Some of the queries."""
        return Columns(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def columns(queries: Sequence[Query]) -> Columns:
    """Queries as arrays."""

    def ints(of: Callable[[Query], int]) -> Ints:
        return np.array([of(q) for q in queries], dtype=np.int64)

    def reals(of: Callable[[Query], float]) -> Array:
        return np.array([of(q) for q in queries], dtype=np.float64)

    return Columns(
        ints(lambda q: COLLECTIVES.index(q.collective)), ints(lambda q: IMPLS.index(q.impl)),
        ints(lambda q: TIMINGS.index(q.timing)), ints(lambda q: SHAPES.index(q.shape)),
        reals(lambda q: max(q.bytes, 1.0)), reals(lambda q: q.ranks), reals(lambda q: q.local),
        reals(lambda q: q.hosts), reals(lambda q: q.gb_per_s), reals(lambda q: q.network),
        reals(lambda q: q.multiprocessors), reals(lambda q: q.experts),
        reals(lambda q: q.generation), reals(lambda q: q.element_bytes),
        reals(lambda q: q.latency_scale), reals(lambda q: q.clock_mhz / _CLOCK),
        reals(lambda q: q.memory_gb_per_s), ints(lambda q: NETWORKS.index(q.joined)),
        ints(lambda q: q.peer), ints(lambda q: q.arm_host),
    )  # fmt: skip


def _start() -> dict[str, tuple[float, float]]:
    """Parameter -> (start, standard deviation of its logarithm). Times in us, rates as fractions of
    the datasheet bandwidth."""
    out = {
        "lat:ll128": (1.5, 0.7), "lat:simple": (8.0, 0.7), "lat:nvls": (18.0, 0.4),
        "eff:nvls": (0.95, 0.2), "hopper": (1.0, 0.15), "blackwell": (1.3, 0.3),
        "clock": (1.0, 0.2), "pcie:crowd": (1.0, 0.15), "pcie:peer": (0.3, 0.3),
        "net:hop": (4.0, 0.2), "net:base": (10.0, 0.2), "net:alltoall": (1.0, 0.2),
        "base:oneccl": (12.0, 0.5), "net:ib": (1.0, 0.1), "net:efa": (3.0, 0.4),
        "net:tcp": (5.0, 0.4), "net:pcie": (5.0, 0.7), "custom:eager": (30.0, 0.5),
        "net:eff": (0.85, 0.05), "net:ramp": (1.0, 0.2), "net:pair": (0.5, 0.3),
        "custom:copy": (2.0, 0.3), "custom:arm": (1.3, 0.3), "custom:lat2": (2.0, 0.5),
        "custom:one": (0.5, 0.4), "custom:two": (0.7, 0.3), "custom:hop": (0.2, 0.5),
        "custom:nccl": (4.0, 0.5), "ep:eff": (0.6, 0.4), "ep:net": (30.0, 0.5),
        "ep:netbytes": (0.45, 0.3), "ll:net": (12.0, 0.5), "ll:netbytes": (0.8, 0.3),
        "ll:blackwell": (1.4, 0.3), "ll:few": (1.0, 0.5), "nv:hop": (0.8, 0.7),
        "nv:grow": (1.1, 0.2),
    }  # fmt: skip
    for timing, start, sd in zip(
        TIMINGS, (6.0, 1.2, 8.0, 60.0, 3.0, 35.0, 20.0), (0.7, 0.15, 0.7, 0.7, 1, 1, 1), strict=True
    ):  # that of nccl_tests is a factor
        out[f"base:{timing}"] = (start, sd)
    for name, base, copy in zip(
        _PLAIN, (1.0, 1.0, 1.0, 1.1, 0.8), (0.1, 0.4, 0.3, 0.1, 0.1), strict=True
    ):
        out |= {f"base:{name}": (base, 0.4), f"hop:{name}": (1.0, 0.3), f"copy:{name}": (copy, 0.5)}
    for shape in SHAPES:
        out |= {f"hop:{shape}": (1.0, 0.5), f"ll:{shape}": (0.12, 0.5)}
        out |= {f"ll128:{shape}": (0.35, 0.5)}
        out |= {f"simple:{shape}": (0.4 if shape == "pcie" else 0.75, 0.1 if shape == "mesh" else 0.3)}
    out |= {f"base:{impl}": (3.5, 0.4) for impl in IMPLS[2:5]}
    for name in COLLECTIVES[5:7]:
        out |= {f"base:{name}": (25.0, 0.4), f"bytes:{name}": (4.0, 0.5), f"sm:{name}": (12.0, 0.5)}
    for name in COLLECTIVES[7:9]:
        out |= {f"base:{name}": (9.0, 0.4), f"bytes:{name}": (6.0, 0.5)}
    for impl in IMPLS[7:]:
        for name in COLLECTIVES[9:]:
            out |= {f"base:{impl}:{name}": (11.0, 0.4), f"wire:{impl}:{name}": (0.4, 0.7),
                    f"local:{impl}:{name}": (0.3, 0.7)}
    return out


START: Mapping[str, tuple[float, float]] = _start()


def _least(options: Sequence[Array], sharpness: float = 4.0) -> Array:
    """A smooth minimum: switches of protocol are spread over about an octave."""
    logs = np.log(np.stack(options))
    low = logs.min(0)
    found: Array = np.exp(low - np.log(np.exp(-sharpness * (logs - low)).sum(0)) / sharpness)
    return found


class Prior:
    """Times in us of queries, for a set of parameters (name -> value)."""

    def __init__(self, parameters: Mapping[str, float]) -> None:
        self.p = parameters

    def _of(self, pattern: str, names: Sequence[str], index: Ints) -> Array:
        table = np.array([self.p.get(pattern.format(name), 1.0) for name in names])
        found: Array = table[index]
        return found

    def __call__(self, c: Columns) -> Array:
        out = np.empty(len(c.bytes))
        groups = ((0, 1, self._nccl), (2, 4, self._custom), (5, 5, self._deepep),
                  (6, 6, self._deepep_ll), (7, 8, self._nvlink_alltoall))  # fmt: skip
        for low, high, form in groups:
            index = np.flatnonzero((c.impl >= low) & (c.impl <= high))
            if index.size:
                out[index] = form(c.take(index))
        return out

    def _latency(self, c: Columns) -> Array:
        """Factor of a device's latencies against Ampere's, and of this machine's."""
        p = self.p
        newest = np.where(c.generation >= 3, p["blackwell"], 1.0)
        newer = np.where(c.generation == 2, p["hopper"], newest)
        found: Array = newer * c.latency_scale / c.clock ** p["clock"]
        return found

    def _crowd(self, c: Columns) -> Array:
        """More than two devices share the host's PCIe."""
        crowd = np.where(c.peer > 0, self.p["pcie:peer"], self.p["pcie:crowd"])
        return np.where(c.shape == 3, np.maximum(c.local / 2, 1.0) ** crowd, 1.0)

    def _protocols(self, c: Columns) -> Array:
        """Inside a host: the least over LL, LL128, Simple and NVLS."""
        p = self.p
        reduce, swap, pair = c.collective == 0, c.collective == 3, c.collective == 4
        n = c.local
        alone = (n == 1) * 1.0
        steps = np.where(swap, np.log2(n), n - 1)
        steps = np.where(reduce, 2 * steps, np.where(pair, 1 - alone, steps))
        hop = self._of("hop:{}", SHAPES, c.shape) * self._of("hop:{}", COLLECTIVES, c.collective)
        steps = steps * hop * self._latency(c)
        share = np.where(pair, 1 - alone, (n - 1) / n) * np.where(reduce, 2.0, 1.0)
        wire = c.bytes * (share + self._of("copy:{}", COLLECTIVES, c.collective) / c.ranks)
        wire = wire * self._crowd(c) / (c.gb_per_s * 1e3)
        in_switch = reduce & (c.shape == 0) & (c.generation >= 2) & (n >= 4)
        nvls = p["lat:nvls"] + c.bytes * (1 + 1 / n) / (c.gb_per_s * 1e3 * p["eff:nvls"])
        return _least([
            steps + wire / self._of("ll:{}", SHAPES, c.shape) + 0.01,
            1.2 * steps + p["lat:ll128"] + wire / self._of("ll128:{}", SHAPES, c.shape),
            1.5 * steps + p["lat:simple"] + wire / self._of("simple:{}", SHAPES, c.shape),
            np.where(in_switch, nvls, 1e9),
        ])  # fmt: skip

    def _network(self, c: Columns) -> tuple[Array, Array]:
        """What hosts add: the steps of trees and rings, and the bytes that leave a host."""
        p, m = self.p, c.hosts
        reduce, swap, pair = c.collective == 0, c.collective == 3, c.collective == 4
        once = (m > 1) * 1.0
        steps = np.where(reduce, 2 * np.log2(m), np.where(swap | pair, once, m - 1))
        share = np.where(reduce, 2.0, 1.0) * np.where(pair, once, (m - 1) / m)
        rate = c.local * c.network * 1e3 * p["net:eff"]
        wire = c.bytes * share / rate * np.where(swap, c.local * p["net:alltoall"], 1.0)
        slow = self._of("net:{}", NETWORKS, c.joined) * np.where(c.shape >= 3, p["net:pcie"], 1.0)
        slow = slow * np.where(pair, p["net:pair"], 1.0) * c.latency_scale
        return (steps * p["net:hop"] + p["net:base"] * once) * slow, wire

    def _with_network(self, inside: Array, c: Columns) -> Array:
        """The time inside hosts, with what the network adds: both work on different parts at once.
        A message in parts of the best size takes (sqrt(latency) + sqrt(wire))^2."""
        steps, wire = self._network(c)
        pipelined = wire + 2 * self.p["net:ramp"] * np.sqrt(steps * wire)
        found: Array = np.hypot(inside, pipelined) + steps
        return found

    def _nccl(self, c: Columns) -> Array:
        base = self._of("base:{}", TIMINGS, c.timing)
        base = np.where(c.timing == 1, base * self.p[f"base:{TIMINGS[0]}"], base)
        base = base * self._of("base:{}", COLLECTIVES, c.collective)
        base = base * np.where(c.timing <= 2, self._latency(c), 1.0)
        base = np.where(c.impl == 1, self.p["base:oneccl"], base)
        return base + self._with_network(self._protocols(c), c)

    def _custom(self, c: Columns) -> Array:
        p, n = self.p, c.local
        rate = c.gb_per_s * 1e3 / self._crowd(c)
        hop = p["custom:hop"] * self._latency(c)
        base = self._of("base:{}", IMPLS, c.impl) * np.sqrt(self._latency(c))
        one = (n - 1) * (hop + c.bytes / (rate * p["custom:one"])) + 0.01
        two = p["custom:lat2"] + 2 * (n - 1) * (hop + c.bytes / n / (rate * p["custom:two"]))
        direct = np.where((c.shape >= 3) & (n > 2), 1e9, 0.0)  # needs a link to every peer
        best = _least([one + direct, two + direct, self._protocols(c) + p["custom:nccl"]])
        eager = c.timing == 5
        copy = np.where(eager, c.bytes * p["custom:copy"] / (c.memory * 1e3), 0.0)
        found: Array = base + self._with_network(best, c) + copy
        host = p["custom:eager"] * np.where(c.arm > 0, p["custom:arm"], 1.0)
        return np.where(eager, (found**4 + host**4) ** 0.25, found)

    def _deepep(self, c: Columns) -> Array:
        p, m = self.p, c.hosts
        slow = 1 / (np.maximum(c.multiprocessors, 1) * self._of("sm:{}", COLLECTIVES, c.collective))
        bound = 1 / _least([c.gb_per_s * p["ep:eff"], 1 / slow])
        moved = c.bytes * self._of("bytes:{}", COLLECTIVES, c.collective) * bound / 1e3
        far = p["ep:net"] * (0.7 + 0.3 * np.log2(np.maximum(m, 2)))
        far = far + c.bytes * p["ep:netbytes"] * 2 * (m - 1) / m / (c.network * 1e3)
        base = self._of("base:{}", COLLECTIVES, c.collective) * self._latency(c)
        found: Array = base + moved + np.where(m > 1, far, 0.0)
        return found

    def _deepep_ll(self, c: Columns) -> Array:
        """Few experts a rank: several tokens queue for one message buffer."""
        p, m = self.p, c.hosts
        base = self._of("base:{}", COLLECTIVES, c.collective)
        base = base * np.where(c.generation >= 3, p["ll:blackwell"], 1.0) * c.latency_scale
        few = 1 + p["ll:few"] * np.maximum(64 / np.maximum(c.experts, 1) - 1, 0)
        moved = c.bytes * self._of("bytes:{}", COLLECTIVES, c.collective) * few / (c.gb_per_s * 1e3)
        far = p["ll:net"] + c.bytes * p["ll:netbytes"] * (m - 1) / m / (c.network * 1e3)
        found: Array = base + moved + np.where(m > 1, far, 0.0)
        return found

    def _nvlink_alltoall(self, c: Columns) -> Array:
        pairs = [f"{impl}:{name}" for impl in IMPLS for name in COLLECTIVES]
        index = c.impl * len(COLLECTIVES) + c.collective
        n = c.ranks
        copies = (n - 1) * (1 - (1 - 1 / n) ** _TOP_K)  # of a token, to other ranks
        tokens = 2 * c.bytes / c.element_bytes
        dispatch = c.collective == COLLECTIVES.index("alltoall_dispatch")
        payload = np.where(dispatch, c.bytes, tokens) * copies ** self.p["nv:grow"]
        moved = payload * self._of("wire:{}", pairs, index) + tokens * self._of("local:{}", pairs, index)
        hops = self.p["nv:hop"] * np.log2(n) * c.latency_scale
        found: Array = self._of("base:{}", pairs, index) + hops + moved / (c.gb_per_s * 1e3)
        return found


def parameters(logs: Array) -> dict[str, float]:
    """Parameters from their logarithms, in the order of START."""
    return {name: math.exp(value) for name, value in zip(START, logs, strict=True)}
