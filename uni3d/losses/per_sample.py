"""Shapes and precision of the losses: the first axis is the batch, arithmetic is in float32 or better."""

from __future__ import annotations

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """Half precision and integers become float32; float32 and float64 stay. Differentiable."""
    if x.dtype in (torch.float32, torch.float64):
        return x
    return x.to(torch.float32)


def sum_per_sample(x: Tensor) -> Tensor:
    """[B, ...] -> [B]: the sum over every axis but the first."""
    # An empty tuple of axes means "all axes" to torch, so a plain [B] needs its own case.
    return x.sum(dim=tuple(range(1, x.ndim))) if x.ndim > 1 else x


def mean_per_sample(x: Tensor) -> Tensor:
    """[B, ...] -> [B]: the mean over every axis but the first."""
    return x.mean(dim=tuple(range(1, x.ndim))) if x.ndim > 1 else x


def per_sample(value: Tensor | float, like: Tensor, name: str) -> Tensor:
    """A number per sample, shape [B], on the device and (at least) in the dtype of `like` [B, ...].

    `value`: a float, a tensor with one element, or a tensor of B elements ([B], [B, 1, 1, 1], ...).
    Raises ValueError for any other shape or type: broadcasting would pair the wrong samples.
    """
    if like.ndim == 0:
        raise ValueError("x0 has no axes: the first one must be the batch, so pass [1] for a single number")
    batch = like.shape[0]
    dtype = at_least_float32(like).dtype
    if isinstance(value, int | float):
        return torch.full((batch,), float(value), dtype=dtype, device=like.device)
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}: pass a float or a tensor of shape [{batch}]")
    value = value.to(like.device, torch.promote_types(at_least_float32(value).dtype, dtype))
    if value.ndim == 0:
        return value.expand(batch)
    if value.shape[0] == batch and value.numel() == batch:
        return value.reshape(batch)
    if value.numel() == 1:
        return value.reshape(()).expand(batch)
    raise ValueError(
        f"{name} has shape {tuple(value.shape)}, but the batch holds {batch}: pass a float or shape [{batch}]"
    )


def over_elements(value: Tensor, like: Tensor) -> Tensor:
    """[B] -> [B, 1, ..., 1], to multiply a tensor shaped as `like`."""
    return value.reshape(-1, *(1,) * (like.ndim - 1))
