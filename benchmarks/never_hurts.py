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
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import NamedTuple

import torch
from common import Cell, Machine, Table, publish
from torch import Tensor, nn

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


class Outputs(nn.Module):
    """A model that returns one tensor, of tensors given by position."""

    def __init__(self, model: nn.Module, call: Callable[..., Tensor]) -> None:
        super().__init__()
        self.model, self.call = model, call

    def forward(self, x: Tensor, t: Tensor | None = None, y: Tensor | None = None) -> Tensor:
        """Return what the model makes of a batch; `t` and `y` are a diffusion model's."""
        return self.call(self.model, x) if t is None else self.call(self.model, x, t, y)


class Study(NamedTuple):
    """A model and what it takes: the first dimension of every input is the sample."""

    model: nn.Module
    inputs: tuple[Tensor, ...]


def diffusion(zoo: ModuleType, model: nn.Module) -> Study:
    """Return a denoiser on noisy digits at random time-steps."""
    x, y = zoo.mnist16("test")
    generator = torch.Generator().manual_seed(0)
    x, y = x[: N_CALIBRATION + N_JUDGES], y[: N_CALIBRATION + N_JUDGES]
    t = torch.randint(1000, (len(x),), generator=generator)
    noisy = zoo.ddim().add_noise(x, torch.randn(x.shape, generator=generator), t)
    call = lambda m, x, t, y: m(x, timestep=t, class_labels=y).sample  # noqa: E731
    return Study(Outputs(model, call).eval(), (noisy, t, y))


def stories(zoo: ModuleType) -> Study:
    """Return a language model on the beginnings of stories."""
    encode = zoo.StoriesTokenizer().encode
    tokens = [encode(text[:400])[:64] for text in zoo.tinystories()]
    rows = torch.tensor([t for t in tokens if len(t) == 64][: N_CALIBRATION + N_JUDGES])
    call = lambda m, x: m(input_ids=x, use_cache=False).logits  # noqa: E731
    return Study(Outputs(zoo.stories260k(), call).eval(), (rows,))


def pixels(zoo: ModuleType) -> Study:
    """Return an image generator on the tokens of digits."""
    model, levels = zoo.imagegpt_mnist()
    x = zoo.mnist("test")[0][: N_CALIBRATION + N_JUDGES].flatten(1)
    return Study(model, ((x[..., None] - levels).abs().argmin(-1),))


def studies(zoo: ModuleType) -> dict[str, Callable[[], Study]]:
    """Return how to load each model."""
    return {
        "vit_cifar10": lambda: Study(zoo.vit_cifar10(), (zoo.cifar10("test")[0],)),
        "kwt1": lambda: Study(zoo.kwt1(), (zoo.speech_commands()[0],)),
        "stories260k": lambda: stories(zoo),
        "imagegpt_mnist": lambda: pixels(zoo),
        "dit_mnist": lambda: diffusion(zoo, zoo.dit_mnist()),
        "unet_mnist": lambda: diffusion(zoo, zoo.unet_mnist()),
        "vit_tiny_imagenet": lambda: Study(
            zoo.vit_tiny_imagenet(), (zoo.imagenet_batch(N_CALIBRATION + N_JUDGES)[0],)
        ),
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

    loaders, found = studies(zoo), list[dict[str, Cell]]()
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
