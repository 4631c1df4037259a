"""The Triton kernel against its definition, on a GPU."""

import pytest
import torch

pytest.importorskip("triton")
from kernel_cases import assert_passes, check

from fxq.lowering.kernels import int8_linear as kernel

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("config", [None, *kernel.CONFIGS], ids=str)
@pytest.mark.parametrize("case", kernel.CASES, ids=str)
def test_kernel_equals_reference_on_the_gpu(case: kernel.Case, config: str | None) -> None:
    found = check(case, "cuda", kernel.CONFIGS[config] if config else None)

    assert_passes(case, found)


@pytest.mark.parametrize("config", [None, "tma, medium"])
def test_what_is_small_enough_for_a_sanitizer(config: str | None) -> None:
    case = kernel.Case(129, 128, 256, per_row=True, bias=True, activation="gelu")

    assert_passes(case, check(case, "cuda", kernel.CONFIGS[config] if config else None))
