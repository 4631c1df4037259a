"""Capture compares its graph with the model: what no graph can know of is refused by name."""

import pytest
import torch
from torch import Tensor, nn

import fxq
from fxq.checking import difference, relative_difference
from fxq.errors import UnsupportedError


class Keeps(nn.Module):
    """A linear, and something kept in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.kept: object = None


class Past(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        h = self.layer(x)
        y = h if self.kept is None else h + self.kept
        self.kept = h
        return y


class Grows(Keeps):
    def forward(self, x: Tensor) -> Tensor:
        self.kept = [*(self.kept or []), self.layer(x)]  # type: ignore[misc]
        return torch.stack(self.kept).sum(0)


class Counts(Keeps):
    """Its 50th call is another: no number of calls that a check can afford would show it."""

    def forward(self, x: Tensor) -> Tensor:
        self.kept = (self.kept or 0) + 1  # type: ignore[operator]
        return self.layer(x) * (2 if self.kept > 50 else 1)


class Remembers(Keeps):
    """Makes a table once: every call gives the same."""

    def forward(self, x: Tensor) -> Tensor:
        if self.kept is None:
            self.kept = torch.arange(4.0)
        return self.layer(x) + self.kept


class Nested(nn.Module):
    """A submodule that assigns its buffer anew, which torch.export does not write back."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        self.inner.register_buffer("count", torch.zeros(1))
        self.inner.forward = self.step  # type: ignore[method-assign]

    def step(self, x: Tensor) -> Tensor:
        self.inner.count = self.inner.count + 1
        return x * self.inner.count

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


@pytest.mark.parametrize("kind", [Past, Grows, Counts])
def test_what_a_call_keeps_in_an_attribute_is_refused_by_name(kind: type[Keeps]) -> None:
    model = kind().eval()

    with pytest.raises(UnsupportedError, match="found that a call changes 'kept"):
        fxq.capture(model, torch.randn(2, 4))

    assert model.kept is None


def test_a_buffer_that_export_loses_is_refused_or_kept() -> None:
    model, x = Nested().eval(), torch.randn(2, 4)

    try:
        program = fxq.compress(model, x, "float")
    except UnsupportedError as error:
        assert "inner.count" in str(error)  # noqa: PT017  either is right
    else:
        assert torch.equal(torch.stack([program(x), program(x)]), torch.stack([x, 2 * x]))
    assert model.inner.count == 0


def test_a_table_made_once_is_noted() -> None:
    model, x = Remembers().eval(), torch.randn(2, 4)

    captured = fxq.capture(model, x)

    assert captured.notes == ("a call of the model sets kept, a call of the graph does not",)
    assert model.kept is None
    torch.testing.assert_close(captured.graph_module(x)[0], model(x))


def test_a_call_that_changes_something_else_is_refused() -> None:
    SCALES = [2.0]

    class Changes(nn.Module):
        """Reads something outside the module that its calls change."""

        def forward(self, x: Tensor) -> Tensor:
            SCALES.append(SCALES[-1] + 1)
            return x * SCALES[-1]

    with pytest.raises(UnsupportedError, match="found other results for"):
        fxq.capture(Changes().eval(), torch.randn(2, 4))


def test_a_branch_on_values_is_refused() -> None:
    class Branches(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.cond(x.sum() > 0, lambda y: y.sin(), lambda y: y * 2, (x,))

    with pytest.raises(UnsupportedError, match=r"found cond, which calls other graphs"):
        fxq.capture(Branches().eval(), torch.randn(2, 4))


@pytest.mark.parametrize(
    ("expected", "found", "relative"),
    [
        ([[3.0, 4.0], [3.0, 4.0]], [[3.0, 4.0], [3.0, 4.5]], 0.1),  # the worst sample counts
        ([[0.0, 0.0], [6.0, 8.0]], [[0.0, 1.0], [6.0, 8.0]], 0.2),  # against the mean size, 5
        ([[float("nan"), 4.0]], [[float("nan"), 4.0]], 0.0),
        ([[float("inf"), 4.0]], [[float("inf"), 4.0]], 0.0),
        ([[3.0, 4.0]], [[float("nan"), 4.0]], float("inf")),
    ],
)
def test_relative_difference_is_that_of_the_worst_sample(
    expected: list[list[float]], found: list[list[float]], relative: float
) -> None:
    assert relative_difference(torch.tensor(expected), torch.tensor(found)) == pytest.approx(
        relative
    )


def test_integers_must_be_equal() -> None:
    a = torch.tensor([1, 2, 3])

    assert difference([a], [a.clone()]) is None
    assert (
        difference([a], [a + torch.tensor([0, 0, 1])]) == "value 0 differs by 3.3e-01 of its size"
    )
    assert difference([a], [a.float()]) is not None
    assert difference([a], [a[:2]]) is not None


class Spread(nn.Module):
    """Takes a mask for all samples or one for each; a batch of one has no free choice."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        if mask.shape[0] == 1:
            return x * mask
        return x * mask[torch.arange(x.shape[0], device=x.device)]


def test_a_size_of_one_is_taken_where_all_of_the_batch_are_one() -> None:
    free = {"x": {0: "samples"}, "mask": {0: "masks"}}
    model = Spread().eval()
    program = fxq.compress(
        model, (torch.rand(2, 4), torch.rand(2, 4)), "float", dynamic_shapes=free
    )

    for size in (1, 2, 3):
        x, mask = torch.rand(size, 4), torch.rand(size, 4)
        assert torch.equal(program(x, mask), model(x, mask))
    with pytest.raises(ValueError, match=r"mask.* != 1 or x.* == 1"):
        program(torch.rand(2, 4), torch.rand(1, 4))
