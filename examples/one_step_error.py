"""How far a quantized diffusion model is from the float one: the teacher-forced one-step error.

On trajectories of the float model, both models see the same noisy sample at each step, and what the
step's result differs by is added up,

    error = sum over t of c_t^2 |e_q - e|^2 / sum over t of c_t^2 |e|^2
    c_t   = sqrt(1 - a_prev) - sqrt(a_prev) sqrt(1 - a_t) / sqrt(a_t)

with a the cumulative alphas and e the noise that is predicted: c_t is what DDIM (eta 0) multiplies
it by. Running on from quantized steps would measure chaos, and |e_q - e|^2 alone the last steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


def ddim_coefficients(scheduler: Any) -> Tensor:
    """Return c_t `[T]` of each step of a DDIM scheduler whose steps are set, in its order."""
    alphas, times = scheduler.alphas_cumprod.double(), scheduler.timesteps
    stride = scheduler.config.num_train_timesteps // len(times)
    before = [int(t) - stride for t in times]
    last = scheduler.final_alpha_cumprod.double()
    now = alphas[times]
    prev = torch.stack([alphas[t] if t >= 0 else last for t in before])
    return (1 - prev).sqrt() - prev.sqrt() * (1 - now).sqrt() / now.sqrt()


@dataclass(frozen=True, eq=False)
class Judge:
    """What quantized models are held against.

    Args:
        calls: one of each step, in the order of the scheduler.
        noise: what the float model predicts in them.
        weights: c_t^2 `[T]`.
    """

    calls: Sequence[Any]
    noise: Sequence[Tensor]
    weights: Tensor

    @classmethod
    @torch.no_grad()
    def of(cls, model: nn.Module, calls: Sequence[Any], scheduler: Any) -> "Judge":
        """Return the judge for a float model's recorded calls; the scheduler's steps are set."""
        noise = [model(**call).sample for call in calls]
        return cls(calls, noise, ddim_coefficients(scheduler).square())

    @torch.no_grad()
    def errors(self, model: nn.Module) -> Tensor:
        """Return what each step adds to the weighted relative error of a model `[T]`."""
        found = [
            (model(**call).sample.double() - noise.double()).square().sum()
            for call, noise in zip(self.calls, self.noise, strict=True)
        ]
        sizes = torch.stack([noise.double().square().sum() for noise in self.noise])
        return self.weights * torch.stack(found) / (self.weights * sizes).sum()

    def error(self, model: nn.Module) -> float:
        """Return the weighted relative error of a model."""
        return float(self.errors(model).sum())
