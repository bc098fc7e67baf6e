"""Two builds of one Uni-Instruct training step, for `benchmark_step`: this project's, and how it was.

Both update the fake score with its discriminator and then the student, on networks and batches of the same
sizes and with the losses of `uni3d.losses`.

- `ProjectStep`: the step of `uni3d distill` itself (`StudentTraining`), on random images.
- `ReleasedStep`: float32 without TF32, eager, NCHW, micro-batches, materialised attention, separate passes,
  tests for NaN that wait for the device, a loop over parameters for gradients and averages; its discriminator
  is the mean over channels of the fake score's encoder output.

Legend: B batch, C channels, H W pixels, K classes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from uni3d.data.image_dataset import ArraySource, ImageDataset
from uni3d.diffusion.edm import EDMConfig, EDMDenoiser
from uni3d.distillation.sampling import SIGMA_INIT
from uni3d.distillation.session import prepare_device
from uni3d.distillation.settings import (
    CompanionsConfig,
    DistillConfig,
    MethodConfig,
    OptimiserConfig,
    RunConfig,
)
from uni3d.distillation.student_training import StudentTraining
from uni3d.losses import recipes
from uni3d.losses.discriminator import discriminator_loss, log_ratio_from_logits
from uni3d.losses.fake_score import denoising_loss
from uni3d.losses.noise_schedule import sample_lognormal_sigma, sample_rho_sigma
from uni3d.losses.recipe import Recipe
from uni3d.training.processes import Processes

GENERATOR_SIGMA_MAX = 24.41
"""Highest noise level of the student's step in the published runs."""
EMA_BETA = 0.9996
MAX_GRADIENT = 1.0


@dataclass(frozen=True)
class StepSetup:
    """What is trained; the same for every build."""

    config: EDMConfig
    method: str
    """Name of a recipe."""
    divergence: str | None
    """Where the recipe leaves it open."""
    batch_size: int
    device: torch.device
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the project's build; the released one computes in float32."""
    compile: bool = True
    """torch.compile in the project's build on a GPU."""
    micro_batch: int = 128
    """Images at once in the released build, which accumulates gradients over the batch."""
    learning_rate: float = 1e-5
    seed: int = 0

    @property
    def recipe(self) -> Recipe:
        """Unguided, as image teachers are."""
        return recipes.get(self.method, self.divergence, guidance_scale=1.0, fake_guidance_scale=1.0)


class TrainingStep(Protocol):
    """One whole training step, companions first; a build to be timed."""

    def __call__(self) -> object: ...


StepBuilder = Callable[[StepSetup], TrainingStep]


def logits_of(features: Tensor) -> Tensor:
    """[B, F, h, w] -> [B, 1, h, w]: the encoder's output as a discriminator without parameters."""
    return features.mean(dim=1, keepdim=True)


class RealImages:
    """Batches of random 8-bit images with classes: what a data loader hands over, without the disk."""

    def __init__(self, setup: StepSetup) -> None:
        config = setup.config
        generator = torch.Generator().manual_seed(setup.seed)
        shape = (setup.batch_size, config.image_channels, config.resolution, config.resolution)
        self.pixels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        self.classes = torch.randint(max(config.label_dim, 1), (setup.batch_size,), generator=generator)
        if setup.device.type == "cuda":
            self.pixels, self.classes = self.pixels.pin_memory(), self.classes.pin_memory()
        self.num_classes = config.label_dim
        self.device = setup.device

    def batch(self) -> tuple[Tensor, Tensor | None]:
        """(images float32 [B, C, H, W] in [-1, 1], one-hot classes [B, K] or None), on the device."""
        images = self.pixels.to(self.device, non_blocking=True).float() / 127.5 - 1
        if self.num_classes == 0:
            return images, None
        classes = self.classes.to(self.device, non_blocking=True)
        return images, torch.nn.functional.one_hot(classes, self.num_classes).float()


def random_images(setup: StepSetup) -> ImageDataset:
    """As many random images as a batch has, with random classes where the network knows any."""
    config = setup.config
    generator = np.random.default_rng(setup.seed)
    shape = (setup.batch_size, config.image_channels, config.resolution, config.resolution)
    return ImageDataset(
        name="random",
        source=ArraySource(generator.integers(0, 256, shape, dtype=np.uint8)),
        labels=generator.integers(0, config.label_dim, setup.batch_size) if config.label_dim else None,
        num_classes=config.label_dim,
        num_channels=config.image_channels,
        resolution=config.resolution,
    )


class ProjectStep:
    """The step of `uni3d distill`, past its warm-ups."""

    def __init__(self, setup: StepSetup) -> None:
        prepare_device(setup.device)
        self.training = StudentTraining(
            distill_config(setup),
            EDMDenoiser(setup.config, generator=torch.Generator().manual_seed(setup.seed)),
            random_images(setup),
            device=setup.device,
            processes=Processes(),
        )
        self.index = 0

    def __call__(self) -> None:
        self.training.step(self.index)
        self.index += 1


def distill_config(setup: StepSetup) -> DistillConfig:
    """The settings under which `uni3d distill` takes the step of `setup` from its first image on."""
    rate = setup.learning_rate
    return DistillConfig(
        method=MethodConfig(
            method=setup.method,
            divergence=setup.divergence,
            weighting="recipe",
            score_warmup_images=0,
            plain_warmup_images=0,
            regression_pairs=setup.batch_size,
            regression_steps=1,
        ),
        optimiser=OptimiserConfig(learning_rate=rate, beta1=0.0),
        companions=CompanionsConfig(
            learning_rate=setup.learning_rate, head_learning_rate=setup.learning_rate
        ),
        run=RunConfig(
            batch=setup.batch_size, seed=setup.seed, precision=setup.precision, compile=setup.compile
        ),
    )


