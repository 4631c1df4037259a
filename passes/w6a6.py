"""W6A6: 6-bit weights per output channel, 6-bit activations per tensor, both in int8 containers.

No x86 saturates on 6-bit codes, so weights use their whole range.
"""

from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, MeanSquaredError, PerChannel, PerTensor, QuantSpec

STATIC_LAYER = LayerSpec(
    activation=QuantSpec(
        bits=6, symmetric=False, granularity=PerTensor(), observer=MeanSquaredError()
    ),
    weight=QuantSpec(bits=6, granularity=PerChannel(0)),
)

STATIC = Recipe("w6a6_static", (InsertObservers(STATIC_LAYER), Calibrate(), Convert()))
