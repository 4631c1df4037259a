"""How much results feel errors at nodes, against Jacobians that autograd finds one by one."""

import pytest
import torch
from test_blocks import W4A8, Transformer
from torch import Tensor, nn

import fxq
from fxq.errors import UnsupportedError
from fxq.passes.common import without_observers
from fxq.passes.common.reconstruction import cut
from fxq.passes.common.reconstruction.losses import relative_error
from fxq.passes.common.sensitivity import sensitivities
from fxq.pipeline import Recipe


class OneNumber(nn.Module):
    """A model with one number per sample: random signs change nothing, so the result is exact."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(6, 5), nn.Linear(5, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.a(x).tanh())


def test_it_is_the_squared_jacobian_of_a_single_result() -> None:
    model, x = OneNumber().eval(), torch.randn(7, 6)
    gm = fxq.capture(model, x).graph_module
    (linear,) = [n.name for n in gm.graph.nodes if "linear" in n.name][:1]

    found = sensitivities(gm, [(x[:4],), (x[4:],)], [linear])[linear]

    hidden = model.a(x).detach()
    rows = [torch.func.jacrev(lambda h: model.b(h.tanh()))(h)[0] for h in hidden]
    expected = torch.stack(rows).square().mean(0)
    torch.testing.assert_close(found, (expected / expected.mean()).detach())


def test_over_many_draws_it_is_the_diagonal_of_the_gauss_newton_matrix() -> None:
    model, x = Transformer().eval(), torch.randn(1, 6, 16)
    gm = Recipe("o", W4A8).apply(fxq.capture(model, torch.randn(2, 6, 16)).graph_module, [(x,)])
    block = cut(gm)[1]
    exact = without_observers(gm)

    found = sensitivities(exact, [(x,)] * 400, block.outputs)[block.outputs[0]]

    h = model.blocks[0](model.stem(x)).detach()[0]
    rest = lambda h: model.head(model.norm(model.blocks[1](h[None])))[0].softmax(-1)  # noqa: E731
    expected = torch.func.jacrev(rest)(h).square().sum((0, 1)).detach()
    assert relative_error(found, expected / expected.mean()) < 0.02
    alike = relative_error(torch.ones_like(expected), expected / expected.mean())
    assert alike > 0.1


def test_a_value_of_another_shape_is_told() -> None:
    model = OneNumber().eval()
    x = torch.randn(2, 3, 6)
    gm = fxq.capture(model, (x,), dynamic_shapes={"x": {0: "batch", 1: "tokens"}}).graph_module
    name = next(n.name for n in gm.graph.nodes if "linear" in n.name)
    with pytest.raises(UnsupportedError, match=r"one shape at linear, found \[3, 5\] and \[4, 5\]"):
        sensitivities(gm, [(x,), (torch.randn(2, 4, 6),)], [name])


def test_a_gradient_that_is_not_finite_is_told() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            return (self.layer(x) * 0).square().sqrt()  # whose slopes are 0 and infinity

    x = torch.randn(8, 3)
    gm = fxq.capture(Root().eval(), x).graph_module
    names = [node.name for node in gm.graph.nodes if "linear" in node.name]
    with pytest.raises(ValueError, match="expected finite gradients at linear"):
        sensitivities(gm, [(x,)], names)
