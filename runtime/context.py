"""What a reference semantics may ask while it runs: attributes, shapes, offsets, devices.

An `OpContext` belongs to one op at one mesh coordinate. It answers from tables that it fills once,
so an executor can keep it and call `OPS[op.name].ref(context, *tensors)` every step at no cost.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import RunError
from ..ir.module import Attr, Op
from ..ir.opdef import full_attrs, signature_of
from ..ir.signature import Signature
from ..ir.types import Mesh, TensorType, local_range, local_shape, shard_offset, shard_size

#: inside `OpContext` the name `torch` is the attribute that semantics read
Device = torch.device
DType = torch.dtype

#: weft dtype name -> torch dtype
TORCH_DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16,
    "f8e4m3": torch.float8_e4m3fn, "f8e5m2": torch.float8_e5m2, "i64": torch.int64,
    "i32": torch.int32, "i16": torch.int16, "i8": torch.int8, "u8": torch.uint8,
    "bool": torch.bool,
}  # fmt: skip
#: torch dtype -> weft dtype name
WEFT_DTYPES: dict[torch.dtype, str] = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def tensor_type(tensor: Tensor) -> TensorType:
    """The type of a whole tensor. Raises KeyError for a dtype that weft does not have."""
    return TensorType(WEFT_DTYPES[tensor.dtype], tuple(tensor.shape))


class OpContext:
    """What one op's reference semantics may ask, at one mesh coordinate.

    Args:
        op: the op; its operand and result types hold global shapes.
        mesh: the mesh; None for one logical device.
        coord: this rank's coordinate on the mesh; None with a mesh means rank 0.
        device: where ops without operands create their tensors.
        fused: whether a semantics may call a fused kernel of the device where one exists. The
            interpreter, being the oracle, never does; an executor should.

    Raises SignatureError at the first question whose answer needs a signature that does not fit.
    """

    torch: ModuleType = torch

    def __init__(
        self,
        op: Op,
        mesh: Mesh | None = None,
        coord: Sequence[int] | None = None,
        *,
        device: Device | str = "cpu",
        fused: bool = False,
    ) -> None:
        self.op = op
        self.mesh = mesh or Mesh()
        self.coord = tuple(coord) if coord is not None else (0,) * len(self.mesh.axes)
        self.device = Device(device)
        self.fused = fused
        self.attrs: Mapping[str, Attr] = full_attrs(op.name, op.attrs)
        self._dtypes = tuple(TORCH_DTYPES[value.type.dtype] for value in op.results)
        self._ranges: dict[str, tuple[int, int]] = {}
        self._once: dict[object, Any] = {}

    @cached_property
    def signature(self) -> Signature:
        """The op's signature on its global shapes."""
        return signature_of(self.op)

    @cached_property
    def part(self) -> tuple[str, int, int] | None:
        """(iteration dim, first, total) where the op is a part of a larger one."""
        part = self.attrs.get("part")
        if not isinstance(part, tuple) or not part:
            return None
        name, start, total = part
        return str(name), int(start), int(total)  # type: ignore[arg-type]

    @cached_property
    def _states(self) -> tuple[str, ...]:
        return tuple(self.op.split.get(name, "") for name in self.mesh.names)

    @cached_property
    def _local_types(self) -> tuple[TensorType, ...]:
        """Result types under the placements that the op's own split gives them."""
        types = tuple(value.type for value in self.op.results)
        if not any(self._states):
            return tuple(type.placed(None) for type in types)
        _, placements = self.signature.placements(self._states)
        return tuple(type.placed(p) for type, p in zip(types, placements, strict=True))

    @cached_property
    def _shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(local_shape(type, self.mesh, self.coord) for type in self._local_types)

    def _range(self, dim: str) -> tuple[int, int]:
        """(offset, size) of this rank's part of an iteration dim."""
        found = self._ranges.get(dim)
        if found is None:
            offset, size = 0, self.signature.size(dim)
            if self.part and self.part[0] == dim:
                offset = self.part[1]
            for state, parts, index in zip(self._states, self.mesh.sizes, self.coord, strict=True):
                if state == dim:
                    offset += shard_offset(size, parts, index)
                    size = shard_size(size, parts, index)
            found = self._ranges[dim] = (offset, size)
        return found

    def offset(self, dim: str) -> int:
        """First global index of this rank's part of an iteration dim; 0 where it is not split."""
        return self._range(dim)[0]

    def size(self, dim: str) -> int:
        """Global size of an iteration dim."""
        return self.part[2] if self.part and self.part[0] == dim else self.signature.size(dim)

    def shape(self, result: int = 0) -> tuple[int, ...]:
        """Local shape of a result."""
        return self._shapes[result]

    def dtype(self, result: int = 0) -> DType:
        """torch dtype of a result."""
        return self._dtypes[result]

    def index(self, tensor: int = 0, device: Device | None = None) -> Tensor:
        """Global linear index (int64) of each element of this rank's part of result `tensor`."""
        type = self._local_types[tensor]
        out = torch.zeros((), dtype=torch.int64, device=device or self.device)
        for dim, total in enumerate(type.shape):
            offset, size = local_range(type, self.mesh, self.coord, dim)
            if self.part and self.part[0] in self.signature.results[tensor][dim]:
                offset, total = offset + self.part[1], self.part[2]
            line = torch.arange(offset, offset + size, device=out.device)
            out = (out * total).unsqueeze(-1) + line
        return out

    def once(self, build: Callable[..., Any], *operands: Tensor) -> Any:
        """`build(self, *operands)` of the first call, for what depends on shapes only.

        The operands of a context have the same shapes, dtypes and device in every call.
        """
        found = self._once.get(build)
        if found is None:
            found = self._once[build] = build(self, *operands)
        return found

    @cached_property
    def _aten_call(self) -> tuple[Any, list[Any], dict[str, Any]]:
        target, template = str(self.attrs["target"]), json.loads(str(self.attrs["args"]))
        args, kwargs = (template, {}) if isinstance(template, list) else (
            template.get("args", []), template.get("kwargs", {}))  # fmt: skip
        return _resolve(target), args, kwargs

    def aten(self, target: str, args: str, operands: Sequence[Tensor]) -> Any:
        """Call an ATen operator.

        `target` is `aten.sort.stable`, or another namespace of `torch.ops`. `args` is JSON: the
        list of arguments, or `{"args": [...], "kwargs": {...}}`. In it `"%0"` is operand 0, and
        `{"dtype": "f32"}`, `{"device": ""}`, `{"layout": "strided"}`,
        `{"memory_format": "contiguous_format"}` and `{"float": "inf"}` are values that JSON lacks.
        A tuple of results has its None entries left out. Raises RunError W0803.
        """
        call, positional, keywords = self._aten_call
        values = [self._fill(item, operands) for item in positional]
        named = {name: self._fill(item, operands) for name, item in keywords.items()}
        out = call(*values, **named)
        if isinstance(out, (tuple, list)):
            return tuple(item for item in out if item is not None)
        return out

    def _fill(self, item: Any, operands: Sequence[Tensor]) -> Any:
        if isinstance(item, str) and item[:1] == "%" and item[1:].isdigit():
            return operands[int(item[1:])]
        if isinstance(item, list):
            return [self._fill(entry, operands) for entry in item]
        if isinstance(item, dict):
            ((kind, value),) = item.items()
            if kind == "dtype":
                return TORCH_DTYPES[value]
            if kind == "device":
                return self.device
            return float(value) if kind == "float" else getattr(torch, value)
        return item


def results_of(op: Op, out: Any) -> tuple[Tensor, ...]:
    """The tuple of results that a semantics returned for an op. Raises RunError W0803."""
    results = tuple(out) if isinstance(out, (tuple, list)) else (out,)
    if len(results) != len(op.results):
        raise RunError(
            "W0803", f"{op.name} returned {len(results)} results, the op has {len(op.results)}",
            reason=f"at {op.loc}" if str(op.loc) else "",
        )  # fmt: skip
    return results


def _resolve(target: str) -> Any:
    """The operator that a dotted name stands for. Raises RunError W0803."""
    found: Any = torch.ops
    for part in target.removeprefix("torch.ops.").split("."):
        try:
            found = getattr(found, part)
        except (AttributeError, RuntimeError):
            raise RunError(
                "W0803", f"this PyTorch has no operator {target}",
                reason=f"torch {torch.__version__} does not define it",
                hint="run with the PyTorch version that the plan was made with",
            ) from None  # fmt: skip
    return found


__all__ = ["TORCH_DTYPES", "WEFT_DTYPES", "Device", "OpContext", "results_of", "tensor_type"]
