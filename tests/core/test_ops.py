"""The QUANTIZED operators: registered as torch wants them, and equal to their definitions."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.library import opcheck
from torch.utils._pytree import tree_leaves

from fxq import numerics, ops
from fxq.spec import PerChannel, PerGroup, PerTensor, PerToken, block_of

QUANTIZED = torch.ops.fxq


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(
    "granularity",
    [PerTensor(), PerChannel(-1), PerGroup(4), PerToken()],
    ids=lambda g: type(g).__name__,
)
def test_ops_pass_opcheck_and_equal_their_definitions(
    granularity: PerTensor | PerChannel | PerGroup | PerToken, symmetric: bool, dtype: torch.dtype
) -> None:
    x = torch.randn(2, 5, 8, dtype=dtype)
    block = list(block_of(granularity, 3, dynamic=True))
    low, high = (-127, 127) if symmetric else (-128, 127)

    scale, zero = QUANTIZED.choose_qparams(x, block, low, high, symmetric)
    codes = QUANTIZED.quantize(x, scale, zero, low, high)
    values = QUANTIZED.dequantize(codes, scale, zero, dtype)

    assert torch.equal(codes, numerics.quantize(x, scale, zero, low, high))
    assert torch.equal(values, numerics.dequantize(codes, scale, zero, dtype))
    opcheck(QUANTIZED.choose_qparams, (x, block, low, high, symmetric))
    opcheck(QUANTIZED.quantize, (x, scale, zero, low, high))
    opcheck(QUANTIZED.dequantize, (codes, scale, zero, dtype))
    opcheck(QUANTIZED.guard_scale, (x, scale[:1]))


LAYOUTS = {
    "channels last": lambda x: x.to(memory_format=torch.channels_last),
    "turned": lambda x: x.permute(3, 0, 2, 1),
    "a part": lambda x: x[:, 1:3, ::2],
    "expanded": lambda x: x[:1].expand(4, 4, 6, 8),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_traced_results_lie_in_memory_as_real_ones(layout: str) -> None:
    x = LAYOUTS[layout](torch.randn(4, 4, 6, 8))
    block, scale = list(block_of(PerTensor(), 4, dynamic=False)), torch.ones(1, 1, 1, 1)
    calls = (
        (QUANTIZED.quantize.default, (x, scale, None, -128, 127)),
        (QUANTIZED.dequantize.default, (x.to(torch.int8), scale, None, torch.float32)),
        (QUANTIZED.guard_scale.default, (x, scale)),
        (QUANTIZED.choose_qparams.default, (x, block, -128, 127, False)),
    )
    for op, args in calls:
        with FakeTensorMode() as mode:
            fakes = [mode.from_tensor(a) if isinstance(a, torch.Tensor) else a for a in args]
            traced = op(*fakes)
        real = op(*args)
        for a, b in zip(tree_leaves(traced), tree_leaves(real), strict=True):
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype), op


def test_codes_beyond_127_are_unsigned() -> None:
    x = torch.tensor([[-1.0, 0.0, 1.0]])
    scale, zero = torch.tensor([[1 / 127]]), torch.tensor([[128]], dtype=torch.int32)

    codes = QUANTIZED.quantize(x, scale, zero, 1, 255)

    assert codes.dtype == torch.uint8
    assert codes.tolist() == [[1, 128, 255]]


def test_decompositions_cover_every_op() -> None:
    names = {op.name() for op in ops.decompositions()}

    assert names == {"fxq::quantize", "fxq::dequantize", "fxq::choose_qparams", "fxq::guard_scale"}
