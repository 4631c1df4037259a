"""What is learned: a factor of the importance of each input channel, shared where layers share a
site.

    loss   sum over layers of  tr(R H R^T) / tr(W H W^T)  +  weight * R_p,     R = W - pruned W

Through exact scaling alone no gradient comes, and Wanda's choice does not change: the factor
cancels in W S S^-1 x. It counts as in eq. (11), as a factor of importance, and learns through the
mask: hard on the way there, a sigmoid's slope on the way back. All of it goes by cached second
moments; the model does not run. The best step is kept, and the pruner's own choice is step 0.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fxq.passes.common.second_moments import output_error
from fxq.passes.pruning.patterns import Pattern
from fxq.passes.pruning.prune import Pruner
from fxq.passes.sparsity_induction.equations import (
    TINY,
    boundary,
    bounded,
    log_factor,
    log_norm_slope,
    mask_slope,
    power_iteration,
    spectral_norm_loss,
    spread_start,
    unit_vector,
)

Start = Literal["ones", "norm", "spread", "spread_as_printed"]
POWERS: Mapping[Start, float] = {"norm": 0.5, "spread": 0.25, "spread_as_printed": 1.0}
WARM_UP = 10  # steps of power iteration at first


@dataclass(frozen=True)
class SpectralNorm:
    """The paper's spectral-norm loss.

    Args:
        weight: lambda; 0 leaves it out.
        alpha: in its exponent.
        normalized: norms over the Frobenius norm, in the mean over layers; False is eq. (8) as it
            is printed.
        steps: of power iteration between two steps of learning.
    """

    weight: float = 1e-3
    alpha: float = 1.0
    normalized: bool = True
    steps: int = 1


@dataclass(frozen=True)
class Learning:
    """How factors are learned.

    Args:
        steps: of Adam; 0 keeps the best start.
        learning_rate: of the logs, falling to 0 along a cosine.
        temperature: slope of the sigmoid that gives the mask a gradient.
        bound: largest factor, and one over the smallest.
        starts: of which the best is taken: "ones"; "norm", the root of each channel's energy;
            "spread", eq. (5) to the power of 1/4; "spread_as_printed".
        spectral: the spectral-norm loss.
    """

    steps: int = 60
    learning_rate: float = 3e-2
    temperature: float = 8.0
    bound: float = 64.0  # norms of the inputs of a gated layer differ by more than 8
    starts: tuple[Start, ...] = ("ones", "norm")
    spectral: SpectralNorm = SpectralNorm()

    def __post_init__(self) -> None:
        known = ("ones", "norm", "spread", "spread_as_printed")
        numbers = (self.learning_rate, self.temperature, self.bound - 1)
        if self.steps < 0 or min(numbers) <= 0 or not self.starts or {*self.starts} - {*known}:
            raise ValueError(
                "Learning: expected steps >= 0, learning_rate and temperature > 0, bound > 1 and "
                f"starts of {known}, found {self}"
            )


@dataclass(frozen=True, eq=False)
class Layer:
    """A weight to be pruned.

    Args:
        weight: `[N, K]`, fp32.
        pattern: which of it may go.
        raw: sum of `x x^T` `[K, K]`, fp64.
        moments: the same, of `x` less its shift.
        median: of each input channel `[K]`; 0 unless a start needs it.
        mean: likewise.
        index: which factor each input channel has `[K]`, -1 for none.
    """

    weight: Tensor
    pattern: Pattern
    raw: Tensor
    moments: Tensor
    median: Tensor
    mean: Tensor
    index: Tensor


class Choice(NamedTuple):
    """A pruned weight `[N, K]`, fp32, which elements stay `[N, K]`, and its output error, relative
    to the layer's output."""

    weight: Tensor
    mask: Tensor
    error: float


class Learned(NamedTuple):
    """Logs of factors, as the layers index them `[C]`, fp64, and for each layer the best choice and
    the pruner's own."""

    log_factors: Tensor
    best: list[Choice]
    base: list[Choice]


def learn(pruner: Pruner, layers: Sequence[Layer], sizes: Sequence[int], how: Learning) -> Learned:
    """Learn the factors of sites and choose the weights of their layers.

    Args:
        pruner: whose importance is multiplied.
        layers: that read the sites.
        sizes: channels of each site; their factors lie one after another.
        how: settings.
    """
    return _Learner(pruner, layers, sizes, how).run()


