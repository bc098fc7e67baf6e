"""Two builds of one Uni-Instruct training step, for `benchmark_step`: how fast it can be, and how it was.

Both update the fake score with its discriminator (logits are the mean over channels of the fake score's
encoder output) and then the student, on the same networks, batch and loss of `uni3d.losses`.

- `ProjectStep`: bfloat16 bodies, channels last, `torch.compile`, one pass for real and fake images, frozen
  views in place of toggled parameters, fused optimisers, and nothing that waits for the device.
- `ReleasedStep`: float32 without TF32, eager, NCHW, micro-batches, materialised attention, separate passes,
  tests for NaN that wait for the device, a loop over parameters for gradients and averages.

Legend: B batch, C channels, H W pixels, K classes.
"""

# pyright: reportPrivateImportUsage=false
# torch's foreach functions, which its own optimisers are made of, have an underscore and no substitute.

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from uni3d.diffusion.edm import EDMConfig, EDMDenoiser, skeleton
from uni3d.distillation.sampling import SIGMA_INIT
from uni3d.losses import recipes
from uni3d.losses.discriminator import RatioNormaliser, discriminator_loss, log_ratio_from_logits
from uni3d.losses.fake_score import denoising_loss
from uni3d.losses.noise_schedule import sample_lognormal_sigma, sample_rho_sigma
from uni3d.losses.recipe import Recipe

GENERATOR_SIGMA_MAX = 24.41
"""Highest noise level of the student's step in the published runs."""
EMA_BETA = 0.9996
MAX_GRADIENT = 1.0


@dataclass(frozen=True)
class StepSetup:
    """What is trained; the same for every build."""

    config: EDMConfig
    recipe: Recipe
    batch_size: int
    device: torch.device
    body_dtype: torch.dtype = torch.bfloat16
    """Of the project's build; the released one computes in float32."""
    compile_mode: str | None = "default"
    """Of torch.compile in the project's build; None leaves it out."""
    micro_batch: int = 128
    """Images at once in the released build, which accumulates gradients over the batch."""
    learning_rate: float = 1e-5
    seed: int = 0


class TrainingStep(Protocol):
    """One whole training step, companions first; a build to be timed."""

    def __call__(self) -> None: ...


StepBuilder = Callable[[StepSetup], TrainingStep]


def frozen_view(net: EDMDenoiser) -> EDMDenoiser:
    """A network in eval mode that shares the values of `net`, before and after updates, but not its
    gradients.

    With one there is no need to switch `net` between training and use, which compiled code would notice.
    """
    view = skeleton(net.config, body_dtype=net.body_dtype)
    view.load_state_dict({name: value.detach() for name, value in net.state_dict().items()}, assign=True)
    return view.requires_grad_(False).eval()


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


def _networks(setup: StepSetup, body_dtype: torch.dtype) -> list[EDMDenoiser]:
    """Student, fake score and teacher with the same values, as they are at the start of a distillation."""
    generator = torch.Generator().manual_seed(setup.seed)
    first = EDMDenoiser(setup.config, body_dtype=body_dtype, generator=generator)
    nets = [first]
    for _ in range(2):
        other = EDMDenoiser(setup.config, body_dtype=body_dtype)
        other.load_state_dict(first.state_dict())
        nets.append(other)
    for net in nets:
        if net.model.map_augment is not None:
            net.model.map_augment.requires_grad_(False)
    return [net.to(setup.device) for net in nets]


def _trained(net: EDMDenoiser) -> list[Tensor]:
    return [parameter for parameter in net.parameters() if parameter.requires_grad]


