"""The diffusion example runs as it is, and its numbers make sense."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.mark.slow
def test_the_diffusion_example_measures_and_draws(tmp_path: Path) -> None:
    from quantize_diffusion import QUICK, main

    picture = tmp_path / "picture.png"

    results = main(["--quick", "--figure", str(picture)])

    assert [result.name for result in results] == ["UNet", "DiT"]
    for result in results:
        nearest, reconstructed = (errors.sum() for errors in result.errors)
        assert len(result.errors[0]) == QUICK.ddim
        assert 0 < reconstructed < nearest < 1  # 1: predicting no noise at all
        assert result.size_mb[1] < result.size_mb[0]
        drawn, quantized = result.images
        assert drawn.shape == quantized.shape == (QUICK.trajectories, 1, 8, 8)
        assert bool(torch.isfinite(quantized).all())
        assert 0 < float((quantized - drawn).square().mean()) < float(drawn.square().mean())
    assert picture.read_bytes().startswith(b"\x89PNG")
