"""Weight-only quantization: a smaller model whose activations stay float. Needs no data."""

from fxq.passes.common import Convert, InsertObservers
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerChannel, QuantSpec

W8 = Recipe(
    "w8",
    (
        InsertObservers(LayerSpec(activation=None, weight=QuantSpec(granularity=PerChannel(0)))),
        Convert(),
    ),
)
