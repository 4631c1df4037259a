"""Where tokens come from, operator by operator, and what follows for the layout."""

from collections.abc import Callable
from typing import Any

import families
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

import fxq
from fxq.analysis.positions import find_positions
from fxq.analysis.streams import Stream
from fxq.layer import Skip
from fxq.passes.rectified_spaattn.segments import Segments, TokenLayout, find_segments, grid_of


class Attend(nn.Module):
    """Self-attention over what a function makes of video and text; returns the video's part."""

    def __init__(self, tokens: Callable[[Tensor, Tensor], Tensor], returned: slice) -> None:
        super().__init__()
        self.tokens, self.returned = tokens, returned
        self.embed = nn.Linear(8, 8)

    def forward(self, video: Tensor, text: Tensor) -> Tensor:
        x = self.embed(self.tokens(video, text))[:, None]
        return F.scaled_dot_product_attention(x, x, x)[:, 0, self.returned]


def segments(model: nn.Module, example: Any, layout: TokenLayout | None = None) -> list[Any]:
    return segments_of(fxq.capture(model.eval(), example).graph_module, layout)


def segments_of(gm: GraphModule, layout: TokenLayout | None = None) -> list[Any]:
    positions = find_positions(gm)
    return [find_segments(node, positions, layout or TokenLayout()) for node in positions.attention]


def flat(video: Tensor) -> Tensor:
    """`[B, 8, T, H, W]` to tokens `[B, T H W, 8]`."""
    return video.flatten(2).transpose(1, 2)


def in_place(video: Tensor, text: Tensor) -> Tensor:
    tokens = torch.cat([text, flat(video)], 1)
    tokens[:, 4:, ::2] = tokens[:, 4:, 1::2] * 2
    return tokens


def modulated(video: Tensor, text: Tensor) -> Tensor:
    pooled = text.mean(1, keepdim=True)
    return torch.cat([pooled * flat(video) + text[:, :1], text * pooled], 1)


def complex_rotary(video: Tensor, text: Tensor) -> Tensor:
    pairs = torch.view_as_complex(flat(video).contiguous().unflatten(-1, (-1, 2)))
    angle = torch.polar(torch.ones(48, 4), torch.arange(48.0)[:, None] * torch.ones(4))
    return torch.view_as_real(pairs * angle).flatten(2)


def between(video: Tensor, text: Tensor) -> Tensor:
    first, second = flat(video).split([10, 38], 1)
    return torch.cat([first, text, second], 1)


def patched(video: Tensor, text: Tensor) -> Tensor:
    """Patches of two frames, cut by reshaping: channels, then t, h, w."""
    patches = video[:, :4].unflatten(2, (2, 2)).permute(0, 2, 4, 5, 1, 3)
    return patches.flatten(4).flatten(1, 3)


@pytest.mark.parametrize(
    ("tokens", "n_visual", "start", "size", "grid"),
    [
        (lambda v, t: flat(v), 48, 48, 0, (4, 3, 4)),
        (lambda v, t: torch.cat([flat(v), t], 1), 48, 48, 4, (4, 3, 4)),
        (lambda v, t: torch.cat([t[:, :1], flat(v), t[:, 1:]], 1), 48, 48, 4, (4, 3, 4)),
        (in_place, 48, 0, 4, (4, 3, 4)),
        (modulated, 48, 48, 4, (4, 3, 4)),
        (patched, 24, 24, 0, (2, 3, 4)),
        (complex_rotary, 48, 48, 0, (4, 3, 4)),
        (lambda v, t: flat(v[:, :, :1]), 12, 12, 0, (1, 3, 4)),
        (lambda v, t: flat(v.transpose(2, 4)), 48, 48, 0, None),  # columns first: not raster order
        (lambda v, t: flat(v)[:, ::2], 24, 24, 0, (4, 3, 2)),
        (lambda v, t: F.pad(flat(v), (0, 0, 3, 0)), 48, 0, 3, (4, 3, 4)),
    ],
)
def test_segments_and_grid_follow_the_tokens(
    tokens: Any, n_visual: int, start: int, size: int, grid: Any
) -> None:
    returned = slice(size, None) if start == 0 and size else slice(0, n_visual)
    example = (torch.randn(2, 8, 4, 3, 4), torch.randn(2, 4, 8))

    (found,) = segments(Attend(tokens, returned), example)

    assert isinstance(found, Segments), found
    assert (found.text_start, found.text_size, found.n_visual) == (start, size, n_visual)
    assert found.grid == grid


