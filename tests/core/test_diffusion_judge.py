"""The judge of diffusion models: its coefficients are those of the sampler, its errors add up."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from diffusion import Setting, Study, judge_of, recorded
from one_step_error import ddim_coefficients

diffusers = pytest.importorskip("diffusers")
outputs = pytest.importorskip("diffusers.models.modeling_outputs")


def scheduler(n_steps: int) -> Any:
    made = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=False)
    made.set_timesteps(n_steps)
    return made


def test_a_coefficient_is_what_a_step_multiplies_noise_by() -> None:
    made = scheduler(10)
    noise = torch.zeros(1, 1, 2, 2, dtype=torch.float64, requires_grad=True)

    for t, coefficient in zip(made.timesteps, ddim_coefficients(made), strict=True):
        result = made.step(noise, t, torch.zeros_like(noise)).prev_sample

        (slope,) = torch.autograd.grad(result[0, 0, 0, 0], noise)
        torch.testing.assert_close(slope[0, 0, 0, 0], coefficient, rtol=1e-5, atol=1e-7)


class Model(nn.Module):
    """A model that predicts a multiple of its input, plus something on one step."""

    def __init__(self, offset: float = 0.0) -> None:
        super().__init__()
        self.offset, self.weight = offset, nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor, timestep: Tensor, class_labels: Tensor) -> Any:
        late = (timestep < 300).float().reshape(-1, 1, 1, 1)
        return outputs.Transformer2DModelOutput(x * self.weight * 0.5 + self.offset * late)


def test_errors_are_weighted_and_on_trajectories_that_calibrated_nothing() -> None:
    study = Study("model", Model(), scheduler)
    setting = Setting(n_steps=4, n_images=3, n_samples=1, seeds=1)

    judge, calls = judge_of(study, setting, 0), recorded(study, setting, 0)

    assert judge.error(study.model) == 0
    assert [int(call["timestep"][0]) for call in judge.calls] == [750, 500, 250, 0]
    assert not torch.equal(judge.calls[0]["x"], calls[0]["x"])
    c = ddim_coefficients(scheduler(4)).square()
    sizes = [float((0.5 * call["x"].double()).square().sum()) for call in judge.calls]
    expected = float((c[2] + c[3]) * 0.01 * 3 * 256) / sum(
        float(a) * b for a, b in zip(c, sizes, strict=True)
    )
    assert judge.error(Model(0.1)) == pytest.approx(expected, rel=1e-4)
    # The same noise whenever a seed is measured.
    again = judge_of(study, setting, 0)
    assert all(torch.equal(a["x"], b["x"]) for a, b in zip(again.calls, judge.calls, strict=True))
