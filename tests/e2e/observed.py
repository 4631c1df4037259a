"""What tests of `fxq.observe` share: a recipe, and ranges by hooks on the eager model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fxq.observing import Observed
from fxq.passes.common import Calibrate, Convert, InsertObservers
from fxq.pipeline import Recipe
from fxq.spec import LayerSpec, PerChannel, PerTensor, QuantSpec

ACTIVATION = QuantSpec(symmetric=False, granularity=PerTensor())
LAYER = LayerSpec(ACTIVATION, QuantSpec(granularity=PerChannel(0)))
STATIC = Recipe("static", (InsertObservers(LAYER), Calibrate(), Convert()))


@contextmanager
def hooked(model: nn.Module) -> Iterator[dict[str, tuple[float, float]]]:
    """Smallest and largest input of every linear while the eager model runs."""
    found: dict[str, tuple[float, float]] = {}

    def hook(name: str) -> Callable[..., None]:
        def see(module: nn.Module, args: tuple[Tensor]) -> None:
            low, high = found.get(name, (torch.inf, -torch.inf))
            found[name] = min(low, float(args[0].min())), max(high, float(args[0].max()))

        return see

    linears = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    handles = [module.register_forward_pre_hook(hook(name)) for name, module in linears]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def ranges(seen: Observed) -> dict[str, tuple[float, float]]:
    return {
        layer.name: (float(layer.observer.low), float(layer.observer.high))
        for layer in seen.layers.values()
    }


class Block(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.up, self.down, self.scale = nn.Linear(16, 32), nn.Linear(32, 16), scale

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.scale
        torch._dynamo.graph_break()
        return x + self.down(torch.relu(self.up(x)))


class Blocks(nn.Module):
    """Blocks of one class that Dynamo compiles one by one, and a head that is left out at times."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(scale) for scale in (1.0, 2.0, 3.0))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor, head: bool = True) -> Tensor:
        x = self.blocks[2](self.blocks[1](self.blocks[0](x)))
        return self.head(x) if head else x


class TwoHeads(nn.Module):
    """A head that is called only when asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 32), nn.Linear(32, 8)

    def forward(self, x: Tensor, head: bool = True) -> Tensor:
        x = torch.relu(self.body(x))
        return self.head(x) if head else x
