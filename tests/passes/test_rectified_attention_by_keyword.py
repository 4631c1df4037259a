"""`rectified_attention` by keyword, against torch's attention and the pass."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparse_models import JointAttention, below_length, joint_inputs
from torch import Tensor

import fxq
from fxq.passes.rectified_spaattn import ReplaceAttention, rectified_attention
from fxq.pipeline import Recipe


def qkv(n_tokens: int = 79, heads: int = 2) -> list[Tensor]:
    return [torch.randn(2, n, n_tokens, 16) for n in (2, heads, heads)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"text_size": 7, "grid": (3, 4, 6)},
        {"text_size": 7, "grid": (3, 4, 6), "text": "first", "block_size": 4},
        {"scale": 0.3, "is_causal": True, "block_size": 16},
    ],
)
def test_density_of_one_is_torchs_attention(options: dict[str, Any]) -> None:
    q, k, v = qkv(heads=1)

    found = rectified_attention(q, k, v, density=1.0, **options)

    how = {name: options[name] for name in ("scale", "is_causal") if name in options}
    expected = F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("text", ["first", "last"])
def test_padding_is_hidden(text: Any) -> None:
    q, k, v = qkv()
    text_len = torch.tensor([7, 3], dtype=torch.int32)

    found = rectified_attention(q, k, v, density=1.0, text=text, text_size=7, text_len=text_len)

    valid = torch.arange(7) < text_len[:, None]
    parts = [torch.ones(2, 72, dtype=torch.bool), valid]
    mask = torch.cat(parts if text == "last" else parts[::-1], 1)[:, None, None]
    expected = F.scaled_dot_product_attention(q, k, v, mask)
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("mode", ["paper", "online", "sparse"])
def test_its_defaults_are_those_of_the_pass(mode: Any) -> None:
    attention = ReplaceAttention(density=0.2, mode=mode, min_tokens=8, block_size=4)
    model, example = JointAttention("last", below_length).eval(), joint_inputs()
    program = fxq.compress(model, example, Recipe("test", (attention,)), strict=True)

    def by_keyword(q: Tensor, k: Tensor, v: Tensor, *rest: Any, **options: Any) -> Tensor:
        text_len = example["valid"].sum(1, dtype=torch.int32)
        return rectified_attention(
            q, k, v, mode=mode, grid=(3, 4, 6), text_size=7, text_len=text_len, block_size=4
        )

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        expected = program(**example)
        patch.setattr(F, "scaled_dot_product_attention", by_keyword)
        found = model(**example)

    assert torch.equal(found, expected)


def test_its_arguments_are_checked() -> None:
    q, k, v = qkv()

    with pytest.raises(ValueError, match="text: expected 'first' or 'last', found 'middle'"):
        rectified_attention(q, k, v, text="middle")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="grid: expected none with is_causal"):
        rectified_attention(q, k, v, grid=(1, 1, 79), is_causal=True)
    with pytest.raises(ValueError, match="order: expected shape"):
        rectified_attention(q, k, v, grid=(1, 1, 78))
