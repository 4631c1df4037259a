"""Recipes: order, records, and what a user sees while one runs."""

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.passes import w8a8
from fxq.pipeline import Recipe, Reported


def test_slow_batches_are_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reported, "EVERY_S", 0.0)
    lines: list[str] = []
    model, data = nn.Linear(64, 64).eval(), list(torch.randn(3, 4, 64))

    fxq.compress(model, data[0], w8a8.STATIC, data, progress=lines.append)

    assert "Calibrate: 2 batches done" in lines
    assert any(line.startswith("Convert: ") for line in lines)


def test_fast_batches_are_not_reported() -> None:
    lines: list[str] = []
    data: list[tuple[Tensor]] = [(torch.zeros(1),)] * 3

    assert len(list(Reported(data, "Calibrate", lines.append))) == 3
    assert lines == []


def test_a_recipe_in_the_wrong_order_is_refused() -> None:
    observe, calibrate, convert = w8a8.STATIC.passes

    with pytest.raises(ValueError, match="Calibrate reads OBSERVED, but Convert before it writes"):
        Recipe("wrong", (observe, convert, calibrate))


def test_equal_recipes_have_equal_fingerprints() -> None:
    assert w8a8.STATIC.fingerprint == Recipe("w8a8_static", w8a8.STATIC.passes).fingerprint
    assert w8a8.STATIC.fingerprint != w8a8.DYNAMIC.fingerprint
