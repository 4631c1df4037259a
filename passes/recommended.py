"""The static recipes to try first.

    W8A8  8-bit weights and activations
    W6A6  6-bit weights and activations, in int8 containers

Each is a static recipe of `w8a8` or `w6a6` with parts that cost little and never took much on any
model tried: channels that stretch a range are separated (`SeparateOutliers`), and the range rule is
the one that holds best for the worst sample. With 8 bits that is the whole range seen: to clip rare
large values gains a little on average and loses the samples that have them. With 6 bits it is the
range of least squared error, for weights too. Any part can be left out of the tuple.

Two parts that other toolkits have by default are not here, as they brought nothing on the models
tried: a correction of biases after rounding (within 0.3 dB at 8 bits), and ranges wider than those
seen (20 dB against 21.8 with a margin of a quarter, ViT-Ti).
"""

from fxq.passes import w8a8
from fxq.passes.common import Calibrate, Convert, InsertObservers, SeparateOutliers
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, MeanSquaredError, MinMax, PerChannel, PerTensor, QuantSpec

W8A8_LAYER = LayerSpec(
    activation=QuantSpec(symmetric=False, granularity=PerTensor(), observer=MinMax()),
    weight=w8a8.WEIGHT,
)
W6A6_LAYER = LayerSpec(
    activation=QuantSpec(
        bits=6, symmetric=False, granularity=PerTensor(), observer=MeanSquaredError()
    ),
    weight=QuantSpec(bits=6, granularity=PerChannel(0), observer=MeanSquaredError()),
)


def recommended(name: str, layer: LayerSpec, separate: SeparateOutliers | None = None) -> Recipe:
    """Return the recommended recipe for a way of quantizing layers.

    Args:
        name: of the recipe.
        layer: how activations and weights are quantized.
        separate: which outliers are separated; as for 8 bits unless given.
    """
    separate = separate or SeparateOutliers(layer)
    return Recipe(name, (separate, InsertObservers(layer), Calibrate(), Convert()))


W8A8 = recommended("recommended_w8a8", W8A8_LAYER)
W6A6 = recommended(  # with a quarter of the codes every layer's outliers count
    "recommended_w6a6", W6A6_LAYER, SeparateOutliers(W6A6_LAYER, most=16, least_share=0.0)
)
