"""Rectified-flow transformers of the Stable Diffusion 3 class as teachers (Esser et al. 2024).

They run on x_t = (1 - t) x0 + t eps and predict the velocity eps - x0. With sigma = t / (1 - t) that is the
same x = x0 + sigma * eps as everywhere, divided by 1 + sigma.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher, pack_pooled, unpack_pooled
from uni3d.diffusion.stable_diffusion import token_ids
from uni3d.errors import UsageError
from uni3d.losses.noise_schedule import flow_from_ve, flow_time

T5_LENGTH = 256


@dataclass(kw_only=True)
class RectifiedFlowTeacher(LatentDiffusionTeacher):
    """An `SD3Transformer2DModel` that reads two CLIP encoders and, unless it is left out, T5.

    Attributes:
        num_train_timesteps: what the network is told at t = 1.
    """

    num_train_timesteps: int = 1000

    attention_projections: ClassVar[tuple[str, ...]] = (
        *LatentDiffusionTeacher.attention_projections,
        "add_q_proj",
        "add_k_proj",
        "add_v_proj",
        "to_add_out",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = int(self.network.config.pos_embed_max_size) * self.size_step
        if self.image_size > largest:
            raise UsageError(
                f"teacher '{self.name}' cannot see images of {self.image_size} pixels: its positions end at "
                f"{largest}; choose a smaller size"
            )

    @property
    def size_step(self) -> int:
        return self.downscale * int(self.network.config.patch_size)

    @property
    def context_width(self) -> int:
        return int(self.network.config.joint_attention_dim)

    @property
    def pooled_width(self) -> int:
        return int(self.network.config.pooled_projection_dim)

    @property
    def feature_channels(self) -> int:
        return self.time_embedding_width

    @property
    def middle_block(self) -> nn.Module:
        blocks = self.network.transformer_blocks
        return blocks[(len(blocks) - 1) // 2]

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.time_text_embed

    @property
    def time_embedding_width(self) -> int:
        return int(self.network.config.num_attention_heads) * int(self.network.config.attention_head_dim)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        hidden, pooled = [], []
        for tokenizer, encoder in zip(self.tokenizers[:2], self.text_encoders[:2], strict=True):
            ids = token_ids(tokenizer, prompts).to(encoder.device)
            output = encoder(ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2].to(self.device))
            pooled.append(output[0].to(self.device))
        clip = torch.cat(hidden, dim=-1)
        clip = nn.functional.pad(clip, (0, self.context_width - clip.shape[-1]))
        tokens = torch.cat([clip, self._encode_t5(prompts, clip)], dim=1)
        return pack_pooled(tokens, torch.cat(pooled, dim=-1))

    def _encode_t5(self, prompts: Sequence[str], clip: Tensor) -> Tensor:
        """T5's hidden states [N, L, E]; zeros for a model that was loaded without it, as it was trained."""
        if self.text_encoders[2] is None:
            return clip.new_zeros(clip.shape[0], T5_LENGTH, clip.shape[-1])
        ids = token_ids(self.tokenizers[2], prompts, max_length=T5_LENGTH)
        encoder = self.text_encoders[2]
        return encoder(ids.to(encoder.device))[0].to(clip)

    def network_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        return flow_from_ve(x.float(), sigma.float())

    def network_timestep(self, sigma: Tensor) -> Tensor:
        return flow_time(sigma) * self.num_train_timesteps

    def call_network(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        tokens, pooled = unpack_pooled(context, self.pooled_width)
        return self.network(
            x, encoder_hidden_states=tokens, pooled_projections=pooled, timestep=timestep, return_dict=False
        )[0]

    def middle_map(self, output: tuple[Any, Tensor]) -> Tensor:
        hidden = output[1]  # [B, patches, F]; the first is the text's
        side = math.isqrt(hidden.shape[1])
        return hidden.transpose(1, 2).unflatten(2, (side, side))
