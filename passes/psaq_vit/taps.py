"""Taps: where a vision transformer's self-attention leaves what it gathered for each patch.

A tap is the output of an attention before heads are joined, `[B, heads, N, D]`. The graph shows
where it is: every `scaled_dot_product_attention`, and every product whose left side comes from a
softmax. What its axes mean shows an experiment: with each attention replaced by its values, tokens
do not mix, so the tokens that change with an image are that image's patches (class tokens,
registers and padding do not); an axis some of whose entries ignore a corner of the image runs over
positions, so it counts windows and not heads; and nothing may change with another image.
"""

import fnmatch
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule, Interpreter, Node

from fxq.errors import FxqWarning, UnsupportedError, did_you_mean
from fxq.graph import args_of, is_op, owner_name, shape_of
from fxq.operators import ATTENTION, COPIES, LINEAR, MATMUL, RESHAPES, SOFTMAX, Movement, of
from fxq.progress import Reporter

aten = torch.ops.aten
WHERE = of(Movement.WHERE)
# What may stand between the softmax and the product with the values; heads may talk.
THROUGH = RESHAPES | COPIES | LINEAR | WHERE | of(
    Movement.TRANSPOSE, Movement.EXPAND, Movement.MASKED_FILL
)  # fmt: skip
CHANGED = 1e-3  # of the largest change: a token that changes by less does not see the image
MIN_PATCHES = 4  # fewer have too few pairs to speak of a density


@dataclass(frozen=True, eq=False)
class Tap:
    """One self-attention over patches.

    Args:
        node: the name of its output in the graph.
        module: qualified name of the module it came from.
        leading: sizes of the axes between images and tokens.
        window_axes: which of these count windows; the others count heads. An axis that holds both,
            as in SAM's windowed blocks, counts windows: heads are then not averaged.
        patches: which tokens of each window are patches `[W, N]`, bool.
    """

    node: str
    module: str
    leading: tuple[int, ...]
    window_axes: tuple[int, ...]
    patches: Tensor = field(repr=False)

    @property
    def n_windows(self) -> int:
        """Windows per image, 1 for global attention."""
        return math.prod(self.leading[axis] for axis in self.window_axes)

    @property
    def n_heads(self) -> int:
        """Attention heads."""
        return math.prod(self.leading) // self.n_windows

    @property
    def n_patches(self) -> int:
        """Patches of one image."""
        return int(self.patches.sum())

    def split(self, value: Tensor, n_images: int) -> Tensor:
        """Return the tap's value as `[B, W, heads, N, D]`."""
        heads = [axis for axis in range(len(self.leading)) if axis not in self.window_axes]
        order = [axis + 1 for axis in (*self.window_axes, *heads)]
        value = value.reshape(n_images, *self.leading, *value.shape[-2:])
        value = value.permute(0, *order, -2, -1)
        return value.reshape(n_images, self.n_windows, self.n_heads, *value.shape[-2:])

    def vectors(self, value: Tensor, n_images: int, heads: str = "mean") -> Tensor:
        """Return one vector per token `[B, W, N, D]`: the mean over heads, or `heads * D` long
        with `heads="concat"`."""
        split = self.split(value, n_images)
        return split.mean(2) if heads == "mean" else split.transpose(2, 3).flatten(3)


@dataclass(frozen=True)
class Taps:
    """What was found in a graph.

    Args:
        taps: in graph order.
        refusals: attention that is not one over patches: module -> reason.
    """

    taps: tuple[Tap, ...]
    refusals: Mapping[str, str]

    def report_refusals(self, what: str, report: Reporter) -> None:
        """Say what was refused: through `report` if anybody listens, or as a warning."""
        if not self.refusals:
            return
        listing = "; ".join(f"{name}: {why}" for name, why in self.refusals.items())
        if report:
            report(f"{what}: left out {listing}")
        else:
            warnings.warn(f"{what}: left out {listing}", FxqWarning, stacklevel=3)


