"""One table that says what compressing a model cost and what it brought: accuracy, error, size,
latency, coverage."""

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.table import Table
from rich.text import Text
from torch import Tensor, nn

from fxq.numerics import sqnr_db
from fxq.program import Program
from fxq.reporting import report
from fxq.verifying import verify

Say = Callable[[str], None]


@dataclass(frozen=True)
class Scorecard:
    """What `measure` found. Times in ms for one batch; sizes in bytes; accuracies 0 to 1, in the
    order of `COLUMNS`.

    Args:
        accuracy_name: "accuracy", or "agrees with float" where there are no labels.
        accuracy: of float, simulated and compiled.
        sqnr_db: of simulated and compiled outputs against float.
        latency_ms: of float compiled by Inductor, and of the program compiled by fxq.
        size_bytes: of float and of the program.
        worst_node_db: largest error of a kernel against what it replaces, over all kernels.
        accumulators_equal: every integer accumulator was bit-equal.
        lowered: share of the floating-point operations that run on integer kernels.
        batch: samples per timed call.
    """

    accuracy_name: str
    accuracy: tuple[float, float, float]
    sqnr_db: tuple[float, float]
    latency_ms: tuple[float, float]
    size_bytes: tuple[int, int]
    worst_node_db: float
    accumulators_equal: bool
    lowered: float
    batch: int

    def table(self) -> Table:
        """Return the table for the terminal."""
        table = Table(title="What it cost and what it brought", title_justify="left")
        for name in ("", "float", "simulated", "compiled"):
            table.add_column(name, justify="right" if name else "left")
        table.add_row(Text(self.accuracy_name), *(f"{a:.2%}" for a in self.accuracy))
        table.add_row("SQNR against float", "", *(f"{s:.1f} dB" for s in self.sqnr_db))
        table.add_row(
            f"latency, batch {self.batch}",
            f"{self.latency_ms[0]:.2f} ms",
            "",
            f"{self.latency_ms[1]:.2f} ms ({self.latency_ms[0] / self.latency_ms[1]:.2f}x)",
        )
        sizes = [f"{size / 1e6:.2f} MB" for size in self.size_bytes]
        ratio = self.size_bytes[0] / self.size_bytes[1]
        table.add_row("size", sizes[0], "", f"{sizes[1]} ({ratio:.2f}x smaller)")
        equal = "exact sums" if self.accumulators_equal else "SUMS DIFFER"
        table.add_row("worst kernel", "", "", f"{self.worst_node_db:.1f} dB, {equal}")
        table.add_row("FLOPs on integer kernels", "", "", f"{self.lowered:.1%}")
        return table


def measure(
    model: nn.Module,
    program: Program,
    batches: Sequence[Tensor],
    labels: Sequence[Tensor] | None = None,
    say: Say = lambda text: None,
    rounds: int = 20,
) -> Scorecard:
    """Compare `program` with the `model` it came from.

    Args:
        model: the float model, on the device of `program`; returns logits `[B, classes]`.
        program: its compressed form.
        batches: inputs `[B, ...]`; the first is timed and verified.
        labels: `[B]` per batch; without them the float model's own predictions stand in.
        say: called with what happens next.
        rounds: timed calls of each, one after the other in turn.
    """
    with torch.no_grad():
        say("compiling the float model with Inductor")
        float_compiled = torch.compile(model)
        float_compiled(batches[0])
        say("compiling the program with fxq")
        compiled = torch.compile(program, backend="fxq")
        compiled(batches[0])
        say("running float, simulated and compiled on the test data")
        runs = [torch.cat([f(x) for x in batches]) for f in (model, program, compiled)]
        truth = runs[0].argmax(-1) if labels is None else torch.cat(list(labels))
        accuracy = [float((run.argmax(-1) == truth).float().mean()) for run in runs]
        say(f"timing {rounds} rounds, float and compiled in turn")
        latency = interleaved_ms(
            [lambda: float_compiled(batches[0]), lambda: compiled(batches[0])], rounds
        )
        say("comparing every kernel with what it replaces")
        verification = verify(program, batches[0])
    accounted = report(program, batches[0])
    return Scorecard(
        "agrees with float" if labels is None else "accuracy",
        (accuracy[0], accuracy[1], accuracy[2]),
        (sqnr_db(runs[0], runs[1]), sqnr_db(runs[0], runs[2])),
        (latency[0], latency[1]),
        (
            sum(t.numel() * t.element_size() for t in model.state_dict().values()),
            accounted.size_bytes,
        ),
        verification.worst.sqnr_db if verification.worst else float("inf"),
        all(check.accumulators_equal for check in verification.checks),
        accounted.share("lowered"),
        len(batches[0]),
    )


def interleaved_ms(functions: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Return the median time of each function in ms, called in turn so that drift hits all
    alike."""
    times: list[list[float]] = [[] for _ in functions]
    for round in range(rounds + 2):
        for index, function in enumerate(functions):
            began = time.perf_counter()
            function()
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            if round >= 2:  # the first two warm up
                times[index].append((time.perf_counter() - began) * 1e3)
    return [statistics.median(t) for t in times]
