"""Recipes: order and records."""

import time
from typing import Any

import pytest
import torch
from torch import nn

import fxq
from fxq.capturing import Captured
from fxq.history import Stage
from fxq.observers import RangeObserver
from fxq.passes import w8a8
from fxq.pipeline import FLOAT, Recipe


def test_a_recipe_in_the_wrong_order_is_refused() -> None:
    observe, calibrate, convert = w8a8.STATIC.passes

    with pytest.raises(ValueError, match="Calibrate reads OBSERVED, but Convert before it writes"):
        Recipe("wrong", (observe, convert, calibrate))


def test_equal_recipes_have_equal_records() -> None:
    assert repr(w8a8.STATIC) == repr(Recipe("w8a8_static", w8a8.STATIC.passes))
    assert repr(w8a8.STATIC) != repr(w8a8.DYNAMIC)


def test_the_history_has_every_graph_as_a_pass_left_it() -> None:
    model, x = nn.Sequential(nn.Linear(8, 8), nn.ReLU()).eval(), torch.randn(3, 8)
    stages: list[Stage] = []

    program = fxq.compress(model, x, w8a8.STATIC, data=[x], history=stages)

    assert [s.name for s in stages] == ["capture", "InsertObservers", "Calibrate", "Convert"]
    captured, observed, calibrated, converted = stages
    assert torch.equal(captured.graph_module(x)[0], model(x))
    assert torch.equal(converted.graph_module(x)[0], program(x))
    assert {"linear", "relu"} < captured.changed
    assert calibrated.changed == observed.changed - {"linear"}  # the observer has seen data
    assert calibrated.removed == frozenset()
    assert "linear" in observed.changed & converted.changed  # it reads something else
    assert "relu" not in converted.changed
    assert observed.changed - {"linear"} <= converted.removed  # the observer
    assert all(stage.seconds >= 0 for stage in stages)
    weights = [dict(s.graph_module.named_parameters()) for s in stages[:3]]
    assert all(w["0.weight"] is weights[0]["0.weight"] for w in weights)


def test_observers_of_a_stage_have_seen_what_they_had_then() -> None:
    model, x = nn.Linear(8, 8).eval(), torch.randn(3, 8)
    stages: list[Stage] = []
    fxq.compress(model, x, w8a8.STATIC, data=[x], history=stages)

    stages[2].graph_module(10 * x)

    counts = [
        [m.count for m in stage.graph_module.modules() if isinstance(m, RangeObserver)]
        for stage in stages
    ]
    assert counts == [[], [0], [48], []]  # 24 values in calibration, and 24 now


def test_the_history_has_the_seconds_that_capture_took(monkeypatch: pytest.MonkeyPatch) -> None:
    stages: list[Stage] = []

    def compress(delay_s: float) -> float:
        def capture(*args: Any) -> Captured:
            time.sleep(delay_s)
            return fxq.capture(*args)

        monkeypatch.setattr("fxq.pipeline.capture", capture)
        began = time.perf_counter()
        fxq.compress(nn.Linear(16, 16).eval(), torch.randn(2, 16), FLOAT, history=stages)
        return time.perf_counter() - began

    all_of_it = compress(0.0)
    compress(delay_s=all_of_it)

    assert 0 < stages[0].seconds < all_of_it < stages[1].seconds
