"""What is observed in a diffusion model: everything that multiplies, and its two ends in 8 bits."""

from fxq.passes.common.insert_observers import InsertObservers
from fxq.passes.common.layer_choice import LAST, first_of
from fxq.passes.common.observe_activations import ObserveActivations
from fxq.pipeline import Pass
from fxq.spec import LayerSpec


def observe_products(layer: LayerSpec, wide: LayerSpec) -> tuple[Pass, ...]:
    """Return passes that observe linears, convolutions and what attention multiplies.

    Args:
        layer: how layers and attention's queries, keys and values are quantized.
        wide: how the layers that read the noisy sample and the last one are, and attention's
            probabilities.
    """
    assert layer.activation is not None
    assert wide.activation is not None
    ends = ((first_of(), wide), (LAST, wide))
    return (
        InsertObservers(layer, targets=("linear", "conv"), overrides=ends),
        ObserveActivations(layer.activation, ("operand",)),
        ObserveActivations(wide.activation, ("probabilities",)),
    )
