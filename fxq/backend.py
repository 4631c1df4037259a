"""The `torch.compile` backend: bind the constants, quantize where asked, lower, and leave the rest
to Inductor.

Dynamo hands over a graph whose parameters are inputs. Those that belong to a module are bound as
constants here, because integer kernels need the weights' values; each call checks that they are
still the same tensors with the same version, and compiles again where they are not. So a weight
that changes in place is always seen.

This module is an entry point (`torch_dynamo_backends`): `torch.compile(model, backend="fxq")` finds
it without `import fxq`.
"""

import logging
import warnings
import weakref
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.custom_graph_pass import get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses import FakeTensor
from torch.fx import GraphModule, Node

from fxq import numerics, ops, writes
from fxq.account import account, flops_of, kind_of
from fxq.canonicalize import canonicalize
from fxq.dynamo import from_dynamo, qualified_name
from fxq.errors import FxqWarning, SkippedError, UnsupportedError, did_you_mean
from fxq.first_call import FirstCall
from fxq.graph import RUNTIME_STATE, bind, copy_graph, is_settled, why_unreadable
from fxq.lowering.apply_where_it_pays import Applied, apply_where_it_pays, summary
from fxq.lowering.derived import version_of
from fxq.ops import decompositions
from fxq.pipeline import Recipe, resolve_recipe
from fxq.writes import check_apart, read_before_writing, write_back

DEFAULT_RECIPE = "w8a8_dynamic"
MAX_SLOW_SHARE = 0.02  # of a program's operations, in layers without a kernel: a classifier's head
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
    if why := why_unreadable(gm.graph):
        if settings.strict:
            raise UnsupportedError(f"strict=True, and a graph stays as it is: {why}")
        warnings.warn(f"Inductor compiles a graph as it is: {why}", FxqWarning, stacklevel=2)
        return _inductor(gm, example_inputs, config)
    return Compiled(gm, example_inputs, recipe, settings.strict, config, settings.check)


@dataclass(frozen=True)
class Build:
    """What was compiled for one set of weights, and their versions then.

    Args:
        versions: how often each weight had been written to.
        weights: as long as they live their ids are not given to others; with the first that dies
            the build goes.
        run: what was compiled.
        judge: what to compare its first call with, where that is asked for.
    """

    versions: tuple[int, ...]
    weights: list[weakref.ref[Tensor]]
    run: Callable[..., Any]
    judge: FirstCall | None = None


