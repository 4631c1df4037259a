"""EDA-DM's selection on recorded pipelines: which calls belong together, and what comes back."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pipelines import dit_pipeline, tiny_unet
from torch import Tensor, nn

import fxq
from fxq.errors import FxqWarning, MissingInputError
from fxq.passes import eda_dm, w8a8
from fxq.passes.eda_dm.features import find_tap
from fxq.passes.eda_dm.trajectories import trajectories

diffusers = pytest.importorskip("diffusers")
# Random weights: few steps may all be as far apart.
flat = pytest.mark.filterwarnings("ignore:eda_dm.select")


def draw(model: nn.Module, scheduler: Any, steps: int, guidance: str = "", seed: int = 0) -> None:
    """Run a sampler with two images."""
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 1, 8, 8, generator=generator) * scheduler.init_noise_sigma
    labels = torch.tensor([1, 2])
    for t in scheduler.timesteps:
        given = scheduler.scale_model_input(x, t)
        with torch.no_grad():
            if guidance == "doubled":
                both = torch.cat([labels, torch.zeros_like(labels)])
                noise = model(torch.cat([given, given]), t, class_labels=both).sample[:2]
            else:
                noise = model(given, t, class_labels=labels).sample
            if guidance == "two calls":
                noise = noise + model(given, t, class_labels=torch.zeros_like(labels)).sample
        x = scheduler.step(noise, t, x).prev_sample


SCHEDULERS = {
    "ddim": lambda: diffusers.DDIMScheduler(),
    "dpm": lambda: diffusers.DPMSolverMultistepScheduler(),
    "pndm": lambda: diffusers.PNDMScheduler(skip_prk_steps=True),
    "heun": lambda: diffusers.HeunDiscreteScheduler(),
    "euler": lambda: diffusers.EulerDiscreteScheduler(),
}


@flat
@pytest.mark.parametrize(
    ("name", "guidance"),
    [
        ("ddim", ""), ("ddim", "doubled"), ("ddim", "two calls"), ("dpm", "doubled"), ("pndm", ""),
        ("pndm", "two calls"), ("heun", ""), ("euler", "two calls"),
    ],
)  # fmt: skip
def test_samples_are_states_of_their_trajectories(name: str, guidance: str) -> None:
    model = tiny_unet()

    def run() -> None:
        for seed in range(2):
            draw(model, SCHEDULERS[name](), 5, guidance, seed)

    calls = fxq.record(model, run, max_calls=100)
    chosen = eda_dm.select(model, calls, 12)

    per_run = 4 if guidance else 2
    numbers = trajectories(model, calls, "timestep")
    assert numbers.count == 2 * per_run
    times = [float(call["timestep"]) for call in calls]
    distinct = [*dict.fromkeys(times[: len(times) // 2])]
    assert chosen.timesteps == tuple(distinct)
    assert len(distinct) == 5
    assert sum(chosen.counts) == 12
    assert sum(len(call["sample"]) for call in chosen) == 12
    found = dict.fromkeys(distinct, 0)
    for call, (number, rows) in zip(chosen, chosen.samples, strict=True):
        origin = calls[number]
        found[float(call["timestep"])] += len(rows)
        assert torch.equal(call["timestep"], origin["timestep"])
        assert torch.equal(call["sample"], origin["sample"][[*rows]])
        assert torch.equal(call["class_labels"], origin["class_labels"][[*rows]])
        # The first call of its step and, of guidance as two, the second; no other.
        turn = [i for i in range(len(times)) if times[i] == times[number]]
        turn = [i for i in turn if (i < len(times) // 2) == (number < len(times) // 2)]
        assert turn.index(number) < (2 if guidance == "two calls" else 1)
    assert tuple(found.values()) == chosen.counts


@pytest.mark.parametrize("rows_at_once", [1, 3, 8])
def test_numbers_are_those_of_the_equations(rows_at_once: int) -> None:
    model = tiny_unet()
    calls = fxq.record(model, lambda: draw(model, SCHEDULERS["ddim"](), 6, "doubled"))
    maps: list[Tensor] = []
    tap = model.mid_block.attentions[0]
    handle = tap.register_forward_pre_hook(lambda _, args: maps.append(args[0]))
    with torch.no_grad():
        for call in calls:
            model(**call)
    handle.remove()

    chosen = eda_dm.select(model, calls, 12, radius=0.02, rows_at_once=rows_at_once)

    assert chosen.tap == "mid_block.attentions.0"
    others = [[b for b in maps if b is not a] for a in maps]
    near = [
        sum(float((a - b).square().mean() <= 0.02) for b in o)
        for a, o in zip(maps, others, strict=True)
    ]
    cosine = torch.nn.functional.cosine_similarity
    varied = [
        float(sum((1 - cosine(a, b, dim=1)).sum() for b in o))
        for a, o in zip(maps, others, strict=True)
    ]
    assert chosen.density is not None
    assert chosen.variety is not None
    assert chosen.density.tolist() == near
    assert len({*near}) > 2
    torch.testing.assert_close(chosen.variety.tolist(), varied, atol=1e-3, rtol=1e-4)


@flat
def test_a_pipeline_is_recorded_selected_and_compressed() -> None:
    pipe = dit_pipeline()

    def run() -> None:
        noise = torch.Generator().manual_seed(0)
        pipe([1, 2], num_inference_steps=4, generator=noise, output_type="np")

    calls = fxq.record(pipe.transformer, run)
    chosen = eda_dm.select(pipe.transformer, calls, 8)

    program = fxq.compress(pipe.transformer, calls[0], w8a8.STATIC, data=chosen)
    assert chosen.tap == "transformer_blocks.0"
    assert program.sqnr_db > 20
    pipe.transformer = program
    run()


class Odd(nn.Module):
    """No attention: convolutions down to fewer positions and up again. Zero where it is dead."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.down = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1)
        self.middle, self.up = nn.Conv2d(8, 8, 1), nn.ConvTranspose2d(8, 4, 2, 2)
        self.dead, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 1)
        self.unused = nn.Linear(1, 1)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        h = self.middle(self.down(self.first(x) * timestep.reshape(-1, 1, 1, 1)))
        return self.last(self.up(h) + self.dead(h.new_zeros(len(x), 4, 8, 8)))


