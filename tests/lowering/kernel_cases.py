"""Arguments and checks for int8_linear that the interpreter and the GPU tests share."""

import torch
from poison import poison
from torch import Tensor

from fxq.lowering.int8_linear import accumulate, reference
from fxq.lowering.kernels import int8_linear as kernel
from fxq.numerics import sqnr_db


def check(case: kernel.Case, device: str, config: kernel.Config | None = None) -> dict[str, float]:
    """Run one case; return the share of differing codes or the SQNR, and whether sums are exact."""
    generator = torch.Generator().manual_seed(case.m * 1000 + case.n)

    def integers(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int8) -> Tensor:
        return torch.randint(low, high, shape, generator=generator).to(dtype)

    def floats(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator) + 0.5

    rows = case.m if case.per_row else 1
    x, w = integers(-128, 128, case.m, case.k), integers(-127, 128, case.n, case.k)
    x_scale, w_scale = floats(rows) * 0.01, floats(case.n) * 0.01
    zero = integers(-128, 128, rows, dtype=torch.int32) if case.zero_point else None
    bias = floats(case.n) if case.bias else None
    residual = floats(case.m, case.n).half() if case.residual else None
    out_scale = floats(case.n if case.per_column else 1) * 0.05 if case.requantize else None
    out_zero = torch.tensor([3], dtype=torch.int32) if case.requantize else None
    poison()

    def run(scale: Tensor, w_scale: Tensor, *epilogue: object) -> Tensor:
        values = (x, scale, zero, w, w_scale, w.sum(1, dtype=torch.int32), *epilogue)
        moved = [v.to(device) if isinstance(v, Tensor) else v for v in values]
        return kernel.launch(*moved, config=config).cpu()  # type: ignore[arg-type]

    plain = (None, torch.float32, "none", None, None, None, -128, 127)
    sums = run(torch.ones(1), torch.ones(case.n), *plain)
    zero_column = None if zero is None else zero[:, None]
    exact = accumulate(x, zero_column, w).float()
    tail = (torch.float32, case.activation, residual, out_scale, out_zero, -128, 127)
    found = run(x_scale, w_scale, bias, *tail)
    columns = None if out_scale is None else out_scale[None]
    tail = (*tail[:3], columns, *tail[4:])
    expected = reference(x, x_scale[:, None], zero_column, w, w_scale[:, None], bias, *tail)
    differing = float((found != expected).float().mean()) if case.requantize else 0.0
    steps = float((found.float() - expected.float()).abs().max()) if case.requantize else 0.0
    return {
        "exact": float(torch.equal(sums, exact)),
        "differing": differing,
        "steps": steps,
        "sqnr_db": sqnr_db(expected, found),
    }


def assert_passes(case: kernel.Case, found: dict[str, float]) -> None:
    """Assert what `check` found: exact sums, outputs to rounding."""
    assert found["exact"] == 1.0
    if case.requantize:
        # A value within rounding of the middle between two codes may fall to either.
        assert found["differing"] <= 2e-3
        assert found["steps"] <= 1.0
    else:
        assert found["sqnr_db"] >= 120.0
