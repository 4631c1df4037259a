"""The reconstruction engine: blocks cut from a graph, the values between them, and what learns in
each so that it gives again what the float model gives."""

from fxq.passes.common.reconstruction.blocks import Block, cut
from fxq.passes.common.reconstruction.losses import BlockLoss
from fxq.passes.common.reconstruction.methods import Learned, Method, Rounding, StraightThrough
from fxq.passes.common.reconstruction.reconstruct import Reconstruct

__all__ = [
    "Block",
    "BlockLoss",
    "Learned",
    "Method",
    "Reconstruct",
    "Rounding",
    "StraightThrough",
    "cut",
]
