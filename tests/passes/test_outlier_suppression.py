"""Outlier Suppression+'s equations, by hand."""

import pytest
import torch

from fxq.passes.outlier_suppression import OutlierSuppression, centring_shift, suppressing_scale


def test_shift_and_scale_by_hand() -> None:
    low, high = torch.tensor([-97.0, -1.0]), torch.tensor([-58.0, 1.0])

    shift = centring_shift(low, high)
    scale = suppressing_scale((high - low) / 2, threshold=3.0)

    assert shift.tolist() == [-77.5, 0.0]  # the asymmetric channel of the paper's figure 1
    assert scale.tolist() == [6.5, 1.0]
    assert float(((high - shift) / scale).max()) == 3.0


def test_steps_below_one_are_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, found 0"):
        OutlierSuppression(steps=0)
