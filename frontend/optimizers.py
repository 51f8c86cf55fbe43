"""Optimizers: from a torch optimizer's groups to update ops, one table entry per class."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.builder import Builder
from ..ir.errors import CompileError
from ..ir.module import NOWHERE, Attr, Function, Location, Namer, Value
from ..ir.types import TensorType
from .grad import split_ops


@dataclass(frozen=True)
class Update:
    """How one parameter is updated.

    Attributes:
        op: the update op.
        attrs: its attributes.
        states: names of the state tensors in torch, in the op's operand order.
        group: the parameter group, whose learning rate it uses.
    """

    op: str
    attrs: Mapping[str, Attr]
    states: tuple[str, ...]
    group: int


def _adam(group: Mapping[str, Any], decoupled: bool) -> tuple[str, dict[str, Attr], tuple[str, ...]]:
    beta1, beta2 = group["betas"]
    attrs: dict[str, Attr] = {
        "beta1": float(beta1), "beta2": float(beta2), "eps": float(group["eps"]),
        "weight_decay": float(group["weight_decay"]), "maximize": bool(group["maximize"]),
    }  # fmt: skip
    decoupled = decoupled or bool(group.get("decoupled_weight_decay"))
    return "adamw_update" if decoupled else "adam_update", attrs, ("exp_avg", "exp_avg_sq")


def _sgd(group: Mapping[str, Any]) -> tuple[str, dict[str, Attr], tuple[str, ...]]:
    attrs: dict[str, Attr] = {
        "weight_decay": float(group["weight_decay"]), "maximize": bool(group["maximize"])
    }
    if not group["momentum"]:
        return "sgd_update", attrs, ()
    attrs |= {"momentum": float(group["momentum"]), "dampening": float(group["dampening"]),
              "nesterov": bool(group["nesterov"])}  # fmt: skip
    return "momentum_update", attrs, ("momentum_buffer",)


_Reader = Callable[[Mapping[str, Any]], tuple[str, dict[str, Attr], tuple[str, ...]]]
#: exact class -> what its groups mean; a subclass may do something else
OPTIMIZERS: dict[type[torch.optim.Optimizer], _Reader] = {
    torch.optim.SGD: _sgd,
    torch.optim.Adam: lambda group: _adam(group, False),
    torch.optim.AdamW: lambda group: _adam(group, True),
}
#: names of the command line
NAMES: dict[str, type[torch.optim.Optimizer]] = {
    cls.__name__.lower(): cls for cls in OPTIMIZERS
}


def _unsupported(what: str, hint: str) -> CompileError:
    return CompileError("W0303", f"{what} is not supported", hint=hint)


def make(name: str, parameters: Any, **hyper: Any) -> torch.optim.Optimizer:
    """A torch optimizer by its name (`sgd`, `adam`, `adamw`).

    Raises CompileError W0303, W1001 for what its class does not take.
    """
    cls = NAMES.get(name.lower())
    if cls is None:
        raise _unsupported(f"optimizer {name!r}", f"use one of {', '.join(sorted(NAMES))}")
    try:
        return cls(parameters, **hyper)
    except (TypeError, ValueError, RuntimeError) as error:  # as torch's optimizers raise them
        raise CompileError(
            "W1001", f"{cls.__name__} cannot be made with {', '.join(hyper) or 'these parameters'}",
            reason=str(error), hint=f"pass what torch.optim.{cls.__name__} takes",
        ) from None  # fmt: skip


#: states that torch's optimizers keep without counting steps
UNCOUNTED = {"momentum_buffer"}


def has_update_op(optimizer: torch.optim.Optimizer) -> bool:
    """Is there an update op for what this optimizer does? Otherwise its step is traced."""
    variant = any(group.get("amsgrad") for group in optimizer.param_groups)
    return type(optimizer) in OPTIMIZERS and not variant


def _traced(group: Mapping[str, Any]) -> tuple[str, dict[str, Attr], tuple[str, ...]]:
    return "", {}, ()


def updates_of(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str]
) -> tuple[dict[str, Update], list[float]]:
    """How each parameter is updated, by name, and the learning rate of each group.

    The op is empty for an optimizer that has none.

    Args:
        names: name of each parameter of the model by `id`.

    Raises CompileError W0304.
    """
    reader = OPTIMIZERS[type(optimizer)] if has_update_op(optimizer) else _traced
    updates: dict[str, Update] = {}
    rates: list[float] = []
    for number, group in enumerate(optimizer.param_groups):
        op, attrs, states = reader(group)
        rates.append(float(group["lr"]))
        for parameter in group["params"]:
            name = names.get(id(parameter))
            if name is None:
                raise CompileError(
                    "W0304", f"group {number} of the optimizer has a tensor that the model has not",
                    hint="make the optimizer from model.parameters(), after the last change of "
                         "the model's tensors",
                )  # fmt: skip
            updates[name] = Update(op, attrs, states, number)
    return updates, rates


def states_of(
    optimizer: torch.optim.Optimizer, names: Mapping[int, str], updates: Mapping[str, Update]
) -> dict[str, Tensor]:
    """The optimizer's state so far, under the names of the entry; nothing before the first step."""
    found: dict[str, Tensor] = {}
    steps = 0.0
    taken = {name: 0.0 for name, update in updates.items() if not set(update.states) <= UNCOUNTED}
    for parameter, state in optimizer.state.items():
        name = names.get(id(parameter))
        if name is None or name not in updates:
            continue
        for key in updates[name].states:
            if isinstance(state.get(key), Tensor):
                found[f"{key}/{name}"] = state[key]
                steps = max(steps, 1.0)
        if "step" in state:
            steps = max(steps, float(state["step"]))
            if name in taken:
                taken[name] = float(state["step"])
    refuse_late(sorted(name for name, count in taken.items() if count < steps), steps)
    if found:
        found["step"] = torch.tensor(steps, dtype=torch.float64)
    return found


