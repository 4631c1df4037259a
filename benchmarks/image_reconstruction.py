"""How much of an ImageNet classifier's accuracy does reconstruction bring back at few bits?

    python benchmarks/image_reconstruction.py --data PATH      # about an hour on one core

Static quantization, a scale per output channel of weights; the first and last layer in 8 bits. 32
photographs calibrate and are learned from, the others judge: the share whose class is right, SQNR
of the logits over all of them, and that of the worst. `--data` is a folder with `zoo.py`, which
loads the models and photographs.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from common import Cell, Machine, Table, publish
from torch import Tensor, nn

import fxq
from fxq.numerics import sqnr_db
from fxq.passes.common import FIRST, LAST, Calibrate, Convert, InsertObservers
from fxq.passes.common.reconstruction import BlockLoss, Reconstruct, StraightThrough
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, MeanSquaredError, MinMax, PerChannel, PerTensor, PerToken, QuantSpec

N_CALIBRATION, BATCH = 32, 4
SEARCH = MeanSquaredError(steps=40)


@dataclass(frozen=True)
class Study:
    """A model, how it is quantized without learning, and how with."""

    name: str
    model: nn.Module
    bits: tuple[int, int]
    observe: InsertObservers
    reconstruct: Reconstruct


def vit(model: nn.Module, weight_bits: int, activation_bits: int) -> Study:
    """Return the study of a ViT: linears, one activation scale per token position."""
    few = activation_bits < 8
    activation = QuantSpec(
        activation_bits,
        symmetric=False,
        granularity=PerToken(),
        observer=SEARCH if few else MinMax(),
    )
    layer = LayerSpec(activation, weight(weight_bits))
    last = LayerSpec(QuantSpec(8, symmetric=False, granularity=PerToken()), weight(8))
    how = Reconstruct(
        steps=150 if few else 100,
        loss=BlockLoss(fisher=True),
        method=StraightThrough(
            scale_learning_rate=1e-3 if few else 0.0,
            activation_learning_rate=3e-3 if few else 0.0,
        ),
    )
    observe = InsertObservers(layer, overrides=((LAST, last),))
    return Study("ViT-Ti/16", model, (weight_bits, activation_bits), observe, how)


def mobilenet(model: nn.Module, weight_bits: int) -> Study:
    """Return the study of a MobileNet: convolutions too, one activation scale per tensor."""
    activation = QuantSpec(8, symmetric=False, granularity=PerTensor(), observer=SEARCH)
    ends = LayerSpec(activation, weight(8))
    observe = InsertObservers(
        LayerSpec(activation, weight(weight_bits)),
        targets=("linear", "conv"),
        overrides=((FIRST, ends), (LAST, ends)),
    )
    how = Reconstruct(
        steps=150,
        loss=BlockLoss(fisher=True),
        method=StraightThrough(
            learning_rate=1e-2, scale_learning_rate=1e-3, bias_learning_rate=1e-3
        ),
    )
    return Study("MobileNetV2", model, (weight_bits, 8), observe, how)


def weight(bits: int) -> QuantSpec:
    """Return how weights are quantized."""
    return QuantSpec(bits, granularity=PerChannel(0), observer=MeanSquaredError())


def rows(study: Study, x: Tensor, y: Tensor, seeds: int) -> Iterator[dict[str, Cell]]:
    """Measure a model rounded to nearest and reconstructed, with several calibration sets."""
    name = f"W{study.bits[0]}A{study.bits[1]}"
    for method, learn in {"nearest": (), "reconstructed": (study.reconstruct,)}.items():
        recipe = Recipe(name, (study.observe, Calibrate(), *learn, Convert()))
        found = [measured(study.model, recipe, x, y, seed) for seed in range(seeds)]
        columns = list(zip(*found, strict=True))
        yield {
            "model": study.name,
            "bits": name,
            "method": method,
            **{key: f"{statistics.mean(column):.1%}" for key, column in
               zip(("float top-1", "top-1"), columns[:2], strict=True)},
            "worst top-1": f"{min(columns[1]):.1%}",
            "SQNR dB": statistics.mean(columns[2]),
            "worst photograph dB": statistics.mean(columns[3]),
            "minutes": statistics.mean(columns[4]),
        }  # fmt: skip


@torch.no_grad()
def measured(
    model: nn.Module, recipe: Recipe, x: Tensor, y: Tensor, seed: int
) -> tuple[float, float, float, float, float]:
    """Return accuracy in float and quantized, SQNR pooled and of the worst photograph in dB, and
    the minutes that compression took."""
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
    chosen, judges = order[:N_CALIBRATION], order[N_CALIBRATION:]
    began = time.perf_counter()
    program = fxq.compress(
        model, x[:BATCH], recipe, data=[(part,) for part in x[chosen].split(BATCH)]
    )
    minutes = (time.perf_counter() - began) / 60
    exact, found = (logits(m, x[judges]) for m in (model, program))
    right = [float((out.argmax(1) == y[judges]).float().mean()) for out in (exact, found)]
    worst = min(sqnr_db(a, b) for a, b in zip(exact, found, strict=True))
    print(f"{recipe.name} {len(recipe.passes)} passes, seed {seed}: {right[1]:.1%}, "
          f"{sqnr_db(exact, found):.1f} dB, {minutes:.1f} min", file=sys.stderr)  # fmt: skip
    return right[0], right[1], sqnr_db(exact, found), worst, minutes


def logits(model: nn.Module, x: Tensor) -> Tensor:
    """Return a model's results on all photographs."""
    return torch.cat([model(part) for part in x.split(28)])


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with zoo.py and pretrained models")
    parser.add_argument("--seeds", type=int, default=3, help="calibration sets")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path.insert(0, args.data)
    import zoo

    x, y = zoo.imagenet_batch(40 if args.smoke else 200)
    transformer = zoo.vit_tiny_imagenet()
    studies: Sequence[Study] = (
        vit(transformer, 4, 8),
        vit(transformer, 4, 4),
        mobilenet(zoo.mobilenet_v2_imagenet(), 4),
    )
    seeds = 1 if args.smoke else args.seeds
    table = Table(
        name="image_reconstruction",
        title="ImageNet classifiers at few bits, rounded to nearest and reconstructed",
        settings={"calibration photographs": N_CALIBRATION, "judging photographs":
                  len(x) - N_CALIBRATION, "calibration sets": seeds, "threads": args.threads},
        machine=Machine.here(),
        columns=("model", "bits", "method", "float top-1", "top-1", "worst top-1", "SQNR dB",
                 "worst photograph dB", "minutes"),
        rows=tuple(row for study in studies for row in rows(study, x, y, seeds)),
        notes=(
            "Means over calibration sets; worst top-1 is that of the worst set. The photographs "
            "are probably training images of the models: read differences, not levels.",
        ),
    )  # fmt: skip
    publish(table, smoke=args.smoke)


if __name__ == "__main__":
    main()
