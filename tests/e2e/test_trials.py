"""Unmodified pipelines from start to end, with a program or compiled code in a model's place.

The judge is the same pipeline in eager float with the same noise. `generate` is tried in
`test_state.py`, timm's loop in `test_readme.py`.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from pipelines import DRAWINGS
from torch import nn
from trials import RUNS, TRIALS, table

import fxq
from fxq.lowering.devices import x86
from fxq.numerics import sqnr_db
from fxq.pipeline import FLOAT, Recipe

DIFFUSERS = [trial for trial in TRIALS if trial.library == "diffusers"]
# After two steps; measured 31.8 dB (Stable Diffusion 3) to 50.0 dB (Stable Diffusion's UNet).
FLOOR_DB = 28.0


@pytest.fixture(autouse=True)
def _small_layers_are_lowered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))


def named(names: list[str], fast: str | None = None) -> list[object]:
    """Return test parameters that are slow but for one."""
    return [pytest.param(n, marks=() if n == fast else pytest.mark.slow) for n in names]


def test_every_pipeline_is_in_the_table() -> None:
    assert [trial.what for trial in DIFFUSERS] == [*DRAWINGS]
    assert len(table().splitlines()) == len(TRIALS) + 2


@pytest.mark.filterwarnings("ignore:In CPU autocast")
@pytest.mark.parametrize("recipe", [FLOAT, "w8a8_dynamic"], ids=["float", "w8a8_dynamic"])
@pytest.mark.parametrize("name", named([t.what for t in DIFFUSERS if t.compressed == RUNS], "DiT"))
def test_a_program_takes_the_models_place(name: str, recipe: Recipe | str) -> None:
    draw = DRAWINGS[name]()
    expected = draw()
    calls = fxq.record(draw.model, draw)

    draw.replace(fxq.compress(draw.model, calls[0], recipe))
    found = draw()

    if recipe is FLOAT:
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    else:
        assert sqnr_db(expected, found) > FLOOR_DB
        assert not torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore:In CPU autocast", "ignore::fxq.errors.FxqWarning")
@pytest.mark.parametrize("name", named([t.what for t in DIFFUSERS if t.compiled == RUNS]))
def test_compiled_code_takes_the_models_place(name: str) -> None:
    draw = DRAWINGS[name]()
    expected = draw()

    draw.replace(torch.compile(draw.model, backend="fxq", options={"check": True}))
    found = draw()

    assert sqnr_db(expected, found) > FLOOR_DB
    assert not torch.equal(found, expected)


def classifier() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64,
        image_size=16, patch_size=4,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


def classification() -> tuple[Any, Callable[[], torch.Tensor], Callable[[], object]]:
    """A pipeline, its scores of three pictures, label by label, and a run of it."""
    from PIL import Image
    from transformers import ViTImageProcessor, pipeline

    processor = ViTImageProcessor(size={"height": 16, "width": 16})
    pipe = pipeline("image-classification", model=classifier(), image_processor=processor)
    pixels = np.random.default_rng(0).integers(0, 255, (3, 16, 16, 3), dtype=np.uint8)
    images = [Image.fromarray(picture) for picture in pixels]

    def scores() -> torch.Tensor:
        found = [{row["label"]: row["score"] for row in rows} for rows in pipe(images)]
        return torch.tensor([[row[label] for label in sorted(row)] for row in found])

    return pipe, scores, lambda: pipe(images)


def test_a_program_classifies_in_a_pipeline_of_transformers() -> None:
    pipe, scores, run = classification()
    expected = scores()
    calls = fxq.record(pipe.model, run)
    pipe.model = fxq.compress(pipe.model, calls[0], "w8a8_static", data=calls)
    found = scores()

    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    assert not torch.equal(found, expected)


@pytest.mark.filterwarnings("ignore::fxq.errors.FxqWarning")
def test_compiled_code_classifies_in_a_pipeline_of_transformers() -> None:
    pipe, scores, _ = classification()
    expected = scores()

    pipe.model = torch.compile(pipe.model, backend="fxq", options={"check": True})
    found = scores()

    torch.testing.assert_close(found, expected, rtol=0, atol=5e-3)
    assert not torch.equal(found, expected)
