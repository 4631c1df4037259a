"""How dense should each layer be? Measured on sampled query blocks of a model's own activations.

    found = calibrate_density(model, example, batches, progress=print)
    print(found)
    recipe = Recipe("mine", (found.attention(error=0.05),))

Every batch runs once, densely. At each attention the sampled blocks are also computed at several
densities, so a layer is measured on exact inputs, and on those alone. Rows outside the sample cost
nothing, and the whole attention matrix is never held.
"""

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import astuple, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.fx import GraphModule, Interpreter, Node

from fxq.account import account
from fxq.batches import CheckedBatches, device_of
from fxq.capturing import capture
from fxq.checkpoint import Checkpoint, Tensors, fingerprint, run_over
from fxq.graph import is_op, owner_name
from fxq.operators import SPARSE_ATTENTION
from fxq.passes.rectified_spaattn.replace_attention import ReplaceAttention
from fxq.pipeline import Recipe
from fxq.progress import Progress, Reported, reporting
from fxq.rectified_attention.layout import BlockLayout
from fxq.rectified_attention.reference import attend, attend_block, plan, visited_tokens
from fxq.signature import Inputs

DENSITIES = (0.05, 0.1, 0.2, 0.35, 0.5)
N_BLOCKS = 8  # sampled per layer and batch: about 1000 rows per head


@dataclass(frozen=True)
class Measurement:
    """One layer at one density.

    Args:
        module: qualified name of the layer.
        density: asked for.
        kept: share of visual key blocks that were visited, with neighbours and `top_p`.
        ratio: mean rectification factor R; 1 where nothing is compensated.
        pass_rate: share of the dropped blocks that the gate lets through.
        error: relative Frobenius error of the sampled visual rows against dense attention.
    """

    module: str
    density: float
    kept: float
    ratio: float
    pass_rate: float
    error: float


@dataclass(frozen=True)
class Calibration:
    """What was measured, and what follows from it.

    Args:
        measurements: one per attention and density, in graph order, densities ascending. A layer
            that is called several times has as many of each density.
        measured: the pass whose settings were measured.
    """

    measurements: tuple[Measurement, ...]
    measured: ReplaceAttention

    def worst(self) -> tuple[Measurement, ...]:
        """Return one measurement per layer and density: of several calls, the one that errs most.

        Overrides go by layer, so a density has to do for all of its calls.
        """
        worst: dict[str, dict[float, Measurement]] = {}
        for m in self.measurements:
            layer = worst.setdefault(m.module, {})
            known = layer.setdefault(m.density, m)
            if m.error > known.error or math.isnan(m.error):
                layer[m.density] = m
        return tuple(m for layer in worst.values() for m in layer.values())

    def densities(self, error: float) -> tuple[tuple[str, float | None], ...]:
        """Return each layer's smallest measured density that errs at most so much, None for dense.

        Args:
            error: bound on the relative error of a layer's result, > 0, in each of its calls.
        """
        if not error > 0:
            raise ValueError(f"error: expected a positive relative error, found {error}")
        chosen: dict[str, float | None] = {}
        for m in self.worst():
            fits = m.error <= error
            if chosen.setdefault(m.module, m.density if fits else None) is None and fits:
                chosen[m.module] = m.density
        return tuple(chosen.items())

    def attention(self, error: float) -> ReplaceAttention:
        """Return the measured pass with these densities as overrides."""
        return replace(self.measured, overrides=(*self.densities(error), *self.measured.overrides))

    def table(self) -> Table:
        """Return a table with one line per layer and density, of its worst call."""
        table = Table(title=f"{self.measured.mode}, {self.measured.block_size} tokens per block")
        table.add_column("layer")
        for name in ("density", "kept", "R", "gate passes", "relative error"):
            table.add_column(name, justify="right")
        last = ""
        for m in self.worst():
            if last and m.module != last:
                table.add_section()
            table.add_row(
                "" if m.module == last else m.module, f"{m.density:.2f}", f"{m.kept:.1%}",
                f"{m.ratio:.3f}", f"{m.pass_rate:.0%}", f"{m.error:.4f}",
            )  # fmt: skip
            last = m.module
        return table

    def __str__(self) -> str:
        text = StringIO()
        Console(file=text, width=110).print(self.table())
        return text.getvalue()


