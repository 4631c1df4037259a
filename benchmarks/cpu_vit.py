"""A ViT on the processor: what each quantizer gains over Inductor's fp32, and what it computes.

    python benchmarks/cpu_vit.py --isa avx2 --batch 2 8     # about 30 minutes

ViT-B's width (768 channels, 12 heads) with a few blocks at 224 pixels, so 197 tokens. Three numbers
on accuracy per variant, all against the fp32 model on the same random images: what the quantized
graph simulates, what the compiled code computes, and the gap between the two. A gap is a defect of
the compiler and not of the quantizer: the numbers a user validated are not the ones that run.

Variants of fxq with a gap above `MAX_GAP_DB` are refused. torchao's are timed all the same, because
their speed at whatever accuracy is the comparison asked for; `verdict` says so in their row.

All variants of one batch size run in one process and take turns. Compile time is taken apart, each
in a fresh process with an empty Inductor cache: from `torch.compile` to the first result.
"""

import argparse
import copy
import dataclasses
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch._dynamo
import torch._inductor.compile_fx  # imported here, so that no variant's compile time contains it
import torch._inductor.config
from common import (
    Cell,
    Machine,
    Table,
    Timing,
    Variant,
    add_common_arguments,
    attempt,
    measure,
    publish,
    reexec_with_isa,
)
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch._dynamo.utils import counters

from fxq.lowering.lower import lower
from fxq.numerics import sqnr_db
from fxq.passes import w8a8
from fxq.passes.common import InsertObservers
from fxq.pipeline import Recipe, compress

MAX_GAP_DB = 0.5  # between simulated and compiled SQNR; rounding flips alone move it by tenths
MIN_SQNR_DB = 3.0  # for torchao: below this the output has nothing to do with the model's
N_CALIBRATION = 3  # batches
BASE = "Inductor fp32"
TIMEOUT_S = 3600
COLUMNS = (
    "batch",
    "variant",
    "ms",
    "p10",
    "p90",
    "speedup",
    "paired",
    "simulated dB",
    "compiled dB",
    "gap dB",
    "int8 layers",
    "quantize s",
    "compile s",
    "compile ratio",
    "verdict",
)


@dataclass(frozen=True)
class Size:
    """The model and its images."""

    width: int
    heads: int
    blocks: int
    pixels: int
    patch: int


@dataclass(frozen=True)
class Task:
    """The model in fp32, images to time it on, others to calibrate with."""

    model: nn.Module
    images: Tensor
    calibration: list[Tensor]


@dataclass(frozen=True)
class Candidate:
    """A variant ready to compile.

    Args:
        module: computes in eager PyTorch what the compiled code should.
        backend: of `torch.compile`.
        inductor: Inductor's settings beyond its defaults.
        int8: how many of its layers run in integers, where that can be asked.
        faithful: hold it to `MAX_GAP_DB`.
    """

    module: nn.Module
    backend: str = "inductor"
    inductor: dict[str, Any] = dataclasses.field(default_factory=dict)
    int8: str | None = None
    faithful: bool = True


def make_task(size: Size, batch: int) -> Task:
    """Build the same model and data in every process."""
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=size.pixels,
        patch_size=size.patch,
        embed_dim=size.width,
        depth=size.blocks,
        num_heads=size.heads,
        num_classes=0,
        global_pool="",  # all tokens are the output: a sharper test than a thousand logits
        weight_init="",  # truncated normal
    ).eval()
    shape = (batch, 3, size.pixels, size.pixels)
    images, *calibration = (torch.randn(shape) for _ in range(1 + N_CALIBRATION))
    return Task(model, images, calibration)


def prepare_float(task: Task, inductor: dict[str, Any] | None = None) -> Candidate:
    """The baseline, or with `freezing` a stronger one: weights packed for MKL or oneDNN."""
    return Candidate(task.model, inductor=inductor or {})


def prepare_fxq(task: Task, recipe: Recipe) -> Candidate:
    """Quantize with a recipe of fxq."""
    data = task.calibration if recipe.needs_data else None
    program = compress(task.model, task.images, recipe, data)
    decisions = lower(program.graph_module, torch.device("cpu"))[1].values()
    n_int8 = sum(d.kernel is not None for d in decisions)
    return Candidate(program, "fxq", int8=f"{n_int8}/{len(decisions)}")


