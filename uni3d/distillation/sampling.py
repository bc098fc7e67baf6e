"""Images from noise: EDM's samplers for a teacher, one evaluation for a student, and a seed for each image.

A seed stands for one image, whatever the batch, the number of processes and the device: its noise, its class
and the noise of the stochastic sampler are drawn on the CPU from a generator of its own. So a network with a
list of seeds is a data set like any other (`sampled_dataset`), which can be written, shown and measured.
Legend: B batch, C channels, H W pixels, N steps, K classes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from uni3d.data.image_dataset import ImageDataset
from uni3d.diffusion.edm import EDMConfig
from uni3d.errors import UsageError
from uni3d.losses.noise_schedule import rho_sigma

SIGMA_INIT = 2.5
"""Noise level of the input of published one-step students (SiD, SiDA, Uni-Instruct)."""
MAX_SEED = 2**63 - 1

Denoise = Callable[[Tensor, Tensor], Tensor]
"""D(x, sigma) -> x0, x [B, ...] and sigma [B]."""


class Network(Protocol):
    """What `uni3d.diffusion.edm.EDMDenoiser` is, as far as sampling goes."""

    config: EDMConfig

    def __call__(self, x: Tensor, sigma: Tensor, class_labels: Tensor | None = None) -> Tensor: ...


# ---- noise and classes by seed


class SeedNoise:
    """Random numbers of a batch of images, each from its own generator on the CPU, seeded by its seed.

    The order of the draws is part of what a seed means: start noise, class, then the noise of each step.
    """

    def __init__(self, seeds: Sequence[int]) -> None:
        for seed in seeds:
            if not 0 <= seed <= MAX_SEED:
                raise UsageError(f"the seed {seed} is out of range; expected 0 to 2^63 - 1")
        self._generators = [torch.Generator().manual_seed(int(seed)) for seed in seeds]

    def normal(self, shape: Sequence[int]) -> Tensor:
        """float32 [B, *shape] of standard normal numbers, on the CPU."""
        return torch.stack([torch.randn(tuple(shape), generator=each) for each in self._generators])

    def classes(self, num_classes: int) -> Tensor:
        """int64 [B] of classes in [0, num_classes), each as likely as any other, on the CPU."""
        return torch.stack([torch.randint(num_classes, (), generator=each) for each in self._generators])


def start_of(
    seeds: Sequence[int], config: EDMConfig, *, class_index: int | None = None
) -> tuple[Tensor, Tensor | None, SeedNoise]:
    """(noise float32 [B, C, H, W], classes int64 [B] or None, what the sampler may draw from), on the CPU.

    `class_index` is the class of all images; None draws one for each seed. The noise of a seed is the same
    for every class. Raises UsageError for a class that the network does not know.
    """
    check_class(class_index, config)
    source = SeedNoise(seeds)
    noise = source.normal((config.image_channels, config.resolution, config.resolution))
    if config.label_dim == 0:
        return noise, None, source
    classes = source.classes(config.label_dim)
    return noise, classes if class_index is None else torch.full_like(classes, class_index), source


def check_class(class_index: int | None, config: EDMConfig) -> None:
    """UsageError unless a network of `config` can make images of `class_index` (None: of any)."""
    if class_index is None:
        return
    if config.label_dim == 0:
        raise UsageError(f"the network is unconditional and knows no class {class_index}; leave --class out")
    if not 0 <= class_index < config.label_dim:
        raise UsageError(
            f"--class is {class_index}; the network knows the classes 0 to {config.label_dim - 1}"
        )


# ---- samplers


@dataclass(frozen=True)
class Churn:
    """Noise that the stochastic sampler adds before each step (Karras et al. 2022, Algorithm 2)."""

    amount: float = 0.0
    """S_churn: shared out over the steps; 0 is the deterministic sampler."""
    sigma_min: float = 0.0
    """S_min, the lowest noise level at which noise is added."""
    sigma_max: float = math.inf
    """S_max, the highest."""
    noise_scale: float = 1.0
    """S_noise: standard deviation of what is added."""

    def gamma(self, sigma: float, num_steps: int) -> float:
        """By which factor, less one, the noise level rises before a step."""
        if not self.sigma_min <= sigma <= self.sigma_max:
            return 0.0
        return min(self.amount / num_steps, math.sqrt(2) - 1)


def heun_sigmas(
    num_steps: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0
) -> Tensor:
    """float64 [N + 1] falling noise levels, the last one zero (Karras et al. 2022, Eq. 5)."""
    if num_steps < 1:
        raise ValueError(f"num_steps is {num_steps}; expected at least 1")
    u = torch.linspace(0, 1, num_steps, dtype=torch.float64)
    sigmas = rho_sigma(u, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)
    return torch.cat([sigmas, sigmas.new_zeros(1)])


@torch.no_grad()
def sample_heun(
    denoise: Denoise,
    noise: Tensor,
    sigmas: Tensor,
    *,
    churn: Churn | None = None,
    draw: Callable[[Sequence[int]], Tensor] | None = None,
) -> Tensor:
    """Follow dx/dsigma = (x - D(x, sigma)) / sigma from sigmas[0] to zero by Heun's method, [B, ...].

    EDM's Algorithm 1, and with `churn` its Algorithm 2: N steps are 2 N - 1 evaluations, since the last step
    is Euler's.

    Args:
        denoise: called with x in the dtype of `noise` on its device, and sigma [B] of the same.
        noise: standard normal [B, ...]; its dtype is that of the arithmetic between evaluations.
        sigmas: float64 [N + 1] of `heun_sigmas`, on the CPU.
        draw: standard normal numbers [B, *shape] for `churn`, for example `SeedNoise.normal`.
    """
    levels = sigmas.tolist()
    num_steps = len(levels) - 1
    churn = churn or Churn()

    def at(x: Tensor, sigma: float) -> Tensor:
        return denoise(x, x.new_full((x.shape[0],), sigma)).to(x.dtype)

    x = noise * levels[0]
    for index, (sigma, following) in enumerate(zip(levels, levels[1:], strict=False)):
        gamma = churn.gamma(sigma, num_steps)
        if gamma > 0:
            if draw is None:
                raise ValueError("the stochastic sampler adds noise; pass draw, where it comes from")
            raised = sigma * (1 + gamma)
            added = draw(x.shape[1:]).to(x)
            x = x + math.sqrt(raised**2 - sigma**2) * churn.noise_scale * added
            sigma = raised
        slope = (x - at(x, sigma)) / sigma
        step = following - sigma
        euler = x + step * slope
        if index < num_steps - 1:
            end_slope = (euler - at(euler, following)) / following
            x = x + step * 0.5 * (slope + end_slope)
        else:
            x = euler
    return x


@torch.no_grad()
def sample_one_step(denoise: Denoise, noise: Tensor, *, sigma_init: float = SIGMA_INIT) -> Tensor:
    """What a student makes of standard normal `noise` [B, ...]: G(sigma_init * noise, sigma_init)."""
    return denoise(sigma_init * noise, noise.new_full((noise.shape[0],), sigma_init))


def to_pixels(x: Tensor) -> Tensor:
    """x in [-1, 1], any shape, as uint8: -1 is 0, and 1 (and more) is 255."""
    return (x.float() * 127.5 + 128).clamp(0, 255).to(torch.uint8)


# ---- a network and seeds as a data set


@dataclass(frozen=True)
class SamplerSettings:
    """How a network makes images of noise."""

    num_steps: int | None = 18
    """Heun steps of a teacher; None is one evaluation, of a student."""
    sigma_init: float = SIGMA_INIT
    """Noise level of a student's input."""
    sigma_min: float = 0.002
    """Lowest noise level of a teacher's steps."""
    sigma_max: float = 80.0
    """Highest."""
    rho: float = 7.0
    """How much more finely low noise levels are spaced."""
    churn: Churn = field(default_factory=Churn)

    @property
    def num_evaluations(self) -> int:
        """Of the network, for each image."""
        return 1 if self.num_steps is None else 2 * self.num_steps - 1

    def record(self) -> dict[str, Any]:
        """For reports: what matters to the images."""
        if self.num_steps is None:
            return {"sampler": "one_step", "num_evaluations": 1, "sigma_init": self.sigma_init}
        values = {
            "sampler": "heun",
            "num_evaluations": self.num_evaluations,
            "num_steps": self.num_steps,
            "sigma_min": self.sigma_min,
            "sigma_max": self.sigma_max,
            "rho": self.rho,
        }
        if self.churn.amount > 0:
            values |= {"s_churn": self.churn.amount, "s_min": self.churn.sigma_min}
            values |= {"s_max": min(self.churn.sigma_max, 1e9), "s_noise": self.churn.noise_scale}
        return values


