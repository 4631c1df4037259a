"""The analysis of machine code lies beside the benchmarks, which use it too."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
