"""Quantize two small diffusion models to 4-bit weights, by EDA-DM (arXiv:2401.04585) and by
DilateQuant (arXiv:2409.14307), and put them back into an unchanged sampler.

    python examples/quantize_diffusion.py [--activation-bits 8] [--figure quantize_diffusion.png]
                                          [--compile] [--quick]

A UNet and a DiT learn to draw scikit-learn's digits of 8 x 8 pixels; nothing is downloaded. Prints
the error of one step (`one_step_error.py`) rounded to nearest and by both methods, which should be
smaller, and size; `--compile` adds the latency of each as compiled, and takes minutes more. Draws
samples of float and quantized models from the same noise, and what each step adds to the error.
Training blocks takes most of the time; `--quick` does little of everything, and draws no digits.
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
from fxq.passes import dilatequant, eda_dm
from fxq.pipeline import Recipe
from fxq.scorecard import interleaved_ms

CALIBRATE, JUDGE = 0, 1  # seeds of noise
FLOOR = 4  # samples of each step: a range of its own needs some


@dataclass(frozen=True)
class Setting:
    """How much is done: steps of training of the UNet and the DiT, of DDIM, and of each block;
    trajectories and calibration samples; bits of activations."""

    train: tuple[int, int] = (600, 900)
    width: int = 32
    ddim: int = 20
    block: int = 100
    trajectories: int = 32
    samples: int = 160
    activation_bits: int = 8
    compiles: bool = False

    @property
    def recipes(self) -> dict[str, Recipe]:
        """What is compared."""
        bits = 4, self.activation_bits
        fine_grained = replace(eda_dm.FINE_GRAINED, steps=self.block)
        blockwise = replace(dilatequant.BLOCKWISE, steps=self.block)
        return {
            "rounded to nearest": eda_dm.reconstructed("nearest", *bits, reconstruct=None),
            "EDA-DM": eda_dm.reconstructed("eda_dm", *bits, reconstruct=fine_grained),
            "DilateQuant": dilatequant.dilated("dilatequant", *bits, reconstruct=blockwise),
        }


QUICK = Setting((40, 40), 16, 6, 40, 8, 30)
ROUNDS = 50  # of timing


@dataclass(frozen=True, eq=False)
class Result:
    """Of one model, by method, float first where it has one: what each step adds to the error
    `[T]`, MB, ms per step, nothing where not compiled, and samples."""

    name: str
    errors: dict[str, Tensor]
    size_mb: dict[str, float]
    latency_ms: dict[str, float]
    images: dict[str, Tensor]


def quantize(name: str, model: nn.Module, setting: Setting, say: Callable[[str], None]) -> Result:
    """Quantize a model by each method, and put it back into the same sampling loop."""

    def draw(model: Callable[..., object], seed: int) -> Tensor:
        return sample(model, setting.ddim, setting.trajectories, seed)

    calls = fxq.record(model, lambda: draw(model, CALIBRATE), max_calls=setting.ddim)
    others = fxq.record(model, lambda: draw(model, JUDGE), max_calls=setting.ddim)
    chosen = eda_dm.select(model, calls, setting.samples, floor=FLOOR)
    say(f"{name}: samples of each of {setting.ddim} steps: {chosen.counts}")
    judge = Judge.of(model, others, scheduler(setting.ddim))
    programs = {}
    for method, recipe in setting.recipes.items():
        programs[method] = fxq.compress(model, calls[0], recipe, data=chosen)
        say(f"{name}: {method}, {setting.activation_bits}-bit activations")
    models: dict[str, nn.Module] = {"float": model, **programs}
    latency: dict[str, float] = {}
    if setting.compiles:
        compiled = {
            key: torch.compile(each) if each is model else torch.compile(each, backend="fxq")
            for key, each in models.items()
        }
        with torch.no_grad():
            steps = [lambda each=each: each(**calls[0]) for each in compiled.values()]
            latency = dict(zip(compiled, interleaved_ms(steps, ROUNDS), strict=True))
    size = sum(p.numel() * p.element_size() for p in model.state_dict().values()) / 1e6
    sizes = {key: fxq.report(each).size_bytes / 1e6 for key, each in programs.items()}
    return Result(
        name,
        {key: judge.errors(program) for key, program in programs.items()},
        {"float": size, **sizes},
        latency,
        {key: draw(each, JUDGE) for key, each in models.items()},
    )


def draw_figure(results: Sequence[Result], path: str) -> None:
    """Draw samples of the same noise, float over quantized, and the error of each step."""
    figure, axes = plt.subplots(
        len(results), 2, figsize=(13, 3.2 * len(results)), width_ratios=(3, 2), squeeze=False,
        layout="constrained",
    )  # fmt: skip
    for (left, right), result in zip(axes, results, strict=True):
        rows = [torch.cat(list(x[:10, 0]), dim=1) for x in result.images.values()]
        gap = torch.ones(1, rows[0].shape[1])
        left.imshow(
            torch.cat([part for row in rows for part in (row, gap)][:-1]),
            cmap="gray",
            vmin=-1,
            vmax=1,
        )
        ticks = [3.5 + 9 * index for index in range(len(rows))]
        left.set(yticks=ticks, yticklabels=list(result.images), xticks=[])
        left.set_title(f"{result.name}: samples from the same noise")
        for name, errors in result.errors.items():
            right.semilogy(range(1, len(errors) + 1), errors, marker=".", label=name)
        right.set(xlabel="step of DDIM", title="what each step adds to the one-step error")
        right.legend()
    figure.savefig(path, dpi=100)


def table(results: Sequence[Result]) -> Table:
    """Return what it cost and what it brought."""
    made = Table(title="one-step error, size, and latency of a step")
    for column in ("", "", "error", "MB", "ms, compiled"):
        made.add_column(column, justify="right" if column else "left")
    for result in results:
        for method, size in result.size_mb.items():
            error = f"{float(result.errors[method].sum()):.2e}" if method in result.errors else "-"
            ms = f"{result.latency_ms[method]:.1f}" if result.latency_ms else "-"
            made.add_row(result.name, method, error, f"{size:.2f}", ms)
    return made


def main(arguments: Sequence[str] | None = None) -> list[Result]:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--activation-bits", type=int, default=8, help="of activations")
    parser.add_argument("--figure", default="quantize_diffusion.png", help="where to draw")
    parser.add_argument("--compile", action="store_true", help="time both as compiled")
    parser.add_argument("--quick", action="store_true", help="little training: for the test")
    args = parser.parse_args(arguments)
    setting = replace(
        QUICK if args.quick else Setting(),
        activation_bits=args.activation_bits,
        compiles=args.compile,
    )
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
