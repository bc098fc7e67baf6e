"""Pictures of the finished mesh for people: a turning video and a sheet of views.

Both show the exported object itself, ray cast without lights, because its colours already hold the light.
Legend: B views, S picture size.
"""

from __future__ import annotations

import math
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from uni3d.errors import MissingPackageError, UsageError
from uni3d.mesh.raycaster import Raycaster, RenderableMesh, load_renderable
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.scene.camera import DEFAULT_FOV_Y_DEG, Cameras, ring_cameras
from uni3d.training.checkpoint import atomic_write

MeshSource = str | Path | TexturedMesh | RenderableMesh

BACKGROUND = (0.93, 0.93, 0.93)
ELEVATION_DEG = 15.0
FRAME_MARGIN = 1.05
FRAMES_PER_SECOND = 20
NUM_PREVIEW_VIEWS = 8
PREVIEW_COLUMNS = 4


def render_mesh(
    source: MeshSource,
    cameras: Cameras,
    size: int,
    *,
    background: float | tuple[float, float, float] = 0.0,
    supersample: int = 2,
    fit: bool = False,
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Unlit pictures of a mesh from `cameras` (length B), as `report.compare_with_field` takes them.

    source: a GLB, OBJ or PLY file or a mesh in memory. Returns sRGB colours over `background`, float32
    [B, S, S, 3], and coverage [B, S, S], both in [0, 1]. The mesh is seen where it is (`report.load_in_scene`
    undoes the placement of an exported file); `fit` scales it into the unit box first.
    """
    caster = _caster(source, fit)
    views = _in_parallel(caster, cameras, lambda camera: caster.render(camera, size, supersample=supersample))
    alpha = np.stack([view.alpha for view in views])
    behind = np.broadcast_to(np.asarray(background, dtype=np.float32), (3,))
    rgb = np.stack([view.rgb for view in views])
    return (rgb * alpha[..., None] + behind * (1 - alpha[..., None])).astype(np.float32), alpha


def write_preview(
    source: MeshSource,
    path: str | Path,
    *,
    size: int = 256,
    background: tuple[float, float, float] = BACKGROUND,
) -> Path:
    """Write a sheet of eight views, 45 degrees apart and starting at the front, as a PNG; returns its path.

    Two rows of four pictures of `size` pixels each, on a light neutral background.
    """
    caster = _caster(source, True)
    cameras = _showing_cameras(caster.mesh, NUM_PREVIEW_VIEWS)
    pictures = _in_parallel(caster, cameras, lambda camera: caster.render(camera, size).over(background))
    rows = [
        np.concatenate(pictures[start : start + PREVIEW_COLUMNS], axis=1)
        for start in range(0, NUM_PREVIEW_VIEWS, PREVIEW_COLUMNS)
    ]
    sheet = Image.fromarray(np.concatenate(rows, axis=0))
    return atomic_write(path, lambda temporary: sheet.save(temporary, format="PNG"))


def write_turntable(
    source: MeshSource,
    path: str | Path,
    frames: int = 60,
    size: int = 384,
    *,
    frames_per_second: int = FRAMES_PER_SECOND,
    background: tuple[float, float, float] = BACKGROUND,
) -> Path:
    """Write one full turn of the object as an H.264 video (yuv420p, .mp4) that loops seamlessly; returns
    its path.

    size: pixels a side, even. Raises MissingPackageError without imageio and its ffmpeg.
    """
    if size % 2 or size < 16 or frames < 1:
        raise UsageError(
            f"a turntable needs an even size of at least 16 and a frame, got {size} and {frames}"
        )
    if Path(path).suffix.lower() != ".mp4":
        raise UsageError(f"cannot write a video as '{Path(path).name}'; the name must end in .mp4")
    try:
        import imageio.v2 as imageio
        import imageio_ffmpeg  # noqa: F401
    except ImportError as error:
        raise MissingPackageError("videos need the package imageio[ffmpeg]; install it") from error
    caster = _caster(source, True)
    cameras = _showing_cameras(caster.mesh, frames)
    # 2.25 rays per pixel: edges as calm as with 4 at half the time, and a video has many pictures
    fine = size + size // 2

    def picture(camera: Cameras) -> NDArray[np.uint8]:
        drawn = Image.fromarray(caster.render(camera, fine, supersample=1).over(background))
        return np.asarray(drawn.resize((size, size), Image.Resampling.LANCZOS))

    pictures = _in_parallel(caster, cameras, picture)

    def write(temporary: Path) -> None:
        writer = imageio.get_writer(
            temporary,
            format="FFMPEG",  # type: ignore[arg-type]
            mode="I",
            fps=frames_per_second,
            codec="libx264",
            pixelformat="yuv420p",
            quality=8,
            macro_block_size=2,
            ffmpeg_log_level="error",
            # the index goes to the front, so that a browser can start before it has the whole file
            output_params=["-movflags", "+faststart"],
        )
        with writer:
            for frame in pictures:
                writer.append_data(frame)

    return atomic_write(path, write)


def _caster(source: MeshSource, fit: bool) -> Raycaster:
    if isinstance(source, str | Path):
        mesh = load_renderable(source)
    else:
        mesh = source.as_renderable() if isinstance(source, TexturedMesh) else source
    return Raycaster(mesh.in_unit_box() if fit else mesh)


def _showing_cameras(mesh: RenderableMesh, num: int) -> Cameras:
    """A ring of cameras from which the whole object fills the frame, whichever side it shows."""
    reach = float(np.linalg.norm(mesh.vertices[mesh.faces.reshape(-1)], axis=1).max())
    radius = FRAME_MARGIN * reach / math.sin(math.radians(DEFAULT_FOV_Y_DEG / 2))
    return ring_cameras(num, elevation_deg=ELEVATION_DEG, radius=radius)


def _in_parallel(caster: Raycaster, cameras: Cameras, render) -> list:
    """`render` of each camera, in order; embree and numpy release the interpreter's lock, so threads help."""
    one_by_one = [cameras[index : index + 1] for index in range(len(cameras))]
    # embree builds its tree in the first query, which must not happen in two threads at once
    caster.render(one_by_one[0], 8, supersample=1)
    with ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1)) as pool:
        return list(pool.map(render, one_by_one))
