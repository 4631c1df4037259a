"""What the tests of reconstruction share: data, programs, and what a block gave."""

import functools
from typing import Any

import pytest
import torch
from test_blocks import SmallUNet
from torch import Tensor, nn

import fxq
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.passes.common.reconstruction import (
    Reconstruct,
    Rounding,
)
from fxq.passes.common.reconstruction import frontier as frontier_module
from fxq.passes.common.reconstruction.losses import relative_error
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerChannel, QuantSpec

W3A6 = LayerSpec(QuantSpec(6, symmetric=False), QuantSpec(3, granularity=PerChannel(0)))
FAST = Reconstruct(steps=30, method=Rounding(learning_rate=0.1, penalty_weight=0.1))


def batches(kind: type[nn.Module], count: int, seed: int) -> list[tuple[Tensor, ...]]:
    """Draw rows that lie in a small part of their space, as data does."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(4, 16, generator=torch.Generator().manual_seed(7))

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    if kind is SmallUNet:
        return [(draw(4, 1, 8, 8), draw(4, 4)) for _ in range(count)]
    return [(draw(4, 6, 4) @ mixing + 0.3,) for _ in range(count)]


def compressed(kind: type[nn.Module], *steps: Any, **options: Any) -> tuple[fxq.Program, nn.Module]:
    model = kind().eval()
    data = batches(kind, 5, 0)
    passes = (InsertObservers(W3A6, targets=("linear", "conv")), Calibrate(), *steps, Convert())
    return fxq.compress(model, data[0], Recipe("r", passes), data, **options), model


@functools.cache
def program_of(kind: type[nn.Module], *steps: Any) -> tuple[fxq.Program, nn.Module]:
    """Do it once for all tests that only read the program."""
    return compressed(kind, *steps)


def error(program: nn.Module, model: nn.Module, kind: type[nn.Module]) -> float:
    with torch.no_grad():
        pairs = [(program(*x), model(*x)) for x in batches(kind, 4, 1)]
    return float(torch.stack([relative_error(a, b) for a, b in pairs]).mean())


def results_of_the_last_block(monkeypatch: pytest.MonkeyPatch, name: str) -> list[Tensor]:
    """Return a list that gets what the last quantized block of that name gives, batch by batch."""
    last: list[Tensor] = []
    original = frontier_module.Frontier.run

    def kept(self: Any, chain: Any, block: Any, gm: Any) -> None:
        original(self, chain, block, gm)
        if chain == "found" and block.name == name:
            last[:] = [self.found[k][block.outputs[0]] for k in range(len(self))]

    monkeypatch.setattr(frontier_module.Frontier, "run", kept)
    return last
