"""Pictures of meshes by casting rays: data renders, previews, turntables and evaluation of exported files.

One surface per pixel: the nearest hit whose texture is not cut out. Shading is diffuse under a sky and one
soft key light, both fixed to the world, so that views of one object agree with one another. Everything is
numpy float32; embree finds the hits. Legend: H W pixels, N subsamples that hit, F faces.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from uni3d.errors import MissingPackageError, UsageError
from uni3d.mesh.base_colour import BaseColour
from uni3d.mesh.mesh_files import load_renderable
from uni3d.mesh.renderable import Material, RenderableMesh
from uni3d.scene.camera import Cameras

__all__ = ["Light", "Material", "Raycaster", "RenderableMesh", "RenderedView", "load_renderable"]

CUTOUT_ALPHA = 0.4
MAX_CUTOUT_LAYERS = 6


@dataclass(frozen=True)
class Light:
    """World-fixed diffuse light in display values.

    shade = ground + (sky - ground) (1 + n_y) / 2 + key max(0, n . key_direction), clipped to 1.
    """

    sky: float = 0.74
    ground: float = 0.52
    key: float = 0.32
    key_azimuth_deg: float = 30.0
    key_elevation_deg: float = 45.0

    def shade(self, normals: np.ndarray) -> np.ndarray:
        """Multipliers [N] in [0, 1] for unit normals [N, 3]."""
        azimuth, elevation = math.radians(self.key_azimuth_deg), math.radians(self.key_elevation_deg)
        towards_key = np.array(
            [
                math.sin(azimuth) * math.cos(elevation),
                math.sin(elevation),
                math.cos(azimuth) * math.cos(elevation),
            ],
            dtype=np.float32,
        )
        ambient = self.ground + (self.sky - self.ground) * 0.5 * (1 + normals[:, 1])
        return np.minimum(ambient + self.key * np.maximum(normals @ towards_key, 0), 1.0)


@dataclass(frozen=True)
class RenderedView:
    """One picture and the subsamples behind it.

    rgb [H, W, 3] float32 straight (not premultiplied) sRGB in [0, 1], zero where alpha is zero;
    alpha [H, W] float32 coverage; material [H, W] int64 index of the nearest material, -1 for background;
    hit_pixel [N] flat pixel index of each subsample that hit, hit_albedo [N, 3] its unlit sRGB colour,
    hit_material [N], hit_face [N] its material and face; subsamples_per_pixel = supersample squared.
    """

    rgb: np.ndarray
    alpha: np.ndarray
    material: np.ndarray
    hit_pixel: np.ndarray
    hit_albedo: np.ndarray
    hit_material: np.ndarray
    hit_face: np.ndarray
    subsamples_per_pixel: int

    def coverage_of(self, chosen: np.ndarray) -> np.ndarray:
        """Share [H, W] of each pixel covered by the subsamples picked by the boolean array `chosen` [N]."""
        height, width = self.alpha.shape
        counts = np.bincount(self.hit_pixel[chosen], minlength=height * width)
        return (counts / self.subsamples_per_pixel).reshape(height, width).astype(np.float32)

    def over(self, background: tuple[float, float, float] | np.ndarray) -> np.ndarray:
        """The picture on a plain background, uint8 [H, W, 3]."""
        alpha = self.alpha[..., None]
        composite = self.rgb * alpha + np.asarray(background, dtype=np.float32) * (1 - alpha)
        return (np.clip(composite, 0, 1) * 255 + 0.5).astype(np.uint8)


class Raycaster:
    """Holds one mesh in an embree scene and renders it from any camera.

    Raises MissingPackageError without embreex. The mesh is not normalised: see `RenderableMesh.in_unit_box`.
    """

    def __init__(self, mesh: RenderableMesh) -> None:
        try:
            from embreex import rtcore_scene
            from embreex.mesh_construction import TriangleMesh
        except ImportError as error:
            raise MissingPackageError("rendering meshes needs the package embreex; install it") from error
        self.mesh = mesh
        self._corners = np.ascontiguousarray(mesh.vertices[mesh.faces], dtype=np.float32)
        cross = np.cross(self._corners[:, 1] - self._corners[:, 0], self._corners[:, 2] - self._corners[:, 0])
        area = np.linalg.norm(cross, axis=1)
        self._face_normals = (cross / np.maximum(area, 1e-20)[:, None]).astype(np.float32)
        self._scene: Any = rtcore_scene.EmbreeScene()  # type: ignore[attr-defined]
        self._embree_mesh = TriangleMesh(self._scene, self._corners)
        self._base_colour = BaseColour(mesh)
        self._has_cutouts = self._base_colour.lowest_alpha() < CUTOUT_ALPHA

    def render(
        self,
        camera: Cameras,
        size: int,
        *,
        supersample: int = 2,
        light: Light | None = None,
    ) -> RenderedView:
        """Render a square picture of `size` pixels from `camera`, a `Cameras` of length 1.

        `light=None` gives the unlit base colours. `supersample` rays a side are averaged per pixel.
        """
        if len(camera) != 1:
            raise UsageError(f"render takes one camera, got {len(camera)}")
        fine = size * supersample
        eye, axes, scale = _camera_frame(camera)
        rows, columns = self._frame_rectangle(eye, axes, scale, fine)
        origins, directions, ray_pixel = _rays(eye, axes, scale, fine, rows, columns)
        footprint = 2 * scale * float(camera.radius[0]) / fine
        face, barycentric, albedo, ray = self._visible(origins, directions, footprint)
        pixel_fine = ray_pixel[ray]
        pixel = (pixel_fine // fine // supersample) * size + (pixel_fine % fine) // supersample
        colour = albedo
        if light is not None and len(face):
            normals = self._shading_normals(face, barycentric, directions[ray])
            colour = albedo * light.shade(normals)[:, None]
        return self._resolve(pixel, face, albedo, colour, size, supersample)

    def _frame_rectangle(
        self, eye: np.ndarray, axes: np.ndarray, scale: float, fine: int
    ) -> tuple[tuple[int, int], tuple[int, int]]:
        """Pixel rows and columns (half-open) that the projected mesh can touch."""
        relative = self._corners.reshape(-1, 3) - eye
        depth = -(relative @ axes[2])
        if depth.min() <= 1e-3:
            return (0, fine), (0, fine)
        x = (relative @ axes[0]) / (depth * scale)
        y = (relative @ axes[1]) / (depth * scale)
        to_pixel = fine / 2
        left, right = (x.min() + 1) * to_pixel, (x.max() + 1) * to_pixel
        top, bottom = (1 - y.max()) * to_pixel, (1 - y.min()) * to_pixel

        def bounds(low: float, high: float) -> tuple[int, int]:
            return int(np.clip(math.floor(low) - 1, 0, fine)), int(np.clip(math.ceil(high) + 1, 0, fine))

        return bounds(top, bottom), bounds(left, right)

    def _visible(
        self, origins: np.ndarray, directions: np.ndarray, footprint: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Nearest surface that is not cut out: face [N], barycentric [N, 3], albedo [N, 3], ray index [N]."""
        faces, weights, colours, rays = [], [], [], []
        pending = np.arange(len(directions))
        origin = origins
        for _ in range(MAX_CUTOUT_LAYERS if self._has_cutouts else 1):
            if len(pending) == 0:
                break
            hit = self._scene.run(
                np.ascontiguousarray(origin),
                np.ascontiguousarray(directions[pending]),
                query="INTERSECT",
                output=True,
            )
            found = np.nonzero(hit["primID"] >= 0)[0]
            face = hit["primID"][found].astype(np.int64)
            u, v = hit["u"][found], hit["v"][found]
            barycentric = np.stack([1 - u - v, u, v], axis=1).astype(np.float32)
            rgba = self._base_colour.at(face, barycentric, footprint)
            solid = rgba[:, 3] >= CUTOUT_ALPHA
            faces.append(face[solid])
            weights.append(barycentric[solid])
            colours.append(rgba[solid, :3])
            rays.append(pending[found[solid]])
            through = found[~solid]
            step = (hit["tfar"][through] + 1e-4)[:, None]
            origin = origin[through] + directions[pending[through]] * step
            pending = pending[through]
        if not faces:
            empty = np.zeros(0, np.int64)
            return empty, np.zeros((0, 3), np.float32), np.zeros((0, 3), np.float32), empty
        return np.concatenate(faces), np.concatenate(weights), np.concatenate(colours), np.concatenate(rays)

    def _shading_normals(
        self, face: np.ndarray, barycentric: np.ndarray, direction: np.ndarray
    ) -> np.ndarray:
        """Unit normals [N, 3] turned towards the viewer: assets are often one-sided sheets or inside out."""
        flat = self._face_normals[face]
        flat = np.where(np.einsum("nc,nc->n", flat, direction)[:, None] > 0, -flat, flat)
        if self.mesh.corner_normals is None:
            return flat
        smooth = np.einsum("nk,nkc->nc", barycentric, self.mesh.corner_normals[face])
        length = np.sqrt(np.einsum("nc,nc->n", smooth, smooth))[:, None]
        smooth = np.where(length > 1e-6, smooth / np.maximum(length, 1e-6), flat)
        return np.where(np.einsum("nc,nc->n", smooth, flat)[:, None] < 0, -smooth, smooth)

    def _resolve(
        self,
        pixel: np.ndarray,
        face: np.ndarray,
        albedo: np.ndarray,
        colour: np.ndarray,
        size: int,
        supersample: int,
    ) -> RenderedView:
        """Average subsamples into pixels."""
        num_pixels, per_pixel = size * size, supersample * supersample
        counts = np.bincount(pixel, minlength=num_pixels).astype(np.float32)
        sums = np.stack(
            [np.bincount(pixel, weights=colour[:, c], minlength=num_pixels) for c in range(3)], axis=1
        )
        rgb = (sums / np.maximum(counts, 1)[:, None]).astype(np.float32)
        material = np.full(num_pixels, -1, dtype=np.int64)
        hit_material = self.mesh.face_material[face]
        material[pixel] = hit_material
        return RenderedView(
            rgb=np.clip(rgb, 0, 1).reshape(size, size, 3),
            alpha=(counts / per_pixel).reshape(size, size),
            material=material.reshape(size, size),
            hit_pixel=pixel,
            hit_albedo=albedo,
            hit_material=hit_material,
            hit_face=face,
            subsamples_per_pixel=per_pixel,
        )


