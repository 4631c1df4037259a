"""Scale sites: where a factor per channel can be moved from an activation into weights.

    consumer(x)  =  consumer'((x - shift) / scale)

The producers of x are divided by `scale`, its consumers multiplied by it, and the float function is
unchanged. Sites are the connected components of the channel flow, grouped by the layers they run
between; no model is known by name. Each layer that is in no site has a reason.
"""

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.fx import GraphModule, Node

from fxq.analysis.factor_rules import op_name
from fxq.analysis.factor_walk import WeightReaders, channel_flow
from fxq.analysis.factors import UNIT, ChannelFlow, Slot
from fxq.analysis.labels import sizes_of
from fxq.graph import is_constant, owner_name
from fxq.layer import layer_of
from fxq.operators import ATTENTION, LAYERS, NORMS

Kind = Literal["norm", "modulate", "value", "gated", "relu", "linear", "quantizer", "query_key"]
KINDS: tuple[Kind, ...] = (
    "norm", "modulate", "value", "gated", "relu", "linear", "quantizer", "query_key",
)  # fmt: skip


@dataclass(frozen=True, eq=False)
class Part:
    """One side of one layer, norm or sum, as far as a site changes it.

    Args:
        node: linear, convolution, norm or, for an operand, the sum.
        channels: the site's channel that each of its channels belongs to, -1 where none `[n]`; for
            an operand in a shape that broadcasts to it.
        inverse: multiplied where others are divided: the keys of a query-key site.
        index: for an operand, its position in the sum's arguments.
    """

    node: Node
    channels: Tensor
    inverse: bool = False
    index: int | None = None

    def spread(self, values: Tensor, fill: float) -> Tensor:
        """Return a site's values `[n_channels]` for each of this part's channels, fp64."""
        values = torch.cat([values.double().cpu(), torch.tensor([fill], dtype=torch.float64)])
        return values[self.channels]  # -1 is the last entry


@dataclass(frozen=True, eq=False)
class ScaleSite:
    """An edge of the graph that can be scaled, and everything that has to change with it.

    Args:
        kind: what stands between producers and consumers.
        n_channels: how many factors it has.
        producers: what is divided: output channels of layers and norms, operands of sums.
        consumers: what is multiplied: input channels of layers.
        edge: for a quantizer site, the value that is divided by an explicit product.
        shifted: the producers that take a shift, each with the shift's channels.
        why_no_shift: why the edge cannot be shifted, None where it can.
    """

    kind: Kind
    n_channels: int
    producers: tuple[Part, ...]
    consumers: tuple[Part, ...]
    edge: Node | None = None
    shifted: tuple[Part, ...] = ()
    why_no_shift: str | None = None

    @property
    def name(self) -> str:
        """Name of the site: its consumers, or the keys of a query-key site."""
        parts = self.consumers or self.producers
        return ", ".join(dict.fromkeys(owner_name(part.node) for part in parts))


@dataclass(frozen=True)
class ScaleSites:
    """What the finder found: sites, and a reason for every layer and attention without one."""

    sites: list[ScaleSite]
    refusals: dict[Node, str]

    def count(self) -> dict[str, int]:
        """Return how many sites of each kind there are."""
        return dict(Counter(site.kind for site in self.sites))


def scale_sites(gm: GraphModule) -> ScaleSites:
    """Find every scale site of a canonical graph (dialect ATEN).

    A linear that no factor can reach gets a quantizer site: the factor becomes a product on its
    input, which becomes part of the quantizer after it.
    """
    scales = channel_flow(gm)
    shifts = _Shifts(channel_flow(gm, scales))
    component, reasons = scales.components
    sites = []
    for parts in _groups(scales, component, reasons):
        site = _site(parts, scales)
        if site is not None:
            sites.append(shifts.complete(site))
    refusals = _refusals(gm, scales, sites)
    sites.extend(_quantizer_sites(gm, scales, refusals))
    sites = [site for site in sites if not _refused_for_codes(site, refusals)]
    order = {node: index for index, node in enumerate(gm.graph.nodes)}
    sites.sort(key=lambda site: order[(site.consumers or site.producers)[0].node])
    scaled = {part.node for site in sites for part in site.consumers}
    return ScaleSites(sites, {n: why for n, why in refusals.items() if n not in scaled})


class _Grouped(NamedTuple):
    """A part of a site to be, and on which side of its node it is."""

    part: Part
    slot: Slot


