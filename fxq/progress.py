"""How far work has come: as bars on a terminal, as lines of text, or not at all.

Whoever does long work takes `progress=` from the caller and opens a `Reporter` on it. A reporter is
itself a function that takes a line, so it can be handed on as `progress=`: what is done inside then
reports to the same place.
"""

import operator
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

from rich.console import Console
from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bars
from rich.text import Text

Item = TypeVar("Item")
Progress = Callable[[str], object] | bool | None  # what a user gives as progress=

SAY_EVERY_S = 5.0
SHOW_EVERY_S = 0.25  # on a terminal


class Reporter:
    """Where news of work goes.

    Args:
        say: takes a line of text; None for nowhere.
        bars: shows tasks in place of lines.
    """

    def __init__(self, say: Callable[[str], object] | None, bars: Bars | None = None) -> None:
        self.say, self.bars = say, bars

    def __bool__(self) -> bool:
        """Whether anybody listens."""
        return self.say is not None

    def __call__(self, text: str) -> None:
        """Pass on a line of text."""
        if self.say is not None:
            self.say(text)

    @contextmanager
    def task(self, name: str, unit: str, total: int | None, done: int = 0) -> Iterator["Task"]:
        """Show a task while it lasts.

        Args:
            name: how lines and bars call it.
            unit: what it consists of, in the plural.
            total: how many there are; None where that is not known.
            done: of them, earlier.
        """
        task = Task(self, name, unit, total, done)
        try:
            yield task
        finally:
            task.close()


class Task:
    """Work of which parts get done, as `Reporter.task` shows it."""

    def __init__(
        self, report: Reporter, name: str, unit: str, total: int | None, done: int
    ) -> None:
        self.report, self.name, self.unit, self.total, self.done = report, name, unit, total, done
        self.earlier, self.began, self.last = done, time.perf_counter(), time.perf_counter()
        bars = report.bars
        self.bar = bars.add_task(name, total=total, completed=done, news="") if bars else None

    def advance(self, units: int = 1, news: Callable[[], str] | None = None) -> None:
        """Count `units` as done and, if the last time is long enough ago, say so.

        Args:
            units: how many more are done.
            news: returns what else there is to say; called only when it is said.
        """
        self.done += units
        now, bars = time.perf_counter(), self.report.bars
        if not self.report or now - self.last < (SHOW_EVERY_S if bars else SAY_EVERY_S):
            return
        self.last = now
        text = news() if news else ""
        if bars and self.bar is not None:
            bars.update(self.bar, completed=self.done, news=text)
            return
        of = "" if self.total is None else f" of {self.total}"
        left = ""
        if self.total is not None:
            seconds = (now - self.began) / (self.done - self.earlier) * (self.total - self.done)
            left = f"; about {seconds:.0f} s left"
        self.report(f"{self.name}: {self.done}{of} {self.unit}{text and ': '}{text}{left}")

    def close(self) -> None:
        """Take the bar away."""
        if self.report.bars and self.bar is not None:
            self.report.bars.remove_task(self.bar)


@contextmanager
def reporting(progress: Progress, console: Console | None = None) -> Iterator[Reporter]:
    """Open the place that a caller's `progress=` stands for.

    Args:
        progress: a function that takes a line of text; True for bars where stderr is a terminal and
            lines on stderr elsewhere; None or False for nothing.
        console: where True shows them; stderr unless given.
    Raises:
        TypeError: something else.
    """
    if isinstance(progress, Reporter):
        yield progress
    elif progress is True:
        console = console or Console(stderr=True)

        def say(text: str) -> None:
            console.print(Text(text), soft_wrap=True)

        if not console.is_terminal:
            yield Reporter(say)
            return
        name = TextColumn("{task.description}", markup=False)
        news = TextColumn("{task.fields[news]}", style="dim", markup=False)
        columns = name, BarColumn(), TaskProgressColumn()
        with Bars(*columns, TimeRemainingColumn(), news, console=console) as bars:
            yield Reporter(say, bars)
    elif progress is None or progress is False or callable(progress):
        yield Reporter(progress or None)
    else:
        raise TypeError(
            "progress: expected True, or a function that takes a line of text, found "
            f"{type(progress).__name__}"
        )


@dataclass(frozen=True)
class Reported(Generic[Item]):
    """Batches that tell how far they have been read, each time that they are.

    Args:
        data: the batches.
        name: what reads them.
        report: where to tell.
    """

    data: Iterable[Item]
    name: str
    report: Reporter

    def __iter__(self) -> Iterator[Item]:
        total = operator.length_hint(self.data) or None
        with self.report.task(self.name, "batches", total) as task:
            for batch in self.data:
                yield batch
                task.advance()
