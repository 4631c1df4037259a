"""Sequences that the operator takes in another form than the model: text that only is seen, text on
both sides, as much text as the data say."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sparse_models import DENSE, SMALL, compress_each, reasons, sparse_nodes
from torch import Tensor, nn
from torch.fx import GraphModule

from fxq.account import account
from fxq.bound_graph import BoundGraph
from fxq.graph import args_of
from fxq.passes.rectified_spaattn import ReplaceAttention
from fxq.pipeline import Recipe


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


class AsMuchText(nn.Module):
    """Two layers of attention over an image and as much of the text as is valid, cut off: a part of
    it in front, or what a mask selects."""

    def __init__(self, how: str, order: str = "image, text") -> None:
        super().__init__()
        self.how, self.order = how, order
        self.embed, self.embed_text = nn.Conv2d(4, 32, 2, 2), nn.Linear(24, 32)
        self.mix = nn.ModuleList(nn.Linear(32, 96) for _ in range(2))
        self.out = nn.Linear(32, 16)

    def cut(self, text: Tensor, valid: Tensor) -> Tensor:
        if self.how == "selected":
            return text[:, valid[0].nonzero().flatten()]
        return text[:, : int(valid.sum())]

    def forward(self, image: Tensor, text: Tensor, before: Tensor, valid: Tensor) -> Tensor:
        x, n_before = self.embed(image).flatten(2).transpose(1, 2), 0
        rest = self.cut(self.embed_text(text), valid)
        for layer in self.mix:
            parts = {"image": x, "text": rest, "before": self.embed_text(before)}
            if self.how == "image":
                parts["image"] = self.cut(x, valid)
            names = self.order.split(", ")
            n_before = before.shape[1] if names[0] == "before" else 0
            joint = torch.cat([parts[name] for name in names], 1)
            q, k, v = layer(joint).unflatten(-1, (3, 2, 16)).permute(2, 0, 3, 1, 4)
            h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
            if names[-2:] != ["image", "text"] or self.how == "image":
                return self.out(h[:, :4])
            x = x + h[:, n_before : n_before + x.shape[1]]
            rest = rest + h[:, n_before + x.shape[1] :]
        return self.out(x)


def cut_text(n_valid: int = 5) -> dict[str, Tensor]:
    valid = torch.zeros(1, 9, dtype=torch.bool)
    valid[0, torch.randperm(9)[:n_valid]] = True
    image, text = torch.randn(1, 4, 12, 16), torch.randn(1, 9, 24)
    return {"image": image, "text": text, "before": torch.randn(1, 3, 24), "valid": valid}


class Judged(BoundGraph):
    """Runs a graph of Dynamo's with its attention replaced; so there are sizes by data."""

    recipe: Recipe
    made: GraphModule

    def make(self, bound: GraphModule, inputs: Sequence[Any], args: Sequence[Any]) -> Any:
        made = self.made = self.recipe.apply(bound)
        return lambda args: made(*(args[i] for i in self.live))


def compiled(model: nn.Module, attention: ReplaceAttention) -> tuple[Any, list[Judged]]:
    """Return what runs, and the graphs it makes when it is first called."""
    graphs: list[Judged] = []

    def backend(gm: GraphModule, inputs: Sequence[Any]) -> Any:
        graphs.append(Judged(gm))
        graphs[-1].recipe = Recipe("test", (attention,))
        return graphs[-1]

    torch._dynamo.reset()
    with torch._dynamo.config.patch(
        capture_scalar_outputs=True, capture_dynamic_output_shape_ops=True
    ):
        run = torch.compile(model.eval(), backend=backend, fullgraph=True)
        with torch.no_grad():
            run(**cut_text())
    return run, graphs


@pytest.mark.parametrize("how", ["first", "selected"])
@pytest.mark.parametrize("order", ["image, text", "before, image, text"])
def test_text_may_be_as_long_as_the_data_say(how: str, order: str) -> None:
    model = AsMuchText(how, order)

    run, (judged,) = compiled(model, DENSE)

    nodes = sparse_nodes(judged.made)
    assert [args_of(n)[7:9] for n in nodes] == [(48, 9 + 3 * (order != "image, text"))] * 2
    assert all(args_of(n)[5] is not None for n in nodes)  # the image's grid
    for n_valid in (5, 9, 1, 2):
        example = cut_text(n_valid)
        with torch.no_grad():
            torch.testing.assert_close(run(**example), model(**example), atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("order", ["image, text", "before, image, text"])
def test_cut_text_is_padded_text_to_the_method(order: str) -> None:
    """Below a density of 1 the result is that of as many text tokens, none of them cut off."""
    model = AsMuchText("first", order)
    example = cut_text(6)
    whole = {**example, "text": example["text"][:, :6], "valid": torch.ones(1, 6) > 0}

    run, _ = compiled(model, SMALL)
    with torch.no_grad():
        found, dense = run(**example), model(**example)
    run, _ = compiled(model, SMALL)
    with torch.no_grad():
        torch.testing.assert_close(run(**whole), found, atol=2e-6, rtol=1e-5)
    assert 1e-4 < (found - dense).abs().max() < 1


@pytest.mark.parametrize(
    ("how", "order"),
    [("first", "text, image"), ("first", "image, text, before"), ("image", "image, before")],
)
def test_what_moves_with_the_data_stays_dense(how: str, order: str) -> None:
    _, (judged,) = compiled(AsMuchText(how, order), DENSE)

    assert not sparse_nodes(judged.made)
    (skip,) = (row.skip for row in account(judged.made) if row.kind == "attention")
    assert skip is not None
    assert skip.reason.startswith("a size of it depends on the data")
