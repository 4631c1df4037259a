"""`make fuzz N=10000`: many random modules in worker processes, a table, and a test per failure.

It can be interrupted at any time: what is done is kept in `out/fuzz.json`, and the next run goes on
from there. A failure that has all the steps of one found before counts as the same.
"""

import argparse
import hashlib
import json
import logging
import multiprocessing
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field, fields
from pathlib import Path

import torch
from cases import cases
from checks import CHECKS, Verdict, checks_for, verdicts
from hypothesis import HealthCheck, Phase, given, seed, settings
from modules import Case, Step, trimmed
from rich.console import Console
from rich.table import Table
from shrinking import shrunk

ROOT = Path(__file__).parents[2]
FOUND = Path(__file__).parent / "found"
PROGRESS = ROOT / "out" / "fuzz.json"
CHUNK = 10  # cases that a worker runs at a time

TEST = '''"""Found by `make fuzz`: {check}, {reason}."""

from checks import verdicts
from modules import Case, Step


def test_{name}() -> None:
    case = {code}

    (verdict,) = verdicts(case, ["{check}"])

    assert verdict.status != "finding", verdict.reason
'''


@dataclass(frozen=True)
class Failure:
    """A shrunk case and the check it fails."""

    check: str
    reason: str
    case: Case

    def explains(self, check: str, case: Case) -> bool:
        """Whether another case fails the same check and has all the steps of this one."""
        return check == self.check and _spellings(self.case) <= _spellings(case)

    def write(self) -> Path:
        """Write a test that fails until this is mended."""
        name = hashlib.sha256(repr((self.check, self.case)).encode()).hexdigest()[:10]
        reason = " ".join(self.reason.replace("\\", "/").replace('"', "'").split())[:50]
        text = TEST.format(check=self.check, reason=reason, name=name, code=_code(self.case))
        FOUND.mkdir(exist_ok=True)
        path = FOUND / f"test_{name}.py"
        path.write_text(text)
        return path


def _spellings(case: Case) -> set[tuple[str, str]]:
    return {(step.family, step.spelling) for step in case.steps}


def _code(case: Case) -> str:
    """Return the code of a case with a line per step and field."""
    plain = Case()
    lines = ["        (", *(f"            {step!r}," for step in case.steps), "        ),"]
    for name in (f.name for f in fields(case) if f.name != "steps"):
        if (value := getattr(case, name)) != getattr(plain, name):
            lines.append(f"        {name}={value!r},".replace("'", '"'))
    return "\n".join(["Case(", *lines, "    )"])


@dataclass
class Progress:
    """What all chunks so far have found."""

    done: set[int] = field(default_factory=set)
    counts: Counter[tuple[str, str, str]] = field(default_factory=Counter)
    failures: list[Failure] = field(default_factory=list)

    def add(self, chunk: int, other: "Progress") -> None:
        """Take in a chunk's."""
        self.done.add(chunk)
        self.counts.update(other.counts)
        for failure in other.failures:
            if not any(known.explains(failure.check, failure.case) for known in self.failures):
                self.failures.append(failure)
                print(f"{failure.check}: {failure.reason}\n  {failure.case}\n  {failure.write()}")

    def save(self) -> None:
        """Write `out/fuzz.json`."""
        failures = [(f.check, f.reason, repr(f.case)) for f in self.failures]
        counts = [[*key, n] for key, n in self.counts.items()]
        PROGRESS.parent.mkdir(exist_ok=True)
        PROGRESS.write_text(
            json.dumps({"done": sorted(self.done), "counts": counts, "failures": failures})
        )

    @classmethod
    def load(cls) -> "Progress":
        """Read `out/fuzz.json`; empty where there is none."""
        if not PROGRESS.exists():
            return cls()
        saved = json.loads(PROGRESS.read_text())
        names = {"Case": Case, "Step": Step}
        return cls(
            set(saved["done"]),
            Counter({(check, status, reason): n for check, status, reason, n in saved["counts"]}),
            [Failure(c, r, eval(case, names)) for c, r, case in saved["failures"]],
        )

    def table(self) -> Table:
        """Return the counts, most frequent first within a check."""
        title = f"{len(self.done) * CHUNK} cases drawn, {len(self.failures)} distinct failures"
        table = Table("check", "verdict", "reason", title=title)
        table.add_column("cases", justify="right")
        order = list(CHECKS)
        for (check, status, reason), n in sorted(
            self.counts.items(), key=lambda item: (order.index(item[0][0]), -item[1])
        ):
            table.add_row(check, status, reason, str(n))
        return table


