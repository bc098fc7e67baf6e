"""Orbit cameras and their rays: the one place that defines axes.

Right-handed world, Y up, the object at the origin with its front towards +Z. A camera at azimuth 0 stands
on +Z and sees the front; azimuth grows towards +X, so 90 degrees sees the object's left-hand side as the
object would name it. Elevation is measured upwards from the horizon. Cameras look at the origin along
their own -Z, with +Y of the image pointing up. Images are [B, 3, H, W], row 0 at the top.
Legend: B cameras, H W pixels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from uni3d.device_draws import to_device

DEFAULT_FOV_Y_DEG = 40.0
DEFAULT_RADIUS = 2.4
OVERHEAD_ELEVATION_DEG = 60.0
FRONT_HALF_ANGLE_DEG = 45.0


def view_word(azimuth_deg: float, elevation_deg: float) -> str:
    """Name the view: `overhead` above 60 degrees, else `front`, `side` or `back` by 90 degree sectors."""
    if elevation_deg > OVERHEAD_ELEVATION_DEG:
        return "overhead"
    from_front = abs((azimuth_deg + 180.0) % 360.0 - 180.0)
    if from_front <= FRONT_HALF_ANGLE_DEG:
        return "front"
    return "back" if from_front >= 180.0 - FRONT_HALF_ANGLE_DEG else "side"


@dataclass(frozen=True)
class Cameras:
    """A batch of orbit cameras: float32 tensors [B], angles in degrees, radius in scene units."""

    azimuth_deg: Tensor
    elevation_deg: Tensor
    radius: Tensor
    fov_y_deg: Tensor

    @staticmethod
    def from_lists(
        azimuth_deg: list[float],
        elevation_deg: list[float],
        *,
        radius: float = DEFAULT_RADIUS,
        fov_y_deg: float = DEFAULT_FOV_Y_DEG,
    ) -> Cameras:
        """Build cameras from Python numbers that share one radius and one vertical field of view."""
        num = len(azimuth_deg)
        return Cameras(
            azimuth_deg=torch.tensor(azimuth_deg, dtype=torch.float32),
            elevation_deg=torch.tensor(elevation_deg, dtype=torch.float32),
            radius=torch.full((num,), float(radius)),
            fov_y_deg=torch.full((num,), float(fov_y_deg)),
        )

    def __len__(self) -> int:
        return self.azimuth_deg.shape[0]

    def __getitem__(self, index: slice | Tensor) -> Cameras:
        return Cameras(
            self.azimuth_deg[index],
            self.elevation_deg[index],
            self.radius[index],
            self.fov_y_deg[index],
        )

    def to(self, device: torch.device | str) -> Cameras:
        """The same cameras with their tensors on `device`: one small copy that nobody waits for."""
        rows = [self.azimuth_deg, self.elevation_deg, self.radius, self.fov_y_deg]
        return Cameras(*to_device(torch.stack(rows), device).unbind(0))

    def view_words(self) -> list[str]:
        """The view word of each camera, see `view_word`."""
        pairs = zip(self.azimuth_deg.tolist(), self.elevation_deg.tolist(), strict=True)
        return [view_word(azimuth, elevation) for azimuth, elevation in pairs]

    def axes(self) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors (right, up, backward) of each camera in the world, each [B, 3]."""
        azimuth = torch.deg2rad(self.azimuth_deg)
        elevation = torch.deg2rad(self.elevation_deg)
        sin_az, cos_az, sin_el, cos_el = azimuth.sin(), azimuth.cos(), elevation.sin(), elevation.cos()
        backward = torch.stack([sin_az * cos_el, sin_el, cos_az * cos_el], dim=-1)
        right = torch.stack([cos_az, torch.zeros_like(cos_az), -sin_az], dim=-1)
        up = torch.linalg.cross(backward, right)
        return right, up, backward

    def positions(self) -> Tensor:
        """Camera centres in the world, [B, 3]."""
        return self.axes()[2] * self.radius[:, None]

    def rays(self, height: int, width: int) -> tuple[Tensor, Tensor]:
        """Rays through pixel centres: origins and unit directions, each float32 [B, H, W, 3]."""
        right, up, backward = self.axes()
        half_height = torch.tan(torch.deg2rad(self.fov_y_deg) / 2)
        device = self.azimuth_deg.device
        y = 1 - (torch.arange(height, device=device) + 0.5) * 2 / height
        x = ((torch.arange(width, device=device) + 0.5) * 2 / width - 1) * (width / height)
        along_x = x[None, None, :, None] * half_height[:, None, None, None] * right[:, None, None, :]
        along_y = y[None, :, None, None] * half_height[:, None, None, None] * up[:, None, None, :]
        directions = torch.nn.functional.normalize(along_x + along_y - backward[:, None, None, :], dim=-1)
        origins = self.positions()[:, None, None, :].expand_as(directions)
        return origins, directions

    def project(self, points: Tensor, height: int, width: int) -> Tensor:
        """World points [P, 3] in homogeneous pixels [B, P, 3], the dtype of `points`, differentiable in them.

        (x depth, y depth, depth): depth is measured along the viewing axis in scene units, negative behind
        the camera, so nothing is divided and no point is singular; x and y count pixels from the top left
        corner of the image, y downwards. `rays` looks through (column + 0.5, row + 0.5).
        """
        right, up, backward = self.axes()
        pixels_per_slope = (height / 2 / torch.tan(torch.deg2rad(self.fov_y_deg) / 2))[:, None]
        rows = [
            pixels_per_slope * right - width / 2 * backward,
            -pixels_per_slope * up - height / 2 * backward,
            -backward,
        ]
        turn = torch.stack(rows, dim=1).to(points.dtype)
        shift = torch.stack([width / 2 * self.radius, height / 2 * self.radius, self.radius], dim=-1)
        # Not a matrix product, which autocast or TF32 would round to ten bits.
        turned = (turn[:, None] * points[None, :, None, :]).sum(-1)
        return turned + shift.to(points.dtype)[:, None]

    def ray_lengths(self, height: int, width: int) -> Tensor:
        """Distance from the camera of a point at depth 1 in each pixel's centre, float32 [B, H, W]."""
        pixel = 2 * torch.tan(torch.deg2rad(self.fov_y_deg) / 2)[:, None, None] / height
        device = self.azimuth_deg.device
        y = (torch.arange(height, device=device) + 0.5 - height / 2)[None, :, None] * pixel
        x = (torch.arange(width, device=device) + 0.5 - width / 2)[None, None, :] * pixel
        return torch.sqrt(1 + x.square() + y.square())

    def conditioning(self) -> Tensor:
        """What a camera-conditioned network sees, float32 [B, 5].

        Sine and cosine of azimuth, then of elevation, then the logarithm of the apparent size.
        """
        azimuth = torch.deg2rad(self.azimuth_deg)
        elevation = torch.deg2rad(self.elevation_deg)
        frame_half_height = self.radius * torch.tan(torch.deg2rad(self.fov_y_deg) / 2)
        return torch.stack(
            [azimuth.sin(), azimuth.cos(), elevation.sin(), elevation.cos(), -torch.log(frame_half_height)],
            dim=-1,
        )


