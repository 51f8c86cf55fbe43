"""Communication, calls, and ops that only some levels have.

Collectives act on the whole of a mesh axis, or of several (`axes`, ranks in mesh order). Their
types say everything else: operand and result differ in the placement on those axes only.
Semantics over ranks live in the interpreter (`runtime/`), which sees all ranks at once.
"""

from __future__ import annotations

from typing import Any

from ..opdef import AttrSpec, define


def _not_alone(c: Any, *xs: Any) -> Any:
    raise RuntimeError("this op needs the interpreter or the executor, not one rank's semantics")


_SPMD = ("spmd", "schedule")
_AXIS = {"axis": AttrSpec("str", doc="a mesh axis")}
_TAG = {"tag": AttrSpec("int", 0, doc="tells transfers between the same stages apart")}
_ASYNC = {"async": AttrSpec("bool", False, "schedule level: started here, done at its `wait`")}
_FAR = {"mesh": AttrSpec("str", "", "the other stage's mesh, `dp=2, tp=2`, where it has another shape"),
        "placement": AttrSpec("str", "", "the value's placement on that mesh, `S(0), B`")}  # fmt: skip
_COMBINE = {"combine": AttrSpec("str", "sum", "sum, max or min")}


def _collective(name: str, doc: str, **attrs: AttrSpec) -> None:
    define(name=name, family="collective", doc=doc, signature=None, ref=_not_alone,
           attrs={**attrs, **_ASYNC}, levels=_SPMD)  # fmt: skip


_collective("all_reduce", "P(combine) -> B on `axis`", **_AXIS, **_COMBINE)
_collective("all_gather", "S(dim) -> B on `axis`", **_AXIS,
            dim=AttrSpec("int", doc="a tensor dim, >= 0"))  # fmt: skip
_collective("reduce_scatter", "P(combine) -> S(dim) on `axis`", **_AXIS, **_COMBINE,
            dim=AttrSpec("int", doc="a tensor dim, >= 0"))  # fmt: skip
_collective("all_to_all", "S(source) -> S(target) on `axis`", **_AXIS,
            source=AttrSpec("int", doc="the dim that is split"),
            target=AttrSpec("int", doc="the dim that becomes split"))  # fmt: skip
_collective("broadcast", "the value of coordinate `root` of `axis` on all of its ranks", **_AXIS,
            root=AttrSpec("int", 0, doc="a coordinate of `axis`"))  # fmt: skip
_collective("permute_ranks", "coordinate i of `axis` receives from i - shift (a ring)", **_AXIS,
            shift=AttrSpec("int", 1, doc="how far along the ring"))  # fmt: skip

define(name="shard", family="control", flops_per_point=0, levels=_SPMD, signature=None,
       doc="B -> S(dim) on `axis`: keep this rank's part; no communication",
       attrs={**_AXIS, "dim": AttrSpec("int", doc="a tensor dim, >= 0")}, ref=_not_alone)  # fmt: skip
define(name="partial", family="control", flops_per_point=0, levels=_SPMD, signature=None,
       doc="B -> P(sum) on `axis`: coordinate 0 keeps the value, the others hold zeros; or "
           "S(dim) -> P(sum): each pads its part with zeros",
       attrs={**_AXIS, **_COMBINE}, ref=_not_alone)  # fmt: skip
define(name="lse_combine", family="collective", flops_per_point=12, levels=_SPMD, signature=None,
       doc="log-sum-exp of a value over `axis`", attrs={**_AXIS, **_ASYNC}, ref=_not_alone)  # fmt: skip
define(name="reshard", family="control", flops_per_point=0, levels=("placed",), signature=None,
       doc="the same value under another placement; `lower` picks the collectives",
       ref=_not_alone)  # fmt: skip
define(name="send", family="collective", flops_per_point=0, levels=_SPMD, signature=None,
       doc="send a value to stage `to`: to the rank at the same mesh coordinate, or, where that stage "
           "has a mesh of another shape, to each of its ranks the pieces of its shard (ir/crossing.py)",
       attrs={"to": AttrSpec("int", doc="a stage"), **_TAG, **_ASYNC, **_FAR}, ref=_not_alone)  # fmt: skip
define(name="recv", family="collective", flops_per_point=0, levels=_SPMD, signature=None,
       doc="receive a value from stage `source`: see `send`",
       attrs={"source": AttrSpec("int", doc="a stage"), **_TAG, **_ASYNC, **_FAR},
       ref=_not_alone)  # fmt: skip
define(name="wait", family="control", flops_per_point=0, levels=("schedule",), signature=None,
       doc="the result of an asynchronous action, once it is done", ref=_not_alone)  # fmt: skip
define(name="free", family="control", flops_per_point=0, levels=("schedule",), signature=None,
       doc="the operands are not used any more: their memory may be reused",
       ref=_not_alone)  # fmt: skip
define(name="call", family="control", flops_per_point=0, signature=None,
       doc="call a function; repeated blocks are one function that is called many times. Schedule "
           "level: kernel functions only",
       attrs={"callee": AttrSpec("str", doc="a function of the module")}, ref=_not_alone)  # fmt: skip


def _aten(c: Any, *xs: Any) -> Any:
    """`args` is a template: strings `%0`, `%1`, ... stand for the operands."""
    return c.aten(c.attrs["target"], c.attrs["args"], xs)


define(name="aten", family="opaque", signature=None, ref=_aten,
       doc="a call of an ATen operator that weft does not know, on whole operands: slower, never "
           "wrong. `args` is its arguments as JSON, `%i` standing for operand i",
       attrs={"target": AttrSpec("str", doc="an ATen operator, e.g. `aten.fft_rfft.default`"),
              "args": AttrSpec("str", "[]", doc="JSON")})  # fmt: skip
