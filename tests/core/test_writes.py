"""In-place writes as values: nothing that eager code writes is lost, aliases stay aliases."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from stateful_models import Assigned, Cache, Masked, Swap, calls, run, seeded
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

import fxq
from fxq.errors import UnsupportedError
from fxq.pipeline import FLOAT
from fxq.writes import check_apart, read_before_writing


@pytest.mark.parametrize("build", [Cache, Swap, Assigned, Masked])
def test_a_program_writes_what_the_model_writes(build: Callable[[], nn.Module]) -> None:
    inputs = calls(build)
    program = fxq.compress(build().eval() if build is not Cache else seeded(), inputs[0], FLOAT)
    model = build().eval() if build is not Cache else seeded()

    found, expected = run(program, inputs), run(model, inputs)

    torch.testing.assert_close(found, expected)
    assert set(program.state) == {name for name, _ in model.named_buffers()}
    torch.testing.assert_close(program.state, dict(model.named_buffers()))


def test_the_model_and_the_example_stay_as_they_were() -> None:
    model, (example, *_) = seeded(), calls(Cache)

    fxq.compress(model, example, "w8a8_static", data=calls(Cache))

    assert model.count == 0
    assert not model.cache.any()
    assert not example[0].any()


def test_a_program_returns_the_very_tensors_it_wrote_to() -> None:
    program, (example, *_) = fxq.compress(seeded(), calls(Cache)[0], FLOAT), calls(Cache)

    result = program(*example)

    assert result["cache"] is program.state["cache"]
    assert result["given"] is example[0]


def test_a_result_that_was_copied_into_a_buffer_stays_what_it_was() -> None:
    class Keeps(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("last", torch.zeros(2, 4))

        def forward(self, x: Tensor) -> Tensor:
            y = x * 2
            self.last.copy_(y)
            return y

    program = fxq.compress(Keeps().eval(), torch.ones(2, 4), FLOAT)

    first = program(torch.ones(2, 4))
    program(torch.full((2, 4), 5.0))
    first_again = first.clone()
    first.fill_(9)

    assert torch.equal(first_again, torch.full((2, 4), 2.0))
    assert torch.equal(program.state["last"], torch.full((2, 4), 10.0))


def test_a_buffer_with_two_names_that_is_written_to_is_refused_or_right() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(4))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return x + self.count

    inner = Inner()
    model = nn.Sequential(inner, nn.Sequential(inner)).eval()

    with pytest.raises(UnsupportedError, match=r"cannot be captured by torch\.export"):
        fxq.capture(model, torch.randn(2, 4))
    assert not inner.count.any()


def test_an_argument_that_shares_memory_with_the_state_is_refused() -> None:
    program = fxq.compress(Assigned().eval(), torch.randn(4, 3), FLOAT)

    with pytest.raises(UnsupportedError, match="'mean', which the model writes to"):
        program(program.state["mean"].expand(4, 3))


def test_a_program_is_reset_copied_and_read_by_its_state() -> None:
    program = fxq.compress(seeded(), calls(Cache)[0], FLOAT)
    run(program, calls(Cache))
    copied = copy.deepcopy(program)

    copied.reset()

    assert program.state["count"] == 3
    assert copied.state["count"] == 0
    assert not copied.state["cache"].any()
    torch.testing.assert_close(run(copied, calls(Cache)), run(seeded(), calls(Cache)))


def test_a_program_is_saved_with_its_state(tmp_path: Path) -> None:
    program = fxq.compress(seeded(), calls(Cache)[0], "w8a8_dynamic")
    run(program, calls(Cache)[:2])

    fxq.save(program, tmp_path / "cache.fxq")
    loaded = fxq.load(tmp_path / "cache.fxq")

    assert loaded.signature == program.signature
    torch.testing.assert_close(loaded.state, program.state, rtol=0, atol=0)
    assert loaded.state["count"] == 2
    torch.testing.assert_close(run(loaded, calls(Cache)), run(program, calls(Cache)))
    loaded.reset()
    assert loaded.state["count"] == 0
    assert not loaded.state["cache"].any()


def test_calibration_sees_the_state_the_model_would_have() -> None:
    """Ranges come from calls in a row: the third reads what the first two wrote."""

    class Running(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(1, 4))
            self.head = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            self.total += x.sum(0, keepdim=True)
            return self.head(self.total)

    ones = torch.ones(1, 4)
    program = fxq.compress(Running().eval(), ones, "w8a8_static", data=[ones] * 3)

    (scale,) = (b for n, b in program.named_buffers() if n.endswith("input_scale"))
    # The largest total is 3, in 255 steps.
    torch.testing.assert_close(scale.flatten(), torch.tensor([3.0 / 255]), rtol=1e-5, atol=0)
    assert program.state["total"].sum() == 0


def test_a_model_that_writes_to_a_parameter_is_refused() -> None:
    class Decays(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                self.weight.mul_(0.5)
            return super().forward(x)

    model = Decays(4, 4).eval()
    before = model.weight.clone()

    with pytest.raises(UnsupportedError, match=r"writes to the parameters \['weight'\]"):
        fxq.capture(model, torch.randn(2, 4))
    assert torch.equal(model.weight, before)


def test_an_argument_that_shares_written_memory_is_refused() -> None:
    class Both(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            a.add_(1)
            return a + b

    program = fxq.compress(Both().eval(), (torch.zeros(4), torch.zeros(4)), FLOAT)
    memory = torch.zeros(6)

    with pytest.raises(UnsupportedError, match=r"'a', which the model writes to.*shares memory"):
        program(memory[:4], memory[2:])
    assert program(memory[:4].view(4), torch.zeros(4)).sum() == 4


@pytest.mark.parametrize(
    ("first", "second", "meet"),
    [
        (slice(0, 3), slice(3, 6), False),
        (slice(0, 4), slice(3, 6), True),
        (slice(0, 6), slice(2, 3), True),
        (slice(0, 0), slice(0, 6), False),
    ],
)
def test_memory_meets_where_ranges_do(first: slice, second: slice, meet: bool) -> None:
    memory = torch.zeros(6, 2)
    named = [("a", memory[first]), ("n", 3), ("b", memory[second])]

    if meet:
        with pytest.raises(UnsupportedError, match=r"here: expected 'b'.*memory with 'a'"):
            check_apart(named, [2], "here")
    else:
        check_apart(named, [2], "here")
        check_apart([("a", memory[first]), ("b", memory[second].clone())], [0], "here")


@pytest.mark.parametrize("read", [torch.clone, lambda a: a.clone().t()])
def test_every_write_reads_what_was_there_before_the_first(
    read: Callable[[Tensor], Tensor],
) -> None:
    def write(a: Tensor, b: Tensor, c: Tensor) -> None:
        old, new = read(a), c + 1
        a.copy_(b)
        b.copy_(old)
        c.copy_(new)

    a, b, c = torch.randn(3, 3), torch.randn(3, 3), torch.zeros(2)
    expected = b.clone(), read(a), c + 1
    gm = make_fx(write, tracing_mode="fake")(a, b, c)
    for clone in gm.graph.find_nodes(op="call_function", target=torch.ops.aten.clone.default):
        clone.replace_all_uses_with(clone.args[0])  # as Inductor of torch 2.11 does
        gm.graph.erase_node(clone)

    read_before_writing(gm)
    gm(a, b, c)

    assert all(map(torch.equal, (a, b, c), expected))
    own = torch.ops.aten.lift_fresh_copy.default
    assert len(gm.graph.find_nodes(op="call_function", target=own)) == 1
