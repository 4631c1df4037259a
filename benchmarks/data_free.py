"""What do dreamed images give, against noise and real images, and what does the game add?

    python benchmarks/data_free.py calibration --data PATH    # about 15 minutes on two cores
    python benchmarks/data_free.py game --data PATH           # about an hour
    python benchmarks/data_free.py entropy                    # about 5 minutes

`calibration`: test accuracy of the published quantization (every activation, smallest and largest
value), calibrated on 32 images of unclamped Gaussian noise, of training data, or dreamed.

`game`: the same at W4A4 on images dreamed without classes: as quantized, after a game, and after a
game without its adversarial term.

`entropy`: the converged estimate and its gradient against the published formula written plainly,
and what dreaming 32 images of 224 pixels takes.

The digits ViTs are trained here. With `--data`, a pretrained one is measured as well: a folder with
`zoo.py`, which loads it.
"""

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Cell, Machine, Table, interleave, publish
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

import fxq
from fxq.passes import psaq_vit
from fxq.passes.psaq_vit.entropy import Grid, patch_similarity_entropy
from fxq.spec import MinMax

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits_vit import digits, train_vit

N_IMAGES, N_STEPS = 32, 150  # steps per stage, of two
GAME_IMAGES = 128
PUBLISHED_POINTS, PUBLISHED_BANDWIDTH = 10, 0.01


@dataclass(frozen=True)
class Study:
    """A trained model, its training and test images, and their normalization."""

    name: str
    model: nn.Module
    train: Tensor
    test: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def accuracy(self, model: nn.Module) -> float:
        """Return the test accuracy in percent."""
        with torch.no_grad():
            found = torch.cat([model(part).argmax(1) for part in self.test.split(500)])
        return 100 * float((found == self.labels).float().mean())


def studies(data: str | None, smoke: bool, class_token: bool = True) -> Iterator[Study]:
    """Yield the models, each when it is needed; that with a class token if asked for."""
    images, labels, test_images, test_labels = digits()
    low, high = float(images.min()), float(images.max())
    mean, std = (-low / (high - low),), (1 / (high - low),)
    epochs = 2 if smoke else 40
    model = train_vit(images, labels, epochs=epochs)
    yield Study("digits ViT, 8 px", model, images, test_images, test_labels, mean, std)
    if class_token:
        yield _larger(images, labels, test_images, test_labels, mean, std, epochs)
    if data is None or smoke:
        return
    sys.path.insert(0, data)
    import zoo

    x, y = zoo.cifar10("test")
    train, size = zoo.cifar10("calib")[0], 2000
    yield Study(
        "CIFAR-10 ViT", zoo.vit_cifar10(), train, x[:size], y[:size], zoo.CIFAR_MEAN, zoo.CIFAR_STD
    )


def _larger(
    images: Tensor,
    labels: Tensor,
    test_images: Tensor,
    test_labels: Tensor,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    epochs: int,
) -> Study:
    """Return a ViT with a class token on digits of 16 pixels."""
    large, test_large = (F.interpolate(x, scale_factor=2.0) for x in (images, test_images))
    model = train_vit(large, labels, depth=4, epochs=epochs, patch=4, class_token=True)
    return Study("digits ViT, 16 px, class token", model, large, test_large, test_labels, mean, std)


def dreamed(study: Study, seed: int, n_images: int, labels: str | None, smoke: bool) -> (
    psaq_vit.SyntheticImages
):  # fmt: skip
    """Return images the study's model dreams up."""
    return psaq_vit.synthesize(
        study.model, study.test[:1], mean=study.mean, std=study.std, seed=seed, n_images=n_images,
        labels=labels, settings=psaq_vit.Synthesis(n_steps=5 if smoke else N_STEPS),
    )  # fmt: skip


