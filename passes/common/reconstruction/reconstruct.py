"""Reconstruct: train what quantization may choose, block by block, until each block gives again
what the float model's block gives.

    for each block in order
        exact outputs   = float block (exact inputs)
        train             quantized block (found inputs)  ->  exact outputs
        found outputs   = quantized block (found inputs)

Inputs of the quantized block are those that the quantized blocks before it give, so it makes up for
their errors too (asymmetric reconstruction). What it has learned is fixed in the layers' records
and observers; `Convert` keeps it to the last integer. A block that does not come closer to the
float model on the rows that judge stays as calibration left it.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.fx import GraphModule, Node
from torch.fx.passes.infra.pass_base import PassResult

from fxq.batches import device_of
from fxq.calibrate import NO_DATA
from fxq.checkpoint import Checkpoint, Tensors, fingerprint
from fxq.dialect import OBSERVED, Dialect
from fxq.errors import UnsupportedError
from fxq.graph import dtype_of, owner_name, weight_of
from fxq.identity import TensorKey
from fxq.layer import WeightCodes, layer_of, set_facts, treat
from fxq.observers import RangeObserver
from fxq.passes.common.convert import pending_layers, quantize_weight
from fxq.passes.common.reconstruction.blocks import cut
from fxq.passes.common.reconstruction.frontier import Frontier, Place
from fxq.passes.common.reconstruction.losses import BlockLoss
from fxq.passes.common.reconstruction.methods import Learned, Method, StraightThrough
from fxq.passes.common.reconstruction.training import BlockTraining, Course, Outcome, divided
from fxq.passes.common.sensitivity import sensitivities
from fxq.passes.common.student import set_parameter, student_of, without_observers
from fxq.pipeline import Batches, DataPass
from fxq.progress import Reported, Reporter, Task
from fxq.rewriting import has_attribute
from fxq.row_choice import RowsUsed, counted_steps
from fxq.spec import QuantSpec


@dataclass(frozen=True)
class Reconstruct(DataPass):
    """Train block by block. Stands between `Calibrate` and `Convert`.

    Under `torch.distributed` each process gives its own batches; gradients are averaged, and all
    end with the same result.

    Args:
        steps: of Adam, per block; the learning rates fall to zero along half a cosine.
        method: what learns: `StraightThrough`, `Rounding` or one of your own.
        loss: what for.
        inputs_share: share of the elements of a block's inputs that come from the quantized blocks
            while it trains; the others are the float model's (QDrop, arXiv:2203.05740).
        rows_per_step: samples that each step learns from: those of one batch, or of several where
            batches are smaller.
        held_out: share of the batches that judge and are not learned from; of fewer than four
            batches all do both.
        blocks: qualified names of modules with shell wildcards; found from the graph unless given.
        place: where the values between blocks are kept: "device", "cpu" or "disk".
        seed: of all random numbers.
    """

    steps: int = 200
    method: Method = StraightThrough()  # noqa: RUF009  frozen
    loss: BlockLoss = BlockLoss()  # noqa: RUF009
    inputs_share: float = 1.0
    rows_per_step: int = 8
    held_out: float = 0.125
    blocks: tuple[str, ...] = ()
    place: Place = "device"
    seed: int = 0

    reads: ClassVar[Dialect] = OBSERVED
    writes: ClassVar[Dialect] = OBSERVED

    def __post_init__(self) -> None:
        for name in ("steps", "rows_per_step"):
            if type(getattr(self, name)) is not int or getattr(self, name) < 1:
                raise ValueError(
                    f"Reconstruct.{name}: expected 1 or more, found {getattr(self, name)!r}"
                )
        for name in ("inputs_share", "held_out"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"Reconstruct.{name}: expected 0 to 1, found {getattr(self, name)!r}"
                )
        if type(self.blocks) is not tuple:
            raise TypeError(f"Reconstruct.blocks: expected a tuple, found {self.blocks!r}")
        if self.place not in ("device", "cpu", "disk"):
            raise ValueError(
                f'Reconstruct.place: expected "device", "cpu" or "disk", found {self.place!r}'
            )

    def run(self, gm: GraphModule, data: Batches) -> PassResult:
        """Train all blocks."""
        return self.resume(gm, data, None)

    def resume(self, gm: GraphModule, data: Batches, checkpoint: Checkpoint | None) -> PassResult:
        """Likewise, but blocks that an earlier call with the same checkpoint has trained are not
        trained again."""
        report = data.report if isinstance(data, Reported) else Reporter(None)
        walk = _Walk(self, gm, data, checkpoint or Checkpoint(None, "fxq_reconstruction"))
        trained = walk.run(report)
        return PassResult(gm, modified=bool(trained))


class _Walk:
    """One run of `Reconstruct` over the blocks of a graph."""

    def __init__(
        self, settings: Reconstruct, gm: GraphModule, data: Batches, checkpoint: Checkpoint
    ) -> None:
        self.settings, self.gm, self.checkpoint = settings, gm, checkpoint
        for layer, _ in pending_layers(gm):
            if dtype_of(layer) in (torch.float16, torch.bfloat16):
                raise UnsupportedError(
                    f"Reconstruct: expected float32 to learn in, found {dtype_of(layer)} at "
                    f"{owner_name(layer)}; compress the model in float32"
                )
        self.blocks = cut(gm, settings.blocks)
        # Made first: what is learned goes into `gm` and the blocks, not into these.
        self.exact = [without_observers(block.graph_module) for block in self.blocks]
        self.rows: list[set[tuple[int, int]]] = []  # that each batch uses
        with counted_steps(gm, data) as batches:
            self.frontier = Frontier(gm, self._noted(batches), self.blocks, settings.place)
        if not len(self.frontier):
            raise ValueError(NO_DATA)
        self.course = Course(
            settings.method,
            settings.loss,
            settings.inputs_share,
            settings.rows_per_step,
            self._sensitivities() if settings.loss.fisher else {},
            *divided(self.rows, settings.held_out),
        )
        self.tensors: Tensors = {}  # what blocks have learned, for the checkpoint
        self.errors: dict[int, tuple[float, float]] = {}  # before and after, by block

    def run(self, report: Reporter) -> int:
        """Train what is not trained yet, and return how many blocks came closer."""
        if self.checkpoint.path is not None:
            self._go_on()
        steps, trained = self.settings.steps, 0
        total, done = sum(1 for block in self.blocks if block.layers), len(self.errors)
        with (
            report.task("Reconstruct", "steps", steps * total, steps * done) as task,
            self._random(),
        ):
            for k, block in enumerate(self.blocks):
                self.frontier.run("exact", block, self.exact[k])
                if block.layers:
                    outcome = self._earlier(k) if k in self.errors else self._train(k, task)
                    trained += outcome.learned is not None
                    self._install(k, outcome)
                    report(f"{block.name}: error {outcome.before:.3g}, {outcome.after:.3g} after")
                self._settle(k)
                self.frontier.run("found", block, student_of(block.graph_module, "rounded").eval())
                self.frontier.forget(k)
        return trained

    @contextmanager
    def _random(self) -> Iterator[None]:
        """Leave the caller's random numbers as they are."""
        devices = {value.device for value in self.gm.parameters() if value.is_cuda}
        with torch.random.fork_rng([device.index for device in devices]):
            yield

    def _noted(self, batches: Batches) -> Iterator[Sequence[Any]]:
        """Yield the batches, and take note of the rows that each of them uses."""
        rows_used = RowsUsed(self.gm)
        for batch in batches:
            self.rows.append(rows_used(batch))
            yield batch

    def _sensitivities(self) -> dict[str, Tensor]:
        """Return how much the results feel errors at the outputs of blocks and layers."""
        names = {name for block in self.blocks for name in (*block.outputs, *block.layers)}
        with self._random():
            torch.manual_seed(self.settings.seed)
            return sensitivities(without_observers(self.gm), self._batches(), sorted(names))

    def _batches(self) -> Iterator[list[Any]]:
        """Yield the graph's inputs, batch by batch; before any block is forgotten."""
        names = [node.name for node in self.gm.graph.find_nodes(op="placeholder")]
        return (self.frontier.read("exact", k, names) for k in range(len(self.frontier)))

    def _go_on(self) -> None:
        """Take over what blocks have learned in an earlier call."""
        inputs = (x for batch in self._batches() for x in batch if isinstance(x, Tensor))
        layers = {node.name: layer_of(node) for node, _ in pending_layers(self.gm)}
        specs = {name: layer.spec for name, layer in layers.items()}
        fixed = Learned(codes={n: layer.weight for n, layer in layers.items() if layer.weight})
        mark = fingerprint(
            self.gm, repr((self.settings, specs)), *inputs, *fixed.tensors().values()
        )
        state = self.checkpoint.load(mark)
        if state is not None:
            about, self.tensors = state
            self.errors = {k: (before, after) for k, before, after in about["errors"]}

    def _earlier(self, k: int) -> Outcome:
        start = f"{k} "
        kept = {
            name.removeprefix(start): value.to(device_of(self.gm))
            for name, value in self.tensors.items()
            if name.startswith(start)
        }
        return Outcome(Learned.of(kept) if kept else None, *self.errors[k])

    def _train(self, k: int, task: Task) -> Outcome:
        torch.manual_seed(self.settings.seed * 1_000_003 + k)
        training = BlockTraining(self.blocks[k], self.exact[k], self.frontier, self.course)
        outcome = training.train(self.settings.steps, task)
        if outcome.learned is not None:
            self.tensors |= {f"{k} {n}": v for n, v in outcome.learned.tensors().items()}
        self.errors[k] = outcome.before, outcome.after
        about = {"errors": [(index, *pair) for index, pair in self.errors.items()]}
        self.checkpoint.save(about, self.tensors)
        return outcome

    def _install(self, k: int, outcome: Outcome) -> None:
        """Put what a block has learned into the graph, and into the blocks that share it."""
        block, learned = self.blocks[k], outcome.learned or Learned()
        for name, scale in learned.scales.items():
            observer = self.gm.get_submodule(name)
            assert isinstance(observer, RangeObserver)
            observer.trained_scale = scale
            observer.trained_zero_point = learned.zero_points.get(name)
        nodes = {node.name: node for node in self.gm.graph.nodes}
        if not outcome.before:
            did = "exact as it was calibrated"
        elif outcome.learned is None:
            did = f"no closer to the float block: error {outcome.before:.3g}"
        else:
            did = f"error of its block {outcome.before:.3g}, {outcome.after:.3g} after"
        for name in block.layers:
            treat(nodes[name], Reconstruct.__name__, did)
        for name, codes in learned.codes.items():
            self._fix(weight_key(nodes[name]), codes)
        for name, bias in learned.biases.items():
            for owner in (self.gm, *(other.graph_module for other in self.blocks[k:])):
                if has_attribute(owner, name):
                    set_parameter(owner, name, nn.Parameter(bias, requires_grad=False))

    def _settle(self, k: int) -> None:
        """Fix what a block shares with later ones and has not learned: it runs with that now."""
        block, *later = (block.graph_module for block in self.blocks[k:])
        for name in _observers(block) & set[str]().union(*map(_observers, later)):
            observer = self.gm.get_submodule(name)
            assert isinstance(observer, RangeObserver)
            scale, zero_point = observer.qparams()
            observer.trained_scale, observer.trained_zero_point = scale, zero_point
        shared = {weight_key(node) for other in later for node, _ in pending_layers(other)}
        for node, spec in pending_layers(block):
            if layer_of(node).weight is None and (key := weight_key(node)) in shared:
                self._fix(key, WeightCodes(*quantize_weight(weight_of(node), spec.weight)))

    def _fix(self, key: "WeightKey", codes: WeightCodes) -> None:
        """Fix the weight of every layer that has the same one and quantizes it alike."""
        for owner in (self.gm, *(block.graph_module for block in self.blocks)):
            for node, _ in pending_layers(owner):
                if layer_of(node).weight is None and weight_key(node) == key:
                    set_facts(node, weight=codes)


def _observers(gm: GraphModule) -> set[str]:
    """Return the names of the observers that a graph has."""
    return {str(node.target) for node in gm.graph.nodes if node.op == "call_module"}


WeightKey = tuple[TensorKey, QuantSpec]


def weight_key(layer: Node) -> WeightKey:
    """Return what tells a layer's weight and its way of quantizing from others."""
    spec = layer_of(layer).spec
    assert spec is not None
    return TensorKey.of(weight_of(layer)), spec.weight
