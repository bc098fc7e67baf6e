"""A teacher of a published model's shapes with random weights, which change neither speed nor memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.diffusion.stable_diffusion import StableDiffusionTeacher
from uni3d.losses.noise_schedule import DiscreteVPSchedule

NUM_TOKENS = 77
UNET_SHAPES: dict[str, dict[str, Any]] = {
    "sd21": {
        "sample_size": 64, "cross_attention_dim": 1024, "attention_head_dim": (5, 10, 20, 20),
        "use_linear_projection": True,
    },
    "tiny": {
        "sample_size": 4, "cross_attention_dim": 16, "attention_head_dim": 8, "block_out_channels": (16, 32),
        "layers_per_block": 1, "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
    },
}  # fmt: skip
VAE_CHANNELS = {"sd21": (128, 256, 512, 512), "tiny": (8, 8, 8)}


@dataclass(kw_only=True)
class RandomTeacher(StableDiffusionTeacher):
    """Stable Diffusion without a text encoder: every prompt is random numbers."""

    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        contexts = torch.randn(len(prompts), NUM_TOKENS, self.context_width, generator=generator)
        return contexts.to(self.device, self.dtype)


def random_teacher(
    shapes: str, *, device: torch.device, dtype: torch.dtype, prediction_type: str = "epsilon"
) -> LatentDiffusionTeacher:
    """A teacher of the `shapes` "sd21" (Stable Diffusion 2.1: 866 M parameters, 512 px) or "tiny" (16 px)."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel

    channels = VAE_CHANNELS[shapes]
    # Their annotations allow one block only.
    blocks: dict[str, Any] = {
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
    }
    layers = 2 if shapes == "sd21" else 1
    with torch.device(device):
        unet = UNet2DConditionModel(**UNET_SHAPES[shapes])
        vae = AutoencoderKL(
            block_out_channels=channels,
            **blocks,
            layers_per_block=layers,
            norm_num_groups=32 if shapes == "sd21" else 4,
        )
    teacher = RandomTeacher(
        network=unet,
        vae=vae,
        tokenizers=(),
        text_encoders=(),
        schedule=DiscreteVPSchedule.scaled_linear(),
        prediction_type=prediction_type,
        name=f"random {shapes}",
        image_size=int(unet.config["sample_size"]) * 2 ** (len(channels) - 1),
    )
    return teacher.to(device, dtype)
