"""Figures of generated images against real ones, with everything that is needed to compare them.

A distance is named after its feature network: `frechet_distance[efficientnet_lite0]`; only that of the
Inception-v3 which FID was defined with is called `fid`. Legend: N images, M real images, F features.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from uni3d.errors import UsageError
from uni3d.evaluation.fidelity_metrics import (
    FeatureMoments,
    check_features,
    inception_score,
    kernel_distance,
    precision_recall,
)
from uni3d.evaluation.fidelity_nets import INCEPTION, FeatureNet, network_output
from uni3d.evaluation.fidelity_reference import FeatureReference
from uni3d.evaluation.statistics import frechet_distance_of_gaussians
from uni3d.training.checkpoint import atomic_write_json

logger = logging.getLogger(__name__)

STANDARD_NUM_IMAGES = 50_000
_INCEPTION_NAMES = {"frechet_distance": "fid", "kernel_distance": "kid", "kernel_distance_std": "kid_std"}


def metric_name(metric: str, feature_net: str) -> str:
    """ "fid" for the Frechet distance by Inception-v3, "frechet_distance[NET]" by another network."""
    if feature_net == INCEPTION:
        return _INCEPTION_NAMES.get(metric, metric)
    return f"{metric}[{feature_net}]"


@dataclass(frozen=True)
class FidelitySettings:
    """What the figures depend on besides the images; reported with them."""

    num_subsets: int = 100
    """Subsets of the kernel distance."""
    subset_size: int = 1000
    """Images of each set in a subset; fewer where there are fewer."""
    subset_seed: int = 0
    """Which subsets."""
    num_neighbours: int = 3
    """Of precision and recall."""
    num_splits: int = 10
    """Of the Inception Score."""


@dataclass
class FeatureSet:
    """What a network said of N images: moments, and the features and logits if they were kept."""

    moments: FeatureMoments
    features: Tensor | None
    """float32 [N or fewer, F] on the CPU."""
    logits: Tensor | None
    """float32 [N, K] on the CPU."""

    def merge(self, other: FeatureSet) -> None:
        """Append what `other` (another rank) saw; UsageError if only one of them kept its features."""
        for name in ("features", "logits"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if (mine is None) != (theirs is None):
                raise UsageError(f"only one of two sets kept its {name}; measure both alike")
            if mine is not None:
                setattr(self, name, torch.cat([mine, theirs]))
        self.moments.merge(other.moments)


def measure_features(
    images: Iterable[np.ndarray | Tensor],
    net: FeatureNet,
    *,
    num_images: int | None = None,
    num_kept: int | None = None,
) -> FeatureSet:
    """Show batches uint8 [B, C, H, W] of images to `net`.

    Args:
        num_images: take exactly so many and stop; None takes all.
        num_kept: keep the features of the first so many, None of all. Logits are kept where there are any.

    Raises UsageError for no images, fewer than `num_images`, and images that `network_output` refuses.
    """
    moments = FeatureMoments(net.num_features, device=net.device)
    kept: list[Tensor] = []
    logits: list[Tensor] = []
    num_kept_yet = 0
    if num_images is None or num_images > 0:
        for batch in images:
            left = len(batch) if num_images is None else num_images - moments.num_samples
            output = network_output(net, batch[:left])
            check_features(output.features, num_features=net.num_features)
            moments.update(output.features)
            room = len(batch) if num_kept is None else max(0, num_kept - num_kept_yet)
            if room:
                kept.append(output.features[:room].float().cpu())
                num_kept_yet += len(kept[-1])
            if output.logits is not None:
                logits.append(output.logits.float().cpu())
            if moments.num_samples == num_images:
                break
    if moments.num_samples == 0 or moments.num_samples < (num_images or 0):
        expected = "at least one" if num_images is None else f"{num_images}"
        raise UsageError(f"got {moments.num_samples} images, expected {expected}; make or pass more")
    features = torch.cat(kept) if kept else None
    return FeatureSet(moments, features, torch.cat(logits) if logits else None)


def measure_reference(
    images: Iterable[np.ndarray | Tensor],
    net: FeatureNet,
    *,
    source: str,
    num_images: int | None = None,
    num_kept: int | None = 0,
) -> FeatureReference:
    """The reference of real images, batches uint8 [B, C, H, W]; `source` names the data set.

    `num_kept` features (None: all) are kept for KID, precision and recall. Raises as `measure_features`, and
    UsageError for fewer than two images.
    """
    found = measure_features(images, net, num_images=num_images, num_kept=num_kept)
    return FeatureReference(
        mean=found.moments.mean.cpu(),
        covariance=found.moments.covariance().cpu(),
        feature_net=net.name,
        checksum=net.checksum,
        num_images=found.moments.num_samples,
        source=source,
        features=found.features,
    )


@dataclass(frozen=True)
class FidelityResult:
    """Figures and all that makes them comparable; `as_dict` is what the JSON file holds."""

    metrics: dict[str, float]
    """By `metric_name`."""
    num_images: int
    feature_net: dict[str, Any]
    """Name, checksum, input size and value range."""
    reference: dict[str, Any]
    """Source, number of images, network and checksums."""
    settings: FidelitySettings
    seeds: tuple[int, int] | None = None
    """First and last seed of the images, one each; None where they were not sampled from seeds."""
    ema: str | None = None
    """Which average of the weights made the images, such as "half-life 500 kimg"; None for no average."""
    notes: tuple[str, ...] = ()
    """Why figures are missing, or cannot be compared with published ones."""

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        values = asdict(self)
        seeds = None if self.seeds is None else {"first": self.seeds[0], "last": self.seeds[1]}
        return {**values, "seeds": seeds, "notes": list(self.notes), "torch": torch.__version__}

    def write(self, path: str | Path) -> Path:
        """Write as JSON, atomically."""
        return atomic_write_json(path, self.as_dict())


def evaluate_images(
    images: Iterable[np.ndarray | Tensor],
    reference: FeatureReference,
    feature_net: FeatureNet,
    *,
    num_images: int | None = None,
    settings: FidelitySettings | None = None,
    seeds: tuple[int, int] | None = None,
    ema: str | None = None,
) -> FidelityResult:
    """Compare batches uint8 [B, C, H, W] of images with `reference`.

    The Frechet distance always; kernel distance, precision and recall if the reference kept features; the
    Inception Score if the network has logits. Raises UsageError for a reference of another network (before
    any image is read), fewer than `num_images` or two images, and images that `network_output` refuses.
    """
    reference.check_fits(feature_net)
    num_kept = 0 if reference.features is None else None
    found = measure_features(images, feature_net, num_images=num_images, num_kept=num_kept)
    return score_features(found, reference, feature_net, settings=settings, seeds=seeds, ema=ema)


def score_features(
    found: FeatureSet,
    reference: FeatureReference,
    feature_net: FeatureNet,
    *,
    settings: FidelitySettings | None = None,
    seeds: tuple[int, int] | None = None,
    ema: str | None = None,
) -> FidelityResult:
    """As `evaluate_images`, of features that were measured before, for example merged from several ranks."""
    reference.check_fits(feature_net)
    settings = settings or FidelitySettings()
    num_images = found.moments.num_samples
    if seeds is not None and seeds[1] - seeds[0] + 1 != num_images:
        raise UsageError(
            f"seeds {seeds[0]} to {seeds[1]} made {seeds[1] - seeds[0] + 1} images, and {num_images} were "
            f"measured; pass the seeds of these images"
        )
    figures: dict[str, float] = {
        "frechet_distance": frechet_distance_of_gaussians(
            found.moments.mean.cpu(), found.moments.covariance().cpu(), reference.mean, reference.covariance
        )
    }
    if reference.features is not None and found.features is not None:
        figures |= _figures_of_features(found.features, reference.features, feature_net.device, settings)
    if found.logits is not None and len(found.logits) >= settings.num_splits:
        score = inception_score(found.logits, num_splits=settings.num_splits)
        figures |= {"inception_score": score.mean, "inception_score_std": score.std}
    notes = _notes(found, reference, feature_net, settings)
    for note in notes:
        logger.warning("%s", note)
    return FidelityResult(
        metrics={metric_name(metric, feature_net.name): value for metric, value in figures.items()},
        num_images=num_images,
        feature_net={
            "name": feature_net.name,
            "checksum": feature_net.checksum,
            "input_size": feature_net.input_size,
            "value_range": list(feature_net.value_range),
        },
        reference=reference.record(),
        settings=settings,
        seeds=seeds,
        ema=ema,
        notes=notes,
    )


def _figures_of_features(
    generated: Tensor, real: Tensor, device: torch.device, settings: FidelitySettings
) -> dict[str, float]:
    generated, real = generated.to(device), real.to(device)
    figures: dict[str, float] = {}
    if min(len(generated), len(real)) >= 2:
        kernel = kernel_distance(
            generated,
            real,
            num_subsets=settings.num_subsets,
            subset_size=settings.subset_size,
            seed=settings.subset_seed,
        )
        figures |= {"kernel_distance": kernel.mean, "kernel_distance_std": kernel.std}
    if min(len(generated), len(real)) > settings.num_neighbours:
        shares = precision_recall(real, generated, num_neighbours=settings.num_neighbours)
        figures |= {"precision": shares.precision, "recall": shares.recall}
    return figures


def _notes(
    found: FeatureSet, reference: FeatureReference, net: FeatureNet, settings: FidelitySettings
) -> tuple[str, ...]:
    notes = []
    num_images = found.moments.num_samples
    distance = metric_name("frechet_distance", net.name)
    counts = [num for num in (num_images, reference.num_images) if num is not None]
    if min(counts) <= net.num_features:
        notes.append(
            f"{min(counts)} images are no more than the {net.num_features} features: {distance} is far too "
            f"large, compare it only with figures of equally many"
        )
    elif num_images != STANDARD_NUM_IMAGES:
        notes.append(
            f"{distance} is of {num_images} images; published figures are of {STANDARD_NUM_IMAGES}, and "
            f"fewer make it larger"
        )
    if reference.features is None:
        notes.append(f"the reference of '{reference.source}' kept no features for KID, precision and recall")
    elif min(num_images, len(reference.features)) < settings.subset_size:
        size = min(num_images, len(reference.features))
        notes.append(f"the subsets of the kernel distance hold {size} images, not {settings.subset_size}")
    if reference.checksum is None:
        notes.append(f"the reference of '{reference.source}' does not say which weights measured it")
    if found.logits is not None and len(found.logits) < settings.num_splits:
        notes.append(f"an Inception Score of {settings.num_splits} splits needs as many images")
    return tuple(notes)
