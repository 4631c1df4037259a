"""The rule for CUDA, without one: what the kernel's epilogue takes in. The op runs on its reference
here."""

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
