"""Compile a Triton kernel for sm_90 without a GPU, and read from its machine code where it stalls.

What can be known without running: registers, local memory, shared memory, and of every loop whether
tensor cores and copies work on while it waits. The code read is the cubin that a launch would load,
so every option that this Triton gives to ptxas is in it.

    WARPGROUP.DEPBAR.LE gsb0, n    a wait that leaves n groups of products running
    DEPBAR.LE SB0, n               a wait that leaves n groups of asynchronous copies running
    LDGSTS, UTMALDG                an asynchronous copy, by threads or by the bulk copy engine (TMA)
    USETMAXREG                     warps are specialized: some copy, some compute
    LDL, STL                       local memory: spilled registers

A copy by TMA is waited for at a barrier in memory, which tells nothing of the copies behind it;
those are counted where they are issued, in front of the loop.
"""

import re
import subprocess
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

SHARED_BYTES = 232_448  # what a block may have on sm_90
SHARED_PER_SM = 233_472  # of which every block takes 1 KB for itself
REGISTERS_PER_SM = 65_536
THREADS_PER_SM = 2_048
PRODUCT = re.compile(r"[HIQ]G?MMA\b")  # tensor cores, of a warp group or of a warp
WARP_GROUP_PRODUCT = re.compile(r"[HIQ]GMMA\b")
LDGSTS = re.compile(r"LDGSTS\b")
TMA = re.compile(r"UTMALDG\b")
TMA_STORE = re.compile(r"UTMASTG\b")
COPY = re.compile(r"(LDGSTS|UTMALDG)\b")
LOCAL = re.compile(r"(LDL|STL)\b")
WAIT_PRODUCT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, (0x[0-9a-f]+)")
WAIT_COPY = re.compile(r"(?<!GROUP\.)DEPBAR\.LE SB0, (0x[0-9a-f]+)")
SPECIALIZED = re.compile(r"USETMAXREG")
TMA_WAIT = re.compile(r"SYNCS\.PHASECHK")
EXPONENTIAL = re.compile(r"MUFU\.EX2")
INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([^;]+?)\s*;")
LABEL = re.compile(r"^(\.L_x_\d+):")
BRANCH = re.compile(r"BRA(?:\.\w+)*\s.*`\((\.L_x_\d+)\)")


@dataclass(frozen=True)
class Loop:
    """A backward branch and what it goes back over.

    Args:
        first: index of its first instruction in the code.
        body: its instructions, without predicates.
    """

    first: int
    body: tuple[str, ...]

    def holds(self, other: "Loop") -> bool:
        """Tell whether another loop is inside."""
        end, of_other = self.first + len(self.body), other.first + len(other.body)
        return other is not self and self.first <= other.first and of_other <= end

    def count(self, pattern: re.Pattern[str]) -> int:
        """Return how many instructions match from their beginning."""
        return _count(pattern, self.body)

    @property
    def pending_products(self) -> tuple[int, ...]:
        """Groups of products that each wait leaves running."""
        return _numbers(WAIT_PRODUCT, self.body)

    def hidden(self, pattern: re.Pattern[str]) -> int:
        """Return how many instructions match and are issued while tensor cores work.

        A group of products that is running at the end of a round runs on in the next one.
        """
        n_hidden, running = 0, False
        for n_round in range(2):
            for line in self.body:
                wait = WAIT_PRODUCT.search(line)
                if WARP_GROUP_PRODUCT.match(line):
                    running = True
                elif wait and int(wait[1], 16) == 0:
                    running = False
                n_hidden += n_round and running and pattern.match(line) is not None
        return n_hidden

    @property
    def pending_copies(self) -> tuple[int, ...]:
        """Groups of asynchronous copies that each wait leaves running."""
        return _numbers(WAIT_COPY, self.body)


