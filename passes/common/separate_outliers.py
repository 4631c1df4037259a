"""SeparateOutliers: a layer of its own, in float, for the few channels that stretch a range.

    linear(x, W) + b  ->  linear(x * keep, W * keep) + b + linear(x[outliers], W[:, outliers])

`keep` is zero at the outliers and one elsewhere. One channel of an activation can be thirty times
as large as the next; one range for all leaves the others a few codes, and a factor that brings it
down makes its weights as large as it was. A product of a few channels costs next to nothing
(arXiv:2208.07339, where they are found in every activation at run time; here by calibration). The
float function is the same but for the order of its sums.

Where x is an activation function of another linear, V, and nobody else reads it, the channels are
rows of V and become a layer of their own there, and zeros in V. So x is still read by what
quantizes it alone, which the kernel of V does as it goes.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq.dialect import ATEN, Dialect
from fxq.graph import (
    SETTLED,
    args_of,
    constant_of,
    dtype_of,
    is_constant,
    is_op,
    is_settled,
    owner_name,
    shape_of,
    weight_of,
)
from fxq.layer import Skip, hand_on, layer_of, treat
from fxq.operators import LINEAR, set_operand
from fxq.passes.common.float_function import LOOSE, check_float_function
from fxq.passes.common.scaling import ScaleSite
from fxq.passes.common.scaling.loss import (
    product,
    quantized_operands,
    relative_loss,
)
from fxq.passes.common.scaling.sites import Part
from fxq.passes.common.scaling.statistics import Statistics, collect
from fxq.pipeline import Batches, DataPass
from fxq.rewriting import add_buffer, copy_graph, erase_dead, insert_call
from fxq.spec import LayerSpec

aten = torch.ops.aten
NEARLY = 1.1  # times the smallest error
KEEP_ZEROS = (aten.gelu.default, aten.silu.default, aten.relu.default, aten.tanh.default)


@dataclass(frozen=True)
class SeparateOutliers(DataPass):
    """Separate the largest channels of the inputs of linears where that pays.

    Layers that read one value share the decision. Channels are fitted to half of the calibration
    rows and judged, quantized, on the other half.

    Args:
        layer: how the layers will be quantized, which decides what pays.
        most: of how many channels at most.
        least_gain: how much a layer's error must be above that with channels separated, relative
            to the latter.
        least_share: which part of all layers' relative errors together must vanish with it: many
            small products cost time, few of them bring much.
        n_rows: rows of each activation that are judged.
    """

    layer: LayerSpec
    most: int = 8
    least_gain: float = 0.5
    least_share: float = 0.01
    n_rows: int = 512

    reads: ClassVar[Dialect] = ATEN
    writes: ClassVar[Dialect] = ATEN

    def __post_init__(self) -> None:
        if self.most < 1:
            raise ValueError(f"SeparateOutliers.most: expected at least 1, found {self.most}")

    def run(self, gm: GraphModule, data: Batches) -> PassResult:
        """Separate channels, and note on every layer what was done, or why nothing was."""
        name, sites = type(self).__name__, _sites(gm)
        found = collect(gm, data, sites, self.n_rows) if sites else {}
        losses = {site: self._losses(statistics) for site, statistics in found.items()}
        total = sum(float(each[0]) for each in losses.values())
        before, modified = copy_graph(gm), False
        for site, each in losses.items():
            layers = [part.node for part in site.consumers]
            count = self._count(each, total)
            if count:
                channels = by_magnitude(found[site])[:count].sort().values
                _separate(gm, layers, channels, name)
                modified = True
            for layer in [] if count else layers:
                why = f"{name} found no gain" if len(each) > 1 else f"{name} saw too few rows"
                treat(layer, name, Skip(why, intended=True))
        if modified:
            erase_dead(gm)
            check_float_function(before, gm, islice(data, 1), name=name, tolerance=LOOSE)
        return PassResult(gm, modified)

    def _losses(self, statistics: Statistics) -> Tensor:
        """Return the layers' error with 0, 1, 2, 4, ... channels separated, relative to their
        outputs, fp64; only the first of them, zero, where there are too few rows to judge."""
        counts = list(_counts(min(self.most, statistics.site.n_channels - 1)))
        losses = torch.zeros(len(counts) if statistics.folds else 1, dtype=torch.float64)
        for fitted, judged in zip(statistics.folds, reversed(statistics.folds), strict=True):
            order = by_magnitude(fitted)
            for a, b in zip(fitted.consumers, judged.consumers, strict=True):
                weight, keep = b.weight, torch.ones(len(order), device=b.rows.device)
                size = product(b.rows, weight).square().sum()
                for index, count in enumerate(counts):
                    keep[order[:count]] = 0.0
                    rows = b.rows * keep
                    under = quantized_operands(rows, a.seen * keep, weight * keep, self.layer)
                    losses[index] += relative_loss(under, product(rows, weight), size)
        return losses

    def _count(self, losses: Tensor, total: float) -> int:
        """Return how many channels to separate: the fewest that bring nearly all of the gain, none
        where it does not pay."""
        least = float(losses.min())
        enough = float(losses[0]) >= (1 + self.least_gain) * least
        if not enough or float(losses[0]) - least < self.least_share * total or least == losses[0]:
            return 0
        return list(_counts(self.most))[int((losses <= NEARLY * least).nonzero()[0])]


def by_magnitude(statistics: Statistics) -> Tensor:
    """Return the channels of a site, those with the largest values first `[n_channels]`."""
    return statistics.amax.argsort(descending=True, stable=True)


def _counts(most: int) -> Iterator[int]:
    """Yield 0 and the powers of two up to a number."""
    yield 0
    count = 1
    while count <= most:
        yield count
        count *= 2


def _sites(gm: GraphModule) -> list[ScaleSite]:
    """Return every value that linears with a known weight read, as a site of its own."""
    readers: dict[Node, list[Node]] = defaultdict(list)
    for node in gm.graph.nodes:
        if _is_free(node) and is_constant(args_of(node)[1]):
            readers[args_of(node)[0]].append(node)
    sites = []
    for layers in readers.values():
        channels = torch.arange(weight_of(layers[0]).shape[1])
        parts = tuple(Part(layer, channels) for layer in layers)
        sites.append(ScaleSite("quantizer", len(channels), (), parts))
    return sites


def _separate(gm: GraphModule, layers: Sequence[Node], channels: Tensor, name: str) -> None:
    """Put two layers in the place of each of those that read one value."""
    rest, few = _separate_rows(gm, layers, channels, name) or _pick(gm, layers[0], channels)
    for layer in layers:
        _split(gm, layer, rest, few, channels, name)


def _is_free(node: Node) -> bool:
    """Tell whether a node is a linear that nobody has changed or fixed."""
    return is_op(node, *LINEAR) and not is_settled(node) and layer_of(node).weight is None


def _separate_rows(
    gm: GraphModule, layers: Sequence[Node], channels: Tensor, name: str
) -> tuple[Node, Node] | None:
    """Compute the channels by a layer of their own already in front of the activation function that
    `layers` read, and zeros in their place in the linear there: its kernel quantizes what it gives,
    which it could not if somebody read a part of it in float. Return the value without the
    channels, and the channels; None where there is no such linear."""
    (value,) = {args_of(layer)[0] for layer in layers}
    if not is_op(value, *KEEP_ZEROS) or set(value.users) != set(layers):
        return None
    producer = args_of(value)[0]
    if not _is_free(producer) or set(producer.users) != {value}:
        return None
    if not all(map(is_constant, args_of(producer)[1:])):
        return None
    source, *operands = args_of(producer)
    few_operands = []
    for operand, node in zip(("weight", "bias"), operands, strict=False):
        whole, buffer = constant_of(node).detach(), f"{owner_name(producer)}.{operand}"
        kept = whole.clone()
        kept[channels] = 0
        rows = whole[channels].contiguous()
        few_operands.append(add_buffer(gm, f"{buffer}_apart", rows, like=producer))
        set_operand(producer, operand, add_buffer(gm, f"{buffer}_rest", kept, like=producer))
    few = insert_call(producer.target, (source, *few_operands), before=value)
    listing = ", ".join(map(str, channels.tolist()))
    treat(producer, name, f"without outputs {listing}")
    treat(few, name, Skip("outlier channels of a layer that is quantized", intended=True))
    few.meta[SETTLED] = True
    return value, insert_call(value.target, (few, *value.args[1:]), value.kwargs, before=value)


def _pick(gm: GraphModule, first: Node, channels: Tensor) -> tuple[Node, Node]:
    """Return what a layer reads with zeros at the channels, and the channels."""
    x = args_of(first)[0]
    weight, last = weight_of(first), len(shape_of(x)) - 1
    keep = torch.ones(weight.shape[1], dtype=dtype_of(x), device=weight.device)
    keep[channels] = 0
    spread = add_buffer(gm, f"{owner_name(first)}.keep", keep, like=first)
    rest = insert_call(aten.mul.Tensor, (x, spread), before=first)
    picked = [insert_call(aten.slice.Tensor, (x, last, c, c + 1), before=first)
              for c in channels.tolist()]  # fmt: skip
    few = picked[0]
    if len(picked) > 1:
        few = insert_call(aten.cat.default, (picked, last), before=first)
    return rest, few


def _split(
    gm: GraphModule, layer: Node, rest: Node, few: Node, channels: Tensor, name: str
) -> None:
    weight, owner = weight_of(layer).detach(), owner_name(layer)
    kept = weight.clone()
    kept[:, channels] = 0
    main = insert_call(layer.target, args_of(layer), layer.kwargs, before=layer)
    set_operand(main, "input", rest)
    set_operand(main, "weight", add_buffer(gm, f"{owner}.weight_rest", kept, like=layer))
    apart = add_buffer(gm, f"{owner}.weight_apart", weight[:, channels].contiguous(), like=layer)
    extra = insert_call(layer.target, (few, apart), before=layer)
    hand_on(layer, main)
    listing = ", ".join(map(str, channels.tolist()))
    treat(main, name, f"without channels {listing}", "outlier channels apart, in float")
    treat(extra, name, Skip("outlier channels of a layer that is quantized", intended=True))
    extra.meta[SETTLED] = True
    total = insert_call(aten.add.Tensor, (main, extra), before=layer)
    layer.replace_all_uses_with(total)
    gm.graph.erase_node(layer)
