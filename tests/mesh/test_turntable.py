"""Pictures and videos of a mesh show the right sides in the right order."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import pytest
from painted_box import SIDE_COLOURS
from PIL import Image

from uni3d.errors import UsageError
from uni3d.mesh.export import write_glb
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.mesh.turntable import BACKGROUND, render_mesh, write_preview, write_turntable
from uni3d.scene.camera import Cameras, ring_cameras


@pytest.fixture
def flat_box(box_mesh: TexturedMesh) -> TexturedMesh:
    """The painted box scaled to a cube, so that the middle of every view is one side."""
    spread = np.ptp(box_mesh.vertices, axis=0)
    return replace(box_mesh, vertices=(box_mesh.vertices / spread).astype(np.float32))


def test_the_turntable_turns(flat_box: TexturedMesh, tmp_path: Path) -> None:
    path = write_turntable(flat_box, tmp_path / "turn.mp4", frames=8, size=96)
    frames = np.stack(list(imageio.get_reader(path).iter_data()))
    assert frames.shape == (8, 96, 96, 3)
    # front, +X, back, -X; H.264 keeps colours to a few levels
    for frame, side in ((0, 4), (2, 0), (4, 5), (6, 1)):
        middle = frames[frame, 52:58, 45:51].reshape(-1, 3).mean(axis=0) / 255
        np.testing.assert_allclose(middle, SIDE_COLOURS[side].numpy(), atol=0.08)
    np.testing.assert_allclose(frames[:, 2, 2] / 255, BACKGROUND[0], atol=0.03)
    information = subprocess.run(
        [imageio_ffmpeg.get_ffmpeg_exe(), "-i", str(path)], capture_output=True, text=True, check=False
    ).stderr
    assert "h264" in information and "yuv420p" in information


def test_the_preview_shows_eight_views_from_a_file(flat_box: TexturedMesh, tmp_path: Path) -> None:
    glb = write_glb(flat_box, tmp_path / "box.glb")
    sheet = np.asarray(Image.open(write_preview(glb, tmp_path / "preview.png", size=64)))
    assert sheet.shape == (128, 256, 3)
    views = sheet.reshape(2, 64, 4, 64, 3).transpose(0, 2, 1, 3, 4).reshape(8, 64, 64, 3)
    for view, side in ((0, 4), (2, 0), (4, 5), (6, 1)):
        np.testing.assert_allclose(views[view, 36, 32] / 255, SIDE_COLOURS[side].numpy(), atol=0.02)
    assert (views[:, 0, 0] == round(BACKGROUND[0] * 255)).all(), "nothing is cut off at the corner"


@pytest.mark.parametrize("shape", [(1.0, 1.0, 1.0), (1.0, 0.05, 1.0), (0.1, 1.0, 0.1)])
def test_the_object_fills_the_frame_and_is_not_cut(
    flat_box: TexturedMesh, tmp_path: Path, shape: tuple[float, float, float]
) -> None:
    stretched = replace(flat_box, vertices=flat_box.vertices * np.array(shape, np.float32))
    sheet = np.asarray(Image.open(write_preview(stretched, tmp_path / "preview.png", size=64)))
    views = sheet.reshape(2, 64, 4, 64, 3).transpose(0, 2, 1, 3, 4).reshape(8, 64, 64, 3)
    is_object = np.abs(views.astype(int) - round(BACKGROUND[0] * 255)).max(axis=-1) > 3
    assert not is_object[:, 0].any() and not is_object[:, -1].any()
    assert not is_object[:, :, 0].any() and not is_object[:, :, -1].any()
    rows, columns = is_object.any(axis=(0, 2)).sum(), is_object.any(axis=(0, 1)).sum()
    assert max(rows, columns) > 0.7 * 64


def test_rendered_views_are_over_the_background(box_mesh: TexturedMesh) -> None:
    images, alpha = render_mesh(box_mesh, ring_cameras(2), 32, background=0.5)
    assert images.shape == (2, 32, 32, 3) and alpha.shape == (2, 32, 32)
    assert images.dtype == np.float32 and alpha.dtype == np.float32
    np.testing.assert_allclose(images[alpha == 0], 0.5)
    assert 0.02 < alpha.mean() < 0.5


def test_meshes_stay_where_they_are_unless_fitted(box_mesh: TexturedMesh) -> None:
    moved = replace(box_mesh, vertices=box_mesh.vertices + np.array([0.0, 0.35, 0.0], np.float32))
    front = Cameras.from_lists([0.0], [0.0])
    _, alpha = render_mesh(moved, front, 64)
    _, fitted = render_mesh(moved, front, 64, fit=True)
    rows = np.arange(64)[:, None]
    assert (alpha[0] * rows).sum() / alpha.sum() < 25 < (fitted[0] * rows).sum() / fitted.sum() < 38


def test_parallel_frames_are_the_same_as_single_ones(box_mesh: TexturedMesh) -> None:
    cameras = ring_cameras(6)
    together, _ = render_mesh(box_mesh, cameras, 40)
    for index in range(6):
        alone, _ = render_mesh(box_mesh, cameras[index : index + 1], 40)
        np.testing.assert_array_equal(together[index], alone[0])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [("a.mp4", {"size": 65}), ("a.mp4", {"frames": 0}), ("a.gif", {}), ("a.mp4", {"size": 2})],
)
def test_impossible_videos_are_refused(
    box_mesh: TexturedMesh, tmp_path: Path, name: str, arguments: dict[str, int]
) -> None:
    with pytest.raises(UsageError):
        write_turntable(box_mesh, tmp_path / name, **arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_video_that_fails_leaves_the_old_one(
    box_mesh: TexturedMesh, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "turn.mp4"
    path.write_bytes(b"old")

    def refuse(*_: object, **__: object) -> None:
        raise OSError("no ffmpeg today")

    monkeypatch.setattr(imageio, "get_writer", refuse)
    with pytest.raises(OSError, match="no ffmpeg today"):
        write_turntable(box_mesh, path, frames=2, size=32)
    assert path.read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1