def _groups(
    flow: ChannelFlow, component: Tensor, reasons: Mapping[int, str]
) -> Iterator[list[_Grouped]]:
    """Yield the parts of each set of components that run between the same slots."""
    entries = _Entries(flow.slots)
    plus, minus = component[2 * entries.variable], component[2 * entries.variable + 1]
    number, inverse = torch.minimum(plus, minus), minus < plus
    fixed = torch.zeros(len(component), dtype=torch.bool)
    fixed[list(reasons)] = True
    side = 2 * entries.slot + inverse  # what a component touches
    free = ~fixed[number]
    touched = torch.stack([number, side])[:, free].unique(dim=1)
    # The set of sides as one number: the sum of a hash of each.
    hashes = torch.randint(1 << 62, (2 * len(flow.slots),), generator=_seeded())
    signature = torch.zeros(len(component), dtype=torch.int64)
    signature.index_add_(0, touched[0], hashes[touched[1]])
    numbers = touched[0].unique()
    kinds, group = signature[numbers].unique(return_inverse=True)
    for index in range(len(kinds)):
        mine = numbers[group == index]
        channel = torch.full((len(component),), -1)
        channel[mine] = torch.arange(len(mine))
        yield [
            _Grouped(
                _part(flow.slots[key // 2], entries, key, side, channel[number]),
                flow.slots[key // 2],
            )
            for key in side[channel[number] >= 0].unique().tolist()
        ]


class _Entries:
    """All variables of all slots, one entry each: which variable, slot, and place in the slot."""

    def __init__(self, slots: Sequence[Slot]) -> None:
        lengths = torch.tensor([slot.size for slot in slots], dtype=torch.int64)
        self.slot = torch.arange(len(slots)).repeat_interleave(lengths)
        self.variable = torch.cat([torch.empty(0, dtype=torch.int64), *(s.ids for s in slots)])
        bases = torch.tensor([slot.base for slot in slots], dtype=torch.int64)
        self.position = self.variable - bases[self.slot]


def _seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _part(slot: Slot, entries: _Entries, key: int, side: Tensor, channel: Tensor) -> Part:
    """Return a slot's part of a site. `channel` and `side` have one entry per variable."""
    mine = (side == key) & (channel >= 0)
    return _as_part(slot, entries.position[mine], channel[mine], inverse=bool(key % 2))


def _as_part(slot: Slot, positions: Tensor, channels: Tensor, *, inverse: bool = False) -> Part:
    spread = torch.full((slot.size + 1,), -1)
    spread[positions] = channels
    if slot.labels is None:
        return Part(slot.node, spread[:-1], inverse)
    index = torch.where(slot.labels > UNIT, slot.labels - slot.base, slot.size)
    return Part(slot.node, spread[index], inverse, slot.index)


def _site(group: list[_Grouped], flow: ChannelFlow) -> ScaleSite | None:
    """Return the site of a group of components, None where nothing is gained or produced."""
    n_channels = 1 + max(int(found.part.channels.max()) for found in group)
    producers = tuple(found.part for found in group if found.slot.side != "in")
    consumers = tuple(found.part for found in group if found.slot.side == "in")
    query_key = any(part.inverse for part in producers)
    if not producers or not (consumers or query_key) or n_channels == 1:
        return None
    if query_key and any(part.node.target not in LAYERS for part in producers):
        return None  # after a norm of queries and keys, whose linears it would not reach
    return ScaleSite(_kind(producers, consumers, flow), n_channels, producers, consumers)


def _kind(producers: tuple[Part, ...], consumers: tuple[Part, ...], flow: ChannelFlow) -> Kind:
    if any(part.inverse for part in producers):
        return "query_key"
    if any(part.node.target in NORMS for part in producers):
        return "norm" if all(part.node.target in NORMS for part in producers) else "modulate"
    reads: list[Any] = [part.node.args[0] for part in consumers]
    traits = frozenset().union(*(flow.traits_of(read) for read in reads))
    names: tuple[tuple[str, Kind], ...] = (
        ("attention", "value"), ("product", "gated"), ("relu", "relu"),
    )  # fmt: skip
    return next((kind for trait, kind in names if trait in traits), "linear")


class _Shifts:
    """Which producers take the shift of a site, read off the flow of shifts."""

    def __init__(self, flow: ChannelFlow) -> None:
        component, self.reasons = flow.components
        self.component = component[0::2]  # by variable; shifts have no inverses
        self.fixed = torch.zeros(len(component), dtype=torch.bool)
        self.fixed[list(self.reasons)] = True
        self.columns = _columns(flow)
        columns = _Entries([slot for slot in flow.slots if slot.side == "in"])
        self.n_columns = self.component[columns.variable].bincount(minlength=len(component))
        self.outputs = [slot for slot in flow.slots if slot.side != "in"]
        self.entries = _Entries(self.outputs)

    def complete(self, site: ScaleSite) -> ScaleSite:
        """Return the site with its shifted producers, or with the reason why it has none."""
        found = self._shifted(site)
        if isinstance(found, str):
            return replace(site, why_no_shift=found)
        return replace(site, shifted=found)

    def _shifted(self, site: ScaleSite) -> tuple[Part, ...] | str:
        if not site.consumers:
            return "the scores of attention do not allow it"
        pairs = [
            (self.component[self.columns[part.node].ids[part.channels >= 0]], part.channels)
            for part in site.consumers
        ]
        number = torch.cat([numbers for numbers, _ in pairs])
        channel = torch.cat([channels[channels >= 0] for _, channels in pairs])
        if bool(self.fixed[number].any()):
            return self.reasons[int(number[self.fixed[number]][0])]
        channel_of = torch.full((len(self.fixed),), -1)
        channel_of[number] = channel
        if not torch.equal(channel_of[number], channel):
            return "its channels share a shift"
        mine = number.bincount(minlength=len(self.fixed))
        if not torch.equal(mine[number], self.n_columns[number]):
            return "another layer would have to take the shift"
        produced = channel_of[self.component[self.entries.variable]]
        if len(produced[produced >= 0].unique()) != site.n_channels:
            return "nothing in front of it takes a shift"
        slots = self.entries.slot[produced >= 0].unique().tolist()
        return tuple(self._part(index, produced) for index in slots)

    def _part(self, index: int, produced: Tensor) -> Part:
        mine = (self.entries.slot == index) & (produced >= 0)
        return _as_part(self.outputs[index], self.entries.position[mine], produced[mine])


def _refusals(gm: GraphModule, flow: ChannelFlow, sites: list[ScaleSite]) -> dict[Node, str]:
    """Return why layers and attentions are in no site."""
    component, reasons = flow.components
    scaled = {part.node for site in sites for part in site.consumers}
    refusals: dict[Node, str] = {}
    for slot in flow.slots:
        if slot.side == "in" and slot.node not in scaled:
            numbers = component[2 * slot.ids].tolist()
            whys = (reasons[number] for number in numbers if number in reasons)
            refusals[slot.node] = next(whys, "all its channels would share one factor")
    columns = _columns(flow)
    for node in gm.graph.nodes:
        if node.target in LAYERS and node not in columns:
            refusals[node] = _layer_refusal(node)
        if node.target in ATTENTION and (why := _query_key_refusal(node, flow, component, reasons)):
            refusals[node] = why
    return refusals


def _refused_for_codes(site: ScaleSite, refusals: dict[Node, str]) -> bool:
    """Refuse a site where a method has fixed codes: scaling changes the weight that they are of."""
    parts = (*site.consumers, *site.producers, *site.shifted)
    fixed = [part.node for part in parts if layer_of(part.node).weight is not None]
    if fixed:
        why = f"the codes of {owner_name(fixed[0])} are fixed; scale before that"
        refusals |= {part.node: why for part in site.consumers}
    return bool(fixed)


def _columns(flow: ChannelFlow) -> dict[Node, Slot]:
    """Return the input channels of every layer whose input can be scaled, given a factor."""
    return {slot.node: slot for slot in flow.slots if slot.side == "in"}


def _layer_refusal(layer: Node) -> str:
    operands = [arg for arg in layer.args[1:3] if isinstance(arg, Node)]
    if all(map(is_constant, operands)):
        return f"no factor passes through a transposed {op_name(layer)}"
    return "its weight or bias is computed at run time"


def _query_key_refusal(
    node: Node, flow: ChannelFlow, component: Tensor, reasons: Mapping[int, str]
) -> str:
    reads: Any = node.args[:2]
    for read, labels in zip(reads, flow.compared[node], strict=True):
        if labels is None:
            return flow.why.get(read, "query or key cannot be scaled")
        ids = labels.unique()
        slot = next(s for s in flow.slots if s.base <= int(ids[-1]) < s.base + s.size)
        if slot.node.target in NORMS:
            return f"{op_name(slot.node)} normalises the query or key"
        for number in component[2 * ids[ids > UNIT]].tolist():
            if number in reasons:
                return reasons[number]
    return ""


def _quantizer_sites(
    gm: GraphModule, flow: ChannelFlow, refusals: dict[Node, str]
) -> list[ScaleSite]:
    """Return a site for each value that layers without another site read.

    The factor goes into the weights of these layers only, so nobody else may read those.
    """
    readers: dict[Node, dict[int, list[Node]]] = defaultdict(lambda: defaultdict(list))
    weights = WeightReaders(gm)
    columns = _columns(flow)
    for node in refusals:
        if node in columns:
            if weights.others(node):
                refusals[node] = f"{refusals[node]}, and its weight is shared"
            else:
                readers[node.args[0]][len(sizes_of(node.args[1])) - 2].append(node)  # type: ignore
    why = "a quantizer has one zero-point for all channels"
    sites = []
    for edge, by_spatial in readers.items():
        for spatial, nodes in by_spatial.items():
            channels = torch.arange(sizes_of(edge)[len(sizes_of(edge)) - 1 - spatial])
            parts = tuple(Part(node, channels) for node in nodes)
            sites.append(ScaleSite("quantizer", len(channels), (), parts, edge, (), why))
    return sites
