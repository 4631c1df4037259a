"""PTQ4ARVG's recipes on real autoregressive models: against one range per tensor, and SmoothQuant.

The judge is what the model's own logits say on held-out samples: SQNR and the divergence of the
next token's distribution, over all samples and of the worst one.
"""

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.lowering.devices import x86
from fxq.numerics import sqnr_db
from fxq.passes import ptq4arvg
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.passes.smoothquant import SmoothQuant
from fxq.pipeline import Recipe
from fxq.rows import ByPosition


class Judged(NamedTuple):
    sqnr_db: float
    worst_sqnr_db: float
    divergence: float  # KL(float || quantized), nat per token
    worst_divergence: float


def judge(model: nn.Module, program: nn.Module, held_out: Tensor, batch: int) -> Judged:
    with torch.no_grad():
        exact, found = (
            torch.cat([f(part) for part in held_out.split(batch)]) for f in (model, program)
        )
    log_p, log_q = exact.log_softmax(-1), found.log_softmax(-1)
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).mean(1)
    each = [float(sqnr_db(*pair)) for pair in zip(exact, found, strict=True)]
    whole = float(sqnr_db(exact, found))
    return Judged(whole, min(each), float(divergence.mean()), float(divergence.max()))


class Logits(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits


def per_tensor(recipe: Recipe, *scaling: Any) -> Recipe:
    """The recipe's quantizers with one range per tensor."""
    observe = next(p for p in recipe.passes if isinstance(p, InsertObservers))
    layer = observe.default
    assert layer is not None
    assert layer.activation is not None
    one = replace(layer, activation=replace(layer.activation, rows=None))
    return Recipe("per_tensor", (*scaling, InsertObservers(one), Calibrate(), Convert()))


@pytest.fixture
def stories(shared_data: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, Tensor]:
    """The story model, and stories of 64 tokens."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(shared_data))
    zoo = importlib.import_module("zoo")
    tokenizer = zoo.StoriesTokenizer()
    ids = [tokenizer.encode(text[:300])[:64] for text in zoo.tinystories()[:40]]
    full = [each for each in ids if len(each) == 64]
    return Logits(zoo.stories260k()).eval(), torch.tensor(full[:28])


@pytest.mark.slow
def test_six_bits_on_stories(stories: tuple[nn.Module, Tensor]) -> None:
    model, ids = stories
    data, held_out = [*ids[:12].split(4)], ids[12:]
    recipe = ptq4arvg.W6A6
    scaling = recipe.passes[0]
    assert isinstance(scaling, ptq4arvg.GainProjected)
    smooth = SmoothQuant(scaling.layer, kinds=scaling.kinds)
    recipes = (recipe, per_tensor(recipe, smooth), per_tensor(recipe))

    ours, smoothed, plain = (
        judge(model, fxq.compress(model, data[0], each, data=data), held_out, 4) for each in recipes
    )

    for other in (smoothed, plain):
        assert ours.sqnr_db > other.sqnr_db
        assert ours.worst_sqnr_db > other.worst_sqnr_db
        assert ours.divergence < other.divergence


def test_rows_are_looked_up_and_nothing_is_reduced() -> None:
    model = nn.Sequential(nn.LayerNorm(32), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 32)).eval()
    x = torch.randn(6, 8, 32) * torch.linspace(1, 8, 8)[:, None]

    program = fxq.compress(model, x, ptq4arvg.W8A8, data=[x], strict=True)

    called = [str(n.target) for n in program.graph_module.graph.nodes if n.op == "call_function"]
    assert not [name for name in called if "amax" in name or "amin" in name or "choose" in name]
    assert called.count("aten.index.Tensor") == 2  # scales and zero-points of both layers at once
    assert all(isinstance(r.row.layer.spec.activation.rows, ByPosition) for r in _rows(program))


def _rows(program: nn.Module) -> list[Any]:
    return [row for row in fxq.report(program).rows if row.row.kind == "linear"]


def test_what_is_compiled_is_what_was_simulated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64)).eval()
    x = torch.randn(6, 16, 64)
    program = fxq.compress(model, x, ptq4arvg.W8A8, data=[x])

    fxq.save(program, tmp_path / "program.safetensors")
    loaded = fxq.load(tmp_path / "program.safetensors")

    assert torch.equal(program(x), loaded(x))
    verification = fxq.verify(program, x, model=model)
    assert verification.ok, str(verification)
