"""Weight dilation: the paper's factors by hand, ranges that stay to the last bit, functions kept,
bad weights, and how much of a layer it reaches."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxq
from fxq.lowering.devices import x86
from fxq.passes import dilatequant, w8a8
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.passes.dilatequant import (
    GuardedDilation,
    OptimalDilation,
    WeightDilation,
    dilation,
    saturated_channels,
)
from fxq.passes.dilatequant.dilation import CAP, optimal_factor
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerChannel, QuantSpec

W4A4 = LayerSpec(QuantSpec(4, symmetric=False), QuantSpec(4, granularity=PerChannel(0)))


def ends(weight: Tensor) -> tuple[Tensor, Tensor]:
    rows = weight.flatten(1)
    return rows.amin(1), rows.amax(1)


def dilated(weight: Tensor, factor: Tensor, groups: int = 1) -> Tensor:
    """Multiply the input channels as a fold does: in fp64, rounded once."""
    per_group = factor.reshape(groups, 1, -1).expand(groups, len(weight) // groups, -1)
    wide = weight.double() * per_group.reshape(*weight.shape[:2], *[1] * (weight.ndim - 2))
    return wide.to(weight.dtype)


def test_factors_by_hand() -> None:
    weight = torch.tensor([[4.0, -2.0, 1.0, 0.5], [1.0, 3.0, -0.5, -1.0]])
    assert saturated_channels(weight).tolist() == [True, True, False, True]
    # channel 2: 4 / 1 upwards, -1 / -0.5 downwards
    assert dilation(weight).tolist() == [1, 1, 2, 1]


def test_factors_of_a_convolution_by_hand() -> None:
    weight = torch.tensor([[[3.0, -1.0], [1.5, 0.5], [0.2, -2.0]]])
    assert saturated_channels(weight).tolist() == [True, False, True]
    assert dilation(weight).tolist() == [1, 2, 1]


@pytest.mark.parametrize(
    ("weight", "factors"),
    [
        ([[2.0, 2.0, -1.0, 1.0]], [1, 1, 1, 2]),  # ties
        ([[-1.0, -2.0, -4.0]], [1, 2, 1]),  # all negative: the largest may not grow
        ([[1.0, 2.0, 4.0]], [1, 2, 1]),  # all positive: nor the smallest
        ([[0.0, 0.0, 1.0]], [1, 1, 1]),  # zero columns: nothing bounds them
        ([[0.0, 0.0]], [1, 1]),
        ([[1.0, 1e-9, -1.0]], [1, CAP, 1]),
    ],
)
def test_corners(weight: list[list[float]], factors: list[float]) -> None:
    assert dilation(torch.tensor(weight)).tolist() == factors


def test_groups_bound_their_own_channels() -> None:
    weight = torch.tensor([[4.0, 1.0], [-1.0, -0.5], [9.0, 3.0], [3.0, -2.0]])
    assert dilation(weight, 2).tolist() == [
        *dilation(weight[:2]).tolist(),
        *dilation(weight[2:]).tolist(),
    ]
    # depthwise: the only channel of a row holds both of its ends
    assert dilation(torch.randn(8, 1, 3, 3), 8).tolist() == [1] * 8


@settings(max_examples=200, deadline=None)
@given(
    n=st.integers(1, 12),
    c=st.integers(1, 24),
    taps=st.sampled_from([(), (3,), (2, 3)]),
    shift=st.sampled_from([0.0, 1.0, -1.0, 5.0]),
    seed=st.integers(0, 2**31),
)
def test_ranges_stay_to_the_last_bit_and_no_factor_can_be_larger(
    n: int, c: int, taps: tuple[int, ...], shift: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(n, c, *taps, generator=generator) + shift
    factor = dilation(weight)
    assert bool((factor >= 1).all() and factor.isfinite().all())
    after = dilated(weight, factor)
    for before, now in zip(ends(weight), ends(after), strict=True):
        assert torch.equal(before, now)
    for channel in ((factor > 1) & (factor < CAP)).nonzero().flatten().tolist():
        more = factor.clone()
        more[channel] *= 1.01
        pairs = zip(ends(weight), ends(dilated(weight, more)), strict=True)
        assert any(not torch.equal(before, now) for before, now in pairs)
    two_sided = all(bool((low < 0).all() and (high > 0).all()) for low, high in [ends(weight)])
    if two_sided and not bool((factor == CAP).any()):  # others may be free where ends have met
        assert float(dilation(after).max()) <= 1 + 1e-6


@pytest.mark.parametrize(("n", "expected"), [(64, 0.14), (256, 0.0), (16, 0.61)])
def test_how_many_channels_are_free(n: int, expected: float) -> None:
    generator = torch.Generator().manual_seed(0)
    free = [
        1 - float(saturated_channels(torch.randn(n, 64, generator=generator)).float().mean())
        for _ in range(20)
    ]
    assert sum(free) / len(free) == pytest.approx(expected, abs=0.05)


def test_optimal_factors_by_hand() -> None:
    x_power, w_power = torch.tensor([16.0, 1.0, 1.0, 0.0]), torch.tensor([1.0, 1.0, 16.0, 0.0])
    least, most = torch.tensor([1.0, 1.0, 1.0, 1.0]), torch.tensor([8.0, 8.0, 8.0, 8.0])
    found = optimal_factor(x_power, w_power, 1.0, 0.25, least, most)
    # (16 / (1 / 16))^(1/4) = 4; (1 * 16)^(1/4) = 2; (1 / (16 / 16))^(1/4) = 1; 0 / 0
    assert found.tolist() == [4, 2, 1, 1]
    assert optimal_factor(x_power, w_power, 1.0, 0.25, least, least * 1.5)[0] == 1.5


class Residual(nn.Module):
    """Groupnorm, SiLU and a convolution, which no factor passes through, and what can be folded:
    convolutions with a ReLU between, one of them grouped, and linears after a norm."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.conv = nn.GroupNorm(4, 16), nn.Conv2d(16, 16, 3, padding=1)
        self.wide, self.narrow = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 4, 3, padding=1, groups=2)
        self.head = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.conv(nn.functional.silu(self.norm(x)))
        x = self.narrow(self.wide(x).relu())
        return self.head(x.flatten(2).flatten(1))


