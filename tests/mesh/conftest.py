"""What the tests of the mesh room share: one painted object, made once."""

from __future__ import annotations

import pytest
from painted_box import box_density, side_colour

from uni3d.mesh.extraction import extract_surface
from uni3d.mesh.surface import Surface
from uni3d.mesh.texture import bake_texture
from uni3d.mesh.textured_mesh import TexturedMesh


@pytest.fixture(scope="session")
def box_surface() -> Surface:
    return extract_surface(box_density, 1.0, 64, max_triangles=2000)


@pytest.fixture(scope="session")
def box_mesh(box_surface: Surface) -> TexturedMesh:
    return bake_texture(box_surface, side_colour, 512, unwrap_method="projection")
