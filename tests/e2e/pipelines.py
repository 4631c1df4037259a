"""Pipelines of diffusers as their users call them, small and with random weights.

A `Drawing` is a pipeline, the part of it that is compressed or compiled, and how it is called. Text
encoders are left out, because random ones say nothing: the calls give embeddings instead. What is
drawn are latents, but where a pipeline has a small decoder.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from small_models import ZOO, seeded
from torch import Tensor, nn

TEXT = 24  # channels of the small models' text
TOKENS = 5


@dataclass(frozen=True)
class Drawing:
    """A pipeline and its call.

    Args:
        pipe: the pipeline.
        call: its arguments, the prompt among them.
        part: which attribute of it is the large model.
    """

    pipe: Any
    call: dict[str, Any]
    part: str = "transformer"

    @property
    def model(self) -> Any:
        """The part that is compressed or compiled."""
        return getattr(self.pipe, self.part)

    def replace(self, model: Any) -> None:
        """Put a program or a compiled module in its place."""
        setattr(self.pipe, self.part, model)

    def __call__(self) -> Tensor:
        """Draw with the same noise every time."""
        noise = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 2, "output_type": "latent", **self.call}
        return torch.as_tensor(self.pipe(**call, generator=noise, return_dict=False)[0])


def without_text(build: type, **parts: Any) -> Any:
    """Return a pipeline that has these parts and no text encoders."""
    vacant = dict.fromkeys((
        "vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2", "text_encoder_3",
        "tokenizer_3", "safety_checker", "feature_extractor",
    ))  # fmt: skip
    known = build.__init__.__code__.co_varnames
    pipe = build(**{name: part for name, part in (vacant | parts).items() if name in known})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def prompts(text: int = TEXT, tokens: int = TOKENS, **others: Any) -> dict[str, Any]:
    """Return embeddings of a prompt and of a negative one; of `others`, given for the prompt, the
    negative prompt gets the same."""
    given = {"prompt_embeds": torch.randn(1, tokens, text), **others}
    negative = {name: torch.randn_like(t) if t.is_floating_point() else t.clone()
                for name, t in given.items()}  # fmt: skip
    return given | {f"negative_{name}": value for name, value in negative.items()}


def model_of(build: Callable[..., nn.Module], **config: Any) -> nn.Module:
    """Return a model with the same weights every time, in eval mode, no weight of it zero."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = build(**config).eval()
        for parameter in model.parameters():
            if not parameter.any():
                nn.init.normal_(parameter, std=0.02)
    return model


def dit_pipeline() -> Any:
    """A DiT that draws images of 64 pixels, with guidance unless told otherwise."""
    transformer = diffusers.DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=8, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=1000,
    ).eval()  # fmt: skip
    pipe = diffusers.DiTPipeline(transformer, small_vae(), diffusers.DDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def tiny_unet(**kwargs: Any) -> Any:
    """A UNet with attention in the middle and around it, random weights."""
    torch.manual_seed(0)
    return diffusers.UNet2DModel(**{
        "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
        "block_out_channels": (8, 16), "norm_num_groups": 4, "attention_head_dim": 8,
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "num_class_embeds": 4,
    } | kwargs).eval()  # fmt: skip


def small_vae() -> nn.Module:
    return diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, layers_per_block=1, latent_channels=4
    ).eval()


def dit() -> Drawing:
    return Drawing(dit_pipeline(), {"class_labels": [1], "output_type": "np"})


def wan() -> Drawing:
    transformer, _ = seeded(ZOO["wan"])
    pipe = without_text(
        diffusers.WanPipeline, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler()
    )
    return Drawing(pipe, {"height": 64, "width": 64, "num_frames": 5, **prompts()})


