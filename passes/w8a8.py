"""W8A8: 8-bit weights per output channel, 8-bit activations.

Recipes that differ in when and how finely activations get their scale:

    STATIC            one scale per tensor, from calibration data: the fastest
    STATIC_PER_TOKEN  one scale per token position, from calibration data, for models with a fixed
                      number of tokens
    DYNAMIC           one scale per token, computed at run time: needs no data, and is what
                      `torch.compile(model, backend="fxq")` does by default
    STATIC_CONV       as STATIC, for convolutional networks: batch norms are folded, convolutions
                      quantized, and what is added to their outputs. The first layer, and depthwise
                      convolutions, which are slower in int8, stay float

Weights are scaled so that every x86 multiplies them exactly at full speed (`QuantSpec.pair_safe`).
On VNNI or a GPU that is not needed: `FULL_RANGE` as the weight's spec gains a little accuracy there
and costs speed elsewhere.
"""

from fxq.passes.common import (
    DEPTHWISE,
    FIRST,
    Calibrate,
    Convert,
    FoldBatchNorm,
    InsertObservers,
    QuantizeResiduals,
)
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, MeanSquaredError, PerChannel, PerTensor, PerToken, QuantSpec

WEIGHT = QuantSpec(bits=8, symmetric=True, granularity=PerChannel(0), pair_safe=True)
FULL_RANGE = QuantSpec(bits=8, symmetric=True, granularity=PerChannel(0))

STATIC_LAYER = LayerSpec(
    activation=QuantSpec(symmetric=False, granularity=PerTensor(), observer=MeanSquaredError()),
    weight=WEIGHT,
)
PER_TOKEN_LAYER = LayerSpec(
    activation=QuantSpec(symmetric=False, granularity=PerToken(), observer=MeanSquaredError()),
    weight=WEIGHT,
)
DYNAMIC_LAYER = LayerSpec(
    activation=QuantSpec(symmetric=True, granularity=PerToken(), dynamic=True), weight=WEIGHT
)

STATIC = Recipe("w8a8_static", (InsertObservers(STATIC_LAYER), Calibrate(), Convert()))
STATIC_PER_TOKEN = Recipe(
    "w8a8_static_per_token", (InsertObservers(PER_TOKEN_LAYER), Calibrate(), Convert())
)
DYNAMIC = Recipe("w8a8_dynamic", (InsertObservers(DYNAMIC_LAYER), Convert()))
STATIC_CONV = Recipe(
    "w8a8_static_conv",
    (
        FoldBatchNorm(),
        InsertObservers(
            STATIC_LAYER,
            targets=("linear", "conv"),
            overrides=((FIRST, None), (DEPTHWISE, None)),
        ),
        QuantizeResiduals(),
        Calibrate(),
        Convert(),
    ),
)
