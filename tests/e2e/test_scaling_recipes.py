"""Scaling recipes from compress to compile: what is compiled is what was simulated."""

import pytest
import torch
from models import Block
from scaling import with_slow
from small_models import ZOO, seeded
from torch.utils._pytree import tree_leaves, tree_map

import fxq
from fxq.lowering.devices import x86
from fxq.numerics import sqnr_db
from fxq.passes import smoothquant
from fxq.signature import split_inputs


@pytest.fixture(autouse=True)
def everything_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(x86, "WITH_VNNI", x86.Thresholds(0, 0))
    monkeypatch.setattr(x86, "WITHOUT_VNNI", x86.Thresholds(0, 0))


@pytest.mark.parametrize(
    "name",
    with_slow("swin", "llama", "unet_condition", "flux"),
)
def test_scaled_families_verify_and_stay_close_to_float(name: str) -> None:
    model, example = seeded(ZOO[name])
    other = tree_map(lambda x: x.flip(-1) if x.ndim else x, example)

    program = fxq.compress(model, example, smoothquant.W8A8, data=[example, other], strict=True)

    verification = fxq.verify(program, example, model=model)
    assert verification.ok, str(verification)
    args, kwargs = split_inputs(example)
    with torch.no_grad():
        expected, found = (tree_leaves(f(*args, **kwargs))[0] for f in (model, program))
    # Measured 33.5 dB (Swin) to 47.2 dB; these models have no unbalanced channels.
    assert sqnr_db(expected, found) > 31.0


def test_a_scaled_program_compiles_saves_and_loads(tmp_path: object) -> None:
    torch.manual_seed(0)
    model = Block(128).eval()
    with torch.no_grad():
        model.up.weight[:6] *= 30
        model.down.weight[:, :6] /= 30
    generator = torch.Generator().manual_seed(0)
    data = [torch.randn(4, 33, 128, generator=generator) for _ in range(2)]

    program = fxq.compress(model, data[0], smoothquant.W8A8, data)
    path = f"{tmp_path}/program.safetensors"
    fxq.save(program, path)
    loaded = fxq.load(path)
    compiled = torch.compile(program, backend="fxq")

    assert torch.equal(program(data[1]), loaded(data[1]))
    assert str(fxq.report(loaded)) == str(fxq.report(program))
    assert "SmoothQuant (quantizer)" in str(fxq.report(program))
    exact = model(data[1])
    simulated, fast = sqnr_db(exact, program(data[1])), sqnr_db(exact, compiled(data[1]))
    assert simulated > 45  # measured 49.8 dB; plain W8A8: 27.8
    assert abs(simulated - fast) < 0.5