class ProjectStep:
    """The step as this project does it."""

    def __init__(self, setup: StepSetup) -> None:
        self.setup, self.recipe, self.device = setup, setup.recipe, setup.device
        self.real_images = RealImages(setup)
        student, fake, teacher = (
            net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
            for net in _networks(setup, setup.body_dtype)
        )
        student.train()
        fake.train()
        self.student_parameters, self.fake_parameters = _trained(student), _trained(fake)
        self.average = [parameter.detach().clone() for parameter in self.student_parameters]
        self.student, self.fake = self._compiled(student), self._compiled(fake)
        self.student_view = self._compiled(frozen_view(student))
        self.fake_view = self._compiled(frozen_view(fake))
        self.teacher = self._compiled(teacher.requires_grad_(False).eval())
        self.student_optimiser = self._optimiser(self.student_parameters)
        self.fake_optimiser = self._optimiser(self.fake_parameters)
        self.normaliser = RatioNormaliser().to(self.device) if self.recipe.normalise_ratio else None
        self.generator = torch.Generator(self.device).manual_seed(setup.seed)
        self.num_skipped = torch.zeros((), device=self.device)
        self.sigma_init = torch.full((1,), SIGMA_INIT, device=self.device)

    def __call__(self) -> None:
        real, labels = self.real_images.batch()
        if self.recipe.needs_fake_score or self.recipe.needs_discriminator:
            for _ in range(self.recipe.fake_steps):
                self.companion_step(real, labels)
        self.student_step(labels)

    def companion_step(self, real: Tensor, labels: Tensor | None) -> None:
        """Update the fake score, and the discriminator in its encoder, on new fakes."""
        size = len(real)
        with torch.no_grad():
            fake = self.student_view(self._start(size), self.sigma_init, labels)
        sigma = self._lognormal(size)
        loss = fake.new_zeros(())
        if self.recipe.needs_discriminator:
            clean = torch.cat([fake, real])
            both_sigma = torch.cat([sigma, sigma])
            noisy = clean + both_sigma[:, None, None, None] * self._normal(clean.shape)
            both_labels = None if labels is None else torch.cat([labels, labels])
            x0, features = self.fake(noisy, both_sigma, both_labels, output="both", num_decoded=size)
            fake_logits, real_logits = logits_of(features).chunk(2)
            loss = loss + discriminator_loss(real_logits, fake_logits).mean()
        else:
            x0 = self.fake(fake + sigma[:, None, None, None] * self._normal(fake.shape), sigma, labels)
        loss = loss + denoising_loss(x0, fake, sigma, weighting="edm", reduction="sum").mean()
        gradients = torch.autograd.grad(loss, self.fake_parameters, allow_unused=True)
        self._update(self.fake_optimiser, self.fake_parameters, gradients)

    def student_step(self, labels: Tensor | None) -> None:
        """Update the student, and its average."""
        size = self.setup.batch_size
        x0 = self.student(self._start(size), self.sigma_init, labels)
        sigma = sample_rho_sigma(
            size, sigma_max=GENERATOR_SIGMA_MAX, generator=self.generator, device=self.device
        )
        x_t = x0 + sigma[:, None, None, None] * self._normal(x0.shape)
        fake_x0, logits = self._fake_outputs(x_t, sigma, labels)
        loss = recipes.generator_loss(
            self.recipe,
            x0=x0,
            sigma=sigma,
            teacher_x0=lambda: self.teacher(x_t, sigma, labels),
            fake_x0=fake_x0,
            log_ratio=None if logits is None else lambda: self._log_ratio(logits, sigma),
            adversarial_logits=logits,
            regression=x0.new_zeros(size),
        ).mean()
        gradients = torch.autograd.grad(loss, self.student_parameters, allow_unused=True)
        self._update(self.student_optimiser, self.student_parameters, gradients)
        torch._foreach_lerp_(self.average, [p.detach() for p in self.student_parameters], 1 - EMA_BETA)

    def _fake_outputs(
        self, x_t: Tensor, sigma: Tensor, labels: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None]:
        """(x0-prediction, logits) of the fake score, each with the gradient that the recipe reads."""
        recipe = self.recipe
        if not recipe.needs_fake_score:
            return None, None
        reads_logits = recipe.needs_discriminator
        if not reads_logits:
            with torch.set_grad_enabled(recipe.needs_fake_jacobian):
                return self.fake_view(x_t, sigma, labels), None
        if recipe.needs_fake_jacobian:
            x0, features = self.fake_view(x_t, sigma, labels, output="both")
            return x0, logits_of(features)
        with torch.no_grad():
            x0 = self.fake_view(x_t, sigma, labels)
        return x0, logits_of(self.fake_view(x_t, sigma, labels, output="features"))

    def _log_ratio(self, logits: Tensor, sigma: Tensor) -> Tensor:
        log_ratio = log_ratio_from_logits(logits)
        return log_ratio if self.normaliser is None else self.normaliser(log_ratio, sigma)

    def _update(
        self,
        optimiser: torch.optim.Adam,
        parameters: list[Tensor],
        gradients: tuple[Tensor | None, ...],
    ) -> None:
        """One fused update, left out on the device itself where a gradient is not finite."""
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        present = [gradient for gradient in gradients if gradient is not None]
        norm = torch.stack(torch._foreach_norm(present)).norm()
        skipped = (~norm.isfinite()).float()
        self.num_skipped += skipped
        torch._foreach_clamp_min_(present, -MAX_GRADIENT)
        torch._foreach_clamp_max_(present, MAX_GRADIENT)
        optimiser.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]  # read by fused kernels
        optimiser.step()

    def _optimiser(self, parameters: list[Tensor]) -> torch.optim.Adam:
        return torch.optim.Adam(parameters, lr=self.setup.learning_rate, betas=(0.0, 0.999), fused=True)

    def _compiled(self, net: EDMDenoiser) -> Any:
        mode = self.setup.compile_mode
        return net if mode is None else torch.compile(net, dynamic=False, mode=mode)

    def _start(self, size: int) -> Tensor:
        config = self.setup.config
        return SIGMA_INIT * self._normal((size, config.image_channels, config.resolution, config.resolution))

    def _normal(self, shape: Any) -> Tensor:
        noise = torch.randn(shape, generator=self.generator, device=self.device)
        return noise.contiguous(memory_format=torch.channels_last)

    def _lognormal(self, size: int) -> Tensor:
        return sample_lognormal_sigma(size, generator=self.generator, device=self.device)


class ReleasedStep:
    """The same step with every cost of the released programs, written from a description of them."""

    def __init__(self, setup: StepSetup) -> None:
        self.setup, self.recipe, self.device = setup, setup.recipe, setup.device
        self.real_images = RealImages(setup)
        self.student, self.fake, self.teacher = _networks(setup, torch.float32)
        self.teacher.requires_grad_(False).eval()
        self.average = EDMDenoiser(setup.config).to(self.device)
        self.average.load_state_dict(self.student.state_dict())
        settings = {"lr": setup.learning_rate, "betas": (0.0, 0.999), "foreach": False, "fused": False}
        self.student_optimiser = torch.optim.Adam(self.student.parameters(), **settings)
        self.fake_optimiser = torch.optim.Adam(self.fake.parameters(), **settings)
        self.reported: dict[str, float] = {}

    def __call__(self) -> None:
        with _full_float32(), sdpa_kernel(SDPBackend.MATH):
            for _ in range(self.recipe.fake_steps):
                self._companion_phase()
            self._student_phase()

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