class ReleasedStep:
    """The same step with every cost of the released programs, written from a description of them."""

    def __init__(self, setup: StepSetup) -> None:
        self.setup, self.recipe, self.device = setup, setup.recipe, setup.device
        self.real_images = RealImages(setup)
        generator = torch.Generator().manual_seed(setup.seed)
        self.teacher = EDMDenoiser(setup.config, generator=generator).to(self.device)
        self.student, self.fake, self.average = (self._copy_of_teacher() for _ in range(3))
        self.teacher.requires_grad_(False).eval()
        settings = {"lr": setup.learning_rate, "betas": (0.0, 0.999), "foreach": False, "fused": False}
        self.student_optimiser = torch.optim.Adam(self.student.parameters(), **settings)
        self.fake_optimiser = torch.optim.Adam(self.fake.parameters(), **settings)
        self.reported: dict[str, float] = {}

    def __call__(self) -> None:
        with _full_float32(), sdpa_kernel(SDPBackend.MATH):
            for _ in range(self.recipe.fake_steps):
                self._companion_phase()
            self._student_phase()

    def _copy_of_teacher(self) -> EDMDenoiser:
        net = EDMDenoiser(self.setup.config)
        net.load_state_dict(self.teacher.state_dict())
        return net.to(self.device)

    def _rounds(self) -> Iterator[tuple[Tensor, Tensor | None]]:
        images, labels = self.real_images.batch()
        for start in range(0, self.setup.batch_size, self.setup.micro_batch):
            part = slice(start, start + self.setup.micro_batch)
            yield images[part], None if labels is None else labels[part]

    def _companion_phase(self) -> None:
        self.fake.train().requires_grad_(True)
        self.student.eval().requires_grad_(False)
        self.fake_optimiser.zero_grad(set_to_none=True)
        for real, labels in self._rounds():
            with torch.no_grad():
                fake = self.student(SIGMA_INIT * torch.randn_like(real), SIGMA_INIT, labels)
            sigma = sample_lognormal_sigma(len(real), device=self.device)
            noise = sigma[:, None, None, None] * torch.randn_like(real)
            x0, features = self.fake(fake + noise, sigma, labels, output="both")
            loss = denoising_loss(x0, fake, sigma, weighting="edm", reduction="sum")
            loss = self._without_nan("fake_score", loss)
            total = loss.sum() / self.setup.batch_size
            if self.recipe.needs_discriminator:
                real_logits = logits_of(self.fake(real + noise, sigma, labels, output="features"))
                critic = discriminator_loss(real_logits, logits_of(features))
                total = total + self._without_nan("discriminator", critic).sum() / self.setup.batch_size
            self.reported["fake_score"] = total.item()
            total.backward()
        self._update(self.fake, self.fake_optimiser)

    def _student_phase(self) -> None:
        self.student.train().requires_grad_(True)
        self.fake.eval().requires_grad_(False)
        self.student_optimiser.zero_grad(set_to_none=True)
        for real, labels in self._rounds():
            x0 = self.student(SIGMA_INIT * torch.randn_like(real), SIGMA_INIT, labels)
            sigma = sample_rho_sigma(len(real), sigma_max=GENERATOR_SIGMA_MAX, device=self.device)
            x_t = x0 + sigma[:, None, None, None] * torch.randn_like(real)
            teacher_x0 = self.teacher(x_t, sigma, labels)
            fake_x0, features = self.fake(x_t, sigma, labels, output="both")
            logits = logits_of(features)
            loss = recipes.generator_loss(
                self.recipe,
                x0=x0,
                sigma=sigma,
                teacher_x0=self._without_nan("teacher", teacher_x0),
                fake_x0=self._without_nan("fake", fake_x0),
                log_ratio=log_ratio_from_logits(logits) if self.recipe.needs_discriminator else None,
                adversarial_logits=logits,
                regression=x0.new_zeros(len(real)),
            )
            total = self._without_nan("student", loss).sum() / self.setup.batch_size
            self.reported["student"] = total.item()
            total.backward()
        self._update(self.student, self.student_optimiser)
        for averaged, current in zip(self.average.parameters(), self.student.parameters(), strict=True):
            averaged.data.copy_(current.data.lerp(averaged.data, EMA_BETA))
        for averaged, current in zip(self.average.buffers(), self.student.buffers(), strict=True):
            averaged.copy_(current)

    def _without_nan(self, name: str, value: Tensor) -> Tensor:
        """The test for NaN that waits for the device; every quantity is tested, as in the released step."""
        if torch.isnan(value).any():
            self.reported[f"nan_{name}"] = self.reported.get(f"nan_{name}", 0.0) + 1
            return torch.nan_to_num(value)
        return value

    def _update(self, net: EDMDenoiser, optimiser: torch.optim.Adam) -> None:
        for parameter in net.parameters():
            if parameter.grad is not None:
                torch.nan_to_num(parameter.grad, nan=0, posinf=1e5, neginf=-1e5, out=parameter.grad)
                parameter.grad.clamp_(-MAX_GRADIENT, MAX_GRADIENT)
        optimiser.step()


@contextlib.contextmanager
def _full_float32() -> Iterator[None]:
    """TF32 off inside, as the released programs set it."""
    matmul = torch.backends.cuda.matmul
    before = matmul.allow_tf32
    matmul.allow_tf32 = False
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=True, allow_tf32=False):
            yield
    finally:
        matmul.allow_tf32 = before


BUILDS: dict[str, StepBuilder] = {"project": ProjectStep, "released": ReleasedStep}
"""What can be timed, by name."""
