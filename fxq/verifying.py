"""Verify: compare what is lowered with what was simulated, one kernel at a time, and what is
simulated with the model (`fxq.judging`).

Every kernel gets the simulated graph's own values as inputs, because a quantized network amplifies
rounding: a difference of one unit in the last place at one layer becomes a different code at the
next, so end to end only the distance to the float model can be compared. Node by node the promise
is exact: integer accumulators are bit-equal, outputs differ by float rounding. What exact means of
a kernel says the rule that put it there.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Node
from torch.utils._pytree import tree_leaves

from fxq.graph import owner_name, result_of, tensor_of
from fxq.judging import Judgement, Recorder, judge
from fxq.layer import LAYER, layer_of
from fxq.lowering.lower import lower
from fxq.lowering.rule import REPLACED, Replaced, is_code, steps_between
from fxq.numerics import sqnr_db
from fxq.program import Program, check_program
from fxq.seeding import seeded
from fxq.signature import Inputs, split_inputs


@dataclass(frozen=True)
class NodeCheck:
    """How one kernel compares with the nodes it replaces.

    Args:
        node: name of the replaced node in the program's graph.
        module: qualified name of the module it came from.
        kernel: what replaces it.
        accumulators_equal: the integer accumulators are bit-equal to exact integer arithmetic; true
            of a kernel that has none.
        sqnr_db: of the output, the first where there are several; infinite where bit-equal.
        ok: within the bounds.
        codes: how many elements the output has, where it is codes; else 0.
        neighbours: how many of these are not the simulated code but one next to it, or farther.
    """

    node: str
    module: str
    kernel: str
    accumulators_equal: bool
    sqnr_db: float
    ok: bool
    codes: int = 0
    neighbours: int = 0


@dataclass(frozen=True)
class Verification:
    """One check per kernel.

    Args:
        checks: of the kernels.
        against_model: outputs and layers against the float model's; None without one.
    """

    checks: tuple[NodeCheck, ...]
    against_model: Judgement | None = None

    @property
    def ok(self) -> bool:
        """Whether every kernel is within the bounds, and the program above the floors of
        `fxq.judging`."""
        judged = self.against_model is None or self.against_model.ok
        return judged and all(check.ok for check in self.checks)

    @property
    def worst(self) -> NodeCheck | None:
        """The kernel with the largest error, of those within the bounds one that gives values where
        there is one: in codes rounding is a whole step, or nothing. None where nothing was
        lowered."""

        def rank(check: NodeCheck) -> tuple[bool, bool, bool, float]:
            return check.ok, check.accumulators_equal, check.codes > 0, check.sqnr_db

        return min(self.checks, key=rank, default=None)

    def __str__(self) -> str:
        kernels = self._kernels()
        return kernels if self.against_model is None else f"{kernels}\n{self.against_model}"

    def _kernels(self) -> str:
        if self.worst is None:
            return "everything runs here as the simulated graph has it: there is nothing to compare"
        failed = [c for c in self.checks if not c.ok]
        lines = [
            f"{len(self.checks)} kernels compared with the simulated graph, {len(failed)} outside "
            "the bounds; "
            f"worst {self.worst.sqnr_db:.1f} dB at {self.worst.module}"
        ]
        if codes := sum(c.codes for c in self.checks):
            neighbours = sum(c.neighbours for c in self.checks)
            lines.append(
                f"of {codes:,} codes that they write {neighbours:,} are rounded to a neighbour of "
                "the simulated one"
            )
        lines += [
            f"  {c.module}: {c.kernel}, {c.sqnr_db:.1f} dB, accumulators "
            f"{'equal' if c.accumulators_equal else 'DIFFER'}"
            for c in failed
        ]
        return "\n".join(lines)


def verify(
    program: Program, inputs: Inputs, *, model: nn.Module | ExportedProgram | None = None
) -> Verification:
    """Run `program` simulated on `inputs`, and beside it every kernel that its device would run.

    All activations are held at once: give a small batch.

    Args:
        program: what `fxq.compress` returned, on the device to verify.
        inputs: as for `fxq.compress`.
        model: the float model, in eval mode and on the same device, to compare outputs and layers
            with; a wrong weight is only seen with it. It is left as it is.
    """
    check_program(program, "verify")
    args, kwargs = split_inputs(inputs)
    leaves = program.inputs(args, kwargs, "verify")
    sizes = program.signature.sizes_of(leaves)
    lowered, _ = lower(program.graph_module, program.device, sizes)
    with torch.no_grad():
        simulated = Recorder(program.graph_module)
        results = program.signature.results(seeded(simulated.run, leaves))
        layers = (node for node in program.graph_module.graph.nodes if LAYER in node.meta)
        names = {layer_of(node).origin: owner_name(node) for node in layers}
        replay = _Replay(lowered, simulated.values, names)
        checks = [replay.check(node) for node in lowered.graph.nodes if REPLACED in node.meta]
        if model is None:
            return Verification(tuple(checks))
        judgement = judge(program.graph_module, simulated.values, results, model, args, kwargs)
    return Verification(tuple(checks), judgement)


class _Replay:
    """Computes nodes of the lowered graph from the recorded values of the simulated one."""

    def __init__(
        self, lowered: GraphModule, recorded: Mapping[str, Any], names: Mapping[str, str]
    ) -> None:
        self.lowered, self.recorded, self.names = lowered, recorded, names
        self.nodes = {node.name: node for node in lowered.graph.nodes}

    def value(self, node: Node) -> Any:
        """Return a node's value; of what stands for a simulated node, that node's. So a kernel that
        reads another's result is given the simulated one: an input that differs in the last place
        would fall to the neighbouring code now and then."""
        made: Replaced | None = node.meta.get(REPLACED)
        name = node.name if made is None else made.node
        return self.recorded[name] if name in self.recorded else self._computed(node)

    def _computed(self, node: Node) -> Any:
        if node.op == "get_attr":
            return tensor_of(self.lowered, node)
        return result_of(node, self.value)

    def check(self, node: Node) -> NodeCheck:
        made: Replaced = node.meta[REPLACED]
        expected, found = self.recorded[made.node], self._computed(node)
        kernel = self.nodes[made.kernel]
        equal, ok = made.rule.check(expected, found, kernel, self.value)
        target = str(kernel.target).removesuffix(".default")
        name = self.names.get(layer_of(kernel).origin, owner_name(node))
        first, other = tree_leaves(expected)[0], tree_leaves(found)[0]
        codes = neighbours = 0
        if is_code(first):
            codes, neighbours = first.numel(), int((steps_between(first, other) > 0).sum())
        error = sqnr_db(first, other)
        return NodeCheck(made.node, name, target, equal, error, ok, codes, neighbours)