class Compiled:
    """A Dynamo graph, compiled once for every set of weights it meets.

    More than one set, because Dynamo runs one graph for all instances of a module class.
    """

    def __init__(
        self,
        gm: GraphModule,
        example_inputs: Sequence[Any],
        recipe: Recipe,
        strict: bool,
        config: dict[str, Any],
        check: bool = False,
    ) -> None:
        self.eager = gm if check else None
        self.recipe, self.strict, self.config = recipe, strict, config
        self.graph_module, self.written = from_dynamo(gm)
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self.names = [qualified_name(node) for node in placeholders]
        self.static = [
            i for i, node in enumerate(placeholders) if _is_static(node) and i not in self.written
        ]
        self.live = [i for i in range(len(placeholders)) if i not in self.static]
        _refuse_gradients([example_inputs[i] for i in self.live])
        if torch.is_grad_enabled() and any(example_inputs[i].requires_grad for i in self.static):
            warnings.warn(
                "backend 'fxq' compiles for inference: outputs carry no gradient. Call the model "
                "under torch.no_grad() to say that this is meant.",
                FxqWarning,
                stacklevel=2,
            )
        self.is_program = _is_all_settled(self.graph_module)
        if recipe.needs_program and not self.is_program:
            raise ValueError(
                f"recipe {recipe.name!r} has state to be set between calls, and nothing here to "
                "set it on; call fxq.compress(model, example_inputs, recipe) and compile the "
                "program it returns"
            )
        self.builds: dict[tuple[int, ...], Build] = {}
        self._build(example_inputs)

    def __call__(self, *args: Any) -> Any:
        """Run on Dynamo's arguments, building first where these weights are new or have changed."""
        if self.written:
            named = list(zip(self.names, args, strict=True))
            check_apart(named, self.written, "torch.compile")
        static = [args[i] for i in self.static]
        build = self.builds.get(tuple(map(id, static)))
        if build is None:
            build = self._build(args)
        elif build.versions != tuple(map(version_of, static)):
            warnings.warn(
                "weights have changed in place: compiling again", FxqWarning, stacklevel=2
            )
            build = self._build(args)
        live = [args[i] for i in self.live]
        if build.judge is None or build.judge.done:
            return build.run(*live)
        return build.judge(args, lambda: build.run(*live))

    def _build(self, args: Sequence[Any]) -> Build:
        weights = [args[i] for i in self.static]
        nodes = [n for n in self.graph_module.graph.nodes if n.op == "placeholder"]
        inputs = [nodes[i].meta["val"] for i in self.live]
        with torch.inference_mode(False), torch.no_grad(), _tracing(inputs):
            bound = bind(self.graph_module, {nodes[i].name: args[i].detach() for i in self.static})
            if not self.is_program:
                # Once more: a product with a weight is a linear only where the weight is constant.
                bound = canonicalize(bound)
            float_graph = copy_graph(bound)
            recipe = None if self.is_program else self.recipe
            applied = apply_where_it_pays(bound, recipe, _device_of(weights))
            self._tell_of_missing_kernels(applied)
            self._tell_of_skips(applied)
            simulated, lowered = applied.quantized, applied.lowered
            written = {nodes[i].name for i in self.written}
            write_back(lowered, [n for n in lowered.graph.nodes if n.name in written])
            table = select_decomp_table() | decompositions()
            run = _inductor(lowered, inputs, self.config, decompositions=table)
        versions = tuple(map(version_of, weights))
        judge = None
        if self.eager is not None:
            graphs = (self.eager, float_graph, simulated)
            judge = FirstCall(*graphs, self.live, self.written, self.names)
        key, builds = tuple(map(id, weights)), self.builds
        kept = [weakref.ref(weight, lambda _: builds.pop(key, None)) for weight in weights]
        builds[key] = Build(versions, kept, run, judge)
        return builds[key]

    def _tell_of_skips(self, applied: Applied) -> None:
        """Log what the recipe left as it was; raise, or warn, where it could not do what it is for,
        where no kernel would gain by it, or where it found nothing to do."""
        gm, declined = applied.quantized, applied.left
        settled = {n.name for n in gm.graph.nodes if is_settled(n)} - set(declined)
        rows = [row for row in account(gm) if row.node not in settled]
        left = {row.node: f"{row.module}: {row.skip.reason}" for row in rows if row.skip}
        for line in left.values():
            logger.info("recipe %r left as it was %s", self.recipe.name, line)
        meant = [left[row.node] for row in rows if row.skip and not row.skip.intended]
        if not self.recipe.passes:
            return
        others = [line for name, line in left.items() if name not in declined]
        n_changed = len(rows) - len(left)
        told = []
        if declined:
            nothing = "" if n_changed else "changed nothing and "
            share = f"{len(declined)} of {len(declined) + n_changed}"
            told.append(
                f"{nothing}left {share} layers as they were, because no kernel would gain by it "
                f"here: {summary(declined.values())}"
            )
        listing = "".join(f"\n  {line}" for line in dict.fromkeys(meant or others))
        if meant and self.strict:
            raise SkippedError(f"strict=True, and {self.recipe.name!r} left as it was{listing}")
        if meant:
            told.append(f"left as it was{listing}")
        elif listing and not n_changed and not declined:
            told.append(f"changed nothing, and left as it was{listing}")
        if told:
            text = f"recipe {self.recipe.name!r} " + "; ".join(told)
            warnings.warn(text, FxqWarning, stacklevel=2)

    def _tell_of_missing_kernels(self, applied: Applied) -> None:
        """Raise where `strict` and a layer has no kernel; warn, once, where one that has none, of a
        program, computes what was simulated all the same."""
        declined = applied.declined
        for name, why in declined.items():
            logger.info("no kernel here for %s: %s", name, why)
        if self.strict and (missing := {**applied.left, **declined}):
            listing = "\n  ".join(f"{name}: {why}" for name, why in missing.items())
            raise SkippedError(f"strict=True, and no kernel here for\n  {listing}")
        share = _share_of(applied.quantized, declined)
        if share > MAX_SLOW_SHARE and not self.builds:
            warnings.warn(
                f"no kernel here for {len(declined)} of {len(applied.decisions)} layers, "
                f"{share:.0%} of the operations, which compute what was simulated all the same: "
                "slower than in float, or no faster where weights alone are quantized: "
                f"{summary(declined.values())}",
                FxqWarning,
                stacklevel=2,
            )


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


def _share_of(gm: GraphModule, names: Container[str]) -> float:
    """Return which share of the operations of `gm` the named nodes have, 0 to 1."""
    flops = {node.name: flops_of(node) for node in gm.graph.nodes}
    part = sum(count for name, count in flops.items() if name in names)
    return part / max(sum(flops.values()), 1)


def _is_all_settled(gm: GraphModule) -> bool:
    """Tell whether a graph came from a `Program`, or from a model in which nothing else multiplies:
    then there is nothing left to quantize."""
    open_nodes = (n for n in gm.graph.nodes if kind_of(n) is not None and not is_settled(n))
    return any(map(is_settled, gm.graph.nodes)) and next(open_nodes, None) is None


def _is_static(placeholder: Node) -> bool:
    """Tell whether a placeholder of a Dynamo graph is a parameter or buffer of a module whose value
    can be compiled in."""
    if RUNTIME_STATE in qualified_name(placeholder).split("."):
        return False
    tensor_dict = placeholder.meta.get("tensor_dict") or {}
    value = placeholder.meta.get("example_value")
    return isinstance(value, Tensor) and (
        "_dynamo_static_input_type" in tensor_dict or isinstance(value, torch.nn.Parameter)
    )


def _tracing(inputs: Sequence[Any]) -> Any:
    """Make the fake mode of `inputs` current, so that sizes Dynamo left free stay free."""
    modes = [v.fake_mode for v in inputs if isinstance(v, FakeTensor)]
    return tracing(TracingContext(modes[0]) if modes else None)


def _device_of(tensors: Sequence[Any]) -> torch.device:
    return next((t.device for t in tensors if isinstance(t, Tensor)), torch.device("cpu"))


def _refuse_gradients(inputs: Sequence[Any]) -> None:
    if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
        raise ValueError(
            "backend 'fxq' compiles for inference, found an input that requires grad; detach it or "
            "compile with another backend"
        )