def test_a_table_of_angles_among_the_inputs_hides_no_tokens() -> None:
    class Rotated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mix = nn.Linear(8, 24)

        def forward(self, x: Tensor, angles: Tensor) -> Tensor:
            q, k, v = self.mix(x).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
            q, k = (y * angles.cos()[:, None] for y in (q, k))
            return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)

    (found,) = segments(Rotated(), (torch.randn(2, 12, 8), torch.randn(2, 12, 4)))

    assert isinstance(found, Segments), found
    assert (found.text_size, found.n_visual) == (0, 12)


@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_stride_one_keeps_the_grid(bias: bool) -> None:
    conv = nn.Conv3d(8, 8, 1, bias=bias)
    model = Attend(lambda v, t: flat(conv(v)), slice(0, 48))
    model.conv = conv

    (found,) = segments(model, (torch.randn(2, 8, 4, 3, 4), torch.randn(2, 4, 8)))

    assert isinstance(found, Segments), found
    assert found.grid == (4, 3, 4)


def test_a_convolution_without_a_batch_is_unknown_rather_than_an_error() -> None:
    conv = nn.Conv3d(8, 8, 1, bias=False)
    model = Attend(lambda v, t: flat(torch.stack([conv(v[0]), conv(v[1])])), slice(0, 48))
    model.conv = conv

    (found,) = segments(model, (torch.randn(2, 8, 4, 3, 4), torch.randn(2, 4, 8)))

    assert isinstance(found, Skip)
    assert found.reason.startswith("where its tokens come from cannot be followed")


def test_packed_tokens_have_no_grid_but_take_a_given_one() -> None:
    model = Attend(lambda v, t: torch.cat([t, v], 1), slice(4, None))
    example = (torch.randn(2, 12, 8), torch.randn(2, 4, 8))

    (found,), (given,) = (
        segments(model, example, layout) for layout in (None, TokenLayout(grid=(1, 3, 4)))
    )

    assert (found.text_size, found.grid) == (4, None)
    assert (given.text_size, given.grid) == (4, (1, 3, 4))


@pytest.mark.parametrize(
    ("tokens", "reason"),
    [
        (between, "expected text before or after the tokens of video, found both mixed"),
        (lambda v, t: t, "all its tokens are text, of which the model returns none"),
        (lambda v, t: flat(v).sort(1).values, "where its tokens come from cannot be followed"),
    ],
)
def test_what_cannot_be_told_apart_has_a_reason(tokens: Any, reason: str) -> None:
    class Model(Attend):
        def forward(self, video: Tensor, text: Tensor) -> Tensor:
            return video + super().forward(video, text).mean((1, 2)).view(-1, 1, 1, 1, 1)

    example = (torch.randn(2, 8, 4, 3, 4), torch.randn(2, 4, 8))

    (found,) = segments(Model(tokens, slice(None)), example)

    assert isinstance(found, Skip)
    assert found.reason.startswith(reason)


@pytest.mark.parametrize(
    ("family", "text", "grid"),
    [("vit", (0, 1), (1, 4, 4)), ("deit", (0, 2), (1, 4, 4)), ("dit", (16, 0), (1, 4, 4))],
)
def test_class_tokens_count_as_text(family: str, text: Any, grid: Any) -> None:
    for found in segments_of(families.family(family).graph):
        assert (found.text_start, found.text_size) == text
        assert found.grid == grid


