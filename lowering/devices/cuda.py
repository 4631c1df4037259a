"""CUDA: our Triton kernels, and FlexAttention for the attention they do not take.

The epilogue of int8_linear takes the activation function and the next layer's quantize with it,
where nothing but a scale of NaN can make its result NaN or Inf: the next guard then reads that
scale. Our attention takes head dims to 128 in fp16 and bf16, FlexAttention most of the rest.
"""

import importlib.util
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch.fx import Node

from fxq.graph import dtype_of, hint, shape_of, tensor_of, val_of
from fxq.lowering.epilogue import Takes
from fxq.lowering.lower_attention import SparseAttention
from fxq.lowering.lower_conv import Int8Conv
from fxq.lowering.lower_linear import Int8Linear, Operands
from fxq.lowering.rule import Decision, Device, Lowering
from fxq.operators import operand

MAX_BLOCKS = 4096  # `fxq.lowering.kernels.select_blocks.MAX_BLOCKS`, which loads Triton


@dataclass(frozen=True)
class TritonInt8Linear(Int8Linear):
    """`fxq.lowering.kernels.int8_linear`, with as much of what follows as its epilogue computes."""

    def rewrite(self, layer: Node, operands: Operands, lowering: Lowering) -> Decision:
        o = operands
        epilogue = self.fuse(layer, o, Takes())
        out_dtype = epilogue[0] if len(epilogue) == 2 else torch.int8
        sizes = [math.prod(hint(size, lowering.sizes) for size in shape_of(o.codes)[:-1])]
        sizes += tensor_of(lowering.gm, o.weight).shape
        return _named("int8_linear", lowering.device, product_by_pointers, *sizes, out_dtype)


def _named(
    kernel: str, device: torch.device, why_by_pointers: Callable[..., str | None], *args: object
) -> Decision:
    """Return which of two kernels a launch will take, and why not the faster one; only where the
    device and Triton are here to be asked."""
    here = torch.cuda.is_available() and importlib.util.find_spec("triton") is not None
    if not here:
        return Decision(f"{kernel} (Triton)")
    if why := why_by_pointers(*args, device):
        return Decision(f"{kernel} (Triton, by pointers)", f"by pointers: {why}")
    return Decision(f"{kernel} (Triton, TMA)")


def product_by_pointers(
    m: int, n: int, k: int, out_dtype: torch.dtype, device: torch.device
) -> str | None:
    """Return why a product is loaded by pointers: `kernels.int8_linear.why_by_pointers`."""
    from fxq.lowering.kernels.int8_linear import why_by_pointers  # loads Triton

    return why_by_pointers(m, n, k, out_dtype.itemsize, device)


def attention_by_pointers(device: torch.device) -> str | None:
    """Return why keys and values are loaded by pointers, None where the copy engine does."""
    from fxq.lowering.kernels.hardware import why_no_copy_engine  # loads Triton

    return why_no_copy_engine(device)


@dataclass(frozen=True)
class TritonAttention(SparseAttention):
    """`fxq.lowering.kernels.rectified_attention`."""

    kernel: ClassVar[str] = "rectified_attention (Triton)"
    engine: ClassVar[str] = "triton"

    def why_not(self, node: Node, lowering: Lowering) -> str | None:
        names = ("query", "value", "text_size", "block_size", "scale")
        query, value, text_size, size, scale = (operand(node, name) for name in names)
        dims = [hint(shape_of(x)[-1], lowering.sizes) for x in (query, value)]
        text_size = val_of(text_size) if isinstance(text_size, Node) else text_size
        n_visual = hint(shape_of(query)[2], lowering.sizes) - hint(text_size, lowering.sizes)
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

    def apply(self, node: Node, lowering: Lowering) -> Decision:
        found = super().apply(node, lowering)
        if found.kernel is None:
            return found
        return _named("rectified_attention", lowering.device, attention_by_pointers)


@dataclass(frozen=True)
class FlexAttention(SparseAttention):
    """`fxq.lowering.flex_attention`."""

    kernel: ClassVar[str] = "rectified_attention (FlexAttention)"
    engine: ClassVar[str] = "flex"

    def why_not(self, node: Node, lowering: Lowering) -> str | None:
        query, value, size = (operand(node, name) for name in ("query", "value", "block_size"))
        dims = [shape_of(x)[-1] for x in (query, value)]
        if any(hint(dim) < 16 for dim in dims):
            return f"FlexAttention: its head dims start at 16, found {dims[0]} and {dims[1]}"
        if dtype_of(query) == torch.float64:
            return "FlexAttention: it computes in at most float32"
        if operand(node, "mode") == "online":
            return "FlexAttention: it knows no pseudo-keys"
        if operand(node, "is_causal"):
            return (
                "FlexAttention: blocks visited in part are masked by the last block and text only"
            )
        if size % 128:
            return f"FlexAttention: blocks must be multiples of 128 tokens, found {size}"
        return None


CUDA = Device(
    "cuda",
    lambda device: device.type == "cuda",
    (TritonInt8Linear(), Int8Conv(), TritonAttention(), FlexAttention()),
)
