"""How far quantized diffusion models are from float ones, step by step, and what calibrates best.

    python benchmarks/diffusion.py --data PATH    # hours on one core; --models, --methods for less

The judge is the teacher-forced one-step error (`examples/one_step_error.py`): on trajectories of
the float model, both models see the same noisy sample at each step.

`--data` is a folder with `zoo.py`, which loads pretrained models. Trajectories that calibrate and
those that judge start from noise of different seeds; noise is the same for all rows of a seed.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from common import Cell, Machine, Table, publish
from torch import nn

import fxq
from fxq.passes import dilatequant, eda_dm
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.passes.common.reconstruction import BlockLoss, Reconstruct, Rounding
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, MeanSquaredError, PerChannel, PerTensor, QuantSpec

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from one_step_error import Judge

N_CLASSES, NO_CLASS = 10, 10
JUDGE_SEED = 1000  # added to a seed: noise that nothing was calibrated on


@dataclass(frozen=True)
class Setting:
    """What is drawn.

    Args:
        n_steps: of DDIM.
        n_images: trajectories that calibrate, and as many that judge.
        n_samples: calibration samples that are chosen of their states.
        seeds: of noise, labels and choice.
    """

    n_steps: int
    n_images: int
    n_samples: int
    seeds: int


@dataclass(frozen=True, eq=False)
class Study:
    """A diffusion model and its scheduler, which is made anew for each run."""

    name: str
    model: nn.Module
    scheduler: Callable[[int], Any]


Select = Callable[[nn.Module, fxq.Recorded, int, int], Sequence[Any]]  # ..., samples, seed
Method = tuple[str, Recipe, tuple[str, ...]]  # its name, and which selections it is measured with

SELECTIONS: Mapping[str, Select] = {
    "uniform": lambda model, calls, n, seed: eda_dm.select_evenly(model, calls, n, seed=seed),
    "selected": lambda model, calls, n, seed: eda_dm.select(model, calls, n, seed=seed),
}


def plain(weight_bits: int, activation_bits: int) -> Recipe:
    """Return linears and convolutions rounded to nearest, one range per tensor."""
    activation = QuantSpec(
        activation_bits, symmetric=False, granularity=PerTensor(), observer=MeanSquaredError()
    )
    layer = LayerSpec(activation, QuantSpec(weight_bits, granularity=PerChannel(0)))
    observe = InsertObservers(layer, targets=("linear", "conv"))
    return Recipe(f"plain_w{weight_bits}a{activation_bits}", (observe, Calibrate(), Convert()))


def with_steps(recipe: Recipe, steps: int | None) -> Recipe:
    """Return a recipe whose blocks train for so many steps; None for as many as it has."""
    passes = (
        replace(each, steps=steps) if steps and isinstance(each, Reconstruct) else each
        for each in recipe.passes
    )
    return replace(recipe, passes=tuple(passes))


# Steps as in the recipes; the block's error alone, and no activations that stay float.
PLAIN = replace(eda_dm.FINE_GRAINED, loss=BlockLoss(), inputs_share=1.0)
METHODS: tuple[Method, ...] = (
    ("plain W8A8", plain(8, 8), ("uniform", "selected")),
    ("plain W4A8", plain(4, 8), ("uniform", "selected")),
    ("plain W4A4", plain(4, 4), ("uniform", "selected")),
    ("EDA-DM quantizers W8A8", eda_dm.NEAREST_W8A8, ("uniform", "selected")),
    ("EDA-DM quantizers W4A8", eda_dm.NEAREST_W4A8, ("uniform", "selected")),
    ("EDA-DM quantizers W4A4", eda_dm.NEAREST_W4A4, ("uniform", "selected")),
    *(
        (f"{name} W4A{bits}", eda_dm.reconstructed(f"{name}_{bits}", 4, bits, reconstruct=how),
         ("selected",))
        for bits in (8, 4)
        for name, how in {
            "AdaRound alone": replace(PLAIN, method=Rounding(activation_learning_rate=0.0)),
            "LSQ alone": replace(PLAIN, method=Rounding(learning_rate=0.0)),
        }.items()
    ),
    *(
        (f"DilateQuant {name} W{bits[0]}A{bits[1]}",
         dilatequant.dilated(name, *bits, dilation=dilation, rows=rows, reconstruct=None),
         ("uniform",))
        for bits in ((6, 6), (4, 8), (4, 4))
        for name, dilation, rows in (
            ("quantizers, one row,", None, None),
            ("quantizers", None, dilatequant.ROWS),
            ("quantizers, dilated,", dilatequant.GuardedDilation, dilatequant.ROWS),
        )
    ),
    ("DilateQuant W6A6", dilatequant.W6A6, ("uniform",)),
    ("DilateQuant W4A8", dilatequant.W4A8, ("uniform",)),
    ("DilateQuant W4A4", dilatequant.W4A4, ("uniform",)),
    ("EDA-DM W8A8", eda_dm.W8A8, ("selected",)),
    ("EDA-DM W4A8", eda_dm.W4A8, ("uniform", "selected")),
    ("EDA-DM W4A4", eda_dm.W4A4, ("uniform", "selected")),
)  # fmt: skip


@torch.no_grad()
def draw(study: Study, setting: Setting, n_images: int, seed: int) -> None:
    """Run DDIM (eta 0) from noise, without guidance."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n_images, 1, 16, 16, generator=generator)
    labels = torch.randint(N_CLASSES, (n_images,), generator=generator)
    scheduler = study.scheduler(setting.n_steps)
    for t in scheduler.timesteps:
        noise = study.model(x, timestep=t.expand(n_images), class_labels=labels).sample
        x = scheduler.step(noise, t, x).prev_sample


