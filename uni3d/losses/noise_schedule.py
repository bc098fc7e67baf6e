"""Noise levels: how every process becomes x = x0 + sigma * eps, which levels to draw, what they weigh.

One process is used throughout, the variance-exploding form x = x0 + sigma * eps ("ve", as in EDM). Any
process x_t = alpha * x0 + s * eps is a rescaling of it: x = x_t / alpha, sigma = s / alpha. For a
variance-preserving network ("vp": alpha^2 + s^2 = 1, alpha^2 = abar) sigma = sqrt((1 - abar) / abar) and
x_vp = x / sqrt(1 + sigma^2); for a rectified flow ("flow": alpha = 1 - t, s = t) sigma = t / (1 - t) and
x_flow = x / (1 + sigma).

Time weights are in x0 units: they multiply Delta = D_q - D_p (difference of x0-predictions) or its square.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from uni3d.losses.names import canonical, unknown_name
from uni3d.losses.per_sample import at_least_float32, over_elements, per_sample

Form = Literal["ve", "vp"]


class SigmaTable:
    """The noise levels sigma that a network knows, one for each of N timesteps, rising.

    Between two timesteps log sigma is interpolated linearly. Immutable; the table follows the device of each
    argument. Raises ValueError unless there are at least two levels, positive, finite and rising.
    """

    def __init__(self, log_sigmas: Tensor) -> None:
        table = log_sigmas.detach().to("cpu", torch.float64)
        if table.ndim != 1 or table.numel() < 2:
            raise ValueError(f"log_sigmas has shape {tuple(table.shape)}: expected [N] with N of at least 2")
        if not (bool(table.isfinite().all()) and bool((table.diff() > 0).all())):
            raise ValueError("log_sigmas must be finite and rise at every step")
        self._log_sigmas = table
        self._tables: dict[tuple[torch.device, torch.dtype], Tensor] = {}

    @property
    def num_timesteps(self) -> int:
        return self._log_sigmas.numel()

    @property
    def sigma_min(self) -> float:
        return math.exp(self._log_sigmas[0].item())

    @property
    def sigma_max(self) -> float:
        return math.exp(self._log_sigmas[-1].item())

    def sigma(self, timestep: Tensor | float) -> Tensor:
        """sigma at `timestep` (any shape, integer or float, clamped to [0, N - 1]); float32, or float64 for
        float64."""
        t = at_least_float32(torch.as_tensor(timestep))
        table = self._table(t)
        t = t.clamp(0, self.num_timesteps - 1)
        below = t.floor().clamp(max=self.num_timesteps - 2)
        index = below.long()
        return torch.lerp(table[index], table[index + 1], t - below).exp()

    def timestep(self, sigma: Tensor | float) -> Tensor:
        """The inverse of `sigma`: a float timestep in [0, N - 1] for any sigma > 0 (clamped to the table's
        range)."""
        log_sigma = at_least_float32(torch.as_tensor(sigma)).log()
        table = self._table(log_sigma)
        log_sigma = log_sigma.clamp(table[0], table[-1])
        above = torch.searchsorted(table, log_sigma.detach().contiguous(), right=True).clamp(
            1, self.num_timesteps - 1
        )
        low, high = table[above - 1], table[above]
        return (above - 1) + (log_sigma - low) / (high - low)

    def density(self, sigma: Tensor | float, low: float = 0.0, high: float = 1.0) -> Tensor:
        """pi(sigma), the density of sigma(t) for t uniform on [low, high] * (N - 1); zero outside.

        The exact loss needs it: samples drawn so are divided by pi (see `expansion_weight`).
        """
        sigma = at_least_float32(torch.as_tensor(sigma))
        table = self._table(sigma)
        t = self.timestep(sigma)
        index = t.floor().clamp(max=self.num_timesteps - 2).long()
        slope = sigma * (table[index + 1] - table[index])  # d sigma / d t
        span = (high - low) * (self.num_timesteps - 1)
        first, last = self.sigma(
            torch.tensor([low, high], dtype=torch.float64) * (self.num_timesteps - 1)
        ).tolist()
        inside = (sigma >= first) & (sigma <= last)
        return torch.where(inside, 1 / (slope * span), torch.zeros_like(sigma))

    def _table(self, like: Tensor) -> Tensor:
        # Kept per device: a copy to the accelerator in every step would wait for it.
        key = (like.device, like.dtype)
        if key not in self._tables:
            self._tables[key] = self._log_sigmas.to(like.device, like.dtype)
        return self._tables[key]


class DiscreteVPSchedule(SigmaTable):
    """The noise levels of a network trained on `alphas_cumprod`: N values inside (0, 1), strictly falling.

    Raises ValueError for a table that is not as above. (A table that ends at zero, "zero terminal SNR", has
    no finite last sigma: leave its last entry out.)
    """

    def __init__(self, alphas_cumprod: Tensor | Sequence[float]) -> None:
        abar = torch.as_tensor(alphas_cumprod, dtype=torch.float64).detach().cpu()
        if abar.ndim != 1 or abar.numel() < 2:
            raise ValueError(
                f"alphas_cumprod has shape {tuple(abar.shape)}: expected [N] with N of at least 2"
            )
        if not (bool((abar > 0).all()) and bool((abar < 1).all()) and bool((abar.diff() < 0).all())):
            raise ValueError(
                f"alphas_cumprod runs from {abar[0].item():g} to {abar[-1].item():g}: expected values "
                "strictly between 0 and 1 that fall at every step (leave out a last entry of zero)"
            )
        super().__init__(0.5 * (torch.log1p(-abar) - abar.log()))

    @classmethod
    def scaled_linear(
        cls, num_timesteps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012
    ) -> DiscreteVPSchedule:
        """Stable Diffusion's schedule: sqrt(beta) runs linearly from sqrt(beta_start) to sqrt(beta_end)."""
        betas = torch.linspace(beta_start**0.5, beta_end**0.5, num_timesteps, dtype=torch.float64).square()
        return cls((1 - betas).cumprod(dim=0))


