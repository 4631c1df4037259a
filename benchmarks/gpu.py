"""The GPU benchmark: int8_linear, sparse attention and whole blocks against torch's best.

    PYTHONPATH=. python benchmarks/gpu.py --out results --minutes 8

Needs no install. Rows are measured in order of importance, each in `results/gpu.jsonl` and the
table `results/gpu.md` as soon as it is measured; rows that are there already are skipped, so that
the same command goes on where the last one stopped (delete a line to have it measured again). It
never takes longer than asked: a row that hangs is ended with the process that measures it.

    --tests       before timing, the tests that need a GPU, and compute-sanitizer's racecheck on
                  small shapes where it is installed; at most half of the time
    --expected    no GPU needed: what kernels should reach by their machine code (`throughput.py`),
                  into `results/expected.json`; a run does that too, beside the measurements
    --list        the rows in order
"""

import argparse
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import gpu_attention
import gpu_blocks
import gpu_linear
import torch
from common import Cell, Machine, attempt
from gpu_journal import Journal
from gpu_rows import Job, Row, run_row
from gpu_timing import Smi, on_gpu
from gpu_worker import Worker

ROOT = Path(__file__).parents[1]
LIMIT = 4  # times what a row takes about, and it hangs
SLACK_S = 5.0  # for the table and the end of processes
COPIED_BYTES = 1 << 30
SANITIZED = "test_what_is_small_enough_for_a_sanitizer"


def make_copy(n_bytes: int, device: str) -> Job:
    """Return the row of a copy, which reads and writes `n_bytes` each."""
    source = torch.randint(0, 255, (n_bytes,), device=device, dtype=torch.uint8)
    target = torch.empty_like(source)

    def check() -> str | None:
        target.copy_(source)
        return None if torch.equal(target, source) else "the copy is another"

    return Job((lambda: target.copy_(source),), {"source": source}, check, 2.0 * n_bytes)


def rows() -> list[Row]:
    """Return all rows, most important ones first."""
    first, rest = {"32k": gpu_attention.LENGTHS["32k"]}, dict(gpu_attention.LENGTHS)
    del rest["32k"]
    narrow = {name: shape._replace(heads=24) for name, shape in gpu_attention.LENGTHS.items()}
    attention, dense = gpu_attention.rows, gpu_attention.dense_rows
    found = [
        Row("copy of 1 GiB", "torch copy_", "GB/s", 3, lambda d: make_copy(COPIED_BYTES, d)),
        *gpu_linear.rows(gpu_linear.LARGE),
        *dense(first), *attention(first, (0.2,)),
        *dense(rest), *attention(rest, (0.2,)),
        *gpu_linear.rows(gpu_linear.VIT_L), *gpu_linear.rows(gpu_linear.WAN),
        *gpu_linear.rows(gpu_linear.FEW),
        *gpu_blocks.rows(gpu_blocks.BLOCKS),
        *gpu_linear.rows(gpu_linear.DIT_XL),
        *attention(gpu_attention.LENGTHS, (0.1,)),
        *dense(narrow, dim=64), *attention(narrow, (0.2, 0.1), dim=64),
        *attention(gpu_attention.LENGTHS, (1.0,)), *attention(narrow, (1.0,), dim=64),
    ]  # fmt: skip
    return found


def serve(connection: Connection) -> None:
    """Measure rows on the GPU by their keys, until the connection ends."""
    properties = torch.cuda.get_device_properties(0)
    connection.send(
        {
            "name": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "memory GiB": round(properties.total_memory / 2**30),
            "capability": str(torch.cuda.get_device_capability(0)),
            "CUDA": str(torch.version.cuda),
            "cuDNN": str(torch.backends.cudnn.version()),
            "power limit W": power_limit(),
        }
    )
    by_key, last_case = {row.key: row for row in rows()}, ""
    while True:
        row = by_key[connection.recv()]
        if row.case != last_case:
            last_case = row.case
            torch.cuda.empty_cache()
        cells = run_row(row, "cuda", on_gpu)
        if "why" in cells and isinstance(attempt(torch.cuda.synchronize), str):
            cells["broken"] = True  # an error that every later call would raise again
        connection.send(cells)


def power_limit() -> str:
    """Return what nvidia-smi says of it."""
    query = ["nvidia-smi", "--query-gpu=power.limit", "--format=csv,noheader,nounits"]
    found = attempt(lambda: subprocess.run(query, capture_output=True, text=True, timeout=20))
    return found if isinstance(found, str) else found.stdout.strip()


