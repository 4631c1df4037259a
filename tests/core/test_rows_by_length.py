"""Rows by the number of tokens of a call: the steps of a next-scale model, prompts and tokens."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from row_cases import quantized, recipe, weight_of
from torch import Tensor, nn

import fxq
from fxq.errors import FxqWarning
from fxq.numerics import sqnr_db
from fxq.rows import ByLength
from fxq.spec import PerToken, QuantSpec

LENGTHS = (1, 4, 9)
FREE = {"input": {0: "batch", 1: "tokens"}}


def of_length(tokens: int, seed: int = 0) -> Tensor:
    """A batch whose range grows with its length."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, tokens, 16, generator=generator) * 2.0**tokens**0.5


def by_length() -> tuple[nn.Sequential, Any]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 8)).eval()
    data = [of_length(tokens) for tokens in LENGTHS]
    return model, fxq.compress(model, data[1], recipe(ByLength(LENGTHS)), data, dynamic_shapes=FREE)


def test_number_of_rows() -> None:
    assert ByLength(LENGTHS).count == 3


@pytest.mark.parametrize(
    ("tokens", "row"), [(1, 1), (2, 4), (4, 4), (5, 9), (9, 9), (10, 9), (40, 9)]
)
def test_a_call_is_quantized_in_the_range_of_its_length(tokens: int, row: int) -> None:
    model, program = by_length()
    x, seen, linear = of_length(tokens, seed=9), of_length(row), model[0]
    assert isinstance(linear, nn.Linear)
    given = quantized(x, seen.min(), seen.max())
    expected = F.linear(given, weight_of(linear), linear.bias)
    torch.testing.assert_close(program(x), expected)


@pytest.mark.filterwarnings("ignore:no kernel here")
def test_it_is_saved_and_compiled_and_named_in_the_report(tmp_path: Path) -> None:
    model, program = by_length()
    fxq.save(program, tmp_path / "program.safetensors")
    loaded = fxq.load(tmp_path / "program.safetensors")
    compiled = torch.compile(program, backend="fxq")
    for tokens in (1, 4, 3, 9):
        x = of_length(tokens, seed=5)
        assert torch.equal(loaded(x), program(x))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), program(x))
        assert sqnr_db(model(x), program(x)) > 30
    (row,) = fxq.report(program).rows
    assert row.row.format == "int8 by length x int8"


def test_a_fixed_length_has_one_row() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8)).eval(), of_length(4)
    with pytest.warns(FxqWarning, match="no value in rows 0, 2.*or lengths"):
        program = fxq.compress(model, x, recipe(ByLength(LENGTHS)), [x], dynamic_shapes=None)
    assert sqnr_db(model(x), program(x)) > 30


def test_a_layer_without_tokens_has_one_range_and_says_so() -> None:
    model, x = nn.Sequential(nn.Linear(16, 8)).eval(), torch.randn(4, 16)
    program = fxq.compress(model, x, recipe(ByLength(LENGTHS)), [x])
    (row,) = fxq.report(program).rows
    assert "one scale for all rows: no token axis" in row.reason
    assert sqnr_db(model(x), program(x)) > 30


@torch.no_grad()
def test_graphs_of_all_lengths_that_are_observed_share_the_rows() -> None:
    model = nn.Sequential(nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 8)).eval()
    with fxq.observe(model, recipe(ByLength((1, 4)))) as seen:
        for tokens in (1, 4, 3):
            model(of_length(tokens))
    first = seen.layers[next(iter(seen.layers))].observer
    both = torch.cat([of_length(4).flatten(), of_length(3).flatten()])
    for row, x in enumerate((of_length(1), both)):
        found = float(first.low[row]), float(first.high[row])
        assert found == (float(x.min()), float(x.max()))


@pytest.mark.parametrize("lengths", [(), (4, 1), (1, 1), (0, 1), (1.0, 2.0), [1, 2], (True,)])
def test_lengths_that_are_none_are_refused(lengths: Any) -> None:
    with pytest.raises(ValueError, match=r"ByLength\.lengths: expected a tuple that ascends"):
        ByLength(lengths)


def test_a_scale_for_each_token_does_not_go_with_it() -> None:
    with pytest.raises(ValueError, match="rows by length go along tokens"):
        QuantSpec(granularity=PerToken(), rows=ByLength(LENGTHS))
