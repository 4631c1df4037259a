"""The harness of `benchmarks/`: it refuses what would make a number wrong, and counts right."""

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import common
from common import Machine, Table, Timing, Variant, interleave, measure, quantile

INPUTS = {"x": torch.arange(4.0)}


class Clock:
    """Seconds that pass only when a call says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.log: list[str] = []

    def __call__(self) -> float:
        return self.now

    def call(self, name: str, durations: list[float]) -> Callable[[], Tensor]:
        """Return a call that takes the next of `durations` every time, the last one for ever."""
        endless = itertools.chain(durations, itertools.repeat(durations[-1]))

        def run() -> Tensor:
            self.log.append(name)
            self.now += next(endless)
            return torch.arange(3.0)

        return run


def table(*rows: dict[str, common.Cell]) -> Table:
    machine = Machine(
        cpu="a", aten="AVX2", environment={"X": "1"}, int8="exact", threads=2, cores=2, load=0.5,
        versions={"torch": "2"}, commit="abc", date="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    return Table("t", "a title", {"rounds": 20}, machine, ("name", "ms", "why"), rows, ("a note",))


@pytest.mark.parametrize(
    "value",
    [torch.zeros(3, 5), torch.zeros(7, dtype=torch.uint8), torch.full((4,), 128), torch.empty(0)],
)
def test_constant_input_is_refused(value: Tensor) -> None:
    variant = Variant("a", lambda: torch.ones(1), lambda y: None)

    with pytest.raises(ValueError, match="'images': expected varied values"):
        measure([variant], {"x": torch.arange(3.0), "images": value}, 20)


def test_wrong_output_is_not_timed() -> None:
    clock = Clock()
    right = Variant("right", clock.call("right", [1.0]), lambda y: None)
    wrong = Variant("wrong", clock.call("wrong", [1.0]), lambda y: "3 dB off")

    found = measure([right, wrong], INPUTS, 20, clock=clock)

    assert found["wrong"] == "refused: 3 dB off"
    assert isinstance(found["right"], Timing)
    assert clock.log.count("wrong") == 1  # the run that was checked


def test_nan_output_is_refused_whatever_its_check_says() -> None:
    variant = Variant("a", lambda: torch.tensor([1.0, float("nan")]), lambda y: None)

    assert measure([variant], INPUTS, 20) == {"a": "refused: its output holds NaN or Inf"}


def test_failing_variant_leaves_the_others() -> None:
    clock = Clock()

    def fail() -> Tensor:
        raise RuntimeError("no kernel\nlong trace")

    variants = [
        Variant("bad", fail, lambda y: None),
        Variant("good", clock.call("good", [1.0]), lambda y: None),
    ]
    found = measure(variants, INPUTS, 20, clock=clock)

    assert found["bad"] == "failed: RuntimeError: no kernel"
    assert isinstance(found["good"], Timing)


def test_variants_take_turns_after_warm_up() -> None:
    clock = Clock()
    calls = {name: clock.call(name, [1.0]) for name in "ab"}

    interleave(calls, 20, clock=clock)

    assert clock.log == ["a", "b"] * (common.WARMUP_ROUNDS + 20)


def test_median_quantiles_and_ratios_on_a_fake_clock() -> None:
    clock = Clock()
    warm = [100.0] * common.WARMUP_ROUNDS  # must not count
    slow = [*warm, *(float(i) for i in range(1, 22))]  # 1 .. 21 s
    fast = [*warm, *(2.0 if i % 2 else 1.0 for i in range(21))]  # 11 times 1 s, 10 times 2 s

    found = interleave(
        {"slow": clock.call("", slow), "fast": clock.call("", fast)}, 21, clock=clock
    )

    assert found["slow"].median_ms == pytest.approx(11e3)
    assert found["slow"].p10_ms == pytest.approx(3e3)
    assert found["slow"].p90_ms == pytest.approx(19e3)
    assert found["fast"].speedup_over(found["slow"]) == pytest.approx(11.0)
    # Pairs: 1, 3, 5, ..., 21 from the odd rounds, 1, 2, ..., 10 from the even ones; the 11th is 7.
    assert found["fast"].paired_speedup_over(found["slow"]) == pytest.approx(7.0)


def test_short_calls_are_repeated_within_a_sample() -> None:
    clock = Clock()
    call = clock.call("a", [common.MIN_SAMPLE_S / 8])  # a power of two: no rounding in the quotient

    found = interleave({"a": call}, 20, clock=clock)

    assert len(clock.log) == common.WARMUP_ROUNDS + 20 * 8
    assert found["a"].median_ms == pytest.approx(1e3 * common.MIN_SAMPLE_S / 8)


def test_few_rounds_are_refused_outside_smoke_runs() -> None:
    with pytest.raises(ValueError, match="at least 20, found 19"):
        interleave({}, 19)
    assert interleave({}, 2, smoke=True) == {}


def test_quantile_of_an_even_number_of_values_lies_between_neighbours() -> None:
    assert quantile([4.0, 1.0, 3.0, 2.0], 0.5) == 2.5


def test_copies_exceed_the_cache_up_to_a_limit() -> None:
    weight = torch.randn(8, 32)  # 1 KiB

    assert len(common.copies_beyond_cache(weight, n_bytes=4096)) == 4
    assert len(common.copies_beyond_cache(weight.to(torch.int8), n_bytes=4096)) == 4
    assert len(common.copies_beyond_cache(weight, n_bytes=1 << 30, most=5)) == 5
    assert len({c.data_ptr() for c in common.copies_beyond_cache(weight, n_bytes=4096)}) == 4


def test_table_round_trips_through_json(tmp_path: Path) -> None:
    written = table({"ms": 1.5, "name": "a"}, {"name": "b", "ms": float("inf"), "why": "x | y"})

    path = written.save(tmp_path)

    assert Table.from_json(path.read_text()) == written
    assert Table.from_json(path.read_text()).to_json() == path.read_text()


def test_table_keys_follow_the_columns() -> None:
    first = table({"name": "a", "ms": 1.5, "why": "w"}).to_json()
    second = table({"why": "w", "ms": 1.5, "name": "a"}).to_json()

    assert first == second
    assert list(json.loads(first)["rows"][0]) == ["name", "ms", "why"]


def test_markdown_shows_every_cell_and_the_machine() -> None:
    lines = table({"name": "a", "ms": 123.4}, {"name": "b", "why": "x | y"}).to_markdown()

    assert "| name | ms | why |\n|---|---:|---|\n| a | 123 | - |\n| b | - | x \\| y |\n" in lines
    assert "- commit: abc\n" in lines
    assert "a note" in lines


def test_unknown_column_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no column \['speed'\]"):
        table({"name": "a", "speed": 1.0})


def test_machine_names_what_decides_the_numbers() -> None:
    machine = Machine.here()

    assert machine.aten in ("AVX2", "AVX512", "DEFAULT", "NO AVX") or "SVE" in machine.aten
    assert machine.int8 in ("absent", "saturates (no VNNI in use)", "exact (VNNI)")
    assert machine.versions["torch"] == torch.__version__
    assert machine.threads == torch.get_num_threads()


def test_isa_environment_restarts_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr(common.os, "execve", lambda path, argv, env: started.append(dict(env)))
    for name in common.ISA_VARIABLES:
        monkeypatch.delenv(name, raising=False)

    common.reexec_with_isa("native")
    assert started == []

    common.reexec_with_isa("avx2")
    assert started[0].items() >= common.ISA_ENVIRONMENT["avx2"].items()

    for name, value in common.ISA_ENVIRONMENT["avx2"].items():
        monkeypatch.setenv(name, value)
    common.reexec_with_isa("avx2")
    assert len(started) == 1
