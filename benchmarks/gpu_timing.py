"""Time on a GPU: CUDA graphs, events, and what clocks and power were meanwhile.

Calls are captured in one graph, so that the time is the GPU's alone; where a capture fails they are
launched one by one, and the row says why. A sample is at least 5 ms long, because a launch takes
microseconds.
"""

import math
import subprocess
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from common import Cell, attempt, quantile
from gpu_rows import Measured

WARMUP_S = 0.2  # after which clocks have settled
SAMPLING_S = 0.5
MIN_SAMPLE_S = 5e-3
SAMPLES = (5, 30)
SMI = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
SMI_COLUMNS = ("SM MHz", "memory MHz", "W", "C")


class EventClock:
    """Seconds on the GPU since this was made."""

    def __init__(self) -> None:
        self.start = self._mark()

    def __call__(self) -> float:
        """Wait for the GPU and return its time."""
        return self.start.elapsed_time(self._mark()) / 1e3

    @staticmethod
    def _mark() -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        event.synchronize()
        return event


def on_gpu(calls: tuple[Callable[[], Any], ...]) -> Measured:
    """Measure calls in a graph, or one by one where they cannot be captured."""
    graph = attempt(lambda: captured(calls))
    if isinstance(graph, str):
        return sampled(lambda: [call() for call in calls], len(calls), f"eager: {graph}")
    return sampled(graph.replay, len(calls), "graph")


def captured(calls: tuple[Callable[[], Any], ...]) -> torch.cuda.CUDAGraph:
    """Return a graph of calls, each of which has run before: what they compile is compiled."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return graph


def sampled(
    run: Callable[[], Any],
    n_calls: int,
    launched: str = "graph",
    clock: Callable[[], float] | None = None,
) -> Measured:
    """Return milliseconds of one of `n_calls` calls that `run` makes, after a warm-up.

    Args:
        run: makes all calls.
        n_calls: how many these are.
        launched: how.
        clock: seconds; of the GPU unless given.
    """
    clock = clock or EventClock()
    began, one = clock(), 0.0
    while clock() - began < WARMUP_S or not one:
        before = clock()
        run()
        one = clock() - before
    repeats = max(1, math.ceil(MIN_SAMPLE_S / max(one, 1e-7)))
    rounds = min(SAMPLES[1], max(SAMPLES[0], int(SAMPLING_S / max(one * repeats, 1e-7))))
    samples = []
    for _ in range(rounds):
        before = clock()
        for _ in range(repeats):
            run()
        samples.append(1e3 * (clock() - before) / repeats / n_calls)
    return Measured(quantile(samples, 0.5), quantile(samples, 0.9), rounds, launched)


class Smi:
    """Clocks, power and temperature of the GPU, read all the time beside the benchmark."""

    def __init__(self, command: str = "nvidia-smi") -> None:
        self.readings: list[tuple[float, tuple[float, ...]]] = []
        query = [command, f"--query-gpu={SMI}", "--format=csv,noheader,nounits", "-lms", "200"]
        self._process: subprocess.Popen[str] | None = None
        try:
            self._process = subprocess.Popen(
                query, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
            )
        except OSError:  # no such tool here: the columns stay empty
            return
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        process = self._process
        for line in process.stdout if process and process.stdout else ():
            values = attempt(lambda line=line: tuple(map(float, line.split(","))))
            if not isinstance(values, str) and len(values) == len(SMI_COLUMNS):
                self.readings.append((time.time(), values))

    def between(self, began: float, ended: float) -> dict[str, Cell]:
        """Return the means over the second half of a span: the first is spent compiling.

        Args:
            began: seconds since the epoch.
            ended: likewise.
        """
        middle = (began + ended) / 2
        inside = [values for when, values in list(self.readings) if middle <= when <= ended]
        if not inside:
            return {}
        means = (sum(column) / len(inside) for column in zip(*inside, strict=True))
        return dict(zip(SMI_COLUMNS, (round(mean) for mean in means), strict=True))

    def stop(self) -> None:
        """End the tool."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
