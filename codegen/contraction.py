"""Kernel functions with a contraction: which skeleton they are, and their holes.

A function holds an einsum and the pointwise ops that follow it (`passes/products.py` makes such
ones), or one `attention`. Its operands may have any number of dims: the skeleton sees matrices.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod

from ..ir.errors import CompileError
from ..ir.module import Function, Op, Value
from ..ir.opdef import full_attrs
from ..ir.text import print_op
from ..ir.types import Mesh, local_shape
from ..passes.products import Orders, is_epilogue, is_kernel, orders
from ..passes.space import COLUMN, parameters
from .attention import Attention, attention_source, default_attention_tile
from .attention_body import mask_modifier
from .expr import Graph, Node
from .gemm import Gemm, Result, default_tile, gemm_source
from .hole import Tensor, leaf, text
from .kernel import Kernel, build
from .source import KernelSource


def contraction_of(function: Function) -> Op | None:
    """The contraction of a kernel function; None where it has none."""
    return next((op for op in function.ops if op.name in ("einsum", "attention")), None)


def contraction_source(function: Function, mesh: Mesh | None, target: str) -> KernelSource:
    """The source of a kernel function with a contraction; its `launch` takes the function's operands.

    Raises CompileError W0901 where no skeleton computes it.
    """
    op = contraction_of(function)
    assert op is not None
    if op.name == "attention":
        return _attention(function, op, mesh, target)
    return _product(function, op, mesh, target)


def _refused(function: Function, reason: str) -> CompileError:
    return CompileError("W0901", f"kernel {function.name} cannot be generated", reason=reason,
                        hint="the plan calls ATen for these ops")  # fmt: skip


def _local(value: Value, mesh: Mesh | None) -> tuple[int, ...]:
    """The shape on the first rank."""
    if mesh is None or value.type.placement is None:
        return value.type.shape
    return local_shape(value.type, mesh, (0,) * len(mesh.sizes))


def _product(function: Function, op: Op, mesh: Mesh | None, target: str) -> KernelSource:
    order = orders(op)
    if order is None:
        raise _refused(function, f"{op.attrs['spec']} is no product of two matrices")
    a, b = op.operands[order.a], op.operands[order.b]
    rest = [other for other in function.ops if other is not op]
    dtype = op.result.type.dtype
    results: tuple[Result, ...] = (Result("c", dtype, leaf(Graph(), "acc") * 1.0),)
    loads: dict[str, Tensor] = {}
    if rest:
        kernel = build(function.with_(params=tuple(parameters(rest)), ops=tuple(rest)))
        if not is_epilogue(op.result, rest, function.results, kernel.space):
            raise _refused(function, "what follows the product is no epilogue")
        results, loads = _epilogue(kernel, op.result)
    a_shape, b_shape = _local(a, mesh), _local(b, mesh)
    m = prod(a_shape[:-1]) if order.a_order == "mk" else a_shape[-1]
    k = a_shape[-1] if order.a_order == "mk" else prod(a_shape[:-1])
    n = b_shape[0] if order.b_order == "nk" else b_shape[-1]
    gemm = Gemm(str(function.attrs["kernel"]), m, n, k, a.type.dtype, results, tuple(loads.values()),
                a_order=order.a_order, b_order=order.b_order, doc=_doc(function))  # fmt: skip
    source = gemm_source(gemm, default_tile(gemm, target))
    return _wrapped(function, source, (a.name, b.name, *loads), order)


def _doc(function: Function) -> str:
    places = dict.fromkeys(str(op.loc) for op in function.ops if str(op.loc))
    lines = [print_op(op.with_(split={})) for op in function.ops]
    text = "\n".join(["From", *(f"    {p}" for p in places), "", "Computes", *(f"    {x}" for x in lines)])
    return text.replace("\\", "\\\\")


def _epilogue(kernel: Kernel, result: Value) -> tuple[tuple[Result, ...], dict[str, Tensor]]:
    """The results of a region as expressions of the sums, and what it loads, by value."""
    acc = next(name for name, value in kernel.params if value.name == result.name)
    maps = kernel.space.maps
    loads = {  # the skeleton has names of its own: these end in `_in` and `_out`
        value.name: Tensor(
            f"{name}_in", value.type.dtype, any(p not in (None, COLUMN) for p in maps[value.name]),
            COLUMN in maps[value.name],
        )
        for name, value in kernel.params if name != acc
    }  # fmt: skip
    memo: dict[int, Node] = {}

    def rebuilt(node: Node) -> Node:
        if id(node) not in memo:
            if node.op == "load":
                loaded = node.data[0]
                memo[id(node)] = leaf(node.graph, "acc") if loaded == acc else node.graph.make(
                    "load", (), node.dtype, (f"{loaded}_in", 0), rows=node.rows, column=node.column
                )  # fmt: skip
            elif node.args:
                args = tuple(rebuilt(arg) for arg in node.args)
                memo[id(node)] = node.graph.make(node.op, args, node.dtype, node.data)
            else:
                memo[id(node)] = node
        return memo[id(node)]

    outputs = kernel.outputs
    return tuple(Result(f"{o.name}_out", o.value.type.dtype, rebuilt(o.node)) for o in outputs), loads


def _wrapped(
    function: Function, source: KernelSource, operands: tuple[str, ...], order: Orders
) -> KernelSource:
    """The source whose `launch` takes the operands in the function's order, with all their dims."""
    names = {value.name: f"x{number}" for number, value in enumerate(function.params)}
    a, b, *rest = (names[name] for name in operands)
    driver = text(
        """
        def launch(<given>):
            \"\"\"Run the kernel on tensors of any number of dims.\"\"\"
            shape = (*<rows>, <columns>)
            results = product(<operands>)
            return tuple([result.reshape(shape) for result in results])
        """,
        given=", ".join(names.values()), operands=", ".join([a, b, *rest]),
        rows=f"{a}.shape[{':-1' if order.a_order == 'mk' else '-1:'}]",
        columns=f"{b}.shape[{0 if order.b_order == 'nk' else -1}]",
    )  # fmt: skip
    body = source.text.replace("def launch(", "def product(")
    return replace(source, text=f"{body}\n\n{driver}\n")


def _attention(function: Function, op: Op, mesh: Mesh | None, target: str) -> KernelSource:
    attrs = full_attrs(op.name, op.attrs)
    q, k, v, *mask = op.operands
    if not is_kernel(op) or len(function.ops) > 1:
        raise _refused(function, "dropout, a part of a causal sequence, or ops beside attention")
    modifier = None
    if mask:
        sizes = mask[0].type.shape
        modifier = mask_modifier(Graph(), mask[0].type.dtype, rows=sizes[2] > 1, column=sizes[3] > 1)
    (_, heads, queries, d), (_, groups, keys, _) = _local(q, mesh), _local(k, mesh)
    scale = attrs["scale"]
    assert isinstance(scale, (int, float))
    spec = Attention(
        str(function.attrs["kernel"]), "forward", q.type.dtype, heads, groups, queries, keys, d,
        _local(v, mesh)[3], causal=bool(attrs["causal"]), modifier=modifier, scale=float(scale),
        doc=_doc(function),
    )  # fmt: skip
    return attention_source(spec, default_attention_tile(spec, target))


__all__ = ["contraction_of", "contraction_source"]
