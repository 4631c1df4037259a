"""The attention kernels against their definitions, on a GPU."""

from typing import Any

import pytest
import torch

pytest.importorskip("triton")
from attention_cases import (
    assert_attends,
    attention_inputs,
    check_attend,
    check_pool,
    check_select,
    difference,
)

import fxq.lowering.rectified_attention  # noqa: F401  registers the op
from fxq.lowering.kernels import attend_blocks, pool_blocks, select_blocks
from fxq.lowering.kernels.rectified_attention import launch
from fxq.rectified_attention import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("case", pool_blocks.CASES, ids=str)
def test_pooled_statistics_equal_the_definition_on_the_gpu(case: pool_blocks.Case) -> None:
    found = check_pool(case, "cuda")

    assert found["mean"] <= 1e-5
    assert found["deviation"] <= 1e-5
    assert found["copied"] == 1


@pytest.mark.parametrize("case", select_blocks.CASES, ids=str)
def test_selection_equals_the_definition_on_the_gpu(case: select_blocks.Case) -> None:
    found = check_select(case, "cuda")

    assert found["lists"] == 1
    assert found["text_row"] == 1
    assert found["ratio"] <= 1e-5
    assert found["given"] <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("block_size", [64, 128])
@pytest.mark.parametrize("case", attend_blocks.CASES, ids=str)
def test_attention_equals_the_definition_on_the_gpu(
    case: attend_blocks.Case, block_size: int, dtype: torch.dtype
) -> None:
    grown = case.n_tokens * block_size // case.block_size - 7 * (case.n_tokens > 1)
    changes: dict[str, Any] = {"n_tokens": grown, "block_size": block_size, "dtype": dtype}
    if case.text_size == case.n_tokens:
        changes |= {"text_size": grown, "text_len": tuple(min(n, grown) for n in case.text_len)}
    larger = case._replace(**changes)

    found = check_attend(larger, "cuda")

    assert_attends(larger, found)


@pytest.mark.parametrize("mode", ["paper", "sparse"])
@pytest.mark.parametrize(("dim", "dtype"), [(64, torch.float32), (256, torch.bfloat16)], ids=str)
def test_flex_attention_equals_the_definition_on_the_gpu(
    dim: int, dtype: torch.dtype, mode: str
) -> None:
    case = attend_blocks.Case(
        1000, dim, 128, 4, 2, 100, (100, 30), text_first=True, mode=mode, dtype=dtype, reorder=True
    )
    args = attention_inputs(case)
    moved = [x.cuda() if isinstance(x, torch.Tensor) else x for x in args]

    out, lse = torch.ops.fxq.lowered_attention(*moved, None, "flex")

    expected, expected_lse = reference.rectified_attention(*args, None)
    bound = 1e-4 if dtype == torch.float32 else 2e-2
    assert difference(out.cpu().float(), expected.float()) <= bound
    assert difference(lse.cpu(), expected_lse) <= 1e-4


def test_nothing_waits_for_the_host() -> None:
    case = attend_blocks.Case(2000, 64, 128, 2, 2, 200, (200, 30), dtype=torch.bfloat16)
    args = [x.cuda() if isinstance(x, torch.Tensor) else x for x in attention_inputs(case)]
    launch(*args, case.dim**-0.5)  # compiles, which does wait
    torch.cuda.set_sync_debug_mode("error")
    try:
        launch(*args, case.dim**-0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", ["paper", "online"])
def test_what_is_small_enough_for_a_sanitizer(mode: str) -> None:
    case = attend_blocks.Case(
        300, 64, 64, 1, 1, 40, (30,), mode=mode, dtype=torch.bfloat16, reorder=True
    )

    assert_attends(case, check_attend(case, "cuda"))
