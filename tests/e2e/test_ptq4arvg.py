"""PTQ4ARVG's recipes from compress to compile: rows are looked up, kernels do as simulated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxq
from fxq.lowering.devices import x86
from fxq.numerics import sqnr_db
from fxq.passes import ptq4arvg
from fxq.pipeline import Recipe
from fxq.rows import ByPosition


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


def behind_an_activation() -> nn.Sequential:
    """A layer whose outlier channels no layer or norm can take in: they pass through SiLU."""
    model = nn.Sequential(nn.LayerNorm(64), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 64)).eval()
    with torch.no_grad():
        model[0].bias.copy_(torch.randn(64))
        model[1].weight[:4] *= 20.0
        model[3].weight[:, :4] /= 20.0
    return model


def test_a_factor_that_nothing_takes_in_is_a_product_at_run_time() -> None:
    model, x, held_out = behind_an_activation(), torch.randn(6, 16, 64), torch.randn(6, 16, 64)
    scaled = ptq4arvg.W6A6
    plain = Recipe("plain", scaled.passes[1:])

    programs = [fxq.compress(model, x, recipe, data=[x]) for recipe in (scaled, plain)]

    with torch.no_grad():
        quality = [float(sqnr_db(model(held_out), each(held_out))) for each in programs]
    assert quality[0] > quality[1] + 6


def test_what_is_compiled_is_what_was_simulated(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))
    model = behind_an_activation()
    x = torch.randn(6, 16, 64)
    program = fxq.compress(model, x, ptq4arvg.W8A8, data=[x])
    # The factor of the second layer is a product in front of its quantizer.
    assert "GainProjected (quantizer)" in _rows(program)[1].row.layer.remarks

    fxq.save(program, tmp_path / "program.safetensors")
    loaded = fxq.load(tmp_path / "program.safetensors")

    assert torch.equal(program(x), loaded(x))
    verification = fxq.verify(program, x, model=model)
    assert verification.ok, str(verification)