def _camera_frame(camera: Cameras) -> tuple[np.ndarray, np.ndarray, float]:
    """Eye [3], rows (right, up, backward) [3, 3] and the tangent of half the field of view."""
    right, up, backward = (axis[0].cpu().numpy() for axis in camera.axes())
    axes = np.stack([right, up, backward]).astype(np.float32)
    eye = (backward * float(camera.radius[0])).astype(np.float32)
    return eye, axes, math.tan(math.radians(float(camera.fov_y_deg[0])) / 2)


def _rays(
    eye: np.ndarray,
    axes: np.ndarray,
    scale: float,
    fine: int,
    rows: tuple[int, int],
    columns: tuple[int, int],
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Origins and unit directions [R, 3] through the centres of a rectangle of subpixels and flat indices."""
    row, column = np.arange(*rows), np.arange(*columns)
    y = ((1 - (row + 0.5) * 2 / fine) * scale).astype(np.float32)
    x = (((column + 0.5) * 2 / fine - 1) * scale).astype(np.float32)
    directions = x[None, :, None] * axes[0] + y[:, None, None] * axes[1] - axes[2]
    length = np.sqrt(1 + x[None, :] ** 2 + y[:, None] ** 2)[..., None]
    directions = (directions / length).reshape(-1, 3)
    origins = np.broadcast_to(eye, directions.shape)
    return origins, directions, (row[:, None] * fine + column[None, :]).reshape(-1)
