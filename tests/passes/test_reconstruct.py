"""Reconstruct: closer to the model on data it has not seen, kept to the last integer, resumable,
each block run once in each form; a weight that two layers share has one set of codes."""

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from reconstruction_cases import (
    FAST,
    W3A6,
    batches,
    compressed,
    error,
    program_of,
    results_of_the_last_block,
)
from test_blocks import W4A8, SmallUNet, Transformer
from torch import Tensor, nn

import fxq
from fxq.account import account
from fxq.calibrate import NO_DATA
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.passes.common.reconstruction import (
    BlockLoss,
    Reconstruct,
    StraightThrough,
    cut,
    training,
)
from fxq.passes.common.reconstruction import frontier as frontier_module
from fxq.passes.common.reconstruction.losses import relative_error
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, MeanSquaredError, QuantSpec


@pytest.mark.parametrize("kind", [Transformer, SmallUNet])
@pytest.mark.parametrize(
    "method", [FAST.method, StraightThrough(learning_rate=3e-2)], ids=["rounding", "straight"]
)
def test_the_program_comes_closer_to_the_model_on_other_data(
    kind: type[nn.Module], method: Any
) -> None:
    plain, model = program_of(kind)
    program, _ = program_of(kind, replace(FAST, method=method))

    assert error(program, model, kind) < 0.8 * error(plain, model, kind)


def test_codes_scales_and_files_are_what_was_learned(tmp_path: Path) -> None:
    program, model = program_of(Transformer, FAST)
    (x,) = batches(Transformer, 1, 3)[0]
    fxq.save(program, tmp_path / "p.safetensors")

    loaded = fxq.load(tmp_path / "p.safetensors")

    assert torch.equal(loaded(x), program(x))
    assert fxq.verify(program, (x,), model=model).ok
    records = [row.layer for row in account(program.graph_module) if row.kind == "linear"]
    dids = [next(t.did for t in r.treatments if t.by == "Reconstruct") for r in records]
    assert sum("error of its block" in str(did) for did in dids) >= 12  # all of the two blocks
    nearest, _ = program_of(Transformer)
    codes = [
        dict(p.graph_module.named_buffers())["blocks.0.up.weight_codes"] for p in (program, nearest)
    ]
    assert 0 < int((codes[0] != codes[1]).sum()) < codes[0].numel() / 2
    assert int((codes[0].int() - codes[1]).abs().max()) == 1


def test_the_same_seed_gives_the_same_bytes_and_the_users_random_numbers_stay() -> None:
    observed = Recipe("o", W4A8).apply(
        fxq.capture(Transformer().eval(), torch.randn(2, 6, 16)).graph_module,
        batches(Transformer, 1, 0),
    )
    before = torch.random.get_rng_state()
    replace(FAST, steps=2).run(observed, batches(Transformer, 5, 0))
    assert torch.equal(torch.random.get_rng_state(), before)
    one, _ = program_of(Transformer, FAST)
    other, _ = compressed(Transformer, FAST)
    third, _ = compressed(Transformer, replace(FAST, seed=1))
    (x,) = batches(Transformer, 1, 3)[0]
    assert torch.equal(one(x), other(x))
    assert not torch.equal(one(x), third(x))


@pytest.mark.parametrize("place", ["cpu", "disk"])
def test_where_values_are_kept_changes_nothing(place: Any) -> None:
    expected, _ = program_of(SmallUNet, replace(FAST, steps=5))
    found, _ = compressed(SmallUNet, replace(FAST, steps=5, place=place))
    x = batches(SmallUNet, 1, 3)[0]
    assert torch.equal(found(*x), expected(*x))


