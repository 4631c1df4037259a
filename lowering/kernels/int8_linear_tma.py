"""int8_linear on Hopper: some warps copy, others multiply, and programs stay for tile after tile.

The copy engine (TMA) loads tiles of x and w and stores those of the output, so that no thread
computes an address, and rows beyond the ends are zeros that nobody stores. Triton makes of the
inner loop one warp that copies and two warp groups that multiply half a tile each: Triton does not
let the product of integers run on past its wait, so that each group multiplies while the other one
waits. It makes so only with four warps, descriptors made in the kernel, and loops left apart.

Each of the three walks the tiles in a loop of its own, so that the first tiles of the next round
are copied under the epilogue of this one. The groups share every tile, so that one multiplies under
the other's epilogue only as far as the stages reach. Groups with tiles of their own (ping-pong)
cannot be said in Triton: flattened into one loop the kernel is not specialized at all (Triton 3.9:
one group of four warps, 255 registers, 477 accesses of local memory), and specializing the outer
loop instead of the inner one makes the same loops.

Same epilogue as `int8_linear_kernel`, which takes what this one cannot: other devices, and rows
that are no multiple of 16 bytes.
"""

import triton
import triton.language as tl

from fxq.lowering.kernels.int8_epilogue import finish, tile_of


@triton.jit
def int8_linear_tma_kernel(
    x_ptr, w_ptr, out_ptr, x_scale_ptr, x_zero_ptr, w_scale_ptr, w_sum_ptr, bias_ptr, residual_ptr,
    out_scale_ptr, out_zero_ptr,
    M, N, K, quant_min, quant_max,
    PER_ROW_SCALE: tl.constexpr, PER_ROW_ZERO: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_RESIDUAL: tl.constexpr, HAS_OUT_SCALE: tl.constexpr,
    PER_COLUMN_OUT: tl.constexpr, HAS_OUT_ZERO: tl.constexpr, ACT: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    x_desc = tl.make_tensor_descriptor(x_ptr, shape=[M, K], strides=[K, 1], block_shape=[BM, BK])
    w_desc = tl.make_tensor_descriptor(w_ptr, shape=[N, K], strides=[K, 1], block_shape=[BN, BK])
    out_desc = tl.make_tensor_descriptor(
        out_ptr, shape=[M, N], strides=[N, 1], block_shape=[BM, BN]
    )
    n_tiles = tl.cdiv(M, BM) * tl.cdiv(N, BN)
    for tile in tl.range(tl.program_id(0), n_tiles, tl.num_programs(0), flatten=False):
        row0, col0 = tile_of(tile, M, N, BM, BN, GROUP)
        acc = tl.zeros((BM, BN), dtype=tl.int32)
        for k in tl.range(0, K, BK, warp_specialize=True):
            x = x_desc.load([row0, k])
            w = w_desc.load([col0, k])
            acc = tl.dot(x, tl.trans(w), acc, out_dtype=tl.int32)
        y = finish(
            acc, row0, col0, x_scale_ptr, x_zero_ptr, w_scale_ptr, w_sum_ptr, bias_ptr,
            residual_ptr, out_scale_ptr, out_zero_ptr, M, N, quant_min, quant_max,
            PER_ROW_SCALE, PER_ROW_ZERO, HAS_ZERO, HAS_BIAS, HAS_RESIDUAL, HAS_OUT_SCALE,
            PER_COLUMN_OUT, HAS_OUT_ZERO, ACT, BM, BN,
        )  # fmt: skip
        out_desc.store([row0, col0], y.to(out_ptr.dtype.element_ty))
