"""Token layout: which part of a sequence is text, which is visual, and the grid of the visual part.

The visual tokens are those whose input the model returns (a denoiser returns its latents), or of an
input that is added to these token by token, as a control branch's is. Where a model returns none of
its inputs' positions (a classifier), it is the longest part. Everything else in the sequence -
text, class tokens, registers - is kept by every query and never pooled, and is called text for
short. `TokenLayout` says by hand what a graph does not hold.
"""

from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.fx import Node

from fxq.analysis.streams import NOWHERE, UNKNOWN, Positions, Stream
from fxq.layer import Skip
from fxq.passes.rectified_spaattn.curve import Grid


@dataclass(frozen=True)
class TokenLayout:
    """What a user knows about the sequence. What is None is read off the graph.

    Args:
        text: where the text tokens are.
        text_size: how many there are, padding included; 0 for none. Give it together with `text`.
        grid: frames, height and width of the visual tokens, which lie in this (raster) order.
        prefix_masks: the word that every boolean mask `[B, 1, 1, S]` keeps a prefix of the text and
            all visual tokens.
    """

    text: Literal["first", "last"] | None = None
    text_size: int | None = None
    grid: Grid | None = None
    prefix_masks: bool = False

    def __post_init__(self) -> None:
        if self.text not in (None, "first", "last"):
            raise ValueError(f"TokenLayout.text: expected 'first' or 'last', found {self.text!r}")
        if self.text_size is not None and (
            self.text_size < 0 or (self.text_size and self.text is None)
        ):
            raise ValueError(
                f"TokenLayout.text_size: expected a number of tokens and their place, found "
                f"{self.text_size} and text={self.text!r}; give text='first' or 'last' with it"
            )
        if self.grid is not None:
            object.__setattr__(self, "grid", tuple(self.grid))
        if self.grid is not None and (len(self.grid) != 3 or min(self.grid) < 1):
            raise ValueError(
                f"TokenLayout.grid: expected (frames, height, width) in tokens, found {self.grid}"
            )


@dataclass(frozen=True)
class Segments:
    """Where the tokens of one sequence are.

    Args:
        text_start: first text token, once those of `lead` are behind the visual ones.
        text_size: how many, 0 for none.
        size: of the whole sequence; the most there can be where it depends on the data.
        grid: of the visual tokens in raster order, None where it is not known.
        note: how this is known, for a person to read.
        n_queries: tokens that ask: all, or the visual ones only, where text is keys and values.
        lead: text tokens in front of the visual ones where there are others after them, else 0.
        is_open: how many of the last text tokens are there depends on the data.
    """

    text_start: int
    text_size: int
    size: int
    grid: Grid | None
    note: str
    n_queries: int
    lead: int = 0
    is_open: bool = False

    @property
    def n_visual(self) -> int:
        """Number of visual tokens."""
        return self.size - self.text_size


def find_segments(node: Node, positions: Positions, layout: TokenLayout) -> Segments | Skip:
    """Return the segments of one attention's sequences, or why they are not known.

    Args:
        node: an attention that the walk has seen.
        positions: what the walk found.
        layout: what the user knows.
    """
    found = _whole(positions.attention[node], positions, layout)
    if node not in positions.present or isinstance(found, Skip):
        return found
    text_is_last = 0 < found.text_start < found.size
    all_visual = found.lead + found.n_visual <= positions.present[node]
    if not (text_is_last and all_visual and found.n_queries == found.size):
        return Skip(
            "a size of it depends on the data, and not only how much of the last text is there",
            intended=False,
        )
    return replace(found, is_open=True, note=f"{found.note}, at most")


def _whole(
    numbers: tuple[Tensor, Tensor, Tensor], positions: Positions, layout: TokenLayout
) -> Segments | Skip:
    query, key, value = numbers
    known = not any(bool((part == UNKNOWN).any()) for part in numbers)
    n_queries, n_keys = query.shape[-1], key.shape[-1]
    if n_queries > n_keys or (n_queries < n_keys and not known):
        return Skip(f"cross-attention: {n_queries} queries, {n_keys} keys", intended=True)
    same = torch.equal(key, value) and (n_queries < n_keys or torch.equal(query, key))
    if known and not same:
        return Skip("cross-attention: keys or values are other tokens than queries", intended=True)
    if layout.text_size is not None:
        found = _given(n_keys, layout)
    elif not known or not bool((key != NOWHERE).any()):
        return Skip(
            "where its tokens come from cannot be followed through the graph; give "
            "layout=TokenLayout(text, text_size, grid)",
            intended=False,
        )
    else:
        found = _traced(key, positions, layout)
    return found if n_queries == n_keys else _of_visual_queries(found, query, key)


