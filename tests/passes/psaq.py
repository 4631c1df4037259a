"""What the tests of PSAQ-ViT share: small vision transformers, and images they dream up."""

from typing import Any

import torch
from torch import Tensor, nn

import fxq
from fxq.passes.psaq_vit import Synthesis, SyntheticImages, synthesize

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
QUICK = Synthesis(n_steps=5, n_stages=2)


class Manual(nn.Module):
    """A ViT by hand, one class token, with attention written out or fused."""

    def __init__(self, fused: bool, prefix: int = 1, heads: int = 2) -> None:
        super().__init__()
        self.fused, self.heads = fused, heads
        self.stem = nn.Conv2d(3, 16, 4, 4)
        self.prefix = nn.Parameter(torch.randn(1, prefix, 16))
        self.mix = nn.Linear(16, 48)
        self.back, self.head = nn.Linear(16, 16), nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images).flatten(2).mT
        x = torch.cat([self.prefix.expand(x.shape[0], -1, -1), x], 1)
        for _ in range(2):
            q, k, v = self.mix(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
            if self.fused:
                a = nn.functional.scaled_dot_product_attention(q, k, v)
            else:
                a = ((q @ k.mT) * q.shape[-1] ** -0.5).softmax(-1) @ v
            x = x + self.back(a.transpose(1, 2).flatten(2))
        return self.head(x.mean(1))


def lively(seed: int = 0, depth: int = 2) -> tuple[nn.Module, Tensor]:
    """A ViT whose weights are not the tiny ones of its initialization: images make a difference."""
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(seed)
    model: nn.Module = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=depth, num_heads=2, num_classes=5
    )
    example = torch.randn(1, 3, 16, 16)
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            matrix = name.endswith("weight")
            nn.init.normal_(parameter, std=parameter[0].numel() ** -0.5 if matrix else 0.5)
    return model.eval(), example


def graph_of(model: nn.Module, example: Any) -> torch.fx.GraphModule:
    return fxq.capture(model.eval(), example).graph_module


def dream(model: nn.Module, example: Tensor, **changes: Any) -> SyntheticImages:
    arguments: dict[str, Any] = {
        "mean": MEAN, "std": STD, "n_images": 4, "settings": QUICK
    } | changes  # fmt: skip
    return synthesize(model, example, **arguments)
