"""What tests of the compile path share."""

from typing import Any

import pytest
from torch.fx import GraphModule

from fxq.backend import Compiled
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
