"""RepQ's equations, by hand."""

import torch

from fxq.passes.repq_vit import equalizing_scale_and_shift


def test_scale_and_shift_by_hand() -> None:
    low, high = torch.tensor([-1.0, 0.0]), torch.tensor([3.0, 12.0])

    scale, shift = equalizing_scale_and_shift(low, high)

    # Widths 4 and 12, mean 8; -low / width 0.25 and 0, mean 0.125.
    assert torch.equal(scale, torch.tensor([0.5, 1.5]))
    assert torch.equal(shift, torch.tensor([-1 + 4 * 0.125, 12 * 0.125]))
    for end, expected in ((low, -1.0), (high, 7.0)):
        assert torch.equal((end - shift) / scale, torch.full((2,), expected))


def test_a_constant_channel_is_shifted_to_zero() -> None:
    low, high = torch.tensor([5.0, -1.0]), torch.tensor([5.0, 1.0])

    scale, shift = equalizing_scale_and_shift(low, high)

    assert scale.tolist() == [0.0, 1.0]
    assert shift.tolist() == [5.0, 0.0]
    all_constant = equalizing_scale_and_shift(low[:1], high[:1])
    assert [value.tolist() for value in all_constant] == [[0.0], [5.0]]
