"""Several fields behind one look-up give what each gives alone: values, gradients, pictures, regularisers."""

from __future__ import annotations

import pytest
import torch

from uni3d.errors import UsageError
from uni3d.scene.camera import Cameras, sample_orbit_cameras
from uni3d.scene.field_stack import FieldStack, total_variation_each
from uni3d.scene.occupancy import OccupancyGrid
from uni3d.scene.radiance_field import RadianceField
from uni3d.scene.regularisers import total_variation
from uni3d.scene.renderer import render
from uni3d.scene.stack_renderer import OccupancyStack, render_stack

SIZE = 12


def random_fields(num: int = 3) -> list[RadianceField]:
    """Fields that differ, with matter in different places."""
    fields = []
    for index in range(num):
        field = RadianceField(resolutions=(6, 10), blob_radius=0.2 + 0.1 * index)
        field.set_density_sharpness(1.5)
        for parameter in field.parameters():
            parameter.data += torch.randn(parameter.shape)
        fields.append(field)
    return fields


def generators(num: int = 3) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(50 + index) for index in range(num)]


def assert_same_gradients(stack: FieldStack, fields: list[RadianceField]) -> None:
    for scene, field in enumerate(fields):
        for level in range(len(field.resolutions)):
            torch.testing.assert_close(
                stack.density_grids[level].tensor.grad[scene], field.density_grids[level].grad
            )
            torch.testing.assert_close(
                stack.colour_grids[level].tensor.grad[scene], field.colour_grids[level].grad
            )


def test_look_ups_and_gradients_are_those_of_the_single_fields() -> None:
    fields = random_fields()
    stack = FieldStack(fields)
    points = torch.rand(50, 3) * 1.4 - 0.7  # some of them outside
    scene = torch.randint(3, (50,))
    density, colour = stack(points, scene)
    weight = torch.rand(50)
    ((density * weight).sum() + (colour * weight[:, None]).sum()).backward()
    for index, field in enumerate(fields):
        mine = scene == index
        one_density, one_colour = field(points[mine])
        torch.testing.assert_close(density[mine], one_density)
        torch.testing.assert_close(colour[mine], one_colour)
        torch.testing.assert_close(stack.density(points, scene)[mine], one_density)
        ((one_density * weight[mine]).sum() + (one_colour * weight[mine, None]).sum()).backward()
    assert_same_gradients(stack, fields)


def test_pictures_and_occupied_cells_are_those_of_the_single_fields() -> None:
    fields, views = random_fields(), 2
    stack = FieldStack(fields)
    occupancy = OccupancyStack(3, OccupancyGrid(resolution=8))
    occupancy.update(stack, streams=generators())
    cameras = sample_orbit_cameras(3 * views)
    backgrounds = torch.rand(3 * views, 3)
    scene = torch.arange(3).repeat_interleave(views)
    together = render_stack(
        stack, scene, cameras, SIZE, SIZE, backgrounds,
        num_samples=16, occupancy=occupancy, streams=generators(),
    )  # fmt: skip
    target = torch.rand(together.image.shape)
    (together.image * target).sum().backward()
    for index, field in enumerate(fields):
        own = slice(index * views, (index + 1) * views)
        grid = OccupancyGrid(resolution=8)
        grid.update(field, generator=generators()[index])
        for name, value in grid.state_dict().items():
            torch.testing.assert_close(occupancy.state_dict(index)[name], value)
        alone = render(
            field, cameras[own], SIZE, SIZE, backgrounds[own],
            num_samples=16, occupancy=grid, generator=generators()[index],
        )  # fmt: skip
        for name in ("image", "opacity", "depth"):
            torch.testing.assert_close(getattr(together, name)[own], getattr(alone, name))
        (alone.image * target[own]).sum().backward()
    assert 0 < float(together.opacity.detach().mean()) < 1
    assert_same_gradients(stack, fields)


def test_total_variation_is_that_of_the_single_fields() -> None:
    fields = random_fields()
    stack = FieldStack(fields)
    scale = torch.tensor([1.0, 2.0, 3.0])
    together = total_variation_each(stack, density_weight=2.0, colour_weight=0.5, streams=generators())
    (together * scale).sum().backward()
    for index, field in enumerate(fields):
        alone = total_variation(field, density_weight=2.0, colour_weight=0.5, generator=generators()[index])
        torch.testing.assert_close(together[index], alone)
        (alone * scale[index]).backward()
    assert_same_gradients(stack, fields)


def test_a_field_without_a_finite_value_keeps_its_cells_and_spoils_no_other() -> None:
    fields = random_fields(2)
    stack = FieldStack(fields)
    occupancy = OccupancyStack(2, OccupancyGrid(resolution=8))
    with torch.no_grad():
        stack.density_grids[0].tensor[0] = torch.nan
    occupancy.update(stack, streams=generators(2))
    assert bool(occupancy.is_occupied[0].all())
    assert not bool(occupancy.is_occupied[1].all())
    assert bool(occupancy.density.isfinite().all())


def test_a_scene_goes_in_and_out_unchanged() -> None:
    fields = random_fields()
    stack = FieldStack(fields)
    taken = stack.field(1)
    camera = Cameras.from_lists([20.0], [10.0])
    torch.testing.assert_close(render(taken, camera, 8, 8).image, render(fields[1], camera, 8, 8).image)
    stack.load_state_dict(2, fields[0].state_dict())
    torch.testing.assert_close(stack.field(2).state_dict(), fields[0].state_dict())


def test_hash_fields_are_refused() -> None:
    with pytest.raises(UsageError, match=r"field\.encoding to dense"):
        FieldStack([RadianceField(encoding="hash")])
