"""How much of the accuracy that unbalanced channels cost do scaling methods recover?

    python benchmarks/planted_imbalance.py --data PATH      # an hour on one core, busy

In every model 5 % of the channels of each exact site are multiplied by 5 to 50 and the weights
that read them divided: the float function is unchanged (checked), its quantized version is not.
SQNR is that of the outputs on test inputs against the float model. Recovered is the share of the dB
lost that a method brings back; above 100 % it is better than the model was before.

The digits ViT is trained here. With `--data`, pretrained models are measured as well: a folder with
`zoo.py`, which loads them.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import trained
from common import Cell, Machine, Table, publish
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

import fxq
from fxq.numerics import sqnr_db
from fxq.passes import outlier_suppression, repq_vit, smoothquant, w6a6, w8a8
from fxq.passes.common.scaling import Scaling, fold_scaling, plant_imbalance, scale_sites
from fxq.pipeline import Recipe
from fxq.rewriting import copy_graph

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from digits_vit import digits, train_vit

N_CALIBRATION, N_TEST, BATCH = 64, 96, 16  # of models whose samples are few, or their batch fixed
RECIPES = {
    "W8A8": (w8a8.STATIC, smoothquant.W8A8, repq_vit.W8A8, outlier_suppression.W8A8),
    "W6A6": (w6a6.STATIC, smoothquant.W6A6, repq_vit.W6A6, outlier_suppression.W6A6),
}


@dataclass(frozen=True)
class Study:
    """A model and the inputs it is calibrated and tested with."""

    name: str
    model: nn.Module
    example: Any
    data: Sequence[Sequence[Tensor]]
    test: Sequence[Sequence[Tensor]]


def digits_vit(smoke: bool) -> Study:
    """Return a ViT that is trained here."""
    images, labels, test_images, _ = digits()
    model = train_vit(images, labels, epochs=2 if smoke else 40)
    calibration = [(part,) for part in images[:256].split(64)]
    return Study("digits ViT", model, test_images[:1], calibration, [(test_images,)])


def studies(data: str | None, smoke: bool) -> dict[str, Callable[[], Study]]:
    """Return how to get each model."""
    found: dict[str, Callable[[], Study]] = {"digits ViT": lambda: digits_vit(smoke)}
    if data is None or smoke:
        return found
    sys.path.insert(0, data)
    import zoo

    loaders = trained.studies(zoo, N_CALIBRATION + N_TEST)
    return found | {
        "CIFAR-10 ViT": lambda: cifar10_vit(zoo),
        "MNIST DiT": lambda: mnist_dit(zoo),
        "KWT-1, post-norm": lambda: whole("KWT-1, post-norm", loaders["kwt1"]()),
        "story Llama, 260K": lambda: whole("story Llama, 260K", loaders["stories260k"]()),
    }


def whole(name: str, study: trained.Study) -> Study:
    """Return the first samples to calibrate and the next ones to test."""
    parts = [x[: N_CALIBRATION + N_TEST].split(BATCH) for x in study.inputs]
    batches = list(zip(*parts, strict=True))
    n = N_CALIBRATION // BATCH
    return Study(name, study.model, batches[0], batches[:n], batches[n:])


def cifar10_vit(zoo: ModuleType) -> Study:
    """Return a ViT on images."""
    x, y = zoo.cifar10("calib")[0], zoo.cifar10("test")[0]
    calibration = [(part,) for part in x[:256].split(64)]
    return Study("CIFAR-10 ViT", zoo.vit_cifar10(), x[:1], calibration, [(y[:256],)])


def mnist_dit(zoo: ModuleType) -> Study:
    """Return a diffusion transformer, on noise."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(96, 1, 16, 16, generator=generator)
    t = torch.randint(0, 1000, (96,), generator=generator)
    c = torch.randint(0, 10, (96,), generator=generator)
    dit = [(z[i : i + 32], t[i : i + 32], c[i : i + 32]) for i in (0, 32, 64)]
    names = ("hidden_states", "timestep", "class_labels")
    example = dict(zip(names, (part[:1] for part in dit[0]), strict=True))
    return Study("MNIST DiT", zoo.dit_mnist(), example, dit[:2], dit[2:])


def sqnr(gm: GraphModule, exact: Tensor, test: Sequence[Sequence[Tensor]]) -> float:
    """Return the SQNR in dB of a graph's outputs."""
    return sqnr_db(exact, outputs(gm, test))


