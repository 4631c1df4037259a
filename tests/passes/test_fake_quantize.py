"""Fake quantization: bit-equal to codes and back, gradient by hand, and what Convert makes."""

import math

import pytest
import torch
from models import Block, Computed
from torch import nn

import fxq
from fxq import numerics
from fxq.errors import UnsupportedError
from fxq.observers import RangeObserver
from fxq.passes.common import activation_scales, adopt, fake_quantize, student_of, without_observers
from fxq.passes.psaq_vit import everywhere
from fxq.pipeline import Recipe
from fxq.spec import MinMax

RECIPES = {
    "static": Recipe("static", everywhere("x", 4, 4, MinMax()).passes),
    "dynamic": fxq.pipeline.resolve_recipe("w8a8_dynamic"),
    "weights": fxq.pipeline.resolve_recipe("w8"),
}


def observed(model: nn.Module, x: torch.Tensor, recipe: Recipe) -> torch.fx.GraphModule:
    gm = fxq.capture(model, x).graph_module
    return Recipe(recipe.name, recipe.passes[:-1]).apply(gm, [(x,)])


def test_value_and_gradient_by_hand() -> None:
    x = torch.tensor([-2.0, -0.6, 0.2, 0.9, 5.0], requires_grad=True)
    value = fake_quantize(x, torch.tensor([0.5]), None, -2, 3)
    assert value.tolist() == [-1.0, -0.5, 0.0, 1.0, 1.5]
    value.backward(torch.arange(1.0, 6.0))
    assert x.grad is not None
    assert x.grad.tolist() == [0.0, 2.0, 3.0, 4.0, 0.0]


def test_gradient_of_the_scale_by_hand() -> None:
    x = torch.tensor([[-2.0, -0.6], [0.2, 5.0]])
    scale = torch.tensor([[0.5], [0.25]], requires_grad=True)
    zero = torch.tensor([[0], [1]], dtype=torch.int32)
    fake_quantize(x, scale, zero, -2, 3).backward(torch.tensor([[1.0, 10.0], [1.0, 10.0]]))
    assert scale.grad is not None
    # codes -2 (clipped), -1 | 1 + 1, 3 (clipped); zero-points count: 2 - 1 = 1, 3 - 1 = 2
    expected = [[1 * -2.0 + 10 * (-1 + 0.6 / 0.5)], [1 * (1 - 0.2 / 0.25) + 10 * 2.0]]
    torch.testing.assert_close(scale.grad, torch.tensor(expected))


def test_value_is_bit_equal_to_codes_and_back() -> None:
    x = torch.randn(7, 33) * 3
    scale, zero = torch.rand(7, 1) + 0.01, torch.randint(-8, 8, (7, 1), dtype=torch.int32)
    codes = numerics.quantize(x, scale, zero, -8, 7)
    expected = numerics.dequantize(codes, scale, zero, torch.float32)
    assert torch.equal(fake_quantize(x, scale, zero, -8, 7), expected)


@pytest.mark.parametrize("name", RECIPES)
def test_student_is_what_convert_makes_also_after_training(name: str) -> None:
    recipe, model, x = RECIPES[name], Block().eval(), torch.randn(3, 6, 64)
    gm = observed(model, x, recipe)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    reference = without_observers(gm)(x)[0].detach()
    torch.testing.assert_close(reference, model(x), atol=1e-5, rtol=1e-4)
    student = student_of(gm)
    optimizer = torch.optim.Adam(student.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        loss = (student(x)[0] - reference).abs().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] != losses[0]
    learned = [p for p in student.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in learned)
    trained = student(x)[0].detach()
    assert not torch.equal(trained, student_of(gm)(x)[0])
    adopt(gm, student)
    converted = Recipe(recipe.name, recipe.passes[-1:]).apply(gm)
    assert torch.equal(converted(x)[0], trained)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_scales_of_activations_train_and_zero_points_stay() -> None:
    x = torch.randn(3, 6, 64)
    gm = observed(Block().eval(), x, RECIPES["static"])
    student = student_of(gm)
    found = {n: m.qparams() for n, m in gm.named_modules() if isinstance(m, RangeObserver)}
    gains = activation_scales(student)
    assert len(gains) == len(found)
    for gain in gains:
        gain.data += 0.1
    adopt(gm, student)
    for name, (scale, zero) in found.items():
        observer = gm.get_submodule(name)
        assert isinstance(observer, RangeObserver)
        trained, same = observer.qparams()
        torch.testing.assert_close(trained, scale * math.exp(0.1))
        assert torch.equal(same, zero)
        with pytest.raises(UnsupportedError, match="merge before training"):
            observer.merge(observer)


def test_shared_weights_stay_shared() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
            self.b.weight = self.a.weight

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.b(self.a(x))

    x = torch.randn(2, 64)
    gm = observed(Twice().eval(), x, RECIPES["weights"])
    student = student_of(gm)
    assert len(list(student.parameters())) == 3  # one weight, two biases


def test_half_precision_is_refused() -> None:
    model, x = Block().eval().bfloat16(), torch.randn(2, 3, 64, dtype=torch.bfloat16)
    with pytest.raises(UnsupportedError, match="expected float32 to train in"):
        student_of(observed(model, x, RECIPES["weights"]))


def test_constants_made_of_parameters_train() -> None:
    model, x = Computed().eval(), torch.randn(2, 3, 64)

    student = student_of(observed(model, x, RECIPES["weights"]))

    student(x)[0].square().mean().backward()
    trained = {name for name, p in student.named_parameters() if p.grad.abs().sum() > 0}
    made = {"norm_weight_constant", "q_bias_constant", "rows_constant", "out.weight_constant"}
    assert trained == made | {"qkv.weight", "out.bias"}
