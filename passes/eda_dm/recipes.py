"""Recipes: the published quantizers, rounded to nearest.

Linears and convolutions, those over skip concatenations one for each part; what attention
multiplies, its probabilities in 8 bits; in 8 bits also the layer that reads the noisy sample and
the one that gives the result. Weights per output channel, activations one range per tensor for all
time-steps, ranges with the least |x - q(x)|^2.4.

Departures: ranges come from one histogram of all batches, where the published code averages those
of batches in their order; the first and last layers are found by data flow, where the published
code counts quantizers in the order of registration, and so takes a layer of the time-step for the
first; activations are affine on the whole range of codes; the last layer's input is quantized.
"""

from fxq.passes.common import (
    LAST,
    Calibrate,
    Convert,
    DecomposeAttention,
    InsertObservers,
    ObserveActivations,
    SplitConcatenations,
    first_of,
)
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, MeanSquaredError, PerChannel, PerTensor, QuantSpec

OBSERVER = MeanSquaredError(p=2.4)


def rounded_to_nearest(
    name: str, weight_bits: int, activation_bits: int, pair_safe: bool = False
) -> Recipe:
    """Return a recipe with the published quantizers.

    Args:
        name: of the recipe.
        weight_bits: of weights.
        activation_bits: of activations.
        pair_safe: choose 8-bit weight scales for which int8 kernels exist on every x86
            (`QuantSpec.pair_safe`).
    """
    eight, activation = (
        QuantSpec(bits, symmetric=False, granularity=PerTensor(), observer=OBSERVER)
        for bits in (8, activation_bits)
    )
    weight = QuantSpec(weight_bits, granularity=PerChannel(0), pair_safe=pair_safe)
    wide = LayerSpec(eight, QuantSpec(8, granularity=PerChannel(0), pair_safe=pair_safe))
    layers = InsertObservers(
        LayerSpec(activation, weight),
        targets=("linear", "conv"),
        overrides=((first_of(), wide), (LAST, wide)),
    )
    return Recipe(
        name,
        (
            DecomposeAttention(),
            SplitConcatenations(),
            layers,
            ObserveActivations(activation, ("operand",)),
            ObserveActivations(eight, ("probabilities",)),
            Calibrate(),
            Convert(),
        ),
    )


NEAREST_W8A8 = rounded_to_nearest("eda_dm_nearest_w8a8", 8, 8)
NEAREST_W4A8 = rounded_to_nearest("eda_dm_nearest_w4a8", 4, 8)
NEAREST_W4A4 = rounded_to_nearest("eda_dm_nearest_w4a4", 4, 4)