class FlowSchedule(SigmaTable):
    """The noise levels of a rectified flow x_t = (1 - t) x0 + t eps, as sigma = t / (1 - t).

    The flow's times are k / num_train_timesteps, moved by `shift` s to s t / (1 + (s - 1) t) (Esser et al.
    2024, section 5.3.2). The last, t = 1, is pure noise and has no finite sigma: it is left out, so N is
    num_train_timesteps - 1.
    """

    def __init__(self, num_train_timesteps: int = 1000, *, shift: float = 1.0) -> None:
        if num_train_timesteps < 3 or not shift > 0:
            raise ValueError(
                f"FlowSchedule({num_train_timesteps}, {shift=}): expected 3 steps or more, shift > 0"
            )
        t = torch.arange(1, num_train_timesteps, dtype=torch.float64) / num_train_timesteps
        # t / (1 - t) of the shifted time is shift * t / (1 - t): the shift moves log sigma by a constant.
        super().__init__(math.log(shift) + t.log() - torch.log1p(-t))


def flow_time(sigma: Tensor | float) -> Tensor:
    """The t in (0, 1) of x_t = (1 - t) x0 + t eps at noise level `sigma` (any shape): sigma / (1 + sigma)."""
    sigma = at_least_float32(torch.as_tensor(sigma))
    return sigma / (1 + sigma)


# ---- between processes and parameterisations. x, x0, eps, v: [B, ...]; sigma: float or [B]; result in
# float32 or better


def vp_from_ve(x: Tensor, sigma: Tensor | float) -> Tensor:
    """x0 + sigma eps -> alpha x0 + s eps with alpha^2 + s^2 = 1: divides by sqrt(1 + sigma^2)."""
    x, sigma = _with_sigma(x, sigma)
    return x / (1 + sigma.square()).sqrt()


def ve_from_vp(x_vp: Tensor, sigma: Tensor | float) -> Tensor:
    """The inverse of `vp_from_ve`."""
    x_vp, sigma = _with_sigma(x_vp, sigma)
    return x_vp * (1 + sigma.square()).sqrt()


def ve_from_scaled(x_t: Tensor, alpha: Tensor | float, noise_std: Tensor | float) -> tuple[Tensor, Tensor]:
    """x_t = alpha x0 + noise_std eps -> (x, sigma [B]) in ve form: for flow matching and others."""
    wide = at_least_float32(x_t)
    alpha = per_sample(alpha, x_t, "alpha")
    return wide / over_elements(alpha, wide), per_sample(noise_std, x_t, "noise_std") / alpha