def sample_orbit_cameras(
    num: int,
    *,
    generator: torch.Generator | None = None,
    elevation_range_deg: tuple[float, float] = (-10.0, 45.0),
    overhead_range_deg: tuple[float, float] = (60.0, 85.0),
    overhead_probability: float = 0.1,
    radius_range: tuple[float, float] = (2.1, 2.7),
    fov_y_deg: float = DEFAULT_FOV_Y_DEG,
) -> Cameras:
    """Draw cameras around the object: azimuths stratified over the circle, mostly level, some overhead."""
    offset = torch.rand((), generator=generator)
    azimuth = (torch.arange(num) + offset + (torch.rand(num, generator=generator) - 0.5)) / num * 360.0
    low, high = elevation_range_deg
    elevation = low + (high - low) * torch.rand(num, generator=generator)
    top_low, top_high = overhead_range_deg
    overhead = top_low + (top_high - top_low) * torch.rand(num, generator=generator)
    is_overhead = torch.rand(num, generator=generator) < overhead_probability
    near, far = radius_range
    return Cameras(
        azimuth_deg=(azimuth + 180.0) % 360.0 - 180.0,
        elevation_deg=torch.where(is_overhead, overhead, elevation),
        radius=near + (far - near) * torch.rand(num, generator=generator),
        fov_y_deg=torch.full((num,), fov_y_deg),
    )


def ring_cameras(
    num: int,
    *,
    elevation_deg: float = 15.0,
    radius: float = DEFAULT_RADIUS,
    fov_y_deg: float = DEFAULT_FOV_Y_DEG,
) -> Cameras:
    """Evenly spaced cameras on one circle, starting at the front: turntables and evaluation."""
    return Cameras.from_lists(
        [(360.0 * index / num + 180.0) % 360.0 - 180.0 for index in range(num)],
        [elevation_deg] * num,
        radius=radius,
        fov_y_deg=fov_y_deg,
    )


def frame_half_height(radius: float = DEFAULT_RADIUS, fov_y_deg: float = DEFAULT_FOV_Y_DEG) -> float:
    """Half the height of the frame at the origin, in scene units."""
    return radius * math.tan(math.radians(fov_y_deg) / 2)
