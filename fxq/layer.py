"""The record of a layer: all that is known of one operator that multiplies, in one typed value.

It lies in the meta of the operator's node and goes where the node goes: copies, `Convert`, files
and lowering keep it. Passes write to it through `treat`; the report, `strict`, `verify` and every
other reader read nothing else.

    treat(node, "MyRounding", "rounded along the Hessian", weight=WeightCodes(codes, scale))

A method that chooses codes itself leaves them in `weight`, and `Convert` keeps them to the last
integer.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxq.spec import LayerSpec

LAYER = "fxq_layer"  # key in a node's meta


@dataclass(frozen=True)
class Skip:
    """Why an operator stays as it is.

    Args:
        reason: for a person to read.
        intended: the recipe or its user wants it so; otherwise something stood in the way, and
            `strict` raises.
    """

    reason: str
    intended: bool


NOT_SEEN = Skip("no pass looked at it", intended=False)


@dataclass(frozen=True)
class Treatment:
    """What one pass did to an operator, or why it did nothing.

    Args:
        by: the pass.
        did: what it did, or a `Skip`.
        remark: what the report shows beside the operator.
    """

    by: str
    did: str | Skip
    remark: str = ""


@dataclass(frozen=True, eq=False)
class WeightCodes:
    """A weight as a method has fixed it: `(codes - zero_point) * scale`.

    Args:
        codes: in the weight's shape, as `fxq.numerics.quantize` gives them.
        scale: fp32, > 0, with as many dimensions as the weight, one entry per block.
        zero_point: int32 in the shape of `scale`; None for 0.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """What is known of one operator that multiplies.

    Args:
        origin: its node's name in the captured graph.
        spec: how it is quantized, or will be; None where it stays float.
        format: what it computes in: `"int8 x int8"` and the like (activation x weight), or how
            sparse an attention is. None while it is float and dense.
        treatments: what every pass did, in order.
        scaled: sides ("input", "output", "shift") that scaling passes changed.
        divided: its input is a product with a constant per channel, which a quantizer can take in.
        weight: what a method has fixed its weight to.
        mask: bool, in the weight's shape: False where a pruning method made it zero.
    """

    origin: str
    spec: LayerSpec | None = None
    format: str | None = None
    treatments: tuple[Treatment, ...] = ()
    scaled: tuple[str, ...] = ()
    divided: bool = False
    weight: WeightCodes | None = field(default=None, compare=False)
    mask: Tensor | None = field(default=None, compare=False)

    @property
    def is_pending(self) -> bool:
        """Whether it is to be quantized and is not yet."""
        return self.spec is not None and self.format is None

    @property
    def skip(self) -> Skip | None:
        """Why it stays float: what was not intended if there is such a reason, otherwise the last;
        None where it is quantized or sparse, or about to be."""
        if self.spec is not None or self.format is not None:
            return None
        skips = [t.did for t in self.treatments if isinstance(t.did, Skip)]
        unintended = [skip for skip in skips if not skip.intended]
        return (unintended or skips or [NOT_SEEN])[-1]

    @property
    def remarks(self) -> str:
        """What the report shows beside it."""
        return "; ".join(dict.fromkeys(t.remark for t in self.treatments if t.remark))


def layer_of(node: Node) -> Layer:
    """Return the record of a node, a new one where it has none."""
    return node.meta.get(LAYER) or Layer(node.name)


def treat(node: Node, by: str, did: str | Skip, remark: str = "", **facts: Any) -> None:
    """Add a treatment to a node's record.

    Args:
        node: an operator that multiplies.
        by: the pass that speaks.
        did: what it did, or why it did nothing.
        remark: for the report.
        facts: fields of `Layer` that are known now.
    """
    treatments = (*layer_of(node).treatments, Treatment(by, did, remark))
    state(node, treatments=treatments, **facts)


def state(node: Node, **facts: Any) -> None:
    """Set fields of a node's record."""
    node.meta[LAYER] = replace(layer_of(node), **facts)


def hand_on(old: Node, new: Node) -> None:
    """Give `new`, which takes the place of `old`, its record."""
    new.meta[LAYER] = layer_of(old)


def check_weight(layer: Layer, weight: Tensor) -> None:
    """Raise ValueError where what a method has fixed does not fit the weight it is of."""
    fixed, mask, spec = layer.weight, layer.mask, layer.spec
    if mask is not None:
        if mask.shape != weight.shape or mask.dtype != torch.bool:
            raise ValueError(
                f"mask: expected bool {list(weight.shape)}, found {mask.dtype} {list(mask.shape)}"
            )
        if bool(weight[~mask].any()):
            raise ValueError(
                "mask: expected zeros where it is False, found other weights; write the pruned "
                "weight into the graph with the mask"
            )
    if fixed is None or spec is None:
        return
    if fixed.codes.shape != weight.shape:
        raise ValueError(
            f"codes: expected the weight's shape {list(weight.shape)}, found "
            f"{list(fixed.codes.shape)}"
        )
    low, high = fixed.codes.double().aminmax() if fixed.codes.numel() else (0, 0)
    if low < spec.weight.quant_min or high > spec.weight.quant_max:
        raise ValueError(
            f"codes: expected {spec.weight.quant_min} to {spec.weight.quant_max}, as the spec has "
            f"it, found {float(low):g} to {float(high):g}"
        )
    for name, part in (("scale", fixed.scale), ("zero_point", fixed.zero_point)):
        if part is not None and part.ndim != weight.ndim:
            raise ValueError(f"{name}: expected {weight.ndim} dimensions, found {list(part.shape)}")
    if (fixed.zero_point is None) != spec.weight.symmetric:
        raise ValueError(
            f"zero_point: expected {'none' if spec.weight.symmetric else 'one'} for "
            f"symmetric={spec.weight.symmetric}"
        )
    if mask is not None and bool(fixed.codes.masked_fill(mask, 0).any()):
        raise ValueError("codes: expected 0 where the mask is False, found other codes")
