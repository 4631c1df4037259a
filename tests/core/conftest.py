"""A small program for each recipe of `saved`, and a place for its file."""

from pathlib import Path

import pytest
import torch
from saved import RECIPES, batch

from fxq.pipeline import compress
from fxq.program import Program


@pytest.fixture(scope="module")
def programs() -> dict[str, Program]:
    timm = pytest.importorskip("timm.models.vision_transformer")
    torch.manual_seed(0)
    model = timm.VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=5
    ).eval()
    return {n: compress(model, batch(2), r, [batch(2), batch(3)]) for n, r in RECIPES.items()}


@pytest.fixture
def program(programs: dict[str, Program]) -> Program:
    return programs["dynamic"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "program.fxq"