def calibration_rows(study: Study, seeds: int, smoke: bool) -> Iterator[dict[str, Cell]]:
    """Measure one model: every width with every source of calibration images."""
    exact = study.accuracy(study.model)
    sources: list[dict[str, Tensor]] = []
    for seed in range(seeds):
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn(N_IMAGES, *study.test.shape[1:], generator=generator)
        chosen = torch.randperm(len(study.train), generator=generator)[:N_IMAGES]
        dreams = dreamed(study, seed, N_IMAGES, "random", smoke).images
        sources.append({"noise": noise, "real": study.train[chosen], "dreamed": dreams})
    for weight, activation in ((8, 5), (6, 6), (8, 4), (4, 8)):
        recipe = psaq_vit.everywhere("vanilla", weight, activation, MinMax(), published=True)
        found = {
            name: [
                study.accuracy(fxq.compress(study.model, study.test[:1], recipe, data=[s[name]]))
                for s in sources
            ]
            for name in ("noise", "real", "dreamed")
        }
        means = {name: statistics.mean(values) for name, values in found.items()}
        yield {
            "model": study.name,
            "bits": f"W{weight}A{activation}",
            "float": exact,
            **means,
            "worst noise": min(found["noise"]),
            "worst real": min(found["real"]),
            "worst dreamed": min(found["dreamed"]),
        }
    print(f"measured {study.name}", file=sys.stderr)


def calibration(args: argparse.Namespace) -> Table:
    """Return the table of calibration sources."""
    machine, seeds = Machine.here(), 1 if args.smoke else 3
    rows = [
        row
        for study in studies(args.data, args.smoke)
        for row in calibration_rows(study, seeds, args.smoke)
    ]
    return Table(
        name="data_free_calibration",
        title="Calibration images: noise, real, dreamed by the model (PSAQ-ViT)",
        settings={
            "seeds": seeds,
            "images": N_IMAGES,
            "steps": 2 * N_STEPS,
            "quantization": "all activations, smallest and largest value, per tensor",
        },
        machine=machine,
        columns=("model", "bits", "float", "noise", "real", "dreamed", "worst noise", "worst real",
                 "worst dreamed"),
        rows=tuple(rows),
        notes=(
            "Test accuracy in percent, mean over seeds, and the worst seed. Noise is unclamped "
            "N(0, 1) in normalized units.",
        ),
    )  # fmt: skip


def game_rows(study: Study, seeds: int, smoke: bool) -> Iterator[dict[str, Cell]]:
    """Measure one model: W4A4 as quantized, after the game, and without its adversarial term."""
    recipe = psaq_vit.everywhere("vanilla", 4, 4, MinMax(), published=True)
    settings = psaq_vit.Game(n_rounds=3) if smoke else psaq_vit.Game()
    example = study.test[:1]
    found: dict[str, list[float]] = {"plain": [], "game": [], "no adversary": [], "minutes": []}
    for seed in range(seeds):
        images = dreamed(study, seed, 8 if smoke else GAME_IMAGES, None, smoke)
        plain = fxq.compress(study.model, example, recipe, data=images)
        found["plain"].append(study.accuracy(plain))
        for name, weight in (("game", settings.adversarial_weight), ("no adversary", 0.0)):
            began = time.perf_counter()
            refined = psaq_vit.adversarial_refine(
                study.model, example, recipe, images, seed=seed,
                settings=replace(settings, adversarial_weight=weight),
            )  # fmt: skip
            if weight:
                found["minutes"].append((time.perf_counter() - began) / 60)
            found[name].append(study.accuracy(refined.program))
        print(f"{study.name} seed {seed}: {found}", file=sys.stderr)
    margins = {
        f"worst over {name}": min(a - b for a, b in zip(found["game"], found[name], strict=True))
        for name in ("plain", "no adversary")
    }
    means = {name: statistics.mean(values) for name, values in found.items()}
    yield {"model": study.name, "float": study.accuracy(study.model), **means, **margins}


def game(args: argparse.Namespace) -> Table:
    """Return the table of the game."""
    machine, seeds = Machine.here(), 1 if args.smoke else 3
    rows = [
        row
        for study in studies(args.data, args.smoke, class_token=False)
        for row in game_rows(study, seeds, args.smoke)
    ]
    return Table(
        name="data_free_game",
        title="W4A4 without data: the game between images and student (PSAQ-ViT V2)",
        settings={"seeds": seeds, "images": GAME_IMAGES, "settings": repr(psaq_vit.Game())},
        machine=machine,
        columns=("model", "float", "plain", "no adversary", "game", "worst over plain",
                 "worst over no adversary", "minutes"),
        rows=tuple(rows),
        notes=(
            "Test accuracy in percent, mean over seeds; worst: the smallest difference in points "
            "of any seed. No label and no image is used before testing.",
        ),
    )  # fmt: skip