@dataclass(frozen=True)
class Code:
    """What was made of one kernel.

    Args:
        ptx: its PTX.
        instructions: its machine code in order, without predicates.
        loops: in order of their first instruction; one that holds another holds its code too.
        registers: per thread, where it is launched.
        shared_bytes: shared memory per block.
        num_warps: warps per block, those that only copy included.
    """

    ptx: str
    instructions: tuple[str, ...]
    loops: tuple[Loop, ...]
    registers: int
    shared_bytes: int
    num_warps: int

    def count(self, pattern: re.Pattern[str]) -> int:
        """Return how many instructions match from their beginning."""
        return _count(pattern, self.instructions)

    @property
    def main_loop(self) -> Loop:
        """The first innermost loop with products."""
        found = [loop for loop in self.loops if loop.count(PRODUCT) and not self._holds_one(loop)]
        if not found:
            raise ValueError(f"expected a loop with products, found {len(self.loops)} loops")
        return found[0]

    @property
    def copies_ahead(self) -> int:
        """Asynchronous copies that run on while the main loop waits for those of its round."""
        loop = self.main_loop
        if loop.pending_copies:
            return min(loop.pending_copies)
        before = self.instructions[: loop.first]
        waited = max((i for i, line in enumerate(before) if TMA_WAIT.match(line)), default=0)
        started = _count(TMA, before[waited:])
        return started - loop.count(TMA)

    @property
    def epilogue_instructions(self) -> int:
        """Instructions from the end of the last loop with products to the last return."""
        last = max(loop.first + len(loop.body) for loop in self.loops if loop.count(PRODUCT))
        rest = self.instructions[last:]
        return max((i for i, line in enumerate(rest, 1) if line.startswith("EXIT")), default=0)

    @property
    def local_memory(self) -> int:
        """Loads and stores of local memory."""
        return self.count(LOCAL)

    @property
    def is_specialized(self) -> bool:
        """Some warps copy while others compute."""
        return self.count(SPECIALIZED) > 0

    @property
    def blocks_per_sm(self) -> int:
        """Blocks that fit a multiprocessor at once."""
        per_warp = -(-self.registers * 32 // 256) * 256  # registers are given out 256 at a time
        return min(
            REGISTERS_PER_SM // (per_warp * self.num_warps),
            SHARED_PER_SM // (self.shared_bytes + 1024),
            THREADS_PER_SM // (32 * self.num_warps),
        )

    def _holds_one(self, loop: Loop) -> bool:
        end = loop.first + len(loop.body)
        return any(
            other is not loop
            and other.count(PRODUCT)
            and loop.first <= other.first
            and other.first + len(other.body) <= end
            for other in self.loops
        )


def _count(pattern: re.Pattern[str], lines: tuple[str, ...]) -> int:
    return sum(pattern.match(line) is not None for line in lines)


def _numbers(pattern: re.Pattern[str], lines: tuple[str, ...]) -> tuple[int, ...]:
    return tuple(int(found[1], 16) for line in lines if (found := pattern.search(line)))


def read(sass: str) -> tuple[tuple[str, ...], tuple[Loop, ...]]:
    """Return the instructions and loops of what `nvdisasm -c` printed."""
    instructions: list[str] = []
    labels: dict[str, int] = {}
    loops: dict[int, int] = {}  # first instruction -> one past the last
    for line in sass.splitlines():
        if label := LABEL.match(line.strip()):
            labels[label[1]] = len(instructions)
        elif found := INSTRUCTION.search(line):
            instructions.append(" ".join(found[2].split()))
            branch = BRANCH.match(instructions[-1])
            first = labels.get(branch[1]) if branch else None
            if first is not None and _is_loop(instructions[first:]):
                loops[first] = len(instructions)
    if not instructions:
        raise ValueError(f"expected machine code of nvdisasm, found: {sass[:200]!r}")
    found_loops = (Loop(i, tuple(instructions[i:end])) for i, end in sorted(loops.items()))
    return tuple(instructions), tuple(found_loops)


def _is_loop(body: list[str]) -> bool:
    # A branch to itself is padding; one over a return comes back from a wait put out of the way.
    return len(body) > 1 and not any(line.startswith("EXIT") for line in body)


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
) -> Code:
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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        sass = _run(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
        usage = _run(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
    instructions, loops = read(sass)
    return Code(
        ptx=compiled.asm["ptx"],
        instructions=instructions,
        loops=loops,
        registers=registers_in(usage),
        shared_bytes=int(compiled.metadata.shared),
        num_warps=int(compiled.metadata.num_warps),
    )


def registers_in(usage: str) -> int:
    """Return the registers per thread that `cuobjdump -res-usage` printed."""
    found = re.search(r"\bREG:(\d+)", usage)
    if found is None:  # a changed line must not read as none
        raise ValueError(f"cuobjdump -res-usage: expected REG:<number>, found: {usage[:200]!r}")
    return int(found[1])


def _run(tool: str, *args: str) -> str:
    done = subprocess.run([tool, *args], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{Path(tool).name} refused the kernel: {done.stderr[:300]}")
    return done.stdout
