"""Recorded calls: those that the pipeline made, bounded, the same for the same seed, replayable."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import dit_pipeline
from torch import Tensor, nn

import fxq
from fxq.passes import w8a8


class Step(nn.Module):
    """Writes to its input, as a pipeline's in-place scheduler would."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor, cond: Any = None, scale: float = 1.0, cache: Any = None) -> Tensor:
        y = self.linear(x) * scale
        for extra in cond["extra"] if cond else ():
            y = y + extra
        x.add_(1.0)
        return y


def loop(module: nn.Module, n: int, width: int = 4) -> Callable[[], None]:
    """Call `module` with its first input filled with the call's number."""

    def run() -> None:
        for step in range(n):
            module(torch.full((1, width), float(step)))

    return run


def numbers(calls: fxq.Recorded) -> list[int]:
    return [int(call[0][0, 0]) for call in calls]  # type: ignore[index]


def tree_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_dit_pipeline_is_recorded_replayed_and_compressed(on_disk: bool, tmp_path: Path) -> None:
    pipe = dit_pipeline()
    transformer = pipe.transformer
    computed: list[Tensor] = []

    def draw() -> Any:
        noise = torch.Generator().manual_seed(0)
        return pipe([1], num_inference_steps=3, generator=noise, output_type="np").images

    alone = draw()
    handle = transformer.register_forward_hook(lambda _, __, out: computed.append(out[0].clone()))
    images: list[Any] = []
    path = tmp_path / "calls" if on_disk else None
    calls = fxq.record(transformer, lambda: images.append(draw()), path=path)
    handle.remove()

    assert (images[0] == alone).all()
    assert (len(calls), calls.n_calls, calls.steps) == (3, 3, (0, 1, 2))
    for call, expected in zip(calls, computed, strict=True):
        with torch.no_grad():
            assert torch.equal(transformer(**call)[0], expected)
    program = fxq.compress(transformer, calls[0], w8a8.STATIC, data=calls)
    noise = [program(**call).sample - x for call, x in zip(calls, computed, strict=True)]
    ratio = torch.cat(computed).square().sum() / torch.cat(noise).square().sum()
    assert ratio > 1e3  # 30 dB on the very inputs it was calibrated with
    pipe.transformer = program
    assert 0 < abs(draw() - alone).mean() < 0.02  # pixels from 0 to 1


@pytest.mark.parametrize("on_disk", [False, True])
@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, torch.enable_grad])
def test_arguments_of_every_kind_are_kept_as_they_were_given(
    mode: Callable[[], Any], on_disk: bool, tmp_path: Path
) -> None:
    module = Step()
    codes = torch.tensor([[1, -2, 3, 1]], dtype=torch.int8)
    picture = torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last)
    cond = {"extra": (codes, [torch.ones(1, 4).bfloat16()]), "none": None, "n": 3, "s": "text"}

    def run() -> None:
        with mode():
            x = torch.zeros(1, 4)
            module(x, {"extra": [codes]}, scale=0.5)
            module(x, cond={**cond, "extra": ()}, cache=None)
            module.linear(x + picture.sum() * 0)

    calls = fxq.record(module, run, path=tmp_path / "a" if on_disk else None)
    again = fxq.Recorded.load(tmp_path / "a") if on_disk else calls

    for first, second in (calls, again, calls):
        assert list(first) == ["x", "cond", "scale"]
        assert torch.equal(first["x"], torch.zeros(1, 4))  # before the module wrote to it
        assert torch.equal(second["x"], torch.ones(1, 4))
        assert first["scale"] == 0.5
        assert first["cond"]["extra"][0].dtype == torch.int8
        assert torch.equal(first["cond"]["extra"][0], codes)
        assert second["cond"] == {**cond, "extra": ()}
        assert second["cache"] is None
        assert not first["x"].is_inference()
        assert not first["x"].requires_grad
    leaf = calls[0]["x"].requires_grad_()  # type: ignore[call-overload]
    module.linear(leaf).sum().backward()
    assert leaf.grad is not None


def test_memory_order_survives_the_file(tmp_path: Path) -> None:
    module = nn.Conv2d(2, 2, 1)
    x = torch.randn(1, 2, 3, 4).to(memory_format=torch.channels_last)
    fxq.record(module, lambda: module(x), path=tmp_path)

    (found,) = fxq.Recorded.load(tmp_path)[0]

    assert torch.equal(found, x)
    assert found.stride() == x.stride()


