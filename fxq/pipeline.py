"""Passes, recipes, and `compress`, which runs a recipe on a captured model.

A **pass** is a frozen dataclass: its fields are its hyper-parameters, `reads` and `writes` name the
dialects it stands between, and `run` takes a GraphModule (a `DataPass` also the calibration
batches) and returns torch's `PassResult`. A **recipe** is a name and a tuple of passes. The tuple
is the order; nothing else decides it. `repr(recipe)` is the whole record of an experiment.
"""

import importlib.metadata
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule
from torch.fx.passes.infra.pass_base import PassResult

from fxq.account import little_changed, unintended_skips, weights_unseen
from fxq.autocast import outside_autocast
from fxq.batches import CheckedBatches, StoredBatches, device_of
from fxq.calibrate import Batches as Batches
from fxq.capturing import capture
from fxq.checkpoint import Checkpoint
from fxq.dialect import QUANTIZED, Dialect
from fxq.errors import FxqWarning, SkippedError, did_you_mean
from fxq.graph_json import not_in_files
from fxq.history import Stage, stage
from fxq.judging import far_from_float, outputs_sqnr_db
from fxq.program import Program
from fxq.progress import Progress, Reported, reporting
from fxq.rewriting import propagate
from fxq.seeding import seeded
from fxq.signature import split_inputs
from fxq.sparsity import check_masks
from fxq.writes import as_stored


class SizeToFix(NamedTuple):
    """A free size that a pass needs as a number.

    Args:
        size: symbolic.
        floor: below it the number does not matter.
    """

    size: torch.SymInt
    floor: int


class Pass(ABC):
    """A rewrite of a graph. Subclass as a frozen dataclass."""

    reads: ClassVar[Dialect]
    writes: ClassVar[Dialect]

    @property
    def needs_program(self) -> bool:
        """Whether it leaves state in the graph that the user must set between calls, and so needs a
        `Program` that holds it."""
        return False

    def sizes_to_fix(self, gm: GraphModule) -> Iterable[SizeToFix]:
        """Return the free sizes that must be numbers for the pass to do what it is for.

        Where `torch.compile` left them free they are fixed before the recipe runs, and other
        numbers make other graphs.

        Args:
            gm: canonical, before the recipe; to be read only.
        """
        return ()

    @abstractmethod
    def run(self, gm: GraphModule) -> PassResult:
        """Rewrite `gm` (which the pass owns) and tell whether anything changed."""


class DataPass(ABC):
    """A rewrite that also needs calibration batches."""

    reads: ClassVar[Dialect]
    writes: ClassVar[Dialect]

    @abstractmethod
    def run(self, gm: GraphModule, data: Batches) -> PassResult:
        """Rewrite `gm` (which the pass owns) using `data`, which can be iterated more than once."""

    def resume(self, gm: GraphModule, data: Batches, checkpoint: Checkpoint | None) -> PassResult:
        """Do what `run` does, from where `checkpoint` says that an interrupted run was.

        Unless a pass says otherwise it runs from the start and keeps nothing.
        """
        return self.run(gm, data)


