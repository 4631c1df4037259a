"""Long work: how far it has come, and that it goes on where it stopped, to the same bytes."""

import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from torch import Tensor, nn
from torch.fx.passes.infra.pass_base import PassResult

import fxq
from fxq.checkpoint import Checkpoint, adam_state, restore_adam
from fxq.files import write_text
from fxq.observers import RangeObserver
from fxq.passes import smoothquant, w8a8
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.pipeline import Recipe
from fxq.progress import Reported, reporting
from fxq.spec import LayerSpec, MovingAverage, QuantSpec

MOVING = Recipe(
    "moving",
    (
        InsertObservers(LayerSpec(QuantSpec(observer=MovingAverage()), QuantSpec())),
        Calibrate(),
        Convert(),
    ),
)


class Interrupted:
    """Count what observers see in Calibrate, and raise within a batch as Ctrl-C does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen, self.stop_at, self.calibrates = 0, -1, False
        observe, resume = RangeObserver._observe, Calibrate.resume

        def counting(observer: RangeObserver, x: Tensor, index: Tensor | None) -> None:
            if self.calibrates and self.seen == self.stop_at:
                raise KeyboardInterrupt
            self.seen += self.calibrates
            observe(observer, x, index)

        def calibrating(*args: Any) -> PassResult:
            self.calibrates = True
            try:
                return resume(*args)
            finally:
                self.calibrates = False

        monkeypatch.setattr(RangeObserver, "_observe", counting)
        monkeypatch.setattr(Calibrate, "resume", calibrating)


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, 16, generator=generator) * (1 + i) for i in range(5)]


def block() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.LayerNorm(16), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8), nn.Linear(8, 4)
    return nn.Sequential(*layers).eval()


def saved(program: fxq.Program, folder: Path) -> bytes:
    fxq.save(program, folder / "program.safetensors")
    return (folder / "program.safetensors").read_bytes()


@pytest.mark.parametrize("done", [0, 1, 4])
@pytest.mark.parametrize("recipe", [w8a8.STATIC, MOVING, smoothquant.W8A8], ids=lambda r: r.name)
def test_an_interrupted_calibration_goes_on_to_the_same_bytes(
    recipe: Recipe, done: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, path = block(), batches(), tmp_path / "kept.safetensors"
    count = Interrupted(monkeypatch)
    whole = saved(fxq.compress(model, data[0], recipe, data), tmp_path)
    per_batch = count.seen // len(data)
    assert per_batch > 2

    count.seen, count.stop_at = 0, done * per_batch + 2
    with pytest.raises(KeyboardInterrupt):
        fxq.compress(model, data[0], recipe, data, checkpoint=path)
    assert path.exists() == (done > 0)
    count.seen, count.stop_at = 0, -1
    resumed = fxq.compress(model, data[0], recipe, data, checkpoint=path)

    assert saved(resumed, tmp_path) == whole
    assert count.seen == (len(data) - done) * per_batch
    assert not path.exists()


def test_a_calibration_is_kept_while_it_runs_and_when_what_follows_it_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, data, path = block(), batches(), tmp_path / "kept.safetensors"
    count = Interrupted(monkeypatch)
    files: list[bool] = []
    monkeypatch.setattr("fxq.checkpoint.SAVE_EVERY_S", -1.0)

    def fail(*_: object) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(Convert, "run", fail)
        patch.setattr(
            "fxq.pipeline.CheckedBatches.__iter__",
            lambda self: ((files.append(path.exists()), [x])[1] for x in data),
        )
        with pytest.raises(RuntimeError, match="no memory"):
            fxq.compress(model, data[0], w8a8.STATIC, data, checkpoint=path)
    count.seen = 0
    fxq.compress(model, data[0], w8a8.STATIC, data, checkpoint=path)

    assert files == [False, True, True, True, True]
    assert count.seen == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, data: (m, data, MOVING), "this model, these settings and this seed"),
        (lambda m, data: (m, [data[0], data[2], *data[2:]], w8a8.STATIC), "the same batches in th"),
        (lambda m, data: (m, data[:1], w8a8.STATIC), "expected one of 1 batches, found another"),
        (lambda m, data: (m.requires_grad_(False), data, w8a8.STATIC), ""),
    ],
)
def test_a_checkpoint_of_other_work_is_refused(
    change: Callable[..., tuple[nn.Module, list[Tensor], Recipe]],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, data, path = block(), batches(), tmp_path / "kept.safetensors"
    count = Interrupted(monkeypatch)
    fxq.compress(model, data[0], w8a8.STATIC, data)
    count.stop_at = count.seen + count.seen * 2 // 5 + 1
    with pytest.raises(KeyboardInterrupt):
        fxq.compress(model, data[0], w8a8.STATIC, data, checkpoint=path)
    count.stop_at, kept = -1, path.read_bytes()
    model, data, recipe = change(model, data)

    if not message:  # nothing that decides the result
        fxq.compress(model, data[0], recipe, data, checkpoint=path)
        return
    with pytest.raises(ValueError, match=message):
        fxq.compress(model, data[0], recipe, data, checkpoint=path)
    assert path.read_bytes() == kept


def test_other_weights_are_other_work(tmp_path: Path) -> None:
    model, data, path = block(), batches(), tmp_path / "kept.safetensors"
    bad = [*data[:2], data[2] / 0]
    with pytest.raises(ValueError, match="NaN or Inf"):
        fxq.compress(model, data[0], w8a8.STATIC, bad, checkpoint=path)
    with torch.no_grad():
        next(model.parameters()).add_(1e-6)

    with pytest.raises(ValueError, match="remove it or choose another"):
        fxq.compress(model, data[0], w8a8.STATIC, data, checkpoint=path)


def test_only_the_last_pass_with_data_is_kept(tmp_path: Path) -> None:
    observe, calibrate, convert = w8a8.STATIC.passes
    twice = Recipe("twice", (observe, calibrate, calibrate, convert))
    model, data, path = block(), batches(), tmp_path / "kept.safetensors"

    kept = fxq.compress(model, data[0], twice, data, checkpoint=path)

    assert saved(kept, tmp_path) == saved(fxq.compress(model, data[0], twice, data), tmp_path)


def test_another_rule_for_the_range_is_other_work(tmp_path: Path) -> None:
    def recipe(momentum: float) -> Recipe:
        spec = QuantSpec(observer=MovingAverage(momentum))
        return Recipe("moving", (InsertObservers(LayerSpec(spec, QuantSpec())), *MOVING.passes[1:]))

    model, data, path = block(), batches(), tmp_path / "kept.safetensors"
    bad = [*data[:2], data[2] / 0]
    with pytest.raises(ValueError, match="NaN or Inf"):
        fxq.compress(model, data[0], recipe(0.1), bad, checkpoint=path)

    with pytest.raises(ValueError, match="remove it or choose another"):
        fxq.compress(model, data[0], recipe(0.2), data, checkpoint=path)
    fxq.compress(model, data[0], recipe(0.1), data, checkpoint=path)


def test_a_folder_that_does_not_exist_is_refused_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="folder that exists"):
        fxq.compress(nn.LSTM(1, 1), (), w8a8.STATIC, checkpoint=tmp_path / "no" / "file")


def test_an_optimizer_goes_on_where_it_was(tmp_path: Path) -> None:
    def steps(start: Tensor, kept: Checkpoint, n: int) -> Tensor:
        x = start.clone().requires_grad_()
        adam = torch.optim.Adam([x], lr=0.1)
        state = kept.load("mark")
        if state is not None:
            restore_adam(adam, [x], state[1], "adam")
        for _ in range(n):
            x.grad = x.detach().cos()
            adam.step()
        kept.save({}, adam_state(adam, [x], "adam"))
        return x.detach()

    start, path = torch.randn(3), tmp_path / "adam.safetensors"
    whole = steps(start, Checkpoint(None, "test"), 5)

    half = steps(start, Checkpoint(path, "test"), 3)

    assert torch.equal(steps(half, Checkpoint(path, "test"), 2), whole)


def test_a_file_that_could_not_be_written_leaves_the_one_before(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_text(path, "before")

    with pytest.raises(UnicodeEncodeError):
        write_text(path, "after \ud800")

    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file", "before")]


def test_lines_tell_how_far_and_how_long(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxq.progress.SAY_EVERY_S", -1.0)
    clock = iter([0.0, 0.0, 10.0, 20.0])  # the two when it begins, then one per advance
    monkeypatch.setattr("fxq.progress.time.perf_counter", lambda: next(clock))
    lines: list[str] = []

    with reporting(lines.append) as report, report.task("count", "sheep", 10, 4) as task:
        task.advance(1)
        task.advance(2, lambda: "asleep")

    assert lines == [
        "count: 5 of 10 sheep; about 50 s left",
        "count: 7 of 10 sheep: asleep; about 20 s left",
    ]


def test_compress_tells_of_slow_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxq.progress.SAY_EVERY_S", -1.0)
    lines: list[str] = []
    data = batches()

    fxq.compress(block(), data[0], w8a8.STATIC, data, progress=lines.append)

    assert any(re.fullmatch(r"Calibrate: 2 of 5 batches; about \d+ s left", x) for x in lines)
    assert any(line.startswith("Convert: ") for line in lines)


def test_fast_batches_and_unknown_numbers_are_not_told() -> None:
    lines: list[str] = []

    with reporting(lines.append) as report:
        data = Reported(iter([1, 2, 3]), "read", report)
        assert list(data) == [1, 2, 3]

    assert lines == []


def test_true_writes_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    data = batches()

    fxq.compress(block(), data[0], w8a8.STATIC, data, progress=True)
    silent = fxq.compress(block(), data[0], w8a8.STATIC, data, progress=False)

    out, err = capsys.readouterr()
    assert out == ""
    assert len(re.findall(r"^Calibrate: [\d.]+ s$", err, re.MULTILINE)) == 1
    assert silent.sqnr_db is not None


def test_true_draws_bars_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxq.progress.SHOW_EVERY_S", -1.0)
    text = io.StringIO()
    console = Console(file=text, force_terminal=True, width=100, color_system=None)

    with reporting(True, console) as report:
        report("one [line] :smile:")
        with reporting(report) as inner, inner.task("count[/b]:smile:", "sheep", 8) as task:
            task.advance(2, lambda: "wool [b] :smile:")
            assert report.bars is not None
            report.bars.refresh()

    shown = text.getvalue()
    assert "one [line] :smile:" in shown
    assert re.search(r"count\[/b\]:smile: ━*\S*━*\s+25%.*wool \[b\] :smile:", shown)
    assert not report.bars.tasks


def test_a_progress_that_is_neither_is_refused() -> None:
    with pytest.raises(TypeError, match="takes a line of text, found str"):
        fxq.compress(block(), batches()[0], "w8", progress="yes")  # type: ignore[arg-type]
