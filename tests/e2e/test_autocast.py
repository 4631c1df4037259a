"""Regions of `torch.autocast`: inside a model, and around the calls that compress it."""

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxq
from fxq.errors import FxqWarning, UnsupportedError
from fxq.numerics import sqnr_db
from fxq.pipeline import FLOAT


class Cast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.layer(x)
        return y.float() + x


def test_a_region_of_autocast_is_left_to_inductor_and_refused_by_capture() -> None:
    model, x = Cast().eval(), torch.randn(3, 8)

    with torch.no_grad(), pytest.warns(FxqWarning, match="as it is: .*a region of torch.autocast"):
        torch.testing.assert_close(torch.compile(model, backend="fxq")(x), model(x))
    with pytest.raises(UnsupportedError, match="cast the model instead"):
        fxq.compress(model, x, "w8")


class Angles(nn.Module):
    """Switches autocast off around what must stay exact, as model libraries do."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)
        self.register_buffer("count", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast("cuda", enabled=False):
            y = self.layer(x)
            with torch.amp.autocast("cpu", torch.float32):  # no dtype to cast to: off
                self.count += 1
                y = y * torch.arange(8.0) * self.count
        return y + x


@pytest.mark.filterwarnings("ignore:In CPU autocast")
def test_a_region_that_casts_nothing_is_no_obstacle(built: list[GraphModule]) -> None:
    model, judge, x = Angles().eval(), Angles().eval(), torch.randn(3, 8)
    judge.load_state_dict(model.state_dict())
    enter = torch.autocast.__enter__

    program = fxq.compress(model, x, "w8a8_dynamic", strict=True)
    assert torch.autocast.__enter__ is enter
    fast = torch.compile(model, backend="fxq", options={"recipe": FLOAT})

    for _ in range(2):
        with torch.no_grad():
            expected = judge(x)
            torch.testing.assert_close(fast(x), expected)
        assert sqnr_db(expected, program(x)) > 30
    assert len(built) == 1
    torch._dynamo.reset()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        with pytest.warns(FxqWarning, match="as it is: .*a region of torch.autocast"):
            torch.testing.assert_close(fast(x), judge(x), rtol=1e-2, atol=1e-2)
        inside = fxq.compress(judge, x, "w8a8_dynamic")  # as outside, where it casts nothing
    with torch.no_grad():
        expected = judge(x)
    assert sqnr_db(expected, inside(x)) > 30


@pytest.mark.parametrize("recipe", ["float", "w8a8_static"])
def test_compressing_inside_autocast_is_compressing_outside(recipe: str) -> None:
    model, x = (
        nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 8)).eval(),
        torch.rand(8, 32),
    )
    outside = fxq.compress(model, x, recipe, data=[x, x + 0.1])

    with torch.autocast("cpu", torch.bfloat16):
        inside = fxq.compress(model, x, recipe, data=[x, x + 0.1])
        captured = fxq.capture(model, x)

    assert inside(x).dtype == captured.graph_module(x)[0].dtype == torch.float32
    assert torch.equal(inside(x), outside(x))
