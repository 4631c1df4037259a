"""Devices that have no kernels of their own: other CPUs, and everything else.

On any CPU the definition of sparse attention is its kernel: it reads visited blocks only, and dense
steps are torch's attention. With one thread it is 2.1 times as fast as dense SDPA at 4,096 tokens
and a fifth of the blocks, 2.8 times at 8,192, and no faster from half of the blocks on. Compiled
FlexAttention, which compiles for seconds for every shape, is faster at a tenth of the blocks
and 4,096 tokens and slower from a fifth on
(benchmarks/results/cpu_rectified_attention_native.md).
"""

from dataclasses import dataclass
from typing import ClassVar

from torch.fx import Node

from fxq.lowering.lower_attention import SparseAttention
from fxq.lowering.lower_conv import Int8Conv
from fxq.lowering.lower_linear import Int8Linear
from fxq.lowering.rule import Device, Lowering


@dataclass(frozen=True)
class TorchAttention(SparseAttention):
    """`fxq.rectified_attention.reference`."""

    kernel: ClassVar[str] = "rectified_attention (torch)"
    remark: ClassVar[str] = "reads visited blocks only, in fp32; pays below half of them"

    def why_not(self, node: Node, lowering: Lowering) -> None:
        return None


CPU = Device(
    "cpu", lambda device: device.type == "cpu", (Int8Linear(), Int8Conv(), TorchAttention())
)
OTHER = Device("other", lambda device: True, (Int8Linear(), Int8Conv(), SparseAttention()))
