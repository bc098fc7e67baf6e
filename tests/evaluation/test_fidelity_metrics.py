"""Fidelity figures against closed forms, slow twins and extreme cases."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from uni3d.errors import UsageError
from uni3d.evaluation.fidelity_metrics import (
    FeatureMoments,
    inception_score,
    kernel_distance,
    precision_recall,
)
from uni3d.evaluation.statistics import frechet_distance, frechet_distance_of_gaussians


def normal(num: int, width: int, seed: int = 0) -> Tensor:
    return torch.randn(num, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("cuts", [(500,), (1, 499), (100, 0, 399, 1), (7,) * 71 + (3,)])
def test_streaming_moments_equal_those_of_the_whole(cuts: tuple[int, ...]) -> None:
    # A mean a million times the deviation: sums of squares would lose 12 of 16 digits.
    features = normal(500, 6) @ normal(6, 6, 1) + 1e6
    moments = FeatureMoments(6)
    for part in features.split(list(cuts)):
        moments.update(part)
    assert moments.num_samples == 500
    torch.testing.assert_close(moments.mean, features.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(moments.covariance(), torch.cov(features.T), rtol=1e-9, atol=1e-9)


def test_moments_of_ranks_merge() -> None:
    features = normal(90, 4)
    whole, left, right = (FeatureMoments(4) for _ in range(3))
    whole.update(features)
    left.update(features[:20])
    right.update(features[20:])
    left.merge(right)
    left.merge(FeatureMoments(4))
    torch.testing.assert_close(left.covariance(), whole.covariance())
    assert left.num_samples == 90


def test_moments_refuse() -> None:
    moments = FeatureMoments(3)
    for wrong in (torch.zeros(3), torch.zeros(2, 4), torch.full((2, 3), torch.inf)):
        with pytest.raises(UsageError):
            moments.update(wrong)
    moments.update(torch.zeros(1, 3))
    with pytest.raises(UsageError, match="at least 2"):
        moments.covariance()


def test_frechet_distance_of_known_gaussians() -> None:
    # Diagonal: |m|^2 + sum (s_a - s_b)^2. One dimension is degenerate.
    mean_a, mean_b = torch.tensor([0.0, 1.0, 2.0]), torch.tensor([3.0, 1.0, -2.0])
    s_a, s_b = torch.tensor([1.0, 2.0, 0.0]), torch.tensor([4.0, 2.0, 0.5])
    value = frechet_distance_of_gaussians(mean_a, torch.diag(s_a**2), mean_b, torch.diag(s_b**2))
    assert value == pytest.approx(9 + 16 + 9 + 0.25, rel=1e-9)
    # A common rotation changes nothing.
    turn = torch.linalg.qr(normal(3, 3)).Q
    parts = (turn @ mean_a.double(), turn @ torch.diag(s_a.double() ** 2) @ turn.T)
    others = (turn @ mean_b.double(), turn @ torch.diag(s_b.double() ** 2) @ turn.T)
    assert frechet_distance_of_gaussians(*parts, *others) == pytest.approx(value, rel=1e-9)


def test_streaming_distance_is_that_of_the_features() -> None:
    a, b = normal(200, 5), 1.5 * normal(300, 5, 1) + 0.3
    left, right = FeatureMoments(5), FeatureMoments(5)
    for moments, features in ((left, a), (right, b)):
        for part in features.split(64):
            moments.update(part)
    value = frechet_distance_of_gaussians(left.mean, left.covariance(), right.mean, right.covariance())
    assert value == pytest.approx(frechet_distance(a, b), rel=1e-10)


def test_kernel_distance_is_unbiased_and_sees_a_shift() -> None:
    """Over 60 pairs of sets of one distribution the mean is 0 within 3 standard errors; it is often below."""
    values = [
        kernel_distance(
            normal(60, 4, 2 * i), normal(60, 4, 2 * i + 1), num_subsets=1, subset_size=60
        ).mean
        for i in range(60)
    ]  # fmt: skip
    tensor = torch.tensor(values)
    error = float(tensor.std()) / math.sqrt(len(values))
    assert abs(float(tensor.mean())) < 3 * error
    assert 15 < sum(value < 0 for value in values) < 45
    shifted = kernel_distance(normal(300, 4), normal(300, 4, 1) + 1, num_subsets=10, subset_size=100)
    assert shifted.mean > 10 * error and shifted.std > 0
    assert (shifted.num_subsets, shifted.subset_size) == (10, 100)


def test_kernel_distance_of_the_whole_equals_a_plain_double_sum() -> None:
    a, b = normal(7, 3), normal(7, 3, 1) + 0.5
    found = kernel_distance(a, b, num_subsets=1, subset_size=100)

    def kernel(x: Tensor, y: Tensor) -> float:
        return (float(x @ y) / 3 + 1) ** 3

    pairs = [(i, j) for i in range(7) for j in range(7)]
    within = sum(kernel(x[i], x[j]) for x in (a, b) for i, j in pairs if i != j) / (7 * 6)
    across = sum(kernel(a[i], b[j]) for i, j in pairs) / 49
    assert found.mean == pytest.approx(within - 2 * across, rel=1e-12)
    assert found.subset_size == 7 and found.std == 0


def test_kernel_distance_has_a_closed_form_in_one_dimension() -> None:
    """Of two points masses x, y: k(x, x) + k(y, y) - 2 k(x, y), whatever the subsets."""
    x, y = 0.5, -1.0
    a, b = torch.full((20, 1), x), torch.full((20, 1), y)
    expected = (x * x + 1) ** 3 + (y * y + 1) ** 3 - 2 * (x * y + 1) ** 3
    found = kernel_distance(a, b, num_subsets=3, subset_size=5)
    assert found.mean == pytest.approx(expected, rel=1e-12)
    assert found.std == pytest.approx(0, abs=1e-12)


def test_inception_score_between_its_limits() -> None:
    certain = torch.eye(10).repeat(20, 1) * 1e4
    assert inception_score(certain, num_splits=4).mean == pytest.approx(10)
    blind = torch.zeros(200, 10)
    assert inception_score(blind) == inception_score(blind + 5)
    assert inception_score(blind).mean == pytest.approx(1)
    one_class = torch.eye(10)[:1].repeat(50, 1) * 1e4
    assert inception_score(one_class).mean == pytest.approx(1)
    # Two kinds of images, p and 1 - p of two classes: exp(log 2 - H(p)).
    p = torch.tensor([[0.9, 0.1], [0.1, 0.9]]).log().repeat(50, 1)
    entropy = -(0.9 * math.log(0.9) + 0.1 * math.log(0.1))
    score = inception_score(p, num_splits=5)
    assert score.mean == pytest.approx(2 * math.exp(-entropy), rel=1e-6)
    assert score.std == pytest.approx(0, abs=1e-9)
    with pytest.raises(UsageError, match="3 images for 10 splits"):
        inception_score(torch.zeros(3, 5))


def test_precision_and_recall_at_their_limits() -> None:
    real = normal(80, 6)
    same = precision_recall(real, real)
    assert (same.precision, same.recall) == (1, 1)
    far = precision_recall(real, real + 100)
    assert (far.precision, far.recall) == (0, 0)
    # One good image over and over: precise, and covers next to nothing.
    collapsed = precision_recall(real, real[:1].repeat(50, 1) + 1e-9)
    assert collapsed.precision == 1 and collapsed.recall <= 1 / 80
    # Half of the images good, half of them far.
    mixed = precision_recall(real, torch.cat([real[:40], real[:40] + 1000]))
    assert mixed.precision == 0.5
    # Too wide: all real images lie among them, most of them not among the real ones.
    wide = precision_recall(normal(200, 8), 3 * normal(200, 8, 1))
    assert wide.recall > 0.9 and wide.precision < 0.1


def test_precision_and_recall_of_duplicates() -> None:
    twice = normal(20, 4).repeat_interleave(5, dim=0) + 1e4
    found = precision_recall(twice, twice[::2])
    assert (found.precision, found.recall) == (1, 1)


def test_precision_and_recall_equal_a_plain_twin_and_ignore_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    real, generated = normal(53, 3), 1.2 * normal(41, 3, 1) + 0.4
    found = precision_recall(real, generated, num_neighbours=3)

    def share(members: Tensor, asked: Tensor) -> float:
        radii = []
        for i, member in enumerate(members):
            others = [float((member - x).norm()) for j, x in enumerate(members) if j != i]
            radii.append(sorted(others)[2])
        covered = [
            any(float((x - member).norm()) <= radius for member, radius in zip(members, radii, strict=True))
            for x in asked
        ]
        return sum(covered) / len(covered)

    assert found.precision == share(real, generated) and found.recall == share(generated, real)
    assert 0 < found.precision < 1
    monkeypatch.setattr("uni3d.evaluation.fidelity_metrics._ROWS", 7)
    assert precision_recall(real, generated, num_neighbours=3) == found


@pytest.mark.parametrize("num", [1, 3])
def test_too_few_images_are_refused(num: int) -> None:
    with pytest.raises(UsageError, match="need more than 3"):
        precision_recall(normal(num, 2), normal(9, 2))
    with pytest.raises(UsageError, match="expected \\[N, 2\\]"):
        precision_recall(normal(9, 2), normal(9, 3))
    with pytest.raises(UsageError, match="kernel distance needs"):
        kernel_distance(normal(1, 2), normal(9, 2))