def find_taps(
    gm: GraphModule, images: Tensor, select: str | Sequence[str] = "*", n_prefix: int | None = None
) -> Taps:
    """Return the self-attentions over image patches.

    Args:
        gm: a graph of one input, in the ATEN dialect.
        images: any `[B, C, H, W]` the graph takes; only shape, dtype and device count.
        select: qualified module names with shell wildcards, or exact node names; a named node that
            is no attention is taken at its word: `[..., N, D]`.
        n_prefix: how many leading tokens are not patches; found by experiment unless given.
    Raises:
        UnsupportedError: none is left; the message lists what was refused and why.
        ValueError: `select` is empty, or a name in it leads nowhere.
    """
    patterns = [select] if isinstance(select, str) else list(select)
    if not patterns:
        raise ValueError('taps: expected names of modules or nodes, found none; "*" means all')
    attentions = _attentions(gm)
    chosen = _select(gm, attentions, patterns)
    probe = _Probe(gm, attentions, images)
    found, refusals = [], _unreadable(gm) if "*" in patterns else {}
    for node in chosen:
        name = owner_name(node)
        if (why := _not_self_attention(node, attentions.get(node))) is not None:
            refusals[name] = why
            continue
        tap = probe.tap(node, name, n_prefix)
        if isinstance(tap, str):
            refusals[name] = tap
        else:
            found.append(tap)
    if not found:
        listing = "".join(f"\n  {name}: {why}" for name, why in refusals.items())
        raise UnsupportedError(
            "expected self-attention over image patches, found "
            + (f"none that can be used:{listing}" if refusals else "no attention in the graph")
            + "\nname the nodes to use (taps=...), or calibrate this model with real images"
        )
    return Taps(tuple(found), refusals)


def _attentions(gm: GraphModule) -> dict[Node, Node]:
    """Return attention outputs and the values each one averages."""
    found = {}
    for node in gm.graph.nodes:
        if is_op(node, *ATTENTION):
            found[node] = args_of(node)[2]
        elif is_op(node, *MATMUL) and _is_softmax(args_of(node)[0]):
            found[node] = args_of(node)[1]
    return found


def _unreadable(gm: GraphModule) -> dict[str, str]:
    """Return attentions written in a way that does not show queries, keys and values."""
    found = {}
    for node in gm.graph.nodes:
        if is_op(node, aten.einsum.default) and any(map(_is_softmax, args_of(node)[1])):
            text = args_of(node)[0]
            found[owner_name(node)] = f"einsum {text!r} is not one product of weights and values"
        elif is_op(node, *MATMUL) and _is_softmax(args_of(node)[1]):
            found[owner_name(node)] = "its values are the left operand of the product"
    return found


def _is_softmax(node: Any) -> bool:
    while is_op(node, *THROUGH):
        tensors = [n for n in args_of(node) if isinstance(n, Node) and len(shape_of(n)) > 1]
        node = tensors[-1] if is_op(node, *WHERE) else args_of(node)[0]
    return is_op(node, *SOFTMAX)


def _select(gm: GraphModule, found: Mapping[Node, Node], patterns: Sequence[str]) -> list[Node]:
    nodes = {node.name: node for node in gm.graph.nodes}
    chosen: set[Node] = set()
    for pattern in patterns:
        matched = [n for n in found if fnmatch.fnmatchcase(owner_name(n), pattern)]
        if pattern in nodes:
            matched.append(nodes[pattern])
        if not matched and pattern != "*":
            known = {owner_name(n) for n in found} | set(nodes)
            raise ValueError(f"taps: nothing is called {pattern!r}; {did_you_mean(pattern, known)}")
        chosen.update(matched)
    return [node for node in gm.graph.nodes if node in chosen]


def _not_self_attention(node: Node, values: Node | None) -> str | None:
    if values is None:
        return None
    queries, keys = shape_of(node)[-2], shape_of(values)[-2]
    if isinstance(queries, int) and isinstance(keys, int) and queries != keys:
        return f"{queries} queries for {keys} keys: not attention of patches among themselves"
    return None


