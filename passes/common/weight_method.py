"""Weight methods: passes that choose each weight by the second moments of what its layer is given.

    for each block in order
        moments   of the inputs of its layers, on what the treated blocks before it give
        treat     each weight, with the moments of all layers that have it
        run       the treated block, quantized where it is to be, for the next one's inputs

One block's moments are held at a time. A method answers one question, `treat`.
"""

from abc import abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq import numerics
from fxq.calibrate import NO_DATA, sweep
from fxq.graph import args_of, constant_of, owner_name, weight_of
from fxq.identity import TensorKey
from fxq.layer import layer_of, treat
from fxq.operators import operand, set_operand
from fxq.passes.common.convert import Convert
from fxq.passes.common.reconstruction.blocks import Block, cut
from fxq.passes.common.reconstruction.frontier import Chain, Frontier, Place
from fxq.passes.common.second_moments import gram
from fxq.passes.common.side_by_side import side_by_side
from fxq.passes.common.student import without_observers
from fxq.pipeline import Batches, DataPass
from fxq.progress import Reported, Reporter
from fxq.rewriting import add_buffer, copy_graph, erase_dead
from fxq.row_choice import counted_steps

Plan = TypeVar("Plan", bound=Hashable)  # what a method is to do to a layer


@dataclass(frozen=True, eq=False)
class Treated:
    """What a method came to.

    Args:
        did: for the layer's record.
        remark: for the report.
        weight: what takes the weight's place, in its shape; None where it stays.
        facts: fields of the record that are known now.
        shift: what is added to the bias `[N]`; None for nothing. A layer without a bias gets one.
    """

    did: str
    remark: str = ""
    weight: Tensor | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    shift: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Job(Generic[Plan]):
    """A weight that is to be treated.

    Args:
        name: of the first layer that has it.
        weight: `[N, K]`, fp32, finite.
        moments: of the inputs of all its layers, as the method's `moments` gives them, fp64.
        plan: what is to be done.
        mask: which weights an earlier pass has kept `[N, K]`, None for all.
    """

    name: str
    weight: Tensor
    moments: Tensor
    plan: Plan
    mask: Tensor | None


@dataclass(frozen=True, kw_only=True)
class WeightMethod(DataPass, Generic[Plan]):
    """A method that needs the second moments of each layer's input. Subclass as a frozen dataclass.

    Layers that share a weight are treated once, on the sum of their moments within the first block
    that has it.

    Args:
        blocks: qualified names of modules with shell wildcards; found from the graph unless given.
        place: where the values between blocks are kept: "device", "cpu" or "disk".
        sequential: within a block too, each layer on what the treated ones before it give, in
            float; otherwise on what those give as they were. One run of the block for each.
    """

    blocks: tuple[str, ...] = ()
    place: Place = "device"
    sequential: bool = False

    @property
    def compares(self) -> bool:
        """Whether `moments` is given a layer's input side by side with the one that the float model
        has there `[..., 2 K]`; False unless a subclass says so."""
        return False

    @abstractmethod
    def plans(self, gm: GraphModule) -> Mapping[Node, Plan]:
        """Return the linears to treat and what is to be done to each; say of others why not."""

    def moments(self, x: Tensor) -> Tensor:
        """Return what is summed over batches, of a layer's input `[..., K]`."""
        return gram(x)

    @abstractmethod
    def treat(self, weight: Tensor, moments: Tensor, plan: Plan, mask: Tensor | None) -> Treated:
        """Choose a weight; arguments as for `Job`. A `ValueError` is told with the layer's name."""

    def treat_block(self, jobs: Sequence[Job[Plan]]) -> list[Treated]:
        """Choose the weights of a block, unless a subclass knows better each by itself."""
        results = []
        for job in jobs:
            try:
                results.append(self.treat(job.weight, job.moments, job.plan, job.mask))
            except ValueError as error:
                raise ValueError(f"weight of {job.name}: {error}") from error
        return results

    def run(self, gm: GraphModule, data: Batches) -> PassResult:
        """Treat all weights. Under `torch.distributed` each process gives its own batches, and all
        end with the same weights."""
        plans = self.plans(gm)
        if plans:
            report = data.report if isinstance(data, Reported) else Reporter(None)
            results = _Walk(self, gm, data, plans).run(report)
            self.finish(gm, data, results)
            erase_dead(gm)
        return PassResult(gm, modified=bool(plans))

    def finish(self, gm: GraphModule, data: Batches, results: Sequence[Treated]) -> None:
        """Do what is left when all weights are treated; nothing unless a subclass says so."""