@dataclass(frozen=True)
class Recipe:
    """A name and an order of passes.

    Args:
        name: how reports and files call it.
        passes: run first to last. Each must read the dialect its predecessor writes.
    Raises:
        ValueError: two neighbours do not fit.
    """

    name: str
    passes: tuple[Pass | DataPass, ...]

    def __post_init__(self) -> None:
        for before, after in zip(self.passes, self.passes[1:], strict=False):
            if before.writes is not after.reads:
                raise ValueError(
                    f"recipe {self.name!r}: {type(after).__name__} reads {after.reads}, but "
                    f"{type(before).__name__} "
                    f"before it writes {before.writes}; change their order or put the missing pass "
                    "between them"
                )

    @property
    def needs_data(self) -> bool:
        """Whether any pass reads calibration batches."""
        return any(isinstance(p, DataPass) for p in self.passes)

    @property
    def quantizes(self) -> bool:
        """Whether what comes out is in the dialect of quantized graphs."""
        return bool(self.passes) and self.passes[-1].writes is QUANTIZED

    @property
    def needs_program(self) -> bool:
        """Whether any pass leaves state that the user must set between calls."""
        return any(isinstance(p, Pass) and p.needs_program for p in self.passes)

    def sizes_to_fix(self, gm: GraphModule) -> list[SizeToFix]:
        """Return the free sizes of `gm` that passes need as numbers (`Pass.sizes_to_fix`)."""
        return [size for p in self.passes if isinstance(p, Pass) for size in p.sizes_to_fix(gm)]

    def apply(
        self,
        gm: GraphModule,
        data: Batches | None = None,
        progress: Progress = None,
        checkpoint: Checkpoint | None = None,
        history: list[Stage] | None = None,
    ) -> GraphModule:
        """Run every pass on `gm`, checking the dialect after each.

        The last pass that reads data has the checkpoint; those before it run again after an
        interruption, and must come to the same graph. `history` gets the graph after each; its last
        stage is what `gm` was before, and all is new where it has none.
        """
        reading = (i for i, p in enumerate(self.passes) if isinstance(p, DataPass))
        last = max(reading, default=None)
        with reporting(progress) as report:
            for index, step in enumerate(self.passes):
                name, began = type(step).__name__, time.perf_counter()
                if isinstance(step, DataPass):
                    if data is None:
                        raise ValueError(
                            f"recipe {self.name!r} calibrates ({name}) and needs data=, found "
                            "none; give an iterable of batches, or choose a dynamic or "
                            "weight-only recipe"
                        )
                    kept = checkpoint if index == last else None
                    result = step.resume(gm, Reported(StoredBatches(gm, data), name, report), kept)
                else:
                    result = step.run(gm)
                gm = result.graph_module
                if result.modified:
                    gm.graph.lint()
                    gm.recompile()
                step.writes.check(gm, after=name)
                check_masks(gm, after=name)
                seconds = time.perf_counter() - began
                if history is not None:
                    before = history[-1].graph_module if history else None
                    history.append(stage(name, seconds, gm, before))
                change = "" if result.modified else " (changed nothing)"
                report(f"{name}: {seconds:.1f} s{change}")
        propagate(gm)
        return gm


FLOAT = Recipe("float", ())  # nothing: to see what capture and lowering alone do


def resolve_recipe(recipe: Recipe | str) -> Recipe:
    """Return a recipe given as such or by the name of an installed `fxq.recipes` entry point."""
    if isinstance(recipe, Recipe):
        return recipe
    if not isinstance(recipe, str):
        raise TypeError(
            f"recipe: expected an fxq Recipe or the name of one, found {type(recipe).__name__}"
        )
    points = {p.name: p for p in importlib.metadata.entry_points(group="fxq.recipes")}
    if recipe not in points:
        raise ValueError(f"unknown recipe {recipe!r}; {did_you_mean(recipe, points)}")
    found = points[recipe].load()
    if not isinstance(found, Recipe):
        raise TypeError(
            f"entry point {recipe!r} ({points[recipe].value}) is not an fxq Recipe but {found!r}"
        )
    return found


