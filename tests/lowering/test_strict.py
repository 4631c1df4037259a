"""The strict interpreter sees a scalar condition that meets a tile, whatever Triton makes of it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

SCRIPT = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import triton
import triton.language as tl
from strict import strict


@triton.jit
def kernel(out_ptr, D, N, B: tl.constexpr):
    offs, n = tl.arange(0, B), tl.program_id(0)
    tl.store(out_ptr + n * D + offs, 1, mask={mask})


strict()
out = torch.zeros(3, 5, dtype=torch.int32)
kernel[(3,)](out, 5, 2, B=8)
print(out.sum(1).tolist())
"""


def run(mask: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Fill the first two rows of three under a mask; Triton reads a kernel's source from a file."""
    script = folder / "script.py"
    script.write_text(SCRIPT.format(mask=mask))
    return subprocess.run(
        [sys.executable, "-W", "ignore", str(script), str(Path(__file__).parent)],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("mask", ["(offs < D) & (n < N)", "(n < N) & (offs < D)"])
def test_a_scalar_condition_is_refused(mask: str, tmp_path: Path) -> None:
    done = run(mask, tmp_path)

    assert done.returncode == 1
    assert "a scalar one that meets a tile" in done.stderr


def test_a_scalar_in_the_bound_is_not(tmp_path: Path) -> None:
    done = run("offs < tl.where(n < N, D, 0)", tmp_path)

    assert done.stdout.splitlines() == ["[5, 5, 0]"], done.stderr
