"""The static recipes to try first.

    W8A8       8-bit weights and activations
    W8A8_CONV  the same for convolutional networks: batch norms are folded, convolutions quantized
               but for the first ones and depthwise ones, and what is added to their outputs
    W6A6       6-bit weights and activations, in int8 containers

Each is a static recipe of `w8a8` or `w6a6` in which channels that stretch a range are separated
(`SeparateOutliers`), with another range rule. With 8 bits it is the whole range seen, wider where
data held out ask for it (`HeldOutMargin`): to clip rare large values loses the samples that have
them. With 6 bits it is the range of least squared error, for weights too. A few layers that cost
the results most for the work they are stay float (`LeaveFloat`). With convolutions the mean error
of each layer goes out of its bias (`CorrectBias`), which brings 4 dB on a MobileNetV2 and nothing
that is sure on transformers. Any part can be left out of the tuple. Chosen on an ImageNet ViT-Ti,
and at 8 bits on a CIFAR-10 ViT (two calibration sets).
"""

from fxq.passes import w8a8
from fxq.passes.common import (
    DEPTHWISE,
    FIRST,
    Calibrate,
    Convert,
    CorrectBias,
    FoldBatchNorm,
    HeldOutMargin,
    InsertObservers,
    LeaveFloat,
    QuantizeResiduals,
    SeparateOutliers,
)
from fxq.pipeline import DataPass, Pass, Recipe
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


def recommended(
    name: str,
    layer: LayerSpec,
    separate: SeparateOutliers | None = None,
    *,
    convolutions: bool = False,
) -> Recipe:
    """Return the recommended recipe for a way of quantizing layers.

    Args:
        name: of the recipe.
        layer: how activations and weights are quantized.
        separate: which outliers are separated; as for 8 bits unless given.
        convolutions: whether they are quantized, too.
    """
    separate = separate or SeparateOutliers(layer)
    first: tuple[Pass | DataPass, ...] = (separate, InsertObservers(layer))
    if convolutions:
        observe = InsertObservers(
            layer, targets=("linear", "conv"), overrides=((FIRST, None), (DEPTHWISE, None))
        )
        first = (FoldBatchNorm(), separate, observe, QuantizeResiduals())
    ranges = layer.activation is not None and isinstance(layer.activation.observer, MinMax)
    margin = (HeldOutMargin(),) if ranges else ()
    bias = (CorrectBias(),) if convolutions else ()
    return Recipe(name, (*first, Calibrate(), *margin, LeaveFloat(), *bias, Convert()))


W8A8 = recommended("recommended_w8a8", W8A8_LAYER)
W8A8_CONV = recommended("recommended_w8a8_conv", W8A8_LAYER, convolutions=True)
W6A6 = recommended(  # with a quarter of the codes every layer's outliers count
    "recommended_w6a6", W6A6_LAYER, SeparateOutliers(W6A6_LAYER, most=16, least_share=0.0)
)
