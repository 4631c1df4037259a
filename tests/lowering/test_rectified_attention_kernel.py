"""The attention kernels against their definitions, in Triton's interpreter.

The interpreter must be asked for before Triton is imported, so all cases run in one process of
their own.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from attention_cases import assert_attends

from fxq.lowering.kernels import attend_blocks, pool_blocks, select_blocks

RUNNER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from attention_cases import check_attend, check_pool, check_select
from strict import strict
from fxq.lowering.kernels import attend_blocks, pool_blocks, select_blocks
strict()
def whole(case):
    return attend_blocks.Config(case.block_size, 4, 3)
streamed = attend_blocks.Config(16, 4, 2, True)
halved = [case._replace(block_size=32) for case in attend_blocks.CASES[4:10]]
print(json.dumps({
    "pool": [check_pool(case, "cpu") for case in pool_blocks.CASES],
    "select": [check_select(case, "cpu") for case in select_blocks.CASES],
    "attend": [check_attend(case, "cpu") for case in attend_blocks.CASES],
    "half": [check_attend(case, "cpu", attend_blocks.Config(16, 4, 2)) for case in halved],
    "half tma": [check_attend(case, "cpu", streamed) for case in halved],
    "no tma": [check_attend(case, "cpu", whole(case)) for case in attend_blocks.CASES],
}))
"""


@functools.cache
def results() -> dict[str, list[dict[str, float]]]:
    """Return what the checks found for every case of every kernel."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNNER, str(Path(__file__).parent)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def number(cases: tuple[object, ...]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("i", range(len(cases)), ids=lambda i: f"{i}: {cases[i]}")


@number(pool_blocks.CASES)
def test_pooled_statistics_equal_the_definition(i: int) -> None:
    found = results()["pool"][i]

    assert found["mean"] <= 1e-6
    assert found["deviation"] <= 1e-6
    assert found["copied"] == 1


@number(select_blocks.CASES)
def test_selection_equals_the_definition(i: int) -> None:
    found = results()["select"][i]

    assert found["lists"] == 1
    assert found["text_row"] == 1
    assert found["ratio"] <= 1e-6
    assert found["given"] <= 1e-6


@number(attend_blocks.CASES)
def test_attention_equals_the_definition(i: int) -> None:
    assert_attends(attend_blocks.CASES[i], results()["attend"][i])


@number(attend_blocks.CASES)
def test_attention_without_the_copy_engine_equals_the_definition(i: int) -> None:
    assert_attends(attend_blocks.CASES[i], results()["no tma"][i])


@pytest.mark.parametrize("loads", ["half", "half tma"])
@number(attend_blocks.CASES[4:10])
def test_attention_in_tiles_of_half_a_block_equals_the_definition(i: int, loads: str) -> None:
    assert_attends(attend_blocks.CASES[4 + i], results()[loads][i])


def test_cases_reach_every_mode_and_both_ends() -> None:
    cases = attend_blocks.CASES

    assert {case.mode for case in cases} == {"paper", "online", "sparse"}
    assert {case.dim for case in cases} >= {64, 80, 96, 128}
    assert {case.text_first for case in cases if case.text_size} == {True, False}
    assert any(case.is_causal for case in cases)
    assert any(case.heads > case.kv_heads for case in cases)
    # The interpreter multiplies bfloat16 as integers.
    assert torch.bfloat16 not in {case.dtype for case in cases}
