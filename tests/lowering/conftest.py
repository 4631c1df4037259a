"""The analysis of machine code lies beside the benchmarks, which use it too."""

import sys
from pathlib import Path

import pytest
from poison import poisoned

from fxq.lowering.cpu import avx2_conv
from fxq.lowering.cpu.native import native
from fxq.lowering.cpu.onednn import cpu_int8
from fxq.lowering.devices import x86
from fxq.lowering.kernels import buffers

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
WINDOWS = ("MIN_CONV_OUTPUTS", *(name for name in dir(x86) if name.startswith("MIN_WINDOW")))


@pytest.fixture
def avx2_convs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs start as poison, and the kernel for convolutions takes all that it can."""
    if not cpu_int8().saturates or isinstance(native("avx2_conv"), str):
        pytest.skip("needs AVX2 without VNNI, and a compiler")
    monkeypatch.setattr(buffers, "allocate", poisoned)
    monkeypatch.setattr(avx2_conv, "is_faster", lambda *_: True)
    for limit in ("MIN_AVX2_CONV_MACS", *WINDOWS):
        monkeypatch.setattr(x86, limit, 0)
