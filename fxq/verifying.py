"""Verify: compare what is lowered with what was simulated, one kernel at a time, and what is
simulated with the model (`fxq.judging`).

Every kernel gets the simulated graph's own values as inputs, because a quantized network amplifies
rounding: a difference of one unit in the last place at one layer becomes a different code at the
next, so end to end only the distance to the float model can be compared. Node by node the promise
is exact: integer accumulators are bit-equal, outputs differ by float rounding. Attention has no
integers: its kernels round the weights and the output to the model's dtype, once each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.fx.node import map_arg

from fxq.graph import args_of, is_op, owner_name, tensor_of
from fxq.judging import Judgement, judge
from fxq.lowering.int8_linear import accumulate
from fxq.lowering.lower import lower
from fxq.numerics import sqnr_db
from fxq.program import Program
from fxq.signature import Inputs, split_inputs

LINEAR, ATTENTION = torch.ops.fxq.int8_linear.default, torch.ops.fxq.lowered_attention.default
MIN_SQNR_DB = 120.0  # fp32 sums of thousands of terms in another order differ at 130 dB and more
MAX_ROUNDED_SHARE = 1e-3  # of outputs in a narrower format that may round to the neighbouring value


@dataclass(frozen=True)
class NodeCheck:
    """How one kernel compares with the nodes it replaces.

    Args:
        node: name of the replaced node in the program's graph.
        module: qualified name of the module it came from.
        kernel: what replaces it.
        accumulators_equal: the integer accumulators are bit-equal to exact integer arithmetic; true
            of a kernel that has none.
        sqnr_db: of the outputs, infinite where they are bit-equal.
        ok: within the bounds.
    """

    node: str
    module: str
    kernel: str
    accumulators_equal: bool
    sqnr_db: float
    ok: bool


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
        """The kernel with the largest error; None where nothing was lowered."""
        return min(self.checks, key=lambda c: (c.accumulators_equal, c.sqnr_db), default=None)

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
    args, kwargs = split_inputs(inputs)
    leaves = program.inputs(args, kwargs, "verify")
    sizes = program.signature.sizes_of(leaves)
    lowered, _ = lower(program.graph_module, program.device, sizes)
    with torch.no_grad():
        simulated = _Recorder(program.graph_module)
        results = program.signature.results(simulated.run(*leaves))
        replay = _Replay(lowered, simulated.values)
        checks = [replay.check(node) for node in lowered.graph.nodes if "fxq_replaces" in node.meta]
        if model is None:
            return Verification(tuple(checks))
        judgement = judge(program.graph_module, simulated.values, results, model, args, kwargs)
    return Verification(tuple(checks), judgement)


class _Recorder(Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


class _Replay:
    """Computes nodes of the lowered graph from the recorded values of the simulated one."""

    def __init__(self, lowered: GraphModule, recorded: Mapping[str, Any]) -> None:
        self.lowered, self.recorded = lowered, recorded

    def value(self, node: Node) -> Any:
        if node.name in self.recorded:
            return self.recorded[node.name]
        if node.op == "get_attr":
            return tensor_of(self.lowered, node)
        args, kwargs = map_arg((node.args, node.kwargs), self.value)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    def check(self, node: Node) -> NodeCheck:
        expected = self.recorded[node.meta["fxq_replaces"]]
        found = self.value(node)
        kernel = self._kernel_behind(node)
        if is_op(kernel, ATTENTION):
            (expected, _), (found, _) = expected, found
            equal, ok = True, sqnr_db(expected, found) >= min_attention_sqnr_db(expected.dtype)
        else:
            equal = self._accumulators_equal(kernel)
            ok = equal and _close(expected, found)
        return NodeCheck(
            node.meta["fxq_replaces"],
            owner_name(node),
            str(kernel.target).removesuffix(".default"),
            equal,
            sqnr_db(expected, found),
            ok,
        )

    def _kernel_behind(self, node: Node) -> Node:
        """Return the kernel whose result `node` scales, or `node` itself."""
        while not is_op(node, LINEAR, ATTENTION):
            node = next(
                n
                for n in node.all_input_nodes
                if n.name not in self.recorded and n.op != "get_attr"
            )
        return node

    def _accumulators_equal(self, kernel: Node) -> bool:
        codes_node, _, zero_node, weight_node = args_of(kernel)[:4]
        x, weight = self.value(codes_node), self.value(weight_node)
        zero = None if zero_node is None else self.value(zero_node)
        one = torch.ones(1, 1, device=x.device)
        # As the kernel gives them: whole numbers, or each rounded once.
        dtype = torch.int32 if args_of(kernel)[6] == torch.int32 else torch.float32
        found = torch.ops.fxq.int8_linear(x, one, zero, weight, one, None, dtype)
        return torch.equal(found, accumulate(x, zero, weight).to(dtype))


def min_attention_sqnr_db(dtype: torch.dtype) -> float:
    """Return the bound on attention in a dtype: 54 dB in float16, 36 dB in bfloat16.

    Weights and output are each rounded once, by half a unit in the last place or less: together one
    unit. Half of that again is left for outputs that are smaller than what they are summed from.
    """
    return min(MIN_SQNR_DB, -20 * math.log10(2 * torch.finfo(dtype).eps))


def _close(expected: Tensor, found: Tensor) -> bool:
    if expected.dtype == torch.float32:
        return sqnr_db(expected, found) >= MIN_SQNR_DB
    # A narrower result was rounded on both sides, so a few values fall to the neighbour.
    differ = (expected != found) & ~(expected.isnan() & found.isnan())
    return float(differ.float().mean()) <= MAX_ROUNDED_SHARE