def settings_for(source: Mapping[str, Any], *, num_steps: int | None = None) -> SamplerSettings:
    """How a network is sampled whose `config.json` has this `source`.

    A student says so: `"student": {"sigma_init": 2.5}`. Everything else is a teacher, with `num_steps` (None:
    18) Heun steps. Raises UsageError for a student that is asked for steps, or whose entry is damaged.
    """
    student = source.get("student")
    if student is None:
        return SamplerSettings(num_steps=num_steps or 18)
    sigma_init = student.get("sigma_init") if isinstance(student, Mapping) else None
    if not isinstance(sigma_init, (int, float)) or not 0 < sigma_init < math.inf:
        raise UsageError("the network's config.json has a damaged 'student' entry; write the network again")
    if num_steps is not None:
        raise UsageError("the network is a one-step student; leave --steps out")
    return SamplerSettings(num_steps=None, sigma_init=float(sigma_init))


@dataclass(frozen=True)
class SampledImages:
    """The images of `seeds`, made whenever they are asked for: an `ImageSource`."""

    net: Network
    seeds: Sequence[int]
    settings: SamplerSettings
    class_index: int | None
    device: torch.device
    batch_size: int
    progress: Callable[[int], object] | None = None

    def __len__(self) -> int:
        return len(self.seeds)

    def read(self, indices: np.ndarray, *, num_workers: int = 1) -> np.ndarray:
        """uint8 [B, C, H, W]; `num_workers` is of no use here."""
        config = self.net.config
        pixels = np.empty(
            (len(indices), config.image_channels, config.resolution, config.resolution), np.uint8
        )
        for start in range(0, len(indices), self.batch_size):
            chosen = [self.seeds[index] for index in indices[start : start + self.batch_size].tolist()]
            images = sample_seeds(
                self.net, chosen, settings=self.settings, class_index=self.class_index, device=self.device
            )
            pixels[start : start + len(chosen)] = to_pixels(images).cpu().numpy()
            if self.progress is not None:
                self.progress(len(chosen))
        return pixels


