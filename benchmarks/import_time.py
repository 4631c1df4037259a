"""What `import fxq` costs on top of `import torch`, and what it loads.

    python benchmarks/import_time.py          # under a minute

Every sample is a fresh process, and the statements take turns. fxq imports its names when they are
first used, so the cost of really using it is the row that also resolves `fxq.compress` and
`fxq.report`.
"""

import argparse
import json
import subprocess
import sys

from common import Machine, Table, Timing, publish

ROUNDS = 7
STATEMENTS = {  # name -> (what runs first, untimed; what is timed)
    "import torch": ("", "import torch"),
    "import fxq": ("", "import fxq"),
    "import fxq, after import torch": ("import torch", "import fxq"),
    "fxq.compress and fxq.report, after import torch": (
        "import torch",
        "import fxq; fxq.compress; fxq.report",
    ),
}
WATCHED = ("torch", "triton", "torch._inductor", "torch._dynamo")
PROBE = """
import json, sys, time
exec(sys.argv[1])
before = set(sys.modules)
began = time.perf_counter()
exec(sys.argv[2])
seconds = time.perf_counter() - began
loaded = [name for name in sys.argv[3:] if name in sys.modules and name not in before]
torch = sys.modules.get("torch")
if torch is not None and torch.cuda.is_initialized():
    loaded.append("a CUDA context")
if any("libcuda.so" in line for line in open("/proc/self/maps")):
    loaded.append("libcuda")
print(json.dumps([seconds, loaded]))
"""


def import_once(before: str, statement: str) -> tuple[float, list[str]]:
    """Return the seconds `statement` takes in a fresh process after `before`, and what it loads."""
    command = [sys.executable, "-W", "ignore", "-c", PROBE, before, statement, *WATCHED]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, loaded = json.loads(found.stdout.splitlines()[-1])
    return seconds, loaded


def main() -> None:
    """Run the processes in turn and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    smoke = parser.parse_args().smoke
    machine = Machine.here()
    loaded = {n: import_once(*parts)[1] for n, parts in STATEMENTS.items()}  # and writes bytecode
    samples: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(1 if smoke else ROUNDS):
        for name, parts in STATEMENTS.items():
            samples[name].append(1e3 * import_once(*parts)[0])
    timings = {name: Timing(tuple(values)) for name, values in samples.items()}
    base = timings["import torch"]
    rows = [
        {
            "statement": name,
            "ms": timing.median_ms,
            "p10": timing.p10_ms,
            "p90": timing.p90_ms,
            "share of import torch": timing.median_ms / base.median_ms,
            "newly loads": ", ".join(loaded[name]) or "none of them",
        }
        for name, timing in timings.items()
    ]
    table = Table(
        name="import_time",
        title="Import time",
        settings={"processes per statement": len(base.samples_ms), "watched": list(WATCHED)},
        machine=machine,
        columns=tuple(rows[0]),
        rows=tuple(rows),
        notes=("Timed inside the process: what runs before the statement is not counted.",),
    )
    publish(table, smoke=smoke)


if __name__ == "__main__":
    main()
