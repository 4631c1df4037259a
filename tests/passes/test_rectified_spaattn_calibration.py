"""Calibration: measured on a model's activations, and what follows for its densities."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from sparse_models import JointAttention, below_length, joint_inputs

import fxq
from fxq.passes.rectified_spaattn import (
    Calibration,
    Measurement,
    ReplaceAttention,
    calibrate_density,
)
from fxq.pipeline import Recipe

SMALL = ReplaceAttention(block_size=4, min_tokens=8, keep_neighbours=False, top_p=0.0)


def peaked() -> JointAttention:
    """A model whose attention is far from uniform."""
    torch.manual_seed(0)
    model = JointAttention("last", below_length, heads=(4, 2)).eval()
    with torch.no_grad():
        model.q.weight.mul_(6)
    return model


def test_the_error_is_that_of_the_compressed_model() -> None:
    model, example = peaked(), joint_inputs()

    found = calibrate_density(
        model, example, [example], SMALL, densities=(0.5, 0.25), n_blocks=1000
    )

    for measured in found.measurements:
        attention = replace(SMALL, density=measured.density)
        program = fxq.compress(model, example, Recipe("test", (attention,)))
        with torch.no_grad():
            # The output layer is taken out: its weight is the identity on the first channels.
            model.out.weight.copy_(torch.eye(16, 64))
            program.get_buffer("graph_module.out.weight").copy_(torch.eye(16, 64))
            expected, sparse = model(**example), program(**example)
            error = float((sparse - expected).norm() / (expected - model.out.bias).norm())
        # The layer's error is over all four heads, the output's over the first.
        assert 0.5 * measured.error < error < 2 * measured.error


def test_an_interrupted_measurement_goes_on_to_the_same_numbers(tmp_path: Path) -> None:
    batches = [joint_inputs() for _ in range(3)]
    path = tmp_path / "sums.safetensors"

    def measure(data: Any, **changes: Any) -> Calibration:
        changes = {"densities": (0.2, 0.6), "n_blocks": 2, **changes}
        return calibrate_density(peaked(), batches[0], data, SMALL, **changes)

    class Stopped:
        def __iter__(self) -> Iterator[Any]:
            yield from batches[:2]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        measure(Stopped(), checkpoint=path)
    with pytest.raises(ValueError, match="remove it or choose another"):
        measure(batches, checkpoint=path, n_blocks=3)

    assert measure(batches, checkpoint=path) == measure(batches)
    assert not path.exists()


def test_more_blocks_err_less_and_the_table_shows_it() -> None:
    messages: list[str] = []
    batches = [joint_inputs(), joint_inputs(lengths=(1, 6))]

    found = calibrate_density(
        peaked(), batches[0], batches, SMALL, densities=(0.2, 0.6, 0.9), progress=messages.append
    )

    errors = [m.error for m in found.measurements]
    assert errors == sorted(errors, reverse=True)
    assert [round(m.kept, 1) for m in found.measurements] == [0.2, 0.6, 0.9]
    assert all(0 < m.ratio <= 1 and 0 <= m.pass_rate <= 1 for m in found.measurements)
    assert "relative error" in str(found)
    assert messages[-1] == "calibrate_density: 1 layers measured"


def test_proposals_are_the_smallest_density_within_the_bound() -> None:
    def measured(module: str, density: float, error: float) -> Measurement:
        return Measurement(module, density, density, 1.0, 1.0, error)

    rows = [("a", 0.1, 0.2), ("a", 0.2, 0.04), ("a", 0.5, 0.01), ("b", 0.1, 0.3), ("b", 0.5, 0.2)]
    found = Calibration(tuple(measured(*row) for row in rows), SMALL)

    assert found.densities(0.05) == (("a", 0.2), ("b", None))
    assert found.densities(0.25) == (("a", 0.1), ("b", 0.5))
    assert found.attention(0.05).overrides == (("a", 0.2), ("b", None))
    with pytest.raises(ValueError, match="positive relative error"):
        found.densities(0.0)


def test_a_layer_that_is_called_twice_goes_by_its_worse_call() -> None:
    calls = [[0.03, 0.02, 0.01], [0.3, float("nan"), 0.02]]
    rows = [zip((0.1, 0.2, 0.5), errors, strict=True) for errors in calls]
    measured = [Measurement("a", d, d, 1.0, 1.0, error) for row in rows for d, error in row]

    for order in (measured, measured[3:] + measured[:3]):
        found = Calibration(tuple(order), SMALL)

        assert found.densities(0.05) == (("a", 0.5),)
        assert found.densities(0.01) == (("a", None),)
        assert "0.3000" in str(found)
        assert "0.0300" not in str(found)


@pytest.mark.filterwarnings("ignore:recipe .* changed nothing")
def test_attention_in_no_module_keeps_its_name() -> None:
    model, example = peaked(), joint_inputs()

    found = calibrate_density(model, example, [example], SMALL, densities=(0.5,))
    program = fxq.compress(model, example, Recipe("test", (found.attention(1e-9),)))
    sparse = fxq.compress(model, example, Recipe("test", (found.attention(1e9),)))

    names = [[r.row.module for r in fxq.report(p).rows if r.row.kind == "attention"]
             for p in (program, sparse)]  # fmt: skip
    assert names == [[found.measurements[0].module]] * 2
    assert [r.row.skip is None for p in (program, sparse) for r in fxq.report(p).rows
            if r.row.kind == "attention"] == [False, True]  # fmt: skip


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"densities": (0.0, 0.5)}, "densities: expected numbers between 0 and 1"),
        ({"densities": ()}, "densities: expected numbers between 0 and 1"),
        ({"n_blocks": 0}, "n_blocks: expected at least 1"),
        ({"data": []}, "data: expected at least one batch"),
        ({"attention": ReplaceAttention()}, "found none; left dense: 1 x 79 tokens: dense is fast"),
    ],
)
def test_bad_input_is_refused(change: dict[str, Any], message: str) -> None:
    example = joint_inputs()
    call = {"model": peaked(), "example_inputs": example, "data": [example], "attention": SMALL}

    with pytest.raises(ValueError, match=message):
        calibrate_density(**(call | change))
