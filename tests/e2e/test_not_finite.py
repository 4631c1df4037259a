"""NaN and Inf at call time come out as such, in the rows that had them and in no other."""

import functools
import math

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.lowering.devices import x86
from fxq.lowering.lower import lower
from fxq.passes import psaq_vit, smoothquant, w8a8
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerTensor, PerToken, QuantSpec

AFFINE = LayerSpec(
    QuantSpec(symmetric=False, granularity=PerToken(), dynamic=True), w8a8.FULL_RANGE
)
AFFINE_DYNAMIC = Recipe("affine", (InsertObservers(AFFINE), Convert()))
RECIPES = {
    "dynamic": w8a8.DYNAMIC,
    "affine dynamic": AFFINE_DYNAMIC,
    "static": w8a8.STATIC,
    "static per token": w8a8.STATIC_PER_TOKEN,
    "scaled": smoothquant.W8A8,
    "everywhere": psaq_vit.W8A8,
}
BAD = (math.nan, math.inf, -math.inf)


@pytest.fixture(autouse=True)
def _every_size_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))


def mlp() -> nn.Module:
    """A function of each row for itself, whose GELU leaves nothing of -Inf."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64), nn.Linear(64, 33)).eval()


@functools.cache
def program_of(recipe: Recipe) -> fxq.Program:
    data = [torch.randn(2, 5, 64) for _ in range(4)]
    return fxq.compress(mlp(), data[0], recipe, data if recipe.needs_data else None)


def assert_row_is_lost(found: Tensor, clean: Tensor, row: tuple[int, int]) -> None:
    mask = torch.zeros(clean.shape[:2], dtype=torch.bool)
    mask[row] = True
    assert not bool(found[mask].isfinite().any())
    assert torch.equal(found[~mask], clean[~mask])
    assert bool(clean.isfinite().all())


@pytest.mark.parametrize("device", ["simulated", "cpu", "cuda"])
@pytest.mark.parametrize("name", RECIPES)
def test_a_bad_row_is_lost_and_the_others_are_not(name: str, device: str) -> None:
    program = program_of(RECIPES[name])
    gm = program.graph_module
    if device != "simulated":  # the rule for CUDA runs on the reference here
        gm, decisions = lower(gm, torch.device(device))
        assert all(decision.kernel for decision in decisions.values())
    x = torch.randn(2, 5, 64)

    for value in BAD:
        bad = x.clone()
        bad[1, 3, 7] = value
        assert_row_is_lost(gm(bad)[0], gm(x)[0], (1, 3))


def test_overflow_inside_is_seen_too() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Softplus(), nn.Linear(64, 8)).eval()
    with torch.no_grad():
        model[0].bias[3] = math.inf
    data = [torch.randn(2, 5, 64)]
    layer = LayerSpec(QuantSpec(granularity=PerToken(), dynamic=True), w8a8.WEIGHT)
    program = fxq.compress(model, data[0], Recipe("x", (InsertObservers(layer), Convert())))

    assert not bool(program(data[0]).isfinite().any())


def test_one_dynamic_scale_loses_the_whole_tensor() -> None:
    layer = LayerSpec(
        QuantSpec(symmetric=False, granularity=PerTensor(), dynamic=True), w8a8.WEIGHT
    )
    program = program_of(Recipe("per tensor", (InsertObservers(layer), Convert())))
    lowered, _ = lower(program.graph_module, torch.device("cpu"))
    x = torch.randn(2, 5, 64)
    x[0, 0, 0] = math.nan

    assert not bool(program(x).isfinite().any())
    assert not bool(lowered(x)[0].isfinite().any())


def test_a_static_convolution_does_not_hide_nan() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()
    data = [torch.randn(2, 3, 6, 6) for _ in range(3)]
    observe = InsertObservers(w8a8.STATIC_LAYER, targets=("conv",))
    program = fxq.compress(model, data[0], Recipe("c", (observe, Calibrate(), Convert())), data)
    bad = data[0].clone()
    bad[1, 2, 3, 3] = math.nan

    found = program(bad)

    assert bool(found[1, :, 2:5, 2:5].isnan().all())
    assert torch.equal(found[0], program(data[0])[0])


@pytest.mark.parametrize("name", ["dynamic", "static"])
def test_compiled_programs_lose_the_same_rows(name: str) -> None:
    program = program_of(RECIPES[name])
    x = torch.randn(2, 5, 64)
    bad = x.clone()
    bad[0, 1, 0], bad[1, 3, 63] = math.nan, -math.inf

    with torch.no_grad():
        compiled = torch.compile(program, backend="fxq")
        clean, found = compiled(x), compiled(bad)

    lost = (~found.isfinite()).all(-1)
    assert lost.nonzero().tolist() == [[0, 1], [1, 3]]
    assert torch.equal(found[~lost], clean[~lost])


def test_the_epilogue_keeps_a_bias_that_is_not_finite_out_of_codes() -> None:
    data = [torch.randn(2, 5, 64) for _ in range(2)]
    program = fxq.compress(mlp(), data[0], w8a8.STATIC, data)
    dict(program.named_buffers())["graph_module.0.bias"][4] = math.nan

    lowered, _ = lower(program.graph_module, torch.device("cuda"))

    assert not bool(lowered(data[0])[0].isfinite().any())
