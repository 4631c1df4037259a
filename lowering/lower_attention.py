"""The rule that chooses what computes `fxq::rectified_attention` on a device.

On CUDA our own kernel takes head dims to 128 in fp16 and bf16, FlexAttention most of the rest. On a
CPU the definition is the kernel: it reads visited blocks only, and dense steps are torch's
attention. With one thread it is 2.1 times as fast as dense SDPA at 4,096 tokens and a fifth of the
blocks, 2.8 times at 8,192, and no faster from half of the blocks on. Compiled FlexAttention, which
compiles for seconds for every shape, is ahead of it at a tenth of the blocks and 4,096 tokens and
behind it from a fifth on (benchmarks/results/cpu_rectified_attention_native.md).
"""

from collections.abc import Mapping

import torch
from torch.fx import Node

import fxq.lowering.rectified_attention  # noqa: F401  registers the op
from fxq.graph import args_of, dtype_of, hint, insert_call, shape_of, val_of
from fxq.lowering.decision import Decision

MAX_BLOCKS = 4096  # `fxq.lowering.kernels.select_blocks.MAX_BLOCKS`, which loads Triton
OP = torch.ops.fxq.lowered_attention.default


def lower_attention(
    node: Node, device: torch.device, sizes: Mapping[str, int] | None = None
) -> Decision:
    """Put the best engine for `device` in the place of one sparse attention."""
    if device.type == "cpu":
        return Decision(
            "rectified_attention (torch)",
            "reads visited blocks only, in fp32; pays below half of them",
        )
    if device.type != "cuda":
        return Decision(None, f"the reference: no kernel for {device.type}")
    declined = why_not_triton(node, sizes)
    engine = "triton" if declined is None else "flex"
    if declined is not None and (why := why_not_flex(node)):
        return Decision(None, f"the reference: {declined}; FlexAttention: {why}")
    result = insert_call(OP, (*args_of(node), engine), before=node)
    result.meta["fxq_replaces"] = node.name
    node.replace_all_uses_with(result)
    if declined is None:
        return Decision("rectified_attention (Triton)")
    return Decision("rectified_attention (FlexAttention)", declined)


def why_not_triton(node: Node, sizes: Mapping[str, int] | None) -> str | None:
    """Return why our kernel does not take an attention, None where it does."""
    query, value, size, scale = (args_of(node)[i] for i in (0, 2, 9, 16))
    dims = [hint(shape_of(x)[-1], sizes) for x in (query, value)]
    text_size = args_of(node)[8]
    text_size = val_of(text_size) if isinstance(text_size, Node) else text_size
    n_visual = hint(shape_of(query)[2], sizes) - hint(text_size, sizes)
    if dtype_of(query) not in (torch.float16, torch.bfloat16):
        return f"the kernel is for float16 and bfloat16, found {dtype_of(query)}"
    if any(dim % 16 or not 16 <= dim <= 128 for dim in dims):  # rows of whole 16-byte loads
        return f"the kernel is for head dims of 16 to 128 by 16, found {dims[0]} and {dims[1]}"
    if size not in (64, 128):
        return f"the kernel is for blocks of 64 or 128 tokens, found {size}"
    if n_visual > MAX_BLOCKS * size:
        return f"the kernel is for at most {MAX_BLOCKS} blocks, found {-(-n_visual // size)}"
    if scale is not None and scale <= 0:
        return f"the kernel is for a positive scale, found {scale}"
    return None


def why_not_flex(node: Node) -> str | None:
    """Return why FlexAttention does not take an attention, None where it does."""
    size, mode, is_causal = (args_of(node)[i] for i in (9, 11, 15))
    dims = [shape_of(args_of(node)[i])[-1] for i in (0, 2)]
    if any(hint(dim) < 16 for dim in dims):
        return f"its head dims start at 16, found {dims[0]} and {dims[1]}"
    if dtype_of(args_of(node)[0]) == torch.float64:
        return "it computes in at most float32"
    if mode == "online":
        return "it knows no pseudo-keys"
    if is_causal:
        return "blocks visited in part are masked by the last block and text only"
    if size % 128:
        return f"blocks must be multiples of 128 tokens, found {size}"
    return None
