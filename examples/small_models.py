"""Small configurations of the model families that fxq is tested on, and the trained digits ViT of
the demo.

Each function returns `(model, example_inputs)`: the model in eval mode with random weights under a
fixed seed, the example as `fxq.compress` takes it. Importing this file imports none of the model
libraries.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Example = tuple[nn.Module, Any]


def vit() -> Example:
    """timm ViT: class token, fused attention."""
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2, num_classes=5
    )
    return model, torch.randn(1, 3, 16, 16)


def deit() -> Example:
    """timm DeiT: class and distillation token, two heads."""
    from timm.models.deit import VisionTransformerDistilled

    model = VisionTransformerDistilled(
        img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=5
    )
    return model, torch.randn(1, 3, 16, 16)


def beit() -> Example:
    """timm BEiT: a bias put together of query's, zeros and value's, relative positions."""
    from timm.models.beit import Beit

    model = Beit(
        img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2, num_classes=5,
        use_abs_pos_emb=False, use_rel_pos_bias=True, init_values=0.5,
    )  # fmt: skip
    return model, torch.randn(1, 3, 16, 16)


def swin() -> Example:
    """timm Swin: windows, shifted windows, hand-written attention with a relative position bias."""
    from timm.models.swin_transformer import SwinTransformer

    model = SwinTransformer(
        img_size=32, patch_size=2, window_size=4, embed_dim=16, depths=(2, 2), num_heads=(2, 4),
        num_classes=5
    )  # fmt: skip
    return model, torch.randn(1, 3, 32, 32)


def gpt2() -> Example:
    """transformers GPT-2: Conv1D layers, tanh GELU."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=32, use_cache=False,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    return GPT2LMHeadModel(config), {"input_ids": torch.randint(0, 50, (1, 7))}


def imagegpt() -> Example:
    """transformers ImageGPT: Conv1D layers, hand-written causal attention, quick GELU, own
    RMSNorm."""
    from transformers import ImageGPTConfig, ImageGPTForCausalImageModeling

    config = ImageGPTConfig(
        n_embd=32, n_layer=1, n_head=2, vocab_size=17, n_positions=16, use_cache=False
    )
    return ImageGPTForCausalImageModeling(config), {"input_ids": torch.randint(0, 16, (1, 16))}


def llama() -> Example:
    """transformers Llama: RMSNorm, RoPE, grouped-query attention, SwiGLU."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=50, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config), {"input_ids": torch.randint(0, 50, (1, 7))}


def gemma() -> Example:
    """transformers Gemma: RMSNorm with 1 + weight, one head of keys and values, gated GELU."""
    from transformers import GemmaConfig, GemmaForCausalLM

    config = GemmaConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=1, head_dim=8, vocab_size=50, use_cache=False,
    )  # fmt: skip
    return GemmaForCausalLM(config), {"input_ids": torch.randint(0, 50, (1, 7))}


def opt() -> Example:
    """transformers OPT: ReLU, biases everywhere."""
    from transformers import OPTConfig, OPTForCausalLM

    config = OPTConfig(
        hidden_size=32, ffn_dim=64, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
        max_position_embeddings=32, word_embed_proj_dim=32, use_cache=False,
    )  # fmt: skip
    return OPTForCausalLM(config), {"input_ids": torch.randint(0, 50, (1, 7))}


def unet() -> Example:
    """diffusers UNet2DModel: convolutions, GroupNorm, attention over pixels."""
    from diffusers import UNet2DModel

    model = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, layers_per_block=1, block_out_channels=(16,
        32),
        norm_num_groups=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"), attention_head_dim=8,
    )  # fmt: skip
    return model, (torch.randn(1, 1, 8, 8), torch.tensor([3]))


def unet_condition() -> Example:
    """diffusers UNet2DConditionModel: cross-attention, GEGLU."""
    from diffusers import UNet2DConditionModel

    model = UNet2DConditionModel(
        sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16,
        32),
        norm_num_groups=4, down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=24,
        attention_head_dim=8,
    )  # fmt: skip
    return model, (torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 24))


def dit() -> Example:
    """diffusers DiT: adaLN-zero, class conditioning."""
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=1,
        sample_size=8, patch_size=2, num_embeds_ada_norm=10,
    )  # fmt: skip
    example = {
        "hidden_states": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor([3]),
        "class_labels": torch.tensor([1]),
    }
    return model, example


def wan() -> Example:
    """diffusers Wan: video, 3-D RoPE, qk-RMSNorm, cross-attention to text."""
    from diffusers import WanTransformer3DModel

    model = WanTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, text_dim=24,
        freq_dim=16, ffn_dim=64, num_layers=1, rope_max_seq_len=32,
    )  # fmt: skip
    example = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 5, 24),
    }
    return model, example


def hunyuan_video() -> Example:
    """diffusers HunyuanVideo: joint attention of video and masked text, single-stream blocks."""
    from diffusers import HunyuanVideoTransformer3DModel

    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=1,
        num_single_layers=1, num_refiner_layers=1, patch_size=2, patch_size_t=1, text_embed_dim=24,
        pooled_projection_dim=12, rope_axes_dim=(4, 6, 6),
    )  # fmt: skip
    example = {
        "hidden_states": torch.randn(1, 4, 2, 8, 8),
        "timestep": torch.tensor([3]),
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "encoder_attention_mask": torch.ones(1, 5, dtype=torch.bool),
        "pooled_projections": torch.randn(1, 12),
        "guidance": torch.tensor([6.0]),
    }
    return model, example


def flux() -> Example:
    """diffusers Flux: joint attention of image and text, single-stream blocks."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        patch_size=1, in_channels=8, num_layers=1, num_single_layers=1, attention_head_dim=16,
        num_attention_heads=2, joint_attention_dim=24, pooled_projection_dim=12,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    example = {
        "hidden_states": torch.randn(1, 16, 8),
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "pooled_projections": torch.randn(1, 12),
        "timestep": torch.tensor([1.0]),
        "img_ids": torch.randn(16, 3),
        "txt_ids": torch.zeros(5, 3),
    }
    return model, example


def cogvideox() -> Example:
    """diffusers CogVideoX: video, joint attention, adaptive LayerNorm."""
    from diffusers import CogVideoXTransformer3DModel

    model = CogVideoXTransformer3DModel(
        num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4,
        time_embed_dim=8,
        text_embed_dim=24, num_layers=1, sample_width=8, sample_height=8, sample_frames=5,
        patch_size=2,
        max_text_seq_length=5,
    )  # fmt: skip
    example = {
        "hidden_states": torch.randn(1, 2, 4, 8, 8),
        "encoder_hidden_states": torch.randn(1, 5, 24),
        "timestep": torch.tensor([3]),
    }
    return model, example


def seeded(build: Callable[[], Example]) -> Example:
    """Build a model with the same weights every time, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model, example = build()
    return model.eval(), example


ZOO: dict[str, Callable[[], Example]] = {
    build.__name__: build
    for build in (
        vit, deit, beit, swin, gpt2, imagegpt, llama, gemma, opt, unet, unet_condition, dit, wan,
        hunyuan_video, flux, cogvideox,
    )
}  # fmt: skip
