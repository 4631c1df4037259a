"""Train a small video diffusion transformer on moving shapes, make its attention sparse in three
ways, and print and draw what each does to the same videos.

    python examples/sparse_video_dit.py [figure.png]

Takes about three minutes on two cores; nothing is downloaded. Attention over 8 x 8 x 8 tokens keeps
20 % of the key blocks, the first (noisiest) fifth of the steps stays dense, one graph serves both.
Expect online to be several times closer to dense than sparse without correction.
"""

import sys
import time
from dataclasses import replace

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import fxq
from fxq.passes.rectified_spaattn import ByTimestep, ReplaceAttention
from fxq.pipeline import Recipe

FRAMES, SIDE, PATCH, WIDTH, HEADS, DEPTH = 8, 16, 2, 96, 3, 3
STEPS, BATCH, PEAK_LR, SAMPLING_STEPS = 800, 6, 3e-3, 20
RADIUS, COLOURS = 3.0, ((1.0, 0.55, 0.1), (0.1, 0.65, 0.95))
SPARSE = ReplaceAttention(
    density=ByTimestep(levels=(0.8,), densities=(0.2, 1.0)), block_size=16, min_tokens=512,
    keep_neighbours=False, top_p=0.0,
)  # fmt: skip


def moving_shapes(n: int) -> Tensor:
    """Return videos `[n, 3, FRAMES, SIDE, SIDE]` in [-1, 1]: a disc and a square that bounce."""
    speed = torch.empty(n, 2, 2, 1).uniform_(-2, 2)  # [n, axis, shape, frame]
    free = SIDE - 2 * RADIUS
    path = (torch.rand(n, 2, 2, 1) * SIDE + speed * torch.arange(FRAMES)) % (2 * free)
    centre = RADIUS + torch.minimum(path, 2 * free - path)
    pixels = torch.arange(SIDE) + 0.5
    dy = (pixels[:, None] - centre[:, 0, ..., None, None]).abs()
    dx = (pixels - centre[:, 1, ..., None, None]).abs()  # [n, shape, frame, 1, x]
    far = (dy**2 + dx**2).sqrt()[:, 0], torch.maximum(dy, dx)[:, 1] + 0.5
    video = torch.zeros(n, 3, FRAMES, SIDE, SIDE)
    for colour, distance in zip(COLOURS, far, strict=True):
        cover = (RADIUS - distance + 0.5).clamp(0, 1)[:, None]  # soft edges
        video = video * (1 - cover) + torch.tensor(colour).view(3, 1, 1, 1) * cover
    return video * 2 - 1


def rotary() -> tuple[Tensor, Tensor]:
    """Return cosines and sines `[tokens, head_dim]` of 3-D rotary positions."""
    side = SIDE // PATCH
    place = torch.cartesian_prod(*(torch.arange(n) for n in (FRAMES, side, side))).float()
    pairs = (4, 6, 6)  # of channels, per axis
    angles = [place[:, i, None] * torch.logspace(0.3, -1, n) for i, n in enumerate(pairs)]
    angle = torch.cat(angles, 1).repeat(1, 2)
    return angle.cos(), angle.sin()


class Block(nn.Module):
    """Attention and MLP, both modulated by the time-step."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor, condition: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        a, b, gate, c, d, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, -1)
        qkv = self.qkv(F.layer_norm(x, (WIDTH,)) * (1 + a) + b).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = (self.rotate(F.rms_norm(h, (h.shape[-1],)), cos, sin) for h in (q, k))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.out(h)
        h = F.layer_norm(x, (WIDTH,)) * (1 + c) + d
        return x + gate2 * self.down(F.gelu(self.up(h)))

    def rotate(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return x * cos + torch.cat([-second, first], -1) * sin


class VideoDiT(nn.Module):
    """Predicts the clean video from a noisy one."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, WIDTH, (1, PATCH, PATCH), (1, PATCH, PATCH))
        side = SIDE // PATCH
        self.position = nn.Parameter(torch.randn(1, FRAMES * side * side, WIDTH) * 0.1)
        for name, table in zip(("cos", "sin"), rotary(), strict=True):
            self.register_buffer(name, table)
        self.time = nn.Sequential(nn.Linear(64, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 3 * PATCH * PATCH)

    def forward(self, video: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep[:, None] * torch.logspace(0, 2, 32, device=timestep.device)
        condition = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], -1)))
        x = self.embed(video).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, condition, self.cos, self.sin)
        side = SIDE // PATCH
        x = self.head(F.layer_norm(x, (WIDTH,))).unflatten(1, (FRAMES, side, side))
        x = x.unflatten(-1, (3, PATCH, PATCH)).permute(0, 4, 1, 2, 5, 3, 6)
        return x.flatten(5, 6).flatten(3, 4)


