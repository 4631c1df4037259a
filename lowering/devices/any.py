"""A device without kernels, and what is said of an operator for which a device has no rule."""

import platform
from dataclasses import dataclass

from torch.fx import Node

from fxq.lowering.decision import Decision
from fxq.lowering.lower_attention import SparseAttention
from fxq.lowering.lower_linear import Int8Linear, Operands
from fxq.lowering.rule import Device, Lowering


@dataclass(frozen=True)
class NoInt8Linear(Int8Linear):
    """Declines every layer with a quantized weight."""

    def rewrite(self, layer: Node, operands: Operands, lowering: Lowering) -> Decision:
        return Decision(None, f"no int8 kernel for {lowering.device.type} ({platform.machine()})")


@dataclass(frozen=True)
class NoSparseAttention(SparseAttention):
    """Declines every sparse attention."""

    def apply(self, node: Node, lowering: Lowering) -> Decision:
        return Decision(None, f"no kernel for {lowering.device.type}")


ANY = Device("any", lambda device: True, (NoInt8Linear(), NoSparseAttention()))
