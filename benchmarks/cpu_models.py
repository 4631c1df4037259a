"""Whole models on the processor: what each quantizer gains over Inductor's fp32, and what it
computes.

    python benchmarks/cpu_models.py --isa avx2 --cases vit_base:4 deit_small:1    # minutes for each

A case is a model of random weights and a batch size; models are in `models`. Three numbers on
accuracy per variant, all against the fp32 model on the same random inputs: what the quantized graph
simulates, what the compiled code computes, and the gap between the two. A gap is a defect of the
compiler and not of the quantizer: the numbers a user validated are not the ones that run.

Variants of fxq with a gap above `MAX_GAP_DB` are refused. Peers are timed all the same, because
their speed at whatever accuracy is the comparison asked for; `verdict` says so in their row.

All variants of a case run in one process and take turns, on an Inductor cache that was empty.
"""

import argparse
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

import peers
import timm
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
from torch import Tensor, nn
from torch._dynamo.utils import counters
from transformers import LlamaConfig, LlamaForCausalLM

from fxq.lowering.lower import lower
from fxq.numerics import sqnr_db
from fxq.passes import recommended, w8a8
from fxq.pipeline import Recipe, compress

MAX_GAP_DB = 0.5  # between simulated and compiled SQNR; rounding flips alone move it by tenths
MIN_SQNR_DB = 3.0  # for peers: below this the output has nothing to do with the model's
N_CALIBRATION = 4  # batches
BASE = "Inductor fp32"
TIMEOUT_S = 3600
CASES = ("vit_base:4", "deit_small:1", "deit_small:8", "resnet50:4", "llama:1", "decode:4")
COLUMNS = (
    "model",
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
    "verdict",
)


class Logits(nn.Module):
    """A language model as a function of tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits `[B, T, V]` of tokens `[B, T]`."""
        logits: Tensor = self.model(input_ids=tokens, use_cache=False).logits
        return logits


def image_model(name: str, **settings: Any) -> Callable[[bool], nn.Module]:
    """Return how to build a classifier of timm, smaller for a smoke test."""

    def build(smoke: bool) -> nn.Module:
        smaller = {"depth": 1} if smoke and "depth" in settings else {}
        return timm.create_model(name, **{**settings, **smaller})

    return build


def with_statistics(build: Callable[[bool], nn.Module]) -> Callable[[bool], nn.Module]:
    """Return how to build a model whose batch norms have the statistics of data, as after training:
    with those that they begin with activations grow from layer to layer."""

    def build_with(smoke: bool) -> nn.Module:
        model = build(smoke).train()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = None  # the mean of all batches
        with torch.no_grad():
            model(torch.randn(4, 3, 224, 224))
        return model

    return build_with


def llama(smoke: bool) -> nn.Module:
    """Return two blocks of a language model of width 1024, with a small vocabulary."""
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2816, num_hidden_layers=1 if smoke else 2,
        num_attention_heads=16, num_key_value_heads=4, vocab_size=512,
    )  # fmt: skip
    return Logits(LlamaForCausalLM(config))


# Trained weights are not needed for speed, and not at hand everywhere. ViTs return all tokens: a
# sharper test than a thousand logits.
MODELS: dict[str, Callable[[bool], nn.Module]] = {
    "vit_base": image_model("vit_base_patch16_224", num_classes=0, global_pool="", depth=12),
    "deit_small": image_model("deit_small_patch16_224", num_classes=0, global_pool="", depth=12),
    "swin_tiny": image_model("swin_tiny_patch4_window7_224"),
    # Unless told otherwise timm begins with residual branches that end in weights of 0.
    "resnet50": with_statistics(image_model("resnet50", zero_init_last=False)),
    "mobilenet_v2": with_statistics(image_model("mobilenetv2_100")),
    "llama": llama,
    "decode": llama,
}
TOKENS = {"llama": 128, "decode": 1}  # of language models


@dataclass(frozen=True)
class Task:
    """The model in fp32, inputs to time it on, others to calibrate with."""

    model: nn.Module
    inputs: peers.Inputs
    calibration: list[peers.Inputs]
    transformer: bool


@dataclass(frozen=True)
class Candidate:
    """A variant that is ready to run, or to compile.

    Args:
        module: computes in eager PyTorch what the compiled code should; None where only `call` is
            there.
        backend: of `torch.compile`.
        inductor: Inductor's settings beyond its defaults.
        int8: how many of its layers run in integers, where that can be asked.
        faithful: hold it to `MAX_GAP_DB`.
        call: runs it, for what is not compiled here.
    """

    module: nn.Module | None
    backend: str = "inductor"
    inductor: dict[str, Any] = dataclasses.field(default_factory=dict)
    int8: str | None = None
    faithful: bool = True
    call: Callable[..., Tensor] | None = None


