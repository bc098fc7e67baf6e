"""Sums over ragged rays: samples of all rays in one row, sorted by ray and then by distance.

Prefix sums run over the whole row in float64 and subtract each ray's beginning, which keeps them exact to
float32 whatever the number of samples. Forward and backward are closed forms of a few linear passes.
Legend: N samples, R rays, C channels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Segments:
    """How N packed samples fall on R rays: `ray_index` int64 [N], ascending; `start` and `end` int64 [R]."""

    ray_index: Tensor
    start: Tensor
    end: Tensor

    @staticmethod
    def from_ray_index(ray_index: Tensor, num_rays: int) -> Segments:
        """Segments of an ascending `ray_index` [N]; rays without samples are empty."""
        counts = torch.bincount(ray_index, minlength=num_rays)
        end = counts.cumsum(0)
        return Segments(ray_index, end - counts, end)

    @property
    def num_rays(self) -> int:
        return self.start.shape[0]


def _sum_before(values: Tensor, segments: Segments) -> Tensor:
    """Sum of the earlier samples of the same ray, [N]."""
    inclusive = values.double().cumsum(0)
    exclusive = torch.nn.functional.pad(inclusive, (1, 0))
    before_ray = exclusive[segments.start]
    return (exclusive[:-1] - before_ray[segments.ray_index]).to(values.dtype)


def _sum_after(values: Tensor, segments: Segments) -> Tensor:
    """Sum of the later samples of the same ray, [N]."""
    inclusive = values.double().cumsum(0)
    through_ray = torch.nn.functional.pad(inclusive, (1, 0))[segments.end]
    return (through_ray[segments.ray_index] - inclusive).to(values.dtype)


class _ExclusiveSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, segments: Segments) -> Tensor:
        ctx.segments = segments
        return _sum_before(values, segments)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        return _sum_after(grad_outputs[0], ctx.segments), None


class _WeightedRaySum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weights: Tensor, features: Tensor, segments: Segments) -> Tensor:
        ctx.save_for_backward(weights, features)
        ctx.segments = segments
        order = torch.arange(weights.shape[0], device=weights.device)
        return torch.nn.functional.embedding_bag(
            order, features, segments.start, mode="sum", per_sample_weights=weights
        )

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        weights, features = ctx.saved_tensors
        grad_samples = grad_outputs[0].index_select(0, ctx.segments.ray_index)
        grad_weights = (grad_samples * features).sum(dim=1) if ctx.needs_input_grad[0] else None
        grad_features = grad_samples * weights[:, None] if ctx.needs_input_grad[1] else None
        return grad_weights, grad_features, None


def exclusive_sum(values: Tensor, segments: Segments) -> Tensor:
    """Sum of `values` [N] over the earlier samples of each sample's ray, [N]; differentiable once."""
    return _ExclusiveSum.apply(values, segments)  # type: ignore[return-value]


def weighted_ray_sum(weights: Tensor, features: Tensor, segments: Segments) -> Tensor:
    """Sum over each ray of weights [N] times features [N, C], as [R, C]; zero for empty rays.

    Differentiable once.
    """
    if weights.shape[0] == 0:
        nothing = weights.sum() + features.sum()  # 0, but keeps the picture differentiable
        return nothing.expand(segments.num_rays, features.shape[1])
    return _WeightedRaySum.apply(weights, features, segments)  # type: ignore[return-value]


def compositing_weights(optical_depth: Tensor, segments: Segments) -> Tensor:
    """Share of the ray's light that each sample gives, [N], from optical depth per sample [N] >= 0.

    w_i = exp(-sum_{j<i} tau_j) (1 - exp(-tau_i)): Max 1995, Eq. of emission-absorption with piecewise
    constant extinction; the form NeRF (Mildenhall et al. 2020, Eq. 3) uses.
    """
    return torch.exp(-exclusive_sum(optical_depth, segments)) * -torch.expm1(-optical_depth)


def composite(
    optical_depth: Tensor, features: Tensor, distances: Tensor, segments: Segments
) -> tuple[Tensor, Tensor]:
    """Weights [N] of the samples, and sums over rays [R, C + 2] of weight times features [N, C], of weights
    (the opacity), and of weight times `distances` [N].

    Differentiable in `optical_depth` [N] and `features`.
    """
    weights = compositing_weights(optical_depth, segments)
    columns = [features, torch.ones_like(distances)[:, None], distances[:, None]]
    return weights, weighted_ray_sum(weights, torch.cat(columns, dim=1), segments)
