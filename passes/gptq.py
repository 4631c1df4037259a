"""GPTQ: round weights so that errors of columns make up for each other (arXiv:2210.17323).

Columns are rounded one by one; those that are still free are changed so that the layer's output on
the data changes least. Groups find their range when the sweep comes to them, in the weights as they
are then.

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
from fxq.passes.common.column_sweep import sweep_columns
from fxq.passes.common.convert import pending_layers, quantize_weight
from fxq.passes.common.second_moments import inverse_factor, output_error
from fxq.passes.common.weight_method import Treated, WeightMethod
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerChannel, PerGroup, PerToken, QuantSpec

Order = Literal["given", "activation"]


@dataclass(frozen=True)
class GPTQ(WeightMethod[QuantSpec]):
    """Fix the codes of linears. Stands before `Convert`, after `Calibrate` where there is one.

    Args:
        damping: added to the diagonal, as a share of its mean.
        order: of columns: as given, or those with the largest inputs first.
        columns: between products; the result does not depend on it.
    """

    damping: float = 0.01  # as the paper's code
    order: Order = "given"
    columns: int = 128

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = OBSERVED

    def __post_init__(self) -> None:
        if not self.damping >= 0 or self.columns < 1 or self.order not in ("given", "activation"):
            raise ValueError(
                'GPTQ: expected damping >= 0, columns >= 1 and order "given" or "activation", '
                f"found {self}"
            )

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
        plain = WeightCodes(*quantize_weight(weight, plan))
        best = round_columns(weight, moments, plan, self, mask)
        before, after = (output_error(_values(codes) - weight, moments) for codes in (plain, best))
        power = max(output_error(weight, moments), torch.finfo(torch.float64).tiny)
        found, nearest = f"{after / power:.3g}", f"{before / power:.3g}"
        did = f"output error {found}, {nearest} rounded to nearest"
        if not after < before:
            best, did = plain, f"rounded to nearest: output error {nearest}, {found} by columns"
        return Treated(did, facts={"weight": best})


def round_columns(
    weight: Tensor, moments: Tensor, spec: QuantSpec, settings: GPTQ, mask: Tensor | None = None
) -> WeightCodes:
    """Return the codes of a weight by the paper's algorithm 1.

    Args:
        weight: `[N, K]`, fp32.
        moments: sum of `x x^T` `[K, K]`, fp64.
        spec: how it is quantized.
        settings: damping and order.
        mask: `[N, K]`, False where the code is that of 0; None for all True.
    """
    mask = torch.ones_like(weight, dtype=torch.bool) if mask is None else mask
    codes, scale, zero = quantize_weight(weight, spec)
    grid = _Grid(spec, mask, codes, scale, zero)
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
    return WeightCodes(grid.codes, grid.scale, grid.zero)


class _Grid:
    """The codes of a weight, column by column.

    Args:
        spec: how it is quantized.
        mask: False where the code is that of 0.
        codes: in the weight's shape; to be overwritten, like the others.
        scale: of the weight as it is at first.
        zero: likewise, None for 0.
    """

    def __init__(
        self, spec: QuantSpec, mask: Tensor, codes: Tensor, scale: Tensor, zero: Tensor | None
    ) -> None:
        self.spec, self.mask, self.codes, self.scale, self.zero = spec, mask, codes, scale, zero
        self.done = [False] * codes.shape[1]

    def find_range(self, work: Tensor, column: int, width: int) -> None:
        """Give a group of columns the range of what is in them now."""
        now = (work * self.mask)[:, column : column + width].float()
        _, scale, zero = quantize_weight(now, self.spec)
        place = column // width
        self.scale[:, place] = scale[:, 0]
        if self.zero is not None and zero is not None:
            self.zero[:, place] = zero[:, 0]

    def fix(self, values: Tensor, column: int) -> Tensor:
        """Set the codes of a column, and return what they stand for `[N]`, fp64."""
        place = column * self.scale.shape[1] // self.codes.shape[1]
        scale = self.scale[:, place]
        zero = None if self.zero is None else self.zero[:, place]
        kept = torch.where(self.mask[:, column], values, 0.0)
        codes = numerics.quantize(kept, scale, zero, *self.spec.grid)
        partner = column ^ 1
        if self.spec.pair_safe and partner < len(self.done) and self.done[partner]:
            other = self.codes[:, partner].int()
            limit = numerics.PAIR_LIMIT
            codes = codes.int().clamp(-limit - other, limit - other).to(codes.dtype)
        self.codes[:, column], self.done[column] = codes, True
        return numerics.dequantize(codes, scale, zero, torch.float64)


def _values(fixed: WeightCodes) -> Tensor:
    return numerics.dequantize(fixed.codes, fixed.scale, fixed.zero_point, torch.float32)


W4_LAYER = LayerSpec(None, QuantSpec(4, symmetric=False, granularity=PerGroup(32)))
W4A8_LAYER = LayerSpec(
    QuantSpec(symmetric=True, granularity=PerToken(), dynamic=True),
    QuantSpec(4, granularity=PerChannel(0)),
)
BY_ACTIVATION = GPTQ(order="activation")
OUTPUT = ((LAST, None),)  # the output layer, whose weight is often the embedding's, stays float

W4 = Recipe("gptq_w4", (InsertObservers(W4_LAYER, overrides=OUTPUT), BY_ACTIVATION, Convert()))
W4A8 = Recipe(
    "gptq_w4a8", (InsertObservers(W4A8_LAYER, overrides=OUTPUT), BY_ACTIVATION, Convert())
)
W8A8 = Recipe(
    "gptq_w8a8",
    (InsertObservers(w8a8.STATIC_LAYER, overrides=OUTPUT), Calibrate(), BY_ACTIVATION, Convert()),
)
