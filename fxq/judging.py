"""Judge a program by the float model it came from: its outputs, and every layer by itself.

A layer's judge is the model's own module of that name, watched while the model runs as it is. The
layer is given the module's recorded input, quantizes it and multiplies: so a wrong weight, bias or
scale shows at that very layer and at no other. Beside it stands the error of the program's own run,
to which all layers in front contribute.
"""

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.fx import GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves, tree_map_only

from fxq.account import kind_of
from fxq.errors import counted, listed
from fxq.graph import owner_name
from fxq.layer import layer_of
from fxq.module_state import spared
from fxq.numerics import as_real, is_inexact, sqnr_db
from fxq.seeding import same_seed, seeded
from fxq.teacher_forcing import Call, compare_layer

# Layers of 4 x 4 bits are at 10 to 15 dB, of 8 x 8 bits above 20. An unrelated weight gives about
# -3 dB, no weight at all 0, a quarter of the rows wrong 3.
MIN_LAYER_DB = 5.0
MIN_OUTPUT_DB = 3.0  # below, half of the outputs' power is error, or more; zeros have 0
FAR_DB = 10.0  # below, `fxq.compress` warns
N_SHOWN = 5
WITH_WEIGHT = ("linear", "conv", "transposed conv")


class Recorder(Interpreter):
    """Runs a graph and keeps the value of every node."""

    def __init__(self, gm: GraphModule) -> None:
        super().__init__(gm, garbage_collect_values=False)
        self.values: dict[str, Any] = {}

    def run_node(self, n: Node) -> Any:
        """Run a node and keep what it gives."""
        self.values[n.name] = super().run_node(n)
        return self.values[n.name]


@dataclass(frozen=True)
class LayerCheck:
    """How one operator that multiplies compares with the model's module.

    Args:
        node: its name in the program's graph.
        module: qualified name of the module it came from.
        kind: as in `fxq.report`.
        alone_db: SQNR of its output, given the module's input; None where nothing compares.
        sqnr_db: likewise, with the input it has in the program.
        reason: why there is nothing to compare with.
    """

    node: str
    module: str
    kind: str
    alone_db: float | None = None
    sqnr_db: float | None = None
    reason: str = ""

    @property
    def ok(self) -> bool:
        """False below `MIN_LAYER_DB`, and for NaN."""
        return self.alone_db is None or self.alone_db >= MIN_LAYER_DB


@dataclass(frozen=True)
class Judgement:
    """A program's outputs and layers against the float model's.

    Args:
        sqnr_db: of all floating outputs together.
        worst_sample_db: the smallest along the batch, the first dimension of the outputs.
        layers: one per operator that multiplies, in graph order.
    """

    sqnr_db: float
    worst_sample_db: float
    layers: tuple[LayerCheck, ...]

    @property
    def ok(self) -> bool:
        """Whether the outputs and every layer that can be compared are above the floors."""
        return self.sqnr_db >= MIN_OUTPUT_DB and all(layer.ok for layer in self.layers)

    @property
    def worst(self) -> list[LayerCheck]:
        """The layers that could be compared, those with the largest error of their own first."""
        compared = [layer for layer in self.layers if layer.alone_db is not None]
        return sorted(compared, key=lambda layer: (layer.ok, layer.alone_db))

    def __str__(self) -> str:
        worst = self.worst
        failed = sum(not layer.ok for layer in worst)
        lines = [
            f"against the model: {self.sqnr_db:.1f} dB, worst sample {self.worst_sample_db:.1f} dB",
            f"{len(worst)} of {len(self.layers)} layers compared alone with the model's modules, "
            f"{failed} below {MIN_LAYER_DB:.0f} dB; the largest errors:",
        ]
        lines += [
            f"  {layer.module}: {layer.alone_db:.1f} dB alone, {layer.sqnr_db:.1f} dB in the "
            "program" + ("" if layer.ok else "  WRONG")
            for layer in worst[: max(N_SHOWN, failed)]
        ]
        reasons: dict[str, list[str]] = defaultdict(list)
        for layer in self.layers:
            if layer.reason:
                reasons[layer.reason].append(layer.module)
        lines += [
            f"not compared, {reason}: {len(names)}, e.g. {names[0]}"
            for reason, names in reasons.items()
        ]
        return "\n".join(lines)


