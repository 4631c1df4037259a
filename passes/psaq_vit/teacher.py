"""The float model as both papers use it: frozen, and with the patch-similarity entropy of every
attention beside its results."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from fxq.capturing import Captured, capture
from fxq.errors import UnsupportedError
from fxq.passes.psaq_vit.entropy import (
    Grid,
    patch_similarity_entropy,
    reference_patch_similarity_entropy,
)
from fxq.passes.psaq_vit.prior import Prior
from fxq.passes.psaq_vit.taps import Taps
from fxq.program import Program
from fxq.rewriting import frozen, with_outputs
from fxq.signature import Inputs, Leaf


class Teacher:
    """A frozen graph of images that also returns the entropy of each tap.

    Args:
        gm: graph of one input `[B, C, H, W]`, in the ATEN dialect. It is not modified.
        taps: where entropy is measured.
        prior: how.
    """

    def __init__(self, gm: GraphModule, taps: Taps, prior: Prior) -> None:
        self.taps, self.prior = taps, prior
        self.gm = frozen(with_outputs(gm, [tap.node for tap in taps.taps]))
        self.grid = Grid(prior.bandwidth)

    def __call__(self, images: Tensor) -> tuple[list[Any], Tensor]:
        """Return the graph's results and the entropy of each image at each tap `[L, B]`, fp32.

        Args:
            images: normalized `[B, C, H, W]`.
        """
        results = list(self.gm(images))
        n = len(self.taps.taps)
        entropies = [
            self._entropy(tap.vectors(value, len(images), self.prior.heads), tap.patches)
            for tap, value in zip(self.taps.taps, results[-n:], strict=True)
        ]
        return results[:-n], torch.stack(entropies)

    def results(self, images: Tensor) -> list[Any]:
        """Return the graph's results alone."""
        return list(self.gm(images))[: -len(self.taps.taps)]

    def _entropy(self, vectors: Tensor, patches: Tensor) -> Tensor:
        if self.prior.estimator == "converged":
            return patch_similarity_entropy(vectors, self.grid, patches)
        if not bool((patches == patches[:1]).all()):
            raise UnsupportedError(
                'estimator="reference": expected as many patches in every window, found '
                f"{patches.sum(1).tolist()}; use the converged estimator"
            )
        return reference_patch_similarity_entropy(vectors[:, :, patches[0]], self.grid.bandwidth)


def capture_images(
    model: nn.Module | ExportedProgram, example_inputs: Inputs
) -> tuple[Captured, Leaf]:
    """Capture a model of images, and return its input too.

    Raises:
        UnsupportedError: a compressed program, or inputs other than one batch of images.
    """
    if isinstance(model, Program):
        raise UnsupportedError(
            "expected the float model, found a compressed Program: integer codes carry no gradient "
            "to the pixels; pass the model it was made from"
        )
    captured = capture(model, example_inputs)
    if captured.state:
        raise UnsupportedError(
            f"expected a model without state, found that it writes to {list(captured.state)}"
        )
    inputs = captured.signature.tensors
    if len(inputs) != 1 or len(inputs[0].shape) != 4 or not inputs[0].dtype.is_floating_point:
        listing = ", ".join(f"{leaf.name} {list(leaf.shape)} {leaf.dtype}" for leaf in inputs)
        raise UnsupportedError(
            f"expected one input, a batch of images [B, C, H, W], found {listing}; wrap the model "
            "in a module that fixes the others"
        )
    if not all(isinstance(size, int) for size in inputs[0].shape[1:]):
        raise UnsupportedError(
            f"expected fixed channels, height and width, found {list(inputs[0].shape)} for "
            f"{inputs[0].name!r}; export the model with only its batch free"
        )
    return captured, inputs[0]


def class_logits(
    captured: Captured, results: Sequence[Any], choose: Callable[[Any], Tensor] | None
) -> Tensor:
    """Return the class logits `[B, classes]` among a graph's results.

    Args:
        captured: the model.
        results: what its graph returned.
        choose: takes the model's own output and returns the logits; unless given, they are its
            only floating tensor of two dimensions.
    Raises:
        ValueError: none or several such tensors, or `choose` returned another shape.
    """
    if choose is not None:
        chosen = choose(pytree.tree_unflatten(list(results), captured.signature.out_spec))
        found = [chosen] if isinstance(chosen, Tensor) and chosen.ndim == 2 else []
    else:
        found = [x for x in results if isinstance(x, Tensor) and x.ndim == 2]
        found = [x for x in found if x.is_floating_point() and x.shape[1] > 1]
    if len(found) != 1:
        shapes = [list(x.shape) for x in results if isinstance(x, Tensor)]
        raise ValueError(
            f"expected one output of class logits [B, classes], found {shapes}; name it with "
            "logits=lambda output: ..., or pass labels=None to do without classes"
        )
    return found[0]