def run(
    wanted: Sequence[Row],
    journal: Journal,
    measure: Callable[[Row, float], dict[str, Cell] | None],
    ends: float,
    clock: Callable[[], float] = time.monotonic,
    say: Callable[[str], object] = print,
) -> None:
    """Measure the rows that are not in the journal yet, until the time is over.

    Args:
        wanted: in order of importance.
        journal: gets each row as soon as it is measured.
        measure: returns the cells of a row, None where there was no answer in so many seconds.
        ends: when to stop, by the clock.
        clock: seconds.
        say: told of each row.
    """
    for row in wanted:
        left = ends - clock()
        if row.key in journal.rows or row.seconds > left:
            continue  # a shorter row may still fit
        limit = min(LIMIT * row.seconds, left)
        cells = measure(row, limit)
        if cells is None:
            if limit < LIMIT * row.seconds:
                continue  # the time was over, which says nothing of the row
            cells = {"why": f"failed: no result in {limit:.0f} s"}
        journal.write(row, cells)
        speed = cells.get("why") or f"{cells.get('ms'):.4g} ms"
        say(f"{row.key}: {speed}")


def on_worker(worker: Worker, smi: Smi) -> Callable[[Row, float], dict[str, Cell] | None]:
    """Return what measures rows on a worker and notes clocks and power."""

    def measure(row: Row, seconds: float) -> dict[str, Cell] | None:
        began = time.time()
        cells = worker.ask(row.key, seconds)
        return None if cells is None else cells | smi.between(began, time.time())

    return measure


def run_tests(folder: Path, ends: float) -> None:
    """Run the tests that need a GPU and the sanitizer; what they print goes to files."""
    tests = [
        "tests/lowering/test_int8_linear_gpu.py",
        "tests/lowering/test_rectified_attention_gpu.py",
    ]
    pytest = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", *tests]
    commands = {"tests.txt": pytest}
    if sanitizer := shutil.which("compute-sanitizer"):
        command = [sanitizer, "--tool", "racecheck", "--error-exitcode", "1", *pytest]
        commands["racecheck.txt"] = [*command, "-k", SANITIZED]
    else:
        print("compute-sanitizer is not installed: no racecheck")
    for name, command in commands.items():
        left = ends - time.monotonic()
        if left < SLACK_S:
            print(f"{name}: no time left")
            continue
        with (folder / name).open("w") as file:
            code = run_bounded(command, left, file)
        print(f"{name}: {'passed' if code == 0 else f'exit code {code}'}")


def run_bounded(command: list[str], seconds: float, output: Any) -> int | str:
    """Return the exit code of a command, or that it took too long."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    try:
        return subprocess.run(
            command, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=seconds,
            check=False, env=environment,
        ).returncode  # fmt: skip
    except subprocess.TimeoutExpired:
        return f"none in {seconds:.0f} s"


def benchmark(journal: Journal, folder: Path, ends: float) -> None:
    """Measure on the GPU that is here."""
    worker, smi = Worker(serve), Smi()
    figures = subprocess.Popen(
        [sys.executable, __file__, "--out", str(folder), "--expected"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ,
    )  # fmt: skip
    try:
        gpu = worker.start(ends - time.monotonic()) or {"why": "the GPU did not answer in time"}
        if "why" in gpu:
            sys.exit(f"{gpu['why']}: GPU speed is not measured")
        journal.begin(Machine.here(), gpu)
        run(rows(), journal, on_worker(worker, smi), ends)
    finally:
        worker.stop()
        smi.stop()
        figures.kill()
        figures.wait()
    journal.table.write_text(journal.to_markdown())
    done = sum(row.key in journal.rows for row in rows())
    print(f"{done} of {len(rows())} rows in {journal.table}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=8.0, help="never takes longer")
    parser.add_argument("--tests", action="store_true", help="run the GPU tests first")
    parser.add_argument("--expected", action="store_true", help="only the expected figures")
    parser.add_argument("--list", action="store_true", help="print the rows in order")
    options = parser.parse_args()
    ends = time.monotonic() + 60 * options.minutes - SLACK_S
    if options.list:
        print("\n".join(row.key for row in rows()))
        return
    journal = Journal(options.out)
    if options.expected:
        from gpu_expected import compute  # loads what reads machine code

        compute(rows(), journal)
        return
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: GPU speed is not measured")
    if options.tests:
        run_tests(options.out, time.monotonic() + 30 * options.minutes)
    benchmark(journal, options.out, ends)


if __name__ == "__main__":
    main()
