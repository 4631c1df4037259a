"""The operator `fxq::rectified_attention`: registered as torch wants it, in its dialects, in the
account, and in a file."""

from pathlib import Path

import pytest
import torch
from sparse_attention import compressed
from torch import Tensor
from torch.library import opcheck

import fxq
from fxq.account import account
from fxq.dialect import ATEN, LOWERED, QUANTIZED
from fxq.errors import PassError
from fxq.rectified_attention import reference

OP = torch.ops.fxq.rectified_attention
SETTINGS = (0.3, "paper", "complement", True, False)


def inputs(n_tokens: int = 37, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    shapes = ((2, 4, n_tokens, 8), (2, 2, n_tokens, 8), (2, 2, n_tokens, 6))
    return [torch.randn(shape, dtype=dtype) for shape in shapes]


@pytest.mark.parametrize("mode", ["paper", "online", "sparse"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_op_passes_opcheck_and_equals_its_definition(dtype: torch.dtype, mode: str) -> None:
    q, k, v = inputs(dtype=dtype)
    text_len = torch.tensor([5, 0], dtype=torch.int32)
    order = torch.randperm(32)
    adjacency = torch.eye(8, dtype=torch.bool)
    rest = (0, 5, 4, 0.3, mode, "complement", True, False, False, None)
    args = (q, k, v, torch.tensor(0.3), text_len, order, adjacency, *rest)

    out, lse = OP(*args)

    expected, expected_lse = reference.rectified_attention(*args)
    assert torch.equal(out, expected)
    assert torch.equal(lse, expected_lse)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    opcheck(OP, args)


def test_strided_inputs_are_read_as_they_lie() -> None:
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs())
    rest = (torch.tensor(0.3), None, None, None, 0, 0, 4, *SETTINGS, False, None)

    found, _ = OP(q, k, v, *rest)

    expected, _ = OP(*(x.contiguous() for x in (q, k, v)), *rest)
    assert torch.equal(found, expected)
    assert found.transpose(1, 2).is_contiguous()  # merging heads copies nothing
    assert expected.is_contiguous()
    opcheck(OP, (q, k, v, *rest))


@pytest.mark.parametrize("mode", ["paper", "online"])
@pytest.mark.parametrize("text_start", [0, 32])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_density_of_one_is_what_keeping_every_block_is(
    dtype: torch.dtype, text_start: int, mode: str
) -> None:
    """On a CPU torch computes the one, and the definition the other."""
    q, k, _ = inputs(dtype=dtype)
    v = torch.randn_like(k)
    text_len = torch.tensor([5, 0], dtype=torch.int32)
    how = (4, 0.3, mode, "complement", True, False, False, None)
    args = (q, k, v, torch.tensor(1.0), text_len, torch.randperm(32), None, text_start, 5, *how)

    out, lse = OP(*args)

    almost = torch.tensor(1 - 1e-6)  # of 8 blocks all 8
    expected, expected_lse = reference.rectified_attention(*args[:3], almost, *args[4:])
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(out, expected, atol=bound, rtol=bound)
    torch.testing.assert_close(lse, expected_lse, atol=1e-5, rtol=1e-5)
    assert out.stride() == expected.stride()
    opcheck(OP, args)


def test_no_input_is_written_to() -> None:
    q, k, v = inputs()
    text_len = torch.tensor([1, 3], dtype=torch.int32)
    density = torch.tensor(0.3)
    tensors = [q, k, v, density, text_len]
    before = [x.clone() for x in tensors]

    OP(*tensors, None, None, 0, 5, 4, *SETTINGS, False, None)

    assert all(torch.equal(a, b) for a, b in zip(tensors, before, strict=True))


def test_a_gradient_is_refused_rather_than_wrong() -> None:
    q, k, v = inputs()

    out, _ = OP(
        q.requires_grad_(), k, v, torch.tensor(0.3), None, None, None, 0, 0, 4, *SETTINGS,
        False, None,
    )  # fmt: skip

    with pytest.raises(RuntimeError, match="autograd"):
        out.sum().backward()


def test_op_belongs_to_quantized_and_lowered_but_not_to_aten() -> None:
    gm = compressed().graph_module

    QUANTIZED.check(gm)
    LOWERED.check(gm)
    with pytest.raises(PassError, match="none yet"):
        ATEN.check(gm)


def test_account_says_how_sparse_and_counts_the_dense_operations() -> None:
    (row,) = account(compressed().graph_module)

    assert (row.kind, row.format, row.skip) == ("attention", "sparse (paper), density 0.25", None)
    assert row.flops == 2 * 2 * (2 * 2 * 16 * 16 * 8)  # two products of 2 x 2 heads, 16 x 16 x 8


def test_account_of_a_density_that_is_computed() -> None:
    (row,) = account(compressed(by_policy=True).graph_module)

    assert row.format == "sparse (paper), density by policy"


def test_report_lists_the_attention_with_what_computes_it() -> None:
    (row,) = fxq.report(compressed()).rows

    assert row.kernel == "rectified_attention (torch)"
    assert row.row.format == "sparse (paper), density 0.25"


@pytest.mark.parametrize("mode", ["paper", "online"])
def test_exported_graph_serves_every_length_and_density(mode: str) -> None:
    class Model(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor, density: Tensor) -> Tensor:
            how = (0.3, mode, "complement", True, False, False, None)
            return OP(q, k, v, density, None, None, None, 0, 5, 4, *how)[0]

    length = torch.export.Dim("length", min=8, max=100)
    shapes = (*({2: length},) * 3, None)
    exported = torch.export.export(
        Model(), (*inputs(), torch.tensor(0.3)), dynamic_shapes=shapes
    ).module()

    for n_tokens, density in ((37, 1.0), (50, 0.2), (11, 0.5)):
        args = (*inputs(n_tokens), torch.tensor(density))
        assert torch.equal(exported(*args), Model()(*args))


def test_a_file_holds_the_op(tmp_path: Path) -> None:
    program, x = compressed(), torch.randn(2, 2, 16, 8)
    fxq.save(program, tmp_path / "sparse.safetensors")

    loaded = fxq.load(tmp_path / "sparse.safetensors")

    assert torch.equal(loaded(x), program(x))
    assert account(loaded.graph_module) == account(program.graph_module)
