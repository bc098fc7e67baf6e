"""Which form of the Uni-Instruct loss reaches the lower divergence: an experiment in two dimensions.

A Gaussian mixture with exact scores is the teacher. A small network makes points of noise in one step; its
fake score and its discriminator are trained beside it, as they are for images. Then the forward KL of the
diffused densities at the lowest noise level is measured on a grid: the teacher's is known, the student's is
a mean over many of its points. Every form gets the same steps, batches, random numbers and learning rates.

    python -m uni3d.distillation.toy --output toy.json

Legend: V runs that train side by side (one for each seed), B batch, G grid points along an axis.
"""

# pyright: reportPrivateImportUsage=false
# torch's foreach functions, which its own optimisers are made of, have an underscore and no substitute.

from __future__ import annotations

import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from uni3d.diffusion.analytic import GaussianMixture
from uni3d.losses import recipes
from uni3d.losses.discriminator import RatioNormaliser, discriminator_loss, log_ratio_from_logits
from uni3d.losses.fake_score import denoising_loss
from uni3d.losses.noise_schedule import expansion_weight
from uni3d.losses.recipe import Recipe
from uni3d.timing_program import argument_parser, keep_figures, say

DIM = 2
VARIANTS = ("exact", "four_term", "detached", "released")
"""Forms of the loss, by the variants of `recipes.get`."""


@dataclass(frozen=True)
class ToySettings:
    """Everything that decides the result; the same for every form but for `learning_rates`, all of which
    every form tries."""

    variants: tuple[str, ...] = VARIANTS
    divergence: str = "forward_kl"
    num_seeds: int = 6
    """Runs that are reported."""
    num_tuning_seeds: int = 2
    """Further runs, which choose the learning rate and are not reported."""
    learning_rates: tuple[float, ...] = (2e-3, 6e-3)
    """Of the student."""
    companion_learning_rate: float = 2e-3
    """Of fake score and discriminator."""
    num_steps: int = 1000
    """Of the student."""
    num_warmup_steps: int = 300
    """Of fake score and discriminator before the student moves."""
    companion_steps: int = 2
    """Updates of fake score and discriminator for one of the student."""
    batch_size: int = 128
    student_widths: tuple[int, ...] = (0, 16)
    """Of the student's two hidden layers, one experiment each. 0 is a linear student, whose points are always
    normal: where it ends is decided by the divergence that it descends, and hardly by chance."""
    companion_width: int = 32
    """Of the three hidden layers of fake score and discriminator."""
    sigma_min: float = 0.2
    """Lowest noise level of the loss, at which the divergence is measured."""
    sigma_max: float = 8.0
    ema_decay: float = 0.995
    """Of the student that is measured."""
    num_points: int = 20_000
    """Of the student's, behind the measured density."""
    num_grid: int = 120
    seed: int = 0


def mixture_teacher() -> GaussianMixture:
    """Five narrow components of unequal weight on a circle."""
    angle = torch.arange(5, dtype=torch.float64) * (2 * math.pi / 5)
    means = 1.5 * torch.stack([angle.cos(), angle.sin()], dim=1)
    return GaussianMixture(means.float(), 0.3**2, torch.tensor([0.35, 0.1, 0.25, 0.1, 0.2]))


# ---- networks, V of each side by side


class Networks(nn.Module):
    """V multilayer perceptrons of one shape, [V, B, in] -> [V, B, out]."""

    def __init__(
        self, num: int, widths: Sequence[int], *, generator: torch.Generator, last_gain: float = 1.0
    ) -> None:
        super().__init__()
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for index, (fan_in, fan_out) in enumerate(zip(widths, widths[1:], strict=False)):
            gain = last_gain if index == len(widths) - 2 else math.sqrt(2)
            weight = torch.randn(num, fan_in, fan_out, generator=generator) * (gain / math.sqrt(fan_in))
            self.weights.append(nn.Parameter(weight))
            self.biases.append(nn.Parameter(torch.zeros(num, 1, fan_out)))

    def forward(self, x: Tensor) -> Tensor:
        for index, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            x = torch.baddbmm(bias, x if index == 0 else silu(x), weight)
        return x


