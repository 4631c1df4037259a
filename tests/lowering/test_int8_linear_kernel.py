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

import pytest

pytest.importorskip("triton")
from kernel_cases import assert_passes

from fxq.lowering.kernels import int8_linear as kernel

SMALL = kernel.Config(16, 16, 32, 4, 2)  # tiles that the cases' sizes do not divide
RUNNER = """
import json, sys
sys.path.insert(0, sys.argv[1])
from kernel_cases import check
from strict import strict
from fxq.lowering.kernels import int8_linear as kernel
strict()
small = kernel.Config(16, 16, 32, 4, 2)
print(json.dumps([check(case, "cpu", config) for config in (None, small) for case in kernel.CASES]))
"""


@functools.cache
def results() -> list[dict[str, float]]:
    """Return what `check` found for every case, first with shipped tiles, then with small ones."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNNER, str(Path(__file__).parent)],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("tiles", ["shipped", "small"])
@pytest.mark.parametrize(
    "index", range(len(kernel.CASES)), ids=lambda i: str(tuple(kernel.CASES[i]))
)
def test_kernel_equals_reference_in_the_interpreter(index: int, tiles: str) -> None:
    found = results()[index + (len(kernel.CASES) if tiles == "small" else 0)]

    assert_passes(kernel.CASES[index], found)
