"""Where gradients end: `detach` and no_grad regions, marked before torch forgets them.

A marker, `weft::stop_gradient`, is a value of its own, so it must not stand between a tensor and what
changes it in place. Regions that change tensors are therefore written out, and a detached view that
is written through stays a view: the markers stand at its other uses.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from ..ir.module import Value
from .aten import TABLE, Lowering


def _identity(x: Tensor) -> Tensor:
    return x.clone()


def _fake_identity(x: Tensor) -> Tensor:
    return torch.empty_like(x)


#: marks what autograd must not see; torch's decompositions turn `detach` into a plain alias
stop_gradient = torch.library.custom_op("weft::stop_gradient", _identity, mutates_args=())
stop_gradient.register_fake(_fake_identity)


def _stop(c: Lowering, x: Value) -> Value:
    return c.emit("stop_gradient", [x])


TABLE["weft.stop_gradient.default"] = _stop
_STOP = torch.ops.weft.stop_gradient.default
_DETACH = ("aten.detach.default", "aten.detach_.default")
_REGION = "wrap_with_set_grad_enabled"


def mark_stops(module: GraphModule) -> None:
    """Write `weft::stop_gradient` where gradients end, in a graph and in its regions."""
    graphs = [inner for inner in module.modules() if isinstance(inner, GraphModule)]
    for graph in graphs:
        _write_out_regions(graph)
    for inner in module.modules():
        if not isinstance(inner, GraphModule):
            continue
        for node in list(inner.graph.nodes):
            if str(node.target) in _DETACH:
                _stop_at(node)
            elif str(node.target) == _REGION and node.args[0] is False:
                for user in list(node.users):
                    _stop_after(user)
        inner.recompile()


def _stop_at(node: Node) -> None:
    """Turn a `detach` into a marker, or mark its uses where its memory is written."""
    views = _views(node)
    shared = _views(_origin(node))
    if not any(_writes(user, view) for view in shared for user in view.users):
        node.target = _STOP
        return
    for view in views:
        for user in [user for user in view.users if user not in views]:
            with user.graph.inserting_before(user):
                stopped = user.graph.call_function(_STOP, (view,))
            stopped.meta = dict(view.meta)
            user.replace_input_with(view, stopped)


def _stop_after(node: Node) -> None:
    with node.graph.inserting_after(node):
        stopped = node.graph.call_function(_STOP, (node,))
    stopped.meta = dict(node.meta)
    node.replace_all_uses_with(stopped, lambda n: n is not stopped)


def _arguments(node: Node, of: Node) -> Iterator[Any]:
    """The schema's arguments that take a value."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return
    for index, argument in enumerate(schema.arguments):
        given = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        if given is of or (isinstance(given, (list, tuple)) and of in given):
            yield argument


def _writes(node: Node, value: Node) -> bool:
    return any(a.alias_info is not None and a.alias_info.is_write for a in _arguments(node, value))


def _origin(node: Node) -> Node:
    """The value whose memory a view shows."""
    while True:
        sources = [
            value for value in node.all_input_nodes
            if any(a.alias_info is not None for a in _arguments(node, value))
        ]  # fmt: skip
        if not sources:
            return node
        node = sources[0]


def _views(node: Node) -> dict[Node, None]:
    """A value and all that share its memory."""
    found: dict[Node, None] = {node: None}
    pending = [node]
    while pending:
        value = pending.pop()
        for user in value.users:
            shares = any(a.alias_info is not None for a in _arguments(user, value))
            if shares and user not in found:
                found[user] = None
                pending.append(user)
    return found


def _write_out_regions(module: GraphModule) -> None:
    """Put the bodies of no_grad regions that change tensors in the regions' place."""
    for node in list(module.graph.nodes):
        if str(node.target) != _REGION or node.args[0] is not False:
            continue
        body = module.get_submodule(str(node.args[1].target))
        if isinstance(body, GraphModule) and _changes(body):
            _write_out(module, node, body)


def _changes(body: GraphModule) -> bool:
    for node in body.graph.nodes:
        schema = getattr(node.target, "_schema", None)
        if schema is not None and schema.is_mutable:
            return True
        if node.op == "get_attr":
            inner = getattr(body, str(node.target), None)
            if isinstance(inner, GraphModule) and _changes(inner):
                return True
    return False


def _write_out(module: GraphModule, region: Node, body: GraphModule) -> None:
    _write_out_regions(body)
    env: dict[Node, Any] = {}
    given = iter(region.args[2:])
    # what gradients could flow through: values from outside and views of them
    outside = {node for node in region.all_input_nodes if isinstance(node.meta.get("val"), Tensor)}
    for node in body.graph.nodes:
        if node.op == "placeholder":
            env[node] = next(given)
        elif node.op == "output":
            _replace_results(region, [env[v] if isinstance(v, Node) else v for v in node.args[0]])
        else:
            with module.graph.inserting_before(region):
                env[node] = _copied(module, body, node, env)
                _stop_reads(env[node], outside)


def _stop_reads(node: Node, outside: set[Node]) -> None:
    """Let an op of a no_grad region read detached values; views are left, as they may be written.

    Markers of weft have no gradient, and read the parameters themselves.
    """
    if str(node.target).startswith("weft."):
        return
    for value in [value for value in node.all_input_nodes if value in outside]:
        if node.target is operator.getitem or any(
            a.alias_info is not None for a in _arguments(node, value)
        ):
            outside.add(node)
        elif next(_arguments(node, value), None) is not None:
            with node.graph.inserting_before(node):
                stopped = node.graph.call_function(_STOP, (value,))
            stopped.meta = dict(value.meta)
            node.replace_input_with(value, stopped)


def _copied(module: GraphModule, body: GraphModule, node: Node, env: dict[Node, Any]) -> Node:
    if node.op == "get_attr":
        name = str(node.target)
        while hasattr(module, name):
            name += "_"
        setattr(module, name, getattr(body, str(node.target)))
        made = module.graph.get_attr(name)
        made.meta = dict(node.meta)
        return made
    copy: Node = module.graph.node_copy(node, lambda n: env[n])
    functional = _functional(node.target)
    if functional is None:
        return copy
    # a new value without gradient, written where the old one was
    copy.target = functional
    graph = module.graph
    stopped = graph.call_function(_STOP, (copy,))
    written = graph.call_function(torch.ops.aten.copy_.default, (copy.args[0], stopped))
    for made in (stopped, written):
        made.meta = dict(node.meta)
    return written


def _functional(target: Any) -> Any:
    """The operator that gives what one in place writes into its first argument; None for others."""
    schema = getattr(target, "_schema", None)
    if schema is None or not schema.is_mutable or not schema.name.endswith("_"):
        return None
    namespace, _, name = schema.name.partition("::")
    packet = getattr(getattr(torch.ops, namespace), name.rstrip("_"), None)
    return getattr(packet, schema.overload_name or "default", None)


def _replace_results(region: Node, values: list[Any]) -> None:
    for user in list(region.users):
        value = values[user.args[1]]  # type: ignore[index]
        user.replace_all_uses_with(value)
        user.graph.erase_node(user)
    region.graph.erase_node(region)
