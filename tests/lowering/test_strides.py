"""Results lie in memory as the simulated graph's do, whatever order kernels write."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxq
from fxq.graph import is_op
from fxq.lowering.devices import x86
from fxq.lowering.lower import lower
from fxq.numerics import sqnr_db
from fxq.passes import w8a8


@pytest.fixture(autouse=True)
def _small_ones_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86, "MIN_AVX2_CONV_MACS", 0)
    monkeypatch.setattr(x86, "MIN_CONV_MACS", 0)
    monkeypatch.setattr(x86, "MIN_WINDOW", 0)


class Convolutions(nn.Module):
    """Three in a row, and what is done with their results."""

    def __init__(self, end: Callable[[Tensor, Tensor], object], axes: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[axes]
        self.first, self.second = conv(64, 64, 1), conv(64, 64, 3, padding=1)
        self.third, self.end = conv(64, 64, 3, padding=1), end

    def forward(self, x: Tensor) -> object:
        y = self.second(self.first(x)).relu()
        return self.end(y, self.third(y))


ENDS: dict[str, Callable[[Tensor, Tensor], object]] = {
    "one": lambda y, z: z,
    "several": lambda y, z: {"z": z, "y": y, "again": z, "plain": 3},
    "turned": lambda y, z: z.movedim(1, -1),
    "summed": lambda y, z: y + z,
    "read as it lies": lambda y, z: torch.as_strided(z, (2, 8, 5), (64 * 16, 16, 3)) * 2.0,
}


def leaves(result: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(result) if isinstance(leaf, Tensor)]


def lowered_of(program: fxq.Program) -> GraphModule:
    lowered, _ = lower(program.graph_module, program.device)
    if not any(is_op(n, torch.ops.fxq.int8_conv.default) for n in lowered.graph.nodes):
        pytest.skip("this processor has no int8 convolution")
    return lowered


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("order", [torch.contiguous_format, torch.channels_last])
def test_results_lie_as_those_of_the_simulated_graph(end: str, order: torch.memory_format) -> None:
    model = Convolutions(ENDS[end]).eval()
    x = torch.randn(2, 64, 16, 16).to(memory_format=order)
    program = fxq.compress(model, x, w8a8.STATIC_CONV, data=[(x,)])
    lowered = lowered_of(program)

    expected, found = leaves(program(x)), leaves(lowered(x))

    for ours, float_result, theirs in zip(found, leaves(model(x)), expected, strict=True):
        assert sqnr_db(theirs, ours) > 60
        assert ours.stride() == theirs.stride() == float_result.stride()


@pytest.mark.parametrize("axes", [1, 3])
def test_with_one_and_three_axes_of_space(axes: int) -> None:
    model = Convolutions(ENDS["one"], axes).eval()
    x = torch.randn(2, 64, *[12] * axes)
    program = fxq.compress(model, x, w8a8.STATIC_CONV, data=[(x,)])
    found = lowered_of(program)(x)[0]

    assert found.stride() == program(x).stride() == model(x).stride()
    assert sqnr_db(program(x), found) > 60