def recorded(study: Study, setting: Setting, seed: int) -> fxq.Recorded:
    """Return all calls of a run."""
    return fxq.record(
        study.model,
        lambda: draw(study, setting, setting.n_images, seed),
        max_calls=setting.n_steps,
    )


def judge_of(study: Study, setting: Setting, seed: int) -> Judge:
    """Return the judge of a seed: trajectories that nothing was calibrated on."""
    calls = recorded(study, setting, JUDGE_SEED + seed)
    return Judge.of(study.model, calls, study.scheduler(setting.n_steps))


def study_rows(
    study: Study, setting: Setting, methods: Sequence[Method]
) -> Iterator[dict[str, Cell]]:
    """Measure one model: every method with every selection it names, all seeds paired."""
    found: dict[tuple[str, str], list[float]] = {}
    minutes: dict[tuple[str, str], list[float]] = {}
    for seed in range(setting.seeds):
        calls, judge = recorded(study, setting, seed), judge_of(study, setting, seed)
        data = {
            name: SELECTIONS[name](study.model, calls, setting.n_samples, seed)
            for name in dict.fromkeys(name for _, _, names in methods for name in names)
        }
        for method, recipe, names in methods:
            for name in names:
                began = time.perf_counter()
                program = fxq.compress(study.model, calls[0], recipe, data=data[name])
                minutes.setdefault((method, name), []).append((time.perf_counter() - began) / 60)
                found.setdefault((method, name), []).append(judge.error(program))
                print(f"{study.name} {method} {name} seed {seed}: {found[method, name][-1]:.3e}",
                      file=sys.stderr, flush=True)  # fmt: skip
    for (method, name), errors in found.items():
        base = found.get((method, "uniform"), errors)
        ratios = [error / other for error, other in zip(errors, base, strict=True)]
        yield {
            "model": study.name,
            "method": method,
            "samples": name,
            "error": statistics.mean(errors),
            "worst": max(errors),
            "over uniform": statistics.geometric_mean(ratios),
            "worst over uniform": max(ratios),
            "minutes": statistics.mean(minutes[method, name]),
        }


def studies(data: str, names: Sequence[str]) -> Iterator[Study]:
    """Yield the pretrained models."""
    sys.path.insert(0, data)
    import zoo

    load = {"unet": zoo.unet_mnist, "dit": zoo.dit_mnist}
    for name in names:
        yield Study(name, load[name](), zoo.ddim)


def main() -> None:
    """Measure and write a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with zoo.py and pretrained models")
    parser.add_argument("--models", nargs="+", default=["unet", "dit"], choices=("unet", "dit"))
    parser.add_argument("--methods", nargs="+", default=[], help="parts of names; all unless given")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--block-steps", type=int, help="of each block's training")
    parser.add_argument("--images", type=int, default=32, help="trajectories of each seed")
    parser.add_argument("--samples", type=int, default=256, help="to calibrate with")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    setting = Setting(args.steps, args.images, args.samples, args.seeds)
    if args.smoke:
        setting = Setting(n_steps=4, n_images=4, n_samples=8, seeds=1)
    methods = [
        (name, with_steps(recipe, args.block_steps), samples)
        for name, recipe, samples in METHODS
        if not args.methods or any(part in name for part in args.methods)
    ]
    machine = Machine.here()
    rows = [row for study in studies(args.data, args.models)
            for row in study_rows(study, setting, methods)]  # fmt: skip
    table = Table(
        name="diffusion_one_step",
        title="Diffusion: teacher-forced one-step error of quantized models",
        settings={
            "seeds": setting.seeds,
            "sampler": f"DDIM, {setting.n_steps} steps, eta 0, no guidance",
            "trajectories": setting.n_images,
            "calibration samples": setting.n_samples,
            "steps per block": args.block_steps or "as in the recipes",
        },
        machine=machine,
        columns=("model", "method", "samples", "error", "worst", "over uniform",
                 "worst over uniform", "minutes"),
        rows=tuple(rows),
        notes=(
            "Error: sum of c_t^2 |e_q - e|^2 over that of c_t^2 |e|^2 on other trajectories than "
            "those that calibrate, mean over seeds, and the worst seed. Over uniform: of seeds, "
            "the geometric mean and the worst ratio to as many samples of every step.",
        ),
    )  # fmt: skip
    publish(table, smoke=args.smoke)


if __name__ == "__main__":
    main()
