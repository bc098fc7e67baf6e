"""Stable Diffusion 1.x, 2.x and XL as teachers, and the embedded teacher, which uses the same classes.

Their UNets run on the variance-preserving process and predict eps, v or x0. XL reads two text encoders, and
beside the tokens a pooled embedding and the size of the image.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher, pack_pooled, unpack_pooled
from uni3d.losses.noise_schedule import vp_from_ve

logger = logging.getLogger(__name__)


@dataclass(kw_only=True)
class StableDiffusionTeacher(LatentDiffusionTeacher):
    """A `UNet2DConditionModel` that reads one text encoder: Stable Diffusion 1.x, 2.x and their like."""

    @property
    def unet(self) -> Any:
        """The network, by the name that it has in these pipelines."""
        return self.network

    @property
    def context_width(self) -> int:
        return int(self.network.config.cross_attention_dim)

    @property
    def feature_channels(self) -> int:
        return int(self.network.config.block_out_channels[-1])

    @property
    def middle_block(self) -> nn.Module:
        return self.network.mid_block

    @property
    def time_embedding(self) -> nn.Module:
        return self.network.time_embedding

    @property
    def time_embedding_width(self) -> int:
        return int(self.network.config.block_out_channels[0]) * 4

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        ids = token_ids(self.tokenizers[0], prompts)
        # Text encoders may stay on the CPU to save memory.
        encoder = self.text_encoders[0]
        return encoder(ids.to(encoder.device))[0].to(self.device)

    def network_input(self, x: Tensor, sigma: Tensor) -> Tensor:
        return vp_from_ve(x.float(), sigma.float())

    def network_timestep(self, sigma: Tensor) -> Tensor:
        return self.schedule.timestep(sigma)

    def call_network(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        return self.network(x, timestep, encoder_hidden_states=context, return_dict=False)[0]

    def middle_map(self, output: Tensor) -> Tensor:
        return output


@dataclass(kw_only=True)
class StableDiffusionXLTeacher(StableDiffusionTeacher):
    """Stable Diffusion XL: two text encoders, whose second also gives the pooled embedding.

    Attributes:
        zeros_for_empty_prompt: whether an empty (negative) prompt is all zeros, as the pipeline's
            configuration asks for.
    """

    zeros_for_empty_prompt: bool = True

    @property
    def pooled_width(self) -> int:
        return int(self.text_encoders[1].config.projection_dim)

    @torch.no_grad()
    def encode_text(self, prompts: Sequence[str]) -> Tensor:
        hidden, pooled = [], None
        for tokenizer, encoder in zip(self.tokenizers, self.text_encoders, strict=True):
            ids = token_ids(tokenizer, prompts).to(encoder.device)
            output = encoder(ids, output_hidden_states=True)
            hidden.append(output.hidden_states[-2].to(self.device))
            pooled = output[0].to(self.device)
        assert pooled is not None
        context = pack_pooled(torch.cat(hidden, dim=-1), pooled)
        if self.zeros_for_empty_prompt:
            empty = torch.tensor([not prompt for prompt in prompts], device=context.device)
            context = context.masked_fill(empty[:, None, None], 0.0)
        return context

    def call_network(self, x: Tensor, timestep: Tensor, context: Tensor) -> Tensor:
        tokens, pooled = unpack_pooled(context, self.pooled_width)
        added = {"text_embeds": pooled, "time_ids": self._time_ids(x.shape[0], x.device)}
        return self.network(
            x, timestep, encoder_hidden_states=tokens, added_cond_kwargs=added, return_dict=False
        )[0]

    def _time_ids(self, num: int, device: torch.device) -> Tensor:
        """Original size, corner of the crop and target size, [num, 6]: a whole image of the teacher's own
        size. Made on the device: copied to it, they would have to be waited for."""
        size = torch.full((num, 2), float(self.image_size), device=device)
        return torch.cat([size, torch.zeros_like(size), size], dim=1)


def token_ids(tokenizer: Any, prompts: Sequence[str], *, max_length: int | None = None) -> Tensor:
    """Token numbers [N, max_length] (None: what the tokenizer is made for), with a warning for a prompt that
    is cut."""
    limit = max_length or tokenizer.model_max_length
    for prompt in prompts:
        length = len(tokenizer(prompt).input_ids)
        if length > limit:
            logger.warning(
                "the teacher reads %d tokens; the end of a prompt of %d is ignored: %r", limit, length, prompt
            )
    return tokenizer(
        list(prompts), padding="max_length", max_length=limit, truncation=True, return_tensors="pt"
    ).input_ids
