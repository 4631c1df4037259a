"""Recipes: gain-projected scaling, then static scales that go by a token's position.

Weights per output channel. Activations affine, one range for each group of positions, found in
advance: nothing is reduced over an activation at run time. Positions are counted along the token
axis; a model that is told them (`cache_position`) is quantized by name, so that prefill and decode
have the same row for the same token:

    ptq4arvg.token_wise("mine", 8, 8, ByPosition(680, "cache_position"))

Departures: ranges are those with the least squared error over a histogram, where the published code
tries three percentiles; weights are symmetric; positions are grouped by what the data support,
where the published code lists groups for each of its models; attention's own products stay float.
"""

from dataclasses import replace

from fxq.passes import w8a8
from fxq.passes.common import Calibrate, Convert, GroupPositions, InsertObservers
from fxq.passes.ptq4arvg.gain_projected import GainProjected
from fxq.pipeline import Recipe
from fxq.rows import EVERY, ByPosition
from fxq.spec import LayerSpec, MeanSquaredError, MinMax, PerChannel, QuantSpec


def token_wise(
    name: str, weight_bits: int, activation_bits: int, positions: ByPosition | None = None
) -> Recipe:
    """Return a recipe with static token-wise activations.

    A factor that no layer or norm in front takes in is a product at run time: a token-wise
    quantizer would have to hold one number for each channel and position to take it in.

    Args:
        name: of the recipe.
        weight_bits: of weights; 8 are pair-safe (`QuantSpec.pair_safe`).
        activation_bits: of activations.
        positions: what says where a token stands; counted along the token axis unless given.
    """
    rule = MeanSquaredError()
    narrow = QuantSpec(weight_bits, granularity=PerChannel(0), observer=rule)
    layer = LayerSpec(
        activation=QuantSpec(
            activation_bits, symmetric=False, observer=rule, rows=positions or ByPosition(EVERY)
        ),
        weight=w8a8.WEIGHT if weight_bits == 8 else narrow,
    )
    # A candidate's weights are quantized on their whole range: a search for each takes long.
    judged = replace(layer, weight=replace(layer.weight, observer=MinMax()))
    return Recipe(
        name,
        (
            GainProjected(judged),
            InsertObservers(layer),
            GroupPositions(),
            Calibrate(),
            Convert(),
        ),
    )


W8A8 = token_wise("ptq4arvg_w8a8", 8, 8)
W6A6 = token_wise("ptq4arvg_w6a6", 6, 6)
W4A8 = token_wise("ptq4arvg_w4a8", 4, 8)
