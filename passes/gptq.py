"""GPTQ: round weights so that errors of columns make up for each other (arXiv:2210.17323).

Columns are rounded one by one; those that are still free are changed so that the layer's output on
the data changes least. Groups find their range when the sweep comes to them, in the weights as they
are then.

With `target="float"` a layer is fitted to the outputs of the float model, on what the quantized
layers before it give: `|W x - Q y|^2` over rows, x the float model's input and y the layer's. That
is least where `|W' y - Q y|^2` is, with `W' = W E[x y^T] E[y y^T]^-1`, so W' is what is rounded
(the closed form of what GPTAQ, arXiv:2504.02692, does column by column), or what `fitted` makes of
it for few rows. With `refinements`, each group's scale and then each code takes its best value
given all others, over and over (QuantEase, arXiv:2309.01885, with the scales in it too): the error
never rises.

Departures: a dead input's weights are rounded to nearest, not set to zero; damping goes by the
inputs that live; with `order` groups keep the ranges of the float weights, since a file's groups
are neighbours; a layer whose output error on the data would not fall is rounded to nearest.
A pruned weight stays zero, and its column's error is made up for as any other's.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq import numerics
from fxq.account import kind_of
from fxq.dialect import OBSERVED, Dialect
from fxq.layer import WeightCodes, layer_of, treat
from fxq.passes import w8a8
from fxq.passes.common import LAST, Calibrate, Convert, InsertObservers
from fxq.passes.common.code_grid import Grid, refine
from fxq.passes.common.column_sweep import sweep_columns
from fxq.passes.common.convert import pending_layers, quantize_weight
from fxq.passes.common.second_moments import (
    alike,
    cross_gram,
    damped,
    fitted,
    gram,
    inverse_factor,
    output_error,
)
from fxq.passes.common.weight_method import Treated, WeightMethod
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerChannel, PerGroup, PerToken, QuantSpec

Order = Literal["given", "activation"]
Target = Literal["layer", "float"]
Rows = Literal["as given", "alike"]


@dataclass(frozen=True)
class GPTQ(WeightMethod[QuantSpec]):
    """Fix the codes of linears. Stands before `Convert`, after `Calibrate` where there is one.

    Args:
        damping: added to the diagonal, as a share of its mean.
        order: of columns: as given, or those with the largest inputs first.
        columns: between products; the result does not depend on it.
        target: what codes are fitted to: the outputs of the float layer on the inputs that it gets
            from quantized ones, or those of the float model. The latter wants `sequential`, so that
            the inputs are those that the layer gets in the end; it runs the float model too, and
            keeps its values between blocks.
        rows: whether the error of a row counts as it is, or over the mean square of the layer's
            input, so that few tokens of great size, as vision transformers have, do not decide.
        refinements: rounds over all scales and codes after the sweep.
    """

    damping: float = 0.01  # as the paper's code
    order: Order = "given"
    columns: int = 128
    target: Target = "layer"
    rows: Rows = "as given"
    refinements: int = 0

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = OBSERVED

    def __post_init__(self) -> None:
        known = self.order in ("given", "activation") and self.target in ("layer", "float")
        known = known and self.rows in ("as given", "alike")
        if not self.damping >= 0 or self.columns < 1 or self.refinements < 0 or not known:
            raise ValueError(
                'GPTQ: expected damping >= 0, columns >= 1, order "given" or "activation", target '
                f'"layer" or "float", rows "as given" or "alike" and refinements >= 0, found {self}'
            )

    @property
    def compares(self) -> bool:
        """Whether moments are of a layer's inputs and the float model's."""
        return self.target == "float"

    def moments(self, x: Tensor) -> Tensor:
        """Return the sum of `y y^T` `[K, K]`; where y stands beside x, that of `y (y, x)^T` over
        two halves of the rows `[2, K, 2 K]`."""
        if self.rows == "alike":
            x = alike(x, x.shape[-1] // 2 if self.compares else x.shape[-1])
        return cross_gram(x) if self.compares else gram(x)

    def plans(self, gm: GraphModule) -> Mapping[Node, QuantSpec]:
        """Return how each linear is quantized whose codes no method has fixed."""
        plans = {}
        for node, spec in pending_layers(gm):
            if kind_of(node) != "linear":
                did = f"rounded to nearest: expected a linear, found {kind_of(node)}"
                treat(node, type(self).__name__, did, did)
            elif (fixed := layer_of(node).weight) is None:
                plans[node] = spec.weight
            else:
                did = f"codes {[*fixed.codes.shape]} stay: an earlier method fixed them"
                treat(node, type(self).__name__, did, did)
        return plans

    def treat(
        self, weight: Tensor, moments: Tensor, plan: QuantSpec, mask: Tensor | None
    ) -> Treated:
        """Round a weight."""
        goal, moments = self._goal(weight, moments)
        plain = WeightCodes(*quantize_weight(weight, plan))
        best = round_columns(goal, moments, plan, self, mask)
        before, after = (output_error(_values(codes) - goal, moments) for codes in (plain, best))
        power = max(output_error(weight, moments), torch.finfo(torch.float64).tiny)
        found, nearest = f"{after / power:.3g}", f"{before / power:.3g}"
        did = f"output error {found}, {nearest} rounded to nearest"
        if not after < before:
            best, did = plain, f"rounded to nearest: output error {nearest}, {found} by columns"
        return Treated(did, facts={"weight": best})

    def _goal(self, weight: Tensor, moments: Tensor) -> tuple[Tensor, Tensor]:
        """Return the weight that codes are to come near to, and by which moments."""
        if not self.compares:
            return weight, moments
        own = moments.sum(0)[:, : weight.shape[1]]
        return fitted(weight, moments, self.damping), own


def round_columns(
    weight: Tensor, moments: Tensor, spec: QuantSpec, settings: GPTQ, mask: Tensor | None = None
) -> WeightCodes:
    """Return the codes of a weight by the paper's algorithm 1.

    Args:
        weight: `[N, K]`, fp32.
        moments: sum of `x x^T` `[K, K]`, fp64.
        spec: how it is quantized.
        settings: damping, order and refinements.
        mask: `[N, K]`, False where the code is that of 0; None for all True.
    """
    mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    weight = weight * mask
    codes, scale, zero = quantize_weight(weight, spec)
    grid = Grid(spec, mask, codes, scale, zero)
    order, width = torch.arange(weight.shape[1], device=weight.device), 1
    if settings.order == "activation":
        order = moments.diagonal().argsort(descending=True, stable=True)
    elif isinstance(spec.granularity, PerGroup):
        width = spec.granularity.size

    def fix(work: Tensor, position: int, end: int) -> Tensor:
        if width > 1 and position % width == 0:
            grid.find_range(work, position, width)
        return grid.fix(work[:, position], int(order[position]))

    factor, _ = inverse_factor(moments[order][:, order], settings.damping)
    block = -(-settings.columns // width) * width
    sweep_columns(weight.double()[:, order], factor, block, fix)
    refine(grid, weight.double(), damped(moments, settings.damping)[0], settings.refinements)
    return WeightCodes(grid.codes, grid.scale, grid.zero)


def _values(fixed: WeightCodes) -> Tensor:
    return numerics.dequantize(fixed.codes, fixed.scale, fixed.zero_point, torch.float32)


W4_LAYER = LayerSpec(None, QuantSpec(4, symmetric=False, granularity=PerGroup(32)))
W4A8_LAYER = LayerSpec(
    QuantSpec(symmetric=True, granularity=PerToken(), dynamic=True),
    QuantSpec(4, granularity=PerChannel(0)),
)
BY_ACTIVATION = GPTQ(order="activation")
TO_FLOAT = GPTQ(order="activation", target="float", rows="alike", refinements=4, sequential=True)
OUTPUT = ((LAST, None),)  # the output layer, whose weight is often the embedding's, stays float

W4 = Recipe("gptq_w4", (InsertObservers(W4_LAYER, overrides=OUTPUT), TO_FLOAT, Convert()))
W4A8 = Recipe(
    "gptq_w4a8", (InsertObservers(W4A8_LAYER, overrides=OUTPUT), BY_ACTIVATION, Convert())
)
W8A8 = Recipe(
    "gptq_w8a8",
    (InsertObservers(w8a8.STATIC_LAYER, overrides=OUTPUT), Calibrate(), BY_ACTIVATION, Convert()),
)
