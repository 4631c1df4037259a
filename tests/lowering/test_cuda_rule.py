"""The rule for CUDA, without one: what the kernel's epilogue takes in. The op runs on its reference
here."""

from typing import Any

import pytest
import torch
from models import Block

import fxq
from fxq.graph import is_op
from fxq.lowering.lower import lower
from fxq.numerics import sqnr_db
from fxq.passes import smoothquant, w8a8

OPS = torch.ops.fxq


def batches() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 9, 64, generator=generator) for _ in range(2)]


def block() -> torch.nn.Module:
    torch.manual_seed(0)
    model = Block().eval()
    with torch.no_grad():  # a GELU whose channels differ in size
        model.up.weight[:4] *= 30
        model.down.weight[:, :4] /= 30
    return model


def test_gelu_and_the_next_quantizer_go_into_the_epilogue() -> None:
    data = batches()
    program = fxq.compress(block(), data[0], w8a8.STATIC, data)

    lowered, decisions = lower(program.graph_module, torch.device("cuda"))

    kernels = [n for n in lowered.graph.nodes if is_op(n, OPS.int8_linear.default)]
    assert len(kernels) == 6
    assert {d.kernel for d in decisions.values() if d.kernel} == {"int8_linear (Triton)"}
    (up,) = [n for n in kernels if "gelu" in n.args]
    assert up.args[9].meta["val"].numel() == 1  # out_scale
    left = (torch.ops.aten.linear.default, torch.ops.aten.gelu.default)
    assert not [n for n in lowered.graph.nodes if is_op(n, *left)]
    assert sqnr_db(program(data[1]), lowered(data[1])[0]) > 60


def test_a_scale_per_channel_behind_gelu_goes_into_the_epilogue_too() -> None:
    data = batches()
    program = fxq.compress(block(), data[0], smoothquant.W8A8, data)

    lowered, _ = lower(program.graph_module, torch.device("cuda"))

    (up,) = [
        n for n in lowered.graph.nodes if is_op(n, OPS.int8_linear.default) and "gelu" in n.args
    ]
    assert up.args[9].meta["val"].shape == (1, 1, 128)
    assert not [n for n in lowered.graph.nodes if is_op(n, torch.ops.aten.gelu.default)]
    assert sqnr_db(program(data[1]), lowered(data[1])[0]) > 60


def decided(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], rows: int) -> Any:
    """Return the decisions on a block of a device of a compute capability."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
    data = [torch.randn(2, rows // 2, 64)]
    program = fxq.compress(block(), data[0], w8a8.STATIC, data)
    return [d for d in lower(program.graph_module, torch.device("cuda"))[1].values() if d.kernel]


@pytest.mark.parametrize(
    ("capability", "rows", "kernel", "why"),
    [
        ((9, 0), 130, "int8_linear (Triton, TMA)", ""),
        ((9, 0), 64, "int8_linear (Triton, by pointers)", "64 rows: as fast as the weight is read"),
        ((8, 0), 130, "int8_linear (Triton, by pointers)", "from sm_90 on, found sm_80"),
        ((10, 0), 130, "int8_linear (Triton, by pointers)", "those of sm_90, found sm_100"),
    ],
)
def test_the_report_names_the_kernel_and_why_it_is_not_the_faster_one(
    capability: tuple[int, int], rows: int, kernel: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("triton")

    found = decided(monkeypatch, capability, rows)

    assert {decision.kernel for decision in found} == {kernel}
    assert all(why in decision.reason for decision in found)
    assert all(bool(decision.reason) == bool(why) for decision in found)


def test_an_old_triton_and_odd_rows_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    from fxq.lowering.kernels import hardware
    from fxq.lowering.kernels.int8_linear import why_by_pointers

    device = torch.device("cpu")  # as in the interpreter, which has everything
    assert why_by_pointers(100, 64, 64, 1, device) is None
    assert why_by_pointers(100, 64, 65, 1, device) == (
        "rows of the input are no multiple of 16 bytes, found 65"
    )
    assert why_by_pointers(100, 65, 64, 2, device) == (
        "rows of the output are no multiple of 16 bytes, found 130"
    )
    monkeypatch.setattr(hardware, "TensorDescriptor", None)
    assert "has no tensor descriptors" in str(why_by_pointers(100, 64, 64, 1, device))
