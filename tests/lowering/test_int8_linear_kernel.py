"""The Triton kernel against its definition, in Triton's interpreter.

The interpreter must be asked for before Triton is imported, so all cases run in one process of
their own.
"""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
from kernel_cases import assert_passes

from fxq.lowering.kernels import int8_linear as kernel

RUNNER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from kernel_cases import check
from strict import strict
from fxq.lowering.kernels import int8_linear as kernel
strict()
small = kernel.Config(16, 64, 128, 4, 2)  # more rows of tiles than a group
configs = (None, small, small._replace(tma=True))
chosen, streamed = [], []
choose = kernel.choose_config
kernel.choose_config = lambda *args, **given: (chosen.append(choose(*args, **given)), chosen[-1])[1]
launched = kernel.hardware.with_scratch
kernel.hardware.with_scratch = lambda launch: (streamed.append(1), launched(launch))
results = [check(case, "cpu", config) for config in configs for case in kernel.CASES]
print(json.dumps({"cases": results, "streamed": len(streamed), "chosen": chosen}))
"""


@functools.cache
def results() -> dict[str, Any]:
    """Return what `check` found for every case, with shipped tiles, with small ones, and
    with small ones of the kernel that streams; how many launches streamed, and what was chosen."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNNER, str(Path(__file__).parent)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("tiles", ["shipped", "small", "small, streamed"])
@pytest.mark.parametrize(
    "index", range(len(kernel.CASES)), ids=lambda i: str(tuple(kernel.CASES[i]))
)
def test_kernel_equals_reference_in_the_interpreter(index: int, tiles: str) -> None:
    offset = ["shipped", "small", "small, streamed"].index(tiles) * len(kernel.CASES)
    found = results()["cases"][index + offset]

    assert_passes(kernel.CASES[index], found)


def test_the_kernel_that_streams_took_what_it_can() -> None:
    # Sums are fp32; few rows, and rows that are no multiple of 16 bytes, go to the other kernel.
    can = [
        case.m > 64 and case.k % 16 == 0 and case.n * size % 16 == 0
        for case in kernel.CASES
        for size in (4, 1 if case.requantize else 4)
    ]

    assert results()["streamed"] == 2 * sum(can)  # with shipped tiles and with small ones
    assert 0 < sum(can) < len(can)


def test_cases_reach_the_tiles_of_few_and_of_many_rows() -> None:
    chosen = {kernel.Config(*config) for config in results()["chosen"]}

    few = ("few, narrow", "rows, narrow")
    assert chosen >= {kernel.CONFIGS[name] for name in ("tma, medium", "rows", "odd", *few)}
    # More than one step along the sum, the last of them not whole.
    for name in few:
        depth = kernel.CONFIGS[name].bk
        assert any(case.k > depth and case.k % depth for case in kernel.CASES), name