def hunyuan_video() -> Drawing:
    transformer, _ = seeded(ZOO["hunyuan_video"])
    pipe = without_text(
        diffusers.HunyuanVideoPipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    text = {
        "prompt_embeds": torch.randn(1, TOKENS, TEXT),
        "prompt_attention_mask": torch.tensor([[1, 1, 1, 0, 0]]),
        "pooled_prompt_embeds": torch.randn(1, 12),
    }
    return Drawing(pipe, {"height": 64, "width": 64, "num_frames": 5, **text})


def flux() -> Drawing:
    transformer, _ = seeded(ZOO["flux"])
    pipe = without_text(
        diffusers.FluxPipeline, transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler()
    )
    text = {
        "prompt_embeds": torch.randn(1, TOKENS, TEXT),
        "pooled_prompt_embeds": torch.randn(1, 12),
    }
    return Drawing(pipe, {"height": 64, "width": 64, **text})


def cogvideox() -> Drawing:
    transformer, _ = seeded(ZOO["cogvideox"])
    pipe = without_text(
        diffusers.CogVideoXPipeline,
        transformer=transformer,
        scheduler=diffusers.CogVideoXDDIMScheduler(),
    )
    return Drawing(pipe, {"height": 64, "width": 64, "num_frames": 5, **prompts()})


def ltx() -> Drawing:
    transformer = model_of(
        diffusers.LTXVideoTransformer3DModel, in_channels=8, out_channels=8, num_attention_heads=2,
        attention_head_dim=16, cross_attention_dim=32, num_layers=1, caption_channels=TEXT,
    )  # fmt: skip
    pipe = without_text(
        diffusers.LTXPipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    text = prompts(prompt_attention_mask=torch.tensor([[1, 1, 1, 1, 0]]))
    return Drawing(pipe, {"height": 128, "width": 128, "num_frames": 9, **text})


def sd3() -> Drawing:
    transformer = model_of(
        diffusers.SD3Transformer2DModel, sample_size=8, in_channels=4, out_channels=4, num_layers=2,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=TEXT,
        caption_projection_dim=32, pooled_projection_dim=12, pos_embed_max_size=8,
        qk_norm="rms_norm",
    )  # fmt: skip
    pipe = without_text(
        diffusers.StableDiffusion3Pipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )
    return Drawing(pipe, prompts(pooled_prompt_embeds=torch.randn(1, 12)))


def qwen_image() -> Drawing:
    transformer = model_of(
        diffusers.QwenImageTransformer2DModel, in_channels=16, out_channels=4, num_layers=1,
        attention_head_dim=16, num_attention_heads=2, joint_attention_dim=TEXT,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    pipe = without_text(
        diffusers.QwenImagePipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True),
    )
    text = prompts(prompt_embeds_mask=torch.tensor([[1, 1, 1, 1, 0]]))
    return Drawing(pipe, {"height": 64, "width": 64, **text})


def pixart() -> Drawing:
    transformer = model_of(
        diffusers.PixArtTransformer2DModel, num_attention_heads=2, attention_head_dim=16,
        in_channels=4, out_channels=8, num_layers=1, cross_attention_dim=32, sample_size=8,
        caption_channels=TEXT, norm_num_groups=4,
    )  # fmt: skip
    pipe = without_text(
        diffusers.PixArtAlphaPipeline,
        transformer=transformer,
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    text = prompts(prompt_attention_mask=torch.tensor([[1, 1, 1, 1, 0]])) | {
        "negative_prompt": None
    }
    size = {"height": 64, "width": 64, "use_resolution_binning": False}
    return Drawing(pipe, {**size, **text})


def mochi() -> Drawing:
    transformer = model_of(
        diffusers.MochiTransformer3DModel, num_attention_heads=2, attention_head_dim=16,
        num_layers=2, pooled_projection_dim=12, in_channels=4, text_embed_dim=TEXT,
        time_embed_dim=8, max_sequence_length=TOKENS,
    )  # fmt: skip
    pipe = without_text(
        diffusers.MochiPipeline,
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
    )
    text = prompts(prompt_attention_mask=torch.ones(1, TOKENS, dtype=torch.bool))
    return Drawing(pipe, {"height": 64, "width": 64, "num_frames": 7, **text})


def stable_diffusion() -> Drawing:
    unet, _ = seeded(ZOO["unet_condition"])
    pipe = without_text(
        diffusers.StableDiffusionPipeline,
        unet=unet,
        vae=small_vae(),
        scheduler=diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
        requires_safety_checker=False,
    )
    return Drawing(pipe, {"height": 8, "width": 8, "output_type": "np", **prompts()}, "unet")


DRAWINGS: dict[str, Callable[[], Drawing]] = {
    "Wan": wan,
    "HunyuanVideo": hunyuan_video,
    "Flux": flux,
    "CogVideoX": cogvideox,
    "LTX-Video": ltx,
    "Stable Diffusion 3": sd3,
    "Qwen-Image": qwen_image,
    "PixArt": pixart,
    "Mochi": mochi,
    "Stable Diffusion (UNet)": stable_diffusion,
    "DiT": dit,
}
