"""The `torch.compile` backend: bind the constants, quantize where asked, lower, and leave the rest
to Inductor.

This module is an entry point (`torch_dynamo_backends`): `torch.compile(model, backend="fxq")` finds
it without `import fxq`.
"""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch.fx import GraphModule

from fxq import numerics, ops, writes
from fxq.bound_graph import BoundGraph, Run
from fxq.dynamo import fix_sizes, graphs_left, readable
from fxq.errors import (
    FxqWarning,
    MissingInputError,
    UnreadableGraphError,
    UnsupportedError,
    did_you_mean,
)
from fxq.first_call import FirstCall
from fxq.graph import hint
from fxq.lowering.apply_where_it_pays import apply_where_it_pays
from fxq.ops import decompositions
from fxq.outcome import Outcome
from fxq.pipeline import Recipe, resolve_recipe
from fxq.rewriting import copy_graph
from fxq.timesteps_seen import timesteps_to_see
from fxq.writes import read_before_writing, write_back

DEFAULT_RECIPE = "w8a8_dynamic"
FULL = (
    "recipe {!r} needs sizes that change from call to call as numbers, with a graph for each, and "
    "this is the last graph that Dynamo makes of this function: sizes stay free in it. Raise "
    "torch._dynamo.config.recompile_limit, or call torch.compiler.reset() where old sizes are done "
    "with"
)
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """What `torch.compile(..., backend="fxq", options={...})` accepts.

    Args:
        recipe: what to do to a float model: a `Recipe` without calibration, or the name of one.
            A program stays as it is, alone and as part of a model.
        check: compare the first call of every graph with eager code, what it writes included, and
            raise where they part. Costs three more runs and the memory of two more graphs.
        strict: raise where a quantized layer has no kernel on this device, or where the
            recipe could not do to an operator what it is for, which otherwise is a warning.
        inductor: options handed to Inductor, as `torch.compile(..., options=)` would take them.
    """

    recipe: Recipe | str = DEFAULT_RECIPE
    check: bool = False
    strict: bool = False
    inductor: Mapping[str, Any] | None = None

    @classmethod
    def parse(cls, options: Mapping[str, Any] | None) -> "Options":
        """Return validated options."""
        known = {f.name for f in fields(cls)}
        for name in options or {}:
            if name not in known:
                raise ValueError(
                    f"backend 'fxq' has no option {name!r}; {did_you_mean(name, known)}"
                )
        for name in ("check", "strict"):
            if not isinstance(value := (options or {}).get(name, False), bool):
                raise TypeError(f"option {name!r}: expected True or False, found {value!r}")
        inductor = (options or {}).get("inductor")
        if inductor is not None and not isinstance(inductor, Mapping):
            raise TypeError(f"option 'inductor': expected a mapping, found {inductor!r}")
        return cls(**(options or {}))


