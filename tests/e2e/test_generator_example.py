"""The generator example runs as it is, and its numbers make sense."""

import math
from pathlib import Path

import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.mark.slow
def test_the_generator_example_measures_and_draws(tmp_path: Path) -> None:
    from digits_generator import LENGTH, LEVELS
    from quantize_generator import FLOAT, QUICK, main

    picture = tmp_path / "picture.png"

    result = main(["--quick", "--figure", str(picture)])

    (exact,) = result.quality.pop(FLOAT)
    assert float(exact.divergence.abs().max()) < 1e-9
    assert float(exact.nll.mean()) < 0.9 * math.log(LEVELS)  # it has learned something
    assert len(result.quality) == 4
    for (found,) in result.quality.values():
        assert found.divergence.shape == (QUICK.judged,)
        assert 0 < float(found.divergence.min()) <= float(found.divergence.max()) < 0.1
        assert float((found.nll - exact.nll).abs().max()) < 0.1
    whole, *sizes = result.size_mb.values()
    assert max(sizes) < whole
    for digits in result.digits.values():
        assert digits.shape == (QUICK.drawn, LENGTH)
        assert 0 <= int(digits.min()) < int(digits.max()) < LEVELS
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_same_random_numbers_draw_the_same_digits() -> None:
    from digits_generator import CLASSES, Generator, sample

    model, labels = Generator(32, 1).eval(), torch.arange(CLASSES)

    first, again, other = (sample(model, labels, seed) for seed in (0, 0, 1))

    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_a_pixel_is_predicted_from_those_before_it() -> None:
    from digits_generator import Generator

    model = Generator(32, 1).eval()
    for parameter in model.blocks.parameters():  # type: ignore[union-attr]
        torch.nn.init.normal_(parameter, std=0.1)
    pixels, labels = torch.randint(16, (2, 64)), torch.tensor([3, 4])
    changed = pixels.clone()
    changed[:, 20] = (changed[:, 20] + 5) % 16

    with torch.no_grad():
        before, after = model(labels, pixels), model(labels, changed)

    assert torch.equal(before[:, :21], after[:, :21])
    assert not torch.equal(before[:, 21:], after[:, 21:])
