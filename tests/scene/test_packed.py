"""Packed ray sums against loops over rays."""

from __future__ import annotations

import torch
from torch import Tensor

from uni3d.scene.packed import Segments, compositing_weights, exclusive_sum, weighted_ray_sum

COUNTS = [3, 0, 1, 5, 0]


def _segments() -> Segments:
    return Segments.from_ray_index(torch.repeat_interleave(torch.arange(5), torch.tensor(COUNTS)), 5)


def _values(*shape: int) -> Tensor:
    return torch.rand(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(4))


def test_segments_know_empty_rays() -> None:
    segments = _segments()
    assert segments.num_rays == 5
    assert (segments.end - segments.start).tolist() == COUNTS


def test_exclusive_sum_is_a_loop() -> None:
    values = _values(9)
    expected = torch.cat([ray.cumsum(0) - ray for ray in values.split(COUNTS)])
    torch.testing.assert_close(exclusive_sum(values, _segments()), expected)


def test_weighted_ray_sum_is_a_loop() -> None:
    weights, features = _values(9), _values(9, 4)
    products = (weights[:, None] * features).split(COUNTS)
    expected = torch.stack([product.sum(dim=0) for product in products])
    torch.testing.assert_close(weighted_ray_sum(weights, features, _segments()), expected)
    none = Segments.from_ray_index(torch.zeros(0, dtype=torch.int64), 3)
    assert torch.equal(weighted_ray_sum(torch.zeros(0), torch.zeros(0, 4), none), torch.zeros(3, 4))


def test_gradients_match_finite_differences() -> None:
    segments = _segments()
    values, features = _values(9).requires_grad_(), _values(9, 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda v: exclusive_sum(v, segments), (values,))
    assert torch.autograd.gradcheck(lambda v, f: weighted_ray_sum(v, f, segments), (values, features))
    assert torch.autograd.gradcheck(lambda v: compositing_weights(v, segments), (values,))


def test_weights_of_late_rays_are_as_exact_as_those_of_the_first() -> None:
    """One row of many opaque rays: a float32 prefix sum would have lost the last ray's small depths."""
    num_rays, per_ray = 20_000, 10
    depth = torch.full((num_rays, per_ray), 30.0)
    depth[0], depth[-1] = 1e-3, 1e-3
    segments = Segments.from_ray_index(torch.arange(num_rays).repeat_interleave(per_ray), num_rays)
    weights = compositing_weights(depth.flatten(), segments).view(num_rays, per_ray)
    torch.testing.assert_close(weights[-1], weights[0], rtol=1e-5, atol=0)
