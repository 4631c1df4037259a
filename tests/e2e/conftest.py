"""What tests of the compile path share."""

from typing import Any

import pytest
from torch.fx import GraphModule

from fxq.backend import Compiled


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
