"""Two small diffusers models that draw handwritten digits: trained on scikit-learn's 8 x 8 pixels,
sampled by diffusers' own DDIM."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiTTransformer2DModel, UNet2DModel
from digits_vit import digits
from torch import Tensor, nn

BATCH, PEAK_LR = 32, 3e-3


def unet(width: int) -> nn.Module:
    """Return a class-conditional UNet of two resolutions, with attention in the middle."""
    return UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, num_class_embeds=10,
        block_out_channels=(width // 2, width), norm_num_groups=4, attention_head_dim=16,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip


def dit(width: int) -> nn.Module:
    """Return a class-conditional DiT of three blocks over 16 patches, `2 * width` channels."""
    return DiTTransformer2DModel(
        sample_size=8, patch_size=2, in_channels=1, out_channels=1, num_embeds_ada_norm=10,
        num_layers=3, num_attention_heads=width // 16, attention_head_dim=32, norm_num_groups=1,
    )  # fmt: skip


def scheduler(n_steps: int) -> DDIMScheduler:
    """Return DDIM with its steps set."""
    made = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    made.set_timesteps(n_steps)
    return made


def train(build: Callable[[int], nn.Module], width: int, steps: int) -> nn.Module:
    """Build a model, teach it which noise was added to a digit, and return it in eval mode."""
    torch.manual_seed(0)
    model, noising = build(width), scheduler(1)
    images, labels, _, _ = digits()
    images = 2 * (images - images.min()) / (images.max() - images.min()) - 1
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, PEAK_LR, total_steps=steps)
    for _ in range(steps):
        chosen, t = torch.randint(len(images), (BATCH,)), torch.randint(1000, (BATCH,))
        noise = torch.randn(BATCH, 1, 8, 8)
        noisy = noising.add_noise(images[chosen], noise, t)
        found = model(noisy, timestep=t, class_labels=labels[chosen]).sample
        loss = F.mse_loss(found, noise)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def sample(model: Callable[..., Any], n_steps: int, count: int, seed: int) -> Tensor:
    """Draw digits 0, 1, 2, ... `[count, 1, 8, 8]` from noise of a seed."""
    x = torch.randn(count, 1, 8, 8, generator=torch.Generator().manual_seed(seed))
    ddim, labels = scheduler(n_steps), torch.arange(count) % 10
    for t in ddim.timesteps:
        noise = model(x, timestep=t.expand(count), class_labels=labels).sample
        x = ddim.step(noise, t, x).prev_sample
    return x
