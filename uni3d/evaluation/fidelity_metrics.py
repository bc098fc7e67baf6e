"""How alike two sets of images are, measured on their features: moments, KID, Inception Score, precision and
recall.

Everything is computed in float64, so that no setting of the matrix units changes a figure.
Legend: N generated, M real, F features, K classes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from uni3d.errors import UsageError

_ROWS = 1024
# Of the largest squared norm: rounding of a squared distance that is exactly zero.
_SLACK = 1e-12


class FeatureMoments:
    """Mean [F] and covariance [F, F] of a stream of features, in float64 on the device of the features.

    Batches are joined by the pairwise update of Chan, Golub and LeVeque (1983), so that a large common mean
    costs no digits, and the result does not depend on how the stream was cut beyond rounding.
    """

    def __init__(self, num_features: int, *, device: torch.device | str = "cpu") -> None:
        self.num_samples = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        self._scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Take features [B, F]; UsageError for another width or values that are not finite."""
        check_features(features, num_features=len(self.mean))
        if len(features) == 0:
            return
        values = features.to(self.mean.device, torch.float64)
        mean = values.mean(0)
        centred = values - mean
        self._join(len(values), mean, centred.T @ centred)

    def merge(self, other: FeatureMoments) -> None:
        """Take all that `other` has seen, for example on another rank."""
        if other.num_samples:
            device = self.mean.device
            self._join(other.num_samples, other.mean.to(device), other._scatter.to(device))

    def _join(self, num: int, mean: Tensor, scatter: Tensor) -> None:
        total = self.num_samples + num
        shift = mean - self.mean
        self._scatter += scatter + torch.outer(shift, shift) * (self.num_samples * num / total)
        self.mean += shift * (num / total)
        self.num_samples = total

    def covariance(self) -> Tensor:
        """Unbiased covariance [F, F] in float64; UsageError for fewer than two samples."""
        if self.num_samples < 2:
            raise UsageError(f"got {self.num_samples} images; a covariance needs at least 2")
        return self._scatter / (self.num_samples - 1)


def check_features(features: Tensor, *, num_features: int | None = None) -> None:
    """UsageError unless `features` is [N, F], of the width asked for, and finite."""
    if features.dim() != 2 or num_features not in (None, features.shape[1]):
        width = "F" if num_features is None else num_features
        raise UsageError(f"got features of shape {tuple(features.shape)}; expected [N, {width}]")
    if not torch.isfinite(features).all():
        raise UsageError("features hold NaN or infinity; look at the images they were computed from")


@dataclass(frozen=True)
class KernelDistance:
    """Mean over subsets of an unbiased estimate (it may be negative), and their standard deviation."""

    mean: float
    std: float
    num_subsets: int
    subset_size: int


def kernel_distance(
    features_a: Tensor,
    features_b: Tensor,
    *,
    num_subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
) -> KernelDistance:
    """Squared maximum mean discrepancy of features [N, F] and [M, F] under the kernel (x.y / F + 1)^3.

    The KID of Binkowski et al. (2018): the unbiased estimate of equal subsets, drawn without replacement from
    each set, averaged. With fewer samples than `subset_size` the subsets are as large as the smaller set.
    Raises UsageError for fewer than two samples or features of two widths.
    """
    check_features(features_a)
    check_features(features_b, num_features=features_a.shape[1])
    size = min(subset_size, len(features_a), len(features_b))
    if size < 2 or num_subsets < 1:
        raise UsageError(
            f"got {num_subsets} subsets of {size} images; a kernel distance needs 1 of 2 or more"
        )
    generator = torch.Generator().manual_seed(seed)
    distances = torch.empty(num_subsets, dtype=torch.float64)
    for index in range(num_subsets):
        a, b = (
            features[torch.randperm(len(features), generator=generator)[:size].to(features.device)].double()
            for features in (features_a, features_b)
        )
        distances[index] = _unbiased_mmd(a, b)
    std = float(distances.std(correction=0))
    return KernelDistance(float(distances.mean()), std, num_subsets, size)


