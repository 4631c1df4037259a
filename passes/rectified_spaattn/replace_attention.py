"""ReplaceAttention: self-attention over visual tokens becomes `fxq::rectified_attention`.

Which tokens are visual is read off the graph (`segments.py`), and so is the number of valid text
tokens (`padding.py`). Visual tokens are put in the order of a space-filling curve inside the
operator where their grid is known. What is left dense carries its reason, and the report shows it.
"""

import fnmatch
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq.account import kind_of
from fxq.analysis.masks import Masks
from fxq.analysis.positions import find_positions
from fxq.analysis.streams import Positions
from fxq.dialect import QUANTIZED, Dialect
from fxq.errors import did_you_mean
from fxq.graph import args_of, is_op, is_settled, owner_name, shape_of, val_of
from fxq.layer import NOT_SEEN, OVERRIDE, Skip, hand_on, layer_of, treat
from fxq.operators import ATTENTION, DENSE_ATTENTION, SPARSE_ATTENTION, operand
from fxq.passes.rectified_spaattn.arranging import arrange, put_back
from fxq.passes.rectified_spaattn.curve import Grid, block_adjacency, curve_order
from fxq.passes.rectified_spaattn.densities import (
    check_densities,
    density_table,
    insert_densities,
)
from fxq.passes.rectified_spaattn.eligibility import why_dense, why_unfit
from fxq.passes.rectified_spaattn.padding import (
    Padding,
    find_padding,
    in_order,
    of_seen_queries,
)
from fxq.passes.rectified_spaattn.segments import Segments, TokenLayout, find_segments
from fxq.pipeline import Pass, SizeToFix
from fxq.rectified_attention.layout import check_choices
from fxq.rewriting import add_buffer, insert_call
from fxq.rows import ByStep, Rows

Override = tuple[str, float | None]
Masked = tuple[Node | None, Segments]


@dataclass(frozen=True)
class _Site:
    """An attention to be replaced."""

    node: Node
    segments: Segments
    padding: Padding | None
    density: float | None


