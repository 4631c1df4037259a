"""Every model family, compressed: each kernel equals what it replaces, and the model stays close to
float."""

import pytest
import torch
from families import family
from small_models import ZOO
from torch.utils._pytree import tree_leaves

import fxq
from fxq.lowering.devices import x86
from fxq.numerics import sqnr_db
from fxq.passes import w8a8
from fxq.signature import split_inputs


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n == "unet_condition")) for n in ZOO]
)
def test_compressed_families_verify_and_stay_close_to_float(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))
    found = family(name)
    model, example = found.model, found.example

    program = found.compress(w8a8.DYNAMIC, strict=True)

    verification = fxq.verify(program, example, model=model)
    assert verification.ok, str(verification)
    assert len(verification.checks) >= 5
    args, kwargs = split_inputs(example)
    with torch.no_grad():
        expected, result = (tree_leaves(f(*args, **kwargs))[0] for f in (model, program))
    # Measured 32.6 dB (Swin) to 48.9 dB.
    assert sqnr_db(expected, result) > 30.0