class Student(Networks):
    """z [V, B, 2] -> points [V, B, 2]: at first a broad Gaussian, which covers the teacher."""

    def __init__(self, num: int, width: int, *, generator: torch.Generator) -> None:
        hidden = (width, width) if width else ()
        super().__init__(num, (DIM, *hidden, DIM), generator=generator, last_gain=0.05)

    def forward(self, z: Tensor) -> Tensor:
        return 1.2 * z + super().forward(z)


class Companions(nn.Module):
    """Fake score and discriminator, preconditioned as EDM's networks are, for data of unit scale."""

    def __init__(self, num: int, width: int, *, generator: torch.Generator) -> None:
        super().__init__()
        hidden = (DIM + 1, width, width, width)
        self.score = Networks(num, (*hidden, DIM), generator=generator, last_gain=0.1)
        self.critic = Networks(num, (*hidden, 1), generator=generator, last_gain=0.1)

    def denoise(self, x: Tensor, sigma: Tensor) -> Tensor:
        """x [V, B, 2], sigma [V, B] -> x0-prediction [V, B, 2]."""
        variance = sigma.square()[..., None] + 1
        c_out = sigma[..., None] / variance.sqrt()
        return x / variance + c_out * self.score(self._inputs(x, sigma))

    def logits(self, x: Tensor, sigma: Tensor) -> Tensor:
        """[V, B]: the estimate of log teacher/student density at x."""
        return self.critic(self._inputs(x, sigma))[..., 0]

    @staticmethod
    def _inputs(x: Tensor, sigma: Tensor) -> Tensor:
        sigma = sigma[..., None]
        return torch.cat([x / (sigma.square() + 1).sqrt(), sigma.log() / 2], dim=-1)


# ---- training