def compress(
    model: nn.Module | ExportedProgram,
    example_inputs: Tensor | tuple[Any, ...] | Mapping[str, Any],
    recipe: Recipe | str,
    data: Iterable[Any] | None = None,
    *,
    dynamic_shapes: Any = "batch",
    strict: bool = False,
    progress: Progress = None,
    checkpoint: str | Path | None = None,
    history: list[Stage] | None = None,
) -> Program:
    """Capture `model`, run `recipe` on it and return a program that takes the model's place.

    The model is read, never written. The program's `sqnr_db` says how far its outputs on the
    example are from the float graph's; `fxq.verify(program, inputs, model=model)` says more.

    Args:
        model: in eval mode, on any device, float32, bfloat16 or float16; or exported already.
        example_inputs: one input as a user would call the model: a tensor, a tuple of positional
            arguments, or a mapping of keyword arguments.
        recipe: a `Recipe`, or the name of an installed one (`"w8a8_static"`).
        data: batches for a recipe that calibrates, each in the form of `example_inputs`.
        dynamic_shapes: `"batch"` keeps dimension 0 of the inputs free, None fixes every size, a
            mapping names those that are free: `{"input_ids": {1: "tokens"}}`.
        strict: raise where a layer that the recipe targets had to stay float.
        progress: called with a line of text at each stage and every few seconds; True shows bars on
            a terminal, and writes lines to stderr elsewhere.
        checkpoint: a file that keeps what the observers have seen, every minute and when an
            exception ends the work; the same call then goes on after those batches, to the same
            bytes. Other passes run again. It is removed at the end; under `torch.distributed` each
            process needs its own.
        history: a list that gets the graph after every pass (`fxq.history`).
    Raises:
        ValueError: train mode, no data, NaN or Inf in it, wrong shapes, dtype or device, an unknown
            recipe, a checkpoint of other work.
        TypeError: arguments the model does not take.
        UnsupportedError: the model cannot be captured.
        SkippedError: `strict` and something was skipped.
    """
    if type(strict) is not bool:
        raise TypeError(f"strict: expected True or False, found {strict!r}")
    if found := [name for name, m in _modules(model) if isinstance(m, Program)]:
        place = f" in {found[0]!r}" if found[0] else ""
        raise TypeError(
            f"model: expected a float model, found a Program{place}; compress the model it was "
            "made of, with one recipe for all of it"
        )
    recipe, kept = resolve_recipe(recipe), Checkpoint(checkpoint, "fxq_calibration")
    with (
        reporting(progress) as report,
        torch.inference_mode(False),  # tensors made here must count their versions
        torch.no_grad(),
        outside_autocast(),
    ):
        began = time.perf_counter()
        captured = capture(model, example_inputs, dynamic_shapes)
        if history is not None:
            seconds = time.perf_counter() - began
            history.append(stage("capture", seconds, captured.graph_module, None))
        if unsaved := not_in_files(captured.graph_module.graph):
            warnings.warn(
                f"this program cannot be saved: {unsaved} for a file to carry them",
                FxqWarning,
                stacklevel=2,
            )
        example = captured.inputs(example_inputs)
        float_results = seeded(captured.graph_module, example)  # before it is rewritten
        batches = None
        if data is not None:
            tensors = example[: len(captured.signature.tensors)]
            batches = CheckedBatches(captured, data, device_of(model), tensors)
        gm = recipe.apply(captured.graph_module, batches, report, kept, history)
        example = as_stored(gm, example)
        state = example[len(captured.signature.tensors) :]
        captured = replace(captured, state=dict(zip(captured.state, state, strict=True)))
        if strict and (skips := unintended_skips(gm)):
            listing = "\n  ".join(f"{name}: {why}" for name, why in skips.items())
            raise SkippedError(
                f"strict=True, and recipe {recipe.name!r} left in float\n  {listing}"
            )
        program = Program.from_captured(captured, gm, recipe=repr(recipe), model=model)
        results = (float_results, seeded(program.graph_module, example))
        program.sqnr_db, _ = outputs_sqnr_db(*map(captured.signature.results, results))
        report(f"outputs on the example: {program.sqnr_db:.1f} dB against float")
        changed = little_changed(program.graph_module, recipe.quantizes)
        for told in filter(None, (changed, weights_unseen(program.graph_module))):
            warnings.warn(f"recipe {recipe.name!r}: {told}", FxqWarning, stacklevel=2)
        call = split_inputs(example_inputs)
        if far := far_from_float(program.sqnr_db, program.graph_module, example, model, *call):
            warnings.warn(f"recipe {recipe.name!r}: {far}", FxqWarning, stacklevel=2)
        kept.remove()
        return program


def _modules(model: Any) -> Iterable[tuple[str, nn.Module]]:
    return model.named_modules() if isinstance(model, nn.Module) else ()
