"""Quantize a small autoregressive image generator to 6 bits, weights and activations, by PTQ4ARVG
(arXiv:2601.21238), and let it draw.

    python examples/quantize_generator.py [--bits 6] [--seeds 1] [--figure quantize_generator.png]
                                          [--compile] [--quick]

A transformer learns to draw scikit-learn's digits pixel by pixel; nothing is downloaded. Prints how
far each quantized model's predictions are from the float model's on digits that neither has seen
(Kullback-Leibler divergence and negative log-likelihood, in nats per pixel) and its size, and draws
digits of all of them from the same random numbers. `--seeds` repeats it with other calibration
digits, `--compile` adds the pixels per second of each as compiled. A few minutes on one core;
`--quick` does little of everything, and draws no digits.
"""

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import torch
from digits_generator import CLASSES, Generator, sample, tokens, train
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxq
from fxq.passes import ptq4arvg
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.passes.smoothquant import SmoothQuant
from fxq.pipeline import Recipe
from fxq.scorecard import interleaved_ms
from fxq.spec import LayerSpec, MinMax

FLOAT, STATIC, SMOOTH, GAIN, TOKEN_WISE = (
    "float", "static", "SmoothQuant", "gain-projected", "PTQ4ARVG",
)  # fmt: skip
ROUNDS = 30  # of timing


@dataclass(frozen=True)
class Setting:
    """How much is done: width, depth and steps of training of the model; digits to calibrate with,
    to judge by and to draw; seeds of calibration digits."""

    width: int = 64
    depth: int = 2
    steps: int = 500
    calibration: int = 48
    judged: int = 360
    drawn: int = 20
    bits: int = 6
    seeds: int = 1
    compiles: bool = False


QUICK = Setting(32, 1, 30, 24, 24, 10)  # 24 digits have all classes, and scaling needs them


@dataclass(frozen=True)
class Quality:
    """Of one model with one calibration: per digit, nats per pixel from the float model's
    predictions `[N]`, and of the digit's own pixels `[N]`."""

    divergence: Tensor
    nll: Tensor


@dataclass(frozen=True, eq=False)
class Result:
    """By method, float first: qualities, one for each seed, and MB; of the first seed, digits
    `[N, 64]` and pixels per second, nothing where not compiled."""

    quality: dict[str, list[Quality]]
    size_mb: dict[str, float]
    digits: dict[str, Tensor]
    speed: dict[str, float]


def recipes(bits: int) -> dict[str, Recipe]:
    """Return what is compared: each has the rules of PTQ4ARVG's recipe for ranges, and one step of
    it more than the one before."""
    token_wise = ptq4arvg.token_wise(TOKEN_WISE, bits, bits)
    (layer,) = (p.default for p in token_wise.passes if isinstance(p, InsertObservers))
    assert isinstance(layer, LayerSpec)
    assert layer.activation is not None
    plain = replace(layer, activation=replace(layer.activation, rows=None))
    judged = replace(plain, weight=replace(plain.weight, observer=MinMax()))
    quantize = InsertObservers(plain), Calibrate(), Convert()
    return {
        STATIC: Recipe(STATIC, quantize),
        SMOOTH: Recipe(SMOOTH, (SmoothQuant(judged), *quantize)),
        GAIN: Recipe(GAIN, (ptq4arvg.GainProjected(judged), *quantize)),
        TOKEN_WISE: token_wise,
    }


@torch.no_grad()
def judge(model: nn.Module, program: nn.Module, labels: Tensor, pixels: Tensor) -> Quality:
    """Compare a model's predictions of every pixel, given those before it, with the float model's.

    Args:
        model: the float model.
        program: the one to judge.
        labels: `[N]`.
        pixels: `[N, 64]`.
    """
    exact, found = (each(labels, pixels).double().log_softmax(-1) for each in (model, program))
    divergence = (exact.exp() * (exact - found)).sum(-1).mean(1)
    return Quality(divergence, -found.gather(-1, pixels[..., None]).mean((1, 2)))


