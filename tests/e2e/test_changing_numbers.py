"""Python numbers that change from call to call, which Dynamo makes inputs of a graph."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from fxq.errors import FxqWarning
from fxq.pipeline import FLOAT


class Scaled(nn.Module):
    """A number that changes from call to call: Dynamo makes an input of it."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.factor = nn.Linear(8, 8), 1.0

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.layer(x * self.factor)) / self.factor + self.factor


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.slow)]
)
def test_a_graph_with_a_number_that_changes_is_never_left_to_eager(
    dtype: torch.dtype, built: list[GraphModule]
) -> None:
    model, x = Scaled().eval().to(dtype), torch.randn(3, 8, dtype=dtype)
    fast = torch.compile(model, backend="fxq", options={"recipe": FLOAT}, fullgraph=True)

    for factor in (1.0, 2.5, 0.3):
        model.factor = factor
        with torch.no_grad():
            found = fast(x)
        assert found.dtype == dtype
        torch.testing.assert_close(found, model(x))
    # The first takes the number for a constant, the second has it as an input, which Inductor gives
    # back: Dynamo makes constants of it from there on.
    assert len(built) == 4


class Slope(nn.Module):
    def __init__(self, rounds: bool = False) -> None:
        super().__init__()
        self.layer, self.slope, self.rounds = nn.Linear(8, 8), 0.1, rounds

    def forward(self, x: Tensor) -> Tensor:
        if self.rounds:
            return self.layer(x) * round(self.slope)
        return torch.nn.functional.leaky_relu(self.layer(x), self.slope)


@pytest.mark.parametrize("rounds", [False, True])
def test_a_number_that_must_stay_one_leaves_the_graph_as_it_is_and_says_so(rounds: bool) -> None:
    model, x = Slope(rounds).eval(), torch.randn(3, 8)
    fast = torch.compile(model, backend="fxq", options={"recipe": FLOAT}, fullgraph=True)
    with torch.no_grad():
        fast(x)

    model.slope = 2.3
    with torch.no_grad(), pytest.warns(FxqWarning, match="Inductor compiles a graph as it is"):
        found = fast(x)

    torch.testing.assert_close(found, model(x))


def test_a_graph_without_such_a_number_gets_no_casts(built: list[GraphModule]) -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), torch.randn(3, 8)
    with torch.no_grad():
        torch.compile(model, backend="fxq", options={"recipe": FLOAT})(x)

    calls = [str(n.target) for n in built[0].graph.nodes if n.op == "call_function"]
    assert calls == ["aten.linear.default", "aten.relu.default"]


def test_a_number_that_changes_beside_a_write_is_written_with() -> None:
    class Writes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.factor = 1.0
            self.register_buffer("kept", torch.zeros(3, 8))

        def forward(self, x: Tensor) -> Tensor:
            self.kept.add_(x * self.factor)
            return self.kept + 1

    model, reference, x = Writes().eval(), Writes().eval(), torch.randn(3, 8)
    fast = torch.compile(model, backend="fxq", options={"recipe": FLOAT}, fullgraph=True)

    for factor in (1.0, 2.5, 0.3):
        model.factor = reference.factor = factor
        with torch.no_grad():
            torch.testing.assert_close(fast(x), reference(x))
        torch.testing.assert_close(model.kept, reference.kept)