def judge(
    gm: GraphModule,
    recorded: Mapping[str, Any],
    results: Sequence[Any] | None,
    model: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> Judgement:
    """Compare a graph's values with those of the model it came from.

    Args:
        gm: the graph of a program.
        recorded: the value of each of its nodes, by name, from a run on the arguments.
        results: what it returned, the model's results only; None compares layers alone.
        model: the float model, or what torch.export made of it; left as it is, buffers too.
        args: positional arguments of the call.
        kwargs: keyword arguments.
    Raises:
        ValueError: the model is in train mode.
    """
    if isinstance(model, ExportedProgram):
        model = model.module()
    elif any(module.training for module in model.modules()):
        raise ValueError("model: expected eval mode, found train mode; call model.eval() first")
    layers = [node for node in gm.graph.nodes if kind_of(node) is not None]
    modules = {node: _module(model, owner_name(node)) for node in layers}
    by_module: dict[nn.Module | None, list[Node]] = defaultdict(list)
    for node, module in modules.items():
        by_module[module].append(node)  # of one with two names, too, in the order of its calls
    with torch.no_grad(), spared(model), _recording(by_module) as calls:
        own_args, own_kwargs = tree_map_only(Tensor, torch.clone, (tuple(args), dict(kwargs)))
        with same_seed(tree_leaves((own_args, own_kwargs))):
            expected = model(*own_args, **own_kwargs)
        found = {
            check.node: check
            for module, nodes in by_module.items()
            for check in _compare(nodes, module, calls[module], recorded)
        }
    pooled = worst = torch.nan
    if results is not None:
        pooled, worst = outputs_sqnr_db(expected, results)
    return Judgement(pooled, worst, tuple(found[node.name] for node in layers))


def far_from_float(
    sqnr_db: float,
    gm: GraphModule,
    leaves: Sequence[Any],
    model: nn.Module | ExportedProgram,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> str:
    """Return what to know where outputs are less than `FAR_DB` from the float model's, "" where
    they are nearer. Only then all values of the graph are held at once.

    Args:
        sqnr_db: of the outputs.
        gm: the graph of the program.
        leaves: its inputs.
        model: the float model.
        args: positional arguments of the same call.
        kwargs: keyword arguments.
    """
    if sqnr_db >= FAR_DB:
        return ""
    recorder = Recorder(gm)
    seeded(recorder.run, leaves)
    judgement = judge(gm, recorder.values, None, model, args, kwargs)
    worst = judgement.worst[:N_SHOWN]
    listing = ", ".join(f"{layer.module} {layer.alone_db:.1f} dB" for layer in worst)
    return (
        f"outputs on the example are {sqnr_db:.1f} dB from the float model's, below {FAR_DB:.0f} "
        "dB: a tenth of their power is error, or more. "
        + (f"Of layers given exact inputs, the farthest: {listing}. " if worst else "")
        + "Leave such layers float or give them 8 bits (overrides), compute outlier channels apart "
        "(recommended), take a range per token, scale channels first (smoothquant, repq_vit, "
        "outlier_suppression), or reconstruct; "
        f"fxq.verify(program, inputs, model=model) compares {_comparable(gm, judgement)}"
    )


def _comparable(gm: GraphModule, judgement: Judgement) -> str:
    """Return which layers can be compared, naming those that were changed and cannot."""
    changed = {node.name for node in gm.graph.nodes if layer_of(node).format is not None}
    left = [layer for layer in judgement.layers if layer.reason and layer.node in changed]
    if not left:
        return "all layers"
    names = listed(layer.module for layer in left)
    return f"all layers but {counted(len(left), 'changed one')} that cannot be compared: {names}"


def _module(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return model.get_submodule(path)
    except AttributeError:  # a model that is one layer has no name for it
        return None if any(True for _ in model.children()) else model


@contextlib.contextmanager
def _recording(modules: Iterable[nn.Module | None]) -> Iterator[dict[nn.Module | None, list[Call]]]:
    """Keep what each module is given and returns, while the context lasts; nothing of None."""
    calls: dict[nn.Module | None, list[Call]] = {module: [] for module in modules}

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        given = next(iter((*args, *kwargs.values())), None)
        if isinstance(given, Tensor) and isinstance(output, Tensor):
            calls[module].append(Call(given.clone(), output.clone()))

    with contextlib.ExitStack() as stack:
        for module in calls:
            if module is not None:
                stack.callback(module.register_forward_hook(keep, with_kwargs=True).remove)
        yield calls


def _compare(
    nodes: Sequence[Node],
    module: nn.Module | None,
    calls: Sequence[Call],
    recorded: Mapping[str, Any],
) -> Iterator[LayerCheck]:
    """Yield the checks of all operators that came from one module."""
    for index, node in enumerate(nodes):
        name, kind = owner_name(node), str(kind_of(node))
        has_weight = isinstance(getattr(module, "weight", None), Tensor)
        if kind not in WITH_WEIGHT or not has_weight or not calls:
            yield LayerCheck(node.name, name, kind, reason="no module of the model is this layer")
            continue
        if len(calls) != len(nodes):
            why = f"called {len(calls)} times, and {len(nodes)} operators came from it"
            yield LayerCheck(node.name, name, kind, reason=why)
            continue
        compared = compare_layer(node, module, calls[index], recorded)
        if isinstance(compared, str):
            yield LayerCheck(node.name, name, kind, reason=compared)
        else:
            yield LayerCheck(node.name, name, kind, *compared)


def outputs_sqnr_db(expected: Any, found: Any) -> tuple[float, float]:
    """Return the SQNR of all floating and complex outputs together, and of the worst sample along
    the first dimension; infinity where there are no such outputs."""
    pairs = [
        (as_real(a).double(), as_real(b).double())
        for a, b in zip(tree_leaves(expected), tree_leaves(found), strict=True)
        if is_inexact(a)
    ]
    if not pairs:
        return torch.inf, torch.inf
    both = [torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1)]
    pooled = sqnr_db(*both)
    batch = pairs[0][0].shape[:1]
    samples = [pair for pair in pairs if pair[0].ndim and pair[0].shape[:1] == batch]
    if not samples:
        return pooled, pooled
    rows = [torch.cat([pair[side].flatten(1) if pair[side].ndim > 1 else pair[side][:, None]
                       for pair in samples], 1) for side in (0, 1)]  # fmt: skip
    figures = [sqnr_db(a, b) for a, b in zip(*rows, strict=True)]
    return pooled, min(figures, key=lambda figure: (figure == figure, figure), default=pooled)