def train(say) -> VideoDiT:
    model = VideoDiT()
    optimizer = torch.optim.AdamW(model.parameters(), PEAK_LR, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=STEPS)
    running = 1.0
    for step in range(STEPS):
        video, noise = moving_shapes(BATCH), torch.randn(BATCH, 3, FRAMES, SIDE, SIDE)
        t = torch.sigmoid(torch.randn(BATCH) + 0.5)
        mix = t.view(-1, 1, 1, 1, 1)
        loss = F.mse_loss(model((1 - mix) * video + mix * noise, t), video)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        running += 0.05 * (loss.item() - running)
        if step % 100 == 99:
            say(f"step {step + 1} of {STEPS}: loss {running:.3f}")
    return model.eval()


@torch.no_grad()
def sample(model: nn.Module, noise: Tensor) -> Tensor:
    x = noise
    for i in range(SAMPLING_STEPS):
        t = torch.full((len(x),), 1 - i / SAMPLING_STEPS)
        x = x + (model(x, t) - x) / (SAMPLING_STEPS - i)  # towards the clean video
    return x


def frames(video: Tensor) -> Tensor:
    """Return one video `[3, T, H, W]` as a strip `[H, T * W, 3]` in [0, 1]."""
    framed = F.pad(video.clamp(-1, 1) * 0.5 + 0.5, (0, 1), value=1.0)
    return framed.permute(2, 1, 3, 0).flatten(1, 2)[:, :-1]


def draw(videos: dict[str, Tensor], path: str) -> None:
    import matplotlib.pyplot as plt

    n = len(next(iter(videos.values())))
    figure, axes = plt.subplots(len(videos), n, figsize=(5.2 * n, 0.85 * len(videos)))
    for row, (name, batch) in zip(axes, videos.items(), strict=True):
        row[0].set_ylabel(name, rotation=0, ha="right", va="center", fontsize=11)
        for axis, video in zip(row, batch, strict=True):
            axis.imshow(frames(video), interpolation="nearest")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
    figure.tight_layout(pad=0.4)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Run the example."""
    torch.manual_seed(0)
    console, began = Console(), time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - began:6.1f} s[/dim]  {text}", highlight=False)

    say(f"training a video transformer of {DEPTH} blocks on moving shapes")
    model = train(say)
    noise, t = torch.randn(3, 3, FRAMES, SIDE, SIDE), torch.full((3,), 0.5)
    example = {"video": noise, "timestep": t}
    x = (moving_shapes(3) + noise) / 2
    with torch.no_grad():
        expected = model(x, t)
    videos = {"dense": sample(model, noise)}
    table = Table(title=f"{FRAMES * (SIDE // PATCH) ** 2} tokens, 20 % of the key blocks")
    for name in ("attention", "error of one step", "PSNR of the videos"):
        table.add_column(name, justify="left" if name == "attention" else "right")
    for mode in ("sparse", "paper", "online"):
        recipe = Recipe(mode, (replace(SPARSE, mode=mode),))
        program = fxq.compress(model, example, recipe, strict=True)
        error = (program(x, t) - expected).norm() / expected.norm()
        videos[mode] = sample(program, noise)
        psnr = 10 * torch.log10(4 / F.mse_loss(videos[mode], videos["dense"]))
        table.add_row(mode, f"{error:.4f}", f"{psnr:.1f} dB")
        say(f"{mode}: generated {len(noise)} videos")
    draw(videos, sys.argv[1] if len(sys.argv) > 1 else "sparse_video_dit.png")
    console.print(table)


if __name__ == "__main__":
    main()
