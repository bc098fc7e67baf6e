"""Losses of the discriminator, and the density ratio that its logits are.

Trained with the logistic loss on as many real (teacher) as fake (student) samples at the same noise level,
the optimal logit is l = log q_t/p_t = log r. Logit maps [B, ...] hold one logit per position; each is an
estimate of log r.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import logsigmoid, relu

from uni3d.losses import divergence as divergences
from uni3d.losses.divergence import Divergence
from uni3d.losses.names import canonical, unknown_name
from uni3d.losses.per_sample import at_least_float32, mean_per_sample, sum_per_sample

ADVERSARIAL_KINDS = ("non_saturating", "saturating", "linear")


def real_loss(logits: Tensor, *, kind: str = "logistic") -> Tensor:
    """What a discriminator pays for teacher samples, [B, ...] -> [B]: mean of -log D or of hinge."""
    logits = at_least_float32(logits)
    match canonical(kind):
        case "logistic":
            return mean_per_sample(-logsigmoid(logits))
        case "hinge":
            return mean_per_sample(relu(1 - logits))
        case _:
            raise unknown_name("discriminator loss", kind, ("logistic", "hinge"))


def fake_loss(logits: Tensor, *, kind: str = "logistic") -> Tensor:
    """What a discriminator pays for student samples: -log(1 - D), or hinge (1 + l)+; [B, ...] -> [B]."""
    return real_loss(-logits, kind=kind)


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor, *, kind: str = "logistic") -> Tensor:
    """(real_loss + fake_loss) / 2 per pair of samples: two [B, ...] of equal B -> [B].

    Only the logistic kind makes the logit a log ratio. For unequal batches average `real_loss` and
    `fake_loss` each.
    """
    if real_logits.shape[0] != fake_logits.shape[0]:
        raise ValueError(
            f"{real_logits.shape[0]} real and {fake_logits.shape[0]} fake samples: pass pairs, or average "
            "real_loss and fake_loss yourself"
        )
    return 0.5 * (real_loss(real_logits, kind=kind) + fake_loss(fake_logits, kind=kind))


def adversarial_loss(logits: Tensor, *, kind: str | Divergence = "non_saturating") -> Tensor:
    """What the student pays for the logits of its own samples, mean over positions: [B, ...] -> [B].

    `kind`: ``non_saturating`` is -log D, ``saturating`` log(1 - D), ``linear`` -l (hinge's generator loss);
    or any divergence, whose potential is taken. With an optimal logit these descend softened reverse KL,
    Jensen-Shannon, reverse KL and that divergence: each is `score_difference_loss` with weight 1/sigma^2, by
    another road.
    """
    if isinstance(kind, str):
        kind = {"non_saturating": "softened_reverse_kl", "saturating": "js", "linear": "reverse_kl"}.get(
            canonical(kind), kind
        )
    try:
        f = divergences.get(kind)
    except ValueError:
        raise unknown_name("adversarial loss", kind, (*ADVERSARIAL_KINDS, *divergences.names())) from None
    return mean_per_sample(f.potential(logits))


def log_ratio_from_logits(logits: Tensor, *, max_abs: float = 5.0) -> Tensor:
    """[B, ...] -> [B], float32 or better: the mean logit, clamped to +-max_abs (no gradient beyond).

    The clamp guards training against a young discriminator: r then stays within [e^-5, e^5] = [0.007, 148].
    """
    return mean_per_sample(at_least_float32(logits)).clamp(-max_abs, max_abs)


def gradient_penalty(logits: Tensor, inputs: Tensor) -> Tensor:
    """R1: |grad_inputs of each sample's mean logit|^2, [B]; differentiable in the discriminator's parameters.

    `inputs` [B, ...] must require gradients and have led to `logits` [B, ...] (Mescheder et al. 2018, on real
    samples).
    """
    (gradient,) = torch.autograd.grad(
        mean_per_sample(at_least_float32(logits)).sum(), inputs, create_graph=True
    )
    return sum_per_sample(at_least_float32(gradient).square())


class RatioNormaliser(nn.Module):
    """Divides r by its running mean over student samples, for each bin of noise levels, since E_p[r] = 1.

    A discriminator's logit is off by a constant per noise level long before its shape is right, and
    divergences whose psi grows without bound (forward KL, Jeffreys, chi^2, Hellinger) feel that constant as a
    factor of the whole loss. Bins are uniform in log sigma over [sigma_min, sigma_max]; what lies outside
    counts to the nearest bin. Each bin starts as if it had seen `prior_count` ratios of one and averages over
    about the last `horizon` samples. All state is in buffers, so that checkpoints hold it.
    """

    mean_ratio: Tensor
    count: Tensor

    def __init__(
        self,
        num_bins: int = 10,
        *,
        sigma_min: float = 0.02,
        sigma_max: float = 20.0,
        horizon: float = 200.0,
        prior_count: float = 8.0,
    ) -> None:
        super().__init__()
        if num_bins < 1 or not 0 < sigma_min < sigma_max or not 0 < prior_count <= horizon:
            raise ValueError(
                f"RatioNormaliser({num_bins=}, {sigma_min=}, {sigma_max=}, {horizon=}, {prior_count=}): "
                "expected num_bins >= 1, 0 < sigma_min < sigma_max and 0 < prior_count <= horizon"
            )
        self.num_bins, self.horizon = num_bins, horizon
        self._log_range = (math.log(sigma_min), math.log(sigma_max))
        self.register_buffer("mean_ratio", torch.ones(num_bins))
        self.register_buffer("count", torch.full((num_bins,), float(prior_count)))

    def bin_index(self, sigma: Tensor) -> Tensor:
        """[B] -> [B], int64: the bin of each noise level."""
        low, high = self._log_range
        fraction = (at_least_float32(sigma).log() - low) / (high - low)
        return (fraction * self.num_bins).floor().long().clamp(0, self.num_bins - 1)

    @torch.no_grad()
    def update(self, log_ratio: Tensor, sigma: Tensor) -> None:
        """Counts student samples: log_ratio [B] (clamped) at sigma [B]. Non-finite ones are left out."""
        ratio = at_least_float32(log_ratio).exp().to(self.mean_ratio)
        finite = ratio.isfinite()
        index = self.bin_index(sigma.to(self.mean_ratio.device))
        # Weights of zero rather than an index of what is finite: its length would have to be waited for.
        new = torch.zeros_like(self.count).index_add_(0, index, finite.to(ratio.dtype))
        kept = torch.where(finite, ratio, torch.zeros_like(ratio))
        total = torch.zeros_like(self.mean_ratio).index_add_(0, index, kept)
        # The old count is cut before the new ones are added, so that the memory is at most `horizon` samples.
        old = torch.minimum(self.count, (self.horizon - new).clamp(min=0))
        seen = new > 0
        mean = (old * self.mean_ratio + total) / (old + new).clamp(min=1e-12)
        self.mean_ratio.copy_(torch.where(seen, mean, self.mean_ratio))
        self.count.copy_(torch.where(seen, old + new, self.count))

    def forward(self, log_ratio: Tensor, sigma: Tensor) -> Tensor:
        """Student samples' log_ratio [B] at sigma [B] -> log(r / E_p[r]) [B]; gradients pass unchanged.

        In training mode the samples are counted first (`update`), in evaluation mode the means stay as they
        are.
        """
        log_ratio = at_least_float32(log_ratio)
        if self.training:
            self.update(log_ratio.detach(), sigma)
        offset = self.mean_ratio[self.bin_index(sigma.to(self.mean_ratio.device))].log()
        return log_ratio - offset.to(log_ratio)