def calibrate_density(
    model: nn.Module,
    example_inputs: Inputs,
    data: Iterable[Any],
    attention: ReplaceAttention | None = None,
    *,
    densities: Sequence[float] = DENSITIES,
    n_blocks: int = N_BLOCKS,
    progress: Progress = None,
    checkpoint: str | Path | None = None,
) -> Calibration:
    """Measure every attention that `attention` would replace, on a model's own activations.

    Args:
        model: in eval mode; read, never written.
        example_inputs: as for `fxq.compress`.
        data: batches, as for `fxq.compress`; denoisers want several noise levels among them.
        attention: what to measure; its density does not matter, the default pass unless given.
        densities: to measure, each in (0, 1).
        n_blocks: query blocks sampled per layer and batch.
        progress: as for `fxq.compress`.
        checkpoint: a file that keeps the sums of an interrupted call, which then goes on after
            their batches; it is removed at the end.
    Raises:
        ValueError: densities outside (0, 1), no block to sample, no batch, no attention to replace,
            or a checkpoint of other work.
    """
    measured = attention or ReplaceAttention()
    if not densities or any(not 0 < d < 1 for d in densities):
        raise ValueError(f"densities: expected numbers between 0 and 1, found {tuple(densities)}")
    if n_blocks < 1:
        raise ValueError(f"n_blocks: expected at least 1 per layer and batch, found {n_blocks}")
    kept = Checkpoint(checkpoint, "fxq_density")
    captured = capture(model, example_inputs)
    recipe = Recipe("calibration", (replace(measured, density=1.0),))
    gm = recipe.apply(captured.graph_module)
    probe = _Probe(gm, sorted(densities), n_blocks)
    if not probe.layers:
        raise ValueError(
            f"model: expected attention that can be replaced, found none; {_why_dense(gm)}"
        )
    batches = CheckedBatches(captured, data, device_of(model))
    about = repr((measured, probe.densities, n_blocks))
    with torch.no_grad(), reporting(progress) as report:
        run_over(
            Reported(batches, "calibrate_density", report), lambda leaves: probe.run(*leaves),
            kept, lambda: fingerprint(gm, about), probe.state, probe.restore,
        )  # fmt: skip
        report(f"calibrate_density: {len(probe.layers)} layers measured")
    found = tuple(probe.measurements())
    kept.remove()
    return Calibration(found, measured)


def _why_dense(gm: GraphModule) -> str:
    """Say for what reasons a graph's attentions stay dense, and how many of them for each."""
    rows = [row for row in account(gm) if row.kind == "attention"]
    reasons = Counter(row.skip.reason for row in rows if row.skip)
    found = "; ".join(f"{count} x {reason}" for reason, count in reasons.items())
    return f"left dense: {found}" if found else "the graph has no attention operator"


@dataclass
class _Sums:
    """Of one layer at one density, over rows, heads and batches."""

    difference: float = 0.0
    reference: float = 0.0
    kept: float = 0.0
    ratio: float = 0.0
    dropped: float = 0.0
    passed: float = 0.0
    n_plans: float = 0.0


