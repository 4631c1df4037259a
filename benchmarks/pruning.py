"""Pruners with and without Sparsity Induction, on a real small language model and a real ViT.

    python benchmarks/pruning.py language --data PATH    # a quarter of an hour on one core
    python benchmarks/pruning.py vision --data PATH      # half an hour

`--data` is a folder with `zoo.py`, which loads the models. A seed draws the samples that calibrate.
The language model is judged on later tokens of other stories: none of them calibrated anything, and
no setting of any method was chosen by them. Each run is written to `--journal` when it is done; a
benchmark that is started again goes on where it stopped.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from common import Cell, Machine, Table, publish
from torch import Tensor, nn
from torch.nn import functional as F

import fxq
from fxq.passes.pruning import RIA, Group, Magnitude, SparseGPT, Unstructured, Wanda
from fxq.passes.pruning.prune import Pruner
from fxq.passes.sparsity_induction import InduceSparsity, Learning
from fxq.pipeline import DataPass, Recipe

CONTEXT, END = 128, 224  # tokens: those between are judged
N_POOL, N_STORIES = 237, 128  # stories that may calibrate, and those that do
N_PHOTOGRAPHS = 32  # that calibrate; all others judge
PER_LAYER: tuple[type[Pruner], ...] = (Magnitude, SparseGPT)  # as their papers count 50 %
PATTERNS = {"50 %": None, "2:4": Group(2, 4), "4:8": Group(4, 8)}
Score = Mapping[str, float]


@dataclass(frozen=True, eq=False)
class Study:
    """A model, what calibrates it, and its judge.

    Args:
        name: of the table.
        model: in float32.
        example: as `fxq.compress` takes it.
        dynamic_shapes: likewise.
        data: batches to calibrate with, given a seed.
        judge: scores of a model, given the seed.
        patterns: names, in `PATTERNS`.
        pruners: in order.
    """

    name: str
    model: nn.Module
    example: Any
    dynamic_shapes: Any
    data: Callable[[int], list[Any]]
    judge: Callable[[nn.Module, int], Score]
    patterns: Sequence[str]
    pruners: Sequence[type[Pruner]]


def language(smoke: bool) -> Study:
    """Return the story model."""
    import zoo

    tokenizer = zoo.StoriesTokenizer()
    stories = zoo.tinystories()
    stories = [*stories[:12], *stories[-4:]] if smoke else stories
    encoded = [ids for text in stories if len(ids := tokenizer.encode(text[:800])) >= CONTEXT]
    n_pool = 10 if smoke else N_POOL
    pool = torch.tensor([ids[:CONTEXT] for ids in encoded[:n_pool]])
    others = torch.tensor([ids[:END] for ids in encoded[n_pool:] if len(ids) >= END])

    def data(seed: int) -> list[Any]:
        order = torch.randperm(len(pool), generator=torch.Generator().manual_seed(seed))
        parts = pool[order[:N_STORIES]].split(8)
        return [{"input_ids": part, "use_cache": False} for part in parts]

    @torch.no_grad()
    def judge(model: nn.Module, seed: int) -> Score:
        losses: list[Tensor] = []
        for ids in others.split(32):
            logits = model(input_ids=ids, use_cache=False).logits[:, CONTEXT - 1 : -1]
            losses.append(F.cross_entropy(logits.mT, ids[:, CONTEXT:], reduction="none"))
        return {"perplexity": math.exp(torch.cat(losses).mean())}

    example = {"input_ids": pool[:8], "use_cache": False}
    shapes = {"input_ids": {0: "batch", 1: "tokens"}}
    model = zoo.stories260k()
    return Study(
        "language", model, example, shapes, data, judge, tuple(PATTERNS),
        (Magnitude, Wanda, RIA, SparseGPT),
    )  # fmt: skip


def vision(smoke: bool) -> Study:
    """Return the ImageNet ViT."""
    import zoo

    model = zoo.vit_tiny_imagenet()
    images, labels = zoo.imagenet_batch(40 if smoke else 200)
    with torch.no_grad():
        exact = torch.cat([model(part) for part in images.split(40)])

    def order(seed: int) -> Tensor:
        return torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))

    def data(seed: int) -> list[Any]:
        return [(images[part],) for part in order(seed)[:N_PHOTOGRAPHS].split(8)]

    @torch.no_grad()
    def judge(model: nn.Module, seed: int) -> Score:
        rest = order(seed)[N_PHOTOGRAPHS:]
        found = torch.cat([model(images[part]) for part in rest.split(8)])
        powers, errors = exact[rest].square().sum(1), (found - exact[rest]).square().sum(1)
        return {
            "top-1": 100 * float((found.argmax(1) == labels[rest]).float().mean()),
            "SQNR": 10 * math.log10(powers.sum() / max(errors.sum(), 1e-30)),
            "worst SQNR": 10 * math.log10((powers / errors.clamp(min=1e-30)).min()),
        }

    return Study(
        "vision", model, images[:8], {"x": {0: "batch"}}, data, judge, ("50 %", "2:4"),
        (Magnitude, Wanda, SparseGPT),
    )  # fmt: skip


def passes(kind: type[Pruner], pattern: str) -> tuple[Any, Any]:
    """Return a pruner and its induction, as the recipes have them."""
    half = Unstructured(0.5, "layer" if kind in PER_LAYER else "row")
    pruner = cast(Any, kind)(PATTERNS[pattern] or half)
    steps = 20 if kind is SparseGPT else Learning().steps
    return pruner, InduceSparsity(pruner, Learning(steps=steps))


class Journal:
    """Runs that are done, a line of JSON each."""

    def __init__(self, path: Path) -> None:
        self.path, lines = path, path.read_text().splitlines() if path.exists() else []
        self.runs: dict[str, Score] = dict(json.loads(line) for line in lines)

    def once(self, key: str, run: Callable[[], Score]) -> Score:
        """Return what a run gave, now or before."""
        if key not in self.runs:
            self.runs[key] = run()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a") as file:
                file.write(json.dumps([key, self.runs[key]]) + "\n")
            print(key, dict(self.runs[key]), file=sys.stderr)
        return self.runs[key]


def scored(study: Study, method: Any, seed: int) -> Score:
    """Prune a model, and return its scores and the seconds of this process it took."""
    began = time.process_time()
    program = fxq.compress(
        study.model, study.example, Recipe("pruned", (method,)), study.data(seed),
        dynamic_shapes=study.dynamic_shapes,
    )  # fmt: skip
    seconds = time.process_time() - began
    return {**study.judge(program, seed), "seconds": seconds}


def rows(study: Study, journal: Journal, seeds: int) -> Iterator[dict[str, Cell]]:
    """Measure every pruner with every pattern, with and without induction: all of a seed before the
    next one."""
    for seed in range(seeds):
        for kind in study.pruners:
            for pattern in study.patterns:
                both(study, journal, kind, pattern, seed)
    for kind in study.pruners:
        for pattern in study.patterns:
            runs = [both(study, journal, kind, pattern, seed) for seed in range(seeds)]
            alone, induced = ([run[k] for run in runs] for k in (0, 1))
            yield {"pruner": kind.__name__, "pattern": pattern, **summary(study, alone, induced)}


def both(
    study: Study, journal: Journal, kind: type[Pruner], pattern: str, seed: int
) -> tuple[Score, Score]:
    """Return the scores of a pruner alone, and with induction."""
    pruner, induction = passes(kind, pattern)
    key = f"{study.name} {kind.__name__} {pattern}"
    needs_data = isinstance(pruner, DataPass)  # otherwise it is the same for every seed
    alone = journal.once(
        f"{key} alone {seed if needs_data or study.name == 'vision' else 0}",
        lambda: scored(study, pruner, seed),
    )
    return alone, journal.once(f"{key} induced {seed}", lambda: scored(study, induction, seed))


def summary(study: Study, alone: list[Score], induced: list[Score]) -> dict[str, Cell]:
    """Return the cells of a row, over seeds."""
    cells: dict[str, Cell] = {}
    for score in [name for name in alone[0] if name != "seconds"]:
        for name, runs in (("alone", alone), ("induced", induced)):
            cells[f"{score}, {name}"] = statistics.mean(run[score] for run in runs)
    if study.name == "language":
        exact = study.judge(study.model, 0)["perplexity"]
        pairs = [(a["perplexity"], b["perplexity"]) for a, b in zip(alone, induced, strict=True)]
        left = [100 * (b - exact) / (a - exact) for a, b in pairs]
        cells["increase left, %"] = statistics.mean(left)
        cells["worst seed, %"] = max(left)
        cells["worst ratio"] = max(b / a for a, b in pairs)
    return cells | {"seconds": statistics.mean(run["seconds"] for run in induced)}


def measured(study: Study, journal: Journal, seeds: int) -> Table:
    """Return the table of a model."""
    machine = Machine.here()
    found = list(rows(study, journal, seeds))
    exact = [study.judge(study.model, seed) for seed in range(seeds)]
    dense = {name: statistics.mean(run[name] for run in exact) for name in exact[0]}
    kept = {name: round(value, 2) for name, value in dense.items() if "SQNR" not in name}
    return Table(
        name=f"pruning_{study.name}",
        title=f"Pruners alone and with Sparsity Induction: {TITLES[study.name]}",
        settings={"seeds": seeds, "dense": kept, "calibration": CALIBRATION[study.name]},
        machine=machine,
        columns=tuple(found[0]),
        rows=tuple(found),
        notes=(NOTES[study.name],),
    )


TITLES = {
    "language": "260K story Llama",
    "vision": "ViT-Ti, ImageNet",
}
CALIBRATION = {
    "language": f"{N_STORIES} of {N_POOL} stories, {CONTEXT} tokens each, drawn by the seed",
    "vision": f"{N_PHOTOGRAPHS} of 200 photographs, drawn by the seed; the others judge",
}
NOTES = {
    "language": (
        f"Perplexity of tokens {CONTEXT} to {END - 1} of other stories, mean over seeds. Increase "
        "left: induced over alone, less the dense model's; worst ratio: of perplexities, induced "
        "over alone, of any seed. Seconds of the processor, induction and pruning."
    ),
    "vision": (
        "Top-1 accuracy in percent; signal over error of logits in dB, of all and of the worst "
        "photograph. Mean over seeds. Seconds of the processor, induction and pruning."
    ),
}


def main() -> None:
    """Measure and write a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", choices=("language", "vision"))
    parser.add_argument("--data", required=True, help="folder with zoo.py")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--journal", type=Path, default=Path(".cache/pruning.jsonl"))
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    sys.path.insert(0, args.data)
    study = {"language": language, "vision": vision}[args.model](args.smoke)
    publish(measured(study, Journal(args.journal), args.seeds), smoke=args.smoke)


if __name__ == "__main__":
    main()
