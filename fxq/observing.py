"""Observe: calibrate a model on whatever runs it, not only on what exports.

    with fxq.observe(model, recipe) as seen:
        model.generate(...)                     # or pipe(...), or an evaluation loop
    fast = torch.compile(model, backend="fxq", options={"recipe": seen.recipe})

Inside the block Dynamo compiles every call of the model to graphs that observe: prefill and decode,
every length, what is between graph breaks. Where a loop of its own calls parts of it, as generators
of images do, each part is compiled by itself. All graphs fill one state per layer, known by its
weight and its name. `seen.recipe` quantizes statically with these ranges, while compiling or
through `fxq.compress`, with the same numbers.
"""

import contextlib
import json
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import safetensors
import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node

from fxq.bound_graph import BoundGraph, Run
from fxq.calibrate import warn_of_missing_data
from fxq.dialect import OBSERVED
from fxq.dynamo import passing_graphs, readable
from fxq.errors import FxqWarning, MissingInputError, UnreadableGraphError, UnsupportedError
from fxq.files import write_tensors
from fxq.graph import is_constant, val_of
from fxq.layer_json import decode_value, encode_value
from fxq.observers import RangeObserver
from fxq.operators import LAYERS
from fxq.passes.common.calibrate import Calibrate
from fxq.passes.common.insert_observers import InsertObservers
from fxq.passes.common.layer_choice import is_of_graph
from fxq.passes.common.observed_ranges import (
    ObservedLayer,
    ObservedRanges,
    differ,
    give_observer,
    name_of,
    new_like,
    observed_layers,
)
from fxq.pipeline import DataPass, Pass, Recipe, resolve_recipe
from fxq.rewriting import erase_dead
from fxq.spec import block_of
from fxq.writes import write_back

MAX_GRAPHS = 64  # per function that Dynamo compiles: lengths, and instances of a module class
FILE = "fxq_observed"  # key of the metadata


