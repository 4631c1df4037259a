"""The harness every benchmark here goes through: what may be timed, how, and what is written down.

The traps it closes, because each has produced published numbers: all-zero inputs
(`refuse_constant`), outputs nobody checked (`measure` times a variant only after its correctness
test), a machine whose clock drifts between variants (`interleave`: every variant once per round, so
that drift hits all alike), weights that stay in the cache between calls (`copies_beyond_cache`),
and results without the machine that gave them (`Machine` is part of every `Table`).

Importing this loads torch, so `reexec_with_isa`, which must act before oneDNN reads its
environment, comes into effect by starting the process again.
"""

import argparse
import dataclasses
import datetime
import importlib.metadata
import json
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table as RichTable
from torch import Tensor

import fxq
from fxq.lowering.cpu.onednn import cpu_int8

MIN_ROUNDS = 20  # below this a median moves by more than the differences that are reported
WARMUP_ROUNDS = 3
MIN_SAMPLE_S = 1e-3  # shorter calls are repeated until one sample lasts this long
CACHE_BYTES = 64 << 20  # weights are cycled through copies of this size together
WIDTH = 180  # of the terminal tables: a wrapped number helps nobody
RESULTS = Path(__file__).parent / "results"

Isa = Literal["native", "avx2", "avx512"]
T = TypeVar("T")

# What each library is told, so that a processor with VNNI computes as one without. oneDNN: the int8
# products. ATen and MKL: fp32. The compiler of Inductor's kernels: what it vectorises by itself.
ISA_ENVIRONMENT: dict[Isa, dict[str, str]] = {
    "native": {},
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "TORCHINDUCTOR_CPP_MARCH": "x86-64-v3",
    },
    "avx512": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE", "TORCHINDUCTOR_CPP_MARCH": "x86-64-v4"},
}
ISA_VARIABLES = tuple(ISA_ENVIRONMENT["avx2"])


def reexec_with_isa(isa: Isa) -> None:
    """Replace this process by one with the environment of `isa`, unless it has it already."""
    wanted = ISA_ENVIRONMENT[isa]
    if any(os.environ.get(name) != value for name, value in wanted.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | wanted)


@dataclass(frozen=True)
class Machine:
    """Where and when numbers were taken.

    Args:
        cpu: model name.
        aten: ATen's vector capability in use.
        environment: the variables of `ISA_ENVIRONMENT` that are set, and their values.
        int8: how oneDNN's int8 product behaves here, found by multiplying the largest codes.
        threads: of torch's intra-op pool.
        cores: that this process may use.
        load: one-minute load average when the benchmark started; a quiet machine shows less than 1.
        versions: of Python and packages; "absent" where not installed.
        commit: of this repository, with "-dirty" where tracked files differ from it.
        date: UTC, to the second.
    """

    cpu: str
    aten: str
    environment: dict[str, str]
    int8: str
    threads: int
    cores: int
    load: float
    versions: dict[str, str]
    commit: str
    date: str

    @classmethod
    def here(cls) -> "Machine":
        """Describe this process on this machine, now."""
        now = datetime.datetime.now(datetime.UTC)
        return cls(
            cpu=_cpu_name(),
            aten=torch.backends.cpu.get_cpu_capability(),
            environment={n: os.environ[n] for n in ISA_VARIABLES if n in os.environ},
            int8=_int8_name(),
            threads=torch.get_num_threads(),
            cores=len(os.sched_getaffinity(0)),
            load=round(os.getloadavg()[0], 2),
            versions={
                "python": platform.python_version(),
                "torch": torch.__version__,  # with its build tag
                **{name: _version(name) for name in ("triton", "torchao", "timm")},
                "fxq": fxq.__version__,
            },
            commit=_commit(),
            date=now.isoformat(timespec="seconds"),
        )


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor()


def _int8_name() -> str:
    found = cpu_int8()
    if not found.available:
        return "absent"
    return "saturates (no VNNI in use)" if found.saturates else "exact (VNNI)"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "absent"


def _commit() -> str:
    command = ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"]
    found = subprocess.run(
        command, cwd=Path(__file__).parent, capture_output=True, text=True, check=False
    )
    return found.stdout.strip() or "unknown"


