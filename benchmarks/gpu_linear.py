"""Rows of the GPU benchmark for int8_linear: against bfloat16 cuBLAS and `torch._int_mm`.

Checked first: integer sums, bit for bit, against a product in float64, and the whole epilogue
against the definition. cuBLAS computes a plain bfloat16 linear, without scales and activation
function, and is held to the same sums.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from gpu_rows import Job, Row, rotated, too_far
from torch import Tensor

from fxq.lowering.int8_linear import int8_linear, reference
from fxq.lowering.kernels.int8_linear import why_by_pointers

BF16_DB = 40.0  # rounded once, to 8 bits
ROUNDED_CODES = 2e-3  # of a result near the middle of two codes either is right


class Shape(NamedTuple):
    """A layer.

    Args:
        m: rows.
        n: output channels.
        k: input channels.
        per_row: a scale per row, as dynamic quantization has it; one for all otherwise.
        activation: of the epilogue.
        requantize: the result is codes.
    """

    m: int
    n: int
    k: int
    per_row: bool = False
    activation: str = "none"
    requantize: bool = False


LARGE = {"8192 cubed": Shape(8192, 8192, 8192), "4096 cubed": Shape(4096, 4096, 4096)}
VIT_L = {  # batch 8 of 197 tokens, static scales
    "ViT-L qkv": Shape(1576, 3072, 1024),
    "ViT-L proj": Shape(1576, 1024, 1024),
    "ViT-L fc1, GELU, requantize": Shape(1576, 4096, 1024, False, "gelu", True),
    "ViT-L fc2": Shape(1576, 1024, 4096),
}
WAN = {  # 21 x 30 x 52 tokens (81 frames, 480p), scales per token
    "Wan-14B qkv": Shape(32760, 5120, 5120, True),
    "Wan-14B ffn up, tanh GELU": Shape(32760, 13824, 5120, True, "gelu_tanh"),
    "Wan-14B ffn down": Shape(32760, 5120, 13824, True),
}
DIT_XL = {  # batch 16 of 256 tokens, scales per token
    "DiT-XL qkv": Shape(4096, 3456, 1152, True),
    "DiT-XL proj": Shape(4096, 1152, 1152, True),
    "DiT-XL fc1, tanh GELU": Shape(4096, 4608, 1152, True, "gelu_tanh"),
    "DiT-XL fc2": Shape(4096, 1152, 4608, True),
}
FEW = {f"{m} rows, 4096 x 4096": Shape(m, 4096, 4096, True) for m in (1, 16, 64)}
TINY = {
    "tiny": Shape(33, 48, 64),
    "tiny, GELU, requantize": Shape(20, 32, 48, False, "gelu", True),
    "tiny, one row": Shape(1, 32, 64, True),
}


@dataclass(frozen=True)
class Inputs:
    """Operands of a case, and what they give.

    Args:
        shape: of the case.
        x: codes `[M, K]`.
        weight: codes `[N, K]`.
        scales: of x, `[M, 1]` or `[1, 1]`, and of the weight `[N, 1]`.
        bias: `[N]`.
        out_scale: of the result's codes.
        sums: exact integer sums `[M, N]`, int64.
    """

    shape: Shape
    x: Tensor
    weight: Tensor
    scales: tuple[Tensor, Tensor]
    bias: Tensor
    out_scale: Tensor | None
    sums: Tensor


@functools.lru_cache(maxsize=1)
def inputs_of(shape: Shape, device: str) -> Inputs:
    """Return random operands of a shape; rows of one case share them."""
    generator = torch.Generator(device).manual_seed(0)

    def codes(*size: int) -> Tensor:
        found = torch.randint(-127, 128, size, generator=generator, device=device)
        return found.to(torch.int8)

    def floats(*size: int) -> Tensor:
        return torch.rand(size, generator=generator, device=device) + 0.5

    x, weight = codes(shape.m, shape.k), codes(shape.n, shape.k)
    sums = (x.double() @ weight.double().T).to(torch.int64)  # below 2^53: exact
    # Codes have a deviation of 73: results about 1, where activation functions bend.
    x_scale = floats(shape.m if shape.per_row else 1, 1) / 73
    scales = x_scale, floats(shape.n, 1) / (73 * shape.k**0.5)
    out_scale = floats(1) / 40 if shape.requantize else None
    return Inputs(shape, x, weight, scales, floats(shape.n), out_scale, sums)


def ours(given: Inputs, x: Tensor, weight: Tensor) -> Tensor:
    """Return the whole layer by fxq."""
    shape, (x_scale, w_scale) = given.shape, given.scales
    return int8_linear(
        x, x_scale, None, weight, w_scale, given.bias, torch.bfloat16, shape.activation, None,
        given.out_scale,
    )  # fmt: skip


def wrong_sums(given: Inputs) -> str | None:
    """Return why integer sums of the kernel are not exact, None where they are.

    The kernel gives sums times scales of one: as fp32, which rounds each once, and in bfloat16,
    which has the tiles that are timed.
    """
    ones = [torch.ones_like(scale) for scale in given.scales]
    for dtype in (torch.float32, torch.bfloat16):
        found = int8_linear(given.x, ones[0], None, given.weight, ones[1], None, dtype)
        different = int((found != given.sums.float().to(dtype)).sum())
        if different:
            return f"{different} of {found.numel()} integer sums are not exact as {dtype}"
    return None


def wrong_layer(given: Inputs, found: Tensor) -> str | None:
    """Return why a layer's result is not the definition's, None where it is."""
    shape, (x_scale, w_scale) = given.shape, given.scales
    expected = reference(
        given.x, x_scale, None, given.weight, w_scale, given.bias, torch.float32, shape.activation,
        None, given.out_scale,
    )  # fmt: skip
    if not shape.requantize:
        return too_far(expected, found, BF16_DB)
    steps = (found.int() - expected.int()).abs()
    share = float((steps > 0).float().mean())
    if share > ROUNDED_CODES or int(steps.max()) > 1:
        return f"{share:.1%} of the codes differ, by up to {int(steps.max())}"
    return None


def make_ours(shape: Shape, device: str) -> Job:
    """Return the row of fxq."""
    given = inputs_of(shape, device)
    job = _job(
        given,
        given.weight,
        given.x,
        lambda x, weight: ours(given, x, weight),
        lambda found: wrong_sums(given) or wrong_layer(given, found),
    )
    size = 1 if shape.requantize else 2
    why = why_by_pointers(*shape[:3], size, given.x.device)
    return replace(job, notes={"kernel": f"by pointers: {why}" if why else "TMA"})


def make_cublas(shape: Shape, device: str) -> Job:
    """Return the row of a bfloat16 linear."""
    given = inputs_of(shape, device)
    bias = given.bias.bfloat16()
    expected = given.sums + bias.double()
    return _job(
        given,
        given.weight.bfloat16(),
        given.x.bfloat16(),
        lambda x, weight: F.linear(x, weight, bias),
        lambda found: too_far(expected, found, BF16_DB),
    )


def make_int_mm(shape: Shape, device: str) -> Job:
    """Return the row of `torch._int_mm`, which has no epilogue."""
    given = inputs_of(shape, device)

    def check(found: Tensor) -> str | None:
        return None if torch.equal(found.long(), given.sums) else "its sums are not exact"

    return _job(given, given.weight, given.x, lambda x, weight: torch._int_mm(x, weight.t()), check)


def _job(
    given: Inputs,
    weight: Tensor,
    x: Tensor,
    layer: Callable[[Tensor, Tensor], Tensor],
    check: Callable[[Tensor], str | None],
) -> Job:
    m, n, k = given.shape[:3]
    calls = tuple(functools.partial(layer, *copy) for copy in rotated(x, weight))
    inputs = {"x": given.x, "weight": given.weight}
    return Job(calls, inputs, lambda: check(calls[0]()), 2.0 * m * n * k)


MAKERS = {
    "fxq int8_linear": make_ours,
    "bfloat16 cuBLAS": make_cublas,
    "torch._int_mm": make_int_mm,
}


def rows(shapes: dict[str, Shape]) -> list[Row]:
    """Return the rows of layers, fxq's first."""
    return [
        Row(
            case,
            variant,
            "TOP/s",
            6.0 if make is make_ours else 2.0,
            functools.partial(make, shape),
            f"linear {tuple(shape)}" if make is make_ours else None,
        )
        for case, shape in shapes.items()
        for variant, make in MAKERS.items()
    ]