class _Learner:
    """One run of `learn`."""

    def __init__(
        self, pruner: Pruner, layers: Sequence[Layer], sizes: Sequence[int], how: Learning
    ) -> None:
        self.pruner, self.layers, self.sizes, self.how = pruner, layers, [*sizes], how
        device = layers[0].weight.device
        self.powers = [max(output_error(each.weight, each.moments), TINY) for each in layers]
        self.scores = [
            pruner.scores(each.weight, pruner.of_gram(each.moments)).double().clamp(min=TINY).log()
            for each in layers
        ]
        self.rights = [unit_vector(each.weight.shape[1], device) for each in layers]
        self.zero = torch.zeros(sum(sizes), dtype=torch.float64, device=device)

    def run(self) -> Learned:
        base = [self._choose(k, each.raw, None) for k, each in enumerate(self.layers)]
        best = Learned(self.zero, base, base)
        for name in self.how.starts:
            best = self._better(best, self._project(self._start(name)))
        if self.how.steps and len(self.zero):
            best = self._descend(best)
        return best

    def _descend(self, best: Learned) -> Learned:
        u = best.log_factors.clone().requires_grad_()
        adam = torch.optim.Adam([u], lr=self.how.learning_rate)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, self.how.steps)
        current, warm = self._choices(u.detach()), WARM_UP
        for _ in range(self.how.steps):
            u.grad = self._gradient(u.detach(), current, warm)
            adam.step()
            schedule.step()
            with torch.no_grad():
                u.copy_(self._project(u))
            current, warm = self._choices(u.detach()), self.how.spectral.steps
            if _total(current) < _total(best.best):
                best = Learned(u.detach().clone(), current, best.base)
        return best

    def _better(self, best: Learned, u: Tensor) -> Learned:
        found = self._choices(u)
        return Learned(u, found, best.base) if _total(found) < _total(best.best) else best

    def _choices(self, u: Tensor) -> list[Choice]:
        return [self._choose(k, each.moments, u) for k, each in enumerate(self.layers)]

    def _choose(self, k: int, moments: Tensor, u: Tensor | None) -> Choice:
        """Prune a layer, with the importance of its inputs multiplied: eq. (11), without a run of
        the model."""
        layer = self.layers[k]
        factor = None if u is None else self._of_layer(k, u).exp()
        given = self.pruner.of_gram(moments)
        weight, mask = self.pruner.prune(layer.weight, given, layer.pattern, factor)
        weight = torch.where(mask, weight, 0.0)
        return Choice(
            weight, mask, output_error(layer.weight - weight, layer.moments) / self.powers[k]
        )

    def _gradient(self, u: Tensor, choices: Sequence[Choice], warm: int) -> Tensor:
        total = torch.zeros_like(u)
        for k, (layer, choice) in enumerate(zip(self.layers, choices, strict=True)):
            weight = layer.weight.double()
            by_mask = -2 * ((weight - choice.weight) @ layer.moments) * weight / self.powers[k]
            distance = self._distance(k, u, choice.mask)
            by_factor = (by_mask * mask_slope(distance, self.how.temperature)).sum(0)
            self._add(total, k, by_factor)
        return total + self._spectral_gradient(u, warm)

    def _distance(self, k: int, u: Tensor, mask: Tensor) -> Tensor:
        """Return how far each log score is from the boundary that its mask has `[N, K]`."""
        pattern, logs = self.layers[k].pattern, self.scores[k] + self._of_layer(k, u)
        sets = pattern.compared(logs, torch.nan)
        stays, goes = pattern.compared(mask, False), pattern.compared(~mask, False)
        return _uncompared(sets - boundary(sets, stays, goes), logs.shape)

    def _spectral_gradient(self, u: Tensor, warm: int) -> Tensor:
        total, how = torch.zeros_like(u), self.how.spectral
        if not how.weight:
            return total
        norms = []
        for k, layer in enumerate(self.layers):
            scaled = layer.weight.double() * self._of_layer(k, u).exp()
            norm, self.rights[k] = power_iteration(scaled, self.rights[k], warm)
            if how.normalized:
                norm = norm / (scaled.norm().clamp(min=TINY) * len(self.layers))
            norms.append(norm)
            slope = log_norm_slope(scaled, self.rights[k], how.normalized)
            self._add(total, k, norm * slope)
        loss = spectral_norm_loss(torch.stack(norms), how.alpha)
        return -how.weight * how.alpha * loss * total

    def _of_layer(self, k: int, u: Tensor) -> Tensor:
        """Return the log factor of each input channel of a layer `[K]`."""
        return torch.cat([u, u.new_zeros(1)])[self.layers[k].index]  # -1 is the last entry

    def _add(self, total: Tensor, k: int, values: Tensor) -> None:
        mine = self.layers[k].index >= 0
        total.index_add_(0, self.layers[k].index[mine], values[mine])

    def _project(self, u: Tensor) -> Tensor:
        parts = u.split(self.sizes) if self.sizes else ()
        return torch.cat([u[:0], *(bounded(part, log(self.how.bound)) for part in parts)])

    def _start(self, name: Start) -> Tensor:
        if name == "ones":
            return self.zero
        values = self.zero.clone()
        for k, layer in enumerate(self.layers):
            if name == "norm":
                self._add(values, k, layer.moments.diagonal())
            else:
                self._add(values, k, spread_start(layer.median, layer.mean))
        parts = values.split(self.sizes) if self.sizes else ()
        return torch.cat([values[:0], *(log_factor(part, POWERS[name]) for part in parts)])


def _total(choices: Sequence[Choice]) -> float:
    return sum(choice.error for choice in choices)


def _uncompared(sets: Tensor, shape: torch.Size) -> Tensor:
    """Return values by what is compared in the form of the weight."""
    return sets.flatten(1)[:, : shape[1]] if sets.ndim == 3 else sets.reshape(shape)