def refuse_late(late: Sequence[str], steps: float) -> None:
    """Raise CompileError W0303 where some parameters have taken fewer steps than others.

    One counter serves all parameters of a plan; Adam's bias correction depends on it.
    """
    if late:
        more = f" and {len(late) - 1} more" if len(late) > 1 else ""
        raise CompileError(
            "W0303", f"{late[0]}{more} joins the training after {steps:.0f} steps of others",
            reason="the optimizer's correction counts the steps of each parameter, a plan those of all",
            hint="begin again with a new optimizer, or train from the start and use a group with lr 0",
        )  # fmt: skip


def add_updates(
    entry: Function, updates: Mapping[str, Update], groups: int, stepped_at: Location = NOWHERE
) -> Function:
    """Replace the results of role `grad` by updates of parameters, states and the step counter.

    Adds the parameters `lr.<group>` (role `lr`), `step` and the optimizer states (role `state`).
    Parameters of role `updated`, which stand for new values, go: what reads them comes behind the
    updates.

    Args:
        stepped_at: the user's line that calls `optimizer.step()`; where weft wrote the step, an
            update has the place that first reads its parameter.
    """
    work = _Updating(entry, groups, stepped_at)
    for name, grad in work.grads.items():
        work.update(name, grad, updates[name])
    return work.finish()


class _Updating:
    """An entry whose updates are being written."""

    def __init__(self, entry: Function, groups: int, stepped_at: Location) -> None:
        self.entry, self.stepped_at = entry, stepped_at
        names = [p.name for p in entry.params] + [v.name for op in entry.ops for v in op.results]
        self.builder = Builder(Namer(tuple(names)))
        params = list(zip(entry.params, entry.param_attrs, strict=True))
        self.markers = {v.name: str(a["name"]) for v, a in params if a.get("role") == "updated"}
        kept = [(v, a) for v, a in params if v.name not in self.markers]
        self.builder.params = [v for v, _ in kept]
        self.builder.param_attrs = [a for _, a in kept]
        self.params = {str(a["name"]): v for v, a in kept if a.get("role") == "param"}
        results = list(zip(entry.results, entry.result_attrs, strict=True))
        self.grads = {str(a["name"]): v for v, a in results if a.get("role") == "grad"}
        self.results = [(v, a) for v, a in results if a.get("role") != "grad"]
        early, self.late = split_ops(entry.ops, self.markers)
        scalar = TensorType("f64", ())
        self.rates = [self.builder.param(scalar, f"lr.{g}", role="lr", name=f"lr.{g}")
                      for g in range(groups)]  # fmt: skip
        counter = self.builder.param(scalar, "step", role="state", name="step")
        one = self.builder.constant(1.0, scalar, stepped_at)
        self.step = self.builder.one("add", [counter, one], loc=stepped_at)
        self.builder.ops = [*early, *self.builder.ops]
        self.read_at: dict[str, Location] = {}
        for op in entry.ops:
            for value in op.operands:
                self.read_at.setdefault(value.name, op.loc)
        self.new: dict[str, Value] = {}
        self.states: list[tuple[Value, Mapping[str, Attr]]] = []

    def update(self, name: str, grad: Value, update: Update) -> None:
        """Append the update of one parameter."""
        param = self.params[name]
        states = [self.builder.param(param.type, f"{key}/{name}", role="state", name=f"{key}/{name}")
                  for key in update.states]  # fmt: skip
        operands = [param, grad, *states, self.step, self.rates[update.group]]
        place = self.stepped_at if self.stepped_at.file else self.read_at.get(param.name, NOWHERE)
        loc = Location(name.rpartition(".")[0], place.file, place.line)
        outs = self.builder.many(update.op, operands, update.attrs, loc=loc)
        self.new[name] = outs[0]
        self.states += [(value, {"role": "update", "updates": f"{key}/{name}"})
                        for value, key in zip(outs[1:], update.states, strict=True)]  # fmt: skip

    def finish(self) -> Function:
        """The entry. A parameter that was not updated stands for its own new value."""
        env = {marker: self.new.get(name, self.params[name])
               for marker, name in self.markers.items()}  # fmt: skip
        for op in self.late:
            operands = tuple(env.get(value.name, value) for value in op.operands)
            self.builder.append(op.with_(operands=operands))
        results = [(self.step, {"role": "update", "updates": "step"}), *self.states]
        changed = set()
        for value, attrs in self.results:
            value = env.get(value.name, value)
            name = attrs.get("updates")
            if attrs.get("role") == "update" and name in self.params:
                changed.add(name)
                if value is self.params[str(name)]:
                    continue  # no gradient reached it
            results.append((value, attrs))
        results += [(value, {"role": "update", "updates": name})
                    for name, value in self.new.items() if name not in changed]  # fmt: skip
        order = {"update": 1}
        results.sort(key=lambda pair: order.get(str(pair[1].get("role")), 0))
        entry = self.entry
        return self.builder.function(entry.name, [v for v, _ in results], [a for _, a in results],
                                     entry.attrs)  # fmt: skip