def make_task(name: str, batch: int, smoke: bool) -> Task:
    """Build the same model and data in every process."""
    torch.manual_seed(0)
    model = MODELS[name](smoke).eval()
    if name in TOKENS:
        found = [torch.randint(512, (batch, TOKENS[name])) for _ in range(1 + N_CALIBRATION)]
    else:
        found = [torch.randn(batch, 3, 224, 224) for _ in range(1 + N_CALIBRATION)]
    return Task(model, (found[0],), [(x,) for x in found[1:]], name not in CONVOLUTIONAL)


def prepare_float(task: Task, inductor: dict[str, Any] | None = None) -> Candidate:
    """The baseline, or with `freezing` a stronger one: weights packed for MKL or oneDNN."""
    return Candidate(task.model, inductor=inductor or {})


def prepare_fxq(task: Task, recipe: Recipe) -> Candidate:
    """Quantize with a recipe of fxq."""
    data = task.calibration if recipe.needs_data else None
    program = compress(task.model, task.inputs, recipe, data)
    decisions = lower(program.graph_module, torch.device("cpu"))[1].values()
    n_int8 = sum(d.kernel is not None for d in decisions)
    return Candidate(program, "fxq", int8=f"{n_int8}/{len(decisions)}")


def prepare_pt2e(task: Task, reduce_range: bool) -> Candidate:
    """Quantize with torchao's PT2E."""
    module = peers.pt2e(task.model, task.calibration, reduce_range=reduce_range)
    return Candidate(module, inductor={"freezing": True}, faithful=False)


def prepare_quantize_(task: Task) -> Candidate:
    """Quantize with torchao's one-liner."""
    return Candidate(peers.quantize_(task.model), inductor={"freezing": True}, faithful=False)


def prepare_onnx_runtime(task: Task) -> Candidate:
    """Quantize with ONNX Runtime."""
    call = peers.onnx_runtime(task.model, task.calibration, torch.get_num_threads())
    return Candidate(None, faithful=False, call=call)


def prepare_openvino(task: Task) -> Candidate:
    """Quantize with OpenVINO."""
    threads = torch.get_num_threads()
    call = peers.openvino(task.model, task.calibration, threads, transformer=task.transformer)
    return Candidate(None, faithful=False, call=call)


# torchao stands last: its last variant changes Inductor's settings for the whole process.
VARIANTS: dict[str, Callable[[Task], Candidate]] = {
    BASE: prepare_float,
    "Inductor fp32, freezing": functools.partial(prepare_float, inductor={"freezing": True}),
    "fxq recommended": functools.partial(prepare_fxq, recipe=recommended.W8A8),
    "fxq recommended, convolutions too": functools.partial(
        prepare_fxq, recipe=recommended.W8A8_CONV
    ),
    "fxq static": functools.partial(prepare_fxq, recipe=w8a8.STATIC),
    "fxq static, convolutions too": functools.partial(prepare_fxq, recipe=w8a8.STATIC_CONV),
    "fxq static per token": functools.partial(prepare_fxq, recipe=w8a8.STATIC_PER_TOKEN),
    "fxq dynamic": functools.partial(prepare_fxq, recipe=w8a8.DYNAMIC),
    "ONNX Runtime int8": prepare_onnx_runtime,
    "OpenVINO + NNCF int8": prepare_openvino,
    "torchao PT2E": functools.partial(prepare_pt2e, reduce_range=False),
    "torchao PT2E reduce_range": functools.partial(prepare_pt2e, reduce_range=True),
    "torchao quantize_ int8 dynamic": prepare_quantize_,
}
CONVOLUTIONAL = ("resnet50", "mobilenet_v2")


def is_for(variant: str, model: str) -> bool:
    """Tell whether a variant says anything of a model: convolutions are quantized in networks of
    such, and nowhere else."""
    if not variant.startswith("fxq"):
        return True
    return variant.endswith("convolutions too") == (model in CONVOLUTIONAL)


def first_call(candidate: Candidate, inputs: peers.Inputs) -> Callable[..., Tensor]:
    """Compile `candidate` and run it once.

    Raises:
        RuntimeError: Dynamo found that the code of an earlier variant would do.
    """
    if candidate.call is not None:
        return candidate.call
    assert candidate.module is not None
    # Settings are given twice: as options they tell this backend from the same one with others, so
    # that Dynamo does not reuse its code; as a patch they are also seen by Dynamo itself.
    options = candidate.inductor or None
    compiled: Callable[..., Tensor] = torch.compile(
        candidate.module, backend=candidate.backend, fullgraph=True, options=options
    )
    before = counters["stats"]["unique_graphs"]
    with torch._inductor.config.patch(candidate.inductor):
        compiled(*inputs)
    if counters["stats"]["unique_graphs"] == before:
        raise RuntimeError("nothing was compiled: this is the code of an earlier variant")
    return compiled


