"""State of compiled train steps: dicts in torch's forms, checkpoints, files of Hugging Face."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..ir.errors import CompileError, RunError
from ..runtime.checkpoint import Checkpoints, open_checkpoint
from ..runtime.checkpoint_format import find_checkpoint
from ..runtime.hf_weights import load_pretrained, save_pretrained
from .entries import Compiler, Entry, state_of
from .state_forms import (
    canonical_names,
    flat_state,
    optimizer_state,
    parameter_order,
    whole,
)


class StepState:
    """What a compiled train step holds, in and out.

    What is loaded before the first call is kept and takes effect in it, when the plan is there. All
    ranks make the same calls in the same order.
    """

    compiler: Compiler
    _owner: tuple[torch.nn.Module, torch.optim.Optimizer] | None
    _current: Entry | None

    def __init__(self) -> None:
        self._checkpoints: Checkpoints | None = None
        self._waiting: list[Callable[[], object]] = []

    # -- dicts --------------------------------------------------------------------------------

    def state_dict(self, *, dtensor: bool = False) -> dict[str, Tensor]:
        """All state by the user's names (`exp_avg/NAME` for the optimizer's); all ranks call.

        Args:
            dtensor: DTensors on the plan's mesh instead of whole tensors.
        """
        return self._entry("state").running.state_dict(dtensor=dtensor)

    def load_state_dict(self, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
        """Take the flat form, whole tensors or DTensors. Optimizer states that are missing stay.

        Raises RunError W0804 for wrong names, shapes or dtypes; then nothing was changed.
        """
        self._when_ready(lambda: self._take({n: whole(t) for n, t in state.items()}, strict))

    def model_state_dict(self, *, dtensor: bool = False) -> dict[str, Tensor]:
        """As `model.state_dict()`: the same names in the same order. All ranks call.

        Args:
            dtensor: DTensors instead of whole tensors, where there are several ranks.
        """
        model, _ = self._held()
        held = self._parts(dtensor)
        own = state_of(model)
        return {name: held[plan] if plan in held else own[plan].detach().clone()
                for name, plan in canonical_names(model).items()}  # fmt: skip

    def optimizer_state_dict(self, *, dtensor: bool = False) -> dict[str, Any]:
        """As `get_optimizer_state_dict(model, optimizer)`: states by parameter names. All ranks call.

        Args:
            dtensor: DTensors instead of whole tensors, where there are several ranks.
        """
        return optimizer_state(self._parts(dtensor), *self._held(), self._numbers())

    def load_model_state_dict(self, state: Mapping[str, Tensor], *, strict: bool = True) -> None:
        """Take a dict of `model.state_dict()`, eager or `model_state_dict()`.

        Raises RunError W0804 for wrong names, shapes or dtypes; then nothing was changed.
        """

        def take() -> None:
            model, _ = self._held()
            names, own = canonical_names(model), state_of(model)
            planned = self._entry("state").running.state_types
            given = {name: whole(tensor) for name, tensor in state.items()}
            found = {names.get(name, name): tensor for name, tensor in given.items()}
            unused = {n: t for n, t in found.items() if n in own and n not in planned}
            self._take({n: t for n, t in found.items() if n not in unused}, strict)
            for name, tensor in unused.items():  # what the program never reads is the model's own
                own[name].data.copy_(tensor)

        self._when_ready(take)

    def load_optimizer_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take an optimizer's state, by names or by numbers, and the groups' learning rates.

        Raises RunError W0804 for wrong names, shapes or dtypes; then nothing was changed.
        """

        def take() -> None:
            model, optimizer = self._held()
            names = parameter_order(model, optimizer)
            kinds = self._entry("state").running.state_types
            flat = flat_state(state, names, kinds)
            strangers = [name for name in flat if name not in kinds]
            if strangers:
                raise RunError(
                    "W0804", f"the plan has no optimizer state {strangers[0]!r}",
                    reason=f"{len(strangers)} states are of another optimizer or model",
                    hint="load the state of the same optimizer class and model",
                )  # fmt: skip
            self._take(flat, strict=False)
            for mine, group in zip(optimizer.param_groups, state["param_groups"], strict=False):
                mine.update({key: group[key] for key in ("lr", "initial_lr") if key in group})

        self._when_ready(take)

    def sync(self) -> None:
        """Write parameters, buffers and optimizer states back into model and optimizer."""
        if self._owner is None or self._current is None:
            return
        model, optimizer = self._owner
        flat = self.state_dict()
        named = state_of(model)
        for name, value in flat.items():
            if name in named:
                named[name].data.copy_(value)
        by_name = dict(model.named_parameters())
        for name, kept in optimizer_state(flat, model, optimizer, self._numbers())["state"].items():
            if name in by_name:
                optimizer.state[by_name[name]].update(kept)

    # -- checkpoints --------------------------------------------------------------------------

    def save(
        self,
        path: str | Path,
        step: int,
        *,
        asynchronous: bool = False,
        keep: int = 2,
        extra: Mapping[str, Any] | None = None,
    ) -> None:
        """Write a checkpoint into the folder `path`; the last good one stays until it is complete.

        Args:
            step: number of steps taken; `load` and `resume` return it.
            asynchronous: copy this rank's part and return; the next `save`, `load` or `wait` raises
                what went wrong.
            keep: how many complete checkpoints to leave in the folder.
            extra: what else to keep, as JSON: a scheduler's state, for instance.

        Raises RunError W1105, W1106.
        """
        self._entry("state")
        kept = {"user": dict(extra or {}), "seeds": self.compiler.seeds()}
        self._bound().save(path, step, asynchronous=asynchronous, keep=keep, extra=kept)

    def load(self, path: str | Path, *, strict: bool = True) -> int:
        """Load the latest checkpoint of a folder, from any mesh, plan and number of ranks; its step.

        Also what `torch.distributed.checkpoint.save` wrote from an eager or FSDP2 program. Random
        numbers go on where they were. The learning rate stays the optimizer's.

        Raises RunError W1101 to W1104; those about names and shapes at the first call, if there was
        none yet.
        """
        if self._current is not None:
            return self._load(path, strict)
        reader = open_checkpoint(path)
        self._extra = reader.index.extra
        self._when_ready(lambda: self._load(reader.folder, strict))
        return reader.index.step

    def resume(self, path: str | Path) -> int:
        """As `load`, but 0 where the folder holds no checkpoint yet."""
        return 0 if find_checkpoint(path) is None else self.load(path)

    def wait(self) -> None:
        """Wait for an asynchronous save. Raises what it ended in."""
        if self._checkpoints is not None:
            self._checkpoints.wait()

    def close(self) -> None:
        """Wait for an asynchronous save and give the folders back."""
        if self._checkpoints is not None:
            self._checkpoints.close()

    @property
    def extra(self) -> dict[str, Any]:
        """What was given as `extra` to the save that was loaded last."""
        found: dict[str, Any] = self._extra.get("user", {})
        return found

    @property
    def bytes_read(self) -> int:
        """Bytes of data files that this rank read in its last `load`."""
        return 0 if self._checkpoints is None else self._checkpoints.bytes_read

    def load_pretrained(self, path: str | Path) -> None:
        """Load safetensors of Hugging Face; each rank reads its slices. See `hf_weights`."""
        self._when_ready(lambda: load_pretrained(self._entry("state").running, path))

    def save_pretrained(self, path: str | Path) -> None:
        """Write safetensors that `from_pretrained` reads. See `hf_weights`."""
        save_pretrained(self._entry("state").running, path)

    # -- inside -------------------------------------------------------------------------------

    _extra: Mapping[str, Any] = {}

    def _entry(self, what: str) -> Entry:
        if self._current is None:
            raise CompileError("W0304", f"the compiled step has no {what} before its first call")
        return self._current

    def _held(self) -> tuple[torch.nn.Module, torch.optim.Optimizer]:
        self._entry("state")
        assert self._owner is not None
        return self._owner

    def _numbers(self) -> dict[str, str]:
        found: dict[str, str] = self._entry("state").plan.meta.get("numbers", {})
        return found

    def _parts(self, dtensor: bool) -> dict[str, Tensor]:
        running = self._entry("state").running
        return running.state_dict(dtensor=dtensor and running.comm.mesh.size > 1)

    def _take(self, state: Mapping[str, Tensor], strict: bool) -> None:
        """Load into the plan. A flat dict may leave optimizer states out; those stay."""
        entry = self._entry("state")
        kept = {name: tensor for name, tensor in entry.running.state_dict().items()
                if name not in state and entry.running.state_roles[name] == "state"}  # fmt: skip
        entry.running.load_state({**state, **kept}, strict=strict)
        self._refresh()

    def _load(self, path: str | Path, strict: bool) -> int:
        order = parameter_order(*self._held())
        checkpoints = self._bound()
        step = checkpoints.load(path, strict=strict, order=order)
        self._extra = checkpoints.extra
        if seeds := checkpoints.extra.get("seeds"):
            self.compiler.set_seeds(seeds)
        self._refresh()
        return step

    def _refresh(self) -> None:
        """Let the model see what was loaded."""
        raise NotImplementedError

    def _bound(self) -> Checkpoints:
        running = self._entry("state").running
        if self._checkpoints is None:
            self._checkpoints = Checkpoints(running)
        elif self._checkpoints.program is not running:
            self._checkpoints.bind(running)
        return self._checkpoints

    def _when_ready(self, act: Callable[[], object]) -> None:
        """Act now, or at the end of the first call's planning."""
        if self._current is None:
            self._waiting.append(act)
        else:
            act()

    def _ready(self) -> None:
        """The plan is there and holds the model's state: do what waited for it."""
        waiting, self._waiting = self._waiting, []
        for act in waiting:
            act()
