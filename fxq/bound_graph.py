"""A graph of Dynamo's, bound to the weights it is called with.

Dynamo hands over a graph whose parameters are inputs. Those that belong to a module are bound as
constants here, because passes and kernels need the weights' values; each call checks that they are
still the same tensors with the same version, and binds again where they are not. So a weight that
changes in place is always seen. There may be several sets of weights, because Dynamo runs one graph
for all instances of a module class.
"""

import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._guards import TracingContext, tracing
from torch.fx import GraphModule, Node

from fxq.account import kind_of
from fxq.canonicalize import canonicalize
from fxq.dynamo import fake_mode_of, from_dynamo, lift_attributes, qualified_name
from fxq.errors import FxqWarning
from fxq.graph import RUNTIME_STATE, is_settled
from fxq.identity import version_of
from fxq.rewriting import with_constants
from fxq.writes import check_apart

Run = Callable[[Sequence[Any]], Any]


@dataclass(frozen=True)
class Build:
    """What was made for one set of weights, and their versions then.

    Args:
        versions: how often each weight had been written to.
        weights: as long as they live their ids are not given to others; with the first that dies
            the build goes.
        run: takes Dynamo's arguments.
    """

    versions: tuple[int, ...]
    weights: list[weakref.ref[Tensor]]
    run: Run


class BoundGraph(ABC):
    """A graph of Dynamo's; `make` says what runs for one set of weights.

    Attributes:
        graph_module: canonical, with parameters as inputs.
        written: indices of the inputs that are written to, whose new values are the last results.
        dynamo_graph: as Dynamo has it, with all tensors as inputs.
        attributes: the inputs of it that are not among Dynamo's arguments, the last ones.
        names: of all inputs.
        static: indices of those that are bound.
        live: of all others.
        is_program: whether there is nothing left to quantize.
    """

    def __init__(self, gm: GraphModule) -> None:
        gm, self.attributes = lift_attributes(gm)
        self.dynamo_graph = gm
        self.graph_module, self.written = from_dynamo(gm)
        placeholders = [node for node in gm.graph.nodes if node.op == "placeholder"]
        self.names = [qualified_name(node) for node in placeholders]
        self.static = [
            i for i, node in enumerate(placeholders) if _is_static(node) and i not in self.written
        ]
        self.live = [i for i in range(len(placeholders)) if i not in self.static]
        self.is_program = _is_all_settled(self.graph_module)
        self.builds: dict[tuple[int, ...], Build] = {}

    def __call__(self, *args: Any) -> Any:
        """Run on Dynamo's arguments, building first where these weights are new or have changed."""
        args = (*args, *self.attributes)
        if self.written:
            named = list(zip(self.names, args, strict=True))
            check_apart(named, self.written, "torch.compile")
        static = [args[i] for i in self.static]
        build = self.builds.get(tuple(map(id, static)))
        if build is None:
            build = self.build(args)
        elif build.versions != tuple(map(version_of, static)):
            warnings.warn(
                "weights have changed in place: compiling again", FxqWarning, stacklevel=2
            )
            build = self.build(args)
        return build.run(args)

    def build(self, args: Sequence[Any]) -> Build:
        """Make what runs with the weights among `args`."""
        nodes = [n for n in self.graph_module.graph.nodes if n.op == "placeholder"]
        inputs = [nodes[i].meta["val"] for i in self.live]
        with torch.inference_mode(False), torch.no_grad(), _tracing(inputs):
            for i in self.static:
                nodes[i].meta["source"] = self.name_of(i, args[i])
            bound = with_constants(
                self.graph_module, {nodes[i].name: args[i].detach() for i in self.static}
            )
            if not self.is_program:
                # Once more: a product with a weight is a linear only where the weight is constant.
                bound = canonicalize(bound)
            run = self.make(bound, inputs, args)
        bound_to, builds = [args[i] for i in self.static], self.builds
        key = tuple(map(id, bound_to))
        kept = [weakref.ref(weight, lambda _: builds.pop(key, None)) for weight in bound_to]
        builds[key] = Build(tuple(map(version_of, bound_to)), kept, run)
        return builds[key]

    def name_of(self, index: int, weight: Tensor) -> str:
        """Return the qualified name of a weight."""
        return self.names[index]

    def written_nodes(self, gm: GraphModule) -> list[Node]:
        """Return the placeholders of a graph made from this one that are written to."""
        nodes = [n for n in self.graph_module.graph.nodes if n.op == "placeholder"]
        written = {nodes[i].name for i in self.written}
        return [n for n in gm.graph.nodes if n.name in written]

    @abstractmethod
    def make(self, bound: GraphModule, inputs: Sequence[Any], args: Sequence[Any]) -> Run:
        """Return what runs.

        Args:
            bound: the graph with its weights, which `make` owns.
            inputs: fake values of the inputs that are live.
            args: Dynamo's arguments.
        """


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
    return tracing(TracingContext(fake_mode_of(inputs)))
