"""The record of a layer: all that is known of one operator that multiplies, in one typed value.

It lies in the meta of the operator's node and goes where the node goes: copies, `Convert`, files
and lowering keep it. Passes write to it through `treat`; the report, `strict`, `verify` and every
other reader read nothing else.

    treat(node, "MyRounding", "rounded along the Hessian", weight=WeightCodes(codes, scale))

A method that chooses codes itself leaves them in `weight`, and `Convert` keeps them to the last
integer.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import Node

from fxq import numerics
from fxq.spec import LayerSpec, QuantSpec, block_of, scale_shape

LAYER = "fxq_layer"  # key in a node's meta
OVERRIDE = "override "  # begins the reason where a pattern of the user's left a layer


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
DENSE_PRODUCT = Skip("pruned only: zeros are multiplied like other numbers", intended=True)


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
class Concentration:
    """How much of a weight lies in few of its elements or directions.

    Args:
        hoyer: 0 where all magnitudes are equal, 1 where one element is not 0.
        gini: 0 where all magnitudes are equal, near 1 where one element is not 0.
        stable_rank: squared Frobenius norm over squared spectral norm, 1 to the rank; 0 for zeros.
    """

    hoyer: float
    gini: float
    stable_rank: float


@dataclass(frozen=True)
class Induction:
    """What learned importances made of a pruned weight.

    Args:
        sites: names of those whose factors it has, shared by all layers that name them; none where
            no factor reaches it.
        loss: squared error of the layer's outputs on the data over their squares, both without
            their means where the bias takes the mean error. A site's loss is the sum over its
            layers.
        loss_before: the same, chosen as the pruner does without factors.
        before: of the weight, before it is pruned.
        after: likewise, times the factors.
    """

    sites: tuple[str, ...]
    loss: float
    loss_before: float
    before: Concentration
    after: Concentration


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
        induction: what learned importances made of it, None where its pruner learned none.
    """

    origin: str
    spec: LayerSpec | None = None
    format: str | None = None
    treatments: tuple[Treatment, ...] = ()
    scaled: tuple[str, ...] = ()
    divided: bool = False
    weight: WeightCodes | None = field(default=None, compare=False)
    mask: Tensor | None = field(default=None, compare=False)
    induction: Induction | None = None

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
        return (unintended or skips or [NOT_SEEN if self.mask is None else DENSE_PRODUCT])[-1]

    @property
    def sparsity(self) -> float | None:
        """The share of its weight that a method has pruned, 0 to 1; None where none has."""
        if self.mask is None:
            return None
        return 1 - int(self.mask.count_nonzero()) / max(1, self.mask.numel())

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
    set_facts(node, treatments=treatments, **facts)


def set_facts(node: Node, **facts: Any) -> None:
    """Set fields of a node's record."""
    node.meta[LAYER] = replace(layer_of(node), **facts)


def hand_on(old: Node, new: Node) -> None:
    """Give `new`, which takes the place of `old`, its record."""
    new.meta[LAYER] = layer_of(old)


def check_weight(layer: Layer, weight: Tensor) -> None:
    """Raise ValueError where what a method has fixed does not fit the weight it is of."""
    fixed, mask, spec = layer.weight, layer.mask, layer.spec
    if mask is not None:
        check_mask(mask, weight)
    if fixed is None or spec is None:
        return
    _check_codes(fixed.codes, weight, spec.weight)
    _check_qparams(fixed, weight, spec.weight)
    if mask is not None:
        zero = torch.zeros_like(fixed.scale) if fixed.zero_point is None else fixed.zero_point
        differ = fixed.codes.float() != numerics.expand_blocks(zero, weight.shape)
        if bool((differ & ~mask).any()):
            raise ValueError(
                "codes: expected those of 0 (the zero-point) where the mask is False, found others"
            )


def check_mask(mask: Tensor, weight: Tensor) -> None:
    """Raise ValueError where a weight is not zero although its mask is False."""
    _check_form("mask", mask, torch.bool, weight.shape)
    if bool(weight[~mask].any()):
        raise ValueError(
            "mask: expected zeros where it is False, found other weights; write the pruned "
            "weight into the graph with the mask"
        )


def _check_codes(codes: Tensor, weight: Tensor, spec: QuantSpec) -> None:
    _check_form("codes", codes, spec.format.dtype, weight.shape)
    values = codes.float()  # exact: of 8 bits
    if bool(values.isnan().any()):
        raise ValueError(f"codes: expected numbers, found {int(values.isnan().sum())} NaN")
    low, high = values.aminmax() if codes.numel() else (0, 0)
    if low < spec.quant_min or high > spec.quant_max:
        raise ValueError(
            f"codes: expected {spec.quant_min} to {spec.quant_max}, as the spec has it, found "
            f"{float(low):g} to {float(high):g}"
        )
    if spec.pair_safe and not numerics.is_pair_safe(codes):
        raise ValueError(
            f"codes: expected sums of at most {numerics.PAIR_LIMIT} over the codes of input "
            "channels 2j and 2j+1, found larger ones; use a larger scale, or pair_safe=False"
        )


def _check_qparams(fixed: WeightCodes, weight: Tensor, spec: QuantSpec) -> None:
    scale, zero_point = fixed.scale, fixed.zero_point
    shape = scale_shape(weight.shape, block_of(spec.granularity, weight.ndim))
    _check_form("scale", scale, torch.float32, shape, f" for {spec.granularity}")
    if bad := int((~(scale.isfinite() & (scale > 0))).sum()):
        raise ValueError(
            f"scale: expected finite values > 0, found {bad} of {scale.numel()} that are not"
        )
    if (zero_point is None) != spec.symmetric:
        raise ValueError(
            f"zero_point: expected {'none' if spec.symmetric else 'one'} for "
            f"symmetric={spec.symmetric}"
        )
    if zero_point is not None:
        _check_form("zero_point", zero_point, torch.int32, shape, f" for {spec.granularity}")


def _check_form(
    name: str, value: Tensor, dtype: torch.dtype, shape: Sequence[int], why: str = ""
) -> None:
    if value.dtype != dtype or [*value.shape] != [*shape]:
        raise ValueError(
            f"{name}: expected {dtype} {[*shape]}{why}, found {value.dtype} {[*value.shape]}"
        )
