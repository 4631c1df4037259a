"""SmoothQuant's equation, by hand."""

import pytest
import torch

from fxq.passes.smoothquant import SmoothQuant, smoothing_scale


@pytest.mark.parametrize(
    ("alpha", "expected"), [(0.5, [4.0, 1.0]), (1.0, [8.0, 3.0]), (0.0, [2.0, 1 / 3])]
)
def test_smoothing_scale_by_hand(alpha: float, expected: list[float]) -> None:
    x_amax, w_amax = torch.tensor([8.0, 3.0]), torch.tensor([0.5, 3.0])

    found = smoothing_scale(x_amax, w_amax, alpha)

    assert torch.allclose(found, torch.tensor(expected))


def test_half_way_both_sides_end_up_equal() -> None:
    x_amax, w_amax = torch.tensor([8.0, 0.1]), torch.tensor([0.5, 3.0])

    scale = smoothing_scale(x_amax, w_amax, 0.5)

    assert torch.allclose(x_amax / scale, w_amax * scale)


def test_alpha_beyond_one_is_refused() -> None:
    with pytest.raises(ValueError, match=r"SmoothQuant\.alpha: expected 0 to 1, found 1\.5"):
        SmoothQuant(alpha=1.5)
