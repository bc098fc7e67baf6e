"""Images of a teacher by its deterministic sampler, in parts: for sample grids and for noise-image pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uni3d.distillation.sampling import heun_sigmas, sample_heun

Network = Callable[..., Any]


def integrate_all(
    teacher: Network, latent: Tensor, labels: Tensor | None, *, num_steps: int, batch: int = 256
) -> Tensor:
    """Images [B, C, H, W], about in [-1, 1], of standard normal `latent`, by 2 num_steps - 1 evaluations
    each."""
    sigmas = heun_sigmas(num_steps)

    def images_of(latent: Tensor, labels: Tensor | None) -> Tensor:
        return sample_heun(lambda x, sigma: teacher(x, sigma, labels), latent, sigmas)

    parts = [
        images_of(latent[start : start + batch], None if labels is None else labels[start : start + batch])
        for start in range(0, latent.shape[0], batch)
    ]
    return torch.cat(parts)
