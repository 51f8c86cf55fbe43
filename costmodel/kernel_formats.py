"""Number formats of kernels: bytes per element of each operand and the unit that multiplies them.

Names are those of weft (`bf16`), of the public measurements (`bfloat16`, `fp8_block`,
`w4a8_mxfp4_mxfp8`) and of vendors (`float8_e4m3fn|float4_e2m1fn_x2|per_1x32`): activations, weights,
scheme.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache


@dataclass(frozen=True)
class Format:
    """Bytes per element and compute unit.

    Attributes:
        act, weight, out: bytes per element of activations, weights and results.
        unit: format of the products: f64, f32, tf32, f16, bf16, f8, i8 or f4.
    """

    act: float
    weight: float
    out: float
    unit: str


#: a block of 32 (MX) or 16 (NVFP4) four-bit numbers has a scale of one byte
_MX, _NV = 0.53125, 0.5625
_FORMATS = {
    "f64": Format(8, 8, 8, "f64"),
    "f32": Format(4, 4, 4, "f32"),
    "tf32": Format(4, 4, 4, "tf32"),
    "f16": Format(2, 2, 2, "f16"),
    "bf16": Format(2, 2, 2, "bf16"),
    "f8": Format(1, 1, 2, "f8"),
    "i8": Format(1, 1, 2, "i8"),
    "int8_wo": Format(2, 1, 2, "bf16"),
    "int4_wo": Format(2, 0.5, 2, "bf16"),
    "nvfp4": Format(_NV, _NV, 2, "f4"),
    "mxfp4": Format(_MX, _MX, 2, "f4"),
    "mxfp8": Format(1, 1, 2, "f8"),
    "w4a16_mxfp4": Format(2, _MX, 2, "bf16"),
    "w4a8_mxfp4_mxfp8": Format(1, _MX, 2, "f8"),
    "w4afp8": Format(1, 0.5, 2, "f8"),
}
_ALIASES = {
    "float64": "f64", "fp64": "f64", "float32": "f32", "fp32": "f32", "float": "f32",
    "float16": "f16", "fp16": "f16", "half": "f16", "bfloat16": "bf16",
    "fp8": "f8", "fp8_block": "f8", "fp8_ootb": "f8", "f8e4m3": "f8", "f8e5m2": "f8",
    "float8_e4m3fn": "f8", "float8_e4m3fnuz": "f8", "float8_e5m2": "f8",
    "int8": "i8", "int8_sq": "i8", "float4_e2m1fn_x2": "mxfp4", "int4": "int4_wo",
    "w4a16": "int4_wo", "w8a16": "int8_wo", "bool": "i8", "fp4": "nvfp4",
    "i32": "f32", "i64": "f64", "i16": "f16", "i1": "i8", "u8": "i8",
}  # fmt: skip


@cache
def format_of(name: str) -> Format:
    """The format behind a name; one that is not known is taken as bf16."""
    if "|" in name:
        act, weight = (format_of(part) for part in name.split("|")[:2])
        unit = act.unit if act.unit == "f4" or weight.unit != "f8" else weight.unit
        return Format(act.act, weight.weight, 2, unit if weight.unit != "i4" else act.unit)
    key = _ALIASES.get(name, name)
    return _FORMATS.get(key, _FORMATS["bf16"])


def element_bytes(name: str) -> float:
    """Bytes of an element of activations."""
    return format_of(name).act
