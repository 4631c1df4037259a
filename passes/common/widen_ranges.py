"""WidenRanges: channels that have a range of their own do not have it from a few samples alone.

One range for a tensor is as wide as its widest channel, and new data hardly leave it. A range for
each channel is as wide as what that channel happened to show, and a sum that is clipped in many
channels costs more than one that is rounded coarsely: ranges of an ImageNet ViT-Ti's residual sums
from 32 dreamed images are exceeded by photographs by a quarter in one of ten channels, and up to
three times in the narrowest.

    reach_c = max(|low_c|, |high_c|)        m = median over channels of reach_c
    low_c   = (1 + margin) min(low_c, -m)   high_c = (1 + margin) max(high_c, m)    if reach_c < m
    low_c   = (1 + margin) low_c            high_c = (1 + margin) high_c            otherwise

So no channel is rounded more coarsely than the median one, but for what is larger itself. A channel
that reaches `apart` times as far as the median one in a few tokens has too few codes for all other
tokens; it stays in float beside the codes, one value in two hundred on that model.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq.dialect import OBSERVED, Dialect, observer_of
from fxq.graph import is_constant
from fxq.pipeline import Pass
from fxq.rewriting import add_buffer, insert_call
from fxq.spec import PerChannel


@dataclass(frozen=True)
class WidenRanges(Pass):
    """Widen the static ranges that vary by channel. Stands after `Calibrate`.

    Ranges of constants, which are all there is to see, stay as they are.

    Args:
        margin: how much wider, relative to the range.
        apart: how many times the median reach a channel has to exceed to stay in float. At 16 it
            would have four bits fewer than the others for values of the usual size.
    Raises:
        ValueError: a margin below 0, `apart` not above 1, or an observer that saw no data.
    """

    margin: float = 0.25
    apart: float = 16.0

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = OBSERVED

    def __post_init__(self) -> None:
        if not self.margin >= 0:
            raise ValueError(f"WidenRanges.margin: expected at least 0, found {self.margin}")
        if not self.apart > 1:
            raise ValueError(f"WidenRanges.apart: expected above 1, found {self.apart}")

    def run(self, gm: GraphModule) -> PassResult:
        """Widen what the observers found, and lead what stays float past them."""
        widened = 0
        for node in list(gm.graph.nodes):
            observer = observer_of(gm, node)
            if observer is None or is_constant(node.args[0]):
                continue
            if isinstance(observer.spec.granularity, PerChannel) and observer.spec.rows is None:
                low, high = observer.range()
                outliers = outlier_channels(low, high, self.apart)
                low, high = widened_range(low, high, self.margin)
                observer.settle(low.masked_fill(outliers, 0), high.masked_fill(outliers, 0))
                if bool(outliers.any()):
                    _lead_past(gm, node, outliers)
                widened += 1
        return PassResult(gm, modified=widened > 0)


def outlier_channels(low: Tensor, high: Tensor, times: float) -> Tensor:
    """Return which channels reach more than `times` as far as the median one, bool in their shape.

    Args:
        low: smallest value of each channel.
        high: largest value of each channel.
        times: the limit.
    """
    reach = torch.maximum(low.abs(), high.abs())
    return (reach > times * reach.median()) & (reach.median() > 0)


def _lead_past(gm: GraphModule, edge: Node, channels: Tensor) -> None:
    """Have all that reads an observed edge read `channels` of it as they were."""
    source = edge.args[0]
    assert isinstance(source, Node)
    mask = add_buffer(gm, f"{edge.target!s}_apart", channels, like=source)
    both = insert_call(torch.ops.aten.where.self, (mask, source, edge), after=edge)
    edge.replace_all_uses_with(both, delete_user_cb=lambda user: user is not both)


def widened_range(low: Tensor, high: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """Return ranges of channels, any shape, as the module says.

    Args:
        low: smallest value of each channel.
        high: largest value of each channel.
        margin: relative to the range.
    """
    reach = torch.maximum(low.abs(), high.abs())
    middle = reach.median()
    narrow = reach < middle
    low = torch.where(narrow, low.clamp(max=-middle), low)
    high = torch.where(narrow, high.clamp(min=middle), high)
    return low * (1 + margin), high * (1 + margin)