class _WithoutMixing(Interpreter):
    """Run a graph with every self-attention replaced by its values; keep what `keep` names."""

    def __init__(self, gm: GraphModule, values: Mapping[Node, Node]) -> None:
        super().__init__(gm)
        self.values = values
        self.kept: dict[Node, Tensor] = {}

    def run_node(self, n: Node) -> Any:
        if n not in self.values:
            result = super().run_node(n)
            if isinstance(result, Tensor) and n.op == "call_function":
                self.kept[n] = result
            return result
        value, whole = self.env[self.values[n]], super().run_node(n)
        if value.shape != whole.shape and value.ndim == whole.ndim and value.ndim > 3:
            value = value.repeat_interleave(whole.shape[-3] // value.shape[-3], -3)  # grouped heads
        # In the layout of the attention's own output, for the views after it.
        self.kept[n] = whole.copy_(value) if value.shape == whole.shape else whole
        return self.kept[n]


class _Probe:
    """What tokens do when one image changes, wholly and in a corner."""

    def __init__(self, gm: GraphModule, values: Mapping[Node, Node], images: Tensor) -> None:
        self.n_images = len(images)
        generator = torch.Generator().manual_seed(0)

        def noise(shape: Sequence[int]) -> Tensor:
            return torch.randn(shape, generator=generator).to(images.device, images.dtype)

        base = noise(images.shape)
        other, corner = base.clone(), base.clone()
        other[0] = noise(base[0].shape)
        height, width = (max(1, size // 8) for size in base.shape[-2:])
        corner[0, :, :height, :width] = other[0, :, :height, :width]
        with torch.no_grad():
            self.base, self.other, self.corner = (
                self._run(gm, values, x) for x in (base, other, corner)
            )

    @staticmethod
    def _run(gm: GraphModule, values: Mapping[Node, Node], images: Tensor) -> dict[Node, Tensor]:
        runner = _WithoutMixing(gm, values)
        runner.run(images)
        return runner.kept

    def tap(self, node: Node, name: str, n_prefix: int | None) -> Tap | str:
        """Return a node as a tap, or why it is none."""
        if node not in self.base or self.base[node].ndim < 3:
            return "expected a value [..., tokens, channels]"
        sizes = self.base[node].shape
        if sizes[0] % self.n_images:
            return f"{sizes[0]} leading entries for {self.n_images} images"
        leading = (sizes[0] // self.n_images, *sizes[1:-2])
        changed = self._changed(self.other, node, leading)
        if changed[1:].any():
            return "an image changes what belongs to another: the batch is not its outermost axis"
        corner = self._changed(self.corner, node, leading)[0]  # [*leading, N, D]
        seen, near = (x.flatten(0, -2).any(0) for x in (changed[0], corner))
        if len(leading) and bool((seen & ~near).any()):
            return "its last axis runs over positions: attention among channels"
        tap = Tap(
            node.name, name, leading, _window_axes(corner.any(-1), changed[0].any(-1)), changed
        )
        patches = tap.split(changed, self.n_images)[0].any(-1).any(1)  # [W, N]
        if not patches.any():
            return "it does not depend on the image"
        if n_prefix is not None:
            patches = (torch.arange(sizes[-2], device=patches.device) >= n_prefix).expand_as(
                patches
            )
        if patches.sum() < MIN_PATCHES:
            return f"expected at least {MIN_PATCHES} patches, found {int(patches.sum())}"
        if patches.sum(1).max() < 2:
            return "one patch per window has no pair"
        return replace(tap, patches=patches)

    def _changed(
        self, other: Mapping[Node, Tensor], node: Node, leading: tuple[int, ...]
    ) -> Tensor:
        """Tell which entries `[B, *leading, N, D]` of a node differ between two runs."""
        change = (other[node].float() - self.base[node].float()).abs()
        changed = change > CHANGED * change.amax()
        return changed.reshape(self.n_images, *leading, *change.shape[-2:])


def _window_axes(corner: Tensor, whole: Tensor) -> tuple[int, ...]:
    """Return the axes of `[*leading, N]` that count windows.

    An axis some of whose entries see the image and ignore a corner of it does; a dead head sees
    nothing. Behind a deep convolution none may: then the last axis counts heads, as everywhere in
    practice, and the others windows.

    Args:
        corner: what changes with a corner of the image, bool.
        whole: what changes with the whole image, bool.
    """
    axes = range(corner.ndim - 1)

    def sees(changed: Tensor, axis: int) -> Tensor:
        return changed.transpose(0, axis).flatten(1).any(1)

    ignores = [bool((sees(whole, axis) & ~sees(corner, axis)).any()) for axis in axes]
    if ignores[-1]:
        return tuple(axis for axis in axes if ignores[axis])
    return tuple(axes[:-1])