class _Walk(Generic[Plan]):
    """One run of a method over the blocks of a graph."""

    def __init__(
        self,
        method: WeightMethod[Plan],
        gm: GraphModule,
        data: Batches,
        plans: Mapping[Node, Plan],
    ) -> None:
        self.method, self.gm = method, gm
        blocks = cut(gm, method.blocks, plans)
        last = max(k for k, block in enumerate(blocks) if block.layers)
        self.blocks = blocks[: last + 1]
        with counted_steps(gm, data) as batches:
            self.frontier = Frontier(gm, batches, blocks, method.place)
        if not len(self.frontier):
            raise ValueError(NO_DATA)
        self.sharing = sharing(plans)
        owners = [(gm, {node.name for node in plans})]
        owners += [(block.graph_module, set(block.layers)) for block in self.blocks]
        self.copies = [
            (owner, {node.name: node for node in owner.graph.nodes if node.name in layers})
            for owner, layers in owners
        ]
        self.key_of = {node.name: key for key, nodes in self.sharing.items() for node in nodes}

    def run(self, report: Reporter) -> list[Treated]:
        """Treat block by block, and return what was done to each weight."""
        total, results = len(self.blocks), list[Treated]()
        with report.task(type(self.method).__name__, "blocks", total) as task:
            for k, block in enumerate(self.blocks):
                self.exact = without_observers(block.graph_module)
                if todo := [name for name in block.layers if self.key_of[name] in self.sharing]:
                    results += self._treat(block, todo)
                if k + 1 < total:
                    treated = Convert().run(copy_graph(block.graph_module)).graph_module
                    self.frontier.run("found", block, treated)
                    if self.method.compares:
                        self.frontier.run("exact", block, self.exact)
                    self.frontier.forget(k)
                task.advance()
        return results

    def _treat(self, block: Block, todo: Sequence[str]) -> list[Treated]:
        """Treat the weights that no block before has."""
        now = copy_graph(self.exact)
        stages = self._stages(now, todo) if self.method.sequential else [todo]
        return [result for stage in stages for result in self._treat_stage(block, now, stage)]

    def _stages(self, gm: GraphModule, todo: Sequence[str]) -> list[list[str]]:
        """Return layers by how many others come one after another before them; those that share a
        weight come with the first of them."""
        depth: dict[Node, int] = {}
        for node in gm.graph.nodes:
            before = (depth[n] + (n.name in todo) for n in node.all_input_nodes)
            depth[node] = max(before, default=0)
        levels: dict[tuple[TensorKey, Plan], int] = {}
        named = {node.name: level for node, level in depth.items()}
        for name in todo:
            key = self.key_of[name]
            levels[key] = min(named[name], levels.get(key, named[name]))
        found: dict[int, list[str]] = {}
        for name in todo:
            found.setdefault(levels[self.key_of[name]], []).append(name)
        return [found[level] for level in sorted(found)]

    def _sweep(self, block: Block, now: GraphModule, names: Sequence[str]) -> dict[str, Tensor]:
        """Return the moments of edges of a block, by name."""
        read, numbers = self.frontier.read, range(len(self.frontier))
        if self.method.compares:
            gm, edges = side_by_side(now, self.exact, names)
            chains: tuple[Chain, ...] = ("found", "exact")
        else:
            gm, nodes = now, {node.name: node for node in now.graph.nodes}
            edges, chains = [nodes[name] for name in names], ("found",)
        batches = ([v for chain in chains for v in read(chain, k, block.inputs)] for k in numbers)
        found = sweep(gm, batches, edges, self.method.moments, torch.add)
        return {name: found[edge] for name, edge in zip(names, edges, strict=True)}

    def _treat_stage(self, block: Block, now: GraphModule, stage: Sequence[str]) -> list[Treated]:
        """Treat layers on what a block gives them, and have its float function know of it."""
        inputs = {n.name: args_of(n)[0].name for n in now.graph.nodes if n.name in stage}
        found = self._sweep(block, now, [*dict.fromkeys(inputs[name] for name in stage)])
        sums: dict[tuple[TensorKey, Plan], Tensor] = {}
        for name in stage:
            key = self.key_of[name]
            sums[key] = sums[key] + found[inputs[name]] if key in sums else found[inputs[name]]
        layers = [self.sharing.pop(key) for key in sums]
        jobs = [self._job(*each) for each in zip(layers, sums, sums.values(), strict=True)]
        results = self.method.treat_block(jobs)
        for nodes, treated in zip(layers, results, strict=True):
            for owner, copies in self.copies:
                if mine := [copies[node.name] for node in nodes if node.name in copies]:
                    install(owner, type(self.method).__name__, mine, treated)
            names = {node.name for node in nodes}
            if mine := [node for node in now.graph.nodes if node.name in names]:
                install(now, type(self.method).__name__, mine, in_float(treated))
        return results

    def _job(
        self, nodes: Sequence[Node], key: tuple[TensorKey, Plan], moments: Tensor
    ) -> Job[Plan]:
        name = owner_name(nodes[0])
        if not bool(moments.isfinite().all()):
            raise ValueError(f"input of {name}: expected finite values, found NaN or Inf in data=")
        weight = weight_of(nodes[0]).detach().float()
        return Job(name, weight, moments, key[1], layer_of(nodes[0]).mask)


