"""Tap a module: call it, and see what a submodule reads or gives; the call goes no further."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from fxq.errors import did_you_mean
from fxq.signature import split_inputs


class _Reached(Exception):
    """Ends a call at the tap: the rest of it is not needed."""


def check_tap(module: nn.Module, tap: str) -> None:
    """Raise ValueError where a module has no such submodule."""
    known = dict(module.named_modules())
    if not tap or tap not in known:
        raise ValueError(f"tap: no submodule {tap!r}; {did_you_mean(tap, [*filter(None, known)])}")


def read_by(
    module: nn.Module,
    tap: str,
    call: Any,
    take: Callable[[tuple[Any, ...], dict[str, Any]], Tensor | None],
) -> Tensor | None:
    """Return what `take` makes of the arguments of a submodule, None where a call does not reach
    it.

    Args:
        module: in eval mode.
        tap: the name of a submodule.
        call: arguments of the module, as `fxq.compress` takes them.
        take: of positional and keyword arguments.
    """
    reach = _Reach(take)
    hook = module.get_submodule(tap).register_forward_pre_hook(reach, with_kwargs=True)
    return reach.during(module, call, hook)


def given_by(
    module: nn.Module, tap: str, call: Any, take: Callable[[Any], Tensor | None]
) -> Tensor | None:
    """Return what `take` makes of the output of a submodule; otherwise as `read_by`."""
    reach = _Reach(lambda args, output: take(output))
    return reach.during(module, call, module.get_submodule(tap).register_forward_hook(reach))


class _Reach:
    """A hook that takes what it is given and ends the call."""

    def __init__(self, take: Callable[..., Tensor | None]) -> None:
        self.take = take
        self.taken: Tensor | None = None

    def __call__(self, _: nn.Module, *given: Any) -> None:
        self.taken = self.take(*given)
        raise _Reached

    def during(self, module: nn.Module, call: Any, hook: Any) -> Tensor | None:
        """Call the module, remove the hook, and return what was taken."""
        args, kwargs = split_inputs(call)
        try:
            with torch.no_grad(), suppress(_Reached):
                module(*args, **kwargs)
        finally:
            hook.remove()
        return self.taken