class ToyRun:
    """V students of one form and one learning rate, with their companions."""

    def __init__(
        self,
        settings: ToySettings,
        recipe: Recipe,
        *,
        width: int,
        learning_rate: float,
        device: torch.device,
    ) -> None:
        self.settings, self.recipe, self.device = settings, recipe, device
        self.teacher = mixture_teacher()
        self.num = settings.num_seeds + settings.num_tuning_seeds
        # Drawn on the CPU in the same order for every form: runs of one seed can be compared pair by pair.
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.student = Student(self.num, width, generator=self.generator).to(device)
        self.companions = Companions(self.num, settings.companion_width, generator=self.generator).to(device)
        self.average = [parameter.detach().clone() for parameter in self.student.parameters()]
        self.normalisers = [
            RatioNormaliser(sigma_min=settings.sigma_min, sigma_max=settings.sigma_max, horizon=2000)
            for _ in range(self.num if recipe.normalise_ratio else 0)
        ]
        for normaliser in self.normalisers:
            normaliser.to(device)
        self.student_optimiser = torch.optim.Adam(
            self.student.parameters(), lr=learning_rate, betas=(0.0, 0.99)
        )
        self.companion_optimiser = torch.optim.Adam(
            self.companions.parameters(), lr=settings.companion_learning_rate, betas=(0.5, 0.99)
        )

    def train(self) -> None:
        """All steps."""
        for _ in range(self.settings.num_warmup_steps):
            self.companion_step()
        for _ in range(self.settings.num_steps):
            for _ in range(self.settings.companion_steps):
                self.companion_step()
            self.student_step()

    def companion_step(self) -> None:
        """One update of fake score and discriminator on new points of teacher and student."""
        with torch.no_grad():
            fake = self.student(self._normal())
        real = self.teacher.sample(self.num * self.settings.batch_size, generator=self.generator)
        real = real.to(self.device).reshape(fake.shape)
        sigma = self._sigma()
        fake_t, real_t = (x + sigma[..., None] * self._normal() for x in (fake, real))
        score_loss = denoising_loss(
            _rows(self.companions.denoise(fake_t, sigma)), _rows(fake), sigma.flatten(),
            weighting="edm", sigma_data=1.0,
        )  # fmt: skip
        both = self.companions.logits(torch.cat([real_t, fake_t], dim=1), torch.cat([sigma, sigma], dim=1))
        real_logits, fake_logits = both.chunk(2, dim=1)
        critic_loss = discriminator_loss(real_logits.flatten(), fake_logits.flatten())
        # Means over the batch of each run: the runs must not slow each other down.
        loss = (score_loss + critic_loss).sum() / self.settings.batch_size
        self.companion_optimiser.zero_grad()
        loss.backward()
        self.companion_optimiser.step()

    def student_step(self) -> None:
        """One update of the student by its form of the loss, and of its average."""
        sigma = self._sigma()
        x0 = self.student(self._normal())
        x_t = x0 + sigma[..., None] * self._normal()
        span = math.log(self.settings.sigma_max / self.settings.sigma_min)
        levels = sigma.flatten()
        loss = recipes.generator_loss(
            self.recipe,
            x0=_rows(x0),
            sigma=levels,
            teacher_x0=lambda: self.teacher(_rows(x_t), levels),
            fake_x0=lambda: _rows(self.companions.denoise(x_t, sigma)),
            log_ratio=lambda: self._log_ratio(x_t, sigma),
            time_weight=expansion_weight(levels, 1 / (levels * span)),
        )
        parameters = list(self.student.parameters())
        gradients = torch.autograd.grad(loss.sum() / self.settings.batch_size, parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        self.student_optimiser.step()
        torch._foreach_lerp_(self.average, [p.detach() for p in parameters], 1 - self.settings.ema_decay)

    def _log_ratio(self, x_t: Tensor, sigma: Tensor) -> Tensor:
        """[V * B], divided by its running mean in each run where psi is unbounded."""
        log_ratio = log_ratio_from_logits(self.companions.logits(x_t, sigma).reshape(-1, 1))
        if not self.normalisers:
            return log_ratio
        rows = log_ratio.view(self.num, -1)
        return torch.cat(
            [norm(row, level) for norm, row, level in zip(self.normalisers, rows, sigma, strict=True)]
        )

    def _normal(self) -> Tensor:
        shape = (self.num, self.settings.batch_size, DIM)
        return torch.randn(shape, generator=self.generator).to(self.device)

    def _sigma(self) -> Tensor:
        """[V, B], log-uniform."""
        low, high = math.log(self.settings.sigma_min), math.log(self.settings.sigma_max)
        u = torch.rand(self.num, self.settings.batch_size, generator=self.generator)
        return (low + (high - low) * u).exp().to(self.device)

    @torch.no_grad()
    def points(self) -> Tensor:
        """[V, num_points, 2] of the averaged students, on the CPU."""
        parameters = list(self.student.parameters())
        kept = [parameter.detach().clone() for parameter in parameters]
        torch._foreach_copy_([parameter.data for parameter in parameters], self.average)
        generator = torch.Generator().manual_seed(self.settings.seed + 1)
        z = torch.randn(self.num, self.settings.num_points, DIM, generator=generator)
        made = self.student(z.to(self.device)).cpu()
        torch._foreach_copy_([parameter.data for parameter in parameters], kept)
        return made


def _rows(x: Tensor) -> Tensor:
    """[V, B, 2] -> [V * B, 2]."""
    return x.reshape(-1, DIM)


# ---- the true divergences


@dataclass(frozen=True)
class Divergences:
    """Between teacher q and student p, both diffused to the lowest noise level of the loss, in nats."""

    forward_kl: float
    """KL(q||p)."""
    reverse_kl: float
    """KL(p||q)."""
    js: float
    """KL(q||m) + KL(p||m), m their mean."""


def grid_axis(settings: ToySettings) -> Tensor:
    """float64 [G], wide enough for all but e^-20 of either density."""
    return torch.linspace(-5, 5, settings.num_grid, dtype=torch.float64)


def density_of_points(points: Tensor, axis: Tensor, sigma: float) -> Tensor:
    """float64 [G, G]: the density of `points` [N, 2] plus sigma times normal noise, on the grid.

    The mean of a Gaussian around each point, exactly: a product over the axes.
    """
    density = axis.new_zeros(len(axis), len(axis))
    for part in points.double().split(8192):
        first, second = (
            (-0.5 * ((axis[:, None] - part[None, :, dim]) / sigma).square()).exp() for dim in range(DIM)
        )
        density += first @ second.T
    return density / (len(points) * 2 * math.pi * sigma**2)


def teacher_density(axis: Tensor, sigma: float) -> Tensor:
    """float64 [G, G]."""
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)
    return mixture_teacher().log_prob(grid, sigma).exp()