def drawn(chunk: int) -> list[Case]:
    """Return the cases of a chunk: the same in every run. Hypothesis also makes variants of what
    it drew before; those with the same steps are left out."""
    found: dict[object, Case] = {}

    @seed(chunk)
    @settings(
        max_examples=CHUNK,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(cases())
    def draw(case: Case) -> None:
        case = trimmed(case)
        found.setdefault((frozenset(_spellings(case)), case.dtype), case)

    draw()
    return list(found.values())


def run_chunk(chunk: int, known: Sequence[Failure]) -> Progress:
    """Run the checks on the cases of a chunk, and shrink what is new."""
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    torch.set_num_threads(1)
    progress = Progress(failures=list(known))
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        for index, case in enumerate(drawn(chunk)):
            for verdict in verdicts(case, checks_for(case, chunk * CHUNK + index)):
                progress.counts[verdict.check, verdict.status, _kind(verdict)] += 1
                if verdict.status == "finding" and not any(
                    failure.explains(verdict.check, case) for failure in progress.failures
                ):
                    progress.failures.append(_shrunk(case, verdict))
    progress.failures = progress.failures[len(known) :]
    return progress


def _kind(verdict: Verdict) -> str:
    """Return a reason without its numbers, names and sizes."""
    text = re.sub(r"\[[^\]]*\]|'[^']*'|\([^)]*\)", "..", verdict.reason)
    return re.sub(r"-?\d[\d.e+-]*", "N", text)[:90]


def _shrunk(case: Case, verdict: Verdict) -> Failure:
    reason = verdict.reason

    def fails(other: Case) -> bool:
        nonlocal reason
        for found in verdicts(other, [verdict.check]):
            if found.status == "finding" and _kind(found)[:25] == _kind(verdict)[:25]:
                reason = found.reason
                return True
        return False

    if not fails(case):
        return Failure(verdict.check, f"only after other cases: {reason}", case)
    small = shrunk(case, fails)  # which sets the reason
    return Failure(verdict.check, reason, small)


def chunks(n: int, first: int, progress: Progress) -> Iterator[int]:
    """Return the chunks of `n` cases that are still to do."""
    wanted = range(first, first + -(-n // CHUNK))
    return (chunk for chunk in wanted if chunk not in progress.done)


def run(todo: Iterator[int], progress: Progress, jobs: int) -> None:
    """Run chunks in worker processes; one that kills its worker is reported and left out."""
    context = multiprocessing.get_context("spawn")
    while True:
        running: dict[Future[Progress], int] = {}
        with ProcessPoolExecutor(jobs, context, max_tasks_per_child=5) as pool:
            try:
                while True:
                    for chunk in todo:
                        running[pool.submit(run_chunk, chunk, progress.failures)] = chunk
                        if len(running) >= jobs:
                            break
                    if not running:
                        return
                    for future in wait(running, return_when=FIRST_COMPLETED).done:
                        found = future.result()
                        progress.add(running.pop(future), found)
                        progress.save()
            except BrokenProcessPool:
                print(f"a worker died in chunk {sorted(running.values())}")
                progress.done.update(running.values())


def main() -> None:
    """Run, and print what there is in any case."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("n", type=int, help="number of cases to draw")
    parser.add_argument("--first", type=int, default=0, help="first chunk: other cases")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--fresh", action="store_true", help="forget earlier runs")
    options = parser.parse_args()
    progress = Progress() if options.fresh else Progress.load()
    try:
        run(chunks(options.n, options.first, progress), progress, options.jobs)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from here")
    Console().print(progress.table())
    raise SystemExit(bool(progress.failures))


if __name__ == "__main__":
    main()
