"""Schedules of pipeline stages: the micro-batches of placed stages, in an order.

For each stage one schedule-level module: what is computed ahead of the loop; a copy of the forward
or backward body for each slot of the stage's order, with sends and receives around it; gradients
added up over the micro-batches; the update, once. The passes `fuse` and `schedule` do the rest: the
body of a phase is fused once, collectives inside of a stage become asynchronous.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest

from ..ir.crossing import far_attrs
from ..ir.module import Attr, Function, Module, Value
from ..ir.types import Mesh
from .micro import LOOP, PHASES, TimeSplit
from .orders import FORWARD, Order, Slot
from .reshard import StepCost
from .schedule import Schedule
from .stage_bodies import Levels, Part, When, levels_of, make_parts
from .stage_clock import Clock, Message, clock, stage_of
from .stage_lower import lower_stages, phases_meant
from .stage_packets import flat_type, joined, packets, parted
from .stage_writer import End, Ends, Writer
from .stages import StageModule, Transfer


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
        writer = _Scheduler(split, number, len(orders), table_of, kernels, ends)
        module = writer.write(order, timing, levels)
        out.append(Schedule(in_flight).run(module))
    return tuple(out)


def _ends(lowered: Mapping[int, Sequence[tuple[StageModule, Module]]]) -> Ends:
    """Both ends of every transfer, for each size of micro-batch."""
    out: Ends = {}
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


class _Scheduler(Writer):
    """Writes the bodies of a stage in their order, with its transfers."""

    def __init__(
        self, split: TimeSplit, stage: int, stages: int, parts: Mapping[tuple[int, int], Part],
        kernels: Sequence[Function], ends: Ends,
    ) -> None:  # fmt: skip
        super().__init__(split, stage, stages, parts, kernels, ends)
        self.handles: dict[tuple[str, Message], Value] = {}
        self.tags: dict[tuple[int, int], int] = {}

    # -- transfers ------------------------------------------------------------------------------

    def sent_name(self, part: Part, value: str, target: int) -> str:
        """The name of the value that is sent, as its receiver wants it placed."""
        for result, attrs in zip(part.entry.results, part.entry.result_attrs, strict=True):
            if attrs["role"] == "sent" and attrs["name"] == value and attrs["to"] == target:
                return result.name
        raise KeyError(value)

    def end_types(self, message: Message) -> tuple[End, End]:
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
        results, result_attrs = self.results()
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

def _channel_order(message: Message) -> tuple[int, int, str]:
    return message.source, message.target, message.value


__all__ = ["schedule_stages"]
