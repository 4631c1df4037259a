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
STATEMENTS = {
    "import torch": "import torch",
    "import fxq": "import fxq",
    "import torch, fxq": "import torch, fxq",
    "import torch, fxq and use": "import torch, fxq; fxq.compress; fxq.report",
}
WATCHED = ("torch", "triton", "torch._inductor", "torch._dynamo")
PROBE = """
import json, sys, time
began = time.perf_counter()
exec(sys.argv[1])
seconds = time.perf_counter() - began
loaded = [name for name in sys.argv[2:] if name in sys.modules]
torch = sys.modules.get("torch")
if torch is not None and torch.cuda.is_initialized():
    loaded.append("a CUDA context")
if any("libcuda.so" in line for line in open("/proc/self/maps")):
    loaded.append("libcuda")
print(json.dumps([seconds, loaded]))
"""


def import_once(statement: str) -> tuple[float, list[str]]:
    """Return the seconds `statement` takes in a fresh process, and what of `WATCHED` it loaded."""
    command = [sys.executable, "-W", "ignore", "-c", PROBE, statement, *WATCHED]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    seconds, loaded = json.loads(found.stdout.splitlines()[-1])
    return seconds, loaded


def main() -> None:
    """Run the processes in turn and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--smoke", action="store_true", help=argparse.SUPPRESS)
    smoke = parser.parse_args().smoke
    machine = Machine.here()
    loaded = {name: import_once(s)[1] for name, s in STATEMENTS.items()}  # also compiles bytecode
    samples: dict[str, list[float]] = {name: [] for name in STATEMENTS}
    for _ in range(1 if smoke else ROUNDS):
        for name, statement in STATEMENTS.items():
            samples[name].append(1e3 * import_once(statement)[0])
    timings = {name: Timing(tuple(values)) for name, values in samples.items()}
    base = timings["import torch"].median_ms
    at_base = set(loaded["import torch"])
    rows = [
        {
            "statement": name,
            "ms": t.median_ms,
            "p10": t.p10_ms,
            "p90": t.p90_ms,
            "ms beyond import torch": t.median_ms - base,
            "loads": ", ".join(loaded[name]) or "none of these",
            "loads beyond import torch": ", ".join(n for n in loaded[name] if n not in at_base)
            or "none of these",
        }
        for name, t in timings.items()
    ]
    table = Table(
        name="import_time",
        title="Import time",
        settings={"processes per statement": len(samples["import torch"]), "watched": WATCHED},
        machine=machine,
        columns=tuple(rows[0]),
        rows=tuple(rows),
        notes=("`import fxq` alone is below `import torch` because it does not load torch.",),
    )
    publish(table, smoke=smoke)


if __name__ == "__main__":
    main()