class _Probe(Interpreter):
    """Runs a graph densely and measures its sparse attentions by the way."""

    def __init__(self, gm: GraphModule, densities: Sequence[float], n_blocks: int) -> None:
        super().__init__(gm)
        self.densities, self.n_blocks = densities, n_blocks
        self.layers = [n for n in gm.graph.nodes if is_op(n, SPARSE_ATTENTION)]
        self.sums = {(n, d): _Sums() for n in self.layers for d in densities}
        self.generator = torch.Generator().manual_seed(0)

    def run_node(self, n: Node) -> Any:
        if n not in self.layers:
            return super().run_node(n)
        args, _ = self.fetch_args_kwargs_from_env(n)
        site = _Tensors(*args)
        chosen = torch.randperm(site.layout.n_blocks, generator=self.generator)[: self.n_blocks]
        for density in self.densities:
            site.measure(self.sums[n, density], density, chosen.tolist())
        return site.dense(), None

    def state(self) -> Tensors:
        """Return everything that changes."""
        sums = torch.tensor([astuple(s) for s in self.sums.values()], dtype=torch.float64)
        return {"sums": sums, "generator": self.generator.get_state()}

    def restore(self, kept: Tensors) -> None:
        """Put back what `state` returned."""
        for key, numbers in zip(self.sums, kept["sums"].tolist(), strict=True):
            self.sums[key] = _Sums(*numbers)
        self.generator.set_state(kept["generator"])

    def measurements(self) -> Iterable[Measurement]:
        for (node, density), s in self.sums.items():
            if not s.n_plans:
                raise ValueError("data: expected at least one batch, found none")
            yield Measurement(
                owner_name(node), density, s.kept / s.n_plans, s.ratio / s.n_plans,
                s.passed / s.dropped if s.dropped else 1.0,
                (s.difference / s.reference) ** 0.5 if s.reference else 0.0,
            )  # fmt: skip


class _Tensors:
    """The arguments of one `fxq::rectified_attention`, in canonical order."""

    def __init__(
        self, query: Tensor, key: Tensor, value: Tensor, _: Tensor, text_len: Tensor | None,
        order: Tensor | None, adjacency: Tensor | None, text_start: int, text_size: int,
        block_size: int, *choices: Any,
    ) -> None:  # fmt: skip
        self.layout = BlockLayout(query.shape[2], text_start, text_size, block_size)
        self.index = self.layout.to_canonical(order, query.device)
        self.query, self.key, self.value = (
            x.index_select(2, self.index) for x in (query, key, value)
        )
        self.text_mask = self.layout.text_mask(text_len, query.shape[0], query.device)
        self.adjacency, self.choices = adjacency, choices
        self.scale = query.shape[-1] ** -0.5 if choices[-1] is None else choices[-1]

    def dense(self) -> Tensor:
        """Return dense attention in the order of the sequence."""
        n_visual = self.layout.n_visual
        visual = self.text_mask.new_ones(len(self.text_mask), n_visual)
        seen = torch.cat([visual, self.text_mask], 1)[:, None, None]
        out = F.scaled_dot_product_attention(
            self.query, self.key, self.value, None if seen.all() else seen, scale=self.scale,
            enable_gqa=self.query.shape[1] != self.key.shape[1],
        )  # fmt: skip
        return torch.empty_like(out).index_copy_(2, self.index, out)

    def measure(self, sums: _Sums, density: float, blocks: Sequence[int]) -> None:
        """Add what the sampled blocks give at one density."""
        top_p, mode, mass, gate, center_keys, is_causal, _ = self.choices
        found = plan(
            self.query, self.key, self.value, torch.tensor(density), self.text_mask,
            self.adjacency, self.layout, top_p, mode, mass, gate, center_keys, is_causal,
            self.scale,
        )  # fmt: skip
        sums.kept += float(found.selected.float().mean())
        sums.ratio += float(found.ratio.mean())
        sums.dropped += float((~found.selected).sum())
        sums.passed += float(found.compensated.sum())
        sums.n_plans += 1
        n_batch, n_heads = self.query.shape[:2]
        rows_of = dict(self.layout.row_groups())
        for b, h in itertools.product(range(n_batch), range(n_heads)):
            group = h // (n_heads // self.key.shape[1])
            q = self.query[b, h].float() * self.scale
            k, v = self.key[b, group].float(), self.value[b, group].float()
            text = self.layout.n_visual + self.text_mask[b].nonzero()[:, 0]
            everything = torch.cat([torch.arange(self.layout.n_visual, device=q.device), text])
            for n in blocks:
                rows = q[rows_of[n]]
                expected, _ = attend(rows, k[everything], v[everything], None)
                tokens = visited_tokens(found.selected[b, h, n], self.layout, text)
                out, _ = attend_block(rows, k, v, found, b, h, n, tokens, None, mode == "online")
                sums.difference += float((out - expected).square().sum())
                sums.reference += float(expected.square().sum())
