"""Weight dilation: enlarge weights in the directions that their scales leave free.

A weight is quantized per output channel and scaled per input channel. An input channel that holds
no row's smallest or largest weight can be multiplied by a factor above 1 until it does, and no
row's range changes; the activation is divided by it, and may be quantized more finely.

    y = (x / s) (s W)        1 <= s,  min and max of every row of s W are those of W

Three ways to choose s within these bounds, one pass each:

    WeightDilation    the largest s there is (arXiv:2409.14307); reads no data
    GuardedDilation   the best power of it, none at all among them
    OptimalDilation   the s with the smallest predicted error, or none at all
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxq.dialect import ATEN, Dialect
from fxq.graph import dtype_of, weight_of
from fxq.passes.common.convert import quantize_weight
from fxq.passes.common.insert_observers import Target
from fxq.passes.common.scaling import (
    Candidate,
    EquivalentScaling,
    ScaleSite,
    Scaling,
    Statistics,
    apply_scalings,
    scale_sites,
    wanted,
)
from fxq.passes.common.scaling.equivalent_scaling import EXACT_KINDS
from fxq.passes.common.scaling.sites import Kind
from fxq.pipeline import Pass

LEAST_GAIN = 0.1  # what many channels gain by a few factors near 1 is within chance
CAP = 2.0**8  # of a factor: where weights are next to nothing, nothing else bounds it


def saturated_channels(weight: Tensor) -> Tensor:
    """Return the input channels that hold a row's smallest or largest weight: bool `[C]`.

    Args:
        weight: `[N, C, ...]`, of one group.
    Source: arXiv:2409.14307, the set A of eq. (9). All that tie are in it.
    """
    rows = weight.flatten(2) if weight.ndim > 2 else weight[..., None]  # [N, C, P]
    high, low = rows.amax((1, 2), keepdim=True), rows.amin((1, 2), keepdim=True)
    return ((rows == high) | (rows == low)).flatten(2).any(2).any(0)


def dilation(weight: Tensor, groups: int = 1) -> Tensor:
    """Return the largest factor of each input channel that leaves every row's range as it is
    `[C * groups]`, fp64, from 1 to `CAP`.

    Rows with weights on both sides bound a channel by what is left up to their largest and down to
    their smallest weight. The largest weight of a row without positive ones is nearer to zero than
    all others: it may not grow at all (nor the smallest of one without negative ones). A channel
    without weights bounds nothing, and stays.

    Args:
        weight: of a linear or a convolution `[N, C, ...]`.
        groups: of the convolution: a row bounds the channels of its own group.
    Source: arXiv:2409.14307 eq. (10) to (12), where the printed form divides by zero.
    """
    return torch.cat([_dilation(part) for part in weight.double().chunk(groups)])


def _dilation(weight: Tensor) -> Tensor:
    rows = weight.flatten(2) if weight.ndim > 2 else weight[..., None]  # [N, C, P]
    high, low = rows.amax((1, 2), keepdim=True), rows.amin((1, 2), keepdim=True)
    upwards = torch.where(rows > 0, high / rows, torch.inf)  # eq. (10)
    downwards = torch.where(rows < 0, low / rows, torch.inf)  # eq. (11)
    factor = torch.minimum(upwards, downwards)  # eq. (12)
    pinned = ((high < 0) & (rows == high)) | ((low > 0) & (rows == low))
    factor = torch.where(pinned, 1.0, factor).amin((0, 2))
    return torch.where(factor.isinf(), 1.0, factor).clamp(1.0, CAP)


def optimal_factor(
    x_power: Tensor, w_power: Tensor, w_noise: float, x_step: float, least: Tensor, most: Tensor
) -> Tensor:
    """Return the factors with the smallest predicted error of a layer `[C]`.

        error(s) = x_step^2 / 12 sum_k s_k^2 w_power_k  +  w_noise / 12 sum_k x_power_k / s_k^2

    Args:
        x_power: mean square of each input channel `[C]`.
        w_power: sum of squares of each channel's weights `[C]`.
        w_noise: sum over output channels of the weight's step squared.
        x_step: the activation's step after scaling.
        least: what keeps each channel within the range that goes with that step `[C]`.
        most: what weights allow `[C]`.
    """
    free = (w_noise * x_power / (x_step**2 * w_power)) ** 0.25
    return free.nan_to_num(nan=1.0).clamp(min=least).clamp(max=most)


def site_dilation(site: ScaleSite) -> Tensor:
    """Return the largest factor of each of a site's channels that none of its consumers forbids
    `[n_channels]`, fp64. Where something in half precision takes part, a power of two, which
    rounds nothing."""
    factor = torch.full((site.n_channels,), torch.inf, dtype=torch.float64)
    for part in site.consumers:
        weight, mine = weight_of(part.node).detach(), part.channels >= 0
        each = dilation(weight, len(mine) // weight.shape[1]).cpu()
        factor.scatter_reduce_(0, part.channels[mine], each[mine], "amin")
    dtypes = {dtype_of(part.node) for part in (*site.producers, *site.consumers)}
    if dtypes & {torch.float16, torch.bfloat16}:
        factor = torch.exp2(factor.log2().floor())
    return factor


@dataclass(frozen=True)
class WeightDilation(Pass):
    """Dilate every site as far as its weights allow. Reads no data, and keeps the float function.

    What it does for activations is not judged: where the channels with the largest values are
    saturated, their step stays and the others' noise grows. `GuardedDilation` leaves such sites.

    Args:
        kinds: which sites (`sites.KINDS`).
        targets: kinds of layers that will be quantized; a site without any is left alone.
    """

    kinds: tuple[Kind, ...] = (*EXACT_KINDS, "quantizer")
    targets: tuple[Target, ...] = ("linear", "conv")

    reads: ClassVar[Dialect] = ATEN
    writes: ClassVar[Dialect] = ATEN

    def run(self, gm: GraphModule) -> PassResult:
        """Scale the sites and note on every layer what was done, or why nothing was."""
        found, name = scale_sites(gm), type(self).__name__
        decided: dict[ScaleSite, Scaling | str] = {}
        for site in found.sites:
            if wanted(site, self.kinds, self.targets):
                factor = site_dilation(site)
                free = bool((factor > 1).any())
                decided[site] = (
                    Scaling(site, factor) if free else f"{name}: all channels are saturated"
                )
        return PassResult(gm, apply_scalings(gm, found, decided, name, self.targets))


@dataclass(frozen=True)
class GuardedDilation(EquivalentScaling):
    """Dilate every site by the power of its largest factor that quantizes best, or not at all.

    Args:
        powers: to try, in (0, 1]; all of them keep every row's range.
    """

    targets: tuple[Target, ...] = ("linear", "conv")
    least_gain: float = LEAST_GAIN
    whole: bool = False  # a whole graph is judged with one range for all time-steps, and untrained
    powers: tuple[float, ...] = (1.0, 0.75, 0.5, 0.25)

    def __post_init__(self) -> None:
        if not self.powers or not all(0 < power <= 1 for power in self.powers):
            raise ValueError(
                f"GuardedDilation.powers: expected numbers in (0, 1], found {self.powers}"
            )

    def candidates(self, site: ScaleSite, statistics: Statistics) -> Iterable[Candidate]:
        """Propose the powers."""
        factor = site_dilation(site)
        if bool((factor > 1).any()):
            yield from (Candidate(_power(factor, power, site)) for power in self.powers)


@dataclass(frozen=True)
class OptimalDilation(EquivalentScaling):
    """Dilate every site by the factors with the smallest predicted error, within what its weights
    allow, if that quantizes better.

    Args:
        ranges: how many ranges of the activation to try, between the smallest that dilation can
            reach and the one it has.
    """

    targets: tuple[Target, ...] = ("linear", "conv")
    least_gain: float = LEAST_GAIN
    whole: bool = False  # as in GuardedDilation
    ranges: int = 8

    def __post_init__(self) -> None:
        if self.ranges < 2:
            raise ValueError(f"OptimalDilation.ranges: expected 2 or more, found {self.ranges}")

    def candidates(self, site: ScaleSite, statistics: Statistics) -> Iterable[Candidate]:
        """Propose the best factors for each range, and all that weights allow."""
        most, reach = site_dilation(site), statistics.amax.double().cpu()
        if not bool((most > 1).any()):
            return
        yield Candidate(most)
        spec = self.layer.activation
        if spec is None or not bool(reach.any()):
            return
        x_power, w_power, w_noise = self._powers(site, statistics)
        ratio = float((reach / most).max() / reach.max())
        for share in torch.logspace(0, 1, self.ranges, base=ratio).tolist():
            high = share * float(reach.max())
            step = 2 * high / (spec.quant_max - spec.quant_min)
            least = (reach / high).clamp(min=1.0)
            best = optimal_factor(x_power, w_power, w_noise, step, least, most)
            yield Candidate(_power(best, 1.0, site))

    def _powers(self, site: ScaleSite, statistics: Statistics) -> tuple[Tensor, Tensor, float]:
        """Return the mean square of each channel, that of its weights, and the weights' noise."""
        x_power, w_power = torch.zeros(2, site.n_channels, dtype=torch.float64)
        w_noise = 0.0
        for consumer in statistics.consumers:
            mine = consumer.part.channels >= 0
            channels, weight = consumer.part.channels[mine], consumer.weight.double().cpu()
            rows = consumer.rows.double().square().mean(0).cpu()
            x_power.scatter_reduce_(0, channels, rows[mine], "amax")
            w_power.index_add_(0, channels, weight.square().transpose(0, 1).flatten(1).sum(1)[mine])
            _, step, _ = quantize_weight(weight_of(consumer.part.node), self.layer.weight)
            w_noise += float(step.double().square().sum())
        return x_power, w_power, w_noise


def _power(factor: Tensor, power: float, site: ScaleSite) -> Tensor:
    """Return a power of a factor, again a power of two where the factor must be one."""
    dtypes = {dtype_of(part.node) for part in (*site.producers, *site.consumers)}
    half = bool(dtypes & {torch.float16, torch.bfloat16})
    return torch.exp2((factor.log2() * power).floor()) if half else factor**power