def test_a_unet_has_a_grid_until_upsampling_repeats_positions() -> None:
    found = segments_of(families.family("unet_condition").graph)

    assert [s.grid for s in found[0::2]] == [(1, 8, 8), (1, 4, 4), None, None]
    assert all("cross-attention" in s.reason for s in found[1::2])


def test_windows_are_sequences_of_their_own() -> None:
    found = segments_of(families.family("swin").graph)

    assert all((s.text_size, s.n_visual) == (0, 16) for s in found)
    assert found[0].grid == (1, 4, 4)  # not shifted


def frames(video: Tensor, text: Tensor) -> Tensor:
    """`[B, 8, T, H, W]` to the tokens of each frame `[B T, H W, 8]`."""
    return video.permute(0, 2, 3, 4, 1).flatten(2, 3).flatten(0, 1)


def frames_and_text(video: Tensor, text: Tensor) -> Tensor:
    return torch.cat([text.repeat_interleave(4, 0), frames(video, text)], 1)


def over_time(video: Tensor, text: Tensor) -> Tensor:
    return video.permute(0, 3, 4, 2, 1).flatten(1, 2).flatten(0, 1)


@pytest.mark.parametrize(
    ("tokens", "text", "n_visual", "grid"),
    [
        (frames, 0, 12, (1, 3, 4)),
        (frames_and_text, 4, 12, (1, 3, 4)),
        (over_time, 0, 4, None),
    ],
)
def test_sequences_of_a_batch_may_stand_at_different_places(
    tokens: Any, text: int, n_visual: int, grid: Any
) -> None:
    example = (torch.randn(2, 8, 4, 3, 4), torch.randn(2, 4, 8))

    (found,) = segments(Attend(tokens, slice(text, None)), example)

    assert isinstance(found, Segments), found
    assert (found.text_size, found.n_visual, found.grid) == (text, n_visual, grid)


def test_sequences_of_a_batch_have_the_same_parts() -> None:
    def unequal(video: Tensor, text: Tensor) -> Tensor:
        return torch.cat([flat(video)[:, :4], text, flat(video)[:, 4:8]], 1).reshape(4, 6, 8)

    example = (torch.randn(2, 8, 4, 3, 4), torch.randn(2, 4, 8))

    (found,) = segments(Attend(unequal, slice(None)), example)

    assert isinstance(found, Skip)
    assert found.reason.startswith("expected sequences with the tokens of video at the same places")


def test_a_grid_needs_every_token_once_in_raster_order() -> None:
    stream = Stream("video", (2, 3, 4), base=5)
    tokens = torch.arange(24)[None] + 5

    assert grid_of(tokens, stream) == (2, 3, 4)
    assert grid_of(tokens.flip(1), stream) is None
    assert grid_of(tokens[:, :-1], stream) is None
    assert grid_of(tokens[:, :4], stream) is None  # one row


class Control(nn.Module):
    """A branch of its own for the control video, added to the main one."""

    def __init__(self, added: bool) -> None:
        super().__init__()
        self.added, self.embed = added, nn.Linear(8, 8)

    def forward(self, video: Tensor, control: Tensor) -> Tensor:
        x, y = (self.embed(flat(z))[:, None] for z in (video, control))
        y = F.scaled_dot_product_attention(y, y, y)
        x = x + (y if self.added else y.mean(2, keepdim=True))
        return F.scaled_dot_product_attention(x, x, x)[:, 0]


def test_what_is_added_token_by_token_to_the_latents_is_visual() -> None:
    example = (torch.randn(2, 8, 4, 3, 4), torch.randn(2, 8, 4, 3, 4))

    branch, main = segments(Control(True), example)
    alone, _ = segments(Control(False), example)

    assert (branch.n_visual, branch.text_size, branch.grid) == (48, 0, (4, 3, 4))
    assert (main.n_visual, main.text_size, main.grid) == (48, 0, (4, 3, 4))
    assert isinstance(alone, Skip)
    assert "say so with layout=TokenLayout" in alone.reason