def refuse_constant(inputs: Mapping[str, Tensor]) -> None:
    """Raise where an input holds one value only: sparsity, power and branch prediction then lie.

    Args:
        inputs: the tensors a benchmark computes on, by name.
    Raises:
        ValueError: an input is empty, all zeros, or all one other value.
    """
    for name, value in inputs.items():
        if value.numel() == 0 or bool((value == value.flatten()[0]).all()):
            content = f"only {value.flatten()[0].item():g}" if value.numel() else "nothing"
            raise ValueError(
                f"benchmark input {name!r}: expected varied values, found {content} in "
                f"{list(value.shape)}; use random data"
            )


def copies_beyond_cache(value: Tensor, n_bytes: int = CACHE_BYTES, most: int = 64) -> list[Tensor]:
    """Return enough copies of `value` that cycling through them does not stay in the cache.

    Args:
        value: the tensor; it is the first element.
        n_bytes: what the copies hold together, counted as if `value` were fp32, so that float and
            int8 variants get equally many.
        most: limit on the number of copies.
    """
    n_copies = min(most, max(1, math.ceil(n_bytes / (4 * value.numel()))))
    return [value, *(value.clone() for _ in range(n_copies - 1))]


@dataclass(frozen=True)
class Variant:
    """One way of computing the benchmark's result.

    Args:
        name: how tables call it.
        call: computes it once.
        check: takes an output of `call`; returns why it is wrong, None where it is right.
    """

    name: str
    call: Callable[[], Tensor]
    check: Callable[[Tensor], str | None]


@dataclass(frozen=True)
class Timing:
    """Milliseconds per call, one sample a round.

    Args:
        samples_ms: in the order of the rounds.
    """

    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The middle sample."""
        return quantile(self.samples_ms, 0.5)

    @property
    def p10_ms(self) -> float:
        """A tenth of the samples is faster."""
        return quantile(self.samples_ms, 0.1)

    @property
    def p90_ms(self) -> float:
        """A tenth of the samples is slower."""
        return quantile(self.samples_ms, 0.9)

    def speedup_over(self, base: "Timing") -> float:
        """Return the ratio of medians: above 1 where `self` is faster than `base`."""
        return base.median_ms / self.median_ms

    def paired_speedup_over(self, base: "Timing") -> float:
        """Return the median over rounds of `base`'s sample over `self`'s in the same round."""
        pairs = zip(base.samples_ms, self.samples_ms, strict=True)
        return quantile([theirs / ours for theirs, ours in pairs], 0.5)


def quantile(values: Sequence[float], q: float) -> float:
    """Return the `q`-quantile of `values`, interpolated linearly between neighbours."""
    ordered = sorted(values)
    position = q * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


def interleave(
    calls: Mapping[str, Callable[[], Any]],
    rounds: int,
    *,
    smoke: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Time every call once per round (A B A B ...), after warm-up rounds that are thrown away.

    Args:
        calls: what to time, by name.
        rounds: samples per call, at least `MIN_ROUNDS`.
        smoke: allow fewer rounds, for numbers nobody keeps.
        clock: seconds.
    Raises:
        ValueError: too few rounds.
    """
    if rounds < MIN_ROUNDS and not smoke:
        raise ValueError(f"rounds: expected at least {MIN_ROUNDS}, found {rounds}")
    warm = [
        {name: _sample(call, 1, clock) for name, call in calls.items()}
        for _ in range(WARMUP_ROUNDS)
    ]
    repeats = {name: max(1, math.ceil(MIN_SAMPLE_S / max(warm[-1][name], 1e-7))) for name in calls}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            samples[name].append(1e3 * _sample(call, repeats[name], clock))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


def _sample(call: Callable[[], Any], repeats: int, clock: Callable[[], float]) -> float:
    began = clock()
    for _ in range(repeats):
        call()
    return (clock() - began) / repeats


def attempt(action: Callable[[], T]) -> T | str:
    """Return the result of `action`, or the reason why it failed as one line.

    A benchmark compares libraries, and one that cannot run is a result. Everything but an interrupt
    is therefore caught, here and nowhere else.
    """
    try:
        return action()
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        return f"{type(error).__name__}: {lines[0][:200] if lines else ''}".rstrip(": ")


def measure(
    variants: Iterable[Variant],
    inputs: Mapping[str, Tensor],
    rounds: int,
    *,
    smoke: bool = False,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing | str]:
    """Time the variants that give a right result; say of each other one why it was not timed.

    Args:
        variants: in the order of a round.
        inputs: what they compute on, refused where constant.
        rounds: samples per variant.
        smoke: see `interleave`.
        clock: seconds.
    Returns:
        by variant name, its timing or the reason why it has none.
    """
    refuse_constant(inputs)
    variants = list(variants)
    verdicts = {v.name: _refusal(v) for v in variants}
    calls = {v.name: v.call for v in variants if verdicts[v.name] is None}
    timings = interleave(calls, rounds, smoke=smoke, clock=clock)
    return {v.name: timings.get(v.name) or str(verdicts[v.name]) for v in variants}