def quantize(model: Generator, setting: Setting, say: Callable[[str], None]) -> Result:
    """Quantize a generator by each recipe, for each seed of calibration digits, and judge them."""
    pixels, labels, test_pixels, test_labels = tokens()
    held_out = test_labels[: setting.judged], test_pixels[: setting.judged]
    wanted = recipes(setting.bits)
    quality = {name: [] for name in wanted}
    first: dict[str, nn.Module] = {FLOAT: model}
    for seed in range(setting.seeds):
        order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))
        chosen = order[: setting.calibration]
        for name, recipe in wanted.items():
            inputs = labels[chosen], pixels[chosen]
            program = fxq.compress(model, inputs, recipe, data=[inputs])
            quality[name].append(judge(model, program, *held_out))
            first.setdefault(name, program)
            say(f"{name}, calibration digits of seed {seed}")
    shown = torch.arange(setting.drawn) % CLASSES
    size = sum(p.numel() * p.element_size() for p in model.state_dict().values()) / 1e6
    sizes = {name: fxq.report(first[name]).size_bytes / 1e6 for name in wanted}
    digits = {name: sample(each, shown, 0) for name, each in first.items()}
    return Result(
        {FLOAT: [judge(model, model, *held_out)], **quality},
        {FLOAT: size, **sizes},
        digits,
        speed(first, *held_out) if setting.compiles else {},
    )


def speed(models: dict[str, nn.Module], labels: Tensor, pixels: Tensor) -> dict[str, float]:
    """Return the pixels per second of each as compiled: a call gives one to every digit."""
    compiled = [
        torch.compile(each) if name == FLOAT else torch.compile(each, backend="fxq")
        for name, each in models.items()
    ]
    with torch.no_grad():
        calls = [lambda each=each: each(labels, pixels) for each in compiled]
        found = interleaved_ms(calls, ROUNDS)
    return {name: 1000 * len(labels) / ms for name, ms in zip(models, found, strict=True)}


def draw_figure(result: Result, path: str) -> None:
    """Draw the digits of each model under one another, of the same random numbers."""
    figure, axes = plt.subplots(layout="constrained", figsize=(12, 4))
    rows = [torch.cat(list(each.reshape(-1, 8, 8)), 1) for each in result.digits.values()]
    gap = torch.full((1, rows[0].shape[1]), 15)
    axes.imshow(torch.cat([part for row in rows for part in (row, gap)][:-1]), cmap="gray")
    ticks = [3.5 + 9 * index for index in range(len(rows))]
    axes.set(yticks=ticks, yticklabels=list(result.digits), xticks=[])
    axes.set_title("digits 0 to 9 and again, from the same random numbers")
    figure.savefig(path, dpi=100)


def table(result: Result) -> Table:
    """Return quality, size and speed by method."""
    made = Table(title="held-out digits, nats per pixel: mean, and that of the worst digit")
    for column in ("", "KL", "worst", "NLL", "worst", "MB", "pixels/s"):
        made.add_column(column, justify="right" if column else "left")
    for name, qualities in result.quality.items():
        for found in qualities:
            made.add_row(
                name,
                *(f"{float(x):.4f}" for x in (found.divergence.mean(), found.divergence.max())),
                *(f"{float(x):.4f}" for x in (found.nll.mean(), found.nll.max())),
                f"{result.size_mb[name]:.2f}",
                f"{result.speed[name]:.0f}" if result.speed else "-",
            )
    return made


def main(arguments: Sequence[str] | None = None) -> Result:
    """Run the example."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bits", type=int, default=6, help="of weights and activations")
    parser.add_argument("--seeds", type=int, default=1, help="how often, with other digits")
    parser.add_argument("--figure", default="quantize_generator.png", help="where to draw")
    parser.add_argument("--compile", action="store_true", help="time all as compiled")
    parser.add_argument("--quick", action="store_true", help="little training: for the test")
    args = parser.parse_args(arguments)
    setting = replace(
        QUICK if args.quick else Setting(),
        bits=args.bits,
        seeds=args.seeds,
        compiles=args.compile,
    )
    console, began = Console(), time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - began:6.1f} s[/dim]  {text}", highlight=False)

    say("training on scikit-learn's digits")
    model = train(setting.width, setting.depth, setting.steps)
    result = quantize(model, setting, say)
    draw_figure(result, args.figure)
    console.print(table(result))
    return result


if __name__ == "__main__":
    main()
