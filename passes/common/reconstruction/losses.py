"""What a block is trained for: its outputs, and perhaps those of the layers in it, as the float
model has them.

Each error is in units of the signal's power, mean over all elements, so that it means the same for
images `[B, C, H, W]` and tokens `[B, T, C]`, and for blocks with several outputs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fxq.numerics import as_real, is_inexact


def relative_error(found: Tensor, exact: Tensor, weight: Tensor | None = None) -> Tensor:
    """Return the mean squared error of a tensor in units of its mean square; a scalar.

    Args:
        found: as quantized, any shape.
        exact: as it should be, likewise.
        weight: how much each element counts, broadcasts against them; None for all alike.

    Infinities that both have, as a mask does, count as zeros. Where everything should be zero the
    unit is 1.
    """
    exact, found = as_real(exact).float(), as_real(found).float()
    alike = exact.isinf() & (found == exact)
    power = exact.masked_fill(alike, 0).square()
    error = (found - exact).masked_fill(alike, 0).square()
    if weight is not None:
        power, error = power * weight, error * weight
    unit = power.mean()
    return error.mean() / torch.where(unit > 0, unit, 1.0)


def total_error(
    found: Sequence[Any], exact: Sequence[Any], weights: Sequence[Tensor | None]
) -> Tensor:
    """Return the sum of relative errors, a scalar; what is no tensor of floating-point or complex
    numbers does not count.

    Args:
        found: as quantized.
        exact: as they should be.
        weights: of their elements.
    """
    parts = zip(found, exact, weights, strict=True)
    errors = [relative_error(a, b, weight) for a, b, weight in parts if is_float(b)]
    return torch.stack(errors).sum() if errors else torch.zeros(())


def is_float(value: Any) -> bool:
    """Tell whether a value is a tensor of floats, or of complex numbers, that has elements."""
    return is_inexact(value) and value.numel() > 0


@dataclass(frozen=True)
class BlockLoss:
    """Errors of a block's outputs, and of its layers.

    Args:
        layer_weight: how much the error of each layer inside counts beside that of the block
            (EDA-DM, arXiv:2401.04585, lambda_f); 0 leaves them out. The last layer does not count:
            the block's output tells of it.
        fisher: count each element by how much the model's results feel an error there
            (`fxq.passes.common.sensitivity`); all alike otherwise. Costs a forward and a
            backward pass of the whole float model over the data. Where a few channels are much
            larger than the rest, all alike means those alone.
    """

    layer_weight: float = 0.0
    fisher: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.layer_weight < float("inf"):
            raise ValueError(
                f"BlockLoss.layer_weight: expected 0 or more, found {self.layer_weight}"
            )

    def watched(self, layers: Sequence[str]) -> tuple[str, ...]:
        """Return the layers whose outputs count, of those of a block in order."""
        return tuple(layers[:-1]) if self.layer_weight else ()

    def __call__(
        self,
        found: Sequence[Any],
        exact: Sequence[Any],
        weights: Sequence[Tensor | None],
        n_outputs: int,
    ) -> Tensor:
        """Return the loss, a scalar.

        Args:
            found: outputs of the quantized block, then those of the layers that are `watched`.
            exact: those of the float one.
            weights: of their elements.
            n_outputs: how many of them are the block's.
        """
        parts = found, exact, weights
        of_block = total_error(*(part[:n_outputs] for part in parts))
        if not self.layer_weight:
            return of_block
        of_layers = total_error(*(part[n_outputs:] for part in parts))
        return of_block + self.layer_weight * of_layers
