"""Rows of the GPU benchmark for sparse attention: against cuDNN, FlashAttention and FlexAttention.

Random inputs; top-p is off, so that the density is exact. FlexAttention gets a block mask made
before, of the lists that fxq selects; dense attention by torch is what both are to beat.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from gpu_judge import Inputs, Shape, lists_of, wrong_attention, wrong_count
from gpu_rows import Job, Row, rotated
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fxq.lowering import flex_attention
from fxq.lowering.kernels import attend_blocks, rectified_attention
from fxq.passes.rectified_spaattn import block_adjacency, curve_order

LENGTHS = {
    "32k": Shape((21, 30, 52), 40, 128),  # Wan-14B, 81 frames, 480p
    "119k": Shape((33, 45, 80), 24, 128, 256),  # HunyuanVideo, 129 frames, 720p
    "8k": Shape((8, 32, 32), 24, 128),
}
ATTEND, SELECT = "fxq, attend alone", "fxq, pool and select alone"
TINY = {"tiny": Shape((2, 3, 7), 1, 16, 5, 0.5, block_size=16, dtype=torch.float16)}


@functools.lru_cache(maxsize=1)
def random_qkv(
    n_tokens: int, heads: int, dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, ...]:
    """Return query, key and value, with heads beside channels as a linear leaves them."""
    generator = torch.Generator(device).manual_seed(0)
    size = (1, n_tokens, heads, dim)
    found = [torch.randn(size, generator=generator, device=device) for _ in range(3)]
    return tuple(x.to(dtype).transpose(1, 2) for x in found)


def inputs_of(shape: Shape, device: str) -> Inputs:
    """Return random inputs of a shape; rows with the same tensors share them."""
    q, k, v = random_qkv(shape.n_tokens, shape.heads, shape.dim, shape.dtype, device)
    order = adjacency = None
    if shape.curve:
        order = curve_order(shape.grid)
        adjacency = block_adjacency(shape.grid, order, shape.block_size).to(device)
        order = order.to(device)
    n_visual, gate = math.prod(shape.grid), shape.mode == "paper"
    args = (
        q, k, v, torch.tensor(shape.density, device=device), None, order, adjacency, n_visual,
        shape.text, shape.block_size, 0.0, shape.mode, "complement", gate, False, False,
        shape.dim**-0.5,
    )  # fmt: skip
    return Inputs(shape, (q, k, v), args)


def make_fxq(shape: Shape, device: str, part: str = "all") -> Job:
    """Return a row of fxq: "all", "attend" at lists made before, or "select", which makes them."""
    given = inputs_of(shape, device)
    prepared = rectified_attention.prepare(*given.args)
    listed = lists_of(prepared, shape.layout, shape.heads)

    def call_of(*qkv: Tensor) -> Callable[[], Any]:
        args = (*qkv, *given.args[3:])
        if part == "all":
            return lambda: rectified_attention.launch(*args)[0]
        if part == "select":
            return lambda: rectified_attention.prepare(*args)
        made = rectified_attention.prepare(*args)
        return lambda: attend_blocks.launch(*made, is_causal=False)[0]

    def check() -> str | None:
        if why := wrong_count(given, prepared):
            return why
        found = calls[0]()
        if part == "select":
            same = torch.equal(lists_of(found, shape.layout, shape.heads), listed)
            return None if same else "a second run selects other blocks"
        return wrong_attention(given, prepared, found)

    calls = tuple(call_of(*copy) for copy in rotated(*given.qkv))
    visited = float(listed.float().mean())
    return _job(given, calls, check, visited if part != "select" else 0.0, {"visited": visited})


def make_dense(shape: Shape, device: str, backend: SDPBackend) -> Job:
    """Return a row of torch's dense attention."""
    given = inputs_of(shape, device)

    def call(*qkv: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*qkv)

    calls = tuple(functools.partial(call, *copy) for copy in rotated(*given.qkv))
    check = lambda: wrong_attention(given, None, calls[0]())  # noqa: E731
    return _job(given, calls, check, 1.0, {"visited": 1.0})


