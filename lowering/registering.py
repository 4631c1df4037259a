"""How an operator that lowering emits is registered: by its definition's signature, once.

By hand, because torch.library.custom_op adds 70 microseconds to every call, more than a small
product takes. What it adds is autograd, which an integer kernel has no use for.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("fxq", "FRAGMENT")


def register(
    definition: Callable[..., Tensor], run: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> None:
    """Register `fxq::<name of run>`.

    Args:
        definition: whose signature is the operator's.
        run: computes it.
        fake: returns an empty result, given what `definition` takes by name.
    """
    name, signature = run.__name__, inspect.signature(definition)
    _library.define(name + torch.library.infer_schema(definition, mutates_args=()))
    _library.impl(name, run, "CompositeExplicitAutograd")

    def faked(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return fake(**bound.arguments)

    torch.library.register_fake(f"fxq::{name}", faked, lib=_library)
