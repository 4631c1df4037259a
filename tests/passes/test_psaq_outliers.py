"""PSAQ-ViT's recipes where the residual stream has outlier channels."""

import sys
from pathlib import Path

import pytest
import torch
from psaq import graph_of, lively
from torch import Tensor, nn

import fxq
from fxq.numerics import sqnr_db
from fxq.observers import RangeObserver
from fxq.passes.common import Calibrate, Convert, InsertObservers, ObserveActivations, WidenRanges
from fxq.passes.common.widen_ranges import outlier_channels, widened_range
from fxq.passes.psaq_vit import PUBLISHED_W8A8, W8A8
from fxq.spec import LayerSpec, PerChannel, PerTensor, QuantSpec

ACTIVATION = QuantSpec(symmetric=False)
LAYER = LayerSpec(ACTIVATION, QuantSpec(granularity=PerChannel(0)))


def planted() -> tuple[nn.Module, Tensor]:
    """A ViT one of whose residual channels is hundreds of times the others in one token."""
    model, example = lively()
    with torch.no_grad():
        model.get_parameter("pos_embed")[0, 3, 5] += 600
    return model, torch.randn(64, *example.shape[1:])


def test_outlier_channels_of_the_residual_stream() -> None:
    model, x = planted()
    exact = model(x)
    found = {}
    for recipe in (PUBLISHED_W8A8, W8A8):
        program = fxq.compress(model, x[:1], recipe, data=[x[:32]])
        out = program(x)[32:]
        agreement = (out.argmax(1) == exact[32:].argmax(1)).double().mean().item()
        found[recipe.name] = agreement, sqnr_db(exact[32:], out)
    assert found[PUBLISHED_W8A8.name][1] < 8, found
    assert found[W8A8.name][0] > 0.9, found
    assert found[W8A8.name][1] > 20, found


def test_widened_ranges_by_hand() -> None:
    low = torch.tensor([[-1.0, 0.0, -4.0, -2.0, -100.0]])
    high = torch.tensor([[0.5, 2.0, 3.0, 1.0, 0.0]])
    widened = widened_range(low, high, 0.5)  # reaches 1, 2, 4, 2, 100; the median is 2
    assert widened[0].tolist() == [[-3.0, 0.0, -6.0, -3.0, -150.0]]
    assert widened[1].tolist() == [[3.0, 3.0, 4.5, 1.5, 0.0]]
    assert outlier_channels(low, high, 16.0).tolist() == [[False, False, False, False, True]]
    assert not outlier_channels(low, high, 50.0).any()
    assert not outlier_channels(low * 0, high * 0, 16.0).any()


class Block(nn.Module):
    """Two sums: one that a norm reads too, and one that is part of the last."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        s = x + self.a(x)
        return self.norm(s + (self.b(self.norm(s)) + 2 * x))


def observers_of(model: nn.Module, x: Tensor, step: ObserveActivations) -> dict[str, QuantSpec]:
    gm = InsertObservers(LAYER, targets=("linear", "conv")).run(graph_of(model, x)).graph_module
    gm = step.run(gm).graph_module
    return {
        name.removesuffix("_observer"): module.spec
        for name, module in gm.named_modules()
        if isinstance(module, RangeObserver) and "input" not in name
    }


def test_terms_of_sums_are_rounded_with_them() -> None:
    x = torch.randn(2, 4, 8)
    every = observers_of(Block(), x, ObserveActivations(ACTIVATION))
    found = observers_of(Block(), x, ObserveActivations(ACTIVATION, terms=False))
    assert set(every) == {"linear", "add", "linear_1", "add_1", "add_2"}
    assert set(found) == {"add", "add_2"}


@pytest.mark.parametrize(("shape", "by_channel"), [((2, 4, 8), True), ((4, 8), False)])
def test_only_sums_with_tokens_have_a_range_per_channel(
    shape: tuple[int, ...], by_channel: bool
) -> None:
    step = ObserveActivations(ACTIVATION, by_channel=("sum",))
    found = observers_of(Block(), torch.randn(shape), step)
    assert found["add"].granularity == (PerChannel(-1) if by_channel else PerTensor())
    assert found["linear"].granularity == PerTensor()


def test_channels_beside_a_convolution_are_the_second_axis() -> None:
    class Residual(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 3, padding=1)
            self.position = nn.Parameter(torch.randn(3, 1, 1))

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.conv(x) + self.position).relu()

    step = ObserveActivations(ACTIVATION, by_channel=("sum", "constant"))
    found = observers_of(Residual(), torch.randn(2, 3, 5, 7), step)
    assert found["add"].granularity == PerChannel(-3)
    assert found["position"].granularity == PerChannel(-3)


def test_a_channel_apart_stays_as_it_was() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            return (x + self.a(x)).view(-1, 4, 8) * 1.0

    model, x = Sum().eval(), torch.randn(2, 4, 8)
    x[0, 0, 6] = 1000.0
    with torch.no_grad():
        model.a.weight[:, 6] = 0
    places = ObserveActivations(ACTIVATION, ("sum",), by_channel=("sum",))
    layers = InsertObservers(LayerSpec(None, LAYER.weight))
    outs = []
    for widen in ((WidenRanges(),), (WidenRanges(apart=1e9),)):
        recipe = fxq.Recipe("sums", (layers, places, Calibrate(), *widen, Convert()))
        outs.append(fxq.compress(model, x, recipe, data=[x])(x))
    exact = fxq.compress(model, x, fxq.Recipe("layers", (layers, Convert())))(x)
    assert torch.equal(outs[0][..., 6], exact[..., 6])
    assert not torch.equal(outs[1][..., 6], exact[..., 6])
    rest = [0, 1, 2, 3, 4, 5, 7]
    assert not torch.equal(outs[0][..., rest], exact[..., rest])
    torch.testing.assert_close(outs[0][..., rest], exact[..., rest], atol=0.05, rtol=0)


@pytest.mark.parametrize("changes", [{"margin": -0.1}, {"apart": 1.0}])
def test_bad_arguments_of_widening(changes: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"WidenRanges.{next(iter(changes))}: expected"):
        WidenRanges(**changes)


@pytest.mark.slow
def test_an_imagenet_vit_keeps_its_predictions(
    shared_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    monkeypatch.setattr(sys, "path", [str(shared_data), *sys.path])
    import zoo

    images, _ = zoo.imagenet_batch(80)
    model = zoo.vit_tiny_imagenet()
    with torch.no_grad():
        exact = model(images[32:]).argmax(1)
        agreement = {}
        for recipe in (PUBLISHED_W8A8, W8A8):
            program = fxq.compress(model, images[:1], recipe, data=list(images[:32].split(8)))
            agreement[recipe.name] = (
                (program(images[32:]).argmax(1) == exact).double().mean().item()
            )
    assert agreement[PUBLISHED_W8A8.name] < 0.1
    assert agreement[W8A8.name] > 0.8
