"""The GPU benchmark without a GPU: order, resumption and deadline of the driver, and every kind of
row at tiny sizes, where a wrong result is refused."""

import functools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

pytest.importorskip("triton")
import gpu
import gpu_blocks
import gpu_linear
import gpu_timing
from common import Cell, Machine
from gpu_journal import Journal
from gpu_rows import Job, Measured, Row, n_copies, run_row
from gpu_worker import Worker


def fixed(calls: tuple[Callable[[], Any], ...]) -> Measured:
    """Measure nothing."""
    return Measured(2.0, 2.5, 5)


def job(device: str, wrong: str | None = None, value: float = 1.0) -> Job:
    """Return a job that multiplies nothing."""
    return Job((lambda: None,), {"x": torch.arange(3.0) * value}, lambda: wrong, work=4e9)


def row(variant: str, seconds: float = 1.0, **options: Any) -> Row:
    return Row("a case", variant, "TFLOP/s", seconds, functools.partial(job, **options), "figure")


class Device:
    """What measures rows: each takes as long as told, by a clock of its own."""

    def __init__(self, **takes: float) -> None:
        self.now, self.takes, self.log = 0.0, takes, list[str]()

    def __call__(self, row: Row, seconds: float) -> dict[str, Cell] | None:
        self.log.append(row.variant)
        takes = self.takes.get(row.variant, row.seconds)
        self.now += min(takes, seconds)
        return {"ms": 1.0, "speed": 4.0} if takes <= seconds else None

    def run(self, rows: list[Row], journal: Journal, ends: float) -> None:
        gpu.run(rows, journal, self, ends, clock=lambda: self.now, say=lambda line: None)


def test_rows_are_measured_in_order_and_written_at_once(tmp_path: Path) -> None:
    rows, journal, seen = [row(name) for name in "abc"], Journal(tmp_path), list[int]()

    def measure(row: Row, seconds: float) -> dict[str, Cell]:
        seen.append(len(journal.lines.read_text().splitlines()) if journal.lines.exists() else 0)
        return {"ms": 1.0}

    gpu.run(rows, journal, measure, 100.0, clock=lambda: 0.0, say=lambda line: None)

    assert seen == [0, 1, 2]
    assert list(Journal(tmp_path).rows) == ["a case | a", "a case | b", "a case | c"]
    assert "| a case | c | 1 |" in (tmp_path / "gpu.md").read_text()


def test_a_second_run_goes_on_where_the_first_stopped(tmp_path: Path) -> None:
    rows, first, second = [row(name) for name in "abcd"], Device(), Device()

    first.run(rows, Journal(tmp_path), 2.0)
    second.run(rows, Journal(tmp_path), 100.0)

    assert first.log == ["a", "b"]
    assert second.log == ["c", "d"]
    assert len((tmp_path / "gpu.jsonl").read_text().splitlines()) == 4


def test_a_row_that_does_not_fit_gives_way_to_one_that_does(tmp_path: Path) -> None:
    device = Device()

    device.run([row("a", 3.0), row("long", 10.0), row("short", 2.0)], Journal(tmp_path), 6.0)

    assert device.log == ["a", "short"]
    assert device.now <= 6.0


def test_a_row_that_hangs_is_written_and_the_rest_is_measured(tmp_path: Path) -> None:
    device, journal = Device(hangs=1e9), Journal(tmp_path)

    device.run([row("hangs"), row("next")], journal, 100.0)

    assert journal.rows["a case | hangs"]["why"] == "failed: no result in 4 s"
    assert journal.rows["a case | next"]["ms"] == 1.0


def test_a_row_that_the_end_of_the_time_cut_off_is_measured_next_time(tmp_path: Path) -> None:
    device, journal = Device(slow=1e9), Journal(tmp_path)

    device.run([row("slow", 2.0)], journal, 3.0)

    assert device.now == 3.0
    assert journal.rows == {}


@pytest.mark.parametrize(
    ("options", "why"),
    [
        ({"wrong": "3 dB"}, "refused: 3 dB"),
        ({"value": 0.0}, "failed: ValueError: benchmark input 'x': expected varied values"),
    ],
)
def test_what_is_wrong_is_not_measured(options: dict[str, Any], why: str) -> None:
    calls: list[int] = []

    def measure(given: tuple[Callable[[], Any], ...]) -> Measured:
        calls.append(1)
        return fixed(given)

    assert str(run_row(row("a", **options), "cpu", measure)["why"]).startswith(why)
    assert calls == []
    assert run_row(row("a"), "cpu", measure)["speed"] == pytest.approx(2.0)  # 4e9 / 2 ms in 1e12