def normed(seed: int) -> nn.Sequential:
    """A norm with wide channels, which have small weights, and a linear."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8)).eval()
    width = torch.linspace(0.25, 4, 32)[torch.randperm(32)]
    with torch.no_grad():
        model[0].weight.copy_(width)
        model[1].weight.normal_().div_(width)
    return model


def rows(count: int, seed: int) -> list[tuple[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 4, 16)[None, :, None, None]
    return [(torch.randn(4, 16, 4, 4, generator=generator) * scale,) for _ in range(count)]


def buffer(gm: torch.fx.GraphModule, name: str) -> Tensor:
    return next(b for key, b in gm.named_buffers() if name in key)


@pytest.mark.parametrize(
    "how",
    [
        WeightDilation(),
        GuardedDilation(W4A4, least_gain=0.0, whole=False),
        OptimalDilation(W4A4, least_gain=0.0, whole=False),
    ],
)
def test_the_function_and_the_ranges_stay(how: Any) -> None:
    model, data = Residual().eval(), rows(3, 0)
    program = fxq.compress(model, data[0], Recipe("r", (how,)), data)
    (x,) = rows(1, 1)[0]
    with torch.no_grad():
        torch.testing.assert_close(program(x), model(x), rtol=1e-4, atol=1e-5)
    changed = 0
    for name, layer in model.named_modules():
        scaled = [
            value
            for key, value in program.graph_module.named_buffers()
            if key.startswith(f"{name}.weight_scaled")
        ]
        if name and isinstance(layer, nn.Conv2d | nn.Linear) and scaled:
            if name != "wide":  # its rows are also divided, by what `narrow` is multiplied by
                for before, now in zip(ends(layer.weight), ends(scaled[0]), strict=True):
                    assert torch.equal(before, now)
            changed += 1
    assert changed >= 2
    assert isinstance(model.conv.weight, nn.Parameter)


def test_a_factor_does_not_pass_through_silu() -> None:
    program = fxq.compress(Residual().eval(), rows(1, 0)[0], Recipe("r", (WeightDilation(),)))
    names = {name for name, _ in program.graph_module.named_buffers()}
    assert "conv.input_reciprocal" in names  # explicit, for the quantizer to take
    assert not any(name.startswith("norm.") and name.endswith("_scaled") for name in names)


def test_dilation_works_without_data_in_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    for limits in ("WITH_VNNI", "WITHOUT_VNNI"):
        monkeypatch.setattr(x86, limits, x86.Thresholds(0, 0))
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 8)).eval(), torch.randn(8, 32)
    found = []
    for passes in (w8a8.DYNAMIC.passes, (WeightDilation(), *w8a8.DYNAMIC.passes)):
        compiled = torch.compile(model, backend="fxq", options={"recipe": Recipe("r", passes)})
        with torch.no_grad():
            found.append(compiled(x))
            torch.testing.assert_close(found[-1], model(x), rtol=0.1, atol=0.05)
    assert not torch.equal(*found)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_takes_powers_of_two(dtype: torch.dtype) -> None:
    model, x = normed(0).to(dtype), torch.randn(4, 32, dtype=dtype)
    program = fxq.compress(model, x, Recipe("r", (WeightDilation(),)))
    weight, scaled = model[1].weight, buffer(program.graph_module, "1.weight_scaled")
    ratio = (scaled.float() / weight.float()).log2()
    assert bool(ratio.any())
    assert torch.equal(ratio, ratio.round())
    for before, now in zip(ends(weight), ends(scaled), strict=True):
        assert torch.equal(before, now)


@pytest.mark.parametrize("how", [GuardedDilation(W4A4), OptimalDilation(W4A4)])
@pytest.mark.parametrize("seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2))])
@pytest.mark.parametrize("kind", ["wide", "even"])
def test_where_it_is_judged_it_is_no_worse_than_none(how: Any, kind: str, seed: int) -> None:
    model = normed(seed)
    if kind == "even":  # nothing is to be gained: the paper's factors lose up to a half
        model[0].reset_parameters()
        nn.init.normal_(model[1].weight)
    data, others = (torch.randn(2, 512, 32) for _ in range(2))
    tail = (InsertObservers(W4A4), Calibrate(), Convert())
    for x in (data, others):
        found = []
        for passes in (tail, (how, *tail)):
            program = fxq.compress(model, data[0], Recipe("r", passes), list(data))
            with torch.no_grad():
                found.append(float((program(x[1]) - model(x[1])).square().mean()))
        assert found[1] <= found[0] * (0.9 if kind == "wide" else 1.01)


def test_what_cannot_be_dilated_says_so() -> None:
    torch.manual_seed(0)
    model = nn.Conv1d(8, 8, 3, groups=8, padding=1).eval()
    program = fxq.compress(model, torch.randn(2, 8, 9), Recipe("r", (WeightDilation(),)))
    assert "all channels are saturated" in str(fxq.report(program))


@pytest.mark.parametrize("powers", [(), (0.0,), (1.5,)])
def test_powers_are_checked(powers: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match=r"powers: expected numbers in \(0, 1\]"):
        GuardedDilation(W4A4, powers=powers)


def test_recipes_are_recipes() -> None:
    for recipe in (dilatequant.W6A6, dilatequant.W4A8, dilatequant.W4A4):
        assert isinstance(recipe, Recipe)
