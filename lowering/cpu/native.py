"""Kernels of fxq's own, the C++ files here: built by Inductor's own compiler when first wanted.

A library lies in Inductor's cache on disk, under a hash of its source and of the command that
compiles it, so that a machine compiles it once. What it needs is Linux on x86-64, a processor with
AVX2 and FMA, and a C++ compiler; where one is missing `native` says so, and rules decline with it.

The sources know no torch: plain C functions of addresses, called through ctypes, which compile in
seconds and cost microseconds a call. Their threads are those of torch's OpenMP pool.
"""

import ctypes
import functools
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Compilers would contract a product and a sum to one rounding, which the definitions have not.
FLAGS = ("-mavx2", "-mfma", "-ffp-contract=off")
# Of ATen, which asks the processor for AVX2 and FMA, and heeds ATEN_CPU_CAPABILITY.
CAPABLE = ("AVX2", "AVX512", "AVX10")  # and what begins with them
MAX_ERROR = 200  # characters of a compiler's complaint

ADDRESS, SIZE, NUMBER = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
FACTOR = ctypes.c_float
# Arguments of the function `fxq_<name>` of `<name>.cpp`.
SIGNATURES: dict[str, tuple[Any, ...]] = {
    "weight_only_linear": (
        *(ADDRESS, SIZE, SIZE, ADDRESS, NUMBER, ADDRESS, SIZE, NUMBER),
        *(ADDRESS, ADDRESS, SIZE, SIZE, NUMBER),
    ),
    "avx2_linear": (
        *(ADDRESS, SIZE, SIZE, NUMBER, ADDRESS, SIZE, ADDRESS, SIZE, ADDRESS, ADDRESS, ADDRESS),
        *(ADDRESS, ADDRESS, SIZE, SIZE, ADDRESS, ADDRESS, ADDRESS, SIZE, NUMBER, ADDRESS),
        *(ADDRESS, SIZE, SIZE, ADDRESS, SIZE, SIZE, NUMBER, NUMBER, ADDRESS, NUMBER, SIZE, NUMBER),
    ),
    "match_steps": (ADDRESS, SIZE, SIZE, ADDRESS, ADDRESS, NUMBER),
    "cache_attention": (
        *(ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS),
        *(ADDRESS, NUMBER, FACTOR, ADDRESS, NUMBER),
    ),
    "avx2_conv": (
        *(ADDRESS, ADDRESS, ADDRESS, NUMBER, ADDRESS, ADDRESS, ADDRESS, ADDRESS, ADDRESS),
        *(ADDRESS, ADDRESS, SIZE, ADDRESS, NUMBER, ADDRESS, NUMBER, ADDRESS, ADDRESS),
        *(ADDRESS, SIZE, ADDRESS, SIZE, NUMBER, NUMBER, ADDRESS, NUMBER, SIZE, SIZE, NUMBER),
    ),
}


@functools.cache
def native(name: str) -> Any | str:
    """Return the function of a source, or why this machine has none.

    Args:
        name: of the source, a key of `SIGNATURES`.
    """
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"no native kernels for {sys.platform} on {platform.machine()}"
    capability = torch.backends.cpu.get_cpu_capability()
    if not capability.startswith(CAPABLE):
        return f"native kernels need AVX2; torch computes with {capability} here"
    try:
        library = _build(source_of(f"{name}.cpp"))
    except Exception as error:  # of a compiler, a disk, or the linker, each in a way of its own
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        return (
            f"the native kernel could not be built ({type(error).__name__}: "
            f"{first.strip()[:MAX_ERROR]}); Inductor needs a C++ compiler, as g++ or $CXX"
        )
    function = getattr(library, f"fxq_{name}")
    function.argtypes, function.restype = SIGNATURES[name], None
    return function


def source_of(name: str) -> str:
    """Return a source with the headers from beside it in the place of its `#include "..."`, so that
    the hash of the library covers them."""
    text = Path(__file__).with_name(name).read_text()
    return re.sub(r'^#include "(.+)"$', lambda found: source_of(found[1]), text, flags=re.MULTILINE)


def _build(source: str) -> Any:
    from torch._inductor.codecache import CppCodeCache  # loads Inductor

    return CppCodeCache.load(source, extra_flags=FLAGS)


def address(tensor: Tensor | None, *, strided: bool = False) -> int | None:
    """Return where a tensor starts, for a C function; None for none. It is contiguous, but where
    the function is told its strides."""
    if tensor is None:
        return None
    assert strided or tensor.is_contiguous()
    return tensor.data_ptr()