def _of_visual_queries(found: Segments | Skip, query: Tensor, key: Tensor) -> Segments | Skip:
    """Return the segments of keys of which queries are the visual ones, or why they are not."""
    if isinstance(found, Segments):
        start = 0 if found.text_start else found.text_size
        if torch.equal(query, key[:, start : start + found.n_visual]):
            return replace(found, n_queries=found.n_visual, note=f"{found.note}, keys only")
    return Skip(f"cross-attention: {query.shape[-1]} queries, {key.shape[-1]} keys", intended=True)


def _given(size: int, layout: TokenLayout) -> Segments | Skip:
    text_size = layout.text_size or 0
    n_visual = size - text_size
    if layout.grid is not None and layout.grid[0] * layout.grid[1] * layout.grid[2] != n_visual:
        return Skip(
            f"the given layout has {text_size} text tokens and the grid {layout.grid}, found a "
            f"sequence of {size}",
            intended=False,
        )
    start = 0 if layout.text == "first" else n_visual
    return Segments(start, text_size, size, layout.grid, "layout as given", size)


def _traced(numbers: Tensor, positions: Positions, layout: TokenLayout) -> Segments | Skip:
    streams = positions.streams
    index = positions.index_of(numbers)  # -1: a learned token
    present: Counter[str] = Counter()
    for i in index.unique().tolist():
        if i >= 0:
            present[streams[i].name] += int((index == i).sum())
    standing_for = positions.standing_for
    returned = {name: n for name, n in present.items() if name in standing_for}
    if positions.returned and not returned:
        names = ", ".join(sorted(present))
        return Skip(
            f"all its tokens are {names}, of which the model returns none; where they are visual, "
            "say so with layout=TokenLayout(text, text_size, grid)",
            intended=True,
        )
    candidates = returned or present
    visual = max(candidates, key=lambda name: candidates[name])
    named = torch.tensor([*(s.name == visual for s in streams), False])  # the last one is -1
    every = ~named[index]
    if not bool((every == every[:1]).all()):
        return Skip(
            f"expected sequences with the tokens of {visual} at the same places, found a batch of "
            "others",
            intended=False,
        )
    is_text = every[0]
    text_size, size = int(is_text.sum()), len(is_text)
    lead = int(is_text.int().argmin())
    if bool(is_text[lead : lead + size - text_size].any()):
        return Skip(
            f"expected text before or after the tokens of {visual}, found both mixed",
            intended=False,
        )
    start = 0 if 0 < lead == text_size else size - text_size
    of = streams[int(index[0, lead if start else text_size])]  # where the first is from
    grid = layout.grid or grid_of(numbers[:, ~is_text], of)
    if grid is not None and grid[0] * grid[1] * grid[2] != size - text_size:
        return Skip(
            f"the given grid {layout.grid} has {grid[0] * grid[1] * grid[2]} tokens, found "
            f"{size - text_size} visual ones",
            intended=False,
        )
    others = sorted(set(present) - {visual}) or (["learned tokens"] if text_size else [])
    place = "first" if start == 0 else "last" if lead == 0 else "on both sides"
    note = f"{text_size} text tokens {place} ({', '.join(others)})" if text_size else "no text"
    return Segments(start, text_size, size, grid, note, size, lead if start else 0)


def grid_of(numbers: Tensor, stream: Stream) -> Grid | None:
    """Return the grid that visual tokens fill in raster order, None where they do not.

    Args:
        numbers: positions of the tokens of each sequence `[R, S]`, from `find_positions`.
        stream: the input they were cut from.
    Returns:
        frames, height and width in tokens; one frame for an image. None for packed tokens, whose
        input has no spatial dimensions, for any other order, and where sequences differ in it.
    """
    end = stream.base + torch.Size(stream.shape).numel()
    if not bool(((numbers >= stream.base) & (numbers < end)).all()):
        return None
    every = torch.stack(torch.unravel_index(numbers - stream.base, stream.shape))
    if not bool((every - every[..., :1] == (every - every[..., :1])[:, :1]).all()):
        return None
    varying = [c for c in every[:, 0] if bool((c != c[0]).any())]
    if not 2 <= len(varying) <= 3:
        return None
    sides = [len(c.unique()) for c in varying]
    if torch.Size(sides).numel() != numbers.shape[-1]:
        return None
    raster = torch.cartesian_prod(*(c.unique() for c in varying))
    if not torch.equal(torch.stack(varying, 1), raster):
        return None
    t, h, w = [1] * (3 - len(sides)) + sides
    return t, h, w
