"""How an operator that lowering emits is registered: by its definition's signature, once.

By hand, because torch.library.custom_op adds 70 microseconds to every call, more than a small
product takes. What it adds is autograd, which an integer kernel has no use for.

An operator may have a variant that writes into a given `out`, for which Inductor plans the memory
(`fxq.lowering.planned`).
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload

_library = torch.library.Library("fxq", "FRAGMENT")
with_out: list[OpOverload] = []  # the operators that have the variant


def register(
    definition: Callable[..., Tensor], run: Callable[..., Tensor], fake: Callable[..., Tensor]
) -> None:
    """Register `fxq::<name of run>` and its variant with `out`.

    Args:
        definition: whose signature is the operator's.
        run: computes it. Where it takes `out` too, a tensor like its result or None, it returns the
            result there (`fxq.lowering.kernels.buffers`).
        fake: returns an empty result, given what `definition` takes by name.
    """
    name, schema = run.__name__, torch.library.infer_schema(definition, mutates_args=())
    _library.define(name + schema)
    _library.impl(name, run, "CompositeExplicitAutograd")
    signature = inspect.signature(definition)
    if "out" in inspect.signature(run).parameters:
        variant = schema.replace(") -> Tensor", ", *, Tensor(a!) out) -> Tensor(a!)")
        _library.define(f"{name}.out{variant}")
        _library.impl(f"{name}.out", run, "CompositeExplicitAutograd")
        with_out.append(getattr(torch.ops.fxq, name).default)

    def faked(*args: Any, **kwargs: Any) -> Tensor:
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        return fake(**bound.arguments)

    torch.library.register_fake(f"fxq::{name}", faked, lib=_library)
