"""Conditions on free sizes: read from text without executing it, and kept by programs, judged by
the model in eager mode at sizes that the example does not have."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxq
from fxq.conditions import Condition, conditions_of
from fxq.numerics import sqnr_db


@pytest.mark.parametrize(
    ("text", "holds", "not_"),
    [
        ("64*s7 <= 1000", {"s7": 15}, {"s7": 16}),
        ("(s0 % 8) != 0", {"s0": 9}, {"s0": 16}),
        ("math.trunc(torch.sym_float(s0) ** 0.5) == 2", {"s0": 8}, {"s0": 9}),
        ("(s0 & (-1) + s0) != 0", {"s0": 6}, {"s0": 8}),
        ("s0 <= s1", {"s0": 3, "s1": 3}, {"s0": 4, "s1": 3}),
        ("2 < s0 < 5", {"s0": 4}, {"s0": 5}),
        ("not s0 == 3 and (s0 > 1 or s0 == 0)", {"s0": 0}, {"s0": 3}),
        ("8 % (2*s0) != 0", {"s0": 3}, {"s0": 0}),  # no value: does not hold
        ("s0 ** 40 > 0", {"s0": 2}, {"s0": 10}),  # too large to be worth computing
    ],
)
def test_values_by_hand(text: str, holds: dict[str, int], not_: dict[str, int]) -> None:
    assert Condition(text).holds(holds)
    assert not Condition(text).holds(not_)


@pytest.mark.parametrize(
    "text",
    ["__import__('os').system('true')", "s0.__class__", "(lambda: 1)()", "[s0][0]", "open(s0)",
     "s0 if s1 else 2", "s0 == 'a'", "s0 := 3", "", "s0 ==", "1 +" * 2000 + "1",
     "(" * 500 + "s0" + ")" * 500],
)  # fmt: skip
def test_text_that_is_no_arithmetic(text: str) -> None:
    with pytest.raises(ValueError, match=r"^condition: expected"):
        Condition(text)


def test_guards_of_export_as_conditions_and_the_rest_as_it_is() -> None:
    shapes = {"x": ("s0", 64), "cond['text']": (2, "s1")}
    guards = [
        "L['x'].size()[0]*L['cond']['text'].size()[1] < 400",
        "L['x'].size()[1] == 64",
        "L['x'].stride()[0] == 64",
        "L['y'].size()[0] == 1",
    ]
    conditions, others = conditions_of(guards, shapes)
    assert [condition.text for condition in conditions] == ["s0*s1 < 400", "64 == 64"]
    assert others == guards[2:]
    assert conditions[0].written({"s0": "x.shape[0]"}) == "x.shape[0]*s1 < 400"


class Net(nn.Module):
    def __init__(self, function: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.conv = nn.Linear(64, 64), nn.Conv2d(3, 8, 3, padding=1)
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def vector(batch: int) -> Tensor:
    return torch.randn(batch, 64)


def image(height: int, width: int) -> Tensor:
    return torch.randn(2, 3, height, width)


BATCH: Any = "batch"
IMAGE = {"x": {2: "h", 3: "w"}}
BRANCHES = [
    (lambda s, x: s.linear(x - x.mean(0) if x.shape[0] > 1 else x),
     vector, (4,), (9,), (1,), BATCH),
    (lambda s, x: s.linear(x[0] if x.size(0) == 1 else x), vector, (4,), (2,), (1,), BATCH),
    (lambda s, x: s.linear(x * 3 if x.numel() > 1000 else x), vector, (5,), (15,), (16,), BATCH),
    (lambda s, x: s.linear(x) * int(x.shape[0] ** 0.5), vector, (5,), (8,), (9,), BATCH),
    (lambda s, x: s.linear(x * 3 if x.shape[0] % 8 == 0 else x), vector, (5,), (15,), (16,), BATCH),
    (lambda s, x: s.linear(x * 3 if x.shape[0] == 7 else x), vector, (5,), (8,), (7,), BATCH),
    (lambda s, x: s.linear(x * 3 if x.shape[0] > 20 else x), vector, (5,), (20,), (21,), BATCH),
    (lambda s, x: s.conv(x.flip(-1) if x.shape[2] > x.shape[3] else x),
     image, (8, 12), (8, 8), (9, 8), IMAGE),
    (lambda s, x: s.conv(F.avg_pool2d(x, 2) if x.shape[2] * x.shape[3] >= 400 else x),
     image, (8, 12), (19, 21), (20, 20), IMAGE),
]  # fmt: skip


@pytest.mark.parametrize(("function", "make", "example", "same", "other", "shapes"), BRANCHES)
def test_sizes_that_take_another_branch_are_refused_and_others_computed(
    function: Any, make: Any, example: Any, same: Any, other: Any, shapes: Any, tmp_path: Path
) -> None:
    model = Net(function).eval()
    program = fxq.compress(model, make(*example), "float", dynamic_shapes=shapes)
    fxq.save(program, tmp_path / "p.fxq")
    for each in (program, fxq.load(tmp_path / "p.fxq")):
        x = make(*same)
        assert sqnr_db(model(x), each(x)) > 100
        with pytest.raises(ValueError, match="the model computes otherwise"):
            each(make(*other))


def test_a_condition_is_told_in_the_callers_words() -> None:
    program = fxq.compress(Net(BRANCHES[2][0]).eval(), vector(5), "float")
    with pytest.raises(ValueError, match=r"64\*x\.shape\[0\] <= 1000, found x\.shape\[0\] = 30"):
        program(vector(30))


def test_compiled_programs_keep_conditions_too() -> None:
    model = Net(BRANCHES[2][0]).eval()
    compiled = torch.compile(fxq.compress(model, vector(5), "float"), backend="fxq", fullgraph=True)
    x = vector(15)
    assert sqnr_db(model(x), compiled(x)) > 100
    with pytest.raises(Exception, match="the model computes otherwise"):
        compiled(vector(30))


def test_an_example_of_one_sample_that_branches_is_captured_for_one() -> None:
    model = Net(BRANCHES[0][0]).eval()
    program = fxq.compress(model, vector(1), "float")
    assert any("the batch is fixed at 1" in note for note in program.notes)
    x = vector(1)
    assert sqnr_db(model(x), program(x)) > 100
    with pytest.raises(ValueError, match="expected shape"):
        program(vector(2))


def test_one_sample_is_taken_where_the_model_computes_it_likewise() -> None:
    model = Net(lambda s, x: s.linear(x).relu()).eval()
    program = fxq.compress(model, vector(4), "float")
    x = vector(1)
    assert sqnr_db(model(x), program(x)) > 100
    assert program.signature.conditions == ()


def test_one_sample_is_taken_by_a_model_that_counts_its_calls() -> None:
    class Counts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(64, 64)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.calls.add_(1)
            return self.linear(x) * self.calls

    model = Counts().eval()
    program = fxq.compress(model, vector(4), "float")
    assert float(model.calls) == 0
    for batch in (1, 3, 1):
        x = vector(batch)
        assert sqnr_db(model(x), program(x)) > 100


def test_results_that_are_no_tensors_follow_the_sizes_or_are_refused() -> None:
    class Told(nn.Module):
        def __init__(self, text: bool) -> None:
            super().__init__()
            self.linear, self.text = nn.Linear(64, 64), text

        def forward(self, x: Tensor) -> dict[str, Any]:
            told = {"name": f"batch of {x.shape[0]}"} if self.text else {"shape": x.shape}
            return {"y": self.linear(x), **told}

    program = fxq.compress(Told(text=False).eval(), vector(3), "float")
    assert tuple(program(vector(5))["shape"]) == (5, 64)
    with pytest.raises(fxq.UnsupportedError, match="is 'batch of 3' against"):
        fxq.compress(Told(text=True).eval(), vector(3), "float")
