"""The pruning example runs as it is, and its numbers make sense."""

import sysconfig
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.graph import weight_of
from fxq.layer import Concentration, Induction, layer_of

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")


class Knows(nn.Module):
    """Gives the next character a logit, and all others 0; it knows the text."""

    def __init__(self, logit: float) -> None:
        super().__init__()
        self.logit = logit

    def forward(self, input_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        logits = torch.zeros(*input_ids.shape, 96)
        logits[:, :-1].scatter_(-1, input_ids[:, 1:, None], self.logit)
        return SimpleNamespace(logits=logits)


@pytest.mark.slow
def test_the_pruning_example_measures_draws_and_writes(tmp_path: Path) -> None:
    from docstring_llama import CHARACTERS, encoded
    from prune_language_model import PROMPT, QUICK, main, site_losses

    picture = tmp_path / "picture.png"

    result = main(["--quick", "--figure", str(picture)])

    assert result.dense.perplexity < len(CHARACTERS) / 2  # it has learned something
    assert list(result.pairs) == [(name, "2:4") for name in ("Magnitude", "Wanda", "SparseGPT")]
    for pair in result.pairs.values():
        for program, quality in zip(pair.programs, pair.quality, strict=True):
            assert [row.sparsity for row in fxq.report(program).rows if row.sparsity] == [0.5] * 7
            assert quality.perplexity == pytest.approx(result.dense.perplexity, rel=0.1)
    program = result.pairs["Magnitude", "2:4"].programs[1]
    pruned = [n for n in program.graph_module.graph.nodes if layer_of(n).mask is not None]
    for node in pruned:
        assert int((weight_of(node).unflatten(1, (-1, 4)) != 0).sum(-1).max()) == 2
    assert len(result.induced) == len(pruned) == 7
    losses = site_losses(list(result.induced.values()))
    assert all(after <= before for before, after in losses.values())
    best = min(result.pairs.values(), key=lambda pair: pair.quality[1].perplexity).programs[1]
    text = encoded(PROMPT)
    for _ in range(QUICK.written):
        chosen = best(input_ids=text[None], use_cache=False).logits[0, -1].argmax()
        text = torch.cat([text, chosen[None]])
    assert torch.equal(result.written, text)
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_perplexity_and_accuracy_are_those_of_the_definition() -> None:
    from prune_language_model import judge

    ids = torch.randint(1, 96, (3, 7))

    uniform, right = judge(Knows(0.0), ids), judge(Knows(2.0), ids)

    assert uniform.perplexity == pytest.approx(96)
    assert uniform.accuracy == 0  # the first of equal ones is 0, which no character here is
    assert right.perplexity == pytest.approx((torch.e**2 + 95) / torch.e**2)
    assert right.accuracy == 1


def test_every_fifth_module_judges_and_unknown_characters_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from docstring_llama import decoded, docstrings

    for k in range(6):
        source = f'"""Module {k}é."""\ndef f():\n    """Function {k}."""\n'
        (tmp_path / f"m{k}.py").write_text(source, encoding="utf-8")
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})

    train, others = docstrings()

    texts = [f"Module {k}.\n\nFunction {k}." for k in range(6)]
    assert decoded(others) == texts[4]
    assert decoded(train) == "\n\n".join(texts[:4] + texts[5:])
    assert decoded(docstrings(2)[0]) == "\n\n".join(texts[:2])


def test_the_loss_of_a_site_is_that_of_its_layers() -> None:
    from prune_language_model import site_losses

    flat = Concentration(0.0, 0.0, 1.0)
    layers = [
        Induction(("a, b",), 1.0, 2.0, flat, flat),
        Induction(("c",), 5.0, 6.0, flat, flat),
        Induction(("a, b",), 3.0, 4.0, flat, flat),
    ]

    assert site_losses(layers) == {"a, b": (6.0, 4.0), "c": (6.0, 5.0)}
