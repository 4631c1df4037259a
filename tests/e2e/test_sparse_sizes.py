"""Sparse attention over several resolutions and prompts in one process, with Dynamo's free sizes.

Inductor does not take part: its place has the lowered graph as it is. The judge is the eager model,
whose attention is that of density 1.
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_models import ZOO, seeded
from sparse_models import DENSE, JointAttention, below_length, joint_inputs
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from fxq import backend
from fxq.errors import FxqWarning
from fxq.graph import is_op
from fxq.lowering.apply_where_it_pays import Applied
from fxq.operators import DENSE_ATTENTION, SPARSE_ATTENTION
from fxq.passes.rectified_spaattn import ReplaceAttention
from fxq.pipeline import Recipe


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> list[GraphModule]:
    """What the recipe made of every graph of Dynamo's."""
    made: list[GraphModule] = []
    apply = backend.apply_where_it_pays

    def recording(*args: Any) -> Applied:
        made.append((applied := apply(*args)).quantized)
        return applied

    monkeypatch.setattr(backend, "apply_where_it_pays", recording)
    monkeypatch.setattr(backend, "compile_fx", lambda gm, *args, **kwargs: gm)
    return made


def compiled(model: Any, attention: ReplaceAttention, **options: Any) -> Any:
    settings = {"recipe": Recipe("test", (attention,))}
    return torch.compile(model, backend="fxq", fullgraph=True, options=settings, **options)


def check(fast: Any, model: Any, example: dict[str, Any]) -> None:
    with torch.no_grad():
        expected, found = (tree_leaves(f(**example))[0] for f in (model, fast))
    torch.testing.assert_close(found, expected, atol=5e-6, rtol=1e-4)


def count(gm: GraphModule, *targets: Any) -> int:
    return sum(is_op(node, *targets) for node in gm.graph.nodes)


def wan(frames: int, width: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, 4, frames, 8, width),
        "encoder_hidden_states": torch.randn(1, text, 24),
    }


def flux(visual: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, visual, 8), "img_ids": torch.randn(visual, 3),
        "encoder_hidden_states": torch.randn(1, text, 24), "txt_ids": torch.zeros(text, 3),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("family", "calls", "n_graphs", "n_attention"),
    [
        # The prompt is no part of Wan's self-attention: its length stays free.
        ("wan", [wan(2, 8, 5), wan(2, 12, 7), wan(2, 12, 9), wan(2, 8, 9), wan(3, 8, 9)], 4, 1),
        pytest.param(
            "flux",
            [flux(16, 5), flux(24, 7), flux(16, 7), flux(24, 5), flux(24, 7)],
            4,
            2,
            marks=pytest.mark.slow,
        ),
    ],
)
def test_resolutions_and_prompts_of_one_process_keep_attention_sparse(
    family: str,
    calls: Sequence[dict[str, Any]],
    n_graphs: int,
    n_attention: int,
    graphs: list[GraphModule],
) -> None:
    model, example = seeded(ZOO[family])
    fast = compiled(model, DENSE)

    for call in calls:
        check(fast, model, example | call)

    assert len(graphs) == n_graphs
    assert all(count(gm, SPARSE_ATTENTION) == n_attention for gm in graphs)


def text_of(n_text: int) -> dict[str, Any]:
    return joint_inputs(n_text, (n_text, 3))


def test_all_free_sizes_but_the_numbers_of_tokens_stay_free(graphs: list[GraphModule]) -> None:
    model = JointAttention().eval()
    fast = compiled(model, DENSE, dynamic=True)

    for n_batch in (2, 3, 4):
        check(fast, model, joint_inputs(7, (7, 3, 5, 1)[:n_batch]))

    assert [count(gm, SPARSE_ATTENTION) for gm in graphs] == [1]


def test_short_sequences_share_a_graph_that_long_ones_do_not_get(graphs: list[GraphModule]) -> None:
    model = JointAttention().eval()
    fast = compiled(model, replace(DENSE, min_tokens=80), dynamic=True)

    with pytest.warns(FxqWarning, match="dense is faster below 80"):
        check(fast, model, text_of(5))
    check(fast, model, text_of(6))
    check(fast, model, text_of(9))

    assert [count(gm, SPARSE_ATTENTION) for gm in graphs] == [0, 1]


def test_after_a_handful_of_sizes_the_last_graph_says_that_it_is_dense(
    graphs: list[GraphModule],
) -> None:
    model = JointAttention().eval()
    fast = compiled(model, DENSE)

    with torch._dynamo.config.patch(recompile_limit=3):
        check(fast, model, text_of(5))
        check(fast, model, text_of(6))
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", FxqWarning)
            check(fast, model, text_of(8))
        check(fast, model, text_of(9))

    texts = [str(w.message) for w in told if issubclass(w.category, FxqWarning)]
    assert "recompile_limit" in texts[0]
    assert "a free number of tokens" in texts[1]
    assert [count(gm, SPARSE_ATTENTION) for gm in graphs] == [1, 1, 0]
    assert count(graphs[-1], *DENSE_ATTENTION) == 1


def test_a_size_that_the_user_marks_as_dynamic_stays_free(graphs: list[GraphModule]) -> None:
    model, example = JointAttention().eval(), text_of(6)
    for name in ("text", "valid"):
        torch._dynamo.mark_dynamic(example[name], 1)

    with pytest.warns(FxqWarning, match="a free number of tokens; fix it"):
        check(compiled(model, DENSE), model, example)

    assert count(graphs[0], *DENSE_ATTENTION) == 1


def test_the_log_says_what_was_replaced_once_per_graph(
    graphs: list[GraphModule], caplog: pytest.LogCaptureFixture
) -> None:
    model = JointAttention("last", below_length).eval()
    fast = compiled(model, DENSE)
    caplog.set_level("INFO", "fxq.backend")

    check(fast, model, text_of(7))
    check(fast, model, text_of(7))

    found = [r.getMessage() for r in caplog.records if r.name == "fxq.backend"]
    (line,) = [line for line in found if "sparse" in line]
    assert line.startswith("recipe 'test': 1 of attention sparse 100%, paper (7 text tokens last")
    assert "padding counted, grid 3x4x6 in curve order): scaled_dot_product_attention" in line
