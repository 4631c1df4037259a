"""The graph as a whole: its error on batches held out, and scalings undone where they cost."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import pytest
import torch
from models import Block
from torch import Tensor, nn
from torch.fx import GraphModule

import fxq
from fxq.graph import owner_name
from fxq.layer import layer_of
from fxq.passes import smoothquant, w8a8
from fxq.passes.common.scaling import (
    Candidate,
    EquivalentScaling,
    ScaleSite,
    Scaling,
    Statistics,
    scale_sites,
    undo,
)
from fxq.passes.common.whole import Halves, WholeError, halves_of, whole_error
from fxq.rewriting import copy_graph
from fxq.spec import LayerSpec, MinMax, PerToken, QuantSpec


def batches(n: int, size: int = 8) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [(torch.randn(size, 9, 64, generator=generator),) for _ in range(n)]


class Quiet(nn.Module):
    """Two layers read a norm. The second reads a channel that is small, and hardly counts in the
    output, so that what helps it does not help."""

    def __init__(self, share: float) -> None:
        super().__init__()
        self.norm, self.share = nn.LayerNorm(64), share
        self.loud, self.quiet, self.down = (nn.Linear(64, 64) for _ in range(3))
        with torch.no_grad():
            self.norm.weight[0] = 0.01
            self.loud.weight[:, 0] = 0
            self.quiet.weight[:, 1:] = 0
            self.quiet.bias.zero_()
            self.loud.weight[:4] *= 8  # channels that SmoothQuant can make alike
            self.down.weight[:, :4] /= 8

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        return self.down(nn.functional.gelu(self.loud(h))) + self.share * self.quiet(h)


@dataclass(frozen=True)
class Amplify(EquivalentScaling):
    """Make the first channel of a norm far larger than the others, smooth other sites."""

    layer: LayerSpec = w8a8.STATIC_LAYER

    def candidates(self, site: ScaleSite, statistics: Statistics) -> Iterable[Candidate]:
        scale = smoothquant.smoothing_scale(statistics.amax, statistics.weight_amax, 0.5)
        if site.kind == "norm":
            scale = torch.ones(site.n_channels)
            scale[0] = 1 / 4000
        yield Candidate(scale)


def quiet(share: float, data: list[tuple[Tensor]]) -> GraphModule:
    torch.manual_seed(0)
    return fxq.capture(Quiet(share).eval(), data[0]).graph_module


def treatments(gm: GraphModule) -> dict[str, str]:
    layers = [n for n in gm.graph.nodes if layer_of(n).treatments]
    return {owner_name(n): layer_of(n).remarks for n in layers}


@pytest.mark.parametrize("n", [4, 1])
def test_a_site_that_is_best_for_its_layers_and_costs_the_output_is_undone(n: int) -> None:
    data = batches(n, size=32 // n)
    gm = quiet(1e-5, data)
    with torch.no_grad():
        exact = gm(*data[0])[0]

    Amplify().run(gm, data)

    remarks = treatments(gm)
    assert remarks["loud"] == remarks["quiet"]
    assert remarks["loud"].startswith("Amplify: undone: with its norm sites the pooled")
    assert remarks["loud"].endswith("on batches held out")
    assert remarks["down"] == "Amplify (quantizer)"  # what helps stays
    assert gm.state_dict()["norm.weight"][0] == pytest.approx(0.01)
    with torch.no_grad():
        assert torch.allclose(gm(*data[0])[0], exact, atol=1e-4)


def test_a_site_that_helps_the_output_stays_and_the_whole_can_be_left_unjudged() -> None:
    data = batches(4)
    loud, unjudged = quiet(1e3, data), quiet(1e-5, data)

    Amplify().run(loud, data)
    Amplify(whole=False).run(unjudged, data)

    for gm in (loud, unjudged):
        assert treatments(gm)["loud"] == treatments(gm)["quiet"] == "Amplify (norm)"


def errors(*each: float) -> WholeError:
    """Of samples whose outputs have squares of 1."""
    relative = torch.tensor(each, dtype=torch.float64)
    return WholeError(relative / len(each), relative)


@pytest.mark.parametrize(
    ("found", "other", "cost"),
    [
        ((0.01, 0.02), (0.01, 0.02), ""),
        ((0.02, 0.02), (0.01, 0.01), "the pooled error may be 3.0 dB larger"),
        # Each of four is halved: sure. One is, of which all depends: the others count.
        ((0.5, 0.05, 0.05, 0.05), (1.0, 0.1, 0.1, 0.1), ""),
        ((0.5, 0.11, 0.11, 0.11), (1.0, 0.1, 0.1, 0.1), "the pooled error may be 0.4 dB larger"),
        ((0.5, 0.15, 0.15, 0.15), (1.0, 0.1, 0.1, 0.1), "the pooled error may be 1.0 dB larger"),
        ((0.10, 0.11, 0.12, 0.15), (0.40, 0.40, 0.40, 0.14), ""),
        ((0.1, 0.1, 0.1, 0.5), (0.4, 0.4, 0.4, 0.4), "the worst sample's error was 1.0 dB larger"),
        ((0.1,) * 15 + (0.35,), (0.3,) * 16, "the worst sample's error was 0.7 dB larger"),
        ((0.1, math.inf), (0.1, 0.1), "the pooled error may be inf dB larger"),
        ((0.1, math.inf), (0.2, math.inf), ""),
        ((0.1,), (0.2,), ""),
        ((0.2,), (0.1,), "the pooled error may be 3.0 dB larger"),
        ((0.1, 0.1), (0.0, 0.0), "the pooled error may be inf dB larger"),
    ],
)
def test_a_gain_has_to_be_more_than_chance(
    found: tuple[float, ...], other: tuple[float, ...], cost: str
) -> None:
    told = undo.likely_cost(errors(*found), errors(*other))

    assert told.startswith(cost)
    assert bool(told) == bool(cost)


def test_samples_of_both_halves_count(monkeypatch: pytest.MonkeyPatch) -> None:
    data = batches(4)
    gm = quiet(1e3, data)
    scaled = quiet(1e3, data)
    folds = [Halves(data[:2], data[2:], held_out=True), Halves(data[2:], data[:2], held_out=True)]
    of = {0: errors(0.05, 0.05), 1: errors(0.3, 0.3)}

    def error_of(graph: GraphModule, _: GraphModule, halves: Halves, *__: object) -> WholeError:
        return of[0 if halves is folds[0] else 1] if graph is scaled else errors(0.1, 0.1)

    monkeypatch.setattr(undo, "whole_error", error_of)
    monkeypatch.setattr(undo, "scaled_copy", lambda gm, scalings: scaled if scalings else gm)
    site = replace(scale_sites(gm).sites[0], kind="norm")
    scalings = [Scaling(site, torch.ones(site.n_channels))]

    def costs() -> dict[str, str]:
        both = [(scalings, halves) for halves in folds]
        return undo.costs_of_scaling(gm, both, w8a8.STATIC_LAYER, ("linear",))

    assert costs() == {"norm": "the pooled error may be 4.3 dB larger"}
    of[1] = errors(0.05, 0.05)
    assert costs() == {}


def test_the_error_is_that_of_outputs_on_the_other_half() -> None:
    data = batches(5)
    torch.manual_seed(0)
    gm = fxq.capture(Block().eval(), data[0]).graph_module
    even, odd = data[::2], data[1::2]

    found = whole_error(gm, gm, halves_of(gm, data), w8a8.STATIC_LAYER, ("linear",))

    quantized = w8a8.STATIC.apply(copy_graph(gm), even)
    with torch.no_grad():
        pairs = [(gm(*x)[0], quantized(*x)[0]) for x in odd]
    exact = torch.cat([a for a, _ in pairs]).double()
    error = torch.cat([b for _, b in pairs]).double() - exact
    each = [float(e.square().sum() / s.square().sum()) for e, s in zip(error, exact, strict=True)]
    pooled = float(error.square().sum() / exact.square().sum())
    assert float(found.shares.sum()) == pytest.approx(pooled)
    assert found.relative.tolist() == pytest.approx(each)
    assert layer_of(next(n for n in gm.graph.nodes if "linear" in n.name)).treatments == ()


def test_the_only_batch_is_cut_where_its_size_is_free() -> None:
    data = batches(1, size=6)
    model = Block().eval()
    free = fxq.capture(model, data[0]).graph_module
    fixed = fxq.capture(model, data[0], dynamic_shapes=None).graph_module

    cut, whole = halves_of(free, data), halves_of(fixed, data)

    assert cut.held_out
    assert torch.equal(next(iter(cut.fit))[0], data[0][0][::2])
    assert torch.equal(next(iter(cut.judge))[0], data[0][0][1::2])
    assert [fold.fit for fold in cut.folds] == [fold.judge for fold in reversed(cut.folds)]
    assert len(cut.folds) == 2
    assert not whole.held_out
    assert whole.folds == [whole]
    assert [*whole.fit] == [*whole.judge] == data
    assert not halves_of(free, batches(1, size=3)).held_out


class Steps(nn.Module):
    """Two inputs, of which one has no batch; two outputs, one of which has none; and a mask."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(64), nn.Linear(64, 8)

    def forward(self, x: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        y = self.linear(self.norm(x)) * t
        return y, torch.where(y > 0, 0.0, -torch.inf), y.sum((0, 1))


@pytest.mark.parametrize("n", [1, 3])
def test_inputs_and_outputs_without_a_batch_are_judged_with_the_others(n: int) -> None:
    data = [(x, torch.tensor(2.0)) for (x,) in batches(n)]
    gm = fxq.capture(Steps().eval(), data[0]).graph_module
    activation = QuantSpec(symmetric=True, granularity=PerToken(), dynamic=True)
    layer = LayerSpec(activation, QuantSpec(observer=MinMax()))

    found = whole_error(gm, gm, halves_of(gm, data), layer, ("linear",))

    assert 0 < float(found.shares.sum()) <= float(found.relative.max()) < 1e-2
    assert len(found.shares) == len(found.relative) == {1: 4, 3: 8}[n]


def test_a_half_has_no_more_batches_than_it_needs() -> None:
    data = [(torch.full((100, 2), float(index)),) for index in range(9)]

    halves = halves_of(fxq.capture(nn.Linear(2, 2).eval(), data[0]).graph_module, data)

    assert [float(x[0, 0]) for (x,) in halves.fit] == [0, 2, 4]
    assert [float(x[0, 0]) for (x,) in halves.judge] == [1, 3, 5]


def test_no_data_is_refused() -> None:
    gm = fxq.capture(Block().eval(), batches(1)[0]).graph_module

    with pytest.raises(ValueError, match="expected at least one batch"):
        whole_error(gm, gm, halves_of(gm, []), w8a8.STATIC_LAYER, ("linear",))
