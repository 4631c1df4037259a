"""Gain-projected scaling: its equations by hand, and what it gains on layers with outliers."""

import itertools
from typing import Literal

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq import FxqWarning
from fxq.numerics import sqnr_db
from fxq.passes import smoothquant, w6a6, weight_only
from fxq.passes.common.scaling import (
    Candidate,
    EquivalentScaling,
    Operands,
    Statistics,
    operands,
    scale_sites,
)
from fxq.passes.common.scaling.statistics import collect
from fxq.passes.ptq4arvg import GainProjected
from fxq.passes.ptq4arvg.gain_projected import (
    bounded,
    error_sums,
    gain,
    gain_projected_factor,
    pivot_scale,
)
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec


def test_gain_by_hand() -> None:
    a, b = torch.tensor(16.0), torch.tensor(1.0)

    # The error is (rho A + B / rho) / 2: 8.5 at 1, sqrt(A B) = 4 at the optimum 1/4.
    found = [float(gain(torch.tensor(rho), a, b)) for rho in (1.0, 0.25, 1 / 16)]

    assert found == pytest.approx([0.0, 8.5 - 4.0, 0.0])


def test_the_factor_is_where_the_gain_is_largest() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.rand(5, generator=generator) + 0.1 for _ in range(2))

    factor = gain_projected_factor(a, b)

    every = torch.logspace(-2, 2, 4001)[:, None]
    best = every[gain(every, a, b).argmax(0), 0].sqrt()
    torch.testing.assert_close(factor, best, rtol=2e-3, atol=0)
    assert float(2 * gain_projected_factor(torch.tensor(16.0), torch.tensor(1.0))) == 1.0


def test_the_printed_equation_is_another_one() -> None:
    under = Operands(
        torch.tensor([[1.0]]), torch.tensor([[1.1]]),
        torch.tensor([[4.7], [-0.4]]), torch.tensor([[5.0], [0.0]]),
    )  # fmt: skip

    optimum = gain_projected_factor(*error_sums(under))
    printed = gain_projected_factor(*error_sums(under, 1), 1)

    assert float(optimum) == pytest.approx(1.0, abs=1e-4)
    assert float(printed) == pytest.approx(1.1832, abs=1e-4)  # sqrt(0.7 / 0.5)


@pytest.mark.parametrize("power", [1, 2])
def test_error_sums_are_those_over_rows_and_outputs(power: int) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = ((4, 3), (4, 3), (5, 3), (5, 3))
    x, qx, w, qw = (torch.randn(shape, generator=generator).double() for shape in shapes)

    a, b = error_sums(Operands(x, qx, w, qw), power)

    for i in range(3):
        pairs = list(itertools.product(range(4), range(5)))
        cost_a = sum(abs((qx - x)[t, i] * qw[o, i]) ** power for t, o in pairs)
        cost_b = sum(abs(x[t, i] * (qw - w)[o, i]) ** power for t, o in pairs)
        assert float(a[i]) == pytest.approx(float(cost_a))
        assert float(b[i]) == pytest.approx(float(cost_b))


def test_factors_without_an_error_are_at_their_bounds() -> None:
    a, b = torch.tensor([0.0, 1.0, 0.0, 16.0]), torch.tensor([1.0, 0.0, 0.0, 1.0])

    factor = gain_projected_factor(a, b)
    kept = bounded(factor, torch.tensor([1.0, 2.0, 4.0, 8.0]))

    assert factor.tolist() == [torch.inf, 0.0, 1.0, 0.5]
    # Ranges over the largest: 1/8, 1/4, 1/2, 1.
    assert kept.tolist() == [1.0, 0.25, 1.0, 1.0]
    assert bounded(factor, torch.zeros(4)).tolist() == [1.0, 1.0, 1.0, 1.0]