def published_formula(patches: Tensor) -> Tensor:
    """Return the published estimate `[B]` of patches `[B, N, D]` as it is printed: all pairs side
    by side, ten points, autograd through everything."""
    pairs = F.cosine_similarity(patches.unsqueeze(2), patches.unsqueeze(1), dim=-1).flatten(1)
    low, high = pairs.detach().min().item(), pairs.detach().max().item()
    points = torch.linspace(low, high, PUBLISHED_POINTS)
    z = (points.view(1, -1, 1) - pairs.unsqueeze(1)) / PUBLISHED_BANDWIDTH
    kernel = torch.exp(-0.5 * z**2) / (PUBLISHED_BANDWIDTH * math.sqrt(2 * math.pi))
    density = kernel.mean(2) + 1e-4
    return -torch.trapezoid(density * density.log(), points, dim=1)


def with_gradient(entropy: Callable[[Tensor], Tensor], patches: Tensor) -> Callable[[], Tensor]:
    """Return a call that computes the entropy of `patches` and its gradient."""

    def call() -> Tensor:
        leaf = patches.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(entropy(leaf).sum(), leaf)
        return gradient

    return call


def peak_bytes(call: Callable[[], object]) -> int:
    """Return by how much a call raises the resident memory of this process at its peak (Linux)."""

    def read(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))

    Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
    before = read("VmRSS")
    call()
    return read("VmHWM") - before


def entropy(args: argparse.Namespace) -> Table:
    """Return the table of costs."""
    machine = Machine.here()
    patches = torch.randn(4, 196, 64) + 0.5
    grid = Grid(PUBLISHED_BANDWIDTH)
    calls = {
        "published formula": with_gradient(published_formula, patches),
        "converged": with_gradient(
            lambda x: patch_similarity_entropy(x.unsqueeze(1), grid), patches
        ),
    }
    memory = {name: peak_bytes(call) for name, call in calls.items()}
    timings = interleave(calls, 2 if args.smoke else 20, smoke=args.smoke)
    base = timings["published formula"]
    rows: list[dict[str, Cell]] = [
        {
            "what": f"{name}, 4 x 196 x 64, value and gradient",
            "ms": timings[name].median_ms,
            "speedup": timings[name].speedup_over(base),
            "peak MB": memory[name] / 1e6,
            "less memory": memory["published formula"] / memory[name],
        }
        for name in calls
    ]
    rows.append(synthesis_row(args.smoke))
    return Table(
        name="patch_similarity_entropy",
        title="Patch-similarity entropy: cost of the estimate, and of dreaming",
        settings={"bandwidth": PUBLISHED_BANDWIDTH, "rounds": 20},
        machine=machine,
        columns=("what", "ms", "speedup", "peak MB", "less memory"),
        rows=tuple(rows),
        notes=(
            "Peak: growth of the resident memory during the first call. The converged row uses "
            "about 850 points where the published one uses ten.",
        ),
    )


def synthesis_row(smoke: bool) -> dict[str, Cell]:
    """Dream 32 images of 224 pixels with DeiT-T's shape, random weights."""
    n, steps = (2, 1) if smoke else (32, 50)
    model = VisionTransformer(embed_dim=192, depth=12, num_heads=3).eval()
    settings = psaq_vit.Synthesis(n_steps=steps)
    example = torch.zeros(1, 3, 224, 224)
    began = time.perf_counter()
    peak = peak_bytes(
        lambda: psaq_vit.synthesize(
            model, example, mean=psaq_vit.IMAGENET_MEAN, std=psaq_vit.IMAGENET_STD, n_images=n,
            settings=settings, progress=lambda line: print(line, file=sys.stderr),
        )
    )  # fmt: skip
    seconds = time.perf_counter() - began
    what = f"synthesis, DeiT-T, {n} images of 224 px, {2 * steps} steps"
    return {"what": what, "ms": 1e3 * seconds, "peak MB": peak / 1e6}


def main() -> None:
    """Measure and write a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("part", choices=("calibration", "game", "entropy"))
    parser.add_argument("--data", help="folder with zoo.py and a pretrained model")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    table = {"calibration": calibration, "game": game, "entropy": entropy}[args.part](args)
    publish(table, smoke=args.smoke)


if __name__ == "__main__":
    main()
