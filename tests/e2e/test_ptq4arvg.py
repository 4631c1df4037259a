"""PTQ4ARVG's recipes from compress to compile: rows are looked up, kernels do as simulated."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fxq
from fxq.lowering.devices import x86
from fxq.passes import ptq4arvg
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