@dataclass(frozen=True)
class ReplaceAttention(Pass):
    """Replace every self-attention of long visual sequences by rectified sparse attention.

    Defaults are the published code's for HunyuanVideo (arXiv:2511.19835).

    Args:
        density: share of visual key blocks that each query block keeps at least; a number, or one
            for each row. 1 and more is dense.
        rows: what chooses among several densities: `ByTimestep` or `ByStep` of `fxq.rows`.
        mode: "paper"; "online", where dropped blocks join the softmax as pooled pseudo-keys: closer
            to dense at 4 to 7 % more work (not in the paper); "sparse", without correction.
        top_p: keep more blocks until their implicit probability exceeds this.
        block_size: tokens per block, of queries and keys.
        mass: what the rectification factor counts: "complement", all but what is compensated (the
            published code), or "critical", what is kept.
        gate: compensate only blocks whose pooling gains more than it errs. None: in paper mode.
        center_keys: subtract the mean key before the gate; a departure that helps where keys have
            an offset.
        min_tokens: sequences below this, text included, stay dense: they would not become faster.
        reorder: put visual tokens in curve order, where the grid is known.
        keep_neighbours: keep every block that touches the query block in space and time, where the
            grid is known.
        layout: what is known about the sequence and not to be found in the graph.
        overrides: (pattern, density) pairs. A pattern is a qualified module name with shell
            wildcards (`"blocks.0.*"`); a density of None keeps the layer dense. The first match
            wins. Where a row is dense these are dense too.
    """

    density: float | tuple[float, ...] = 0.2  # published code: drop rate 0.8 on HunyuanVideo
    rows: Rows | None = None
    mode: Literal["paper", "online", "sparse"] = "paper"
    top_p: float = 0.3  # p_remain of the published code
    block_size: int = 128  # B_M and B_N of the published kernel
    mass: Literal["complement", "critical"] = "complement"
    gate: bool | None = None
    center_keys: bool = False
    min_tokens: int = 4096  # CPU, density 0.2: 2.1x dense SDPA here, 0.8x at 1,024
    reorder: bool = True
    keep_neighbours: bool = True
    layout: TokenLayout = field(default_factory=TokenLayout)
    overrides: tuple[Override, ...] = ()

    reads: ClassVar[Dialect] = QUANTIZED
    writes: ClassVar[Dialect] = QUANTIZED

    def __post_init__(self) -> None:
        check_densities(self.densities, self.rows)
        check_choices(self.mode, self.mass)
        if not 0 <= self.top_p <= 1:
            raise ValueError(f"ReplaceAttention.top_p: expected 0 to 1, found {self.top_p}")
        if self.block_size < 1 or self.min_tokens < 1:
            raise ValueError(
                "ReplaceAttention: expected block_size and min_tokens of at least 1, found "
                f"{self.block_size} and {self.min_tokens}"
            )
        for pattern, density in self.overrides:
            if density is not None and not density > 0:
                raise ValueError(
                    f"ReplaceAttention.overrides: expected a positive density or None for "
                    f"{pattern!r}, found {density}"
                )

    @property
    def needs_program(self) -> bool:
        """Whether its steps are counted by the user."""
        return isinstance(self.rows, ByStep)

    @property
    def densities(self) -> tuple[float, ...]:
        """The density of each row."""
        return self.density if isinstance(self.density, tuple) else (self.density,)

    def sizes_to_fix(self, gm: GraphModule) -> Iterator[SizeToFix]:
        """Yield the free numbers of tokens of all attention that it would replace."""
        positions, masks = find_positions(gm), Masks()
        for node in positions.attention:
            size = shape_of(args_of(node)[1])[-2]
            if isinstance(size, int) or is_settled(node) or why_unfit(node, masks):
                continue
            if node in positions.present:
                continue  # as large as the data say
            if isinstance(find_segments(node, positions, self.layout), Segments):
                yield SizeToFix(size, self.min_tokens)

    def run(self, gm: GraphModule) -> PassResult:
        """Replace what can be replaced and mark the rest."""
        positions = find_positions(gm)
        attentions = [node for node in positions.attention if not is_settled(node)]
        overridden = self._overridden(list(positions.attention))
        name = type(self).__name__
        masks, sites, lengths = Masks(), [], dict[Masked, Padding | Skip | None]()
        for node in attentions:
            found = self._examine(node, positions, overridden, masks, lengths)
            if isinstance(found, Skip):
                treat(node, name, found)
            else:
                sites.append(found)
        for node in gm.graph.nodes:
            if is_settled(node):
                continue
            if is_op(node, *DENSE_ATTENTION) and node not in positions.attention:
                treat(node, name, Skip("a size of it depends on the data", intended=False))
            seen = is_op(node, *ATTENTION) or layer_of(node).skip is not NOT_SEEN
            if kind_of(node) is not None and not seen:
                treat(node, name, Skip("this recipe replaces attention only", intended=True))
        if sites:
            self._replace(gm, sites)
            gm.graph.eliminate_dead_code()
        return PassResult(gm, modified=bool(sites))

    def _examine(
        self,
        node: Node,
        positions: Positions,
        overridden: dict[Node, Override],
        masks: Masks,
        lengths: dict[Masked, Padding | Skip | None],
    ) -> _Site | Skip:
        """Return what to replace, or why not. `lengths` has what masks seen so far say."""
        pattern, density = overridden.get(node, (None, None))
        if pattern is not None and (density is None or density >= 1):
            return Skip(f"{OVERRIDE}{pattern!r}", intended=True)
        segments = find_segments(node, positions, self.layout)
        if reason := why_dense(node, self.min_tokens, masks, segments):
            return reason
        if isinstance(segments, Skip):
            return segments
        mask = operand(node, "attn_mask")
        masked = mask, segments
        if masked not in lengths:
            lengths[masked] = find_padding(mask, masks, segments, self.layout.prefix_masks, node)
        padding = lengths[masked]
        if isinstance(padding, Skip):
            return padding
        return _Site(node, segments, padding, density)

    def _overridden(self, attentions: Sequence[Node]) -> dict[Node, Override]:
        names = {node: owner_name(node) for node in attentions}
        chosen: dict[Node, Override] = {}
        for pattern, density in self.overrides:
            matched = [n for n in attentions if fnmatch.fnmatchcase(names[n], pattern)]
            if not matched:
                raise ValueError(
                    f"override {pattern!r} matches no attention; "
                    f"{did_you_mean(pattern, set(names.values()))}"
                )
            for node in matched:
                chosen.setdefault(node, (pattern, density))
        return chosen

    def _replace(self, gm: GraphModule, sites: Sequence[_Site]) -> None:
        own = [site.density for site in sites]
        table = density_table(self.densities, own)
        densities = insert_densities(gm, table, self.rows, sites[0].node)
        curves: dict[tuple[Grid, torch.device], tuple[Node | None, Node | None]] = {}
        for site, density in zip(sites, densities, strict=True):
            order, adjacency = self._curve(gm, site, curves)
            node, segments = site.node, site.segments
            padding = site.padding
            taken = arrange(node, segments)
            query = taken.query
            key, value = (in_order(padding, part, node) for part in (taken.key, taken.value))
            text_len = taken.text_len if padding is None else padding.text_len
            gate = self.mode == "paper" if self.gate is None else self.gate
            args = (
                query, key, value, density, text_len, order, adjacency, segments.text_start,
                segments.text_size, self.block_size, self.top_p, self.mode, self.mass, gate,
                self.center_keys, False, operand(node, "scale"),
            )  # fmt: skip
            sparse = insert_call(SPARSE_ATTENTION, args, before=node)
            hand_on(node, sparse)
            format = self._format(site.density)
            treat(sparse, type(self).__name__, format, self._note(site), format=format)
            result = insert_call(operator.getitem, (sparse, 0), before=node)
            result = put_back(result, taken, segments, node)
            result = of_seen_queries(padding, result, node)
            node.replace_all_uses_with(result)
            gm.graph.erase_node(node)

    def _curve(
        self,
        gm: GraphModule,
        site: _Site,
        curves: dict[tuple[Grid, torch.device], tuple[Node | None, Node | None]],
    ) -> tuple[Node | None, Node | None]:
        """Return order and adjacency of the site's grid, shared by all layers."""
        grid, device = site.segments.grid, val_of(site.node).device
        if grid is None:
            return None, None
        if (grid, device) not in curves:
            order = curve_order(grid) if self.reorder else None
            values = {
                "curve_order": order,
                "block_adjacency": block_adjacency(grid, order, self.block_size)
                if self.keep_neighbours
                else None,
            }
            nodes = [
                None if value is None else add_buffer(gm, name, value.to(device), like=site.node)
                for name, value in values.items()
            ]
            curves[grid, device] = (nodes[0], nodes[1])
        return curves[grid, device]

    def _format(self, own: float | None) -> str:
        densities = {d if own is None or d >= 1 else own for d in self.densities}
        low, high = min(*densities, 1.0), min(max(densities), 1.0)
        share = f"{'>=' if low < 1 else ''}{100 * low:.4g}%"  # neighbours and top_p add blocks
        share += f" to {100 * high:.4g}%" if low != high else ""
        by = "" if self.rows is None else f" {self.rows}"
        return f"sparse {share}{by}, {self.mode}"

    def _note(self, site: _Site) -> str:
        segments = site.segments
        parts = [segments.note]
        if site.padding is not None:
            parts.append("padding counted")
        if segments.grid is None:
            parts.append("grid unknown: tokens as they lie")
        elif self.reorder:
            parts.append(f"grid {'x'.join(map(str, segments.grid))} in curve order")
        return ", ".join(parts)
