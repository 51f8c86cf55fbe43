"""Schedules of pipeline stages: the micro-batches of placed stages, in an order.

For each stage one schedule-level module: what is computed ahead of the loop; a copy of the forward
or backward body for each slot of the stage's order, with sends and receives around it; gradients
added up over the micro-batches; the update, once. The passes `fuse` and `schedule` do the rest: the
body of a phase is fused once, collectives inside of a stage become asynchronous.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from ..ir.crossing import far_attrs
from ..ir.module import Attr, Function, Module, Namer, Op, Value
from ..ir.types import B, Mesh, P, Placement, TensorType
from .micro import LOOP, PHASES, TimeSplit
from .micro_shapes import at_row
from .orders import FORWARD, Order, Slot
from .reshard import StepCost
from .schedule import Schedule
from .stage_bodies import Levels, Part, When, levels_of, make_parts
from .stage_clock import Clock, Message, clock, stage_of
from .stage_lower import lower_stages, phases_meant
from .stage_packets import flat_type, joined, packets, parted
from .stages import StageModule, Transfer

_JOIN = {"sum": "add", "max": "maximum", "min": "minimum"}


def schedule_stages(
    split: TimeSplit,
    part_of: Sequence[int],
    placed: Sequence[Module],
    orders: Sequence[Order],
    *,
    in_flight: int = 4,
    cost: StepCost | Sequence[StepCost | None] | None = None,
    phases: Sequence[Sequence[str] | None] = (),
) -> tuple[Module, ...]:
    """The schedules of all stages.

    Args:
        split: the program over time.
        part_of: the part (virtual stage) of each op of its entry, as for `cut`.
        placed: the placed module of each part, for the first micro-batch. The parts of a stage have
            one mesh, stages may differ.
        orders: for each stage its slots; part p belongs to stage `p % len(orders)`.
        in_flight: collectives inside of a stage that run at a time.
        cost: times of collectives, of all parts or of each, for the choice of reshard paths.
        phases: for each part those of the ops of its placed entry, where a search has decided
            them: what is gathered once, and what for each micro-batch again.

    Raises CompileError W0404.
    """
    sizes = list(dict.fromkeys(split.sizes))
    costs = cost if isinstance(cost, Sequence) else [cost] * len(placed)
    lowered = lower_stages(split, part_of, placed, costs)
    ends = _ends(lowered)
    meant = [phases_meant(module, own) for module, own in zip_longest(placed, phases)]
    levels = levels_of([stage for stage, _ in lowered[sizes[0]]])
    messages = _messages([stage for stage, _ in lowered[sizes[0]]], len(orders), split.count)
    timing = clock(orders, messages)
    out = []
    for number, order in enumerate(orders):
        mine = [part for part in range(len(placed)) if stage_of(part, len(orders)) == number]
        table = [
            (*lowered[rows][part], levels[part], meant[part]) for rows in sizes for part in mine
        ]
        keys = [(rows, part) for rows in sizes for part in mine]
        parts, kernels = make_parts(table, [costs[part] for _, part in keys])
        table_of = dict(zip(keys, parts, strict=True))
        writer = _Writer(split, number, len(orders), table_of, kernels, ends)
        module = writer.write(order, timing, levels)
        out.append(Schedule(in_flight).run(module))
    return tuple(out)


def _ends(lowered: Mapping[int, Sequence[tuple[StageModule, Module]]]) -> _Ends:
    """Both ends of every transfer, for each size of micro-batch."""
    out: _Ends = {}
    for rows, parts in lowered.items():
        for number, (_, module) in enumerate(parts):
            entry = module.entry
            for value, attrs in zip(entry.results, entry.result_attrs, strict=True):
                if attrs["role"] != "sent":
                    continue
                name, target = str(attrs["name"]), int(attrs["to"])  # type: ignore[arg-type]
                there = parts[target][1]
                other = next(v.type for v in there.entry.params if v.name == name)
                meshes = module.mesh or Mesh(), there.mesh or Mesh()
                out[rows, name, number, target] = (meshes[0], value.type), (meshes[1], other)
    return out


def _messages(parts: Sequence[StageModule], stages: int, micro: int) -> list[Message]:
    """What is sent in the loop, in the order in which each part makes it."""
    out = []
    for part in parts:
        for transfer in part.sends:
            if transfer.phase in LOOP:
                read = _first_read(parts[transfer.target], transfer)
                for k in range(micro):
                    made = Slot(transfer.phase, k, part.stage // stages)
                    first = Slot(read, k, transfer.target // stages)
                    out.append(Message(transfer.value, part.stage, transfer.target, k, made, first))
    return out


def _first_read(part: StageModule, transfer: Transfer) -> str:
    """The phase in which a part first reads what it receives."""
    phases = {
        phase for op, phase in zip(part.module.entry.ops, part.phases, strict=True)
        if any(value.name == transfer.value for value in op.operands)
    }  # fmt: skip
    return FORWARD if FORWARD in phases else "backward"


_End = tuple[Mesh, TensorType]
#: (rows of a micro-batch, value, part that sends it, part that receives it) -> mesh and type there
_Ends = dict[tuple[int, str, int, int], tuple[_End, _End]]


@dataclass(frozen=True)
class _Key:
    """Where a value belongs: a part, and a micro-batch or -1."""

    part: int
    micro: int


class _Writer:
    """Writes the flat entry of one stage."""

    def __init__(
        self,
        split: TimeSplit,
        stage: int,
        stages: int,
        parts: Mapping[tuple[int, int], Part],
        kernels: Sequence[Function],
        ends: _Ends,
    ) -> None:
        self.split, self.stage, self.stages, self.ends = split, stage, stages, ends
        self.parts, self.kernels = parts, {f.name: f for f in kernels}
        self.numbers = sorted({part for _, part in parts})
        self.mesh = Mesh()
        self.namer = Namer()
        self.params: dict[str, tuple[Value, Mapping[str, Attr]]] = {}
        self.ops: list[Op] = []
        self.known: dict[_Key, dict[str, Value]] = {}
        self.handles: dict[tuple[str, Message], Value] = {}
        self.sums: dict[tuple[int, str], Value] = {}
        self.tags: dict[tuple[int, int], int] = {}

    def part(self, number: int, micro: int = -1) -> Part:
        """A part as it is for a micro-batch."""
        rows = self.split.sizes[max(micro, 0)]
        return self.parts[rows, number]

    # -- values ---------------------------------------------------------------------------------

    def get(self, part: int, micro: int, name: str) -> Value:
        """A value of a part."""
        for key in (_Key(part, micro), _Key(part, -1)):
            found = self.known.get(key, {}).get(name)
            if found is not None:
                return found
        return self._param(part, micro, name)

    def put(self, part: int, micro: int, name: str, value: Value) -> None:
        """Record a value of a part."""
        self.known.setdefault(_Key(part, micro), {})[name] = value

    def _param(self, number: int, micro: int, name: str) -> Value:
        """An entry parameter of a part: of the stage once, or in parts for the micro-batches."""
        part = self.part(number, micro)
        position = [v.name for v in part.entry.params].index(name)
        value, attrs = part.entry.params[position], dict(part.entry.param_attrs[position])
        held = part.held[name]
        key = name
        if held.kind == "S":
            total = self._total(name, held.dim)
            start = total * self.split.start(micro) // self.split.batch
            attrs["part"] = (held.dim, start, total)
            key = f"{name}.m{micro}"
        known = self.params.get(key)
        while known is not None and known[0].type != value.type:
            key += "_"  # another chunk holds a copy of it otherwise
            known = self.params.get(key)
        if known is None:
            known = self.params[key] = Value(self.namer(key), value.type), attrs
        self.put(number, micro if held.kind == "S" else -1, name, known[0])
        return known[0]

    def _total(self, name: str, dim: int) -> int:
        entry = self.split.module.entry
        return next(v.type.shape[dim] for v in entry.params if v.name == name)

    # -- actions --------------------------------------------------------------------------------

    def emit(
        self, name: str, operands: Iterable[Value], type_of: Value, hint: str,
        attrs: Mapping[str, Attr] | None = None, split: Mapping[str, str] | None = None,
    ) -> Value:  # fmt: skip
        """Append an op with one result of a value's type."""
        result = Value(self.namer(hint), type_of.type)
        self.ops.append(Op(name, tuple(operands), (result,), dict(attrs or {}), dict(split or {})))
        return result

    def run(self, number: int, micro: int, when: When) -> None:
        """Splice the body of a phase of a part."""
        part = self.part(number, micro)
        body = part.bodies.get(when)
        if body is None:
            return
        row = self.split.start(micro) if micro >= 0 else 0
        move = at_row(row, self.split.batch)
        inner = {v.name: self.get(number, micro, v.name) for v in body.params}
        for op in body.ops:
            results = tuple(Value(self.namer(v.name), v.type) for v in op.results)
            operands = tuple(inner[v.name] for v in op.operands)
            inner.update((old.name, new) for old, new in zip(op.results, results, strict=True))
            op = op.with_(operands=operands, results=results)
            self.ops.append(self._kernel(op, row) if op.name == "call" else move(op))
        for name, value in zip(part.outputs[when], body.results, strict=True):
            self.put(number, micro, name, inner[value.name])

    def _kernel(self, op: Op, row: int) -> Op:
        """A call of a kernel at a row of the batch."""
        callee = self.kernels[str(op.attrs["callee"])]
        move = at_row(row, self.split.batch)
        ops = tuple(map(move, callee.ops))
        if ops == callee.ops:
            return op
        name = f"{callee.name}_row{row}"
        self.kernels[name] = callee.with_(name=name, ops=ops, attrs={**callee.attrs, "kernel": name})
        return op.with_(attrs={**op.attrs, "callee": name})

    def add_up(self, number: int, micro: int, when: When) -> None:
        """Add a micro-batch's terms to the sums."""
        part = self.part(number, micro)
        for name in self._sums(part):
            if name not in part.outputs.get(when, ()):
                continue
            whole = self.get(number, micro, name)
            term = self._joinable(whole, part.held[name])
            before = self.sums.get((number, name))
            if before is not None:
                term = self._added(before, term, part.held[name])
            self.sums[number, name] = term
            self.put(number, -1, name, self._rejoined(term, whole))

    def _joinable(self, term: Value, held: Placement) -> Value:
        """A term without what is partial in another way over an axis of the mesh: (B + B) is what
        (max of ranks) + (max of ranks) means."""
        for axis, placement in enumerate(term.type.placement or ()):
            if placement.kind == "P" and not placement == held == P("sum"):
                placements = list(term.type.placement or ())
                placements[axis] = B
                like = Value(term.name, term.type.placed(placements))
                attrs = {"axis": self.mesh.names[axis], "combine": placement.combine}
                term = self.emit("all_reduce", (term,), like, term.name, attrs)
        return term

    def _rejoined(self, total: Value, like: Value) -> Value:
        """A sum placed as its terms were."""
        for axis, placement in enumerate(like.type.placement or ()):
            if (total.type.placement or ())[axis] != placement:
                placements = list(total.type.placement or ())
                placements[axis] = placement
                one = Value(total.name, total.type.placed(placements))
                attrs = {"axis": self.mesh.names[axis], "combine": placement.combine}
                total = self.emit("partial", (total,), one, total.name, attrs)
        return total

    def _added(self, one: Value, two: Value, held: Placement) -> Value:
        op = _JOIN[held.combine]
        split: dict[str, str] = {}
        for axis, placement in zip(self.mesh.names, one.type.placement or (), strict=True):
            if placement.kind == "S":
                split[axis] = f"a{placement.dim}"
            elif placement.kind == "P" and op == "add":
                split[axis] = "partial(0, 1)"
        return self.emit(op, (one, two), one, one.name, split=split)

    def _sums(self, part: Part) -> list[str]:
        """What is added up: read in the update, sent in it, or a result of the step."""
        late = [v.name for w, body in part.bodies.items() if w.name == "update" for v in body.params]
        late += [value.name for value in part.entry.results]
        return [name for name in dict.fromkeys(late) if part.held.get(name, B).kind == "P"]

    # -- transfers ------------------------------------------------------------------------------

    def sent_name(self, part: Part, value: str, target: int) -> str:
        """The name of the value that is sent, as its receiver wants it placed."""
        for result, attrs in zip(part.entry.results, part.entry.result_attrs, strict=True):
            if attrs["role"] == "sent" and attrs["name"] == value and attrs["to"] == target:
                return result.name
        raise KeyError(value)

    def end_types(self, message: Message) -> tuple[_End, _End]:
        """Mesh and type of a message where it is sent and where it is received."""
        rows = self.split.sizes[max(message.micro, 0)]
        return self.ends[rows, message.value, message.source, message.target]

    def transfer_attrs(self, message: Message, packet: Sequence[Message] = ()) -> dict[str, Attr]:
        """The attributes of a transfer's end on this stage: of a message, or of a packet."""
        one, two = (stage_of(part, self.stages) for part in (message.source, message.target))
        sends = one == self.stage
        attrs: dict[str, Attr] = {"to": two} if sends else {"source": one}
        attrs.update({"tag": self._tag(one, two), "async": True})
        (mesh, type), (other, far) = self.end_types(message)[:: 1 if sends else -1]
        if mesh.sizes != other.sizes:
            if packet:
                far = flat_type([self.end_types(m)[sends][1] for m in packet])
            attrs.update(far_attrs(other, far))
        return attrs

    def send(self, message: Message) -> None:
        """Start a send."""
        part = self.part(message.source, message.micro)
        name = self.sent_name(part, message.value, message.target)
        value = self.get(message.source, message.micro, name)
        attrs = self.transfer_attrs(message)
        self.handles["send", message] = self.emit("send", (value,), value, f"{name}_send", attrs)

    def start(self, message: Message) -> None:
        """Start a receive."""
        part = self.part(message.target, message.micro)
        value = next(v for v in part.entry.params if v.name == message.value)
        attrs = self.transfer_attrs(message)
        self.handles["recv", message] = self.emit("recv", (), value, f"{value.name}_recv", attrs)

    def wait(self, kind: str, message: Message) -> None:
        """Wait for a send or a receive."""
        handle = self.handles.pop((kind, message))
        value = self.emit("wait", (handle,), handle, message.value)
        if kind == "recv":
            self.put(message.target, message.micro, message.value, value)

    def _tag(self, source: int, target: int) -> int:
        """The number of a transfer among those from one stage to another."""
        number = self.tags.get((source, target), 0)
        self.tags[source, target] = number + 1
        return number

    def local(self, message: Message) -> None:
        """A value that goes from one part of this stage to another."""
        part = self.part(message.source, message.micro)
        name = self.sent_name(part, message.value, message.target)
        value = self.get(message.source, message.micro, name)
        self.put(message.target, message.micro, message.value, value)

    # -- the step -------------------------------------------------------------------------------

    def write(self, order: Order, timing: Clock, levels: Sequence[Levels]) -> Module:
        """The spmd module of the stage, flat, with its transfers started and waited for."""
        base = self.split.module
        self.mesh = self.part(self.numbers[0]).mesh
        self._once("before", levels)
        for position, slot in enumerate(order):
            self._slot(position, slot, timing)
        for message in timing.waits[self.stage].get(len(order), ()):
            self.wait("send", message)
        self._once("update", levels)
        results, result_attrs = self._results()
        for number in self.numbers:  # what nothing reads is kept all the same
            part = self.part(number)
            for value, attrs in zip(part.entry.params, part.entry.param_attrs, strict=True):
                if attrs["role"] in ("param", "buffer", "state"):
                    self.get(number, -1, value.name)
        params = list(self.params.values())
        entry = Function(
            base.entry.name, tuple(v for v, _ in params), tuple(self.ops), tuple(results),
            tuple(a for _, a in params), tuple(result_attrs), base.entry.attrs,
        )  # fmt: skip
        used = {str(op.attrs["callee"]) for op in self.ops if op.name == "call"}
        kernels = tuple(f for name, f in self.kernels.items() if name in used)
        about: dict[str, Attr] = {**base.attrs, "stage": self.stage, "stages": self.stages}
        return Module("spmd", (entry, *kernels), self.mesh, about)

    def _slot(self, position: int, slot: Slot, timing: Clock) -> None:
        """One slot: its receives, its body, its sends."""
        number = slot.chunk * self.stages + self.stage
        for message in timing.waits[self.stage].get(position, ()):
            self.wait("send", message)
        for message in timing.starts[self.stage].get(position, ()):
            self.start(message)
        for kind, message in list(self.handles):
            if kind == "recv" and message.read == slot and message.target == number:
                self.wait(kind, message)
        when = When(PHASES.index(slot.phase))
        self.run(number, slot.micro, when)
        # other stages wait for what is sent, nothing waits for the sums (and their reductions)
        for message in timing.sends[self.stage].get(position, ()):
            self.send(message)
        self.add_up(number, slot.micro, when)
        for transfer in self.part(number).stage.sends:
            if transfer.phase == slot.phase and stage_of(transfer.target, self.stages) == self.stage:
                self.local(Message(transfer.value, number, transfer.target, slot.micro, slot, slot))

    def _once(self, phase: str, levels: Sequence[Levels]) -> None:
        """All levels of a phase that is computed once a step."""
        last = max((n for table in levels for n in table[phase].values()), default=0)
        for level in range(last + 1):
            for number in self.numbers:
                self.run(number, -1, When(PHASES.index(phase), level))
            self._exchange(phase, level, levels)

    def _exchange(self, phase: str, level: int, levels: Sequence[Levels]) -> None:
        """Send what is made at a level, receive what the next one reads."""
        slot = Slot(phase, -1)
        sends: list[Message] = []
        receives: list[Message] = []
        for number in self.numbers:
            stage = self.part(number).stage
            for transfer in (*stage.sends, *stage.receives):
                if transfer.phase != phase:
                    continue
                if levels[transfer.target][phase][transfer.value] != level + 1:
                    continue
                message = Message(transfer.value, transfer.source, transfer.target, -1, slot, slot)
                one, two = (stage_of(p, self.stages) for p in (transfer.source, transfer.target))
                if one == two:
                    if transfer.source == number:
                        self.local(message)
                elif one == self.stage:
                    sends.append(message)
                else:
                    receives.append(message)
        outgoing, incoming = self._packets(sends), self._packets(receives)
        for packet in outgoing:
            self._send_packet(packet)
        for packet in incoming:
            self._start_packet(packet)
        for packet in incoming:
            self._wait_packet(packet)
        for packet in outgoing:
            self.wait("send", packet[0])

    def _packets(self, messages: Sequence[Message]) -> list[list[Message]]:
        """What travels together, channel by channel, in an order that both ends share."""
        channels: dict[tuple[int, int], list[Message]] = {}
        for message in sorted(messages, key=_channel_order):
            ends = stage_of(message.source, self.stages), stage_of(message.target, self.stages)
            channels.setdefault(ends, []).append(message)
        out = []
        for channel in channels.values():
            both = [self.end_types(message) for message in channel]
            types = [(one, two) for (_, one), (_, two) in both]
            out += [[channel[i] for i in packet] for packet in packets(types)]
        return out

    def _received(self, message: Message) -> Value:
        part = self.part(message.target)
        return next(v for v in part.entry.params if v.name == message.value)

    def _send_packet(self, packet: Sequence[Message]) -> None:
        if len(packet) == 1:
            self.send(packet[0])
            return
        values = [
            self.get(m.source, -1, self.sent_name(self.part(m.source), m.value, m.target))
            for m in packet
        ]
        whole = joined(self._emit_as, values)
        attrs = self.transfer_attrs(packet[0], packet)
        self.handles["send", packet[0]] = self.emit("send", (whole,), whole, "packet_send", attrs)

    def _start_packet(self, packet: Sequence[Message]) -> None:
        if len(packet) == 1:
            self.start(packet[0])
            return
        like = Value("packet", flat_type([self._received(m).type for m in packet]))
        attrs = self.transfer_attrs(packet[0], packet)
        self.handles["recv", packet[0]] = self.emit("recv", (), like, "packet_recv", attrs)

    def _wait_packet(self, packet: Sequence[Message]) -> None:
        if len(packet) == 1:
            self.wait("recv", packet[0])
            return
        handle = self.handles.pop(("recv", packet[0]))
        whole = self.emit("wait", (handle,), handle, "packet")
        values = parted(self._emit_as, whole, [self._received(message) for message in packet])
        for message, value in zip(packet, values, strict=True):
            self.put(message.target, -1, message.value, value)

    def _emit_as(
        self, name: str, operands: Sequence[Value], like: Value, attrs: dict[str, Attr]
    ) -> Value:
        return self.emit(name, operands, like, like.name, attrs)

    def _results(self) -> tuple[list[Value], list[Mapping[str, Attr]]]:
        results: list[Value] = []
        attrs: list[Mapping[str, Attr]] = []
        for number in self.numbers:
            part = self.part(number)
            for value, record in zip(part.entry.results, part.entry.result_attrs, strict=True):
                if record["role"] == "sent":
                    continue
                held = part.held[value.name]
                if held.kind == "S":
                    self._parts_of(number, value.name, held.dim, record, results, attrs)
                    continue
                found = self.get(number, -1, value.name)
                if "updates" in record:
                    target = self.get(number, -1, str(record["updates"])).name
                    if any(a.get("updates") == target for a in attrs):
                        continue  # another chunk has updated its copy
                    record = {**record, "updates": target}
                results.append(found)
                attrs.append(record)
        return results, attrs

    def _parts_of(
        self, number: int, name: str, dim: int, record: Mapping[str, Attr],
        results: list[Value], attrs: list[Mapping[str, Attr]],
    ) -> None:  # fmt: skip
        """A result in parts, one for each micro-batch."""
        values = [self.get(number, k, name) for k in range(self.split.count)]
        total = sum(value.type.shape[dim] for value in values)
        start = 0
        for value in values:
            results.append(value)
            attrs.append({**record, "part": (dim, start, total)})
            start += value.type.shape[dim]


def _channel_order(message: Message) -> tuple[int, int, str]:
    return message.source, message.target, message.value


__all__ = ["schedule_stages"]
