"""Rectified sparse attention on a CPU against dense SDPA and compiled FlexAttention.

    python benchmarks/cpu_rectified_attention.py --threads 1       # about 15 minutes

Ours is the definition itself, pooling and selection included; FlexAttention gets its block mask for
nothing. The rule in `lowering/devices/cpu.py` follows from these numbers. fp32, blocks of 128
tokens that resemble each other. Top-p is off, so that the density is exact, but for one row with
the passes' default, which keeps more blocks where attention is spread out.
"""

import argparse
from collections.abc import Callable
from typing import Any

import torch
from common import (
    Machine,
    Table,
    Timing,
    Variant,
    add_common_arguments,
    measure,
    publish,
    reexec_with_isa,
)
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask
from torch.nn.functional import scaled_dot_product_attention

from fxq.lowering.flex_attention import block_lists, compiled
from fxq.numerics import sqnr_db
from fxq.rectified_attention.layout import BlockLayout
from fxq.rectified_attention.reference import plan, rectified_attention

SHAPES = ((4, 1024, 64), (2, 4096, 64), (1, 8192, 128))  # heads, tokens, head dim
DENSITIES = (0.1, 0.2, 0.35, 0.5)
BLOCK = 128
TOP_P = 0.3  # ReplaceAttention's default
COLUMNS = ("heads", "tokens", "head dim", "density", "variant", "kept", "ms", "p90 ms", "x SDPA")


def inputs(heads: int, tokens: int, dim: int) -> list[Tensor]:
    """Return query, key and value whose blocks resemble each other."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(1, heads, *shape, generator=generator)

    blocks = [normal(tokens // BLOCK, dim).repeat_interleave(BLOCK, 2) for _ in range(2)]
    return [0.6 * x + 0.3 * normal(tokens, dim) for x in blocks] + [normal(tokens, dim)]


def ours(qkv: list[Tensor], density: float, mode: str, top_p: float = 0.0) -> Callable[[], Tensor]:
    """Return what the operator computes; the gate is on in "paper" mode."""
    rest = (None, None, None, 0, 0, BLOCK, top_p, mode, "complement", mode == "paper", False)
    share = torch.tensor(density)
    return lambda: rectified_attention(*qkv, share, *rest, False, None)[0]


def kept_blocks(qkv: list[Tensor], density: float, top_p: float = 0.0) -> Tensor:
    """Return which blocks are visited `[1, heads, rows, columns]`, bool."""
    query, key, value = qkv
    layout = BlockLayout(query.shape[2], 0, 0, BLOCK)
    no_text, share = torch.ones(1, 0, dtype=torch.bool), torch.tensor(density)
    how = (no_text, None, layout, top_p, "sparse", "complement", False, False, False)
    return plan(query, key, value, share, *how, query.shape[-1] ** -0.5).selected


def flex(qkv: list[Tensor], density: float) -> Callable[[], Tensor]:
    """Return FlexAttention over the blocks that "sparse" mode visits."""
    query, key, value = qkv
    kept = kept_blocks(qkv, density)

    def seen(b: Tensor, h: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return kept[b, h, row // BLOCK, column // BLOCK]

    # Blocks visited whole (full_kv_indices) do not compile on a CPU with torch 2.14.
    mask = BlockMask.from_kv_blocks(*block_lists(kept), BLOCK_SIZE=BLOCK, mask_mod=seen)
    return lambda: compiled()(query, key, value, block_mask=mask)


def same_as(call: Callable[[], Tensor]) -> Callable[[Tensor], str | None]:
    """Return a check against another way to compute the same."""
    expected = call()

    def check(found: Tensor) -> str | None:
        reached = sqnr_db(expected, found)
        return None if reached >= 100 else f"{reached:.1f} dB, expected 100 dB"

    return check


def rows_of(
    heads: int, tokens: int, dim: int, density: float, options: Any
) -> list[dict[str, Any]]:
    """Measure a shape at a density."""
    qkv = inputs(heads, tokens, dim)
    dense = lambda: scaled_dot_product_attention(*qkv)  # noqa: E731
    variants = [
        Variant("SDPA, dense", dense, same_as(ours(qkv, 1 - 1e-6, "paper"))),
        *(
            # The definition itself, which tests/core/test_rectified_attention.py checks.
            Variant(f"fxq {mode}", ours(qkv, density, mode), lambda _: None)
            for mode in ("paper", "online")
        ),
        Variant("fxq paper, top-p", ours(qkv, density, "paper", TOP_P), lambda _: None),
        Variant("FlexAttention", flex(qkv, density), same_as(ours(qkv, density, "sparse"))),
    ]
    named = dict(zip(("query", "key", "value"), qkv, strict=True))
    timings = measure(variants, named, options.rounds, smoke=options.smoke)
    base, rows = timings["SDPA, dense"], []
    exact = float(kept_blocks(qkv, density).float().mean())
    with_top_p = float(kept_blocks(qkv, density, TOP_P).float().mean())
    shares = {"SDPA, dense": 1.0, "fxq paper, top-p": with_top_p}
    for variant, timing in timings.items():
        row: dict[str, Any] = {
            "heads": heads, "tokens": tokens, "head dim": dim, "density": density,
            "variant": variant, "kept": shares.get(variant, exact),
        }  # fmt: skip
        if isinstance(timing, Timing) and isinstance(base, Timing):
            row |= {"ms": timing.median_ms, "p90 ms": timing.p90_ms}
            row["x SDPA"] = timing.paired_speedup_over(base)
        else:
            row["variant"] = f"{variant} ({timing})"
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add_common_arguments(parser)
    options = parser.parse_args()
    reexec_with_isa(options.isa)
    torch.set_num_threads(options.threads)
    with torch.no_grad():
        rows = [
            row
            for shape in (SHAPES[:1] if options.smoke else SHAPES)
            for density in DENSITIES
            for row in rows_of(*shape, density, options)
        ]
    table = Table(
        name=f"cpu_rectified_attention_{options.isa}",
        title="Rectified sparse attention on a CPU",
        settings={"dtype": "float32", "block": BLOCK, "top-p": TOP_P, "rounds": options.rounds},
        machine=Machine.here(),
        columns=COLUMNS,
        rows=tuple(rows),
    )
    publish(table, smoke=options.smoke)


if __name__ == "__main__":
    main()
