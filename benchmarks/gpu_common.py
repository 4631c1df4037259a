"""What the GPU benchmarks share: a clock of CUDA events, and where the numbers were taken."""

import sys

import torch


def require_cuda() -> None:
    """End the program with a sentence where there is no GPU."""
    if not torch.cuda.is_available():
        sys.exit("no CUDA device here: GPU speed is not measured")


class EventClock:
    """Seconds on the GPU since this was made, for `common.interleave`."""

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


def gpu_settings() -> dict[str, str | int]:
    """Return what identifies the GPU in a table."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "memory GiB": round(properties.total_memory / 2**30),
        "CUDA": str(torch.version.cuda),
    }
