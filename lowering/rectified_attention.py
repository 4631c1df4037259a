"""rectified_attention lowered: `fxq::rectified_attention` on an engine that a rule has chosen.

    triton      three Triton kernels (`fxq.lowering.kernels.rectified_attention`), CUDA
    flex        the plan of the reference, attention by compiled FlexAttention, CUDA

The op takes the arguments of the operator it replaces and the engine's name, and computes
`fxq.rectified_attention.reference`. Off CUDA every engine is the reference, so that a graph lowered
for a GPU can be run and compared anywhere.
"""

import torch
from torch import Tensor

from fxq.rectified_attention import reference
from fxq.rectified_attention.layout import empty_output

ENGINES = ("triton", "flex")


def lowered_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    density: Tensor,
    text_len: Tensor | None,
    order: Tensor | None,
    adjacency: Tensor | None,
    text_start: int,
    text_size: int,
    block_size: int,
    top_p: float,
    mode: str,
    mass: str,
    gate: bool,
    center_keys: bool,
    is_causal: bool,
    scale: float | None,
    engine: str,
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of `reference.rectified_attention`, computed by `engine`."""
    args = (
        query, key, value, density, text_len, order, adjacency, text_start, text_size, block_size,
        top_p, mode, mass, gate, center_keys, is_causal,
    )  # fmt: skip
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {ENGINES}, found {engine!r}")
    if query.device.type != "cuda":
        return reference.rectified_attention(*args, scale)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if engine == "flex":
        from fxq.lowering.flex_attention import launch as flex_launch

        return flex_launch(*args[:-1], scale=scale)  # never causal, says the rule
    from fxq.lowering.kernels.rectified_attention import launch  # loads Triton

    return launch(*args, scale)


def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    density: Tensor,
    text_len: Tensor | None,
    order: Tensor | None,
    adjacency: Tensor | None,
    text_start: int,
    text_size: int,
    block_size: int,
    top_p: float,
    mode: str,
    mass: str,
    gate: bool,
    center_keys: bool,
    is_causal: bool,
    scale: float | None,
    engine: str,
) -> tuple[Tensor, Tensor]:
    out = empty_output(query, value.shape[-1])
    return out, query.new_empty(query.shape[:-1], dtype=torch.float32)


# Registered by hand, like `fxq::int8_linear`.
_library = torch.library.Library("fxq", "FRAGMENT")
_library.define(
    "lowered_attention" + torch.library.infer_schema(lowered_attention, mutates_args=())
)
_library.impl("lowered_attention", lowered_attention, "CompositeExplicitAutograd")
torch.library.register_fake("fxq::lowered_attention", _fake, lib=_library)
