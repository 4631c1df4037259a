"""What a kernel should reach on an H200, from its machine code: what to compare a measurement to.

A round of the main loop takes as long as the busiest of what works side by side: tensor cores, the
issue of instructions, exponentials, shared memory, and copies from L2. Softmax that waits for its
logits is added to them instead. Latencies and power are left out, so this is what a kernel can
reach, not what it will.
"""

from dataclasses import dataclass

from sm90 import EXPONENTIAL, Code

N_SMS = 132
CLOCK_HZ = 1.755e9  # an H200 under load, at most
INT8_PER_CYCLE = 8192  # operations of a multiprocessor's tensor cores, a product and a sum each one
BF16_PER_CYCLE = 4096
SCHEDULERS = 4  # each issues one instruction of one warp a cycle
EXPONENTIAL_CYCLES = 8  # of a warp: 4 lanes of each scheduler's unit
# Of a multiprocessor, at least: what fp8 tiles of 128 x 256 x 128 draw without multicast where
# Triton's tutorial reaches 1280 TFLOP/s.
L2_BYTES_PER_CYCLE = 32
MEMORY_BYTES_PER_SECOND = 4.3e12  # what a large copy reads and writes on an H200, not its 4.8e12


@dataclass(frozen=True)
class Expected:
    """Cycles of one tile of output or of keys, and what that makes in operations a second.

    Args:
        tensor: of the tensor cores.
        total: with everything that does not run beside them.
        per_second: operations.
    """

    tensor: float
    total: float
    per_second: float


def attention(code: Code, rows: int, keys: int, dim: int) -> Expected:
    """Return what `attend_blocks` should reach in its main loop, in bfloat16.

    Args:
        code: of the kernel.
        rows: queries of a program.
        keys: of a tile.
        dim: D.
    """
    loop, blocks = code.main_loop, code.blocks_per_sm
    operations = 4 * rows * keys * dim
    tensor = operations / BF16_PER_CYCLE
    warps = code.num_warps / SCHEDULERS
    softmax = max(len(loop.body) * warps, loop.count(EXPONENTIAL) * EXPONENTIAL_CYCLES * warps)
    copies = 4 * keys * dim / L2_BYTES_PER_CYCLE  # keys and values, 2 bytes each
    hidden = blocks > 1 or loop.hidden(EXPONENTIAL) >= 0.7 * loop.count(EXPONENTIAL)
    total = max(tensor, softmax, copies) if hidden else max(tensor + softmax, copies)
    return _expected(tensor, total, operations)


def int8_linear(
    code: Code, shape: tuple[int, int, int], tile: tuple[int, int], depth: int
) -> Expected:
    """Return what `int8_linear` should reach, and not more than memory gives.

    Args:
        code: of the kernel.
        shape: M, N and K.
        tile: rows and columns of a tile.
        depth: K of a round.
    """
    (m, n, k), (bm, bn) = shape, tile
    loop, rounds = code.main_loop, -(-k // depth)
    tensor = 2 * bm * bn * depth / INT8_PER_CYCLE * rounds
    copies = (bm + bn) * depth / L2_BYTES_PER_CYCLE * rounds
    groups = 2 if code.is_specialized else 1  # a group's code stands twice, each runs one
    outside = (len(code.instructions) - groups * len(loop.body)) / groups
    working = code.num_warps - 4 if code.is_specialized else code.num_warps
    issue = len(loop.body) * rounds * working / SCHEDULERS
    # Without a second group, or a wait that leaves products running, the loop's own code is added.
    streams = code.is_specialized or min(loop.pending_products, default=0) > 0
    main = max(tensor, issue, copies) if streams else max(tensor + issue, copies)
    total = main + outside * working / SCHEDULERS
    tiles = -(-m // bm) * -(-n // bn)
    waves = -(-tiles // (N_SMS * (1 if code.is_specialized else code.blocks_per_sm)))
    n_bytes = m * k + n * k + 2 * m * n  # each once, and an output of 2 bytes
    seconds = max(waves * total / CLOCK_HZ, n_bytes / MEMORY_BYTES_PER_SECOND)
    return Expected(tensor, total, 2 * m * n * k / seconds)


def _expected(tensor: float, total: float, operations: float) -> Expected:
    return Expected(tensor, total, operations / total * N_SMS * CLOCK_HZ)