def _unbiased_mmd(a: Tensor, b: Tensor) -> Tensor:
    """Unbiased squared MMD of two sets [m, F] of one size: equation (4) of Gretton et al. (2012)."""
    size, width = a.shape
    within = torch.zeros((), dtype=a.dtype, device=a.device)
    for x in (a, b):
        kernel = (x @ x.T / width + 1) ** 3
        within += (kernel.sum() - kernel.diagonal().sum()) / (size * (size - 1))
    return within - 2 * ((a @ b.T / width + 1) ** 3).mean()


@dataclass(frozen=True)
class InceptionScore:
    """Mean and standard deviation over the splits; 1 at least, the number of classes at most."""

    mean: float
    std: float
    num_splits: int


def inception_score(logits: Tensor, *, num_splits: int = 10) -> InceptionScore:
    """exp of the mean KL divergence of p(class | image) from its average (Salimans et al. 2016).

    `logits` [N, K] are cut into `num_splits` runs in their order, as equal as possible. Raises UsageError for
    fewer images than splits.
    """
    check_features(logits)
    if not 1 <= num_splits <= len(logits):
        raise UsageError(f"got {len(logits)} images for {num_splits} splits; expected one a split at least")
    scores = []
    for part in torch.tensor_split(logits.double(), num_splits):
        log_p = part.log_softmax(dim=1)
        p = log_p.exp()
        average = p.mean(0)
        # Classes that no image has add 0, not 0 log 0.
        entropy_gap = (p * log_p).sum(1).mean() - torch.special.xlogy(average, average).sum()
        scores.append(entropy_gap.exp())
    values = torch.stack(scores)
    return InceptionScore(float(values.mean()), float(values.std(correction=0)), num_splits)


@dataclass(frozen=True)
class PrecisionRecall:
    """Shares in [0, 1]: of generated images near real ones, and of real images near generated ones."""

    precision: float
    recall: float
    num_neighbours: int


def precision_recall(real: Tensor, generated: Tensor, *, num_neighbours: int = 3) -> PrecisionRecall:
    """Improved precision and recall (Kynkaanniemi et al. 2019) of features [M, F] and [N, F].

    A set covers the balls around its members that reach to their `num_neighbours`-th nearest neighbour in it.
    Precision is the share of `generated` that `real` covers, recall the other way round. Both depend on N and
    M: compare equal numbers. The ball of one real image may hold a whole cluster of images unlike any other,
    so a high precision means little beside a recall near 0. Distances are held 1024 rows at a time; the time
    grows as N^2 + M^2 + N M.

    Raises UsageError for sets of `num_neighbours` images or fewer.
    """
    check_features(real)
    check_features(generated, num_features=real.shape[1])
    if num_neighbours < 1 or min(len(real), len(generated)) <= num_neighbours:
        raise UsageError(
            f"got {len(real)} real and {len(generated)} generated images; precision and recall with "
            f"{num_neighbours} neighbours need more than {max(num_neighbours, 1)} of each"
        )
    # Distances are taken as |a|^2 + |b|^2 - 2 ab, which cancels least around the origin.
    centre = real.double().mean(0)
    real, generated = real.double() - centre, generated.to(real.device).double() - centre
    return PrecisionRecall(
        precision=_covered_share(real, generated, num_neighbours),
        recall=_covered_share(generated, real, num_neighbours),
        num_neighbours=num_neighbours,
    )


def _covered_share(members: Tensor, asked: Tensor, num_neighbours: int) -> float:
    """Share of `asked` that lie in the ball of a member."""
    radii = torch.cat(
        [
            _squared_distances(members[start : start + _ROWS], members)
            # A member is no neighbour of itself.
            .diagonal_scatter(torch.full((min(_ROWS, len(members) - start),), torch.inf).to(members), start)
            .kthvalue(num_neighbours, dim=1)
            .values
            for start in range(0, len(members), _ROWS)
        ]
    )
    slack = _SLACK * max(float(members.square().sum(1).max()), float(asked.square().sum(1).max()))
    num_covered = 0
    for start in range(0, len(asked), _ROWS):
        distances = _squared_distances(asked[start : start + _ROWS], members)
        num_covered += int((distances <= radii + slack).any(dim=1).sum())
    return num_covered / len(asked)


def _squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return torch.addmm(a.square().sum(1)[:, None] + b.square().sum(1), a, b.T, alpha=-2).clamp_min(0)
