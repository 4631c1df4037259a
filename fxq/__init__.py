"""fxq: quantize a PyTorch model as a graph, then run it on integer kernels that compute what was
simulated.

    program = fxq.compress(model, example_inputs, recipe, data)
    fast = torch.compile(program, backend="fxq")

Names are imported when first used: `import fxq` itself costs next to nothing and loads neither
Triton nor CUDA.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fxq.capturing import capture
    from fxq.errors import FxqWarning, PassError, SkippedError, UnsupportedError
    from fxq.observing import Observed, observe
    from fxq.pipeline import DataPass, Pass, Recipe, compress
    from fxq.program import Program
    from fxq.recording import Recorded, record
    from fxq.reporting import report
    from fxq.row_choice import set_step
    from fxq.saving import load, save
    from fxq.verifying import verify

__version__ = "0.1.0"

_HOMES = {
    "capture": "fxq.capturing",
    "compress": "fxq.pipeline",
    "Pass": "fxq.pipeline",
    "DataPass": "fxq.pipeline",
    "Recipe": "fxq.pipeline",
    "Program": "fxq.program",
    "record": "fxq.recording",
    "Recorded": "fxq.recording",
    "report": "fxq.reporting",
    "verify": "fxq.verifying",
    "save": "fxq.saving",
    "set_step": "fxq.row_choice",
    "load": "fxq.saving",
    "observe": "fxq.observing",
    "Observed": "fxq.observing",
    "FxqWarning": "fxq.errors",
    "PassError": "fxq.errors",
    "SkippedError": "fxq.errors",
    "UnsupportedError": "fxq.errors",
}

__all__ = [
    "DataPass",
    "FxqWarning",
    "Observed",
    "Pass",
    "PassError",
    "Program",
    "Recipe",
    "Recorded",
    "SkippedError",
    "UnsupportedError",
    "capture",
    "compress",
    "load",
    "observe",
    "record",
    "report",
    "save",
    "set_step",
    "verify",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fxq' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
