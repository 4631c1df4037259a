"""Tensors in plain attributes: constants stay compiled in, and what changes becomes an input."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from fxq.errors import FxqWarning

CHANGES = "its weight is computed at run time"


def inputs_of(gm: GraphModule) -> list[str]:
    return [node.meta["source"] for node in gm.graph.find_nodes(op="placeholder")]


class Remembering(nn.Module):
    """Keeps what it has seen in an attribute, which is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.seen = nn.Linear(16, 16), None

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.seen is not None:
            y = torch.cat((self.seen, y), 1)
        self.seen = y
        return y.mean(1)


@torch.no_grad()
def test_what_a_model_remembers_is_compiled_for_all_runs(
    every_layer_pays: None, built: list[GraphModule]
) -> None:
    model, twin = Remembering().eval(), Remembering().eval()
    twin.load_state_dict(model.state_dict())
    fast = torch.compile(model, backend="fxq", options={"recipe": "float"})
    counts = []
    for _ in range(4):
        model.seen = twin.seen = None
        for x in torch.randn(4, 3, 1, 16):
            torch.testing.assert_close(fast(x), twin(x))
        counts.append(len(built))
    assert counts[1:] == [counts[1]] * 3
    assert ["x", "seen"] in map(inputs_of, built)


class Weighted(nn.Module):
    """Its weight is in an attribute, which is no parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.randn(32, 16)
        self.first = nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.first(x), self.weight)


@torch.no_grad()
def test_a_weight_in_an_attribute_is_quantized(
    every_layer_pays: None, built: list[GraphModule]
) -> None:
    model = Weighted().eval()
    fast = torch.compile(model, backend="fxq", options={"strict": True})
    for x in torch.randn(3, 8, 16):
        torch.testing.assert_close(fast(x), model(x), atol=0.2, rtol=0.1)
    assert list(map(inputs_of, built)) == [["x"]]


@torch.no_grad()
@pytest.mark.parametrize("in_place", [False, True])
def test_a_weight_that_changes_is_an_input_and_its_layer_float(
    in_place: bool, every_layer_pays: None, built: list[GraphModule]
) -> None:
    model, x = Weighted().eval(), torch.randn(8, 16)
    fast = torch.compile(model, backend="fxq")
    fast(x)
    before = model.weight
    for index in range(3):
        if in_place:
            model.weight.mul_(-2)
        else:
            model.weight = torch.randn(32, 16)
        if index:
            found = fast(x)
        else:
            with pytest.warns(FxqWarning, match=CHANGES):
                found = fast(x)
        torch.testing.assert_close(found, model(x), atol=0.2 * 8, rtol=0.1)
    assert (model.weight is before) == in_place
    assert [sorted(names) for names in map(inputs_of, built)] == [["x"], ["weight", "x"]]


@torch.no_grad()
def test_parameters_and_buffers_stay_bound(built: list[GraphModule]) -> None:
    """Also a buffer that is replaced: it is compiled in anew."""
    model = nn.BatchNorm1d(4).eval()
    fast, x = torch.compile(model, backend="fxq", options={"recipe": "float"}), torch.randn(3, 4)
    for _ in range(3):
        model.running_mean = torch.randn(4)
        torch.testing.assert_close(fast(x), model(x))
    assert list(map(inputs_of, built)) == [["0"]] * 3


class TwoGraphs(nn.Module):
    """Reads an attribute in one graph, and writes to it in another."""

    def __init__(self) -> None:
        super().__init__()
        self.linear, self.kept = nn.Linear(16, 16), None

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.ones(16)
        y = self.linear(x) * self.kept
        torch._dynamo.graph_break()
        self.kept.add_(y.mean((0, 1)))
        return y


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_writes_in_place_are_seen_in_every_mode(mode: type, every_layer_pays: None) -> None:
    model, twin = TwoGraphs().eval(), TwoGraphs().eval()
    twin.load_state_dict(model.state_dict())
    fast = torch.compile(model, backend="fxq", options={"recipe": "float"})
    with mode():
        for x in torch.randn(4, 2, 8, 16):
            torch.testing.assert_close(fast(x), twin(x))
