"""Recipes: the papers' quantized network, and better ones.

`W8A8` and `W4A8` quantize every activation that the published code quantizes: the image, outputs of
the patch embedding, of norms, of all linears but those in front of GELU, scores before the softmax,
what attention returns, sums, and the positions. 127 places in a 12-block DeiT. Ranges are smallest
and largest value ("vanilla"). Softmax outputs and GELU inputs stay float.

Departures: a symmetric weight's scale is amax / (2^(b-1) - 1), so that both ends are exact (the
published 2^b - 1 halves cut one and overshoot the other by 6.7 % at 4 bits); activation ranges
contain zero (without it, the published ones cut); scores are quantized before a relative position
bias is added, which shares a node with masks.
"""

from fxq.passes.common import (
    Calibrate,
    Convert,
    DecomposeAttention,
    InsertObservers,
    ObserveActivations,
)
from fxq.pipeline import Recipe
from fxq.spec import (
    LayerSpec,
    MeanSquaredError,
    MinMax,
    Observer,
    Percentile,
    PerChannel,
    PerTensor,
    QuantSpec,
)


def everywhere(
    name: str, weight_bits: int, activation_bits: int, observer: Observer, pair_safe: bool = False
) -> Recipe:
    """Return a recipe with the published places.

    Args:
        name: of the recipe.
        weight_bits: of weights, per output channel, symmetric, from smallest and largest value.
        activation_bits: of activations, per tensor, affine.
        observer: how activations' ranges are found.
        pair_safe: choose weight scales for which int8 kernels exist on every x86, as in
            `fxq.passes.w8a8`; the published ones are as large as the weight.
    """
    activation = QuantSpec(
        bits=activation_bits, symmetric=False, granularity=PerTensor(), observer=observer
    )
    weight = QuantSpec(bits=weight_bits, granularity=PerChannel(0), pair_safe=pair_safe)
    layers = InsertObservers(LayerSpec(activation, weight), targets=("linear", "conv"))
    steps = (DecomposeAttention(), layers, ObserveActivations(activation), Calibrate(), Convert())
    return Recipe(name, steps)


W8A8 = everywhere("psaq_w8a8", 8, 8, MinMax())
W4A8 = everywhere("psaq_w4a8", 4, 8, MinMax())
W8A8_PERCENTILE = everywhere("psaq_w8a8_percentile", 8, 8, Percentile(), pair_safe=True)
W4A8_MSE = everywhere("psaq_w4a8_mse", 4, 8, MeanSquaredError())
W6A6 = everywhere("psaq_w6a6", 6, 6, MeanSquaredError())
