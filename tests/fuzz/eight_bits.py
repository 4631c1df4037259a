"""8-bit arithmetic written independently of fxq: what honest quantization does to a module.

Every matrix product that eager runs gets both operands in 127 steps to either side, with one scale
per row of the left and per column of the right one: whichever is the weight has one per output
channel, whichever is the activation one per token. Products of two activations are included, which
fxq leaves alone, so the error is an upper estimate.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Operator -> positions of the two operands that multiply.
PRODUCTS = {
    aten.mm.default: (0, 1), aten.bmm.default: (0, 1), aten.addmm.default: (1, 2),
    aten.baddbmm.default: (1, 2), aten.mv.default: (0, 1), aten.dot.default: (0, 1),
    aten.addmv.default: (1, 2),
}  # fmt: skip


class EightBits(TorchDispatchMode):
    """Runs matrix products on quantized operands.

    Args:
        seed: rounds at random, to either neighbour with the right mean; None rounds to the nearest.
    """

    def __init__(self, seed: int | None) -> None:
        super().__init__()
        self.generator = None if seed is None else torch.Generator().manual_seed(seed)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func in PRODUCTS:
            left, right = PRODUCTS[func]
            operands = list(args)
            operands[left] = self.rounded(args[left], -1)
            operands[right] = self.rounded(args[right], -2 if args[right].ndim > 1 else -1)
            args = tuple(operands)
        return func(*args, **(kwargs or {}))

    def rounded(self, x: Tensor, contracted: int) -> Tensor:
        """Return `x` on its grid; values along the contracted axis share a scale.

        The scale is the largest of |x| and of sums of two neighbours, which fxq's weights use so
        that pairs of codes fit 16 bits.
        """
        if not x.is_floating_point() or not x.numel():
            return x
        values = x.float().movedim(contracted, -1)
        neighbours = values[..., 1:] + values[..., :-1]
        largest = torch.cat([values, neighbours], -1).abs().amax(-1, keepdim=True)
        step = (largest / 127).clamp(min=1e-38)
        steps = values / step
        if self.generator is None:
            steps = steps.round()
        else:
            steps = (steps + torch.rand(steps.shape, generator=self.generator)).floor()
        return (steps * step).movedim(-1, contracted).to(x.dtype)
