"""Switches for the precision of products change nothing that attention selects or gives back."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from fxq.numerics import product
from fxq.rectified_attention import reference
from fxq.rectified_attention.layout import BlockLayout
from fxq.rectified_attention.pooling import pool_blocks

PRODUCTS = {"mm", "bmm", "addmm", "baddbmm"}


def tf32(x: Any) -> Any:
    """Return fp32 tensors with 10 bits of mantissa, as tensor cores read them under TF32."""
    if not isinstance(x, Tensor) or x.dtype != torch.float32:
        return x
    return (x.view(torch.int32) + 0x1000 & ~0x1FFF).view(torch.float32)


class Tf32(TorchDispatchMode):
    """Every fp32 product is TF32, as `allow_tf32` has it on a GPU."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            args = tree_map(tf32, args)
        return func(*args, **(kwargs or {}))


class Seen(TorchDispatchMode):
    """Note the dtypes of products."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.overloadpacket.__name__ in PRODUCTS:
            self.dtypes |= {x.dtype for x in args if isinstance(x, Tensor)}
        return func(*args, **(kwargs or {}))


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 16 * 64 + 9, 32, generator=generator) for _ in range(3))
    return q, k + 3, v  # an offset, which makes the roundings of products large


def plan(mode: str) -> reference.Plan:
    q, k, v = inputs()
    layout = BlockLayout(q.shape[2], 16 * 64, 9, 16)
    return reference.plan(
        q, k, v, torch.tensor(0.2), layout.text_mask(None, 1, q.device), None, layout, 0.3, mode,
        "complement", mode == "paper", True, False, 32**-0.5,
    )  # fmt: skip


def test_the_simulated_switch_changes_fp32_products_and_not_ours() -> None:
    q, k, _ = inputs()
    plain, ours = q @ k.mT, product(q, k.mT)

    with Tf32():
        assert not torch.equal(q @ k.mT, plain)
        assert torch.equal(product(q, k.mT), ours)


@pytest.mark.parametrize("mode", ["paper", "online", "sparse"])
def test_the_definition_selects_the_same_blocks(mode: str) -> None:
    expected = plan(mode)
    with Tf32():
        found = plan(mode)

    for name in ("selected", "compensated", "ratio", "correction", "p_text"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name


def test_the_definition_attends_in_float64_on_a_gpu() -> None:
    with FakeTensorMode(), Seen() as seen:
        q, k, v, bias = (torch.empty(5, 5, device="cuda") for _ in range(4))
        for given in (None, bias):
            out, lse = reference.attend(q, k, v, given)
            assert out.dtype == lse.dtype == torch.float32

    assert seen.dtypes == {torch.float64}


def test_what_the_kernels_are_given_is_the_same() -> None:
    pytest.importorskip("triton")
    from fxq.lowering.kernels import rectified_attention as kernels

    def all_products() -> list[Tensor]:
        q, k, v = inputs()
        counts = torch.full((64,), 16.0)
        stats = [pool_blocks(x[:, :, :1024], counts, 16) for x in (q, k, v)]
        options = itertools.product([False, True], [False, True])
        found = [
            part
            for gate, center in options
            for part in kernels.pair_products(*stats[:2], counts, gate=gate, center_keys=center)
            if part is not None
        ]
        found.append(kernels.text_log_sum_exp(stats[0].mean, k[:, :, 1024:], None, 0.2))
        ratio = torch.empty(2 * 64 + 1)
        given = torch.rand(1, 2, 64, 64, generator=torch.Generator().manual_seed(1))
        selection = kernels.Selection(ratio.int(), ratio.int(), ratio, given)
        return [*found, kernels.corrections(selection, stats[2].mean)]

    expected = all_products()
    with Tf32():
        found = all_products()

    assert len(expected) == 1 + 1 + 3 + 5 + 2
    assert all(map(torch.equal, found, expected))