def full_range(recipe: Recipe) -> Recipe:
    """Return `recipe` with weights on the whole range, which need the excess without VNNI."""
    first, *rest = recipe.passes
    assert isinstance(first, InsertObservers)
    assert first.default is not None
    spec = dataclasses.replace(first.default, weight=w8a8.FULL_RANGE)
    return Recipe(f"{recipe.name}_full_range", (dataclasses.replace(first, default=spec), *rest))


def prepare_pt2e(task: Task, reduce_range: bool) -> Candidate:
    """Quantize as torchao's PT2E guide for x86 does."""
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e
    from torchao.quantization.pt2e.quantizer import x86_inductor_quantizer as x86

    config = x86.get_default_x86_inductor_quantization_config(reduce_range=reduce_range)
    exported = torch.export.export(task.model, (task.images,)).module()
    prepared = prepare_pt2e(exported, x86.X86InductorQuantizer().set_global(config))
    for batch in task.calibration:
        prepared(batch)
    converted = convert_pt2e(prepared)
    return Candidate(converted, inductor={"freezing": True}, faithful=False)


def prepare_quantize_(task: Task) -> Candidate:
    """Quantize with torchao's one-liner."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    model = copy.deepcopy(task.model)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return Candidate(model, inductor={"freezing": True}, faithful=False)


# torchao stands last: its last variant changes Inductor's settings for the whole process.
VARIANTS: dict[str, Callable[[Task], Candidate]] = {
    BASE: prepare_float,
    "Inductor fp32, freezing": functools.partial(prepare_float, inductor={"freezing": True}),
    "fxq static": functools.partial(prepare_fxq, recipe=w8a8.STATIC),
    "fxq static per token": functools.partial(prepare_fxq, recipe=w8a8.STATIC_PER_TOKEN),
    "fxq dynamic": functools.partial(prepare_fxq, recipe=w8a8.DYNAMIC),
    "fxq static, full range": functools.partial(prepare_fxq, recipe=full_range(w8a8.STATIC)),
    "torchao PT2E": functools.partial(prepare_pt2e, reduce_range=False),
    "torchao PT2E reduce_range": functools.partial(prepare_pt2e, reduce_range=True),
    "torchao quantize_ int8 dynamic": prepare_quantize_,
}


def first_call(candidate: Candidate, images: Tensor) -> Callable[[Tensor], Tensor]:
    """Compile `candidate` and run it once.

    Raises:
        RuntimeError: Dynamo found that the code of an earlier variant would do.
    """
    # Settings are given twice: as options they tell this backend from the same one with others, so
    # that Dynamo does not reuse its code; as a patch they are also seen by Dynamo itself.
    options = candidate.inductor or None
    compiled = torch.compile(
        candidate.module, backend=candidate.backend, fullgraph=True, options=options
    )
    before = counters["stats"]["unique_graphs"]
    with torch._inductor.config.patch(candidate.inductor):
        compiled(images)
    if counters["stats"]["unique_graphs"] == before:
        raise RuntimeError("nothing was compiled: this is the code of an earlier variant")
    return compiled


def compile_seconds(name: str, size: Size, batch: int) -> dict[str, Cell]:
    """Child process: how long quantizing and the first compilation take."""
    task = make_task(size, batch)
    began = time.perf_counter()
    candidate = VARIANTS[name](task)
    quantized = time.perf_counter()
    first_call(candidate, task.images)
    compiled = time.perf_counter()
    return {
        "quantize s": quantized - began if "fp32" not in name else None,
        "compile s": compiled - quantized,
    }


def time_variants(size: Size, batch: int, rounds: int, smoke: bool) -> list[dict[str, Cell]]:
    """Child process: accuracy and speed of all variants at one batch size."""
    task = make_task(size, batch)
    expected = task.model(task.images)
    rows: dict[str, dict[str, Cell]] = {}
    variants = []
    for name, prepare in VARIANTS.items():
        row: dict[str, Cell] = {"batch": batch, "variant": name}
        rows[name] = row
        variant = attempt(functools.partial(prepare_variant, name, prepare, task, expected, row))
        if isinstance(variant, str):
            row["verdict"] = f"failed: {variant}"
        else:
            variants.append(variant)
    timings = measure(variants, {"images": task.images}, rounds, smoke=smoke)
    base = timings.get(BASE)
    for name, timing in timings.items():
        rows[name] |= speed_cells(timing, base)
    return list(rows.values())


def prepare_variant(
    name: str,
    prepare: Callable[[Task], Candidate],
    task: Task,
    expected: Tensor,
    row: dict[str, Cell],
) -> Variant:
    """Quantize and compile one variant, writing its accuracy into `row`."""
    candidate = prepare(task)
    row["int8 layers"] = candidate.int8
    is_float = name.startswith(BASE)
    if not is_float:
        row["simulated dB"] = sqnr_db(expected, candidate.module(task.images))
    compiled = first_call(candidate, task.images)
    row["compiled dB"] = sqnr_db(expected, compiled(task.images))
    row["verdict"] = "ok"
    if not is_float:
        gap = row["compiled dB"] - row["simulated dB"]
        row["gap dB"] = gap
        if abs(gap) > MAX_GAP_DB:
            row["verdict"] = "compiled differs from simulated"

    def check(output: Tensor) -> str | None:
        found = sqnr_db(expected, output)
        if found < MIN_SQNR_DB:
            return f"{found:.1f} dB from fp32"
        if candidate.faithful and row["verdict"] != "ok":
            return f"{row['gap dB']:+.2f} dB from its simulation, allowed {MAX_GAP_DB}"
        return None

    return Variant(name, lambda: compiled(task.images), check)


def speed_cells(timing: Timing | str, base: Timing | str | None) -> dict[str, Cell]:
    """Return the cells of a row that hold times, or the reason why there are none."""
    if isinstance(timing, str):
        return {"verdict": timing}
    cells: dict[str, Cell] = {"ms": timing.median_ms, "p10": timing.p10_ms, "p90": timing.p90_ms}
    if isinstance(base, Timing):
        cells["speedup"] = timing.speedup_over(base)
        cells["paired"] = timing.paired_speedup_over(base)
    return cells


def in_child(*arguments: str) -> Any:
    """Run this script again with `arguments` on an empty Inductor cache; return what it prints."""
    with tempfile.TemporaryDirectory(prefix="fxq-bench-") as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        found = subprocess.run(
            [sys.executable, "-W", "ignore", *sys.argv, *arguments],
            env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    if found.returncode:
        lines = found.stderr.strip().splitlines() or [f"exit status {found.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(found.stdout.splitlines()[-1])


def run_all(args: argparse.Namespace) -> list[dict[str, Cell]]:
    """Start the child processes one after another and put their answers together."""
    compile_cells: dict[str, dict[str, Cell]] = {}
    for name in VARIANTS:
        print(f"compiling {name}", flush=True)
        found = attempt(functools.partial(in_child, "--child", name))
        compile_cells[name] = {"compile s": found} if isinstance(found, str) else found
    base_s = compile_cells[BASE]["compile s"]
    for cells in compile_cells.values():
        if isinstance(base_s, float) and isinstance(cells["compile s"], float):
            cells["compile ratio"] = cells["compile s"] / base_s
    rows: list[dict[str, Cell]] = []
    for batch in args.batch:
        print(f"timing batch {batch}", flush=True)
        found = attempt(functools.partial(in_child, "--child", "timing", "--batch", str(batch)))
        if isinstance(found, str):
            found = [{"batch": batch, "variant": "all", "verdict": found}]
        first = batch == args.batch[0]
        rows += [row | (compile_cells.get(row["variant"], {}) if first else {}) for row in found]
    return rows


def parse_args() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common_arguments(parser)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[2, 8])
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.blocks, args.rounds = 1, 2
    return args


def main() -> None:
    """Measure, or in a child process answer one question of the parent."""
    args = parse_args()
    reexec_with_isa(args.isa)
    torch.set_num_threads(args.threads)
    size = Size(128, 2, args.blocks, 64, 8) if args.smoke else Size(768, 12, args.blocks, 224, 16)
    if args.child:
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
            if args.child == "timing":
                answer: Any = time_variants(size, args.batch[0], args.rounds, args.smoke)
            else:
                answer = compile_seconds(args.child, size, args.batch[0])
        print("\n" + json.dumps(answer))
        return
    machine = Machine.here()
    rows = run_all(args)
    table = Table(
        name=f"cpu_vit_{args.isa}",
        title=f"ViT, {size.blocks} blocks of width {size.width}, {args.isa}",
        settings={**dataclasses.asdict(size), "rounds": args.rounds},
        machine=machine,
        columns=COLUMNS,
        rows=tuple(rows),
        notes=(
            "dB: SQNR against fp32. gap: compiled minus simulated. speedup: ratio of medians to "
            f"{BASE}; paired: median of the ratios within a round.",
            "compile s: fresh process, empty cache, at the first batch size. fxq quantizes linear "
            "layers, PT2E also the patch embedding's convolution.",
        ),
    )
    publish(table, smoke=args.smoke)


if __name__ == "__main__":
    main()
