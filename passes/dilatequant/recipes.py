"""Recipes: weight dilation, a range for each time-step, and block-wise distillation.

Linears and convolutions, those over skip concatenations one for each part; what attention
multiplies, its probabilities in 8 bits; in 8 bits also the layer that reads the noisy sample and
the one that gives the result. Weights per output channel in the range that dilation keeps,
activations one range per tensor and time-step, with the least |x - q(x)|^2.4. Then each block
learns its weights by their values, and the scales and zero-points of its weights and activations.

Departures: weights are symmetric; ranges come from one histogram of all batches of a time-step,
where the published code averages those of batches in their order.
"""

from collections.abc import Callable

from fxq.passes.common import (
    Calibrate,
    Convert,
    DecomposeAttention,
    SplitConcatenations,
    TimestepRows,
)
from fxq.passes.common.observe_products import observe_products
from fxq.passes.common.reconstruction import Reconstruct, StraightThrough
from fxq.passes.dilatequant.dilation import GuardedDilation
from fxq.pipeline import DataPass, Pass, Recipe
from fxq.spec import LayerSpec, MeanSquaredError, PerChannel, PerTensor, QuantSpec

ROWS = TimestepRows()
OBSERVER = MeanSquaredError(p=2.4)
BLOCKWISE = Reconstruct(
    steps=300,  # 5,000 in the paper: fewer here for the time they take
    method=StraightThrough(
        learning_rate=1e-2,
        scale_learning_rate=1e-3,
        activation_learning_rate=1e-3,
        zero_point_learning_rate=1e-2,
        bias_learning_rate=1e-3,
    ),
)


def dilated(
    name: str,
    weight_bits: int,
    activation_bits: int,
    *,
    dilation: Callable[[LayerSpec], Pass | DataPass] | None = GuardedDilation,
    rows: TimestepRows | None = ROWS,
    reconstruct: Reconstruct | None = BLOCKWISE,
) -> Recipe:
    """Return a recipe.

    Args:
        name: of the recipe.
        weight_bits: of weights.
        activation_bits: of activations.
        dilation: makes the pass that dilates weights, given how layers will be quantized; None
            dilates none.
        rows: how time-steps share ranges; None gives all of them one.
        reconstruct: how blocks are distilled; None rounds to nearest.
    """
    eight, activation = (
        QuantSpec(bits, symmetric=False, granularity=PerTensor(), observer=OBSERVER)
        for bits in (8, activation_bits)
    )
    layer, wide = (
        LayerSpec(of_input, QuantSpec(bits, granularity=PerChannel(0)))
        for of_input, bits in ((activation, weight_bits), (eight, 8))
    )
    passes = (
        DecomposeAttention(),
        SplitConcatenations(),
        None if dilation is None else dilation(layer),
        *observe_products(layer, wide),
        rows,
        Calibrate(),
        reconstruct,
        Convert(),
    )
    return Recipe(name, tuple(each for each in passes if each is not None))


W6A6 = dilated("dilatequant_w6a6", 6, 6)
W4A8 = dilated("dilatequant_w4a8", 4, 8)
W4A4 = dilated("dilatequant_w4a4", 4, 4)