def outputs(gm: GraphModule, test: Sequence[Sequence[Tensor]]) -> Tensor:
    """Return all outputs of a graph as one vector."""
    with torch.no_grad():
        return torch.cat([leaf.flatten() for inputs in test for leaf in tree_leaves(gm(*inputs))])


def rows(
    study: Study, recipes: Mapping[str, Sequence[Recipe]], seeds: int
) -> Iterator[dict[str, Cell]]:
    """Measure one model: every recipe without and with planted imbalance."""
    original = fxq.capture(study.model, study.example).graph_module
    exact = outputs(original, study.test)

    def run(recipe: Recipe, gm: GraphModule) -> tuple[float, float]:
        began = time.perf_counter()
        found = recipe.apply(copy_graph(gm), study.data)
        return sqnr(found, exact, study.test), time.perf_counter() - began

    planted = []
    for seed in range(seeds):
        planted.append(copy_graph(original))
        plant_imbalance(planted[-1], seed=seed)
        same = sqnr(planted[-1], exact, study.test)
        if same < 100:
            raise RuntimeError(f"{study.name}: planting changed the float function ({same:.0f} dB)")
    for bits, (plain, *methods) in recipes.items():
        before = run(plain, original)[0]
        lost = [run(plain, gm)[0] for gm in planted]
        yield {"model": study.name, "bits": bits, "method": "none", "unplanted dB": before,
               "planted dB": statistics.mean(lost)}  # fmt: skip
        for method in methods:
            found = [run(method, gm) for gm in planted]
            pairs = zip(found, lost, strict=True)
            recovered = [(after - loss) / (before - loss) for (after, _), loss in pairs]
            yield {
                "model": study.name,
                "bits": bits,
                "method": type(method.passes[0]).__name__,
                "unplanted dB": run(method, original)[0],
                "planted dB": statistics.mean(after for after, _ in found),
                "recovered": f"{statistics.mean(recovered):.0%}",
                "worst seed": f"{min(recovered):.0%}",
                "recipe s": statistics.median(seconds for _, seconds in found),
            }
        print(f"measured {study.name} {bits}", file=sys.stderr)


def vit_b_seconds() -> tuple[float, float]:
    """Return how long finding and folding all sites of a 12-block ViT-B takes, median of three."""
    gm = fxq.capture(VisionTransformer().eval(), torch.zeros(1, 3, 224, 224)).graph_module
    times = []
    for _ in range(3):
        copied = copy_graph(gm)
        began = time.perf_counter()
        sites = scale_sites(copied).sites
        found = time.perf_counter()
        fold_scaling(copied, [Scaling(s, torch.full((s.n_channels,), 1.5)) for s in sites])
        times.append((found - began, time.perf_counter() - found))
    finding, folding = zip(*times, strict=True)
    return statistics.median(finding), statistics.median(folding)


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", help="folder with zoo.py and pretrained models")
    parser.add_argument("--models", nargs="+", help="some of them, in the place of all")
    parser.add_argument("--bits", nargs="+", choices=RECIPES, default=[*RECIPES])
    parser.add_argument("--name", help="added to that of the table")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    machine, seeds = Machine.here(), 1 if args.smoke else 3
    loaders, recipes = studies(args.data, args.smoke), {bits: RECIPES[bits] for bits in args.bits}
    found = [
        row for name in args.models or loaders for row in rows(loaders[name](), recipes, seeds)
    ]
    finding, folding = vit_b_seconds() if not args.smoke else (0.0, 0.0)
    columns = ("model", "bits", "method", "unplanted dB", "planted dB", "recovered", "worst seed",
               "recipe s")  # fmt: skip
    table = Table(
        name="_".join(filter(None, ("planted_imbalance", args.name))),
        title="Planted channel imbalance, and what scaling methods recover of it",
        settings={"seeds": seeds, "planted": "5 % of the channels of each exact site, x 5 to 50"},
        machine=machine,
        columns=columns,
        rows=tuple(found),
        notes=(
            "SQNR of the outputs on test inputs against the float model, mean over seeds. Each "
            "method keeps a site as it is where its error would not fall.",
            f"All sites of a 12-block ViT-B (86 M parameters): found in {finding:.1f} s, folded in "
            f"{folding:.1f} s.",
        ),
    )
    publish(table, smoke=args.smoke)


if __name__ == "__main__":
    main()