def _refusal(variant: Variant) -> str | None:
    output = attempt(variant.call)
    if isinstance(output, str):
        return f"failed: {output}"
    if not bool(output.isfinite().all()):
        return "refused: its output holds NaN or Inf"
    reason = variant.check(output)
    return None if reason is None else f"refused: {reason}"


Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """A benchmark's result: rows under named columns, and the machine.

    Args:
        name: also the name of its files.
        title: one line.
        settings: what was measured, in words.
        machine: where.
        columns: keys of the rows, in order.
        rows: cells by column; a missing one is None. Infinities and NaN become their names, which
            JSON has no numbers for.
        notes: what a reader must know to read the numbers right.
    """

    name: str
    title: str
    settings: dict[str, Any]
    machine: Machine
    columns: tuple[str, ...]
    rows: tuple[dict[str, Cell], ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for row in self.rows:
            if unknown := set(row) - set(self.columns):
                raise ValueError(
                    f"table {self.name!r} has no column {sorted(unknown)}; its columns are "
                    f"{list(self.columns)}"
                )
        ordered = tuple({c: _plain(row.get(c)) for c in self.columns} for row in self.rows)
        object.__setattr__(self, "rows", ordered)

    def to_json(self) -> str:
        """Return the whole table as JSON with a fixed order of keys."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Table":
        """Return the table that `to_json` wrote."""
        found = json.loads(text)
        machine = Machine(**found.pop("machine"))
        columns, rows, notes = (tuple(found.pop(key)) for key in ("columns", "rows", "notes"))
        return cls(**found, machine=machine, columns=columns, rows=rows, notes=notes)

    def to_markdown(self) -> str:
        """Return the table for a README, numbers as in the terminal."""
        rule = "|".join("---" if self._is_text(c) else "---:" for c in self.columns)
        lines = [
            "| " + " | ".join(self.columns) + " |",
            f"|{rule}|",
            *("| " + " | ".join(_escape(show(v)) for v in r.values()) + " |" for r in self.rows),
        ]
        about = [f"- {key}: {_line(value)}" for key, value in self.settings.items()]
        about += [f"- {k}: {_line(v)}" for k, v in dataclasses.asdict(self.machine).items()]
        notes = [f"\n{note}" for note in self.notes]
        return "\n".join([f"# {self.title}", "", *lines, *notes, "", *about]) + "\n"

    def show(self) -> None:
        """Print the table to the terminal."""
        table = RichTable(title=self.title, caption=_line(self.settings))
        for column in self.columns:
            table.add_column(column, justify="left" if self._is_text(column) else "right")
        for row in self.rows:
            table.add_row(*(escape(show(value)) for value in row.values()))
        m, console = self.machine, Console(width=WIDTH)
        console.print(table)
        console.print(
            f"{m.cpu}, int8 {m.int8}, {m.threads} threads, load {m.load}, commit {m.commit}"
        )
        for note in self.notes:
            console.print(escape(note))

    def save(self, folder: Path) -> Path:
        """Write `<name>.json` and `<name>.md` into `folder` and return the former's path."""
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{self.name}.md").write_text(self.to_markdown())
        path = folder / f"{self.name}.json"
        path.write_text(self.to_json())
        return path

    def _is_text(self, column: str) -> bool:
        return any(isinstance(row[column], str) for row in self.rows)


def _plain(value: Cell) -> Cell:
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def show(value: Cell) -> str:
    """Return a cell as text: floats to three digits, None as a dash."""
    if value is None:
        return "-"
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _line(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{k} {_line(v)}" for k, v in value.items()) or "none"
    if isinstance(value, list | tuple):
        return " ".join(map(str, value))
    return str(value)


def _escape(cell: str) -> str:
    return cell.replace("|", "\\|")


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Give `parser` the options that all benchmarks of the processor share."""
    parser.add_argument("--isa", choices=sorted(ISA_ENVIRONMENT), default="native")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)


def publish(table: Table, *, smoke: bool) -> None:
    """Print `table` and keep it; a smoke run's goes to a temporary folder instead."""
    table.show()
    folder = Path(tempfile.mkdtemp(prefix="fxq-smoke-")) if smoke else RESULTS
    print(f"wrote {table.save(folder)} and .md beside it")
