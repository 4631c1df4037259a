"""Recipes: the papers' quantized network, one that survives outlier channels, and better ranges.

`PUBLISHED_W8A8` and `PUBLISHED_W4A8` quantize every activation that the published code quantizes:
the image, outputs of the patch embedding, of norms, of all linears but those in front of GELU,
scores before the softmax, what attention returns, sums, and the positions. 127 places in 12
blocks. Ranges are smallest and largest value ("vanilla"), one for each tensor. Softmax outputs and
GELU inputs stay float.

The other recipes depart from it because trained transformers have channels, most of all in the
residual stream, that are a hundred times the others in a few tokens (an ImageNet ViT-Ti has from
block 7 on): one range for all leaves the others a handful of codes, and the predictions are those
of chance.

- A few channels of a linear's input that stretch its range are multiplied apart, in float
  (`SeparateOutliers`).
- Sums and positions have a range for each channel, as in FQ-ViT (arXiv:2111.13824): only norms and
  sums read them, no product, so that a scale per channel costs nothing.
- Such a range is never narrower than the median channel's, and wider than what was seen by a
  quarter (`WidenRanges`): dreamed images do not show how far each channel goes. Channels of a sum
  that reach 16 times as far as the median one stay in float.
- Outputs of layers, and concatenations, that only become part of a sum are rounded with it, once:
  an integer kernel adds to what it has accumulated before it rounds.

All are int8 as before but for those few channels, and static. Departures of all recipes: a
symmetric weight's scale is amax / (2^(b-1) - 1), so that both ends are exact (the published 2^b - 1
halves cut one and overshoot the other by 6.7 % at 4 bits); activation ranges contain zero (without
it, the published ones cut); scores are quantized before a relative position bias is added, which
shares a node with masks.
"""

from fxq.passes.common import (
    Calibrate,
    Convert,
    DecomposeAttention,
    InsertObservers,
    ObserveActivations,
    SeparateOutliers,
    WidenRanges,
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
    name: str,
    weight_bits: int,
    activation_bits: int,
    observer: Observer,
    pair_safe: bool = False,
    published: bool = False,
) -> Recipe:
    """Return a recipe that quantizes what flows between layers too.

    Args:
        name: of the recipe.
        weight_bits: of weights, per output channel, symmetric, from smallest and largest value.
        activation_bits: of activations, per tensor, affine.
        observer: how activations' ranges are found.
        pair_safe: choose weight scales for which int8 kernels exist on every x86, as in
            `fxq.passes.w8a8`; the published ones are as large as the weight.
        published: observe the published places with one range for each, whatever the channels;
            otherwise as the module says.
    """
    activation = QuantSpec(
        bits=activation_bits, symmetric=False, granularity=PerTensor(), observer=observer
    )
    weight = QuantSpec(bits=weight_bits, granularity=PerChannel(0), pair_safe=pair_safe)
    layer = LayerSpec(activation, weight)
    layers = InsertObservers(layer, targets=("linear", "conv"))
    if published:
        places = ObserveActivations(activation)
        return Recipe(name, (DecomposeAttention(), layers, places, Calibrate(), Convert()))
    places = ObserveActivations(activation, by_channel=("sum", "cat", "constant"), terms=False)
    apart = SeparateOutliers(layer)
    steps = (DecomposeAttention(), apart, layers, places, Calibrate(), WidenRanges(), Convert())
    return Recipe(name, steps)


PUBLISHED_W8A8 = everywhere("psaq_w8a8_published", 8, 8, MinMax(), published=True)
PUBLISHED_W4A8 = everywhere("psaq_w4a8_published", 4, 8, MinMax(), published=True)
W8A8 = everywhere("psaq_w8a8", 8, 8, MinMax())
W4A8 = everywhere("psaq_w4a8", 4, 8, MinMax())
W8A8_PERCENTILE = everywhere("psaq_w8a8_percentile", 8, 8, Percentile(), pair_safe=True)
W4A8_MSE = everywhere("psaq_w4a8_mse", 4, 8, MeanSquaredError())
W6A6 = everywhere("psaq_w6a6", 6, 6, MeanSquaredError())
