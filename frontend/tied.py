"""Tensors with several names, which torch takes for aliases and refuses to change in place."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind


def untie(program: ExportedProgram) -> None:
    """Let each parameter and buffer that has several names be one input of the graph.

    The other inputs stay, without users, as tensors of their own: their memory is never touched.
    """
    nodes = {node.name: node for node in program.graph.nodes if node.op == "placeholder"}
    first: dict[int, torch.fx.Node] = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER) or spec.target is None:
            continue
        tensor = program.state_dict.get(spec.target)
        if not isinstance(tensor, Tensor):
            continue
        node = nodes[spec.arg.name]
        known = first.setdefault(id(tensor), node)
        if known is node:
            continue
        node.replace_all_uses_with(known)
        apart = torch.empty_like(tensor)
        is_param = isinstance(tensor, torch.nn.Parameter)
        program.state_dict[spec.target] = (
            torch.nn.Parameter(apart, requires_grad=tensor.requires_grad) if is_param else apart
        )
