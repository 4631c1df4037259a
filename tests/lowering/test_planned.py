"""Operators whose outputs Inductor plans: what they write where, and that no result is lost."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._inductor.utils import run_and_get_code

import fxq
from fxq.lowering import int8_conv, int8_linear  # noqa: F401  registers them
from fxq.lowering import weight_only_linear as weight_only
from fxq.lowering.registering import with_out
from fxq.passes import w8a8

ops = torch.ops.fxq


def arguments(name: str) -> tuple[Any, ...]:
    """Arguments of an operator."""
    codes = torch.randint(-128, 128, (2, 3, 40), dtype=torch.int8)
    weight = torch.randint(-8, 8, (24, 40), dtype=torch.int8)
    one = torch.tensor([[0.01]])
    match name:
        case "fxq::int8_linear":
            return codes, one, None, weight, one, torch.randn(24), torch.float32, "relu"
        case "fxq::int8_conv":
            image, kernel = codes.mT[..., None], weight[:, :, None, None]
            geometry = ([1, 1], [0, 0, 0, 0], [1, 1], 1)
            return image, one, None, kernel, one.reshape(1, 1, 1, 1), None, *geometry
        case "fxq::weight_only_linear":
            packed = weight_only.pack(weight, one, None)
            return torch.randn(2, 3, 40), *packed, torch.randn(24), 24
    raise AssertionError(f"a new operator, {name}: give its arguments")


@pytest.mark.parametrize("op", with_out, ids=str)
@pytest.mark.parametrize("spread", [False, True], ids=["contiguous", "strided"])
def test_variant_writes_where_it_is_told(op: torch._ops.OpOverload, spread: bool) -> None:
    args = arguments(op.name())
    expected = op(*args)
    out = torch.full_like(expected, torch.nan)
    if spread:
        memory = torch.full((*expected.shape, 2), torch.nan)
        out = memory[..., 0]

    found = getattr(torch.ops.fxq, op._schema.name.split("::")[1]).out(*args, out=out)

    assert found is out
    assert torch.equal(out, expected)
    if spread:
        assert memory[..., 1].isnan().all()


def chain(layer: type[nn.Module], *size: int) -> tuple[nn.Module, Tensor]:
    """Layers of one width, whose values can follow each other in one place in memory."""
    torch.manual_seed(0)
    kernel = size if layer is nn.Conv2d else ()
    make = [layer(256, 256, *kernel[:1]) for _ in range(4)]
    example = torch.randn(2, 256, 24, 24) if layer is nn.Conv2d else torch.randn(2, 512, 256)
    return nn.Sequential(*(part for one in make for part in (one, nn.ReLU()))).eval(), example


@pytest.mark.parametrize("layer", [nn.Linear, nn.Conv2d])
def test_compiled_code_writes_into_memory_it_has_planned(layer: type[nn.Module]) -> None:
    model, x = chain(layer, 1)
    program = fxq.compress(model, x, w8a8.STATIC_CONV, data=[(x,)])
    compiled = torch.compile(program, backend="fxq")
    name = "int8_conv" if layer is nn.Conv2d else "int8_linear"
    others = [torch.randn_like(x) for _ in range(3)]

    with torch.no_grad():
        first, (code,) = run_and_get_code(compiled, x)
        kept = first.clone()
        results = [compiled(other) for other in others]

    if f"fxq.{name}" not in code:
        pytest.skip("this processor has no int8 kernel")
    assert f"torch.ops.fxq.{name}.out(" in code
    assert f"torch.ops.fxq.{name}.default(" not in code
    assert torch.equal(first, kept)  # a result is nobody's next buffer
    for other, found in zip(others, results, strict=True):
        assert fxq.numerics.sqnr_db(program(other), found) > 35


@pytest.mark.slow
def test_inductors_cpp_wrapper_has_operators_allocate_their_outputs() -> None:
    model, x = chain(nn.Linear)
    program = fxq.compress(model, x, w8a8.STATIC, data=[(x,)])
    options = {"inductor": {"cpp_wrapper": True}}
    with torch.no_grad():
        found = torch.compile(program, backend="fxq", options=options)(x)

        assert fxq.numerics.sqnr_db(program(x), found) > 35
