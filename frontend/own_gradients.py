"""Gradients that a program defines itself, which tracing would silently leave out.

weft differentiates the traced program; what autograd would have called besides (the backward of a
`torch.autograd.Function`, hooks on gradients) is not in the trace. Such programs are refused, but
for Functions whose backward is, on random numbers, the derivative of their forward.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import CheckpointFunction

from ..ir.errors import CompileError
from ..ir.verify import user_span
from .locate import user_frames

_HINT = (
    "write it with torch operators (a straight-through estimator is x + (y - x).detach()), or as "
    "a torch.library.custom_op with register_autograd"
)
#: torch's own, which are replaced while a step is traced
_APPLY = torch.autograd.Function.__dict__["apply"]
_GRAD = torch.autograd.grad
#: hooks that autograd calls: of parameters, and of modules
_HOOKS = ("_backward_hooks", "_post_accumulate_grad_hooks")
_MODULE_HOOKS = ("_backward_hooks", "_backward_pre_hooks")


@contextmanager
def refuse_own_gradients(module: torch.nn.Module) -> Iterator[None]:
    """While a program is traced for training, refuse what would change its gradients unseen.

    Raises CompileError W0302.
    """
    _refuse_hooks(module)
    hook = torch.Tensor.register_hook

    def refused(cls: Any, *args: Any, **kwargs: Any) -> Any:
        tensors = [arg for arg in args if isinstance(arg, torch.Tensor)]
        trained = torch.is_grad_enabled() and any(x.requires_grad for x in tensors)
        if cls is CheckpointFunction:  # it would run the function without gradients
            function, _, *given = args
            return function(*given)
        # other functions of torch's own have the derivative of what they compute
        if trained and not cls.__module__.startswith("torch.") and not _honest(cls, args, kwargs):
            raise _refused(f"{cls.__name__} has a backward of its own", _HINT)
        return _APPLY.__func__(cls, *args, **kwargs)

    def refused_hook(self: torch.Tensor, function: Any) -> Any:
        raise _refused("the program hooks a gradient (Tensor.register_hook)",
                       "change the gradients between backward() and optimizer.step()")  # fmt: skip

    torch.autograd.Function.apply = classmethod(refused)  # type: ignore[assignment]
    torch.Tensor.register_hook = refused_hook  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.autograd.Function.apply = _APPLY  # type: ignore[method-assign]
        torch.Tensor.register_hook = hook  # type: ignore[method-assign]


class _NoContext:
    """In place of a Function's context where only its forward is wanted."""

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **kwargs: None


def _honest(cls: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    """Is the backward of a Function the derivative of its forward, on random numbers?"""
    with ThreadPoolExecutor(1) as pool:  # another thread: tracing holds for this one only
        return pool.submit(_compare, cls, _APPLY.__get__(None, cls), args, kwargs).result()


def _compare(cls: Any, apply: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> bool:
    makes_context = cls.setup_context is torch.autograd.Function.setup_context
    context = [_NoContext()] if makes_context else []
    g = torch.Generator().manual_seed(0)

    def grads(forward: Any, lead: list[Any]) -> list[torch.Tensor] | None:
        given = [_like(arg, g.manual_seed(i)) for i, arg in enumerate(args)]
        out = forward(*lead, *given, **kwargs)
        outs = [x for x in (out if isinstance(out, tuple) else (out,)) if _is_active(x)]
        xs = [x for x in given if _is_active(x)]
        if not outs:
            return None
        weights = [torch.randn(x.shape, generator=g.manual_seed(99)).to(x.dtype) for x in outs]
        found = _GRAD(outs, xs, weights, allow_unused=True)
        return [torch.zeros_like(x) if d is None else d for x, d in zip(xs, found, strict=True)]

    own, true = grads(apply, []), grads(cls.forward, context)
    if own is None or true is None:
        return own is true
    return all(
        bool((a - b).abs().max() <= 1e-3 * (1e-3 + b.abs().max())) for a, b in zip(own, true, strict=True)
    )


def _is_active(x: Any) -> bool:
    return isinstance(x, torch.Tensor) and x.requires_grad


def _like(arg: Any, generator: torch.Generator) -> Any:
    """A random tensor in place of a traced one; other arguments as they are."""
    if not isinstance(arg, torch.Tensor):
        return arg
    if not arg.is_floating_point():
        return torch.zeros(_numbers(arg.shape), dtype=arg.dtype)
    made = torch.randn(_numbers(arg.shape), generator=generator).to(arg.dtype)
    return made.requires_grad_(arg.requires_grad)


def _numbers(shape: Sequence[Any]) -> list[int]:
    """A shape with the sizes of the example for those that may vary."""
    return [size.node.hint if isinstance(size, torch.SymInt) else size for size in shape]


def _refuse_hooks(module: torch.nn.Module) -> None:
    found = [f"parameter {name}" for name, parameter in module.named_parameters()
             if any(getattr(parameter, hooks, None) for hooks in _HOOKS)]  # fmt: skip
    found += [f"module {name or type(inner).__name__}" for name, inner in module.named_modules()
              if any(getattr(inner, hooks, None) for hooks in _MODULE_HOOKS)]  # fmt: skip
    if found:
        raise CompileError(
            "W0302", f"{found[0]} has a hook on its gradient",
            reason="weft derives the gradients itself and would not call it",
            hint="remove the hook; change gradients between backward() and optimizer.step()",
        )  # fmt: skip


def _refused(message: str, hint: str) -> CompileError:
    frames = user_frames(traceback.extract_stack())
    frame = frames[-1] if frames else None
    return CompileError(
        "W0302", message, span=None if frame is None else user_span(frame.filename, frame.lineno or 0),
        reason="weft derives the gradients itself and would not call it", hint=hint,
    )  # fmt: skip
