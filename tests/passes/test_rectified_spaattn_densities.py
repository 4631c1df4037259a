"""Density schedules: which row holds, and that it is a tensor that decides."""

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparse_models import JointAttention, joint_inputs
from torch import Tensor, nn

import fxq
from fxq import set_step
from fxq.passes.rectified_spaattn import ReplaceAttention, set_densities
from fxq.passes.rectified_spaattn.densities import density_table
from fxq.pipeline import Recipe
from fxq.program import Program
from fxq.rows import ByPosition, ByStep, ByTimestep, Rows

SMALL = ReplaceAttention(density=0.3, block_size=4, min_tokens=8, keep_neighbours=False)


def compressed(
    density: Any, rows: Rows | None = None, **kwargs: Any
) -> tuple[nn.Module, Program, dict[str, torch.Tensor]]:
    model, example = JointAttention().eval(), joint_inputs() | kwargs
    recipe = Recipe("test", (replace(SMALL, density=density, rows=rows),))
    return model, fxq.compress(model, example, recipe, strict=True), example


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(16, 48)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.mix(x).unflatten(-1, (3, 2, 8)).permute(2, 0, 3, 1, 4)
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class TwoLayers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Layer(), Layer()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(x + self.first(x))


def is_dense(model: nn.Module, program: Program, example: dict[str, torch.Tensor]) -> bool:
    with torch.no_grad():
        return torch.allclose(program(**example), model(**example), atol=2e-6)


def test_the_noise_level_chooses_the_density() -> None:
    rows, given = ByTimestep(levels=(200.0, 800.0)), torch.tensor([500.0, 500.0])
    model, program, example = compressed((1.0, 0.3, 1.0), rows, timestep=given)

    dense = []
    for noise in (0.0, 200.0, 200.5, 799.0, 800.0, 801.0, 1000.0):
        example["timestep"] = torch.full((2,), noise)
        dense.append(is_dense(model, program, example))

    assert dense == [True, True, False, False, False, True, True]
    example["timestep"] = torch.tensor([500.0, 900.0])  # the largest counts
    assert is_dense(model, program, example)


def test_integer_time_steps_do_as_well() -> None:
    rows, given = ByTimestep(levels=(800.0,)), torch.tensor([801, 801])
    model, program, example = compressed((0.3, 1.0), rows, timestep=given)

    assert is_dense(model, program, example)


def test_a_step_counter_chooses_the_density_and_the_last_one_stays() -> None:
    model, program, example = compressed((1.0, 0.3), ByStep(2))

    dense = []
    for step in (0, 1, 2, 50, 0):
        set_step(program, step)
        dense.append(is_dense(model, program, example))

    assert dense == [True, False, False, False, True]


def test_a_step_reaches_every_pass_of_a_recipe() -> None:
    model, example = TwoLayers().eval(), torch.randn(1, 24, 16)
    online = replace(SMALL, density=(0.3, 1.0), rows=ByStep(2), mode="online")
    paper = replace(online, mode="paper", overrides=(("second", None),))
    program = fxq.compress(model, example, Recipe("two", (paper, online)), strict=True)
    with torch.no_grad():
        sparse = program(example)
        set_step(program, 1)
        torch.testing.assert_close(program(example), model(example), atol=1e-6, rtol=1e-5)
    assert not torch.allclose(sparse, model(example), atol=1e-4)
    with pytest.raises(ValueError, match="expected one ReplaceAttention in its recipe, found 2"):
        set_densities(program, [[1.0], [1.0]])


def test_densities_can_be_replaced_in_place() -> None:
    model, program, example = compressed(0.3)
    assert not is_dense(model, program, example)

    set_densities(program, [[1.0]])

    assert is_dense(model, program, example)


def test_layers_keep_their_own_density_but_at_dense_steps() -> None:
    table = density_table((1.0, 0.2), [None, 0.5])

    torch.testing.assert_close(table, torch.tensor([[1.0, 1.0], [0.2, 0.5]]))


def test_the_report_names_the_range() -> None:
    rows, given = ByTimestep(levels=(800.0,)), torch.tensor([1.0, 1.0])
    _, program, _ = compressed((0.3, 1.0), rows, timestep=given)

    (row,) = [r.row for r in fxq.report(program).rows if r.row.kind == "attention"]

    assert row.format == "sparse >=30% to 100% by timestep, paper"


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replace(SMALL, density=(0.2,), rows=ByTimestep((1.0,))), "one for each of 2 rows"),
        (lambda: replace(SMALL, density=(0.2, 0.3)), "one for each of 1 rows"),
        (lambda: replace(SMALL, density=()), "expected positive shares"),
        (lambda: replace(SMALL, density=(0.2, -1.0), rows=ByStep(2)), "expected positive shares"),
        (lambda: replace(SMALL, density=(0.2, 1.0), rows=ByPosition(2)), "holds for all tokens"),
        (
            lambda: compressed((0.2, 1.0), ByTimestep((1.0,), "sigma")),
            "no input 'sigma' of the model",
        ),
        (lambda: set_step(compressed(0.3)[1], 1), "expected one whose recipe sets 'step'"),
        (lambda: set_step(compressed((1.0,), ByStep(1))[1], -1), "expected 0 or more"),
        (lambda: set_densities(nn.Linear(2, 2), [[1.0]]), "it has no sparse attention"),
        (lambda: set_densities(compressed(0.3)[1], [[0.2, 0.2]]), "found \\[1, 2\\]"),
        (lambda: set_densities(compressed(0.3)[1], [[0.0]]), "1 that are not positive"),
    ],
)
def test_bad_input_is_refused(make: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
