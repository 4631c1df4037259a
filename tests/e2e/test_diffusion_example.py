"""The diffusion example runs as it is, and its numbers make sense."""

from pathlib import Path

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:eda_dm.select")  # of a model that hardly learned
def test_the_diffusion_example_measures_and_draws(tmp_path: Path) -> None:
    from quantize_diffusion import QUICK, main

    picture = tmp_path / "picture.png"

    results = main(["--quick", "--figure", str(picture)])

    assert [result.name for result in results] == ["UNet", "DiT"]
    for result in results:
        error = {name: float(errors.sum()) for name, errors in result.errors.items()}
        assert all(len(errors) == QUICK.ddim for errors in result.errors.values())
        assert 0 < error["EDA-DM"] < error["rounded to nearest"] < 1  # 1: predicting no noise
        assert 0 < error["DilateQuant"] < error["rounded to nearest"]
        drawn, *quantized = result.images.values()
        assert drawn.shape == (QUICK.trajectories, 1, 8, 8)
        assert len(quantized) == 3
        for images in quantized:
            assert bool(torch.isfinite(images).all())
            assert 0 < float((images - drawn).square().mean()) < float(drawn.square().mean())
        whole, *sizes = result.size_mb.values()
        assert max(sizes) < whole
    assert picture.read_bytes().startswith(b"\x89PNG")
