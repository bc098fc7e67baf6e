"""Numbers about samples: bootstrap intervals, paired comparisons, and the Frechet distance of two sets of
features."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy import stats
from torch import Tensor

from uni3d.errors import UsageError


@dataclass(frozen=True)
class Rate:
    """A mean with its 95 % bootstrap interval and the number of independent units behind it."""

    mean: float
    low: float
    high: float
    num: int

    def percent(self) -> str:
        """For tables: "87.5 % (84.1-90.3)"."""
        return f"{100 * self.mean:.1f} % ({100 * self.low:.1f}-{100 * self.high:.1f})"

    def as_dict(self) -> dict[str, float | int]:
        """For JSON."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "num": self.num}


def bootstrap_rate(
    values: Sequence[float] | np.ndarray, *, num_resamples: int = 1000, seed: int = 0
) -> Rate | None:
    """Mean of `values` [N], one per independent unit (caption, asset, mesh), with a 95 % percentile interval.

    Average what belongs to one unit (its seeds, its views) before, so that units are resampled whole.
    None for no values.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.size == 0:
        return None
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, array.size, size=(num_resamples, array.size))
    low, high = np.quantile(array[picks].mean(axis=1), [0.025, 0.975])
    return Rate(float(array.mean()), float(low), float(high), int(array.size))


def macro_rate(right: Tensor, groups: Sequence[str], num_resamples: int) -> dict[str, Any] | None:
    """Mean over groups of the mean of `right` [N] within each, all groups alike, for JSON; the bootstrap
    resamples groups."""
    names, values = np.asarray(groups), right.numpy()
    means = [float(values[names == name].mean()) for name in dict.fromkeys(groups)]
    rate = bootstrap_rate(means, num_resamples=num_resamples)
    return None if rate is None else rate.as_dict()


@dataclass(frozen=True)
class PairedDifference:
    """Mean of a - b over units that both were measured on, its 95 % bootstrap interval, and the p-value of
    Wilcoxon's signed-rank test of "no difference" (two-sided, 1 where all differences are zero)."""

    mean: float
    low: float
    high: float
    p_value: float
    num: int

    @property
    def excludes_zero(self) -> bool:
        """Whether the interval lies on one side of zero."""
        return self.low > 0 or self.high < 0


def paired_difference(
    a: Sequence[float] | np.ndarray,
    b: Sequence[float] | np.ndarray,
    *,
    num_resamples: int = 1000,
    seed: int = 0,
) -> PairedDifference | None:
    """Compare two methods on the same units (prompts): `a` and `b` [N], in the same order; None for no units.

    Units are resampled whole, so what makes some prompts harder than others cancels. Raises UsageError for
    lists of two lengths.
    """
    first, second = np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)
    if first.shape != second.shape:
        raise UsageError(
            f"got {first.size} and {second.size} values to compare in pairs; expected equal numbers"
        )
    difference = first - second
    rate = bootstrap_rate(difference, num_resamples=num_resamples, seed=seed)
    if rate is None:
        return None
    p_value = 1.0
    if np.any(difference != 0):
        # pyright cannot see that the result of scipy carries its p-value by name.
        p_value = float(stats.wilcoxon(difference).pvalue)  # pyright: ignore[reportAttributeAccessIssue]
    return PairedDifference(rate.mean, rate.low, rate.high, p_value, rate.num)


def frechet_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Squared Frechet (2-Wasserstein) distance of Gaussians fitted to two sets of features [N, F], [M, F].

    See `frechet_distance_of_gaussians`. The estimate is biased upwards for few samples: compare only figures
    with the same N and M.
    Raises UsageError for fewer than two samples, other shapes or non-finite features.
    """
    if features_a.dim() != 2 or features_b.dim() != 2 or features_a.shape[1] != features_b.shape[1]:
        raise UsageError(
            f"got features of shapes {tuple(features_a.shape)} and {tuple(features_b.shape)}; "
            f"expected [N, F] and [M, F]"
        )
    if min(len(features_a), len(features_b)) < 2:
        raise UsageError(
            f"got {len(features_a)} and {len(features_b)} samples; a Frechet distance needs 2 of each"
        )
    a, b = features_a.double(), features_b.double()
    if not (torch.isfinite(a).all() and torch.isfinite(b).all()):
        raise UsageError("features hold NaN or infinity; look at the images they were computed from")
    cov_a, cov_b = torch.atleast_2d(torch.cov(a.T)), torch.atleast_2d(torch.cov(b.T))
    return frechet_distance_of_gaussians(a.mean(0), cov_a, b.mean(0), cov_b)


def frechet_distance_of_gaussians(mean_a: Tensor, cov_a: Tensor, mean_b: Tensor, cov_b: Tensor) -> float:
    """Squared Frechet distance of two Gaussians with means [F] and covariances [F, F], in float64.

    |mean_a - mean_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)) (Dowson and Landau 1982). The trace of the root is
    the sum of the singular values of C_a^(1/2) C_b^(1/2), none of which is the root of a rounding error.
    """
    mean_a, cov_a, mean_b, cov_b = (value.double() for value in (mean_a, cov_a, mean_b, cov_b))
    trace_of_root = torch.linalg.svdvals(_symmetric_root(cov_a) @ _symmetric_root(cov_b)).sum()
    mean_term = (mean_a - mean_b).square().sum()
    distance = mean_term + torch.trace(cov_a) + torch.trace(cov_b) - 2 * trace_of_root
    return max(float(distance), 0.0)


def _symmetric_root(matrix: Tensor) -> Tensor:
    """The root of a covariance [F, F]; eigenvalues that cannot be told from rounding errors count as zero."""
    values, vectors = torch.linalg.eigh(matrix)
    smallest = values.abs().max() * len(values) * torch.finfo(values.dtype).eps
    return (vectors * values.where(values > smallest, 0).sqrt()) @ vectors.T
