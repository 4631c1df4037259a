"""DilateQuant where it is used: in a pipeline with other steps, other seeds and guidance; in files;
compiled."""

from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import tiny_unet
from torch import Tensor, nn

import fxq
from fxq.account import account
from fxq.numerics import sqnr_db
from fxq.passes import dilatequant, eda_dm
from fxq.passes.common.reconstruction import Reconstruct
from fxq.passes.dilatequant import GuardedDilation, dilated

diffusers = pytest.importorskip("diffusers")
FEW = Reconstruct(steps=4, method=dilatequant.BLOCKWISE.method)


@torch.no_grad()
def draw(model: nn.Module, steps: int, *, scheduler: Any = None, seed: int = 0) -> Tensor:
    """Draw two images with guidance as one doubled batch."""
    scheduler = scheduler or diffusers.DDIMScheduler()
    scheduler.set_timesteps(steps)
    x = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    labels = torch.tensor([1, 2, 0, 0])
    for t in scheduler.timesteps:
        noise, plain = model(torch.cat([x, x]), t.expand(4), class_labels=labels).sample.chunk(2)
        x = scheduler.step(plain + 1.5 * (noise - plain), t, x).prev_sample
    return x


@pytest.fixture(scope="module")
def drawn() -> tuple[nn.Module, fxq.Recorded, Any]:
    """A model, its calls in a run of eight steps, and samples of them."""
    model = tiny_unet()
    calls = fxq.record(model, lambda: draw(model, 8), max_calls=8)
    return model, calls, eda_dm.select_evenly(model, calls, 32, seed=0)


@pytest.fixture(scope="module")
def program(drawn: tuple[nn.Module, fxq.Recorded, Any]) -> fxq.Program:
    model, calls, chosen = drawn
    return fxq.compress(model, calls[0], dilated("w6a8", 6, 8, reconstruct=FEW), data=chosen)


@pytest.mark.parametrize(("steps", "spacing"), [(5, "leading"), (11, "trailing")])
def test_a_sampler_may_take_other_steps(
    drawn: tuple[nn.Module, fxq.Recorded, Any], program: fxq.Program, spacing: str, steps: int
) -> None:
    model, _, _ = drawn
    sampler = diffusers.DDIMScheduler(timestep_spacing=spacing)
    calls = fxq.record(model, lambda: draw(model, steps, scheduler=sampler, seed=3), max_calls=20)
    with torch.no_grad():
        pairs = [(model(**call).sample, program(**call).sample) for call in calls]
    exact, found = (torch.cat(images) for images in zip(*pairs, strict=True))
    assert sqnr_db(exact, found) > 12  # noise at a step where calibration had less of it
    assert min(sqnr_db(*pair) for pair in pairs) > 5
    assert bool(draw(program, steps, scheduler=sampler, seed=3).isfinite().all())


def test_a_single_time_step_and_one_for_each_sample_are_the_same(program: fxq.Program) -> None:
    x, labels = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2])
    together = program(x, torch.tensor([875, 500, 1]), class_labels=labels).sample
    alone = [
        program(x[k : k + 1], torch.tensor([t]), class_labels=labels[k : k + 1]).sample
        for k, t in enumerate((875, 500, 1))
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)


def test_files_give_the_same(program: fxq.Program, tmp_path: Path) -> None:
    fxq.save(program, tmp_path / "unet.fxq")
    again = fxq.load(tmp_path / "unet.fxq")
    assert torch.equal(draw(again, 3), draw(program, 3))


def test_every_layer_has_its_record(program: fxq.Program) -> None:
    layers = [row.layer for row in account(program.graph_module) if row.kind in ("linear", "conv")]
    passes = {t.by for layer in layers for t in layer.treatments}
    assert {"GuardedDilation", "TimestepRows", "Reconstruct", "Convert"} <= passes
    formats = [layer.format for layer in layers]
    assert all("by timestep" in str(text) for text in formats)
    # first, last, and those that read the time-step's embedding: one range each, of 8 bits
    assert sum("int8 by timestep x int8" in str(text) for text in formats) == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:no kernel here for 55 of 55 layers")  # 8-bit weights only are
def test_it_compiles_to_one_graph_for_all_steps(
    drawn: tuple[nn.Module, fxq.Recorded, Any], program: fxq.Program
) -> None:
    calls = fxq.record(drawn[0], lambda: draw(drawn[0], 7, seed=5), max_calls=7)
    compiled = torch.compile(program, backend="fxq")
    with torch.no_grad():
        pairs = [(program(**call).sample, compiled(**call).sample) for call in calls]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert min(sqnr_db(*pair) for pair in pairs) > 30  # a code that flips is felt by all after it


def test_dilation_alone_keeps_the_pipeline(drawn: tuple[nn.Module, fxq.Recorded, Any]) -> None:
    model, calls, chosen = drawn
    recipe = fxq.Recipe("r", (GuardedDilation(dilatequant.W4A4.passes[3].default),))
    program = fxq.compress(model, calls[0], recipe, data=chosen)
    assert sqnr_db(draw(model, 4), draw(program, 4)) > 80
