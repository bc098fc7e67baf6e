"""Blocks of diffusers' networks that run faster on a GPU than as they come, with the same parameters.

A block is changed by giving it another class, so that its parameters, their names and whatever else hangs on
it stay; `plain_blocks` gives back the one it had. Group norms run as Triton kernels for images with channels
last (`norm_kernels`), in residual blocks together with the SiLU that follows; the autoencoder's attention
over its middle block runs as plain products (`wide_attention`). What a kernel was not made for takes torch's
way at once, a norm whose weights are trained among it.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.resnet import ResnetBlock2D
from torch import Tensor, nn

from uni3d.diffusion.wide_attention import WIDEST_FUSED, WideAttentionProcessor


def _normalised(norm: nn.GroupNorm, images: Tensor, *, silu: bool) -> Tensor:
    from uni3d.diffusion import norm_kernels

    is_trained = torch.is_grad_enabled() and norm.weight.requires_grad
    if not is_trained and norm_kernels.has_channels_last(images):
        return norm_kernels.group_norm(
            images, norm.num_groups, norm.weight, norm.bias, eps=norm.eps, silu=silu
        )
    result = nn.functional.group_norm(images, norm.num_groups, norm.weight, norm.bias, norm.eps)
    return nn.functional.silu(result) if silu else result


class FastGroupNorm(nn.GroupNorm):
    """nn.GroupNorm by `norm_kernels` where they fit."""

    def forward(self, input: Tensor) -> Tensor:
        """Float [B, C, ...] -> the same."""
        return _normalised(self, input, silu=False)


class FastResnetBlock(ResnetBlock2D):
    """A residual block that keeps its resolution, each norm and its SiLU in one."""

    def forward(self, input_tensor: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
        """Float [B, C, H, W], and the time embedding [B, T] if the block takes one -> [B, D, H, W]."""
        hidden = self.conv1(_normalised(self.norm1, input_tensor, silu=True))
        if self.time_emb_proj is not None:
            assert temb is not None
            hidden = hidden + self.time_emb_proj(self.nonlinearity(temb))[:, :, None, None]
        hidden = self.conv2(self.dropout(_normalised(self.norm2, hidden, silu=True)))
        shortcut = input_tensor if self.conv_shortcut is None else self.conv_shortcut(input_tensor)
        result = shortcut + hidden
        return result if self.output_scale_factor == 1 else result / self.output_scale_factor


def fast_blocks(network: nn.Module) -> None:
    """Let `network` use the blocks of this module where they fit; needs triton."""
    from uni3d.diffusion import norm_kernels  # noqa: F401  # says at once whether triton is there

    for part in network.modules():
        if type(part) is nn.GroupNorm and part.affine:
            part.__class__ = FastGroupNorm
        elif type(part) is ResnetBlock2D and _is_simple(part):
            part.__class__ = FastResnetBlock
        elif isinstance(part, Attention) and _is_wide_over_images(part):
            part.processor = WideAttentionProcessor()  # pyright: ignore[reportAttributeAccessIssue]


def plain_blocks(network: nn.Module) -> None:
    """Undo `fast_blocks`."""
    for part in network.modules():
        if type(part) is FastGroupNorm:
            part.__class__ = nn.GroupNorm  # pyright: ignore[reportAttributeAccessIssue]
        elif type(part) is FastResnetBlock:
            part.__class__ = ResnetBlock2D  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(part, Attention) and isinstance(part.processor, WideAttentionProcessor):
            part.processor = AttnProcessor2_0()  # pyright: ignore[reportAttributeAccessIssue]


def _is_simple(block: ResnetBlock2D) -> bool:
    keeps_size = block.upsample is None and block.downsample is None
    is_timeless = block.time_emb_proj is None and block.time_embedding_norm in ("default", "group")
    adds_time = is_timeless or (block.time_embedding_norm == "default" and not block.skip_time_act)
    return keeps_size and adds_time and isinstance(block.nonlinearity, nn.SiLU)


def _is_wide_over_images(attention: Attention) -> bool:
    """Whether this is self-attention with wide heads, as autoencoders have it, and nothing besides."""
    is_plain = type(attention.processor) is AttnProcessor2_0 and attention.spatial_norm is None
    has_no_norms = attention.norm_q is None and attention.norm_k is None and attention.norm_cross is None
    is_self = attention.group_norm is not None and attention.residual_connection
    return is_plain and has_no_norms and is_self and attention.inner_dim // attention.heads > WIDEST_FUSED