def divergences_on_grid(q: Tensor, p: Tensor, axis: Tensor) -> Divergences:
    """Of two densities float64 [G, G] on the same grid."""
    cell = (axis[1] - axis[0]).item() ** 2
    tiny = 1e-300

    def kl(a: Tensor, b: Tensor) -> float:
        terms = a * (a.clamp(min=tiny).log() - b.clamp(min=tiny).log()) - a + b
        return terms.sum().item() * cell

    middle = (q + p) / 2
    return Divergences(kl(q, p), kl(p, q), kl(q, middle) + kl(p, middle))


def best_linear_kl(q: Tensor, axis: Tensor) -> float:
    """The lowest KL(q||p) of a normal p, as a linear student's is: that with q's mean and covariance."""
    grid = torch.stack(torch.meshgrid(axis, axis, indexing="ij"), dim=-1)
    share = (q / q.sum())[..., None]
    mean = (share * grid).sum(dim=(0, 1))
    offset = grid - mean
    covariance = torch.einsum("abi,abj->ij", share * offset, offset)
    p = GaussianMixture(mean[None], covariance[None]).log_prob(grid).exp()
    return divergences_on_grid(q, p, axis).forward_kl


# ---- the experiment


def run_toy(
    settings: ToySettings,
    *,
    device: torch.device | str = "cpu",
    report: Callable[[str], object] = lambda line: None,
) -> dict[str, Any]:
    """Train every form at every learning rate and measure; plain data for JSON. `report` is told each row."""
    started = time.monotonic()
    axis = grid_axis(settings)
    q = teacher_density(axis, settings.sigma_min)
    rows: list[dict[str, Any]] = []
    for width, variant, rate in itertools.product(
        settings.student_widths, settings.variants, settings.learning_rates
    ):
        recipe = toy_recipe(variant, settings.divergence)
        run = ToyRun(settings, recipe, width=width, learning_rate=rate, device=torch.device(device))
        run.train()
        found = [
            divergences_on_grid(q, density_of_points(points, axis, settings.sigma_min), axis)
            for points in run.points()
        ]
        rows.append(_row((width, variant, rate), found, settings))
        report(row_text(rows[-1]))
    generator = torch.Generator().manual_seed(settings.seed + 2)
    floor_points = mixture_teacher().sample(settings.num_points, generator=generator)
    floor = divergences_on_grid(q, density_of_points(floor_points, axis, settings.sigma_min), axis)
    return {
        "settings": asdict(settings),
        "rows": rows,
        "chosen": [
            chosen
            for width in settings.student_widths
            for chosen in choose_rates([row for row in rows if row["student_width"] == width])
        ],
        "best_linear_forward_kl": best_linear_kl(q, axis),
        "floor": asdict(floor),
        "seconds": round(time.monotonic() - started, 1),
        "device": str(device),
        "torch": torch.__version__,
    }


def toy_recipe(variant: str, divergence: str) -> Recipe:
    """A variant of Uni-Instruct by its score terms alone: no GAN term and no L1 normaliser, whose weight over
    time would be another objective."""
    return recipes.get(
        "uni_instruct",
        divergence,
        variant=variant,
        adversarial_weight=0.0,
        normalisation="none",
        normalise_adversarial=False,
        guidance_scale=1.0,
    )