def make_flex(shape: Shape, device: str, attention: Callable[..., Tensor] | None = None) -> Job:
    """Return a row of FlexAttention at the lists of fxq, made before; it has no R and U."""
    given = inputs_of(shape, device)
    layout, size = shape.layout, shape.block_size
    found = rectified_attention.prepare(*given.args)
    prepared = found._replace(
        selection=found.selection._replace(ratio=torch.ones_like(found.selection.ratio)),
        correction=None,
    )
    listed = lists_of(prepared, layout, shape.heads)
    text = layout.text_mask(None, 1, given.qkv[0].device)
    mask = flex_attention.block_mask(listed[None], text, layout)
    n_visual, n_text = layout.n_blocks * size, -(-layout.text_size // size) * size
    padded = [flex_attention.pad_segments(x, layout, n_visual, n_text) for x in given.qkv]
    run = attention or flex_attention.compiled()

    calls = tuple(
        functools.partial(run, *copy, block_mask=mask, scale=given.scale)
        for copy in rotated(*padded)
    )

    def check() -> str | None:
        out = calls[0]()
        parts = out[:, :, : layout.n_visual], out[:, :, n_visual : n_visual + layout.text_size]
        return wrong_attention(given, prepared, torch.cat(parts, 2))

    visited = float(listed.float().mean())
    return _job(given, calls, check, visited, {"visited": visited})


def _job(
    given: Inputs,
    calls: tuple[Callable[[], Any], ...],
    check: Callable[[], str | None],
    visited: float,
    notes: dict[str, Any],
) -> Job:
    """Return a job whose work is two products of every query and every key that it sees."""
    shape, layout = given.shape, given.shape.layout
    text = layout.text_size
    pairs = layout.n_visual * (visited * layout.n_visual + text) + text * shape.n_tokens
    work = 4.0 * pairs * shape.dim * shape.heads if visited else 0.0
    inputs = dict(zip(("query", "key", "value"), given.qkv, strict=True))
    return Job(calls, inputs, check, work, notes)


def rows(lengths: dict[str, Shape], densities: Sequence[float], **changes: Any) -> list[Row]:
    """Return the rows of fxq and FlexAttention at densities."""
    found = []
    for name, base in lengths.items():
        for density in densities:
            shape = base._replace(density=density, **changes)
            case = f"attention {name}, d {shape.dim}, density {density:g}"
            figure = f"attention {shape.dim} {shape.block_size}"
            curve, online = shape._replace(curve=True), shape._replace(mode="online")
            make, unit = functools.partial, "TFLOP/s"
            found += [
                Row(case, "fxq", unit, 8, make(make_fxq, shape), figure),
                Row(case, ATTEND, unit, 4, make(make_fxq, shape, part="attend"), figure),
                Row(case, SELECT, "", 4, make(make_fxq, shape, part="select")),
                Row(case, "fxq, gather and neighbours", unit, 8, make(make_fxq, curve), figure),
                Row(case, "fxq online", unit, 8, make(make_fxq, online)),
                Row(case, "FlexAttention, block mask", unit, 25, make(make_flex, shape)),
            ]
    return found


def dense_rows(lengths: dict[str, Shape], **changes: Any) -> list[Row]:
    """Return the rows of torch's dense attention."""
    backends = {
        "cuDNN SDPA": SDPBackend.CUDNN_ATTENTION,
        "FlashAttention SDPA": SDPBackend.FLASH_ATTENTION,
    }
    return [
        Row(
            f"attention {name}, d {shape.dim}, dense",
            variant,
            "TFLOP/s",
            8,
            functools.partial(make_dense, shape, backend=backend),
        )
        for name, base in lengths.items()
        for shape in [base._replace(**changes)]
        for variant, backend in backends.items()
    ]
