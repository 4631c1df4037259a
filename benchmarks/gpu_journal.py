"""Results that survive whatever happens: a line of JSON for each row, as soon as it is measured.

`gpu.jsonl` is only ever appended to. A line holds a row, or a run: where the rows after it were
measured. `gpu.md` is the table of all lines, written anew after each row.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

from common import Cell, Machine, show
from gpu_rows import Row

COLUMNS = (
    "case", "variant", "ms", "p90 ms", "speed", "unit", "expected", "of expected", "x peer", "peer",
    "visited", "kernel", "launched", "samples", "SM MHz", "memory MHz", "W", "C", "why",
)  # fmt: skip
PEERS = ("bfloat16 cuBLAS", "cuDNN SDPA", "bfloat16 Inductor")


class Journal:
    """The results in one folder.

    Args:
        folder: made where it is not.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.lines, self.table = folder / "gpu.jsonl", folder / "gpu.md"
        self.figures = folder / "expected.json"
        self.runs: list[dict[str, object]] = []
        self.rows: dict[str, dict[str, Cell]] = {}
        for line in self.lines.read_text().splitlines() if self.lines.exists() else []:
            self._take(json.loads(line))

    def _take(self, line: dict[str, object]) -> None:
        if "run" in line:
            self.runs.append(line["run"])  # type: ignore[arg-type]
        else:
            self.rows[str(line["key"])] = line["row"]  # type: ignore[assignment]

    def _append(self, line: dict[str, object]) -> None:
        with self.lines.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self._take(line)

    def begin(self, machine: Machine, gpu: Mapping[str, Cell]) -> None:
        """Write where the rows that follow are measured."""
        self._append({"run": dataclasses.asdict(machine) | {"gpu": dict(gpu)}})

    def write(self, row: Row, cells: Mapping[str, Cell]) -> None:
        """Write a row, and the table with it."""
        given = {"case": row.case, "variant": row.variant, "figure": row.expected, **cells}
        self._append({"key": row.key, "row": given})
        self.table.write_text(self.to_markdown())

    def expected(self) -> dict[str, float]:
        """Return the figures that are known by now."""
        return json.loads(self.figures.read_text()) if self.figures.exists() else {}

    def expected_of(self, figure: Cell) -> float | None:
        """Return a figure for the version of Triton that measured last, None where not known."""
        version = self.runs[-1]["versions"]["triton"] if self.runs else ""  # type: ignore[index]
        return self.expected().get(f"{figure} (Triton {version})")

    def completed(self) -> list[dict[str, Cell]]:
        """Return the rows with what other rows and expected figures say of them."""
        found = []
        for row in self.rows.values():
            row = dict(row)
            figure = self.expected_of(row.pop("figure", None))
            if figure is not None:
                row["expected"] = figure
                if isinstance(row.get("speed"), float):
                    row["of expected"] = row["speed"] / figure  # type: ignore[operator]
            found.append(row | self._against_peer(row))
        return found

    def _against_peer(self, row: Mapping[str, Cell]) -> dict[str, Cell]:
        """Return how much faster a row is than the bfloat16 product or dense attention it is
        for."""
        case = str(row["case"])
        dense = ", ".join(case.split(", ")[:2]) + ", dense"
        for name in PEERS:
            peer = self.rows.get(f"{case} | {name}") or self.rows.get(f"{dense} | {name}")
            if peer is not None and row.get("ms") and peer.get("ms"):
                return {"x peer": float(peer["ms"]) / float(row["ms"]), "peer": name}  # type: ignore[arg-type]
        return {}

    def to_markdown(self) -> str:
        """Return the table, and where its rows were measured."""
        rows = self.completed()
        lines = [
            "# fxq on a GPU",
            "",
            "| " + " | ".join(COLUMNS) + " |",
            "|---" * len(COLUMNS) + "|",
        ]
        for row in rows:
            cells = (show(row.get(column)).replace("|", "\\|") for column in COLUMNS)
            lines.append("| " + " | ".join(cells) + " |")
        for i, run in enumerate(self.runs):
            lines += [
                "",
                f"Run {i + 1}:",
                "",
                *(f"- {name}: {value}" for name, value in run.items()),
            ]
        return "\n".join(lines) + "\n"
