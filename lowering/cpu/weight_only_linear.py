"""weight_only_linear on x86: `weight_only_linear.cpp` dequantizes codes in registers.

Few rows wait for memory, so a weight of a quarter or an eighth of the bytes is read so much sooner.
Up to `FEW` rows (`FEW_SCALED`) the codes are converted and used at once; for more, blocks of the
weight are dequantized into the first-level cache and multiplied as MKL would. Every sum is in fp32:
a result differs from the definition by the order of its sums and by fused multiply-adds, nothing
else.
"""

import torch
from torch import Tensor

from fxq.lowering.cpu.native import address, native
from fxq.lowering.kernels import buffers

# Rows up to which codes are converted anew for every four rows; beyond, converting them once is
# faster. Sooner where groups or zero-points take part in every conversion.
FEW = 8
FEW_SCALED = 2


def launch(
    x: Tensor, codes: Tensor, factors: Tensor, bias: Tensor | None, n_out: int, bits: int
) -> Tensor:
    """Return `x @ weight.T + bias` `[M, N]`, fp32, for x `[M, K]`; the rest as in
    `fxq.lowering.weight_only_linear`."""
    kernel = native("weight_only_linear")
    assert not isinstance(kernel, str)
    x, (rows, n_in), n_groups = x.contiguous(), x.shape, factors.shape[1]
    out = buffers.allocate((rows, n_out), torch.float32, x.device)
    bias = None if bias is None else bias.contiguous()
    few = FEW if n_groups * factors.shape[2] == 1 else FEW_SCALED
    kernel(
        address(x), rows, n_in, address(codes), bits, address(factors), n_in // n_groups,
        factors.shape[2], address(bias), address(out), n_out, few, torch.get_num_threads(),
    )  # fmt: skip
    return out