def x0_from_eps(x: Tensor, eps: Tensor, sigma: Tensor | float, form: Form = "ve") -> Tensor:
    """The clean sample that `eps` implies: x0 = x - sigma eps, with x in `form`."""
    x, sigma = _ve(x, sigma, form)
    return x - sigma * eps


def eps_from_x0(x: Tensor, x0: Tensor, sigma: Tensor | float, form: Form = "ve") -> Tensor:
    """The inverse of `x0_from_eps`; sigma > 0."""
    x, sigma = _ve(x, sigma, form)
    return (x - x0) / sigma


def x0_from_v(x: Tensor, v: Tensor, sigma: Tensor | float, form: Form = "ve") -> Tensor:
    """The clean sample that v = alpha eps - s x0 implies, with alpha^2 + s^2 = 1: x0 = alpha x_vp - s v."""
    x, sigma = _ve(x, sigma, form)
    alpha = (1 + sigma.square()).rsqrt()
    return alpha.square() * x - sigma * alpha * v


def v_from_x0(x: Tensor, x0: Tensor, sigma: Tensor | float, form: Form = "ve") -> Tensor:
    """The inverse of `x0_from_v`; sigma > 0."""
    x, sigma = _ve(x, sigma, form)
    alpha = (1 + sigma.square()).rsqrt()
    return (alpha.square() * x - x0) / (sigma * alpha)


def flow_from_ve(x: Tensor, sigma: Tensor | float) -> Tensor:
    """x0 + sigma eps -> (1 - t) x0 + t eps with t = sigma / (1 + sigma): divides by 1 + sigma."""
    x, sigma = _with_sigma(x, sigma)
    return x / (1 + sigma)


def x0_from_velocity(x: Tensor, velocity: Tensor, sigma: Tensor | float, form: Form = "ve") -> Tensor:
    """The clean sample that a rectified flow's velocity eps - x0 implies: x0 = x_t - t velocity."""
    x, sigma = _ve(x, sigma, form)
    return (x - sigma * velocity) / (1 + sigma)


def velocity_from_x0(x: Tensor, x0: Tensor, sigma: Tensor | float, form: Form = "ve") -> Tensor:
    """The inverse of `x0_from_velocity`; sigma > 0."""
    x, sigma = _ve(x, sigma, form)
    return (x - x0) / sigma - x0


_PREDICTIONS = {
    "epsilon": "eps",
    "eps": "eps",
    "v_prediction": "v",
    "v": "v",
    "sample": "x0",
    "x0": "x0",
    "velocity": "velocity",
    "flow_prediction": "velocity",
}


def x0_from_prediction(
    prediction: Tensor, x: Tensor, sigma: Tensor | float, kind: str, form: Form = "ve"
) -> Tensor:
    """A network's output -> x0-prediction. `kind`: eps, v, x0 or velocity, or what diffusers calls them
    (epsilon, v_prediction, sample, flow_prediction)."""
    match _prediction_kind(kind):
        case "eps":
            return x0_from_eps(x, prediction, sigma, form)
        case "v":
            return x0_from_v(x, prediction, sigma, form)
        case "velocity":
            return x0_from_velocity(x, prediction, sigma, form)
        case _:
            return at_least_float32(prediction)


def prediction_from_x0(x0: Tensor, x: Tensor, sigma: Tensor | float, kind: str, form: Form = "ve") -> Tensor:
    """The inverse of `x0_from_prediction`: the output that a network of this `kind` is trained towards."""
    match _prediction_kind(kind):
        case "eps":
            return eps_from_x0(x, x0, sigma, form)
        case "v":
            return v_from_x0(x, x0, sigma, form)
        case "velocity":
            return velocity_from_x0(x, x0, sigma, form)
        case _:
            return at_least_float32(x0)


def _prediction_kind(kind: str) -> str:
    found = _PREDICTIONS.get(canonical(kind))
    if found is None:
        raise unknown_name("prediction type", kind, _PREDICTIONS)
    return found


def _with_sigma(x: Tensor, sigma: Tensor | float) -> tuple[Tensor, Tensor]:
    wide = at_least_float32(x)
    return wide, over_elements(per_sample(sigma, wide, "sigma"), wide)