@pytest.mark.parametrize("bound", [{"max_calls": 8}, {"max_bytes": 8 * 16 + 15}])
def test_a_sample_is_uniform_and_the_same_for_the_same_seed(bound: dict[str, int]) -> None:
    module = nn.Linear(4, 4)
    counts: Counter[int] = Counter()

    for seed in range(150):
        calls = fxq.record(module, loop(module, 24), seed=seed, **bound)  # type: ignore[arg-type]
        assert numbers(calls) == list(calls.steps)
        assert len(calls) == 8
        assert calls.n_calls == 24
        counts.update(calls.steps)

    again = fxq.record(module, loop(module, 24), seed=149, **bound)  # type: ignore[arg-type]
    assert again.steps == calls.steps
    # Each is kept with probability 1 / 3: 50 times, standard deviation 5.8; the largest of 24
    # differs by less than 4 of them, and sums of squares by less than twice what is expected.
    assert all(abs(counts[step] - 50) < 24 for step in range(24))
    assert sum((counts[step] - 50) ** 2 for step in range(24)) < 2 * 24 * 150 * 2 / 9


def test_large_calls_leave_room_for_fewer() -> None:
    module = nn.Identity()

    def run() -> None:
        for step in range(40):
            module(torch.full((1, 1 + 9 * (step % 2)), float(step)))

    calls = fxq.record(module, run, max_bytes=400)

    sizes = [call[0].numel() * 4 for call in calls]  # type: ignore[index]
    assert 360 <= sum(sizes) <= 400
    assert {4, 40} == set(sizes)
    with pytest.raises(ValueError, match=r"one call of Identity, which has 40 bytes, found 39"):
        fxq.record(module, run, max_bytes=39)


def test_an_even_spread_is_even() -> None:
    module = nn.Linear(4, 4)

    calls = fxq.record(module, loop(module, 50), max_calls=16, spread="even")

    assert calls.steps == tuple(range(0, 50, 4))


def test_a_folder_goes_on_and_has_what_one_run_would_have(tmp_path: Path) -> None:
    module = nn.Linear(4, 4)
    inputs = list(torch.randn(60, 1, 4))

    def over(part: list[Tensor], stop: bool = False) -> Callable[[], None]:
        def run() -> None:
            for x in part:
                module(x)
            if stop:
                raise KeyboardInterrupt

        return run

    fxq.record(module, over(inputs), path=tmp_path / "whole", max_calls=7, seed=3)
    with pytest.raises(KeyboardInterrupt):
        fxq.record(module, over(inputs[:33], True), path=tmp_path / "parts", max_calls=7, seed=3)
    calls = fxq.record(module, over(inputs[33:]), path=tmp_path / "parts", max_calls=7, seed=3)

    assert tree_of(tmp_path / "parts") == tree_of(tmp_path / "whole")
    assert len(tree_of(tmp_path / "parts")) == 8
    for step, (x,) in zip(calls.steps, calls, strict=True):
        assert torch.equal(x, inputs[step])
    with pytest.raises(ValueError, match="choose another, or the same settings"):
        fxq.record(module, over(inputs), path=tmp_path / "parts", max_calls=7, seed=4)
    with pytest.raises(ValueError, match="choose another, or the same settings"):
        fxq.record(nn.ReLU(), over(inputs), path=tmp_path / "parts", max_calls=7, seed=3)


def test_damage_and_other_folders_are_seen(tmp_path: Path) -> None:
    module = nn.Linear(4, 4)
    fxq.record(module, loop(module, 1), path=tmp_path / "calls")
    file = tmp_path / "calls" / "000000.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)

    with pytest.raises(ValueError, match="expected contents with the checksum"):
        fxq.Recorded.load(tmp_path / "calls")[0]
    with pytest.raises(ValueError, match=r"a folder that fxq\.record wrote"):
        fxq.Recorded.load(tmp_path)


class Cache:
    """Something that no file can hold."""


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: m(torch.zeros(1, 4), cache=Cache()), r"Step was called with \['cache'\].*Cache"),
        (lambda m: m(torch.zeros(1, 4), {"f": [print]}), r"\['cond'\]\['f'\]\[0\].*builtin_func"),
        (lambda m: None, "expected calls of this Step, found none"),
        (lambda m: m.forward(torch.zeros(1, 4)), "expected calls of this Step, found none"),
    ],
)
def test_what_cannot_be_kept_is_refused_and_the_module_left_as_it_was(
    call: Callable[[nn.Module], object], message: str
) -> None:
    module = Step()
    module.register_forward_pre_hook(lambda *_: None)
    before = hooks_of(module)

    with pytest.raises((fxq.UnsupportedError, ValueError), match=message):
        fxq.record(module, lambda: call(module))

    assert hooks_of(module) == before


def hooks_of(module: nn.Module) -> dict[str, Any]:
    return {name: dict(value) for name, value in vars(module).items() if "hooks" in name and value}


def test_a_hook_that_changes_the_call_is_not_applied_twice() -> None:
    module = nn.Linear(4, 4)
    module.register_forward_pre_hook(lambda _, args: (args[0] * 2,))
    x, found = torch.randn(1, 4), []

    calls = fxq.record(module, lambda: found.append(module(x)))

    assert torch.equal(module(*calls[0]), found[0])


@pytest.mark.parametrize("bad", [{"max_calls": 0}, {"spread": "odd"}])
def test_bad_settings_are_refused(bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected max_calls of 1 or more"):
        fxq.record(nn.ReLU(), lambda: None, **bad)
