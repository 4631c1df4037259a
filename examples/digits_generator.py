"""A small autoregressive generator of handwritten digits: scikit-learn's 8 x 8 pixels as 64 tokens
of 16 levels, one after the other, by class. Norms are modulated per token, as RAR's are."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

LEVELS, LENGTH, CLASSES = 16, 64, 10
BATCH, PEAK_LR = 32, 3e-3


def tokens() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return training tokens `[1437, 64]`, labels, and the same for testing, int64."""
    data = load_digits()
    levels = torch.tensor(data.images).long().clamp(max=LEVELS - 1).flatten(1)
    labels = torch.tensor(data.target).long()
    order = torch.randperm(len(levels), generator=torch.Generator().manual_seed(0))
    train, test = order[:1437], order[1437:]
    return levels[train], labels[train], levels[test], labels[test]


class Block(nn.Module):
    """Causal attention and an MLP, each after a norm that the condition of the token modulates."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 32
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.modulation = nn.Linear(width, 6 * width)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        parts = self.modulation(F.silu(condition)).chunk(6, -1)
        shift1, scale1, gate1, shift2, scale2, gate2 = parts
        batch, length, width = x.shape
        y = self.qkv(self.norm1(x) * (1 + scale1) + shift1)
        q, k, v = y.reshape(batch, length, 3, self.heads, 32).permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + gate1 * self.proj(y.transpose(1, 2).reshape(batch, length, width))
        y = self.norm2(x) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(F.gelu(self.fc1(y)))


class Generator(nn.Module):
    """The class stands first, then the pixels; what comes out at t says which pixel t has."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.classes, self.pixels = nn.Embedding(CLASSES, width), nn.Embedding(LEVELS, width)
        self.positions = nn.Parameter(torch.randn(LENGTH, width) / width**0.5)
        self.blocks = nn.ModuleList(Block(width) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, LEVELS)

    def forward(self, labels: Tensor, pixels: Tensor) -> Tensor:
        """Return logits `[B, 64, 16]` of every pixel, given those before it.

        Args:
            labels: `[B]`.
            pixels: `[B, 64]`; pixel t is not looked at by the outputs 0 to t.
        """
        first = self.classes(labels)[:, None]
        x = torch.cat([first, self.pixels(pixels[:, :-1])], 1) + self.positions
        condition = first + self.positions
        for block in self.blocks:
            x = block(x, condition)
        return self.head(self.norm(x))


def train(width: int, depth: int, steps: int) -> Generator:
    """Build a generator, teach it the training digits, and return it in eval mode."""
    torch.manual_seed(0)
    model = Generator(width, depth)
    pixels, labels, _, _ = tokens()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(pixels), (BATCH,))
        logits = model(labels[chosen], pixels[chosen])
        loss = F.cross_entropy(logits.transpose(1, 2), pixels[chosen])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def sample(model: Callable[[Tensor, Tensor], Tensor], labels: Tensor, seed: int) -> Tensor:
    """Draw digits of given classes `[B, 64]`, pixel after pixel. The random numbers are those of
    the seed, whatever the model: two that agree draw the same digits."""
    drawn = torch.rand(len(labels), LENGTH, 1, generator=torch.Generator().manual_seed(seed))
    pixels = torch.zeros(len(labels), LENGTH, dtype=torch.int64)
    for t in range(LENGTH):
        below = model(labels, pixels)[:, t].softmax(-1).cumsum(-1) < drawn[:, t]
        pixels[:, t] = below.sum(-1).clamp(max=LEVELS - 1)
    return pixels
