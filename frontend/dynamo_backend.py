"""weft as a backend of torch.compile: `torch.compile(model, backend="weft")`.

TorchDynamo cuts the program into graphs of tensors and hands each over with its parameters as
inputs; each becomes a compiled module of weft, forward or, under autograd, joint. Installed weft is
found through the entry point `torch_dynamo_backends`; importing this module registers it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch._dynamo import register_backend
from torch.fx import GraphModule

from .compiled import compile as weft_compile
from .compiled_module import CompiledModule


def weft(
    graph: GraphModule, example_inputs: Sequence[Any], *, options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """A graph of TorchDynamo as a function that runs a plan of it, made at the first call.

    Args:
        graph: takes tensors (parameters among them) and integers, gives a tuple of tensors.
        example_inputs: not needed: the plan is made for the inputs of the first call.
        options: arguments of `weft.compile`: `cluster`, `mesh`, and fields of `Options`.

    Raises CompileError W1001 for unknown options.
    """
    compiled: CompiledModule = weft_compile(graph, **dict(options or {}))
    return compiled


register_backend(weft, "weft")
