"""The field: where it starts, what it answers, what an optimiser gets."""

from __future__ import annotations

import math
from typing import Literal

import pytest
import torch
from torch import Tensor

from uni3d.errors import UsageError
from uni3d.scene.radiance_field import MAX_LOG_DENSITY, SURFACE_DENSITY, RadianceField

HASH = {"num_levels": 3, "table_size": 2**8, "base_resolution": 4, "max_resolution": 16}


def _dense(**options: object) -> RadianceField:
    return RadianceField(resolutions=(7, 13), **options)  # type: ignore[arg-type]


def _hash(seed: int = 0) -> RadianceField:
    return RadianceField(
        encoding="hash", hash_options=HASH, hidden_width=8, generator=torch.Generator().manual_seed(seed)
    )


def _points(num: int = 300) -> Tensor:
    return (torch.rand(num, 3, generator=torch.Generator().manual_seed(1)) - 0.5) * 1.2


@pytest.mark.parametrize("field", [_dense(), _dense(density_activation="softplus"), _hash()])
def test_starts_as_a_soft_grey_ball(field: RadianceField) -> None:
    distance = torch.tensor([0.0, 0.2, 0.4])
    points = torch.stack([distance, torch.zeros(3), torch.zeros(3)], dim=1)
    density, colour = field(points)
    assert (density[:-1] > density[1:]).all()
    expected = torch.exp(4 * (1 - distance / 0.35))
    torch.testing.assert_close(density, expected, rtol=0.1, atol=0)
    torch.testing.assert_close(colour, torch.full((3, 3), 0.5), atol=0.01, rtol=0)


@pytest.mark.parametrize("field", [_dense(), _hash()])
def test_shapes_ranges_and_the_outside(field: RadianceField) -> None:
    points = torch.cat([_points(), torch.tensor([[0.61, 0.0, 0.0], [0.0, -5.0, 0.0]])])
    density, colour = field(points)
    assert density.shape == (302,)
    assert colour.shape == (302, 3)
    assert (density[:-2] > 0).all()
    assert (density[-2:] == 0).all()
    assert 0 <= colour.min() <= colour.max() <= 1
    assert torch.equal(field.density(points), density)
    assert torch.equal(field.colour(points), colour)


def test_levels_add_up() -> None:
    field = _dense()
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in field.parameters():
            parameter.normal_()
    points = _points()
    places = (points / 0.6).view(1, -1, 1, 1, 3)

    def look_up(grids: torch.nn.ParameterList) -> Tensor:
        sampled = [torch.nn.functional.grid_sample(grid[None], places, align_corners=True) for grid in grids]
        return sum(sampled[1:], sampled[0])[0, :, :, 0, 0].t()

    density, colour = field(points)
    torch.testing.assert_close(density, look_up(field.density_grids)[:, 0].exp(), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(colour, torch.sigmoid(look_up(field.colour_grids)), rtol=1e-4, atol=1e-5)


def test_inactive_levels_are_left_alone() -> None:
    field = _dense()
    before = field(_points())
    field.set_active_levels(1)
    after = field(_points())
    assert torch.equal(before[0], after[0])
    after[0].sum().backward()
    assert field.density_grids[0].grad is not None
    assert field.density_grids[1].grad is None
    with pytest.raises(UsageError, match="1 to 2"):
        field.set_active_levels(3)


def test_density_is_truncated_but_can_come_back() -> None:
    field = _dense()
    with torch.no_grad():
        field.density_grids[0].fill_(50.0)
    density = field.density(_points(4))
    torch.testing.assert_close(density, torch.full((4,), math.exp(MAX_LOG_DENSITY)))
    density.sum().backward()
    gradient = field.density_grids[0].grad
    assert gradient is not None
    assert gradient.sum() > 0


def test_normals_point_out_of_a_ball() -> None:
    points = 0.3 * torch.nn.functional.normalize(_points(50), dim=1)
    normals = RadianceField(resolutions=(25,)).normals(points)
    torch.testing.assert_close(normals.norm(dim=1), torch.ones(50), rtol=1e-4, atol=0)
    outward = (normals * torch.nn.functional.normalize(points, dim=1)).sum(dim=1)
    assert outward.min() > 0.9


@pytest.mark.parametrize("field", [_dense(), _hash()])
def test_parameter_groups_hold_every_parameter_once(field: RadianceField) -> None:
    rates = {name: 0.01 * (index + 1) for index, name in enumerate(field.parameter_group_names)}
    groups = field.parameter_groups(rates)
    assert {group["name"]: group["lr"] for group in groups} == rates
    held = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(held) == sorted(id(parameter) for parameter in field.parameters())
    torch.optim.Adam(groups)
    with pytest.raises(UsageError, match="learning rates"):
        field.parameter_groups({"density": 0.1, "color": 0.1})


def test_state_dict_round_trip() -> None:
    source, target = _hash(0), _hash(1)
    assert not torch.equal(source(_points())[0], target(_points())[0])
    target.load_state_dict(source.state_dict())
    assert torch.equal(source(_points())[0], target(_points())[0])
    assert torch.equal(_hash(0)(_points())[1], _hash(0)(_points())[1])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoding": "octree"}, "dense"),
        ({"density_activation": "relu"}, "softplus"),
        ({"hash_options": {"num_levels": 2}}, "hash"),
        ({"resolutions": ()}, "resolutions"),
        ({"resolutions": (1, 8)}, "resolutions"),
    ],
)
def test_bad_settings_are_explained(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        RadianceField(**options)  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["exp", "softplus"])
def test_sharpness_clears_fog_and_keeps_the_surface(activation: Literal["exp", "softplus"]) -> None:
    field = RadianceField(resolutions=(16,), density_activation=activation, blob_sharpness=6.0)
    points = torch.stack([torch.linspace(0, 0.55, 200), torch.zeros(200), torch.zeros(200)], dim=1)
    before = field.density(points).detach()
    field.set_density_sharpness(2.0)
    after = field.density(points).detach()
    thin, dense = before < SURFACE_DENSITY / 2, before > SURFACE_DENSITY * 2
    assert thin.any() and dense.any()
    assert (after[thin] < before[thin]).all() and (after[dense] > before[dense]).all()
    # The ball is as large as before where the density is that of a surface.
    assert ((before > SURFACE_DENSITY) == (after > SURFACE_DENSITY)).float().mean() > 0.99
    field.set_density_sharpness(1.0)
    assert torch.equal(field.density(points), before)
