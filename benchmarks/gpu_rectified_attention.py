"""Rectified sparse attention on a GPU against cuDNN and FlashAttention-2 SDPA and FlexAttention.

    python benchmarks/gpu_rectified_attention.py

Attention alone, bfloat16, at the shapes of two video transformers and one short sequence, for
several densities; every variant is timed in every round and only after its result was compared with
the fp32 definition (sparse) or with FlashAttention-2 (dense). "pool and select" is the part of ours
that is not attention. Inputs are random; top-p is off, so that the density is exact.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import Machine, Table, Timing, Variant, add_common_arguments, measure, publish
from gpu_common import EventClock, gpu_settings, require_cuda
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from fxq.lowering import flex_attention
from fxq.lowering.kernels import rectified_attention
from fxq.lowering.kernels.attend_blocks import BENCHMARK_CASES, Case
from fxq.lowering.lower_attention import min_attention_sqnr_db
from fxq.numerics import sqnr_db
from fxq.rectified_attention import reference

DENSITIES = (0.11, 0.2, 0.5, 0.7)
COLUMNS = ("case", "density", "variant", "ms", "p90 ms", "TFLOP/s of what is visited", "x cuDNN")


def random_inputs(case: Case) -> list[Tensor]:
    """Return query, key and value in bfloat16."""
    generator = torch.Generator("cuda").manual_seed(0)
    n_batch = len(case.text_len)
    return [
        torch.randn(
            (n_batch, heads, case.n_tokens, case.dim),
            generator=generator, device="cuda", dtype=torch.bfloat16,
        )
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    ]  # fmt: skip


def arguments(case: Case, qkv: list[Tensor], density: float, mode: str) -> tuple[Any, ...]:
    """Return the arguments of `fxq::rectified_attention` up to `center_keys`."""
    text_len = torch.tensor(case.text_len, dtype=torch.int32, device="cuda")
    return (
        *qkv, torch.tensor(density, device="cuda"), text_len if case.text_size else None, None,
        None, case.n_tokens - case.text_size, case.text_size, case.block_size, 0.0, mode,
        "complement", mode == "paper", False,
    )  # fmt: skip


def close_to(expected: Tensor) -> Callable[[Tensor], str | None]:
    """Return a check of an output against what it should be."""
    bound = min_attention_sqnr_db(expected.dtype)

    def check(found: Tensor) -> str | None:
        reached = sqnr_db(expected, found)
        return None if reached >= bound else f"{reached:.1f} dB, expected {bound:.1f} dB"

    return check


def dense(qkv: list[Tensor], backend: SDPBackend) -> Callable[[], Tensor]:
    """Return dense attention by one of torch's backends."""

    def call() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(*qkv)

    return call


def variants_of(case: Case, qkv: list[Tensor], density: float) -> list[Variant]:
    """Return every way of computing a case at a density."""
    flash = dense(qkv, SDPBackend.FLASH_ATTENTION)
    same = close_to(flash())
    scale = case.dim**-0.5
    found = [
        Variant("cuDNN SDPA, dense", dense(qkv, SDPBackend.CUDNN_ATTENTION), same),
        Variant("FlashAttention-2 SDPA, dense", flash, same),
    ]
    for mode in ("paper", "online"):
        args = arguments(case, qkv, density, mode)
        right = close_to(reference.rectified_attention(*args, False, None)[0])
        found.append(Variant(f"fxq {mode}", _ours(args, scale), right))
        if mode == "paper":
            found.append(Variant("pool and select of fxq paper", _prepare(args, scale), _any))
            found.append(Variant("FlexAttention paper", _flex(args, scale), right))
    return found


def _ours(args: tuple[Any, ...], scale: float) -> Callable[[], Tensor]:
    return lambda: rectified_attention.launch(*args, False, scale)[0]


def _prepare(args: tuple[Any, ...], scale: float) -> Callable[[], Tensor]:
    return lambda: rectified_attention.prepare(*args, False, scale).selection.ratio


def _flex(args: tuple[Any, ...], scale: float) -> Callable[[], Tensor]:
    return lambda: flex_attention.launch(*args, scale=scale)[0]


def _any(found: Tensor) -> None:
    """Part of a variant whose result is checked."""


def rows_of(
    name: str, case: Case, density: float, rounds: int, smoke: bool
) -> list[dict[str, Any]]:
    """Measure a case at a density."""
    qkv = random_inputs(case)
    inputs = dict(zip(("query", "key", "value"), qkv, strict=True))
    with torch.no_grad():
        variants = variants_of(case, qkv, density)
        timings = measure(variants, inputs, rounds, smoke=smoke, clock=EventClock())
    flops = 4 * case.n_tokens**2 * case.dim * case.heads * len(case.text_len)
    base = timings["cuDNN SDPA, dense"]
    rows = []
    for variant, timing in timings.items():
        row: dict[str, Any] = {"case": name, "density": density, "variant": variant}
        if isinstance(timing, Timing):
            row |= {"ms": timing.median_ms, "p90 ms": timing.p90_ms}
            if "select" not in variant:
                share = 1.0 if "dense" in variant else density
                row["TFLOP/s of what is visited"] = share * flops / timing.median_ms / 1e9
            if isinstance(base, Timing):
                row["x cuDNN"] = timing.speedup_over(base)
        else:
            row["variant"] = f"{variant} ({timing})"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    options = parser.parse_args()
    require_cuda()
    rows = [
        row
        for name, case in BENCHMARK_CASES.items()
        for density in DENSITIES
        for row in rows_of(name, case, density, options.rounds, options.smoke)
    ]
    table = Table(
        name="gpu_rectified_attention",
        title="Rectified sparse attention on a GPU, attention alone",
        settings=gpu_settings() | {"dtype": "bfloat16", "rounds": options.rounds},
        machine=Machine.here(),
        columns=COLUMNS,
        rows=tuple(rows),
    )
    publish(table, smoke=options.smoke)


if __name__ == "__main__":
    main()