def fxq(
    gm: GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph. `torch.compile(model, backend="fxq")` calls this.

    Args:
        gm: Dynamo's graph.
        example_inputs: its inputs; parameters are real tensors, sizes may be symbolic.
        mode: one of Inductor's modes.
        options: see `Options`.
    Raises:
        ValueError: an unknown option, a recipe that needs data or has state to be set, a model in
            train mode, an input that requires grad.
        SkippedError: `strict` and a quantized layer has no kernel here, or the recipe could not do
            to an operator what it is for.
        UnsupportedError: `strict`, and the graph is one that fxq cannot read; otherwise Inductor
            compiles it as it is, with a warning.
        PassError: `check`, at the first call, and the result is not that of eager code.
    """
    settings = Options.parse(options)
    recipe = resolve_recipe(settings.recipe)
    if recipe.needs_data:
        raise ValueError(
            f"recipe {recipe.name!r} needs calibration data, which torch.compile cannot give; call "
            "fxq.compress(model, example_inputs, recipe, data) first and compile the program it "
            "returns"
        )
    config = dict(settings.inductor or {})
    if mode is not None:
        config |= torch._inductor.list_mode_options(mode)
    try:
        with readable():
            return Compiled(gm, example_inputs, recipe, settings.strict, config, settings.check)
    except (UnreadableGraphError, MissingInputError) as why:
        if settings.strict:
            raise UnsupportedError(f"strict=True, and a graph stays as it is: {why}") from why
        warnings.warn(f"Inductor compiles a graph as it is: {why}", FxqWarning, stacklevel=2)
        return _inductor(gm, example_inputs, config)


class Compiled(BoundGraph):
    """A Dynamo graph, compiled once for every set of weights it meets."""

    def __init__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        recipe: Recipe,
        strict: bool,
        config: dict[str, Any],
        check: bool,
    ) -> None:
        super().__init__(gm)
        example_inputs = [*example_inputs, *self.attributes]
        self.eager = self.dynamo_graph if check else None
        self.recipe, self.strict, self.config = recipe, strict, config
        _refuse_gradients([example_inputs[i] for i in self.live])
        if torch.is_grad_enabled() and any(example_inputs[i].requires_grad for i in self.static):
            warnings.warn(
                "backend 'fxq' compiles for inference: outputs carry no gradient. Call the model "
                "under torch.no_grad() to say that this is meant.",
                FxqWarning,
                stacklevel=2,
            )
        if recipe.needs_program and not self.is_program:
            raise ValueError(
                f"recipe {recipe.name!r} has state to be set between calls, and nothing here to "
                "set it on; call fxq.compress(model, example_inputs, recipe) and compile the "
                "program it returns"
            )
        self.build(example_inputs)

    def fixes_sizes(self, bound: GraphModule, args: Sequence[Any]) -> bool:
        """Fix the sizes that the recipe needs as numbers, while Dynamo still makes graphs."""
        wanted = [] if self.is_program else self.recipe.sizes_to_fix(bound)
        large = [s for s in wanted if hint(s.size) >= s.floor]
        if not wanted or not graphs_left():
            if large:
                warnings.warn(FULL.format(self.recipe.name), FxqWarning, stacklevel=2)
            return False
        for size, floor in wanted:
            if hint(size) < floor:
                bool(size < floor)  # so that Dynamo guards on it: beyond there is another graph
        fixed = fix_sizes(self.dynamo_graph, [s.size for s in large], args)
        if fixed:
            numbers = sorted({hint(s.size) for s in large})
            logger.info("recipe %r: a graph for %s tokens alone", self.recipe.name, numbers)
        return fixed

    def make(self, bound: GraphModule, inputs: Sequence[Any], args: Sequence[Any]) -> Run:
        """Quantize, lower, and leave the rest to Inductor."""
        float_graph = copy_graph(bound)
        recipe = None if self.is_program else self.recipe
        applied = apply_where_it_pays(bound, recipe, _device_of([args[i] for i in self.static]))
        outcome = Outcome(self.recipe, applied, self.is_program)
        outcome.tell_missing_kernels(self.strict, warn=not self.builds)
        outcome.tell_changes()
        outcome.tell_skips(self.strict)
        lowered, live = applied.lowered, self.live
        write_back(lowered, self.written_nodes(lowered))
        table = select_decomp_table() | decompositions()
        # The weights are constants here already, which is what freezing is for.
        config = {**self.config, "freezing": False}
        compiled = _inductor(lowered, inputs, config, decompositions=table)
        all_seen = timesteps_to_see(applied.quantized)
        judge = None
        if self.eager is not None:
            graphs = (self.eager, float_graph, applied.quantized)
            judge = FirstCall(*graphs, live, self.written, self.names)

        def run(args: Sequence[Any]) -> Any:
            given = [args[i] for i in live]
            for seen in all_seen:
                seen(given)
            call = partial(compiled, *given)
            return call() if judge is None or judge.done else judge(args, call)

        return run


def _inductor(gm: GraphModule, inputs: Sequence[Any], config: dict[str, Any], **kwargs: Any) -> Any:
    """Compile a graph with Inductor, whose last step gets it with every read before the writes.

    torch's caches on disk know a graph as it was before that step and before operators of fxq were
    decomposed. The tag makes them forget what other definitions of these gave.
    """

    def inner_compile(gm: GraphModule, inputs: Sequence[Any], **settings: Any) -> Any:
        read_before_writing(gm)
        return compile_fx_inner(gm, inputs, **settings)

    definitions = get_hash_for_files((numerics.__file__, ops.__file__, writes.__file__)).hex()
    tag = f"{torch.compiler.config.cache_key_tag} fxq {definitions}"
    with torch.compiler.config.patch(cache_key_tag=tag):  # type: ignore[attr-defined]
        return compile_fx(gm, inputs, inner_compile=inner_compile, config_patches=config, **kwargs)


def _device_of(tensors: Sequence[Any]) -> torch.device:
    return next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))


def _refuse_gradients(inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        raise ValueError(
            "backend 'fxq' compiles for inference, found an input that requires grad; detach it or "
            "compile with another backend"
        )
