"""What static recipes keep of an ImageNet ViT, and what each part of the recommended one brings.

    python benchmarks/static_recipes.py --data PATH      # an hour on one core, busy

32 photographs calibrate, the others judge: the share whose class is right, SQNR of the logits over
all of them, and that of the worst. Each row is written as soon as it is measured. `--data` is a
folder with `zoo.py`, which loads the model and the photographs.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import replace

import torch
from common import Cell, Machine, Table, publish
from image_reconstruction import N_CALIBRATION, measured
from torch import Tensor, nn

from fxq.passes import recommended, repq_vit, smoothquant, w6a6, w8a8
from fxq.passes.common import HeldOutMargin, LeaveFloat, SeparateOutliers
from fxq.passes.smoothquant import SmoothQuant
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, MeanSquaredError, MinMax


def ranged(layer: LayerSpec, rule: MinMax | MeanSquaredError) -> LayerSpec:
    """Return a way of quantizing layers with another rule for the range of activations."""
    assert layer.activation is not None
    return replace(layer, activation=replace(layer.activation, observer=rule))


def variants(whole: Recipe, layer: LayerSpec) -> Iterator[tuple[str, Recipe]]:
    """Yield a recommended recipe, and what it is with a part changed or left out."""
    assert layer.activation is not None
    chosen, name = layer.activation.observer, whole.name
    other = MinMax() if isinstance(chosen, MeanSquaredError) else MeanSquaredError()
    separate, *rest = whole.passes
    assert isinstance(separate, SeparateOutliers)
    yield "recommended", whole
    parts = {"margins": HeldOutMargin, "layers left float": LeaveFloat}
    for part, kind in parts.items():
        others = tuple(p for p in whole.passes if not isinstance(p, kind))
        if len(others) < len(whole.passes):
            yield f"without {part}", Recipe(name, others)
    yield "without separated outliers", Recipe(name, tuple(rest))
    turned = ranged(layer, other)
    swapped = recommended.recommended(name, turned, replace(separate, layer=turned))
    yield f"with ranges by {type(other).__name__}", swapped
    smooth = (separate, SmoothQuant(layer), *rest)
    yield "with SmoothQuant", Recipe(name, smooth)


RECIPES = {
    "W8A8": (
        *variants(recommended.W8A8, recommended.W8A8_LAYER),
        ("w8a8.STATIC", w8a8.STATIC),
        ("w8a8.STATIC_PER_TOKEN", w8a8.STATIC_PER_TOKEN),
        ("smoothquant.W8A8", smoothquant.W8A8),
        ("repq_vit.W8A8", repq_vit.W8A8),
    ),
    "W6A6": (*variants(recommended.W6A6, recommended.W6A6_LAYER), ("w6a6.STATIC", w6a6.STATIC)),
}


def rows(
    model: nn.Module, bits: str, x: Tensor, y: Tensor, seeds: int
) -> Iterator[dict[str, Cell]]:
    """Measure every recipe of a number of bits."""
    for name, recipe in RECIPES[bits]:
        found = [measured(model, recipe, x, y, seed) for seed in range(seeds)]
        exact, right, pooled, worst, minutes = zip(*found, strict=True)
        yield {
            "bits": bits,
            "recipe": name,
            "float top-1": f"{statistics.mean(exact):.1%}",
            "top-1": f"{statistics.mean(right):.1%}",
            "worst set": f"{min(right):.1%}",
            "SQNR dB": statistics.mean(pooled),
            "spread dB": max(pooled) - min(pooled),
            "worst photograph dB": min(worst),
            "seconds": 60 * statistics.median(minutes),
        }


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with zoo.py")
    parser.add_argument("--seeds", type=int, default=3, help="calibration sets")
    parser.add_argument("--bits", nargs="+", choices=RECIPES, default=[*RECIPES])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path.insert(0, args.data)
    import zoo

    x, y = zoo.imagenet_batch(40 if args.smoke else 200)
    model, seeds = zoo.vit_tiny_imagenet(), 1 if args.smoke else args.seeds
    found: list[dict[str, Cell]] = []
    for row in (row for bits in args.bits for row in rows(model, bits, x, y, seeds)):
        found.append(row)
        table = Table(
            name="static_recipes",
            title="Static recipes on ViT-Ti/16, ImageNet",
            settings={"calibration photographs": N_CALIBRATION, "judging photographs":
                      len(x) - N_CALIBRATION, "calibration sets": seeds, "threads": args.threads},
            machine=Machine.here(),
            columns=tuple(found[0]),
            rows=tuple(found),
            notes=(
                "Means over calibration sets; the spread is between sets, the worst photograph is "
                "that of all sets. The photographs are probably training images of the model: read "
                "differences, not levels.",
            ),
        )  # fmt: skip
        publish(table, smoke=args.smoke)


if __name__ == "__main__":
    main()