def test_the_table_sets_rows_beside_peers_and_expected_figures(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.begin(Machine.here(), {"name": "a GPU"})
    version = Machine.here().versions["triton"]
    journal.figures.write_text(json.dumps({f"figure (Triton {version})": 8.0}))
    make = functools.partial(job)
    cases = ("attention 8k, d 64, density 0.2", "attention 8k, d 64, dense")
    ours, peer = Row(cases[0], "fxq", "TFLOP/s", 1, make, "figure"), "cuDNN SDPA"

    journal.write(Row(cases[1], peer, "TFLOP/s", 1, make), {"ms": 3.0, "speed": 9.0})
    journal.write(ours, {"ms": 1.5, "speed": 4.0})

    (_, found) = Journal(tmp_path).completed()
    assert (found["expected"], found["of expected"]) == (8.0, 0.5)
    assert (found["x peer"], found["peer"]) == (2.0, peer)
    assert "a GPU" in (tmp_path / "gpu.md").read_text()


def answer(connection: Connection) -> None:
    """Answer requests: hang, break, end, or the request itself."""
    connection.send({"name": "a GPU"})
    while True:
        request = connection.recv()
        if request == "hang":
            time.sleep(60)
        if request == "end":
            return
        connection.send({"asked": request, "broken": request == "break"})


def test_a_process_that_hangs_breaks_or_ends_is_started_again() -> None:
    worker = Worker(answer, method="fork")
    try:
        assert worker.ask("a", 10) == {"asked": "a"}
        first = worker.process.pid
        assert worker.ask("hang", 0.2) is None
        assert worker.ask("b", 10) == {"asked": "b"}
        second = worker.process.pid
        assert worker.ask("break", 10) == {"asked": "break"}
        assert worker.process is None
        assert worker.ask("end", 10) == {"why": "failed: the process ended (EOFError)"}
        assert worker.ask("c", 10) == {"asked": "c"}
        assert len({first, second, worker.process.pid}) == 3
    finally:
        worker.stop()


def test_without_a_gpu_the_benchmark_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--out", str(tmp_path)])

    with pytest.raises(SystemExit, match="no CUDA device here: GPU speed is not measured"):
        gpu.main()


def test_every_row_has_a_name_of_its_own_and_a_figure_that_is_known() -> None:
    import gpu_expected

    rows = gpu.rows()
    keys = [row.key for row in rows]

    assert len(set(keys)) == len(keys)
    assert {row.expected for row in rows if row.expected} <= set(gpu_expected.figures())
    # The first minutes: what the headline numbers are made of.
    assert sum(row.seconds for row in rows[:25]) <= 240
    assert {row.case for row in rows[:7]} == {"copy of 1 GiB", "8192 cubed", "4096 cubed"}


def test_expected_figures_are_computed_once_for_each_version(tmp_path: Path) -> None:
    import gpu_expected

    calls: list[int] = []

    def figure() -> float:
        calls.append(1)
        return 7.0

    for _ in range(2):
        gpu_expected.compute([row("a"), row("b")], Journal(tmp_path), {"figure": figure})

    assert calls == [1]
    assert list(Journal(tmp_path).expected().values()) == [7.0]


def test_samples_are_long_enough_and_exclude_the_warm_up() -> None:
    now, runs = [0.0], [0]

    def run() -> None:
        runs[0] += 1
        now[0] += 1e-3 if now[0] > gpu_timing.WARMUP_S else 2e-3

    found = gpu_timing.sampled(run, 4, clock=lambda: now[0])

    assert found.median_ms == pytest.approx(0.25)  # 1 ms of 4 calls
    assert found.samples == gpu_timing.SAMPLES[1]
    assert runs[0] >= 30 * 3  # repeated, so that a sample takes 5 ms


def test_clocks_and_power_are_read_beside_a_row(tmp_path: Path) -> None:
    tool = tmp_path / "smi"
    tool.write_text("#!/bin/sh\nwhile true; do echo '1980, 3201, 650.5, 40'; sleep 0.05; done\n")
    tool.chmod(0o755)
    smi, began = gpu_timing.Smi(str(tool)), time.time()
    while not smi.readings and time.time() < began + 10:
        time.sleep(0.05)

    found = smi.between(began - 60, time.time() + 1)
    smi.stop()

    assert found == {"SM MHz": 1980, "memory MHz": 3201, "W": 650, "C": 40}
    assert gpu_timing.Smi("no-such-tool").between(0, 1) == {}


def test_copies_hold_more_than_the_caches() -> None:
    assert n_copies(16 << 20) == 12
    assert n_copies(1 << 30) == 1
    assert n_copies(10) == 64


RUNNER = """
import functools, json, sys
sys.path.insert(0, sys.argv[1])
import torch
import gpu_attention
from fxq.lowering.kernels import attend_blocks, rectified_attention
from gpu_rows import Measured, run_row
from torch.nn.attention import SDPBackend

def results():
    rows = gpu_attention.rows(gpu_attention.TINY, (0.5,))
    rows += gpu_attention.dense_rows(gpu_attention.TINY)
    found = {}
    for row in rows:
        if "Flex" in row.variant:  # uncompiled: what it computes, not how
            shape = gpu_attention.TINY["tiny"]._replace(density=0.5)
            flex = functools.partial(gpu_attention.flex_attention.flex_attention)
            row = row.__class__(row.case, row.variant, row.unit, 1, functools.partial(
                gpu_attention.make_flex, shape, attention=lambda *a, **k: DAMAGE(flex(*a, **k))))
        found[row.key] = run_row(row, "cpu", lambda calls: Measured(1.0, 1.0, 5)).get("why", "")
    return found

DAMAGE = lambda x: x
right = results()
DAMAGE = lambda x: x + x.abs().amax() * 0.02

def damaged(of, name, first=False):
    whole = getattr(of, name)
    def call(*args, **options):
        found = whole(*args, **options)
        return (DAMAGE(found[0]), *found[1:]) if first else DAMAGE(found)
    setattr(of, name, call)

damaged(gpu_attention, "scaled_dot_product_attention")
damaged(rectified_attention, "launch", True)
damaged(attend_blocks, "launch", True)
selected = rectified_attention.select_blocks.launch
count = [0]
def others(*args, **options):
    found = selected(*args, **options)
    count[0] += 1
    found.visited[:, 0] = count[0] % 2
    return found
rectified_attention.select_blocks.launch = others
print(json.dumps([right, results()]))
"""


@functools.cache
def checked() -> list[dict[str, str]]:
    """Return why each tiny row is refused, as it is and when what it measures is damaged."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", RUNNER, str(Path(gpu.__file__).parent)],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(gpu.ROOT)},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_attention_is_right_at_tiny_sizes_and_refused_when_damaged() -> None:
    right, damaged = checked()

    assert len(right) == 6 + 2
    wrong = {key: why for key, why in right.items() if why and "cuDNN" not in key}
    assert wrong == {}
    accepted = {key for key, why in damaged.items() if not why.startswith("refused")}
    assert {key for key in accepted if "cuDNN" not in key} == set()


@pytest.mark.parametrize("row", gpu_linear.rows(gpu_linear.TINY), ids=lambda row: row.key)
def test_products_are_right_at_tiny_sizes_and_refused_when_damaged(
    row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = run_row(row, "cpu", fixed)
    for of, name in ((gpu_linear, "int8_linear"), (gpu_linear.F, "linear"), (torch, "_int_mm")):
        whole = getattr(of, name)

        def damaged(*args: Any, whole: Callable[..., Tensor] = whole) -> Tensor:
            found = whole(*args)
            found[0, 0] += 1 if found.is_floating_point() else 3
            return found * 1.02 if found.is_floating_point() else found

        monkeypatch.setattr(of, name, damaged)

    assert right.get("why") is None
    assert str(run_row(row, "cpu", fixed)["why"]).startswith("refused")


def test_one_wrong_sum_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = gpu_linear.int8_linear

    def damaged(*args: Any) -> Tensor:
        found = whole(*args)
        if found.dtype == torch.float32:
            found[-1, -1] += 1
        return found

    monkeypatch.setattr(gpu_linear, "int8_linear", damaged)

    found = run_row(gpu_linear.rows(gpu_linear.TINY)[0], "cpu", fixed)

    assert found["why"] == "refused: 1 of 1584 integer sums are not exact as torch.float32"


@pytest.mark.parametrize("row", gpu_blocks.rows(gpu_blocks.TINY), ids=lambda row: row.key)
def test_blocks_are_right_at_tiny_sizes_and_refused_when_damaged(
    row: Row, monkeypatch: pytest.MonkeyPatch
) -> None:
    def eager(module: nn.Module, **options: Any) -> Callable[..., Tensor]:
        return module

    def damaged(module: nn.Module, **options: Any) -> Callable[..., Tensor]:
        return lambda *inputs: module(*inputs) * 1.1

    monkeypatch.setattr(gpu_blocks, "compiled", eager)
    right = run_row(row, "cpu", fixed)
    monkeypatch.setattr(gpu_blocks, "compiled", damaged)

    assert right.get("why") is None
    assert str(run_row(row, "cpu", fixed)["why"]).startswith("refused")


@pytest.mark.slow
@pytest.mark.parametrize("row", gpu_blocks.rows(gpu_blocks.TINY), ids=lambda row: row.key)
@pytest.mark.filterwarnings("ignore::fxq.errors.FxqWarning")  # tiny layers stay float on a CPU
def test_compiled_blocks_are_right_at_tiny_sizes(row: Row) -> None:
    found = run_row(row, "cpu", lambda calls: (calls[0](), fixed(calls))[1])

    assert found.get("why") is None
