"""InsertObservers: which layers, which edges, and a reason for everything left alone."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from models import Block, OutOfOrder, Twice
from torch import nn
from torch.fx import GraphModule

import fxq
from fxq.account import account
from fxq.capturing import capture
from fxq.dialect import OBSERVED
from fxq.graph import owner_name
from fxq.layer import layer_of
from fxq.numerics import sqnr_db
from fxq.observers import RangeObserver
from fxq.passes import w8a8
from fxq.passes.common import DEPTHWISE, FIRST, LAST, InsertObservers
from fxq.spec import LayerSpec, PerChannel, PerGroup, PerTensor, PerToken, QuantSpec

WEIGHT = QuantSpec(granularity=PerChannel(0))
STATIC = LayerSpec(QuantSpec(granularity=PerTensor()), WEIGHT)


def graph(model: nn.Module, *shape: int) -> GraphModule:
    return capture(model.eval(), torch.randn(*shape)).graph_module


def chosen(gm: GraphModule) -> set[str]:
    return {owner_name(n) for n in gm.graph.nodes if layer_of(n).spec}


def reasons(gm: GraphModule) -> dict[str, str]:
    return {row.module: row.skip.reason for row in account(gm) if row.skip}


def test_layers_that_share_an_input_share_an_observer() -> None:
    gm = graph(Block(), 2, 5, 64)

    result = InsertObservers(STATIC).run(gm)

    OBSERVED.check(gm)
    observers = [m for m in gm.modules() if isinstance(m, RangeObserver)]
    assert result.modified
    assert chosen(gm) == {"q", "k", "v", "proj", "up", "down"}
    assert len(observers) == 4  # q, k and v read one edge


def test_observed_graph_computes_the_same() -> None:
    model = Block().eval()
    x = torch.randn(2, 5, 64)
    gm = graph(model, 2, 5, 64)

    InsertObservers(STATIC).run(gm)
    gm.recompile()

    assert torch.equal(gm(x)[0], model(x))


def test_a_dynamic_range_needs_no_observer() -> None:
    gm = graph(Block(), 2, 5, 64)
    dynamic = LayerSpec(QuantSpec(granularity=PerToken(), dynamic=True), WEIGHT)

    InsertObservers(dynamic).run(gm)

    assert not [m for m in gm.modules() if isinstance(m, RangeObserver)]
    assert len(chosen(gm)) == 6


def test_a_module_called_twice_is_observed_at_each_call() -> None:
    gm = graph(Twice(), 2, 64)

    InsertObservers(STATIC).run(gm)

    assert len([m for m in gm.modules() if isinstance(m, RangeObserver)]) == 2


def test_first_and_last_go_by_data_flow() -> None:
    gm = graph(OutOfOrder(), 2, 16)

    InsertObservers(STATIC, overrides=((FIRST, None), (LAST, None))).run(gm)

    assert chosen(gm) == {"b"}
    assert reasons(gm) == {"a": "override '<first>'", "c": "override '<last>'"}


def test_depthwise_convolutions_are_those_of_one_channel_a_group() -> None:
    convs = (nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 16, 3, groups=8), nn.Conv2d(16, 4, 1))
    gm = graph(nn.Sequential(*convs), 2, 8, 9, 9)

    InsertObservers(STATIC, ("conv",), ((DEPTHWISE, None),)).run(gm)

    assert chosen(gm) == {"0", "2"}
    assert reasons(gm) == {"1": "override '<depthwise>'"}


def test_the_first_matching_override_wins() -> None:
    gm = graph(OutOfOrder(), 2, 16)
    four_bits = replace(STATIC, weight=replace(WEIGHT, bits=4))

    InsertObservers(STATIC, overrides=(("a", four_bits), ("[ab]", None))).run(gm)

    specs = {owner_name(n): layer_of(n).spec for n in gm.graph.nodes if layer_of(n).spec}
    assert specs == {"a": four_bits, "c": STATIC}


def test_an_override_that_matches_nothing_is_an_error() -> None:
    gm = graph(OutOfOrder(), 2, 16)

    with pytest.raises(ValueError, match=r"override 'aa' matches no layer; did you mean 'a'"):
        InsertObservers(STATIC, overrides=(("aa", None),)).run(gm)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"targets": ("linaer",)}, ValueError, "no kind 'linaer'; did you mean 'linear'"),
        ({"targets": "linear"}, TypeError, "expected a tuple of kinds, found 'linear'"),
        ({"overrides": (("head", "w8"),)}, TypeError, r"found \('head', 'w8'\)"),
        ({"overrides": ("head", None)}, TypeError, "found 'head'"),
        ({"overrides": ((0, None),)}, TypeError, r"found \(0, None\)"),
        ({"default": WEIGHT}, TypeError, r"found \('default', QuantSpec"),
    ],
)
def test_a_misspelt_choice_is_an_error_when_it_is_made(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        InsertObservers(**{"default": STATIC} | arguments)


def test_what_is_not_a_target_says_so() -> None:
    model = nn.Sequential(nn.Conv1d(3, 4, 1), nn.Linear(5, 6))
    gm = graph(model, 2, 3, 5)

    InsertObservers(STATIC).run(gm)

    assert reasons(gm) == {"0": "this recipe quantizes linear only"}


def test_a_group_that_does_not_divide_is_skipped_with_the_reason() -> None:
    gm = graph(OutOfOrder(), 2, 16)
    spec = LayerSpec(None, QuantSpec(granularity=PerGroup(64)))

    InsertObservers(spec).run(gm)

    (row,) = [row for row in account(gm) if row.module == "a" and row.skip]
    assert row.skip is not None
    assert not row.skip.intended
    assert "divisible by 64, found 16" in row.skip.reason
    assert chosen(gm) == {"b", "c"}


def test_a_static_scale_per_token_without_a_token_axis_becomes_one_scale() -> None:
    gm = graph(OutOfOrder(), 2, 16)
    per_token = LayerSpec(QuantSpec(granularity=PerToken()), WEIGHT)

    InsertObservers(per_token).run(gm)

    (layer, *_) = [n for n in gm.graph.nodes if layer_of(n).spec]
    assert layer_of(layer).spec.activation.granularity == PerTensor()
    assert "no fixed token axis" in layer_of(layer).remarks


def test_nothing_to_do_is_not_called_a_change() -> None:
    gm = graph(nn.Conv1d(3, 4, 1), 2, 3, 5)

    assert not InsertObservers(STATIC).run(gm).modified


class Coordinates(nn.Module):
    """Fourier features of points in the plane."""

    def __init__(self) -> None:
        super().__init__()
        self.frequencies, self.up = nn.Linear(2, 64, bias=False), nn.Linear(128, 8)
        self.frequencies.weight.data *= 4

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        angle = 2 * torch.pi * self.frequencies(x)
        return self.up(torch.cat([angle.sin(), angle.cos()], -1))


def test_a_product_of_coordinates_stays_float_unless_it_is_asked_for() -> None:
    model, x = Coordinates().eval(), torch.rand(64, 2)
    gm, asked = (graph(model, 4, 2) for _ in range(2))

    InsertObservers(STATIC).run(gm)
    InsertObservers(STATIC, overrides=(("frequencies", STATIC),)).run(asked)

    assert chosen(gm) == {"up"}
    assert reasons(gm)["frequencies"].startswith("it has 2 input channels")
    assert chosen(asked) == {"frequencies", "up"}
    program = fxq.compress(model, x, w8a8.DYNAMIC, strict=True)  # nothing is missing
    y = torch.rand(33, 2)
    assert sqnr_db(model(y), program(y)) > 35  # 8 with it quantized
    InsertObservers(STATIC).run(four := graph(nn.Linear(4, 4), 2, 4))
    assert len([n for n in four.graph.nodes if layer_of(n).spec]) == 1
