"""Which weights go: masks against the papers' equations, and exact counts."""

import pytest
import torch
from optimal_brain import correlated, damped, surgery
from torch import Tensor

from fxq.errors import PassError
from fxq.passes.common.second_moments import energy, gram
from fxq.passes.pruning import RIA, Group, Pattern, SparseGPT, Unstructured, Wanda

PATTERNS = [Unstructured(0.5), Unstructured(0.3, "layer"), Group(2, 4), Group(4, 8), Group(1, 3)]


def naive_mask(scores: Tensor, pattern: Pattern) -> Tensor:
    """Return True for what stays, one comparison at a time; the first of equal scores goes."""
    n, k = scores.shape
    mask = torch.ones(n, k, dtype=torch.bool)
    if isinstance(pattern, Unstructured) and pattern.per == "layer":
        places = sorted((float(scores[i, j]), i, j) for i in range(n) for j in range(k))
        for _, i, j in places[: int(pattern.sparsity * n * k)]:
            mask[i, j] = False
        return mask
    for i in range(n):
        if isinstance(pattern, Unstructured):
            parts = [([*range(k)], int(pattern.sparsity * k))]
        else:
            groups = [[*range(j, min(j + pattern.size, k))] for j in range(0, k, pattern.size)]
            parts = [(group, max(0, len(group) - pattern.kept)) for group in groups]
        for columns, gone in parts:
            for j in sorted(columns, key=lambda j, i=i: (float(scores[i, j]), j))[:gone]:
                mask[i, j] = False
    return mask


@pytest.mark.parametrize("width", [1, 7, 32, 43])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_masks_are_those_of_the_equations(pattern: Pattern, width: int) -> None:
    weight, x = torch.randn(6, width), correlated(50, width)
    weight[2] = 0.0
    norm = x.double().norm(dim=0)
    rows, columns = weight.double().abs().sum(1), weight.double().abs().sum(0)
    shares = [
        [
            float(abs(weight[i, j].double()) / columns[j]) if columns[j] else 0.0
            for j in range(width)
        ]
        for i in range(6)
    ]
    own = weight.double().abs() / rows.where(rows > 0, 1.0)[:, None]
    scores = {
        Wanda(): weight.double().abs() * norm,
        RIA(): (torch.tensor(shares).double() + own) * norm**0.5,
    }

    for pruner, expected in scores.items():
        kept, mask = pruner.prune(weight, energy(x), pattern)
        assert torch.equal(mask, naive_mask(expected, pattern))
        assert torch.equal(kept, weight)
        pattern.check(mask)


@pytest.mark.parametrize("width", [1, 30, 48])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_sparsegpt_is_optimal_brain_surgery(pattern: Pattern, width: int) -> None:
    weight, x = torch.randn(6, width), correlated(200, width)
    moments = damped(x.double().T @ x.double())
    size = pattern.size if isinstance(pattern, Group) else 16
    mask = torch.ones(6, width, dtype=torch.bool)

    found, found_mask = SparseGPT(columns=16).prune(weight, gram(x), pattern)

    def gone(columns: int) -> int:
        assert isinstance(pattern, Unstructured)
        return int(pattern.sparsity * columns * (1 if pattern.per == "row" else 6))

    def fix(work: Tensor, j: int) -> Tensor:
        if j % size == 0:
            some = [*range(j, min(j + size, width))]
            cost = torch.stack(
                [work[:, c] ** 2 / torch.linalg.inv(moments[c:, c:])[0, 0] for c in some], 1
            )
            if isinstance(pattern, Group):
                mask[:, some] = naive_mask(cost, pattern)
            else:
                n_gone = gone(j + len(some)) - gone(j)
                rows = cost if pattern.per == "row" else cost.flatten()[None]
                lowest = rows.argsort(1)[:, :n_gone]
                kept = torch.ones_like(rows).scatter(1, lowest, 0).bool()
                mask[:, some] = kept.reshape(cost.shape)
        return work[:, j] * mask[:, j]

    expected = surgery(weight, moments, [*range(width)], fix)
    assert torch.equal(found_mask, mask)
    torch.testing.assert_close(found, expected.float(), rtol=1e-4, atol=1e-5)
    pattern.check(found_mask)


def test_dead_inputs_go_first_and_keep_their_weights_where_they_stay() -> None:
    weight, x = torch.randn(4, 8) + 5, correlated(50, 8)
    x[:, [1, 2, 3]] = 0

    found, mask = SparseGPT().prune(weight, gram(x), Group(2, 4))

    assert mask[:, 0].all()
    assert mask[:, 1:4].sum(1).tolist() == [1] * 4
    assert torch.equal(found[mask][:2], weight[mask][:2]) or bool(mask[0, :4].sum() == 2)
    stays = mask[:, 3]
    assert torch.equal(found[stays, 3], weight[stays, 3])


def test_a_pattern_that_is_not_met_is_told() -> None:
    mask = torch.tensor([[True, False, True, True], [False, True, True, False]])

    with pytest.raises(PassError, match="expected 2 of every 4 neighbours to stay, found 2 to 3"):
        Group(2, 4).check(mask)
    with pytest.raises(PassError, match="expected 2 of 4 weights to go, 50% of each row, found 1"):
        Unstructured(0.5).check(mask)


@pytest.mark.parametrize(
    "make", [lambda: Unstructured(1.5), lambda: Group(0, 4), lambda: Group(5, 4)]
)
def test_patterns_that_mean_nothing_are_refused(make: object) -> None:
    with pytest.raises(ValueError, match=r"(Unstructured|Group): expected"):
        make()  # type: ignore[operator]
