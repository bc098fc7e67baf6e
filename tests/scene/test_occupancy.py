"""The occupancy grid: full at first, tight around matter after, never empty, restorable."""

from __future__ import annotations

import torch
from torch import Tensor

from uni3d.scene.occupancy import OccupancyGrid


class _Block:
    """Constant density in a box; nothing elsewhere."""

    half_extent = 0.6

    def __init__(
        self, low: tuple[float, float, float], high: tuple[float, float, float], density: float = 50.0
    ):
        self.low, self.high, self.inside = torch.tensor(low), torch.tensor(high), density

    def density(self, points: Tensor) -> Tensor:
        return ((points >= self.low) & (points <= self.high)).all(dim=1) * self.inside


def test_everything_is_occupied_before_the_first_update() -> None:
    grid = OccupancyGrid(resolution=8)
    assert grid.occupied_fraction() == 1.0
    assert grid.bounds.tolist() == [[-torch.tensor(0.6).item()] * 3, [torch.tensor(0.6).item()] * 3]


def test_bounds_and_cells_follow_the_matter_with_one_cell_to_spare() -> None:
    grid = OccupancyGrid(resolution=12, half_extent=0.6)  # cells of 0.1
    grid.update(_Block((0.21, -0.39, -0.09), (0.39, -0.01, 0.49)))
    expected = torch.tensor([[0.1, -0.5, -0.2], [0.5, 0.1, 0.6]])
    torch.testing.assert_close(grid.bounds, expected, atol=1e-5, rtol=0)
    assert int(grid.is_occupied.sum()) == 4 * 6 * 8
    assert grid.is_occupied[6, 4, 8]  # z, y, x of the block's inside
    assert not grid.is_occupied[6, 4, 3]


def test_matter_missed_once_is_remembered_then_forgotten() -> None:
    grid = OccupancyGrid(resolution=12, decay=0.5)
    block, nothing = _Block((0.2, 0.2, 0.2), (0.4, 0.4, 0.4)), _Block((-0.5, -0.5, -0.5), (-0.4, -0.4, -0.4))
    grid.update(block)
    grid.update(nothing)
    assert grid.is_occupied[8, 8, 8]
    for _ in range(12):
        grid.update(nothing)
    assert not grid.is_occupied[8, 8, 8]


def test_faint_matter_does_not_empty_the_grid() -> None:
    grid = OccupancyGrid(resolution=12)
    grid.update(_Block((-0.2, -0.2, -0.2), (0.2, 0.2, 0.2), density=1e-4))
    assert 0 < grid.occupied_fraction() < 0.5


def test_a_non_finite_field_leaves_the_grid_as_it_was() -> None:
    grid = OccupancyGrid(resolution=12)
    grid.update(_Block((-0.2, -0.2, -0.2), (0.2, 0.2, 0.2)))
    before = {name: tensor.clone() for name, tensor in grid.state_dict().items()}
    grid.update(_Block((-0.6, -0.6, -0.6), (0.6, 0.6, 0.6), density=float("nan")))
    assert all(torch.equal(before[name], tensor) for name, tensor in grid.state_dict().items())


def test_state_dict_restores_the_next_update_exactly() -> None:
    block = _Block((-0.3, -0.1, 0.0), (0.2, 0.1, 0.33))
    generator = torch.Generator().manual_seed(5)
    grid, copy = OccupancyGrid(resolution=10), OccupancyGrid(resolution=10)
    grid.update(block, generator=generator)
    copy.load_state_dict(grid.state_dict())
    state = generator.get_state()
    grid.update(block, generator=generator)
    copy.update(block, generator=generator.set_state(state))
    assert all(torch.equal(tensor, copy.state_dict()[name]) for name, tensor in grid.state_dict().items())
