"""What tests of the compile path share."""

from pathlib import Path
from typing import Any

import pytest
from story import Story
from torch.fx import GraphModule
from written_again import Decisions

from fxq.backend import Compiled
from fxq.lowering import apply_where_it_pays
from fxq.lowering.devices import x86


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """The graphs that fxq compiles, with their weights, before any pass."""
    made: list[GraphModule] = []
    make = Compiled.make

    def noting(self: Compiled, bound: GraphModule, inputs: Any, args: Any) -> Any:
        made.append(bound)
        return make(self, bound, inputs, args)

    monkeypatch.setattr(Compiled, "make", noting)
    return made


@pytest.fixture
def every_layer_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Integer kernels whatever a layer's size."""
    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))


@pytest.fixture
def decisions(monkeypatch: pytest.MonkeyPatch) -> Decisions:
    """Let tiny products be lowered, and record what each compilation decided."""
    made: Decisions = []
    lower = apply_where_it_pays.lower

    def recording(*args: object) -> object:
        result = lower(*args)  # type: ignore[arg-type]
        made.append(result[1])
        return result

    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(apply_where_it_pays, "lower", recording)
    return made


@pytest.fixture(scope="session")
def stories() -> dict[Path, Story]:
    return {}


@pytest.fixture
def story(shared_data: Path, stories: dict[Path, Story]) -> Story:
    if shared_data not in stories:
        stories[shared_data] = Story(shared_data)
    return stories[shared_data]
