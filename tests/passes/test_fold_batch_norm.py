"""FoldBatchNorm keeps the float function, and says what it did or why not. The judge is the eager
model."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.fx import GraphModule

import fxq
from fxq.account import account
from fxq.capturing import capture
from fxq.graph import is_op
from fxq.layer import layer_of
from fxq.passes import w8a8
from fxq.passes.common import Calibrate, Convert, FoldBatchNorm, InsertObservers
from fxq.pipeline import Recipe

NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def randomized(model: nn.Module) -> nn.Module:
    """Give batch norms statistics and factors that are far from the identity."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()  # type: ignore[union-attr,operator]
            module.running_var.uniform_(0.1, 5.0)  # type: ignore[union-attr,operator]
            if module.affine:
                module.weight.data.normal_()  # some factors are negative
                module.bias.data.normal_()
    return model.eval()


def norms_left(gm: GraphModule) -> int:
    return sum(is_op(n, torch.ops.aten.batch_norm.default) for n in gm.graph.nodes)


class Shared(nn.Module):
    """One convolution whose output is read twice, and one that is called twice."""

    def __init__(self, *, twice: bool) -> None:
        super().__init__()
        self.conv, self.norm, self.other = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        self.twice = twice

    def forward(self, x: Tensor) -> Tensor:
        if self.twice:
            return self.other(self.conv(self.norm(self.conv(x))))
        y = self.conv(x)
        return self.norm(y) + y


MODELS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "2d": (lambda: nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU()), (2, 3, 7, 7)),
    "no bias": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8, eps=0.1)),
        (2, 4, 7, 7),
    ),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(8, 16, 3, groups=8), nn.BatchNorm2d(16)),
        (2, 8, 7, 7),
    ),
    "not affine": (
        lambda: nn.Sequential(nn.Conv1d(3, 5, 3), nn.BatchNorm1d(5, affine=False)),
        (2, 3, 9),
    ),
    "3d": (lambda: nn.Sequential(nn.Conv3d(2, 4, 2), nn.BatchNorm3d(4)), (1, 2, 4, 4, 4)),
    "called twice": (lambda: Shared(twice=True), (2, 3, 4, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_float_function_stays(name: str) -> None:
    make, shape = MODELS[name]
    model, x = randomized(make()), torch.randn(shape)
    gm = capture(model, x).graph_module

    result = FoldBatchNorm().run(gm)

    assert result.modified
    assert norms_left(gm) == 0
    torch.testing.assert_close(gm(x)[0], model(x), rtol=1e-4, atol=1e-5)
    rows = [row for row in account(gm) if row.kind == "conv"]
    assert all("folded into it" in row.layer.remarks for row in rows)


def test_what_others_read_stays_and_says_so() -> None:
    model, x = randomized(Shared(twice=False)), torch.randn(2, 3, 4, 4)
    gm = capture(model, x).graph_module

    result = FoldBatchNorm().run(gm)

    assert not result.modified
    assert norms_left(gm) == 1
    (conv,) = [n for n in gm.graph.nodes if is_op(n, torch.ops.aten.conv2d.default)]
    assert [t.did for t in layer_of(conv).treatments] == [
        "batch norm not folded: others read the convolution too"
    ]


def test_statistics_of_the_batch_stay() -> None:
    norm = nn.BatchNorm2d(8, track_running_stats=False)
    model, x = nn.Sequential(nn.Conv2d(3, 8, 3), norm).eval(), torch.randn(2, 3, 7, 7)
    gm = capture(model, x).graph_module

    result = FoldBatchNorm().run(gm)

    assert not result.modified
    torch.testing.assert_close(gm(x)[0], model(x))


def test_a_folded_model_is_quantized_and_verified() -> None:
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten()))
    x = torch.randn(4, 3, 7, 7)
    passes = (FoldBatchNorm(), InsertObservers(w8a8.STATIC_LAYER, ("conv",)), Calibrate())
    program = fxq.compress(model, x, Recipe("folded", (*passes, Convert())), data=[x])

    verification = fxq.verify(program, x, model=model)

    assert verification.ok
    assert "shifted its input or output" in str(verification)
    assert norms_left(program.graph_module) == 0
