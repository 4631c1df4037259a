"""Train a small video diffusion transformer on moving shapes, make its attention sparse in three
ways, and print and draw what each does to the same videos.

    python examples/sparse_video_dit.py [figure.png]

Takes about three minutes on two cores; nothing is downloaded. Attention over 8 x 8 x 8 tokens keeps
20 % of the key blocks, the first (noisiest) fifth of the steps stays dense, one graph serves both.
Expect online to be several times closer to dense than sparse without correction.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxq.passes.rectified_spaattn import ByTimestep, ReplaceAttention

FRAMES, SIDE, PATCH, WIDTH, HEADS, DEPTH = 8, 16, 2, 96, 3, 4
STEPS, BATCH, PEAK_LR, SAMPLING_STEPS = 700, 8, 2e-3, 25
SPARSE = ReplaceAttention(
    density=ByTimestep(levels=(0.8,), densities=(0.2, 1.0)), block_size=16, min_tokens=512,
    keep_neighbours=False, top_p=0.0,
)  # fmt: skip


def moving_shapes(n: int) -> Tensor:
    """Return videos `[n, 3, FRAMES, SIDE, SIDE]` in [-1, 1]: a disc and a square that bounce."""
    time_, half = torch.arange(FRAMES).view(1, 1, FRAMES), SIDE / 2
    radius = torch.empty(n, 2, 1).uniform_(2, 3.5)
    place, speed = torch.rand(n, 2, 2, 1) * SIDE, torch.empty(n, 2, 2, 1).uniform_(-2, 2)
    free = (half - radius).unsqueeze(2) * 2
    path = (place + speed * time_.unsqueeze(0)) % (2 * free)  # [n, shape, axis, frame]
    centre = radius.unsqueeze(2) + torch.minimum(path, 2 * free - path)
    grid = torch.arange(SIDE) + 0.5
    dy = (grid.view(1, 1, 1, -1, 1) - centre[:, :, 0, :, None, None]).abs()
    dx = (grid.view(1, 1, 1, 1, -1) - centre[:, :, 1, :, None, None]).abs()
    reach = radius[..., None, None]
    far = torch.stack([(dy**2 + dx**2).sqrt()[:, 0], torch.maximum(dy, dx)[:, 1]], 1)
    shape = (reach - far + 0.5).clamp(0, 1)  # [n, shape, frame, y, x], soft edges
    colour = F.one_hot(torch.stack([torch.randperm(3)[:2] for _ in range(n)]), 3).float()
    video = torch.zeros(n, 3, FRAMES, SIDE, SIDE)
    for i in range(2):
        cover = shape[:, i, None]
        video = video * (1 - cover) + colour[:, i, :, None, None, None] * cover
    return video * 2 - 1


class Block(nn.Module):
    """Attention and MLP, both modulated by the time-step."""

    def __init__(self) -> None:
        super().__init__()
        self.modulation = nn.Linear(WIDTH, 6 * WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        nn.init.zeros_(self.modulation.weight)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        a, b, gate, c, d, gate2 = self.modulation(condition).unsqueeze(1).chunk(6, -1)
        qkv = self.qkv(F.layer_norm(x, (WIDTH,)) * (1 + a) + b).unflatten(-1, (3, HEADS, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = F.rms_norm(q, (q.shape[-1],)), F.rms_norm(k, (k.shape[-1],))
        h = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + gate * self.out(h)
        h = F.layer_norm(x, (WIDTH,)) * (1 + c) + d
        return x + gate2 * self.down(F.gelu(self.up(h)))


class VideoDiT(nn.Module):
    """Predicts the velocity of a rectified flow, noise minus video."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv3d(3, WIDTH, (1, PATCH, PATCH), (1, PATCH, PATCH))
        side = SIDE // PATCH
        self.position = nn.Parameter(torch.randn(1, FRAMES * side * side, WIDTH) * 0.5)
        self.time = nn.Sequential(nn.Linear(64, WIDTH), nn.SiLU(), nn.Linear(WIDTH, WIDTH))
        self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
        self.head = nn.Linear(WIDTH, 3 * PATCH * PATCH)

    def forward(self, latents: Tensor, timestep: Tensor) -> Tensor:
        angles = timestep[:, None] * torch.logspace(0, 3, 32, device=timestep.device)
        condition = F.silu(self.time(torch.cat([angles.sin(), angles.cos()], -1)))
        x = self.embed(latents).flatten(2).transpose(1, 2) + self.position
        for block in self.blocks:
            x = block(x, condition)
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
        t = torch.sigmoid(torch.randn(BATCH))
        mix = t.view(-1, 1, 1, 1, 1)
        loss = F.mse_loss(model((1 - mix) * video + mix * noise, t), noise - video)
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
        x = x - model(x, t) / SAMPLING_STEPS
    return x
