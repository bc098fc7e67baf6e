"""Distributions of noise levels, with their densities, which the exact weighting divides by."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from uni3d.distillation.settings import SigmaLawConfig
from uni3d.losses import noise_schedule


class SigmaLaw(Protocol):
    """A distribution of noise levels sigma > 0."""

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """[num] float32, on the device of `generator`."""
        ...

    def density(self, sigma: Tensor) -> Tensor:
        """pi(sigma), shaped as `sigma`."""
        ...


@dataclass(frozen=True)
class Lognormal:
    """ln sigma ~ N(mean, std^2)."""

    mean: float = -1.2
    std: float = 1.2

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        return noise_schedule.sample_lognormal_sigma(
            num, mean=self.mean, std=self.std, generator=generator, device=generator.device
        )

    def density(self, sigma: Tensor) -> Tensor:
        score = (sigma.log() - self.mean) / self.std
        return (-0.5 * score.square()).exp() / (sigma * self.std * math.sqrt(2 * math.pi))


@dataclass(frozen=True)
class UniformInRho:
    """sigma = (a + b t)^rho with t uniform on [0, t_max]; t = 0 is sigma_min and t = 1 sigma_max."""

    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    t_max: float = 0.8

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        t = self.t_max * torch.rand(num, generator=generator, device=generator.device)
        return noise_schedule.rho_sigma(
            1 - t, sigma_min=self.sigma_min, sigma_max=self.sigma_max, rho=self.rho
        )

    def density(self, sigma: Tensor) -> Tensor:
        slope = self.sigma_max ** (1 / self.rho) - self.sigma_min ** (1 / self.rho)
        return 1 / (self.t_max * self.rho * slope * sigma.pow(1 - 1 / self.rho))


@dataclass(frozen=True)
class Mixture:
    """One of two laws, each with probability one half."""

    first: SigmaLaw
    second: SigmaLaw

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        takes_first = torch.rand(num, generator=generator, device=generator.device) < 0.5
        return torch.where(takes_first, self.first.sample(num, generator), self.second.sample(num, generator))

    def density(self, sigma: Tensor) -> Tensor:
        return 0.5 * (self.first.density(sigma) + self.second.density(sigma))


def student_law(config: SigmaLawConfig) -> SigmaLaw:
    """The levels at which the student is judged."""
    if config.law == "lognormal":
        return Lognormal(config.mean, config.std)
    return UniformInRho(config.sigma_min, config.sigma_max, config.rho, config.t_max)


def companion_law(config: SigmaLawConfig) -> SigmaLaw:
    """The levels at which fake score and discriminator are trained."""
    published = Lognormal(config.mean, config.std)
    match config.companions:
        case "generator":
            return student_law(config)
        case "published":
            return published
        case "mixture":
            return Mixture(student_law(config), published)


def time_weight_for(law: SigmaLaw, sigma: Tensor, *, power: float, is_integral: bool) -> Tensor:
    """The weight that makes a loss at sigma ~ `law` exact for lambda(sigma) = sigma^power, [B].

    A loss quadratic in the score difference then estimates the weighted expansion of the divergence, and one
    linear in it (`is_integral`) the same objective by its other form, weight lambda'(sigma) on D_f(q_t||p_t);
    the two differ by the boundary term at the largest level.
    """
    density = law.density(sigma)
    if is_integral:
        return power * sigma.pow(power - 1) / (density * sigma.square())
    return noise_schedule.expansion_weight(sigma, density, sigma.pow(power))