@dataclass
class Observed:
    """What was seen.

    Attributes:
        calibrating: the recipe that was observed.
        layers: what was observed, in the order in which it was first met.
        reached: qualified names of all linears and convolutions that were in a graph.
        called: qualified names of the modules whose calls were observed, "" for the model: what to
            compile, since nothing calls them but Python.
        missed: qualified names of layers that were in no graph: not called, or by code that Dynamo
            leaves to Python.
        unread: why a graph was run as it is, and nothing in it observed.
    """

    calibrating: Recipe
    layers: dict[tuple[str, str, int], ObservedLayer] = field(default_factory=dict)
    reached: set[str] = field(default_factory=set, repr=False)
    called: tuple[str, ...] = ()
    missed: tuple[str, ...] = ()
    unread: list[str] = field(default_factory=list)

    @property
    def recipe(self) -> Recipe:
        """The same recipe, with the ranges that were seen in the place of calibration."""
        ranges = ObservedRanges(tuple(self.layers.values()))
        steps = [ranges if isinstance(p, Calibrate) else p for p in self.calibrating.passes]
        return Recipe(f"{self.calibrating.name} as observed", tuple(map(_in_parts, steps)))

    def __str__(self) -> str:
        lines = [f"{len(self.layers)} layers observed, {len(self.missed)} in no graph"]
        lines += [f"  in no graph: {name}" for name in self.missed]
        return "\n".join([*lines, *(f"  not read: {why}" for why in dict.fromkeys(self.unread))])

    def save(self, path: str | Path) -> None:
        """Write what was seen to a safetensors file."""
        observers = list(dict.fromkeys(layer.observer for layer in self.layers.values()))
        place = {observer: index for index, observer in enumerate(observers)}
        about = {
            "recipe": repr(self.calibrating),
            "observers": [[encode_value(o.spec), list(o.scale_shape), o.name] for o in observers],
            "layers": [
                [layer.name, layer.digest, layer.call, layer.place, place[layer.observer]]
                for layer in self.layers.values()
            ],
            "called": list(self.called),
            "missed": list(self.missed),
            "reached": sorted(self.reached),
            "unread": self.unread,
        }
        tensors = {
            f"{index}.{name}": buffer.cpu().contiguous()
            for index, observer in enumerate(observers)
            for name, buffer in observer.named_buffers()
        }
        write_tensors(Path(path), tensors, {FILE: json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, recipe: Recipe | str) -> "Observed":
        """Return what `save` wrote.

        Args:
            path: the file.
            recipe: the one that was observed.
        Raises:
            ValueError: no such file of fxq, or of another recipe.
        """
        recipe = resolve_recipe(recipe)
        try:
            opened = safetensors.safe_open(path, "pt")
        except safetensors.SafetensorError as error:
            raise ValueError(
                f"{path}: expected a file that Observed.save wrote, found another: {error}"
            ) from error
        with opened as file:
            text = (file.metadata() or {}).get(FILE)
            if text is None:
                raise ValueError(f"{path}: expected a file that Observed.save wrote, found another")
            about = json.loads(text)
            if about["recipe"] != repr(recipe):
                raise ValueError(
                    f"{path}: expected what was seen with {recipe!r}, found {about['recipe']}; "
                    "give the recipe that was observed"
                )
            observers = [_observer(file, i, *entry) for i, entry in enumerate(about["observers"])]
        layers = [
            ObservedLayer(name, digest, call, place, observers[index])
            for name, digest, call, place, index in about["layers"]
        ]
        return cls(
            recipe,
            {layer.key: layer for layer in layers},
            set(about["reached"]),
            tuple(about.get("called", ())),
            tuple(about["missed"]),
            about["unread"],
        )


def _observer(
    file: Any, index: int, spec: Any, scale_shape: Sequence[int], name: str
) -> RangeObserver:
    spec = decode_value(spec)
    # Of the observed tensor's shape only the dimensions along which the scale varies matter.
    block = block_of(spec.granularity, len(scale_shape))
    shape = [max(size * width, 1) for size, width in zip(scale_shape, block, strict=True)]
    observer = RangeObserver(spec, shape, name)
    for key, buffer in observer.named_buffers():
        buffer.copy_(file.get_tensor(f"{index}.{key}"))
    return observer


@contextlib.contextmanager
def observe(model: nn.Module, recipe: Recipe | str) -> Iterator[Observed]:
    """Have every call of `model` inside the block fill the observers of `recipe`, and every call of
    a part of it by code that is no call of `model`, such as a method with a loop.

    The model computes what it always does, slower, and is left as it was.

    Args:
        model: in eval mode; what holds all layers, such as `pipe.transformer`.
        recipe: static, and calibrating by `Calibrate` alone.
    Raises:
        TypeError: not a module.
        ValueError: a recipe without calibration, or nothing was observed.
        UnsupportedError: a recipe with a pass that would do something else in every graph.
    """
    if not isinstance(model, nn.Module) or hasattr(model, "_orig_mod"):
        raise TypeError(
            f"model: expected a torch.nn.Module, before torch.compile, found {type(model).__name__}"
        )
    recipe = resolve_recipe(recipe)
    seen, prepare = Observed(recipe), _preparing(recipe)
    names: dict[int, str] = {}  # of a tensor with several, the first
    for name, value in (*model.named_parameters(), *model.named_buffers()):
        names.setdefault(id(value), name)

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        try:
            with readable():
                return Observing(gm, inputs, prepare, seen, names)
        except (UnreadableGraphError, MissingInputError) as why:
            seen.unread.append(str(why))
            return gm.forward

    called: dict[str, None] = {}
    with passing_graphs(MAX_GRAPHS), _compiling_calls(model, backend, called):
        yield seen
    seen.called = tuple(called)
    if not seen.layers:
        raise ValueError(
            "observe: expected calls of the model or of its parts inside the block, as model(...) "
            "and neither as model.forward(...) nor of what torch.compile made of it, found none "
            "that reached a "
            f"layer which {recipe.name!r} quantizes{''.join(f'; {why}' for why in seen.unread)}"
        )
    seen.missed = tuple(_missed(model, seen))
    observers = dict.fromkeys(layer.observer for layer in seen.layers.values())
    warn_of_missing_data([observer for observer in observers if observer.count])


@contextlib.contextmanager
def _compiling_calls(
    model: nn.Module, backend: Callable[..., Any], called: dict[str, None]
) -> Iterator[None]:
    """Have Dynamo compile what Python calls of a model: the model, or the outermost of its parts.

    Args:
        model: whose parts with weights are made to.
        backend: gets the graphs.
        called: gets the names of what was called.
    """
    parts = {
        name: module
        for name, module in model.named_modules()
        if not isinstance(module, torch.jit.ScriptModule) and (not name or _may_multiply(module))
    }
    before = {name: module._compiled_call_impl for name, module in parts.items()}
    running = threading.local()

    def call_of(name: str, module: nn.Module) -> Callable[..., Any]:
        compiled = torch.compile(_calling(module), backend=backend)

        def call(*args: Any, **kwargs: Any) -> Any:
            if getattr(running, "here", False):  # between graph breaks of the one around it
                return compiled(*args, **kwargs)
            called[name], running.here = None, True
            try:
                return compiled(*args, **kwargs)
            finally:
                running.here = False

        return call

    calls = {name: call_of(name, module) for name, module in parts.items()}
    others = []
    try:
        for name, module in parts.items():
            module._compiled_call_impl = calls[name]
        yield
    finally:
        for name, module in parts.items():
            if module._compiled_call_impl is not calls[name]:
                others.append(name)  # the user's own, which stays
                continue
            vars(module).pop("_compiled_call_impl", None)  # so that the class's None holds again
            if before[name] is not None:
                module._compiled_call_impl = before[name]
    if others:
        listing = ", ".join(f"{name}.compile()" if name else "compile() of it" for name in others)
        warnings.warn(
            f"observe: the model was compiled inside the block ({listing}), and calls after that "
            "were not observed; compile after the block",
            FxqWarning,
            stacklevel=5,
        )


def _may_multiply(part: nn.Module) -> bool:
    """Tell whether layers may be in a part: it has a matrix, wherever it keeps it, and is no table
    of embeddings alone."""
    if isinstance(part, nn.Embedding | nn.EmbeddingBag):
        return False
    kept = (
        value
        for module in part.modules()
        for store in (module._parameters, module._buffers, vars(module))
        for value in store.values()
    )
    return any(isinstance(value, Tensor) and value.ndim > 1 for value in kept)


def _calling(module: nn.Module) -> Callable[..., Any]:
    """Return a function that calls a module, with a code object of its own, by which Dynamo counts
    graphs. (By way of a function: Dynamo of torch 2.11 leaves torch's own modules to Python.)"""
    call = module._call_impl

    def function(*args: Any, **kwargs: Any) -> Any:
        return call(*args, **kwargs)

    function.__code__ = function.__code__.replace()
    return function


def _preparing(recipe: Recipe) -> Recipe:
    """Return the passes in front of calibration."""
    kinds = [type(step) for step in recipe.passes]
    if Calibrate not in kinds:
        raise ValueError(
            f"recipe {recipe.name!r}: expected one that calibrates, found none to observe for; "
            "compile with it as it is"
        )
    if recipe.needs_program:
        raise UnsupportedError(
            f"recipe {recipe.name!r}: it goes by a step that is set on a program, and there is "
            "none yet; use ByTimestep, or fxq.compress"
        )
    prepare = recipe.passes[: kinds.index(Calibrate)]
    for step in recipe.passes:
        if isinstance(step, DataPass) and not isinstance(step, Calibrate):
            raise UnsupportedError(
                f"recipe {recipe.name!r}: {type(step).__name__} changes a graph by what flows "
                "through it, and there are several here, with caches between them that would be "
                "scaled in one and not in the other; use fxq.compress, or a recipe without it"
            )
        if step in prepare and step.reads is OBSERVED:
            raise UnsupportedError(
                f"recipe {recipe.name!r}: {type(step).__name__} observes more than inputs of "
                "layers, and what is between them has no name that several graphs share; use "
                "fxq.compress"
            )
        if isinstance(step, InsertObservers):
            for pattern, _ in step.overrides:
                if is_of_graph(pattern):
                    raise UnsupportedError(
                        f"recipe {recipe.name!r}: override {pattern!r} is of a whole graph, and a "
                        "model may run as several; name the layer"
                    )
    return Recipe(recipe.name, tuple(map(_in_parts, prepare)))


def _in_parts(step: Pass | DataPass) -> Pass | DataPass:
    """Return a pass as it is for graphs that may be parts of a model."""
    return replace(step, partial=True) if isinstance(step, InsertObservers) else step


def _missed(model: nn.Module, seen: Observed) -> Iterator[str]:
    """Yield the names of linears and convolutions that were in no graph, under whatever name."""
    kinds = nn.Linear | nn.modules.conv._ConvNd
    every = [
        *model.named_parameters(remove_duplicate=False),
        *model.named_buffers(remove_duplicate=False),
    ]
    reached = {id(value) for name, value in every if name.removesuffix(".weight") in seen.reached}
    for name, module in model.named_modules():
        if not isinstance(module, kinds) or id(module.weight) in reached:
            continue
        # The weight of a parametrized layer is made anew from tensors under its name.
        if not any(weight.startswith(f"{name}.") for weight in seen.reached):
            yield name


class Observing(BoundGraph):
    """A graph of Dynamo's that runs as it is and observes."""

    def __init__(
        self,
        gm: GraphModule,
        inputs: Sequence[Any],
        prepare: Recipe,
        seen: Observed,
        names: Mapping[int, str],
    ) -> None:
        super().__init__(gm)
        self.prepare, self.seen, self.of_model = prepare, seen, names
        self.build([*inputs, *self.attributes])

    def name_of(self, index: int, weight: Tensor) -> str:
        """Return the name that the whole model has for a weight."""
        return self.of_model.get(id(weight), self.names[index])

    def make(self, bound: GraphModule, inputs: Sequence[Any], args: Sequence[Any]) -> Run:
        """Insert the observers that earlier graphs have filled."""
        constant = [n for n in bound.graph.nodes if n.target in LAYERS and is_constant(n.args[1])]
        reached = {name_of(node) for node in constant}
        observed = self.prepare.apply(bound)
        self.seen.reached |= reached
        # Layers that read the same here may read different things in another graph.
        for node, layer in list(observed_layers(observed)):
            give_observer(observed, node, self._state_of(layer, node.all_input_nodes[0]))
        erase_dead(observed)
        write_back(observed, self.written_nodes(observed))
        live = self.live
        return lambda args: observed(*(args[i] for i in live))

    def _state_of(self, layer: ObservedLayer, edge: Node) -> RangeObserver:
        """Return the observer that a layer has in all graphs."""
        known = self.seen.layers.get(layer.key)
        if known is None:
            known = replace(layer, observer=new_like(layer.observer))
            known.observer.to(val_of(edge).device)  # now: a call may be in inference mode
            self.seen.layers[layer.key] = known
        if why := differ(layer.observer, known.observer):
            raise ValueError(f"observe: {layer.name}: {why}")
        return known.observer