def sharing(plans: Mapping[Node, Plan]) -> dict[tuple[TensorKey, Plan], list[Node]]:
    """Return the layers that have the same weight and plan, by both."""
    found: dict[tuple[TensorKey, Plan], list[Node]] = {}
    for node, plan in plans.items():
        found.setdefault((TensorKey.of(weight_of(node)), plan), []).append(node)
    return found


def in_float(treated: Treated) -> Treated:
    """Return the same with a weight of what its codes stand for, where a method fixed these."""
    fixed = treated.facts.get("weight")
    if fixed is None:
        return treated
    value = numerics.dequantize(fixed.codes, fixed.scale, fixed.zero_point, torch.float32)
    return replace(treated, weight=value, facts={})


def install(gm: GraphModule, by: str, nodes: Sequence[Node], treated: Treated) -> None:
    """Give layers of a graph that share a weight what a method came to.

    Args:
        gm: their graph.
        by: the pass that did it.
        nodes: linears.
        treated: what it came to; the weight is cast to the layers' dtype.
    """
    if treated.weight is not None:
        before = weight_of(nodes[0])
        name = f"{owner_name(nodes[0])}.weight_treated"
        buffer = add_buffer(gm, name, treated.weight.to(before.dtype), like=nodes[0])
        for node in nodes:
            node.update_arg(1, buffer)
    for node in nodes:
        if treated.shift is not None:
            add_to_bias(gm, node, treated.shift)
        treat(node, by, treated.did, treated.remark, **treated.facts)


def add_to_bias(gm: GraphModule, node: Node, shift: Tensor) -> None:
    """Add to a linear's bias, or give it one.

    Args:
        gm: its graph.
        node: a linear whose bias is constant, or that has none.
        shift: `[N]`.
    """
    old = operand(node, "bias", None)
    before = torch.zeros_like(shift) if old is None else constant_of(old)
    value = (before.double() + shift).to(weight_of(node).dtype)
    set_operand(node, "bias", add_buffer(gm, f"{owner_name(node)}.bias_treated", value, like=node))