class Tokens(nn.Module):
    """An encoder of blocks in a module of its own, attention written out."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.qkv = nn.LayerNorm(8), nn.Linear(8, 24)

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
            return x + torch.softmax(q @ k.transpose(1, 2), -1) @ v

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*(Tokens.Block() for _ in range(5)))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        return self.encoder(x + timestep.reshape(-1, 1, 1))


@pytest.mark.parametrize(
    ("model", "shape", "tap"),
    [
        (Odd(), (1, 1, 8, 8), "middle"),
        (Tokens(), (1, 4, 8), "encoder.2"),
        (tiny_unet(add_attention=False, down_block_types=("DownBlock2D",) * 2,
              up_block_types=("UpBlock2D",) * 2), (1, 1, 8, 8), "mid_block."),
    ],
)  # fmt: skip
def test_the_middle_is_found_without_names(
    model: nn.Module, shape: tuple[int, ...], tap: str
) -> None:
    call = {"x": torch.randn(shape), "timestep": torch.ones(1)}
    if not isinstance(model, Odd | Tokens):
        call = {
            "sample": call["x"],
            "timestep": call["timestep"],
            "class_labels": torch.tensor([1]),
        }

    found = find_tap(model.eval(), call)

    assert found.startswith(tap)


def odd_calls(
    values: list[float], change: Callable[[int, Tensor], Tensor] = lambda i, x: x, rows: int = 2
) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    xs = [torch.randn(rows, 1, 8, 8, generator=generator) for _ in values]
    return [
        {"x": change(i, x), "timestep": torch.tensor(t)}
        for i, (t, x) in enumerate(zip(values, xs, strict=True))
    ]


def spoilt(number: int) -> Callable[[int, Tensor], Tensor]:
    return lambda i, x: x.index_fill(0, torch.tensor(1), torch.nan) if i == number else x


@pytest.mark.parametrize(
    ("calls", "arguments", "error", "message"),
    [
        ([], {}, ValueError, "expected those of a denoising run, found none"),
        (odd_calls([3, 3]), {}, ValueError, "several time-steps to choose among, found 3 alone"),
        (odd_calls([3, 2, 1, 3, 2]), {}, ValueError, "the 3 time-steps of the first run.*2 others"),
        (odd_calls([3, 2, 1]), {"count": 7}, ValueError, "expected 1 to 6 samples.*found 7"),
        (odd_calls([3, 2, 1]), {"floor": 2}, ValueError, "found 4 with a floor of 2 for 3"),
        (odd_calls([3, 2, 1], spoilt(1)), {}, ValueError, r"NaN or Inf in \['x'\] of call 1"),
        (odd_calls([3, 2, 1]), {"tap": "dead"}, ValueError, "found zeros alone in 3 steps"),
        (odd_calls([3, 2, 1]), {"tap": "mddle"}, ValueError, "did you mean 'middle'"),
        (odd_calls([3, 2, 1]), {"tap": "unused"}, ValueError, "call 0 reaches it"),
        (odd_calls([3, 2, 1]), {"timestep": "t"}, MissingInputError, "an argument 't' in call 0"),
        (odd_calls([3, 2, torch.nan]), {}, ValueError, r"found \[nan\] in call 2"),
        (odd_calls([3, 2]) + odd_calls([1], rows=3), {}, ValueError, r"one batch size.*\[2, 3\]"),
    ],
)
def test_bad_input_is_refused(
    calls: list[Any], arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        eda_dm.select(Odd().eval(), calls, **{"count": 4} | arguments)


def test_a_step_of_mixed_time_and_a_part_of_a_run_are_refused() -> None:
    model = Odd().eval()
    mixed = {"x": torch.randn(2, 1, 8, 8), "timestep": torch.tensor([1.0, 2.0])}
    with pytest.raises(ValueError, match=r"found \[1.0, 2.0\] in call 0"):
        eda_dm.select(model, [mixed], 1)

    def run() -> None:
        for call in odd_calls([5, 4, 3, 2, 1]):
            model(**call)

    with pytest.raises(ValueError, match=r"every call of each run, found 4 of 5.*max_calls=5"):
        eda_dm.select(model, fxq.record(model, run, max_calls=4), 1)


def test_what_does_not_tell_steps_apart_is_said_and_counts_nothing() -> None:
    model, calls = Odd().eval(), odd_calls([3, 2, 1])

    with pytest.warns(FxqWarning, match="density of all 3 time-steps are the same at 'middle'"):
        far = eda_dm.select(model, calls, 6, radius=1e9)
    same = [{**call, "x": calls[0]["x"], "timestep": call["timestep"]} for call in calls]
    with pytest.warns(FxqWarning, match="density and variety of all 3 time-steps"):
        equal = eda_dm.select(model, same, 6, tap="first")

    assert sum(far.counts) == 6
    assert equal.counts == (2, 2, 2)
    assert eda_dm.select_evenly(model, calls, 6).counts == (2, 2, 2)


@flat
def test_positional_calls_and_one_trajectory_are_enough() -> None:
    model = Odd().eval()
    calls = fxq.record(
        model, lambda: [model(c["x"], c["timestep"]) for c in odd_calls([3, 2, 1], rows=1)]
    )

    chosen = eda_dm.select(model, calls, 3, floor=1)

    assert chosen.counts == (1, 1, 1)
    for (x, t), (number, rows) in zip(chosen, chosen.samples, strict=True):
        assert torch.equal(x, calls[number][0])  # type: ignore[index]
        assert torch.equal(t, calls[number][1])  # type: ignore[index]
        assert rows == (0,)
