"""Compile a Triton kernel for a GPU that is not there, and read what the compiler made of it.

What can be known without running: registers, spills, shared memory, and whether the product uses
wgmma and the loads are asynchronous copies.
"""

import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource


@dataclass(frozen=True)
class AotReport:
    """What ptxas said of one kernel.

    Args:
        ptx: the kernel's PTX.
        registers: per thread.
        spill_bytes: stores and loads to local memory together.
        shared_bytes: shared memory per block.
        has_wgmma: the product runs on Hopper's warp-group tensor cores.
        has_async_copy: global memory is read by cp.async or the bulk copy engine.
        serialized: ptxas had to serialize wgmma instructions.
    """

    ptx: str
    registers: int
    spill_bytes: int
    shared_bytes: int
    has_wgmma: bool
    has_async_copy: bool
    serialized: bool


def compile_for(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    *,
    num_warps: int,
    num_stages: int,
    divisible_by_16: tuple[str, ...] = (),
    fp_fusion: bool = True,
    capability: int = 90,
) -> AotReport:
    """Compile `kernel` ahead of time.

    Args:
        kernel: a `@triton.jit` function.
        signature: parameter -> Triton type (`"*i8"`, `"i32"`); every constexpr as `"constexpr"`.
        constexprs: values of the constexprs.
        num_warps: warps per program.
        num_stages: software pipelining depth.
        divisible_by_16: pointers and sizes a launch would find divisible by 16.
        fp_fusion: a product and a sum may become one FMA, Triton's default.
        capability: compute capability times 10.
    """
    order = list(signature)
    attributes = {(order.index(name),): [["tt.divisibility", 16]] for name in divisible_by_16}
    source = ASTSource(
        fn=kernel, signature=dict(signature), constexprs=dict(constexprs), attrs=attributes
    )
    target = GPUTarget("cuda", capability, 32)
    options = {"num_warps": num_warps, "num_stages": num_stages, "enable_fp_fusion": fp_fusion}
    compiled = triton.compile(source, target=target, options=options)
    ptx = compiled.asm["ptx"]
    log = _ptxas_log(ptx, capability, fp_fusion)
    return AotReport(
        ptx=ptx,
        registers=max(_numbers(r"Used (\d+) registers", log)),
        spill_bytes=sum(_numbers(r"(\d+) bytes spill (?:stores|loads)", log)),
        shared_bytes=int(compiled.metadata.shared),
        has_wgmma="wgmma.mma_async" in ptx,
        has_async_copy=re.search(r"cp\.async\.(c[ag]\.shared|bulk\.tensor)", ptx) is not None,
        serialized="serialized" in log,
    )


def _numbers(pattern: str, log: str) -> list[int]:
    found = [int(number) for number in re.findall(pattern, log)]
    if not found:  # a changed log must not read as "no spills"
        raise RuntimeError(f"ptxas -v: expected a line like {pattern!r}, found: {log}")
    return found


def _ptxas_log(ptx: str, capability: int, fp_fusion: bool) -> str:
    tool = get_ptxas(capability).path  # the one Triton itself would run
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "kernel.ptx")
        Path(path).write_text(ptx)
        command = [str(tool), "-v", f"-arch=sm_{capability}a", path, "-o", os.devnull]
        if not fp_fusion:
            command.append("--fmad=false")
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"ptxas refused the kernel: {done.stderr}")
    return done.stderr
