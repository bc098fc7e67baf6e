"""Randomly initialised pipelines of the real classes, small enough to write into a test's folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

WORDS = ["a", "red", "blue", "chair", "vase", "front", "side", "back", "overhead", "view", ","]
IMAGE_SIZE = 16
LATENT_SIZE = 4


def write_tiny_pipeline(kind: str, folder: Path) -> Path:
    """Write "sd" (v-prediction), "sdxl", "sd3" or "sd3-without-t5" into `folder` and return it."""
    torch.manual_seed(5)
    make = {"sd": _stable_diffusion, "sdxl": _stable_diffusion_xl}.get(kind)
    pipeline = make() if make is not None else _stable_diffusion_3(has_t5=kind == "sd3")
    pipeline.save_pretrained(folder, safe_serialization=True)
    return folder


def tiny_unet(**changes: Any) -> Any:
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    settings: dict[str, Any] = {
        "sample_size": LATENT_SIZE, "in_channels": 4, "out_channels": 4, "block_out_channels": (16, 32),
        "layers_per_block": 1, "norm_num_groups": 4, "cross_attention_dim": 16, "attention_head_dim": 8,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    }  # fmt: skip
    return UNet2DConditionModel(**(settings | changes))


def tiny_vae(latent_channels: int = 4, **changes: Any) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=latent_channels,
        **changes,
    )


def _tokenizer() -> Any:
    from uni3d.teacher.tokenizer import train_tokenizer

    return train_tokenizer(WORDS, context_length=16)


def _clip(*, has_projection: bool, width: int = 16, projection: int = 8) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(_tokenizer()), hidden_size=width, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=16, projection_dim=projection,
    )  # fmt: skip
    return (CLIPTextModelWithProjection if has_projection else CLIPTextModel)(config)


def _stable_diffusion() -> Any:
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    scheduler = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction",
        clip_sample=False, rescale_betas_zero_snr=True,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=tiny_vae(),
        text_encoder=_clip(has_projection=False),
        tokenizer=_tokenizer(),
        unet=tiny_unet(),
        scheduler=scheduler,
        safety_checker=None,  # pyright: ignore[reportArgumentType]
        feature_extractor=None,  # pyright: ignore[reportArgumentType]
        requires_safety_checker=False,
    )


def _stable_diffusion_xl() -> Any:
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline

    unet = tiny_unet(
        cross_attention_dim=32, addition_embed_type="text_time", addition_time_embed_dim=4,
        projection_class_embeddings_input_dim=6 * 4 + 8, transformer_layers_per_block=(1, 1),
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae=tiny_vae(force_upcast=True),
        text_encoder=_clip(has_projection=False),
        text_encoder_2=_clip(has_projection=True),
        tokenizer=_tokenizer(),
        tokenizer_2=_tokenizer(),
        unet=unet,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading"
        ),
    )


def _stable_diffusion_3(*, has_t5: bool) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import T5Config, T5EncoderModel

    transformer = SD3Transformer2DModel(
        sample_size=LATENT_SIZE, patch_size=1, in_channels=4, num_layers=2, attention_head_dim=8,
        num_attention_heads=2, joint_attention_dim=32, caption_projection_dim=16, pooled_projection_dim=16,
        out_channels=4, pos_embed_max_size=8,
    )  # fmt: skip
    t5 = T5Config(vocab_size=300, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    return StableDiffusion3Pipeline(
        transformer=transformer,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=tiny_vae(shift_factor=0.1, scaling_factor=1.5, use_quant_conv=False, use_post_quant_conv=False),
        text_encoder=_clip(has_projection=True),
        tokenizer=_tokenizer(),
        text_encoder_2=_clip(has_projection=True),
        tokenizer_2=_tokenizer(),
        text_encoder_3=T5EncoderModel(t5) if has_t5 else None,  # pyright: ignore[reportArgumentType]
        tokenizer_3=_t5_tokenizer() if has_t5 else None,  # pyright: ignore[reportArgumentType]
    )


def _t5_tokenizer() -> Any:
    from transformers import T5TokenizerFast

    # One piece for each letter is all that a test needs of a vocabulary.
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0)]
    pieces += [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz,."]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=32)
