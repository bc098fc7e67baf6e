"""Pictures of a mesh that is optimised: rasterised, coloured point by point, antialiased.

    vertices, faces, cameras -> rasterise -> points on the surface -> colours, light -> over a background

Differentiable in the vertices (silhouettes, normals) and in whatever colours the points. Colours are sRGB
display values. Legend: B cameras, H W pixels, K pixels that see the surface, V vertices, F faces.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from uni3d.mesh.rasteriser import Fragments, MeshEdges, antialias, interpolate, mesh_edges, rasterise
from uni3d.mesh.raycaster import Light
from uni3d.mesh.surface_terms import smooth_normals
from uni3d.scene.camera import Cameras

View = Literal["colour", "shaded", "normals"]


class SurfaceColour(Protocol):
    """Colours of points on a mesh."""

    def __call__(self, points: Tensor, face: Tensor, barycentric: Tensor) -> Tensor:
        """sRGB colours [K, 3] in [0, 1] at points [K, 3] of the faces [K], at barycentric weights [K, 3]."""
        ...


@dataclass(frozen=True)
class SurfaceImages:
    """`image` [B, 3, H, W] in [0, 1] over the background, `opacity` [B, 1, H, W] in [0, 1]."""

    image: Tensor
    opacity: Tensor


class SurfaceRenderer:
    """Renders one mesh from many cameras.

    Args:
        vertices, faces: float32 [V, 3] and int [F, 3].
        edges: `mesh_edges(faces)`, where the caller keeps it.
    """

    def __init__(self, vertices: Tensor, faces: Tensor, *, edges: MeshEdges | None = None) -> None:
        self.vertices, self.faces = vertices, faces
        self.edges = mesh_edges(faces) if edges is None else edges
        self._normals: Tensor | None = None

    def render(
        self,
        cameras: Cameras,
        size: int,
        background: Tensor | float,
        *,
        colour: SurfaceColour,
        view: View = "colour",
        lights: Sequence[Light] | None = None,
        supersample: int = 1,
    ) -> SurfaceImages:
        """Square pictures of `size` pixels.

        background: a grey level or colours [B, 3]. view: "colour" as it is, "shaded" under `lights` (one for
        each camera), "normals" (world axes, from -1..1 to 0..1). supersample: pixels a side that are
        averaged.
        """
        fragments = rasterise(self.vertices, self.faces, cameras, size * supersample, size * supersample)
        seen = fragments.face >= 0
        values = self._values(fragments, seen, colour, view, lights)
        canvas = self._background(background, fragments)
        image = canvas.masked_scatter(seen[..., None].expand_as(canvas), values).permute(0, 3, 1, 2)
        maps = torch.cat([image, seen[:, None].to(image.dtype)], dim=1)
        maps = antialias(maps, fragments, self.faces, edges=self.edges)
        if supersample > 1:
            maps = torch.nn.functional.avg_pool2d(maps, supersample)
        return SurfaceImages(maps[:, :3], maps[:, 3:4])

    def _values(
        self,
        fragments: Fragments,
        seen: Tensor,
        colour: SurfaceColour,
        view: View,
        lights: Sequence[Light] | None,
    ) -> Tensor:
        """What the pixels that see the surface show, [K, 3]."""
        if view == "normals":
            return (self._pixel_normals(fragments)[seen] + 1) / 2
        points = interpolate(self.vertices, self.faces, fragments).permute(0, 2, 3, 1)[seen]
        colours = colour(points, fragments.face[seen].long(), fragments.barycentric[seen])
        if view == "colour":
            return colours
        assert lights is not None and len(lights) == len(seen), "a shaded view needs a light for each camera"
        normals = self._pixel_normals(fragments)
        return colours * torch.cat(
            [shade(normals[index][seen[index]], light) for index, light in enumerate(lights)]
        )

    def _pixel_normals(self, fragments: Fragments) -> Tensor:
        """Unit normals [B, H, W, 3] in world axes."""
        if self._normals is None:
            self._normals = smooth_normals(self.vertices, self.faces)
        normals = interpolate(self._normals, self.faces, fragments).permute(0, 2, 3, 1)
        return torch.nn.functional.normalize(normals, dim=-1, eps=1e-9)

    def _background(self, background: Tensor | float, fragments: Fragments) -> Tensor:
        shape = (*fragments.face.shape, 3)
        if isinstance(background, Tensor):
            return background.to(self.vertices)[:, None, None, :].expand(shape).contiguous()
        return self.vertices.new_full(shape, background)


def shade(normals: Tensor, light: Light) -> Tensor:
    """Multipliers [K, 1] in [0, 1] for unit normals [K, 3]: `Light.shade`, differentiable."""
    azimuth, elevation = math.radians(light.key_azimuth_deg), math.radians(light.key_elevation_deg)
    level = math.cos(elevation)
    towards_key = normals.new_tensor(
        [math.sin(azimuth) * level, math.sin(elevation), math.cos(azimuth) * level]
    )
    ambient = light.ground + (light.sky - light.ground) * 0.5 * (1 + normals[:, 1:2])
    return (ambient + light.key * (normals @ towards_key).clamp(min=0)[:, None]).clamp(max=1.0)


def sample_lights(num: int, *, generator: torch.Generator | None = None) -> list[Light]:
    """Lights as in the pictures that the embedded teacher learned from: a bright sky, one soft key light."""

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    return [
        Light(
            sky=between(0.70, 0.78),
            ground=between(0.48, 0.56),
            key=between(0.24, 0.36),
            key_azimuth_deg=between(-50.0, 50.0),
            key_elevation_deg=between(35.0, 65.0),
        )
        for _ in range(num)
    ]