def test_the_pivot_has_equal_ranges() -> None:
    scale = pivot_scale(torch.tensor(8.0), torch.tensor(0.5))

    assert float(scale) == 4.0  # 8 / 4 = 0.5 * 4
    assert float(pivot_scale(torch.tensor(8.0), torch.tensor(0.0))) == 1.0


class Layer(nn.Module):
    """A norm with outlier channels in front of linears, whose weights make up for half of them."""

    def __init__(self, seed: int, outputs: tuple[int, ...] = (96, 32), means: float = 1.0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.norm = nn.LayerNorm(64)
        self.linears = nn.ModuleList(nn.Linear(64, n) for n in outputs)
        c = torch.ones(64)
        chosen = torch.randperm(64, generator=generator)[:6]
        c[chosen] = 5.0 * 10 ** torch.rand(6, generator=generator)
        with torch.no_grad():
            self.norm.weight.copy_(c)
            self.norm.bias.copy_(c * means * torch.randn(64, generator=generator))
            for linear in self.linears:
                linear.weight.copy_(torch.randn(linear.weight.shape, generator=generator) / c**0.5)
                linear.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(x)
        return torch.cat([linear(x) for linear in self.linears], -1)


def batches(n: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 32, 64, generator=generator) for _ in range(n)]


def statistics_of(model: nn.Module, n_rows: int = 512) -> Statistics:
    data = batches(2)
    gm = fxq.capture(model.eval(), data[0]).graph_module
    (site,) = [s for s in scale_sites(gm).sites if s.kind == "norm"]
    return collect(gm, [(x,) for x in data], [site], n_rows)[site]


def test_layers_of_one_edge_are_stacked() -> None:
    apart, fused = Layer(0), Layer(0, (128,))
    with torch.no_grad():
        weights = [linear.weight for linear in apart.linears]
        fused.linears[0].weight.copy_(torch.cat(weights))  # type: ignore[operator]
        fused.norm.load_state_dict(apart.norm.state_dict())
    method = GainProjected(w6a6.STATIC_LAYER)

    found = [statistics_of(model) for model in (apart, fused)]

    one, other = ([*method.candidates(s.site, s)] for s in found)
    assert len(one) == len(other) == 8  # smoothed, centred, three steps within bounds and not
    for mine, theirs in zip(one, other, strict=True):
        torch.testing.assert_close(mine.scale, theirs.scale)


