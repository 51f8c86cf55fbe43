"""The ops of repeated modules, written in the places of the operators that stand for them.

What `repeats.py` could not see is checked here, on the graph: the ops between the markers of a block
read its arguments and its parameters only, nothing but its results is read outside, and no two
results, nor a result and an argument, share their memory.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch.fx import Graph, Node

from .repeats import Record, Repeats
from .repeats_markers import AGAIN, CLOSE, OPEN

_AS_STRIDED = "aten.as_strided"


class Unfaithful(Exception):
    """Blocks of these classes do what cannot be repeated: they have to be traced one by one."""

    def __init__(self, kinds: set[type]) -> None:
        super().__init__(", ".join(kind.__name__ for kind in kinds))
        self.kinds = kinds


@dataclass(frozen=True)
class _Block:
    """The ops between two markers."""

    record: Record
    open: Node
    close: Node
    nodes: Sequence[Node]

    @property
    def args(self) -> Sequence[Node]:
        return self.open.args[0]  # type: ignore[return-value]

    @property
    def state(self) -> Sequence[Node]:
        return self.open.args[1]  # type: ignore[return-value]

    @property
    def results(self) -> Sequence[Node]:
        return self.close.args[0]  # type: ignore[return-value]


def write_repeats(graph: Graph, repeats: Repeats) -> None:
    """Expand `weft::block_again`, and remove the markers of blocks. Raises Unfaithful."""
    graph.eliminate_dead_code()
    for node in graph.nodes:
        if node.target is OPEN:
            _check_views(node, repeats)
    # inner blocks end first, so that the ops of outer ones are plain when those are repeated
    for close in [node for node in graph.nodes if node.target is CLOSE]:
        _write_block(graph, close, repeats)
    for node in list(graph.nodes):
        _unmark(node)
    graph.eliminate_dead_code()


def _write_block(graph: Graph, close: Node, repeats: Repeats) -> None:
    number = close.args[-1]
    agains = [node for node in graph.nodes if node.target is AGAIN
              and repeats.agains[node.args[-1]].record.number == number]  # fmt: skip
    if agains:
        record = repeats.agains[agains[0].args[-1]].record
        block = _block(graph, close, record)
        for again in agains:
            _write(graph, block, again, repeats.agains[again.args[-1]].path)
    else:
        open = next(n for n in graph.nodes if n.target is OPEN and n.args[-1] == number)
        _unmark(open)
    _unmark(close)


def _check_views(open: Node, repeats: Repeats) -> None:
    """Torch makes views of what was changed in place again where they are read, but not of copies:
    the ops would be the same, in another order."""
    opened = repeats.opened[open.args[-1]]  # type: ignore[index]
    for taken in open.users:
        if taken.args[1] in opened.changed and any(taken in _shared(u) for u in taken.users):
            raise Unfaithful({opened.kind})


def _unmark(node: Node) -> None:
    """Remove a marker: what it returns are its operands."""
    if node.target not in (OPEN, CLOSE):
        return
    values: Any = node.args[0]
    for user in list(node.users):
        user.replace_all_uses_with(values[user.args[1]])
        user.graph.erase_node(user)
    node.graph.erase_node(node)


def _block(graph: Graph, close: Node, record: Record) -> _Block:
    """The ops of a block, checked."""
    nodes: list[Node] = []
    start: Node | None = None
    for node in graph.nodes:
        if node is close:
            break
        if node.target is OPEN and node.args[-1] == record.number:
            start = node
        elif start is not None and not _takes(node, start):
            nodes.append(node)
    if start is None:
        raise Unfaithful({record.kind})
    block = _Block(record, start, close, nodes)
    own, state = set(nodes), set(block.state)
    for node in nodes:
        reads_outside = any(
            value not in own and value not in state and not _takes(value, start)
            for value in node.all_input_nodes
        )
        read_outside = any(user not in own and user is not close for user in node.users)
        strange = node.op != "call_function" or str(node.target).startswith(_AS_STRIDED)
        if reads_outside or read_outside or strange:
            raise Unfaithful({record.kind})
    roots = [_root(value) for value in block.results]
    if len(set(roots)) < len(roots) or any(root not in own for root in roots):
        raise Unfaithful({record.kind})
    return block


def _takes(node: Node, of: Node) -> bool:
    return node.target is operator.getitem and node.args[0] is of


def _root(node: Node) -> Node:
    """The value whose memory another one shares; itself where it has its own."""
    while True:
        if node.target is operator.getitem:
            source = node.args[0]
            assert isinstance(source, Node)
            if not _shared(source):
                return node
            node = source
        shared = _shared(node)
        if not shared:
            return node
        node = shared[0]


def _shared(node: Node) -> list[Node]:
    """The operands whose memory an operator's results may share."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return []
    given = [*zip(schema.arguments, node.args, strict=False)]
    return [v for a, v in given if a.alias_info is not None and isinstance(v, Node)]


def _write(graph: Graph, block: _Block, again: Node, path: str) -> None:
    """Put a copy of a block's ops in the place of the operator that stands for them."""
    args, state = again.args[0], again.args[1]
    made: dict[Node, Node] = {}
    for mine, other in zip(block.state, state, strict=True):  # type: ignore[arg-type]
        if made.setdefault(mine, other) is not other:
            raise Unfaithful({block.record.kind})
    for taken in block.open.users:
        made[taken] = args[taken.args[1]]  # type: ignore[index, assignment]
    place = _Place(block, again, path)
    for node in block.nodes:
        with graph.inserting_before(again):
            copy = graph.node_copy(node, made.__getitem__)
        copy.meta = place.of(node)
        made[node] = copy
    for taken in list(again.users):
        taken.replace_all_uses_with(made[block.results[taken.args[1]]])  # type: ignore[index]
        graph.erase_node(taken)
    graph.erase_node(again)


@dataclass(frozen=True)
class _Place:
    """Where the ops of a repeated block stand: below its own module, called from its own line."""

    block: _Block
    again: Node
    path: str

    def of(self, node: Node) -> dict[str, Any]:
        """What is known of a node, with its own place."""
        return {**node.meta, "nn_module_stack": self._modules(node.meta.get("nn_module_stack")),
                "stack_trace": self._frames(node.meta.get("stack_trace"))}  # fmt: skip

    def _modules(self, stack: Mapping[str, Any] | None) -> dict[str, Any]:
        mine, made = self.block.record.path, {}
        for key, (path, kind) in (stack or {}).items():
            plain = re.sub(r"@\d+$", "", path)
            if plain == mine or plain.startswith(f"{mine}."):
                made[key] = self.path + plain[len(mine) :], kind
        if not made:
            raise Unfaithful({self.block.record.kind})
        return made

    def _frames(self, frames: str | None) -> str:
        outer = self.block.open.meta.get("stack_trace") or ""
        if not (frames or "").startswith(outer):
            raise Unfaithful({self.block.record.kind})
        return (self.again.meta.get("stack_trace") or "") + (frames or "")[len(outer) :]


__all__ = ["Unfaithful", "write_repeats"]
