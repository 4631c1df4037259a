"""Whether a recipe ever costs: every static 8-bit recipe against the plain one, on trained models.

    python benchmarks/never_hurts.py --data PATH [--models vit_cifar10 kwt1]     # an hour for all

Thirty-two samples calibrate, others judge: SQNR of the model's own outputs, over all of them and of
the worst sample, less what `w8a8.STATIC` has. `--data` is a folder with `zoo.py`, which loads
models and data. Each row is written as soon as it is measured.
"""

import argparse
import statistics
import sys
import time
import warnings
from collections.abc import Iterator

import torch
from common import Cell, Machine, Table, publish
from trained import Study, studies

import fxq
from fxq.numerics import sqnr_db
from fxq.passes import outlier_suppression, recommended, repq_vit, smoothquant, w8a8
from fxq.pipeline import Recipe

N_CALIBRATION, N_JUDGES, BATCH = 32, 128, 8
PLAIN = "w8a8.STATIC"
RECIPES: dict[str, Recipe] = {
    PLAIN: w8a8.STATIC,
    "recommended.W8A8": recommended.W8A8,
    "smoothquant.W8A8": smoothquant.W8A8,
    "repq_vit.W8A8": repq_vit.W8A8,
    "outlier_suppression.W8A8": outlier_suppression.W8A8,
}


def judged(study: Study, recipe: Recipe, seed: int) -> tuple[float, float, float]:
    """Return SQNR pooled and of the worst sample in dB, and the seconds that it took."""
    total = min(len(study.inputs[0]), 1000)
    order = torch.randperm(total, generator=torch.Generator().manual_seed(seed))
    fit, judge = order[:N_CALIBRATION], order[N_CALIBRATION : N_CALIBRATION + N_JUDGES]
    batches = [tuple(x[part] for x in study.inputs) for part in fit.split(BATCH)]
    began = time.perf_counter()
    program = fxq.compress(study.model, batches[0], recipe, batches)
    seconds = time.perf_counter() - began
    pairs = [
        [module(*(x[part] for x in study.inputs)) for module in (study.model, program)]
        for part in judge.split(BATCH)
    ]
    exact, found = (torch.cat(outputs) for outputs in zip(*pairs, strict=True))
    worst = min(sqnr_db(a, b) for a, b in zip(exact, found, strict=True))
    return sqnr_db(exact, found), worst, seconds


def rows(name: str, study: Study, seeds: int) -> Iterator[dict[str, Cell]]:
    """Measure every recipe on a model, over calibration sets."""
    plain: list[tuple[float, float, float]] = []
    for recipe_name, recipe in RECIPES.items():
        found = [judged(study, recipe, seed) for seed in range(seeds)]
        plain = plain or found
        gains = [[a[i] - b[i] for a, b in zip(found, plain, strict=True)] for i in (0, 1)]
        yield {
            "model": name,
            "recipe": recipe_name,
            "SQNR dB": statistics.mean(each[0] for each in found),
            "over plain dB": statistics.mean(gains[0]),
            "least over plain dB": min(gains[0]),
            "worst sample dB": statistics.mean(each[1] for each in found),
            "worst over plain dB": statistics.mean(gains[1]),
            "least worst over plain dB": min(gains[1]),
            "seconds": statistics.median(each[2] for each in found),
        }


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", required=True, help="folder with zoo.py")
    parser.add_argument("--models", nargs="+", help="some of them")
    parser.add_argument("--seeds", type=int, default=3, help="calibration sets")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    warnings.simplefilter("ignore")
    sys.path.insert(0, args.data)
    import zoo

    loaders = studies(zoo, N_CALIBRATION + N_JUDGES)
    found = list[dict[str, Cell]]()
    for name in ["vit_cifar10"] if args.smoke else args.models or loaders:
        for row in rows(name, loaders[name](), 1 if args.smoke else args.seeds):
            found.append(row)
            print({key: round(v, 2) if isinstance(v, float) else v for key, v in row.items()},
                  file=sys.stderr, flush=True)  # fmt: skip
            table = Table(
                name="never_hurts",
                title="Static 8-bit recipes against the plain one",
                settings={"calibration samples": N_CALIBRATION, "judging samples": N_JUDGES,
                          "calibration sets": 1 if args.smoke else args.seeds,
                          "threads": args.threads},
                machine=Machine.here(),
                columns=tuple(found[0]),
                rows=tuple(found),
                notes=(f"over plain: less {PLAIN} with the same samples; mean over sets, and the "
                       "least of them.",),
            )  # fmt: skip
            publish(table, smoke=args.smoke)


if __name__ == "__main__":
    main()
