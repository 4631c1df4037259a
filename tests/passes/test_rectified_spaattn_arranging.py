"""Sequences that the operator takes in another form than the model: text that only is seen, text on
both sides, as much text as the data say."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparse_models import DENSE, SMALL, compress_each, reasons, sparse_nodes
from torch import Tensor, nn

from fxq.graph import args_of


class TextAsKeys(nn.Module):
    """Every image token looks at the text and the image; the text asks nothing."""

    def __init__(self, text: str = "first", other_keys: bool = False) -> None:
        super().__init__()
        self.text, self.other_keys = text, other_keys
        self.embed = nn.Conv2d(4, 32, 2, 2)
        self.q, self.kv, self.text_kv = nn.Linear(32, 32), nn.Linear(32, 64), nn.Linear(24, 64)
        self.out = nn.Linear(32, 16)

    def forward(self, image: Tensor, text: Tensor, valid: Tensor | None = None) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        q, seen = self.q(x), self.kv(x.flip(1) if self.other_keys else x)
        joint = [self.text_kv(text), seen]
        k, v = torch.cat(joint if self.text == "first" else joint[::-1], 1).chunk(2, -1)
        q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in (q, k, v))
        mask = None
        if valid is not None:
            shown = [valid, valid.new_ones(x.shape[:2])]
            mask = torch.cat(shown if self.text == "first" else shown[::-1], 1)[:, None, None]
        h = F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)
        return self.out(x + h)


def image_and_text() -> dict[str, Tensor]:
    return {"image": torch.randn(2, 4, 12, 16), "text": torch.randn(2, 7, 24)}


@pytest.mark.parametrize("text", ["first", "last"])
@pytest.mark.parametrize("masked", [False, True])
def test_text_may_be_keys_and_values_only(text: str, masked: bool) -> None:
    model, example = TextAsKeys(text), image_and_text()
    if masked:
        example["valid"] = torch.rand(2, 7) > 0.4

    sparse, dense = compress_each(model, example, SMALL, DENSE)

    (node,) = sparse_nodes(sparse.graph_module)
    assert args_of(node)[7:9] == (0 if text == "first" else 48, 7)
    assert torch.equal(
        sparse.graph_module.get_buffer("curve_order").sort().values, torch.arange(48)
    )
    with torch.no_grad():
        expected = model(**example)
        torch.testing.assert_close(dense(**example), expected, atol=2e-6, rtol=1e-5)
        assert 1e-4 < (sparse(**example) - expected).abs().max() < 1


def test_visual_rows_are_those_of_a_joint_attention() -> None:
    """The paper's equations of a visual row know nothing of the text's queries."""

    class Joint(TextAsKeys):
        def forward(self, image: Tensor, text: Tensor, valid: Tensor | None = None) -> Tensor:
            x = self.embed(image).flatten(2).transpose(1, 2)
            k, v = torch.cat([self.text_kv(text), self.kv(x)], 1).chunk(2, -1)
            q = torch.cat([self.text_kv(text)[..., :32], self.q(x)], 1)
            q, k, v = (y.unflatten(-1, (2, 16)).transpose(1, 2) for y in (q, k, v))
            h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            return self.out(x + h[:, 7:])

    model, example = TextAsKeys(), image_and_text()
    joint = Joint()
    joint.load_state_dict(model.state_dict())

    (alone,), (beside,) = (compress_each(m, example, SMALL) for m in (model, joint))

    with torch.no_grad():
        torch.testing.assert_close(alone(**example), beside(**example), atol=2e-6, rtol=1e-5)


def test_keys_of_other_tokens_are_cross_attention() -> None:
    (program,) = compress_each(TextAsKeys(other_keys=True), image_and_text(), SMALL, strict=False)

    assert list(reasons(program).values()) == ["cross-attention: 48 queries, 55 keys"]


class Cross(TextAsKeys):
    """More text than image, and none of the image among the keys."""

    def forward(self, image: Tensor, text: Tensor, valid: Tensor | None = None) -> Tensor:
        x = self.embed(image).flatten(2).transpose(1, 2)
        q, (k, v) = self.q(x)[:, None], self.text_kv(text)[:, None].chunk(2, -1)
        return self.out(x + F.scaled_dot_product_attention(q, k, v)[:, 0])


def test_fewer_queries_than_keys_are_not_enough() -> None:
    example: dict[str, Any] = {**image_and_text(), "text": torch.randn(2, 70, 24)}

    (program,) = compress_each(Cross(), example, SMALL, strict=False)

    assert list(reasons(program).values()) == ["cross-attention: 48 queries, 70 keys"]
