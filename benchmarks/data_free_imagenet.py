"""What do images that an ImageNet ViT dreams give, against photographs? Top-1 and SQNR.

    python benchmarks/data_free_imagenet.py --data PATH [--seeds 1]     # half an hour a seed

32 images calibrate `psaq_vit.W8A8`: photographs, images dreamed by the model, or noise; the other
photographs judge. `--data` is a folder with `zoo.py`, which loads the model and the photographs.
"""

import argparse
import statistics
import sys
from collections.abc import Iterator

import torch
from common import Cell, Machine, Table, publish
from image_reconstruction import N_CALIBRATION, logits
from torch import Tensor, nn

import fxq
from fxq.numerics import sqnr_db
from fxq.passes import psaq_vit

BATCH = 8


def judged(model: nn.Module, images: Tensor, x: Tensor, y: Tensor) -> tuple[float, float, float]:
    """Return top-1 accuracy in percent, SQNR pooled and of the worst photograph in dB."""
    batches = [(part,) for part in images.split(BATCH)]
    program = fxq.compress(model, images[:BATCH], psaq_vit.W8A8, data=batches)
    exact, found = logits(model, x), logits(program, x)
    worst = min(sqnr_db(a, b) for a, b in zip(exact, found, strict=True))
    return 100 * float((found.argmax(1) == y).float().mean()), sqnr_db(exact, found), worst


def dreams(model: nn.Module, example: Tensor, seed: int, steps: int) -> Tensor:
    """Return images `[32, 3, 224, 224]` that the model dreams in two stages of so many steps."""
    settings = psaq_vit.Synthesis(n_steps=steps)
    return psaq_vit.synthesize(
        model, example, mean=psaq_vit.IMAGENET_MEAN, std=psaq_vit.IMAGENET_STD, seed=seed,
        n_images=N_CALIBRATION, settings=settings,
        progress=lambda line: print(line, file=sys.stderr, flush=True),
    ).images  # fmt: skip


def rows(
    model: nn.Module, x: Tensor, y: Tensor, seeds: int, steps: int
) -> Iterator[dict[str, Cell]]:
    """Measure every source of calibration images on the same photographs."""
    sources: dict[str, list[tuple[float, float, float]]] = {}
    exact = []
    for seed in range(seeds):
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))
        judges = x[order[N_CALIBRATION:]], y[order[N_CALIBRATION:]]
        noise = torch.randn(
            N_CALIBRATION, *x.shape[1:], generator=torch.Generator().manual_seed(seed)
        )
        images = {
            "photographs": x[order[:N_CALIBRATION]],
            "dreamed": dreams(model, x[:1], seed, steps),
            "noise": noise,
        }
        exact.append(100 * float((logits(model, judges[0]).argmax(1) == judges[1]).float().mean()))
        for name, chosen in images.items():
            sources.setdefault(name, []).append(judged(model, chosen, *judges))
            print(name, seed, exact[-1], sources[name][-1], file=sys.stderr, flush=True)
    for name, found in sources.items():
        right, pooled, worst = zip(*found, strict=True)
        yield {
            "32 calibration images": name,
            "float top-1": statistics.mean(exact),
            "top-1": statistics.mean(right),
            "furthest below float": max(a - b for a, b in zip(exact, right, strict=True)),
            "SQNR dB": statistics.mean(pooled),
            "worst photograph dB": min(worst),
        }


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with zoo.py")
    parser.add_argument("--seeds", type=int, default=3, help="calibration sets")
    parser.add_argument("--steps", type=int, default=150, help="of dreaming, in each stage of two")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path.insert(0, args.data)
    import zoo

    x, y = zoo.imagenet_batch(40 if args.smoke else 200)
    seeds, steps = (1, 2) if args.smoke else (args.seeds, args.steps)
    with torch.no_grad():
        found = list(rows(zoo.vit_tiny_imagenet(), x, y, seeds, steps))
    table = Table(
        name="data_free_imagenet",
        title="Calibrating an ImageNet ViT-Ti/16 without data: psaq_vit.W8A8",
        settings={
            "seeds": seeds,
            "steps of dreaming": 2 * steps,
            "threads": args.threads,
            "judging photographs": len(x) - N_CALIBRATION,
        },
        machine=Machine.here(),
        columns=tuple(found[0]),
        rows=tuple(found),
        notes=(
            "Percent and dB, mean over seeds; worst photograph of all. The photographs are "
            "probably training images of the model: read differences, not levels.",
        ),
    )
    publish(table, smoke=args.smoke)


if __name__ == "__main__":
    main()
