"""A decode step of a language model whose cache is state: tokens per second, and bytes.

    python benchmarks/decoding.py --threads 1        # about 4 minutes, most of it compiling

A Llama of random weights writes one token for each sequence with a cache that is almost full. fp32
is `torch.compile` alone on the same model with the same cache; beside it `weight_only.W8`, with a
cache in float and in int8. Each result is checked against eager code first.
"""

import argparse
import time
from typing import Any

import torch
from common import (
    Cell,
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
from transformers import LlamaConfig, LlamaForCausalLM

import fxq
from fxq.adapters.static_cache import FREE_TOKENS, StaticDecoder, calls
from fxq.numerics import sqnr_db
from fxq.passes import weight_only
from fxq.passes.common import QuantizeCache
from fxq.pipeline import Recipe

RECIPES = {
    "W8": weight_only.W8,
    "W8, int8 cache": Recipe("w8_int8_cache", (*weight_only.W8.passes, QuantizeCache())),
}
MIN_SQNR_DB = 15.0  # against eager float: codes of the right weights, rows and scales


def decoder_of(args: argparse.Namespace) -> StaticDecoder:
    """Return a model with its cache."""
    width, length = (64, 16) if args.smoke else (args.width, args.length)
    config = LlamaConfig(
        hidden_size=width, intermediate_size=width * 11 // 4, num_hidden_layers=args.layers,
        num_attention_heads=width // 64, vocab_size=1024, max_position_embeddings=length,
    )  # fmt: skip
    return StaticDecoder(LlamaForCausalLM(config).eval(), args.batch, length)


def variants_of(decoder: StaticDecoder, ids: Tensor) -> tuple[list[Variant], dict[str, int]]:
    """Return a step of each variant after the same sequences, and the bytes of its cache."""
    filled, step = calls(ids, ids.shape[1] - 1)
    expected = [decoder(**call) for call in (filled, step)][1].clone()

    def check(y: Tensor) -> str | None:
        found = sqnr_db(expected, y)
        return None if found >= MIN_SQNR_DB else f"{found:.1f} dB from eager float"

    cache = {"fp32": sum(b.nbytes for n, b in decoder.named_buffers() if n[:3] in ("key", "val"))}
    runs: dict[str, Any] = {"fp32": torch.compile(decoder)}
    for name, recipe in RECIPES.items():
        program = fxq.compress(decoder, filled, recipe, [filled], dynamic_shapes=FREE_TOKENS)
        program(**filled)
        cache[name] = sum(value.nbytes for value in program.state.values())
        runs[name] = torch.compile(program, backend="fxq")
    return [Variant(n, lambda run=run: run(**step), check) for n, run in runs.items()], cache


def rows_of(
    found: dict[str, Timing | str], cache: dict[str, int], batch: int
) -> list[dict[str, Cell]]:
    """Return a row for each variant."""
    base, rows = found["fp32"], []
    for name, timing in found.items():
        row: dict[str, Cell] = {"variant": name, "cache MB": cache[name] / 1e6}
        if isinstance(timing, str):
            row["step ms"] = timing
        else:
            row |= {"step ms": timing.median_ms, "tokens/s": 1e3 * batch / timing.median_ms}
            if isinstance(base, Timing):
                row["paired speedup"] = timing.paired_speedup_over(base)
        rows.append(row)
    return rows


def main() -> None:
    """Time a step of each variant and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common_arguments(parser)
    for name, value in (("width", 1024), ("layers", 2), ("batch", 4), ("length", 1024)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    reexec_with_isa(args.isa)
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    machine, decoder = Machine.here(), decoder_of(args)
    length = decoder.get_buffer("keys_0").shape[2]
    ids = torch.randint(1024, (args.batch, length))
    clock = time.process_time if args.threads == 1 else time.perf_counter
    with torch.no_grad():
        variants, cache = variants_of(decoder, ids)
        rounds = 2 if args.smoke else args.rounds
        found = measure(variants, {"ids": ids.float()}, rounds, smoke=args.smoke, clock=clock)
    table = Table(
        name=f"decoding_{args.isa}_{args.threads}_threads",
        title=f"a decode step, cache of {length} tokens, {args.isa}, {args.threads} threads",
        settings={
            "model": f"Llama, random weights, width {args.width}, {args.layers} layers",
            "batch": args.batch,
            "rounds": rounds,
            "clock": "CPU time" if args.threads == 1 else "wall time",
        },
        machine=machine,
        columns=("variant", "step ms", "tokens/s", "paired speedup", "cache MB"),
        rows=tuple(rows_of(found, cache, args.batch)),
    )
    publish(table, smoke=args.smoke)


if __name__ == "__main__":
    main()
