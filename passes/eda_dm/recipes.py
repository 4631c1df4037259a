"""Recipes: the published quantizers, and fine-grained block reconstruction.

Linears and convolutions, those over skip concatenations one for each part; what attention
multiplies, its probabilities in 8 bits; in 8 bits also the layer that reads the noisy sample and
the one that gives the result. Weights per output channel, activations one range per tensor for all
time-steps, ranges with the least |x - q(x)|^2.4. Then each block learns its roundings and the
scales of its activations (`fxq.passes.common.reconstruction`) from its own error and those of its
layers.

Departures: ranges come from one histogram of all batches, where the published code averages those
of batches in their order; the first and last layers are found by data flow, where the published
code counts quantizers in the order of registration, and so takes a layer of the time-step for the
first; activations are affine on the whole range of codes; the last layer's input is quantized.
"""

from fxq.passes.common import Calibrate, Convert, DecomposeAttention, SplitConcatenations
from fxq.passes.common.observe_products import observe_products
from fxq.passes.common.reconstruction import BlockLoss, Reconstruct, Rounding
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, MeanSquaredError, MinMax, PerChannel, PerTensor, QuantSpec

OBSERVER = MeanSquaredError(p=2.4)
FINE_GRAINED = Reconstruct(
    steps=300,  # 1,000 to 5,000 in the paper: fewer here for the time they take
    method=Rounding(float_share=0.5),  # of activations that stay float in a step: as QDrop
    loss=BlockLoss(layer_weight=0.8),  # lambda_f
    inputs_share=0.5,
)


def reconstructed(
    name: str,
    weight_bits: int,
    activation_bits: int,
    *,
    pair_safe: bool = False,
    reconstruct: Reconstruct | None = FINE_GRAINED,
) -> Recipe:
    """Return a recipe with the published quantizers.

    Args:
        name: of the recipe.
        weight_bits: of weights.
        activation_bits: of activations.
        pair_safe: choose 8-bit weight scales for which int8 kernels exist on every x86
            (`QuantSpec.pair_safe`).
        reconstruct: how blocks are trained; None rounds to nearest.
    """
    eight, activation = (
        QuantSpec(bits, symmetric=False, granularity=PerTensor(), observer=OBSERVER)
        for bits in (8, activation_bits)
    )
    rule = MinMax() if pair_safe else OBSERVER
    weight, wide_weight = (
        QuantSpec(bits, granularity=PerChannel(0), observer=rule, pair_safe=pair_safe)
        for bits in (weight_bits, 8)
    )
    observe = observe_products(LayerSpec(activation, weight), LayerSpec(eight, wide_weight))
    learn = () if reconstruct is None else (reconstruct,)
    passes = (DecomposeAttention(), SplitConcatenations(), *observe, Calibrate(), *learn, Convert())
    return Recipe(name, passes)


W8A8 = reconstructed("eda_dm_w8a8", 8, 8)
W4A8 = reconstructed("eda_dm_w4a8", 4, 8)
W4A4 = reconstructed("eda_dm_w4a4", 4, 4)
NEAREST_W8A8 = reconstructed("eda_dm_nearest_w8a8", 8, 8, reconstruct=None)
NEAREST_W4A8 = reconstructed("eda_dm_nearest_w4a8", 4, 8, reconstruct=None)
NEAREST_W4A4 = reconstructed("eda_dm_nearest_w4a4", 4, 4, reconstruct=None)
