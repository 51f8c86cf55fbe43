"""A simulated step as Chakra execution traces, one `.et` file per rank.

MLCommons Chakra (Sridharan et al., arXiv 2305.14516, 2023; schema `et_def.proto`, version 0.0.4): a
file is a sequence of protobuf messages, each behind its length as a varint: a GlobalMetadata, then
a Node per action. Simulators such as ASTRA-sim replay them. The wire format is simple enough to
write here (varints, and bytes with their length); the tests read it with the protobuf library.

The nodes of a rank depend on the nodes that made their operands (data) and on the action before
them in the compute stream (control). `comm_size` is the bytes that a rank holds before a
collective. A `permute_ranks` is a send and a receive.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path

from ..ir.crossing import crosses
from ..ir.module import Function, Op
from ..ir.opdef import OPS, flops_of
from ..ir.signature import SignatureError
from ..ir.trace_events import event_name
from .collectives import LOCAL
from .simulate_cost import local_bytes_at
from .simulate_result import Result

VERSION = "0.0.4"
_COMPUTE, _SEND, _RECV, _COLLECTIVE = 4, 5, 6, 7
#: CollectiveCommType; a log-sum-exp gathers all terms
_TYPES = {
    "all_reduce": 0, "all_gather": 2, "lse_combine": 2, "broadcast": 5, "all_to_all": 6,
    "reduce_scatter": 7,
}  # fmt: skip


def varint(number: int) -> bytes:
    """A base-128 varint, least significant group first; negative numbers as 64-bit."""
    number &= (1 << 64) - 1
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _field(number: int, payload: int | str | bytes | float) -> bytes:
    """A field with its tag: varint (wire type 0), double (1), or bytes with their length (2)."""
    if isinstance(payload, float):
        return varint(number << 3 | 1) + struct.pack("<d", payload)
    if isinstance(payload, int):
        return varint(number << 3) + varint(payload)
    data = payload.encode() if isinstance(payload, str) else payload
    return varint(number << 3 | 2) + varint(len(data)) + data


#: fields of AttributeProto's `value`
_INT32, _INT64, _UINT64, _BOOL, _STRING = 7, 9, 13, 27, 29


def _attribute(name: str, kind: int, value: int | str) -> bytes:
    return _field(10, _field(1, name) + _field(kind, value))


def _packed(numbers: Iterable[int]) -> bytes:
    return b"".join(map(varint, numbers))


class _Writer:
    """The nodes of one rank."""

    def __init__(self, result: Result, rank: int, groups: dict[tuple[int, ...], int]) -> None:
        self.result, self.rank, self.groups = result, rank, groups
        self.function: Function = result.program(rank)
        self.made: dict[str, int] = {}  # value -> the node that makes it
        self.previous: int | None = None
        self.messages = [_field(1, VERSION)]
        self.spans = {index: (start, end) for index, start, end in result.actions(rank)}
        self.spans.update((i, (start, end)) for i, _, start, end in result.transfers(rank))

    def write(self) -> bytes:
        """All messages, each behind its length."""
        for index, op in enumerate(self.function.ops):
            if op.name == "wait":  # the value is there once the transfer is done
                made = self.made.get(op.operands[0].name)
                if made is not None:
                    self.made[op.results[0].name] = self.previous = made
            elif op.name != "free":
                self._action(index, op)
        return b"".join(varint(len(message)) + message for message in self.messages)

    def _action(self, index: int, op: Op) -> None:
        if OPS[op.name].family == "collective" and op.name not in LOCAL:
            nodes = self._transfer(op)
        else:
            nodes = [(_COMPUTE, self._work(op))]
        start, end = self.spans.get(index, (0.0, 0.0))
        deps = sorted({self.made[v.name] for v in op.operands if v.name in self.made})
        number = len(self.messages) - 1
        for kind, attributes in nodes:
            number = len(self.messages) - 1
            body = _field(1, number) + _field(2, event_name(op)) + _field(3, kind)
            if self.previous is not None:
                body += _field(4, _packed([self.previous]))
            if deps:
                body += _field(5, _packed(deps))
            body += _field(6, round(start)) + _field(7, round(end - start)) + attributes
            self.messages.append(body + _attribute("weft_action", _INT64, index))
        if not op.attrs.get("async"):
            self.previous = number
        self.made.update((value.name, number) for value in op.results)

    def _work(self, op: Op) -> bytes:
        mesh, coord = self.result.mesh(self.rank), self.result.coord(self.rank)
        values = (*op.operands, *op.results)
        moved = sum(local_bytes_at(value.type, mesh, coord) for value in values)
        try:
            whole = flops_of(op)
        except SignatureError:
            whole = 0.0
        used = 1
        for axis in op.split:
            used *= mesh.sizes[mesh.axis(axis)]
        return (
            _attribute("is_cpu_op", _BOOL, int(mesh.device == "cpu"))
            + _attribute("num_ops", _INT64, round(whole / used))
            + _attribute("tensor_size", _UINT64, moved)
        )

    def _transfer(self, op: Op) -> list[tuple[int, bytes]]:
        mesh, coord = self.result.mesh(self.rank), self.result.coord(self.rank)
        held = op.operands[0] if op.operands else op.results[0]
        size = _size(local_bytes_at(held.type, mesh, coord))
        if op.name in ("send", "recv"):
            sends, tag = op.name == "send", int(op.attrs.get("tag", 0))  # type: ignore[arg-type]
            if crosses(op):
                return [
                    self._pair(sends, link.target if sends else link.source, tag, _size(link.bytes))
                    for link in self.result.links(self.rank, op)
                ]
            stage = int(op.attrs["to" if sends else "source"])  # type: ignore[arg-type]
            return [self._pair(sends, self.result.partner(self.rank, stage), tag, size)]
        members = self.result.members(self.rank, str(op.attrs["axis"]))
        if op.name == "permute_ranks":
            here, shift = members.index(self.rank), int(op.attrs.get("shift", 1))  # type: ignore[arg-type]
            to, source = (members[(here + way) % len(members)] for way in (shift, -shift))
            return [self._pair(True, to, 0, size), self._pair(False, source, 0, size)]
        group = self.groups.setdefault(tuple(members), len(self.groups) + 1)
        attributes = _attribute("comm_type", _INT64, _TYPES[op.name]) + size
        return [(_COLLECTIVE, attributes + _attribute("pg_name", _STRING, str(group)))]

    def _pair(self, sends: bool, other: int, tag: int, size: bytes) -> tuple[int, bytes]:
        source, target = (self.rank, other) if sends else (other, self.rank)
        ends = _attribute("comm_src", _INT32, source) + _attribute("comm_dst", _INT32, target)
        return _SEND if sends else _RECV, ends + _attribute("comm_tag", _INT32, tag) + size


def _size(bytes: int) -> bytes:
    return _attribute("comm_size", _INT64, bytes) + _attribute("is_cpu_op", _BOOL, 0)


def write_chakra(result: Result, folder: str | Path, ranks: Sequence[int] | None = None) -> Path:
    """Write `weft.RANK.et` for each rank, and `groups.json`, which says the members of each
    process group by the name that the nodes' `pg_name` has."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    groups: dict[tuple[int, ...], int] = {}
    for rank in range(result.ranks) if ranks is None else ranks:
        (folder / f"weft.{rank}.et").write_bytes(_Writer(result, rank, groups).write())
    table = {str(number): list(members) for members, number in groups.items()}
    (folder / "groups.json").write_text(json.dumps(table) + "\n", encoding="utf-8")
    return folder