def time_variants(model: str, batch: int, rounds: int, smoke: bool) -> list[dict[str, Cell]]:
    """Child process: accuracy and speed of all variants of a case."""
    task = make_task(model, batch, smoke)
    expected = task.model(*task.inputs)
    torch.compile(nn.Sequential(nn.Linear(8, 8), nn.GELU()))(torch.randn(2, 8))  # makes headers
    rows: dict[str, dict[str, Cell]] = {}
    variants = []
    for name, prepare in VARIANTS.items():
        if not is_for(name, model):
            continue
        row: dict[str, Cell] = {"model": model, "batch": batch, "variant": name}
        rows[name] = row
        variant = attempt(functools.partial(prepare_variant, name, prepare, task, expected, row))
        if isinstance(variant, str):
            row["verdict"] = f"failed: {variant}"
        else:
            variants.append(variant)
    timings = measure(variants, {"inputs": task.inputs[0]}, rounds, smoke=smoke)
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
    """Quantize and compile one variant, writing its accuracy and times into `row`."""
    is_float = name.startswith(BASE)
    began = time.perf_counter()
    candidate = prepare(task)
    quantized = time.perf_counter()
    compiled = first_call(candidate, task.inputs)
    row["compile s"] = None if candidate.module is None else time.perf_counter() - quantized
    row["int8 layers"] = candidate.int8
    row["compiled dB"] = sqnr_db(expected, compiled(*task.inputs))
    row["verdict"] = "ok"
    if not is_float:
        row["quantize s"] = quantized - began
    if not is_float and candidate.module is not None:
        row["simulated dB"] = sqnr_db(expected, candidate.module(*task.inputs))
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

    return Variant(name, lambda: compiled(*task.inputs), check)


def speed_cells(timing: Timing | str, base: Timing | str | None) -> dict[str, Cell]:
    """Return the cells of a row that hold times, or the reason why there are none."""
    if isinstance(timing, str):
        return {"verdict": timing}
    cells: dict[str, Cell] = {"ms": timing.median_ms, "p10": timing.p10_ms, "p90": timing.p90_ms}
    if isinstance(base, Timing):
        cells["speedup"] = timing.speedup_over(base)
        cells["paired"] = timing.paired_speedup_over(base)
    return cells


def in_child(case: str) -> Any:
    """Run this script again for one case on an empty Inductor cache; return what it prints."""
    with tempfile.TemporaryDirectory(prefix="fxq-bench-") as cache:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache}
        found = subprocess.run(
            [sys.executable, "-W", "ignore", *sys.argv, "--child", case],
            env=environment, capture_output=True, text=True, timeout=TIMEOUT_S, check=False,
        )  # fmt: skip
    if found.returncode:
        lines = found.stderr.strip().splitlines() or [f"exit status {found.returncode}"]
        raise RuntimeError(lines[-1])
    return json.loads(found.stdout.splitlines()[-1])


def run_all(cases: list[str]) -> list[dict[str, Cell]]:
    """Start the child processes one after another and put their answers together."""
    rows: list[dict[str, Cell]] = []
    for case in cases:
        print(f"measuring {case}", flush=True)
        found = attempt(functools.partial(in_child, case))
        if isinstance(found, str):
            found = [{"model": case, "variant": "all", "verdict": found}]
        rows += found
    return rows


def parsed(case: str) -> tuple[str, int]:
    """Return the model and batch size of `model:batch`."""
    model, _, batch = case.partition(":")
    if model not in MODELS or not batch.isdecimal():
        raise SystemExit(f"--cases: expected model:batch of {', '.join(MODELS)}, found {case}")
    return model, int(batch)


def parse_args() -> argparse.Namespace:
    """Return the command line's options."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add_common_arguments(parser)
    parser.add_argument("--cases", nargs="+", default=list(CASES), help="model:batch")
    parser.add_argument("--name", help="of the table, after the instruction set")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.smoke:
        args.rounds = 2
    return args


def main() -> None:
    """Measure, or in a child process answer one question of the parent."""
    args = parse_args()
    reexec_with_isa(args.isa)
    torch.set_num_threads(args.threads)
    if args.child:
        with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=64):
            answer = time_variants(*parsed(args.child), args.rounds, args.smoke)
        print("\n" + json.dumps(answer))
        return
    for case in args.cases:
        parsed(case)
    machine = Machine.here()
    table = Table(
        name="_".join(filter(None, ("cpu_models", args.isa, args.name))),
        title=f"Whole models, {args.isa}",
        settings={"rounds": args.rounds, "calibration batches": N_CALIBRATION},
        machine=machine,
        columns=COLUMNS,
        rows=tuple(run_all(args.cases)),
        notes=(
            "dB: SQNR against fp32. gap: compiled minus simulated. speedup: ratio of medians to "
            f"{BASE}; paired: median of the ratios within a round. Weights and inputs are random.",
            "fxq quantizes linear layers, and convolutions where it says so; peers quantize both.",
        ),
    )
    publish(table, smoke=args.smoke)


if __name__ == "__main__":
    main()