@pytest.mark.parametrize("equation", ["optimum", "printed"])
def test_steps_are_the_closed_form_of_the_last_ones_errors(
    equation: Literal["optimum", "printed"],
) -> None:
    statistics = statistics_of(Layer(0))
    layer = w6a6.STATIC_LAYER
    found = [*GainProjected(layer, equation=equation).candidates(statistics.site, statistics)]
    width = statistics.high - statistics.low

    for last, next in ((found[1], found[5]), (found[5], found[6])):  # not bounded
        costs = []
        for c in statistics.consumers:
            x, qx, w, qw = (v.double() for v in operands(c, c, last, layer))
            dx, dw = x - qx, w - qw
            p = 2 if equation == "optimum" else 1
            costs.append(
                torch.stack([
                    torch.einsum("tk,ok->k", dx.abs() ** p, qw.abs() ** p),
                    torch.einsum("tk,ok->k", x.abs() ** p, dw.abs() ** p),
                ])
            )  # fmt: skip
        a, b = sum(costs[1:], costs[0])
        pivot = int((width / last.scale).argmax())
        expected = (b / a).sqrt() if equation == "printed" else (b / a) ** 0.25
        expected[pivot] = 1.0
        ratio = next.scale / last.scale
        torch.testing.assert_close((ratio / ratio[pivot]).double(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("factor", [1 / 64, 4.0, 64.0])
def test_a_factor_common_to_all_channels_changes_no_code(factor: float) -> None:
    statistics = statistics_of(Layer(0))
    *_, (scale, shift) = GainProjected().candidates(statistics.site, statistics)
    (one, _) = statistics.consumers

    plain, scaled = (
        operands(one, one, Candidate(s, shift), w6a6.STATIC_LAYER) for s in (scale, factor * scale)
    )

    assert torch.equal(plain.quantized_rows, scaled.quantized_rows * factor)
    assert torch.equal(plain.quantized_weight, scaled.quantized_weight / factor)


def quantized_sqnr(model: nn.Module, method: EquivalentScaling | None) -> float:
    passes = (*([] if method is None else [method]), *w6a6.STATIC.passes)
    data, held_out = batches(3), batches(1, seed=1)[0]
    program = fxq.compress(model.eval(), data[0], Recipe("test", passes), data=data)
    with torch.no_grad():
        return float(sqnr_db(model(held_out), program(held_out)))


@pytest.mark.parametrize("seed", [0, 1])
def test_outliers_that_weights_half_make_up_for(seed: int) -> None:
    model = Layer(seed)

    none = quantized_sqnr(model, None)
    smooth = quantized_sqnr(model, smoothquant.SmoothQuant(w6a6.STATIC_LAYER))
    gains = quantized_sqnr(model, GainProjected(w6a6.STATIC_LAYER))

    assert none < smooth - 3
    assert smooth < gains - 0.45  # 0.9 of the error, the least that the derivation's author saw


@pytest.mark.parametrize("fields", [{"equation": "printed"}, {"center": "mean"}, {"center": None}])
def test_every_variant_gains(fields: dict[str, object]) -> None:
    # Without any scaling this layer has 3 dB less than after smoothing, by the test above.
    method = GainProjected(w6a6.STATIC_LAYER, **fields)  # type: ignore[arg-type]

    assert quantized_sqnr(Layer(0), method) > quantized_sqnr(Layer(0), None) + 3


def test_constant_and_dead_channels_stay_finite() -> None:
    model = Layer(0)
    with torch.no_grad():
        model.norm.weight[:3], model.norm.bias[1:3] = 0.0, 0.0
        model.linears[0].weight[:, 2:5] = 0.0  # type: ignore[index]
        model.linears[1].weight[:, 2:5] = 0.0  # type: ignore[index]

    statistics = statistics_of(model)

    for scale, shift in GainProjected().candidates(statistics.site, statistics):
        assert shift is None or bool(shift.isfinite().all())
        live = torch.ones(64, dtype=torch.bool)
        live[:5] = False
        assert bool(scale[live].isfinite().all())
        assert bool((scale[live] > 0).all())
    assert quantized_sqnr(model, GainProjected(w6a6.STATIC_LAYER)) > 20


def test_identical_samples_are_no_reason_to_scale() -> None:
    model = Layer(0).eval()
    x = torch.randn(1, 1, 64).expand(8, 32, 64)
    recipe = Recipe("test", (GainProjected(w6a6.STATIC_LAYER), *w6a6.STATIC.passes))

    with pytest.warns(FxqWarning, match="8 samples that are all alike"):
        program = fxq.compress(model, x, recipe, data=[x])

    assert any("saw one sample only" in row.reason for row in fxq.report(program).rows)
    assert bool(program(x).isfinite().all())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"pre_smooth": 1.5}, r"pre_smooth: expected 0 to 1, found 1\.5"),
        ({"center": "median"}, "center: expected 'middle', 'mean' or None, found 'median'"),
        ({"equation": "16"}, "equation: expected 'optimum' or 'printed', found '16'"),
        ({"iterations": 0}, "iterations: expected at least 1, found 0"),
    ],
)
def test_bad_fields_are_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=rf"GainProjected\.{message}"):
        GainProjected(**fields)  # type: ignore[arg-type]


def test_weight_only_layers_are_refused() -> None:
    (observe, _) = weight_only.W8.passes
    spec = observe.default  # type: ignore[attr-defined]
    assert isinstance(spec, LayerSpec)

    with pytest.raises(ValueError, match="expected quantized activations, found weights alone"):
        GainProjected(spec)
