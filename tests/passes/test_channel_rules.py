"""Operators between a producer and its consumer: which let a factor through, which a shift too, and
the function stays the same whatever they do."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from scaling import random_scaling
from torch import Tensor, nn
from torch.nn import Conv2d as Conv
from torch.nn import ReLU, Sequential

import fxq
from fxq.graph import owner_name
from fxq.passes.common import check_float_function
from fxq.passes.common.scaling import fold_scaling, scale_sites
from fxq.rewriting import copy_graph

REVERSED = list(range(7, -1, -1))
EIGHT = torch.arange(1, 9).double()
SHIFT, SCALE, NEITHER = "scale and shift", "scale", "neither"


class Between(nn.Module):
    """LayerNorm, then what is tested, then a linear."""

    def __init__(self, f: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.Linear(8, 4)
        self.f = f

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.f(self.norm(self.first(x))))


def overwritten(h: Tensor) -> Tensor:
    h = h + 0
    h[:, :2] = 5
    return h


def written_through_a_view(h: Tensor) -> Tensor:
    h = h * 1.0
    h.view(-1, 2, 4).add_(1)
    return h


def swapped(h: Tensor) -> Tensor:
    return torch.select_scatter(torch.select_scatter(h, h[:, 1], 1, 0), h[:, 0], 1, 1)


PASSES: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "flip": (lambda h: h.flip(-1), SHIFT),
    "roll": (lambda h: h.roll(1, -1), SHIFT),
    "swap of halves": (lambda h: torch.cat(h.split([3, 5], -1)[::-1], -1), SHIFT),
    "interleaving": (lambda h: h.unflatten(-1, (2, 4)).transpose(1, 2).flatten(1), SHIFT),
    "mean over tokens": (lambda h: h[:, None].expand(-1, 3, -1).mean(1), SHIFT),
    "dropout in eval mode": (lambda h: F.dropout(h, 0.5, training=False), SHIFT),
    "repeat": (lambda h: h.repeat(1, 2)[:, 4:12], SHIFT),
    "part written over": (lambda h: h.flip(-1).slice_scatter(h[:, :2], 1, 6, 8), SHIFT),
    "swap by writing over": (swapped, SHIFT),
    "adding a constant": (lambda h: h + EIGHT.to(h), SHIFT),
    "sum over tokens": (lambda h: h[:, None].expand(-1, 3, -1).sum(1), SCALE),
    "relu": (torch.relu, SCALE),
    "leaky relu": (lambda h: F.leaky_relu(h, 0.3), SCALE),
    "negation": (torch.neg, SCALE),
    "doubling": (lambda h: h + h, SCALE),
    "difference": (lambda h: h - h * 3, SCALE),
    "division by a number": (lambda h: h / 2 + h, SCALE),
    "zero padding": (lambda h: F.pad(h, (1, 1))[:, :8], SCALE),
    "product with a constant": (lambda h: h * EIGHT.to(h), SCALE),
    "quotient by a constant": (lambda h: h / EIGHT.to(h), SCALE),
    "constant minus it": (lambda h: EIGHT.to(h) - h, SCALE),
    "gate of something else": (lambda h: h * torch.ones_like(h).sigmoid(), SCALE),
    "own gate": (lambda h: h * h.sigmoid(), NEITHER),
    "square": (lambda h: h * h, NEITHER),
    "gelu": (F.gelu, NEITHER),
    "clamp": (lambda h: h.clamp(0, 1), NEITHER),
    "relu6": (F.relu6, NEITHER),
    "maximum": (lambda h: torch.maximum(h, h * 0.5), NEITHER),
    "where": (lambda h: torch.where(h > 0, h, 0.1 * h), NEITHER),
    "masked fill": (lambda h: h.masked_fill(h > 1, 0.0), NEITHER),
    "cumulative sum": (lambda h: h.cumsum(-1), NEITHER),
    "norm": (lambda h: h / h.norm(), NEITHER),
    "softmax": (lambda h: h.softmax(-1), NEITHER),
    "adding a number": (lambda h: h + 2.0, NEITHER),
    "adding integers": (lambda h: h + torch.arange(8), NEITHER),
    "adding a number per row": (lambda h: h + torch.arange(len(h)).to(h)[:, None], NEITHER),
    "mean over channels": (lambda h: h.mean(-1, keepdim=True) + h, NEITHER),
    "gather by a tensor": (lambda h: h[..., REVERSED], NEITHER),
    "padding with ones": (lambda h: F.pad(h, (1, 0), value=1.0)[:, :8], NEITHER),
    "integers in between": (lambda h: h.int().to(h), NEITHER),
    "outer product": (lambda h: (h[:, :, None] @ h[:, None]).sum(1), NEITHER),
    "fused multiply-add": (lambda h: torch.addcmul(h, h, h), NEITHER),
    "largest token": (lambda h: h[:, None].expand(-1, 3, -1).amax(1), NEITHER),
    "overwritten channels": (overwritten, NEITHER),
    "a write through a view": (written_through_a_view, NEITHER),
}


@pytest.mark.parametrize("name", PASSES)
def test_what_an_operator_lets_through(name: str) -> None:
    operator, expected = PASSES[name]
    torch.manual_seed(0)
    inputs = (torch.randn(3, 8, dtype=torch.float64),)
    gm = fxq.capture(Between(operator).double().eval(), inputs).graph_module
    before = copy_graph(gm)

    sites = scale_sites(gm).sites
    fold_scaling(gm, [random_scaling(site, seed) for seed, site in enumerate(sites)])

    check_float_function(before, gm, [inputs], name=name)
    (site,) = [s for s in sites if "last" in map(owner_name, (p.node for p in s.consumers))]
    found = NEITHER if site.kind == "quantizer" else SCALE if site.why_no_shift else SHIFT
    assert found == expected


IMAGE = (2, 4, 8, 8)
NETWORKS: dict[str, tuple[nn.Module, tuple[int, ...]]] = {
    "depthwise": (
        Sequential(
            Conv(4, 8, 3, groups=4),
            ReLU(),
            Conv(8, 8, 3, groups=8, padding="same"),
            ReLU(),
            Conv(8, 6, 1),
        ),
        IMAGE,
    ),
    "norm before a grouped convolution": (
        Sequential(nn.GroupNorm(2, 4), Conv(4, 8, 3, groups=2)),
        IMAGE,
    ),
    "reflection padding": (
        Sequential(Conv(4, 8, 3), ReLU(), Conv(8, 6, 3, padding=1, padding_mode="reflect")),
        IMAGE,
    ),
    "transposed convolution": (
        Sequential(
            nn.ConvTranspose2d(4, 8, 3), ReLU(), Conv(8, 6, 1), ReLU(), nn.ConvTranspose2d(6, 3, 2)
        ),
        IMAGE,
    ),
    "batch norm": (
        Sequential(
            nn.BatchNorm2d(4, affine=False), Conv(4, 8, 1), nn.BatchNorm2d(8), Conv(8, 3, 3)
        ),
        IMAGE,
    ),
    "three dimensions": (
        Sequential(nn.Conv3d(4, 8, 3), nn.BatchNorm3d(8), ReLU(), nn.Conv3d(8, 6, 1)),
        (2, 4, 5, 5, 5),
    ),
    "pooling": (
        Sequential(
            nn.GroupNorm(1, 4),
            nn.MaxPool2d(3, 2, 1),
            Conv(4, 8, 1),
            nn.AvgPool2d(3, 2, 1),
            Conv(8, 4, 1),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(4, 3),
        ),
        (2, 4, 16, 16),
    ),
    "resizing": (
        Sequential(
            nn.GroupNorm(1, 4),
            nn.Upsample(scale_factor=2),
            Conv(4, 4, 1),
            nn.Upsample(scale_factor=2, mode="bilinear"),
            Conv(4, 3, 1),
        ),
        IMAGE,
    ),
    "pixel shuffle": (
        Sequential(nn.GroupNorm(1, 16), nn.PixelShuffle(2), Conv(4, 4, 1)),
        (2, 16, 4, 4),
    ),
    "flattened image": (
        Sequential(Conv(4, 4, 3), ReLU(), nn.Flatten(), nn.Linear(4 * 36, 3)),
        IMAGE,
    ),
    "post-norm encoder": (nn.TransformerEncoderLayer(32, 4, 64, batch_first=True), (2, 6, 32)),
    "pre-norm encoder": (
        nn.TransformerEncoderLayer(32, 4, 64, batch_first=True, norm_first=True),
        (2, 6, 32),
    ),
    "norm over two dimensions": (Sequential(nn.LayerNorm((3, 4)), nn.Linear(4, 5)), (2, 3, 4)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_networks_keep_their_function_under_random_factors(name: str) -> None:
    model, shape = NETWORKS[name]
    inputs = (torch.randn(shape, generator=torch.Generator().manual_seed(0)).double(),)
    gm = fxq.capture(model.double().eval(), inputs).graph_module
    before = copy_graph(gm)

    sites = scale_sites(gm).sites
    fold_scaling(gm, [random_scaling(site, seed) for seed, site in enumerate(sites)])

    assert sites
    check_float_function(before, gm, [inputs], name=name)
