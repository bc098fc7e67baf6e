"""A discriminator head on features of a denoising network: real latents against rendered ones, at a noise
level.

Its logit estimates the log density ratio log(q_t / p_t) that weights the Uni-Instruct gradient (the
optimum of the
logistic loss, Goodfellow et al. 2014). The features come from the middle block of the frozen teacher, so the
student's side costs nothing beyond the teacher pass that the score needs anyway.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class DiscriminatorHead(nn.Module):
    """Features [B, F, h, w] and sigma [B] -> a map of logits [B, 1, h, w]; zero before training, so the
    ratio is 1."""

    def __init__(
        self, feature_channels: int, *, hidden_channels: int = 64, generator: torch.Generator | None = None
    ) -> None:
        super().__init__()
        self.normalise = nn.GroupNorm(1, feature_channels, affine=False)
        self.reduce = nn.Conv2d(feature_channels, hidden_channels, kernel_size=1)
        self.noise_level = nn.Linear(3, hidden_channels)
        self.mix = nn.Conv2d(hidden_channels, hidden_channels, kernel_size=3, padding=1)
        self.logit = nn.Conv2d(hidden_channels, 1, kernel_size=1)
        for layer in (self.reduce, self.noise_level, self.mix):
            fan_in = layer.weight[0].numel()
            bound = (3 / fan_in) ** 0.5
            layer.weight.data.copy_((torch.rand(layer.weight.shape, generator=generator) * 2 - 1) * bound)
            nn.init.zeros_(layer.bias)  # type: ignore[arg-type]
        nn.init.zeros_(self.logit.weight)
        nn.init.zeros_(self.logit.bias)  # type: ignore[arg-type]

    def forward(self, features: Tensor, sigma: Tensor) -> Tensor:
        """Logits of "drawn from the teacher", float32 [B, 1, h, w]."""
        level = torch.log(sigma.float())[:, None] / 4
        level_features = self.noise_level(torch.cat([level, level.square(), torch.tanh(level * 4)], dim=1))
        hidden = self.reduce(self.normalise(features.float())) + level_features[:, :, None, None]
        hidden = nn.functional.silu(hidden)
        return self.logit(nn.functional.silu(self.mix(hidden) + hidden))
