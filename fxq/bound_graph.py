"""A graph of Dynamo's, bound to the weights it is called with.

Dynamo hands over a graph whose parameters are inputs. Those that belong to a module are bound as
constants here, because passes and kernels need the weights' values; each call checks that they are
still the same tensors with the same memory and version, and binds again where they are not. So a
weight that changes in place is seen, but for writes that PyTorch does not count: through `.data`,
and through numpy. There may be several sets of weights, because Dynamo runs one graph for all
instances of a module class.

A tensor in a plain attribute may be a weight, or what a model keeps from call to call, such as the
keys it has seen. It is bound like a weight until a call brings another one with the same weights;
from then on it is an input. One made in inference mode, whose writes PyTorch does not count, is an
input from the start; parameters and buffers made there must not be written to.
"""

import logging
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
from fxq.dynamo import (
    fake_mode_of,
    from_dynamo,
    is_registered,
    lift_attributes,
    qualified_name,
)
from fxq.errors import FxqWarning
from fxq.graph import RUNTIME_STATE, is_settled
from fxq.identity import state_of
from fxq.rewriting import with_constants
from fxq.writes import check_apart

Run = Callable[[Sequence[Any]], Any]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Build:
    """What was made for one set of weights, and their states then.

    Args:
        states: the memory of each weight, and how often it had been written to.
        memory: keeps it, so that its address is not given to other memory.
        weights: as long as they live their ids are not given to others; with the first that dies
            the build goes.
        run: takes Dynamo's arguments.
    """

    states: tuple[tuple[int, int], ...]
    memory: list[Tensor]
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
        assumed: of these, those in plain attributes.
        live: of all others.
        is_program: whether there is nothing left to quantize.
    """

    def __init__(self, gm: GraphModule) -> None:
        gm, self.attributes = lift_attributes(gm)
        self.dynamo_graph = gm
        self.graph_module, self.written = from_dynamo(gm)
        placeholders = gm.graph.find_nodes(op="placeholder")
        self.names = [qualified_name(node) for node in placeholders]
        self.static = [
            i for i, node in enumerate(placeholders) if _is_static(node) and i not in self.written
        ]
        first_lifted = len(placeholders) - len(self.attributes)  # of which Dynamo says no more
        plain = [i for i in range(first_lifted) if _is_plain(placeholders[i])]
        self.assumed = [i for i in self.static if i in plain]
        self.live = [i for i in range(len(placeholders)) if i not in self.static]
        self.bound_before: set[tuple[int, ...]] = set()  # `_weight_ids` of all calls
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
            if self._weight_ids(args) in self.bound_before:
                self._release()
            build = self.build(args)
        elif build.states != (found := tuple(map(state_of, static))):
            pairs = zip(self.static, build.states, found, strict=True)
            if all(i in self.assumed for i, before, now in pairs if before != now):
                self._release()
            else:
                warnings.warn(
                    "weights have changed in place: compiling again", FxqWarning, stacklevel=2
                )
            build = self.build(args)
        return build.run(args)

    def _weight_ids(self, args: Sequence[Any]) -> tuple[int, ...]:
        """Return what tells parameters and buffers from those of another module or another call."""
        return tuple(id(args[i]) for i in self.static if i not in self.assumed)

    def _release(self) -> None:
        """Make inputs of what is in plain attributes."""
        if not self.assumed:
            return
        logger.info("inputs from now on, as they change: %s", [self.names[i] for i in self.assumed])
        self.live = sorted([*self.live, *self.assumed])
        self.static = [i for i in self.static if i not in self.assumed]
        self.assumed = []
        self.builds.clear()

    def build(self, args: Sequence[Any]) -> Build:
        """Make what runs with the weights among `args`."""
        if any(args[i].is_inference() for i in self.assumed):
            self._release()
        with torch.inference_mode(False), torch.no_grad(), _tracing(self._live_values()):
            bound = self._bind(args)
            if self.fixes_sizes(bound, args):
                self.graph_module, self.written = from_dynamo(self.dynamo_graph)
                bound = self._bind(args)
            run = self.make(bound, self._live_values(), args)
        self.bound_before.add(self._weight_ids(args))
        bound_to, builds = [args[i] for i in self.static], self.builds
        key = tuple(map(id, bound_to))
        kept = [weakref.ref(weight, lambda _: builds.pop(key, None)) for weight in bound_to]
        memory = [weight.detach() for weight in bound_to]
        builds[key] = Build(tuple(map(state_of, bound_to)), memory, kept, run)
        return builds[key]

    def _inputs(self) -> list[Node]:
        return self.graph_module.graph.find_nodes(op="placeholder")

    def _live_values(self) -> list[Any]:
        """Return the fake values of the inputs that are live."""
        nodes = self._inputs()
        return [nodes[i].meta["val"] for i in self.live]

    def _bind(self, args: Sequence[Any]) -> GraphModule:
        """Return the graph with the weights among `args` as its constants."""
        nodes = self._inputs()
        for i in self.static:
            nodes[i].meta["source"] = self.name_of(i, args[i])
        weights = {nodes[i].name: args[i].detach() for i in self.static}
        bound = with_constants(self.graph_module, weights)
        # Once more: a product with a weight is a linear only where the weight is constant.
        return bound if self.is_program else canonicalize(bound)

    def fixes_sizes(self, bound: GraphModule, args: Sequence[Any]) -> bool:
        """Fix free sizes (`fxq.dynamo.fix_sizes`) that `make` needs as numbers, and tell whether
        there were any. `args` and `bound` as in `make`, of a graph that will be made anew."""
        return False

    def name_of(self, index: int, weight: Tensor) -> str:
        """Return the qualified name of a weight."""
        return self.names[index]

    def written_nodes(self, gm: GraphModule) -> list[Node]:
        """Return the placeholders of a graph made from this one that are written to."""
        nodes = self._inputs()
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
    """Tell whether a placeholder of a Dynamo graph is a tensor of a module whose value can be
    compiled in."""
    if RUNTIME_STATE in qualified_name(placeholder).split("."):
        return False
    value, about = placeholder.meta.get("example_value"), placeholder.meta.get("tensor_dict") or {}
    if isinstance(value, torch.nn.Parameter):
        return True
    if not isinstance(value, Tensor) or "_dynamo_static_input_type" not in about:
        return False
    # Of free size it is no constant: Dynamo has seen another one.
    fixed = all(isinstance(size, int) for size in value.shape)
    return fixed or not _is_plain(placeholder)


def _is_plain(placeholder: Node) -> bool:
    """Tell whether a placeholder of a Dynamo graph stands for a tensor in a plain attribute."""
    value = placeholder.meta.get("example_value")
    return not isinstance(value, torch.nn.Parameter) and not is_registered(placeholder)


def _tracing(inputs: Sequence[Any]) -> Any:
    """Make the fake mode of `inputs` current, so that sizes Dynamo left free stay free."""
    return tracing(TracingContext(fake_mode_of(inputs)))
