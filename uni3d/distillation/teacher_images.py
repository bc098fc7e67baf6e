"""Images of a teacher by its deterministic sampler: for sample grids and for noise-image pairs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from uni3d.losses.noise_schedule import karras_sigmas

Network = Callable[..., Any]
SIGMA_MAX = 80.0


@torch.no_grad()
def integrate(teacher: Network, latent: Tensor, labels: Tensor | None, *, num_steps: int) -> Tensor:
    """Heun's method from sigma = 80 to 0 (Karras et al. 2022, Algorithm 1), 2 num_steps - 1 evaluations.

    latent: standard normal [B, C, H, W]. Returns images of its shape, about in [-1, 1].
    """
    sigmas = (
        [*karras_sigmas(num_steps, sigma_max=SIGMA_MAX).tolist(), 0.0] if num_steps > 1 else [SIGMA_MAX, 0.0]
    )
    x = SIGMA_MAX * latent
    for sigma, following in zip(sigmas, sigmas[1:], strict=False):
        slope = (x - teacher(x, x.new_full((1,), sigma), labels)) / sigma
        end = x + (following - sigma) * slope
        if following > 0:
            end_slope = (end - teacher(end, x.new_full((1,), following), labels)) / following
            end = x + (following - sigma) * 0.5 * (slope + end_slope)
        x = end
    return x


def integrate_all(
    teacher: Network, latent: Tensor, labels: Tensor | None, *, num_steps: int, batch: int = 256
) -> Tensor:
    """`integrate` in parts of `batch` images, joined."""
    parts = [
        integrate(
            teacher,
            latent[start : start + batch],
            None if labels is None else labels[start : start + batch],
            num_steps=num_steps,
        )
        for start in range(0, latent.shape[0], batch)
    ]
    return torch.cat(parts)