def _ve(x: Tensor, sigma: Tensor | float, form: Form) -> tuple[Tensor, Tensor]:
    if form not in ("ve", "vp"):
        raise unknown_name("form of x", form, ("ve", "vp"))
    wide, sigma = _with_sigma(x, sigma)
    return (wide if form == "ve" else wide * (1 + sigma.square()).sqrt()), sigma


# ---- time weights

_WEIGHTS: dict[str, Callable[[Tensor, float], Tensor]] = {
    # Weights of Delta (score-difference losses).
    "uniform": lambda sigma, _: torch.ones_like(sigma),
    "vsd": lambda sigma, _: sigma / (1 + sigma.square()),
    "eps": lambda sigma, _: 1 / sigma,
    "sds_sqrt": lambda sigma, _: sigma * (1 + sigma.square()).pow(-1.5),
    "integral": lambda sigma, _: sigma.pow(-2),
    # Weights of |Delta|^2 (Uni-Instruct, SiD, SIM, denoising score matching).
    "edm": lambda sigma, sigma_data: (sigma.square() + sigma_data**2) / (sigma * sigma_data).square(),
    "expansion": lambda sigma, _: sigma.pow(-3),
    "sim": lambda sigma, _: 1 / (1 + sigma.square()),
    "vsd_expansion": lambda sigma, _: _sigma_minus_arctan(sigma) / sigma.square(),
}


def time_weight(name: str, sigma: Tensor | float, *, sigma_data: float = 0.5) -> Tensor:
    """The weight called `name` at `sigma` > 0 (any shape): float32 or better, no gradient.

    For losses linear in Delta (`generator.score_difference_loss`):

    - ``uniform``: 1. With the L1 normaliser it is DMD's weight; alone it is RED-diff's SNR^(-1/2) on eps.
    - ``vsd``: sigma / (1 + sigma^2), the latent gradient (1 - abar)(eps_q - eps_p) of ProlificDreamer;
      DreamFusion's too.
    - ``eps``: 1 / sigma, the difference of eps-predictions unweighted.
    - ``sds_sqrt``: sigma (1 + sigma^2)^(-3/2), that is sqrt(abar)(1 - abar) on eps (Fantasia3D).
    - ``integral``: 1 / sigma^2, which makes the gradient exactly that of D_f(q_t||p_t).

    For losses quadratic in Delta (`generator.uni_instruct_loss`):

    - ``expansion``: 1 / sigma^3, the expansion of D_f(q_0||p_0) for sigma drawn uniformly (see
      `expansion_weight`).
    - ``sim``: 1 / (1 + sigma^2), that is (1 - abar) on |eps_q - eps_p|^2.
    - ``vsd_expansion``: (sigma - arctan sigma) / sigma^2, which for log sigma drawn uniformly has the same
      objective as ``vsd`` has for the linear loss, but for the boundary term at the largest sigma: lambda' =
      sigma^2 / (1 + sigma^2).
    - ``edm``: (sigma^2 + sigma_data^2) / (sigma sigma_data)^2, the loss weight of EDM (also `fake_score`).

    Raises ValueError for an unknown name. DMD's 1 / L1 depends on the sample: `generator.l1_normaliser`.
    """
    function = _WEIGHTS.get(canonical(name))
    if function is None:
        raise unknown_name("time weight", name, _WEIGHTS)
    sigma = at_least_float32(torch.as_tensor(sigma)).detach()
    return function(sigma, sigma_data)


def time_weight_names() -> list[str]:
    """The names that `time_weight` knows."""
    return list(_WEIGHTS)


def expansion_weight(sigma: Tensor, sampling_density: Tensor | float, lam: Tensor | float = 1.0) -> Tensor:
    """lam / (pi(sigma) sigma^3): with this time weight `uni_instruct_loss` estimates the weighted expansion.

    Its expectation over sigma ~ pi on [a, b] then has the gradient of the integral of lam(sigma) sigma E[psi
    |u|^2], which is lam(a) D_f(a) - lam(b) D_f(b) + integral of lam'(sigma) D_f(q_sigma||p_sigma); lam = 1
    gives D_f(a) - D_f(b).
    """
    sigma = at_least_float32(sigma)
    return torch.as_tensor(lam).to(sigma) / (sampling_density * sigma.pow(3))