def test_interrupted_work_goes_on_with_the_block_it_was_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = program_of(Transformer, FAST)
    kept, lines = tmp_path / "kept", list[str]()

    def stop(text: str) -> None:
        if text.startswith("blocks.1"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compressed(Transformer, FAST, checkpoint=kept, progress=stop)
    trained = []
    original = training.BlockTraining.train

    def counted(self: Any, *args: Any) -> Any:
        trained.append(self.block.name)
        return original(self, *args)

    monkeypatch.setattr(training.BlockTraining, "train", counted)
    found, _ = compressed(Transformer, FAST, checkpoint=kept, progress=lines.append)

    (x,) = batches(Transformer, 1, 3)[0]
    assert torch.equal(found(x), expected(x))
    assert len(trained) == 1  # the head: what came before was kept
    assert not kept.exists()
    with pytest.raises(KeyboardInterrupt):
        compressed(Transformer, FAST, checkpoint=kept, progress=stop)
    with pytest.raises(ValueError, match="expected one of this model"):
        compressed(Transformer, replace(FAST, steps=29), checkpoint=kept)


def test_what_another_spec_has_learned_is_not_taken_over(tmp_path: Path) -> None:
    """Weights' ranges go by their spec, which no tensor of the observed graph shows."""
    model, data, kept = Transformer().eval(), batches(Transformer, 5, 0), tmp_path / "kept"

    def run(weight: QuantSpec, **options: Any) -> None:
        observe = InsertObservers(LayerSpec(W3A6.activation, weight))
        recipe = Recipe("r", (observe, Calibrate(), replace(FAST, steps=1), Convert()))
        fxq.compress(model, data[0], recipe, data, checkpoint=kept, **options)

    def stop(text: str) -> None:
        if text.startswith("blocks.0"):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(W3A6.weight, progress=stop)
    with pytest.raises(ValueError, match="expected one of this model"):
        run(replace(W3A6.weight, observer=MeanSquaredError()))


def test_values_between_blocks_keep_no_graph_of_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    passes = (InsertObservers(W3A6), Calibrate())
    gm = fxq.capture(Transformer().eval(), batches(Transformer, 1, 0)[0]).graph_module
    observed, kept = Recipe("o", passes).apply(gm, batches(Transformer, 1, 0)), list[bool]()
    original = frontier_module.Frontier.run

    def watched(self: Any, chain: Any, block: Any, gm: Any) -> None:
        original(self, chain, block, gm)
        kept.extend(value.requires_grad for value in getattr(self, chain)[0].values())

    monkeypatch.setattr(frontier_module.Frontier, "run", watched)
    replace(FAST, steps=1).run(observed, batches(Transformer, 1, 0))

    assert kept
    assert not any(kept)


def test_each_block_runs_twice_per_batch_outside_of_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    runs: list[tuple[str, str]] = []
    original = frontier_module.Frontier.run

    def counted(self: Any, chain: Any, block: Any, gm: Any) -> None:
        runs.append((chain, block.name))
        original(self, chain, block, gm)
        # Nothing is kept that no later block reads.
        alive = {name for values in getattr(self, chain) for name in values}
        assert all(self.last_reader.get(n, -1) >= 0 or n in block.outputs for n in alive)

    monkeypatch.setattr(frontier_module.Frontier, "run", counted)
    compressed(SmallUNet, replace(FAST, steps=1))
    assert len(runs) == len(set(runs)) == 2 * 7


def test_a_block_that_cannot_come_closer_stays_as_calibrated() -> None:
    plain, _ = program_of(Transformer)
    wild = Reconstruct(steps=4, method=StraightThrough(learning_rate=30.0))
    program, _ = compressed(Transformer, wild)
    (x,) = batches(Transformer, 1, 3)[0]
    assert torch.equal(program(x), plain(x))
    record = account(program.graph_module)[0].layer
    assert any("no closer" in str(t.did) for t in record.treatments)


def test_layer_errors_count_alike_for_tokens_and_images() -> None:
    exact, found = torch.randn(2, 5, 7), torch.randn(2, 5, 7)
    loss = BlockLoss(layer_weight=0.5)
    for turned in ([exact, found], [exact.transpose(1, 2), found.transpose(1, 2)]):
        value = loss([turned[1], turned[1]], [turned[0], turned[0]], [None, None], 1)
        by_hand = ((found - exact) ** 2).sum() / (exact**2).sum()
        torch.testing.assert_close(value, 1.5 * by_hand)
    assert loss.watched(["a", "b", "c"]) == ("a", "b")
    assert BlockLoss().watched(["a", "b", "c"]) == ()
    nothing = torch.zeros(3)
    assert relative_error(torch.full((3,), 2.0), nothing) == 4  # in units of 1
    zero = loss([exact, found], [exact, exact], [None, None], 1)
    torch.testing.assert_close(zero, 0.5 * by_hand)


def test_bad_input_is_told() -> None:
    gm = Recipe("o", W4A8).apply(
        fxq.capture(Transformer().eval(), torch.randn(2, 6, 16)).graph_module,
        batches(Transformer, 1, 0),
    )
    with pytest.raises(ValueError, match=NO_DATA[:20]):
        FAST.run(gm, [])
    for wrong in (
        {"steps": 0},
        {"rows_per_step": 0},
        {"held_out": 1.5},
        {"inputs_share": -1},
        {"place": "tape"},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            Reconstruct(**wrong)
    with pytest.raises(TypeError, match="blocks"):
        Reconstruct(blocks="blocks.*")  # type: ignore[arg-type]
    assert cut(gm)


def test_layer_losses_train_too() -> None:
    program, model = compressed(Transformer, replace(FAST, loss=BlockLoss(layer_weight=0.8)))
    plain, _ = program_of(Transformer)
    assert error(program, model, Transformer) < error(plain, model, Transformer)


def test_inputs_may_mix_both_chains() -> None:
    program, model = compressed(Transformer, replace(FAST, inputs_share=0.5))
    plain, _ = program_of(Transformer)
    assert error(program, model, Transformer) < error(plain, model, Transformer)


@pytest.mark.parametrize(
    "method",
    [FAST.method, StraightThrough(learning_rate=3e-2, scale_learning_rate=1e-2)],
    ids=["rounding", "straight"],
)
def test_what_was_trained_is_what_is_converted(
    method: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    last = results_of_the_last_block(monkeypatch, "results")
    program, _ = compressed(Transformer, replace(FAST, method=method))

    for x, expected in zip(batches(Transformer, 5, 0), last, strict=True):
        assert torch.equal(program(*x), expected)


def test_a_step_learns_from_as_many_batches_as_its_rows_take(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    taken: list[int] = []
    original = training.BlockTraining._error

    def counted(self: Any, batch: int, *args: Any) -> Tensor:
        taken.append(batch)
        return original(self, batch, *args)

    monkeypatch.setattr(training.BlockTraining, "_error", counted)
    compressed(Transformer, replace(FAST, steps=2, rows_per_step=9, blocks=("blocks.?",)))
    # Batches of four rows, so three of them, twice; for the stem, two blocks and the head.
    assert len(taken) == 3 * 2 * 4
    assert 2 not in taken  # which judges


def run_rank(rank: int, folder: str) -> None:
    """Reconstruct as one of two processes, each with its own batches."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    data = batches(Transformer, 8, 0)[rank::2]
    passes = (InsertObservers(W3A6), Calibrate(), FAST, Convert())
    program = fxq.compress(Transformer().eval(), data[0], Recipe("r", passes), data)
    torch.save(program.graph_module.state_dict(), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_end_with_the_same_program(tmp_path: Path) -> None:
    mp.spawn(run_rank, (str(tmp_path),), nprocs=2)

    one, other = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    nearest, _ = program_of(Transformer)

    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    codes = dict(nearest.graph_module.named_buffers())["blocks.0.up.weight_codes"]
    assert not torch.equal(one["blocks.0.up.weight_codes"], codes)