@torch.no_grad()
def sample_seeds(
    net: Network,
    seeds: Sequence[int],
    *,
    settings: SamplerSettings,
    class_index: int | None = None,
    device: torch.device | str = "cpu",
) -> Tensor:
    """The images of `seeds` in one batch, [B, C, H, W] about in [-1, 1], on `device`.

    The noise is the same for a seed in every batch; the network's own arithmetic may differ in its last bits
    between batch sizes and devices. `net` should be in eval mode.
    """
    noise, classes, source = start_of(seeds, net.config, class_index=class_index)
    labels = None if classes is None else classes.to(device)

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        return net(x.float(), sigma.float(), labels)

    if settings.num_steps is None:
        return sample_one_step(denoise, noise.to(device), sigma_init=settings.sigma_init)
    sigmas = heun_sigmas(
        settings.num_steps, sigma_min=settings.sigma_min, sigma_max=settings.sigma_max, rho=settings.rho
    )
    # float64 between evaluations, as EDM does: the steps of a long run add up.
    start = noise.to(device, torch.float64)
    return sample_heun(denoise, start, sigmas, churn=settings.churn, draw=source.normal)


def sampled_dataset(
    net: Network,
    seeds: Sequence[int],
    *,
    name: str,
    settings: SamplerSettings,
    class_index: int | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 64,
    progress: Callable[[int], object] | None = None,
) -> ImageDataset:
    """The images of `seeds` as a data set, sampled batch by batch as they are read.

    `dataset.batches()` iterates over uint8 [B, C, H, W], `dataset.labels` are the classes. Several processes
    share the work by taking parts of the seeds. `progress` is told how many images each batch held. Raises
    UsageError for no seeds, a seed out of range, or a class that the network does not know.
    """
    if len(seeds) == 0:
        raise UsageError("no seeds were given; pass at least one")
    config = net.config
    check_class(class_index, config)
    SeedNoise([min(seeds), max(seeds)])
    source = SampledImages(net, seeds, settings, class_index, torch.device(device), batch_size, progress)
    labels = None
    if config.label_dim:
        labels = (
            np.full(len(seeds), class_index, np.int64)
            if class_index is not None
            else np.concatenate([_classes(seed, config) for seed in seeds])
        )
    return ImageDataset(name, source, labels, config.label_dim, config.image_channels, config.resolution)


def _classes(seed: int, config: EDMConfig) -> np.ndarray:
    _, classes, _ = start_of([seed], config)
    assert classes is not None
    return classes.numpy()


def with_churn(settings: SamplerSettings, churn: Churn) -> SamplerSettings:
    """The same for the stochastic sampler; UsageError for a one-step student, which has no steps to churn."""
    if settings.num_steps is None and churn.amount > 0:
        raise UsageError("a one-step student has no stochastic sampler; leave --churn out")
    return replace(settings, churn=churn)
