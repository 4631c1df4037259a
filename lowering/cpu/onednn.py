"""oneDNN's product of 8-bit codes, and what it can do on the CPU at hand."""

import functools
import platform
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class CpuInt8:
    """How this CPU multiplies unsigned 8-bit activations with signed 8-bit weights through oneDNN.

    Args:
        available: oneDNN's quantized linear exists here.
        convolves: its quantized convolution does too.
        saturates: neighbouring products (input channels 2j, 2j+1) are added in int16 with
            saturation, as `vpmaddubsw` does on x86 without VNNI. Results are then exact only for
            weights whose pairs are small enough.
    """

    available: bool
    convolves: bool
    saturates: bool


def onednn_qlinear(codes: Tensor, zero_point: int, packed: Tensor, ones: Tensor) -> Tensor:
    """Return `(codes - zero_point) @ weight.T` as fp32 from oneDNN's quantized linear.

    Args:
        codes: `[M, K]`, uint8.
        zero_point: of the codes.
        packed: a weight `[N, K]`, int8, packed by `torch.ops.onednn.qlinear_prepack`.
        ones: `[N]`, fp32, all 1.
    """
    zeros = torch.zeros(1, dtype=torch.int32)
    return torch.ops.onednn.qlinear_pointwise(
        codes, 1.0, zero_point, packed, ones, zeros, None, 1.0, 0, torch.float32, "none", [], ""
    )


@functools.cache
def cpu_int8() -> CpuInt8:
    """Find out by multiplying the largest codes.

    A probe, because the answer depends on more than the processor: oneDNN can be built without, or
    told by ONEDNN_MAX_CPU_ISA not to use, an instruction set. Shapes with one and with many rows go
    to different kernels.
    """
    if platform.machine() not in ("x86_64", "AMD64") or not hasattr(
        torch.ops.onednn, "qlinear_prepack"
    ):
        return CpuInt8(available=False, convolves=False, saturates=False)
    exact = True
    for rows in (1, 64):
        codes = torch.full((rows, 64), 255, dtype=torch.uint8)
        weight = torch.full((32, 64), 127, dtype=torch.int8)
        packed = torch.ops.onednn.qlinear_prepack(weight, list(codes.shape))
        result = onednn_qlinear(codes, 0, packed, torch.ones(32))
        exact &= bool((result == 255 * 127 * 64).all())
    convolves = hasattr(torch.ops.onednn, "qconv_pointwise")
    return CpuInt8(available=True, convolves=convolves, saturates=not exact)
