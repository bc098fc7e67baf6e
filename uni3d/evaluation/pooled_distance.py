"""The Frechet distance of results to references over many prompts, with an interval over the prompts.

Within one prompt there are too few pictures for a covariance, so all prompts are pooled; the bootstrap
resamples prompts whole. Legend: N results, M references, E features.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import Tensor

from uni3d.evaluation.fidelity_metrics import FeatureMoments
from uni3d.evaluation.statistics import Rate, frechet_distance_of_gaussians


def pooled_frechet(
    made: Sequence[Tensor], references: Sequence[Tensor], *, num_resamples: int = 100, seed: int = 0
) -> Rate | None:
    """Squared Frechet distance of all `made` to all `references`, one [N, E] and one [M, E] for each prompt.

    The interval is that of 95 % of the resampled sets of prompts; since the distance grows when fewer
    pictures differ, it may lie above the mean. None if there are fewer than two pictures on either side.
    """
    pairs = [(_moments(a), _moments(b)) for a, b in zip(made, references, strict=True)]
    if min((sum(len(x) for x in side) for side in (made, references)), default=0) < 2:
        return None
    generator = np.random.default_rng(seed)
    picks = generator.integers(0, len(pairs), size=(num_resamples, len(pairs)))
    distances = [_distance([pairs[index] for index in row]) for row in picks]
    low, high = np.quantile(distances, [0.025, 0.975])
    return Rate(_distance(pairs), float(low), float(high), len(pairs))


def _moments(features: Tensor) -> FeatureMoments:
    moments = FeatureMoments(features.shape[1])
    moments.update(features)
    return moments


def _distance(pairs: Sequence[tuple[FeatureMoments, FeatureMoments]]) -> float:
    joined = FeatureMoments(len(pairs[0][0].mean)), FeatureMoments(len(pairs[0][0].mean))
    for pair in pairs:
        for total, moments in zip(joined, pair, strict=True):
            total.merge(moments)
    a, b = joined
    return frechet_distance_of_gaussians(a.mean, a.covariance(), b.mean, b.covariance())