def _sigma_minus_arctan(sigma: Tensor) -> Tensor:
    # The difference cancels for small sigma, where five terms of the series are exact to 1e-11.
    square = sigma.square()
    series = sigma * square * (1 / 3 - square * (1 / 5 - square * (1 / 7 - square * (1 / 9 - square / 11))))
    return torch.where(sigma < 0.1, series, sigma - sigma.arctan())


# ---- which noise levels to draw


def sample_lognormal_sigma(
    num: int,
    *,
    mean: float = -1.2,
    std: float = 1.2,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[num] levels with log sigma ~ N(mean, std^2): EDM's training distribution (Karras et al. 2022)."""
    normal = torch.randn(num, generator=generator, device=device, dtype=dtype)
    return (mean + std * normal).exp()


def rho_sigma(u: Tensor, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """EDM's spacing: sigma^(1/rho) is linear in u, sigma_max at u = 0 and sigma_min at u = 1."""
    first, last = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    return (first + at_least_float32(u) * (last - first)).pow(rho)


def karras_sigmas(num: int, *, sigma_min: float = 0.002, sigma_max: float = 80.0, rho: float = 7.0) -> Tensor:
    """[num] falling levels from sigma_max to sigma_min, for a sampler; float32."""
    return rho_sigma(torch.linspace(0, 1, num), sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


def sample_rho_sigma(
    num: int,
    *,
    sigma_min: float = 0.002,
    sigma_max: float = 80.0,
    rho: float = 7.0,
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """[num] random levels with EDM's spacing: `rho_sigma` of a uniform number, as in SiD."""
    u = torch.rand(num, generator=generator, device=device, dtype=dtype)
    return rho_sigma(u, sigma_min=sigma_min, sigma_max=sigma_max, rho=rho)


@dataclass(frozen=True)
class TimestepWindow:
    """The range of timesteps to draw from, as fractions of the schedule, and how it changes during training.

    Until the fraction `anneal_start` of training the window is [minimum, maximum], from `anneal_end` on it is
    [final_minimum, final_maximum] (None: as at first), between them it moves linearly. Equal start and end:
    one step. ProlificDreamer's window is
    `TimestepWindow(0.02, 0.98, final_maximum=0.5, anneal_start=0.2, anneal_end=0.2)`.
    Raises ValueError unless 0 <= minimum < maximum <= 1 at both ends and 0 <= anneal_start <= anneal_end.
    """

    minimum: float = 0.02
    maximum: float = 0.98
    final_minimum: float | None = None
    final_maximum: float | None = None
    anneal_start: float = 0.0
    anneal_end: float = 1.0

    def __post_init__(self) -> None:
        for low, high in (self.at(-math.inf), self.at(math.inf)):
            if not 0 <= low < high <= 1:
                raise ValueError(
                    f"timestep window [{low}, {high}]: expected fractions, 0 <= minimum < maximum <= 1"
                )
        if not 0 <= self.anneal_start <= self.anneal_end:
            raise ValueError(
                f"annealing from {self.anneal_start} to {self.anneal_end}: expected 0 <= start <= end"
            )

    def at(self, progress: float) -> tuple[float, float]:
        """(low, high) in [0, 1] at `progress`, the fraction of training that is done."""
        if progress < self.anneal_start:
            moved = 0.0
        elif progress >= self.anneal_end:
            moved = 1.0
        else:
            moved = (progress - self.anneal_start) / (self.anneal_end - self.anneal_start)
        low = (
            self.minimum
            if self.final_minimum is None
            else self.minimum + moved * (self.final_minimum - self.minimum)
        )
        high = (
            self.maximum
            if self.final_maximum is None
            else self.maximum + moved * (self.final_maximum - self.maximum)
        )
        return low, high

    def sample(
        self,
        num: int,
        progress: float = 0.0,
        *,
        num_timesteps: int = 1000,
        stratified: bool = False,
        generator: torch.Generator | None = None,
        device: torch.device | str | None = None,
    ) -> Tensor:
        """[num] float32 timesteps, uniform on the window at `progress` times (num_timesteps - 1).

        `stratified` draws one from each of `num` equal parts of the window, in rising order: same mean, less
        variance.
        """
        low, high = self.at(progress)
        u = torch.rand(num, generator=generator, device=device)
        if stratified:
            u = (u + torch.arange(num, device=device)) / num
        return (low + (high - low) * u) * (num_timesteps - 1)
