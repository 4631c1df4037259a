"""Quantize two small diffusion models to 4-bit weights and 8-bit activations by EDA-DM
(arXiv:2401.04585), and put them back into an unchanged sampler.

    python examples/quantize_diffusion.py [--figure quantize_diffusion.png] [--compile] [--quick]

A UNet and a DiT learn to draw scikit-learn's digits of 8 x 8 pixels; nothing is downloaded. Prints
the error of one step (`one_step_error.py`) rounded to nearest and by EDA-DM, which should be the
smaller one, and size; `--compile` adds the latency of both as compiled, and takes minutes more.
Draws samples of float and quantized models from the same noise, and what each step adds to the
error. Reconstruction takes most of the time; `--quick` does little of everything, and draws no
digits.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from digits_diffusion import dit, sample, scheduler, train, unet
from one_step_error import Judge
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxq
from fxq.passes import eda_dm
from fxq.pipeline import Recipe
from fxq.scorecard import interleaved_ms

CALIBRATE, JUDGE = 0, 1  # seeds of noise


@dataclass(frozen=True)
class Setting:
    """How much is done: steps of training and of DDIM, trajectories, calibration samples."""

    train: tuple[int, int] = (600, 900)  # of the UNet and the DiT
    width: int = 32
    ddim: int = 20
    trajectories: int = 32
    samples: int = 128
    recipe: Recipe = eda_dm.W4A8
    compiles: bool = False


FEW_STEPS = replace(eda_dm.FINE_GRAINED, steps=40)
QUICK = Setting(
    (40, 40), 16, 6, 8, 24, eda_dm.reconstructed("quick_w4a8", 4, 8, reconstruct=FEW_STEPS)
)
ROUNDS = 50  # of timing


@dataclass(frozen=True, eq=False)
class Result:
    """Of one model: what each step adds to the error `[T]`, rounded to nearest and by EDA-DM; MB
    and ms per step of float and W4A8, nothing where not compiled; their samples."""

    name: str
    errors: tuple[Tensor, Tensor]
    size_mb: tuple[float, float]
    latency_ms: tuple[float, ...]
    images: tuple[Tensor, ...]


def quantize(name: str, model: nn.Module, setting: Setting, say: Callable[[str], None]) -> Result:
    """Quantize a model, and put it back into the same sampling loop."""

    def draw(model: Callable[..., object], seed: int) -> Tensor:
        return sample(model, setting.ddim, setting.trajectories, seed)

    calls = fxq.record(model, lambda: draw(model, CALIBRATE), max_calls=setting.ddim)
    others = fxq.record(model, lambda: draw(model, JUDGE), max_calls=setting.ddim)
    chosen = eda_dm.select(model, calls, setting.samples)
    say(f"{name}: samples of each of {setting.ddim} steps: {chosen.counts}")
    judge = Judge.of(model, others, scheduler(setting.ddim))
    nearest, program = (
        fxq.compress(model, calls[0], recipe, data=chosen)
        for recipe in (eda_dm.NEAREST_W4A8, setting.recipe)
    )
    say(f"{name}: reconstructed")
    images, latency = tuple(draw(each, JUDGE) for each in (model, program)), []
    if setting.compiles:
        compiled = torch.compile(model), torch.compile(program, backend="fxq")
        with torch.no_grad():
            steps = [lambda each=each: each(**calls[0]) for each in compiled]
            latency = interleaved_ms(steps, ROUNDS)
    size = sum(p.numel() * p.element_size() for p in model.state_dict().values())
    return Result(
        name,
        (judge.errors(nearest), judge.errors(program)),
        (size / 1e6, fxq.report(program).size_bytes / 1e6),
        tuple(latency),
        images,
    )


def draw_figure(results: Sequence[Result], path: str) -> None:
    """Draw samples of the same noise, float over quantized, and the error of each step."""
    figure, axes = plt.subplots(
        len(results), 2, figsize=(13, 3.2 * len(results)), width_ratios=(3, 2), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (left, right), result in zip(axes, results, strict=True):
        rows = [torch.cat(list(x[:10, 0]), dim=1) for x in result.images]
        gap = torch.ones(1, rows[0].shape[1])
        left.imshow(torch.cat([rows[0], gap, rows[1]]), cmap="gray", vmin=-1, vmax=1)
        left.set(yticks=[3.5, 12.5], yticklabels=["float", "W4A8"], xticks=[])
        left.set_title(f"{result.name}: samples from the same noise")
        for name, errors in zip(("rounded to nearest", "EDA-DM"), result.errors, strict=True):
            right.semilogy(range(1, len(errors) + 1), errors, marker=".", label=name)
        right.set(xlabel="step of DDIM", title="what each step adds to the one-step error")
        right.legend()
    figure.savefig(path, dpi=100)


def table(results: Sequence[Result]) -> Table:
    """Return what it cost and what it brought."""
    made = Table(title="W4A8: one-step error, size, latency of a step (float, then quantized)")
    for column in ("", "error, nearest", "error, EDA-DM", "MB", "ms, compiled"):
        made.add_column(column, justify="right" if column else "left")
    for result in results:
        errors = (f"{float(error.sum()):.2e}" for error in result.errors)
        size = "{:.2f} -> {:.2f}".format(*result.size_mb)
        latency = " -> ".join(f"{ms:.1f}" for ms in result.latency_ms) or "-"
        made.add_row(result.name, *errors, size, latency)
    return made


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--figure", default="quantize_diffusion.png", help="where to draw")
    parser.add_argument("--compile", action="store_true", help="time both as compiled")
    parser.add_argument("--quick", action="store_true", help="little training: for the test")
    args = parser.parse_args(arguments)
    setting = replace(QUICK if args.quick else Setting(), compiles=args.compile)
    console, began = Console(), time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - began:6.1f} s[/dim]  {text}", highlight=False)

    results = []
    for name, build, steps in zip(("UNet", "DiT"), (unet, dit), setting.train, strict=True):
        say(f"{name}: training on scikit-learn's digits")
        model = train(build, setting.width, steps)
        results.append(quantize(name, model, setting, say))
    draw_figure(results, args.figure)
    console.print(table(results))
    return results


if __name__ == "__main__":
    main()
