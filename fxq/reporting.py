"""Report: where every floating-point operation of a program goes, and why."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import StringIO
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fxq.account import Row, account, uncounted
from fxq.errors import counted
from fxq.layer import Induction
from fxq.lowering.lower import lower
from fxq.lowering.rule import Decision
from fxq.program import Program, check_program
from fxq.signature import Inputs, split_inputs

Status = Literal["lowered", "simulated", "float"]


@dataclass(frozen=True)
class ReportRow:
    """One operator that multiplies.

    Args:
        row: its account in the program's graph.
        status: "lowered" to a kernel, of integers or of sparse attention; "simulated": computed
            by the definition, on quantized values in float arithmetic; or "float".
        kernel: the kernel where lowered; of "float" rows, that which reads an int8 cache.
        reason: why not lowered, or a remark.
    """

    row: Row
    status: Status
    kernel: str | None
    reason: str

    @property
    def sparsity(self) -> float | None:
        """The share of its weight that is pruned, 0 to 1; None where none is."""
        return self.row.layer.sparsity

    @property
    def induction(self) -> Induction | None:
        """What Sparsity Induction made of its weight: losses, and measures of its concentration;
        None where none was."""
        return self.row.layer.induction


@dataclass(frozen=True)
class Report:
    """All operators that multiply, on one device, and what `fxq.compress` found of the whole.

    Attributes:
        uncounted: how many operators of other libraries there are, by name, whose operations are
            not among `flops`.
    """

    rows: tuple[ReportRow, ...]
    device: torch.device
    recipe: str
    notes: tuple[str, ...]
    size_bytes: int
    sqnr_db: float | None = None
    uncounted: Mapping[str, int] = field(default_factory=dict)

    @property
    def flops(self) -> int:
        """Floating-point operations of one call, without those of `uncounted`."""
        return sum(r.row.flops for r in self.rows)

    def share(self, status: Status) -> float:
        """Return the share of the operations with this status, 0 to 1."""
        part = sum(r.row.flops for r in self.rows if r.status == status)
        return part / self.flops if self.flops else 0.0

    def __str__(self) -> str:
        text = StringIO()
        console = Console(file=text, width=120)
        console.print(self.table())
        for note in self.notes:
            console.print(Text(f"note: {note}"))
        return text.getvalue()

    @property
    def title(self) -> str:
        """What stands above the table: shares of the operations, and how many operators are not
        among these."""
        shares = (f"{self.share(s):.1%} {s}" for s in ("lowered", "simulated", "float"))
        missing = sum(self.uncounted.values())
        parts = [", ".join(shares), f"{self.size_bytes / 1e6:.2f} MB"]
        if missing:
            parts.insert(1, f"{counted(missing, 'operator')} not counted")
        return f"{self.flops / 1e9:.3g} GFLOP on {self.device}: {'; '.join(parts)}"

    @property
    def caption(self) -> str:
        """What stands below the table: the error, what makes the program slower than float, and
        what is not among the operations."""
        lines = []
        if count := sum(self.uncounted.values()):
            names = ", ".join(sorted(self.uncounted))
            lines.append(
                f"{counted(count, 'operator')} cannot be counted: fxq does not know {names}"
            )
        if self.sqnr_db is not None:
            lines.append(f"outputs on the example: {self.sqnr_db:.1f} dB against float")
        if count := sum(r.status == "simulated" for r in self.rows):
            lines.append(
                f"no kernel on {self.device} for {count} layers, which compute what was simulated: "
                "slower than in float, or no faster where weights alone are quantized"
            )
        return "\n".join(lines)

    def table(self) -> Table:
        """Return a table with one line per (kind, format, status, reason), largest share first."""
        groups: Counter[tuple[str, ...]] = Counter()
        counts: Counter[tuple[str, ...]] = Counter()
        for r in self.rows:
            why = "; ".join(filter(None, (r.kernel, r.reason)))
            key: tuple[str, ...] = (r.row.kind, r.row.format or "float", r.status, why)
            groups[key] += r.row.flops
            counts[key] += 1
        table = Table(
            title=self.title,
            caption=Text(self.caption, "table.caption"),
            caption_justify="left",
        )
        for name in ("operator", "count", "FLOPs", "format", "status", "kernel or reason"):
            table.add_column(name, justify="right" if name in ("count", "FLOPs") else "left")
        for group, flops in groups.most_common():
            kind, format, status, why = group
            share = f"{flops / self.flops if self.flops else 0.0:.1%}"
            share = "?" if kind in self.uncounted else share
            table.add_row(*map(Text, (kind, str(counts[group]), share, format, status, why)))
        return table


def report(program: Program, inputs: Inputs | None = None) -> Report:
    """Account for 100 % of the operations of `program` on the device it is on; operators of other
    libraries, which cannot be counted, are named.

    Args:
        program: what `fxq.compress` or `fxq.load` returned.
        inputs: inputs whose sizes count, because small products do not gain from integer kernels;
            the example that the program was captured with unless given.
    """
    check_program(program, "report")
    sizes = program.signature.example_sizes
    if inputs is not None:
        args, kwargs = split_inputs(inputs)
        sizes = program.signature.sizes_of(program.signature.flatten(args, kwargs, "report"))
    _, decisions = lower(program.graph_module, program.device, sizes)
    rows = []
    for row in account(program.graph_module, sizes):
        note = row.layer.remarks
        if row.skip is not None:
            decision = decisions.get(row.node, Decision(None))  # on what reads an int8 cache
            pruned = "" if row.layer.mask is None else note
            reason = "; ".join(filter(None, (row.skip.reason, decision.reason, pruned)))
            rows.append(ReportRow(row, "float", decision.kernel, reason))
            continue
        decision = decisions[row.node]
        status: Status = "simulated" if decision.kernel is None else "lowered"
        reason = "; ".join(filter(None, (decision.reason, note)))
        rows.append(ReportRow(row, status, decision.kernel, reason))
    size = sum(b.numel() * b.element_size() for b in program.buffers())
    about = program.device, program.recipe, program.notes, size, program.sqnr_db
    return Report(tuple(rows), *about, uncounted(program.graph_module))
