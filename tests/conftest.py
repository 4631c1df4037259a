"""Shared test set-up: one seed, one thread, no network, and the examples' models on the path."""

import gc
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [
    str(ROOT / "examples"),
    str(ROOT / "tests" / "lowering"),
    str(ROOT / "tests" / "core"),
    str(ROOT / "tests" / "passes"),
    str(ROOT / "tests" / "fuzz"),
]


def pytest_collection_finish() -> None:
    """Leave the million objects that were imported out of every later collection of garbage."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> Iterator[None]:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    yield
    torch._dynamo.reset()


@pytest.fixture
def shared_data() -> Path:
    """The folder of small real models and images; tests that need it skip where it is absent."""
    folder = ROOT.parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("../shared/data is absent")
    return folder
