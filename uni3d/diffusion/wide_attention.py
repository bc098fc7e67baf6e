"""Attention with wide heads: that of an autoencoder's middle block, one head of 512 channels.

Fused attention kernels keep a head's tile on chip and are made for 256 channels at most; beyond, torch's own
takes five times as long backwards as the plain products do, whose table of scores fits a GPU at the few
thousand pixels of a latent. Numerics are those of the fused kernels: products of inputs in their own
precision, scores and softmax in float32. Legend: B images times heads, P pixels, C channels of a head.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import scaled_dot_product_attention

WIDEST_FUSED = 256
MAX_SCORES = 2**25  # of all images and heads: 128 MiB in float32; beyond, memory matters more than time


def _float_product(left: Tensor, right: Tensor) -> Tensor:
    """Batched matrix product, float32 whatever the inputs' precision."""
    if left.dtype == torch.float32:
        return torch.bmm(left, right)
    if left.device.type == "cuda":
        return torch.bmm(left, right, out_dtype=torch.float32)
    return torch.bmm(left.float(), right.float())


class _WideAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.scale = query.shape[-1] ** -0.5
        scores = _float_product(query, key.transpose(1, 2)).mul_(ctx.scale)
        weights = scores.softmax(dim=-1).to(value.dtype)
        ctx.save_for_backward(query, key, value, weights)
        return torch.bmm(weights, value)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, weights = ctx.saved_tensors
        grad = grad_outputs[0].contiguous()
        grad_weights = _float_product(grad, value.transpose(1, 2))
        grad_scores = torch.ops.aten._softmax_backward_data(
            grad_weights, weights.float(), -1, torch.float32
        ).mul_(ctx.scale)
        grad_scores = grad_scores.to(query.dtype)
        return (
            torch.bmm(grad_scores, key),
            torch.bmm(grad_scores.transpose(1, 2), query),
            torch.bmm(weights.transpose(1, 2), grad),
        )


def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """softmax(query key^T / sqrt(C)) value, each float [B, P, C]; the fastest way for this size."""
    num_scores = query.shape[0] * query.shape[1] * key.shape[1]
    if query.shape[-1] <= WIDEST_FUSED or num_scores > MAX_SCORES:
        return scaled_dot_product_attention(query[:, None], key[:, None], value[:, None])[:, 0]
    return _WideAttention.apply(query, key, value)  # type: ignore[return-value]


class WideAttentionProcessor:
    """What diffusers' `AttnProcessor2_0` computes for self-attention over an image, by `attention`."""

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: None = None,
        attention_mask: None = None,
        temb: Tensor | None = None,
    ) -> Tensor:
        """Attend over the pixels of hidden_states, float [B, C, H, W]; the rest is diffusers' and unused."""
        pixels = hidden_states.flatten(2).transpose(1, 2)
        if attn.group_norm is not None:
            pixels = attn.group_norm(pixels.transpose(1, 2)).transpose(1, 2)
        query, key, value = (self._heads(attn, part(pixels)) for part in (attn.to_q, attn.to_k, attn.to_v))
        result = attention(query, key, value).unflatten(0, (-1, attn.heads)).transpose(1, 2).flatten(2)
        result = attn.to_out[1](attn.to_out[0](result))
        result = result.transpose(1, 2).reshape(hidden_states.shape)
        if attn.residual_connection:
            result = result + hidden_states
        return result if attn.rescale_output_factor == 1 else result / attn.rescale_output_factor

    @staticmethod
    def _heads(attn: Any, rows: Tensor) -> Tensor:
        """[B, P, heads C] -> [B heads, P, C]."""
        return rows.unflatten(-1, (attn.heads, -1)).transpose(1, 2).flatten(0, 1)
