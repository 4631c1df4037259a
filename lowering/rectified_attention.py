"""rectified_attention lowered: `fxq::rectified_attention` on an engine that a rule has chosen.

    triton      three Triton kernels (`fxq.lowering.kernels.rectified_attention`), CUDA
    flex        the plan of the reference, attention by compiled FlexAttention, CUDA

The op takes the arguments of the operator it replaces and the engine's name, and computes
`fxq.rectified_attention.reference`. Off CUDA every engine is the reference, so that a graph lowered
for a GPU can be run and compared anywhere.
"""

from typing import Any

import torch
from torch import Tensor

from fxq.rectified_attention import reference
from fxq.rectified_attention.op import SCHEMA, fake_results

ENGINES = ("triton", "flex")


def lowered_attention(*args: Any) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of `reference.rectified_attention`, computed by an engine.

    Args:
        args: those of the reference, then the engine.
    """
    *given, engine = args
    query: Tensor = given[0]
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {ENGINES}, found {engine!r}")
    if query.device.type != "cuda":
        return reference.rectified_attention(*given)
    given[-1] = query.shape[-1] ** -0.5 if given[-1] is None else given[-1]  # scale
    if engine == "flex":
        from fxq.lowering.flex_attention import launch as flex_launch

        return flex_launch(*given[:-2], scale=given[-1])  # never causal, says the rule
    from fxq.lowering.kernels.rectified_attention import launch  # loads Triton

    return launch(*given)


def _fake(*args: Any) -> tuple[Tensor, Tensor]:
    return fake_results(*args[:-1])


# Registered by hand, like `fxq::int8_linear`.
_library = torch.library.Library("fxq", "FRAGMENT")
_library.define("lowered_attention" + SCHEMA.replace(") ->", ", str engine) ->"))
_library.impl("lowered_attention", lowered_attention, "CompositeExplicitAutograd")
torch.library.register_fake("fxq::lowered_attention", _fake, lib=_library)