def _row(case: tuple[int, str, float], found: Sequence[Divergences], settings: ToySettings) -> dict[str, Any]:
    reported = [asdict(each) for each in found[: settings.num_seeds]]
    tuning = [each.forward_kl for each in found[settings.num_seeds :]]
    row: dict[str, Any] = dict(zip(("student_width", "variant", "learning_rate"), case, strict=True))
    row["seeds"] = reported
    for name in ("forward_kl", "reverse_kl", "js"):
        values = [each[name] for each in reported]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        row[name] = {"mean": statistics.fmean(values), "std": spread}
    row["tuning_forward_kl"] = statistics.fmean(tuning) if tuning else row["forward_kl"]["mean"]
    return row


def choose_rates(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """For each form the learning rate that its tuning seeds liked best, and how far the first form (in the
    order of `rows`) is ahead of it, seed by seed."""
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        known = best.get(row["variant"])
        if known is None or row["tuning_forward_kl"] < known["tuning_forward_kl"]:
            best[row["variant"]] = row
    chosen = []
    first = next(iter(best.values()))
    for row in best.values():
        pairs = zip(row["seeds"], first["seeds"], strict=True)
        gaps = [own["forward_kl"] - other["forward_kl"] for own, other in pairs]
        error = statistics.stdev(gaps) / math.sqrt(len(gaps)) if len(gaps) > 1 else 0.0
        figures = {name: value for name, value in row.items() if name != "tuning_forward_kl"}
        gap = {"mean": statistics.fmean(gaps), "standard_error": error}
        chosen.append({**figures, "excess_over_first": gap})
    return chosen


HEADER = f"{'student':<9}{'form':<12}{'rate':>8}{'KL(q||p)':>20}{'KL(p||q)':>20}{'JS':>20}"


def row_text(row: dict[str, Any]) -> str:
    """One line under `HEADER`: mean and standard deviation over the seeds."""
    cells = [
        f"{row[name]['mean']:.4f} +- {row[name]['std']:.4f}" for name in ("forward_kl", "reverse_kl", "js")
    ]
    student = f"2x{row['student_width']}" if row["student_width"] else "linear"
    head = f"{student:<9}{row['variant']:<12}{row['learning_rate']:>8g}"
    return head + "".join(f"{cell:>20}" for cell in cells)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m uni3d.distillation.toy`."""
    defaults = ToySettings()
    parser = argument_parser("uni3d.distillation.toy", __doc__)
    parser.set_defaults(device="cpu")
    parser.add_argument("--steps", type=int, default=defaults.num_steps, help="steps of the student")
    parser.add_argument("--seeds", type=int, default=defaults.num_seeds, help="runs that are reported")
    parser.add_argument(
        "--widths",
        nargs="+",
        type=int,
        default=list(defaults.student_widths),
        help="of students; 0 is linear",
    )
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--rates", nargs="+", type=float, default=list(defaults.learning_rates))
    parser.add_argument("--seed", type=int, default=0, help="of all random numbers")
    chosen = parser.parse_args(arguments)
    settings = ToySettings(
        variants=tuple(chosen.variants),
        num_seeds=chosen.seeds,
        num_steps=chosen.steps,
        student_widths=tuple(chosen.widths),
        learning_rates=tuple(chosen.rates),
        seed=chosen.seed,
    )
    say(HEADER)
    result = run_toy(settings, device=chosen.device, report=say)
    say(f"\nat the learning rate that {settings.num_tuning_seeds} further seeds chose:\n{HEADER}")
    for row in result["chosen"]:
        gap = row["excess_over_first"]
        say(f"{row_text(row)}   {gap['mean']:+.4f} +- {gap['standard_error']:.4f} against the first")
    say(f"KL(q||p) of the best linear student: {result['best_linear_forward_kl']:.4f}")
    say(f"KL(q||p) of as many points of the teacher itself: {result['floor']['forward_kl']:.4f}")
    keep_figures(result, chosen.output)
    if chosen.output is not None:
        say(json.dumps({"output": str(chosen.output), "seconds": result["seconds"]}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
