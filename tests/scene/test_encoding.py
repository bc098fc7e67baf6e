"""Trilinear look-ups against torch's own grid_sample, and the hash encoding."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from uni3d.scene.encoding import HashGridEncoding, dense_corners, hashed_corners, weighted_corners


def _points(num: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.rand(num, 3, generator=torch.Generator().manual_seed(2), dtype=dtype)


def _sampled(grid: Tensor, points: Tensor) -> Tensor:
    """grid [C, G, G, G] at points [P, 3] in [0, 1]^3 by grid_sample, [P, C]."""
    places = (points * 2 - 1).view(1, -1, 1, 1, 3)
    return torch.nn.functional.grid_sample(grid[None], places, align_corners=True)[0, :, :, 0, 0].t()


@pytest.mark.parametrize("resolution", [2, 5, 17])
def test_dense_look_up_is_grid_sample_forwards_and_backwards(resolution: int) -> None:
    points = torch.cat(
        [_points(200, torch.float64), torch.eye(3, dtype=torch.float64), torch.ones(1, 3).double()]
    )
    shape = (3, resolution, resolution, resolution)
    ours = torch.randn(
        shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    theirs = ours.detach().clone().requires_grad_()
    values = weighted_corners(ours, dense_corners(points, resolution))
    reference = _sampled(theirs, points)
    torch.testing.assert_close(values, reference)
    cotangent = torch.randn(values.shape, dtype=torch.float64)
    values.backward(cotangent)
    reference.backward(cotangent)
    assert ours.grad is not None
    torch.testing.assert_close(ours.grad, theirs.grad)


def test_points_outside_take_the_nearest_face() -> None:
    grid = torch.randn(1, 4, 4, 4)
    outside = torch.tensor([[-3.0, 0.3, 0.7], [1.5, 2.0, 0.5]])
    corners = dense_corners(outside, 4)
    assert (corners.weight >= 0).all()
    torch.testing.assert_close(
        weighted_corners(grid, corners), weighted_corners(grid, dense_corners(outside.clamp(0, 1), 4))
    )


def test_hashed_corners_agree_with_neighbouring_cells_and_stay_in_the_table() -> None:
    corners = hashed_corners(_points(500), 33, 256)
    assert corners.index.min() >= 0
    assert corners.index.max() < 256
    torch.testing.assert_close(corners.weight.sum(dim=1), torch.ones(500))
    table = torch.randn(2, 256)
    vertex = torch.tensor([[8 / 32, 3 / 32, 30 / 32]])
    either_side = torch.cat([vertex - 1e-6, vertex + 1e-6])
    values = weighted_corners(table, hashed_corners(either_side, 33, 256))
    torch.testing.assert_close(values[0], values[1], atol=1e-3, rtol=0)  # continuous across a cell's corner


def test_hash_encoding_shape_levels_and_repeatability() -> None:
    def build(seed: int) -> HashGridEncoding:
        return HashGridEncoding(
            num_levels=4,
            table_size=2**10,
            base_resolution=4,
            max_resolution=32,
            generator=torch.Generator().manual_seed(seed),
        )

    encoding = build(0)
    assert encoding.resolutions == (4, 8, 16, 32)
    assert [level.num_slots for level in encoding.levels] == [64, 512, 1024, 1024]
    assert [level.is_hashed for level in encoding.levels] == [False, False, True, True]
    assert encoding.table.shape == (64 + 512 + 1024 + 1024, 2)
    features = encoding(_points(50))
    assert features.shape == (50, encoding.num_features) == (50, 8)
    assert torch.equal(features, build(0)(_points(50)))
    assert not torch.equal(features, build(1)(_points(50)))


def test_hash_encoding_learns_a_function() -> None:
    encoding = HashGridEncoding(
        num_levels=4, table_size=2**12, max_resolution=32, generator=torch.Generator().manual_seed(0)
    )
    points = _points(2000)
    target = torch.sin(12 * points[:, 0]) * points[:, 1]
    optimiser = torch.optim.Adam(encoding.parameters(), lr=3e-2, betas=(0.9, 0.99), eps=1e-15)
    losses = []
    for _ in range(40):
        loss = (encoding(points).sum(dim=1) - target).square().mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.02 * losses[0]


def test_table_size_must_be_a_power_of_two() -> None:
    with pytest.raises(ValueError, match="power of two"):
        HashGridEncoding(table_size=1000)
