"""Quality of meshes: Janus, fog, empty and broken files on constructed cases, and one real GLB."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from evaluation_fixtures import PixelEvaluator

from uni3d.errors import UsageError
from uni3d.evaluation.mesh_quality import (
    MeshItem,
    RenderedMesh,
    evaluate_meshes,
    evaluation_cameras,
    render_mesh,
)
from uni3d.evaluation.settings import MeshQualitySettings
from uni3d.evaluation.verdicts import front_quadrants, is_janus, quadrant
from uni3d.scene.camera import Cameras

SETTINGS = MeshQualitySettings(num_bootstrap=50)
EVALUATOR = PixelEvaluator([("chair", True), ("rock", False), ("vase", False)])


def _views(words: list[str]) -> torch.Tensor:
    order = ("front", "side", "back", "overhead")
    return torch.stack([0.1 + 0.6 * torch.tensor([float(word == name) for name in order]) for word in words])


def _fake_render(path: Path, cameras: Cameras, size: int, settings: MeshQualitySettings) -> RenderedMesh:
    """Draws what the file name says: noun-colour-kind, where kind is good, janus, empty or broken."""
    noun, colour, kind = path.stem.split("-")
    if kind == "broken":
        raise UsageError(f"'{path.name}' is damaged")
    words = ["front"] * len(cameras) if kind == "janus" else cameras.view_words()
    images = torch.stack([EVALUATOR.image(noun, colour, word, size) for word in words])
    return RenderedMesh(images, torch.full((len(cameras), size, size), 0.0 if kind == "empty" else 0.3))


def test_quadrants_and_janus() -> None:
    assert [quadrant(azimuth) for azimuth in (0, 44, -44, 46, 135.5, 180, -134, -46)] == [
        0,
        0,
        0,
        1,
        2,
        2,
        3,
        3,
    ]
    azimuths = [0.0, 30.0, 90.0, 180.0, -90.0]
    honest = _views(["front", "front", "side", "back", "side"])
    assert front_quadrants(honest, azimuths) == [0] and not is_janus(honest, azimuths)
    two_faces = _views(["front", "front", "front", "back", "side"])
    assert front_quadrants(two_faces, azimuths) == [0, 1] and not is_janus(two_faces, azimuths)
    three_faces = _views(["front", "front", "front", "front", "side"])
    assert is_janus(three_faces, azimuths) and is_janus(two_faces, azimuths, min_quadrants=2)


def test_report_counts_failures_empties_and_janus(tmp_path: Path) -> None:
    items = [
        MeshItem(Path("chair-red-good.glb"), "a red chair", 0, fog=0.02),
        MeshItem(Path("chair-red-janus.glb"), "a red chair", 1, fog=0.5),
        MeshItem(Path("rock-blue-good.glb"), "a red chair", 2),
        MeshItem(Path("chair-red-broken.glb"), "a red chair", 3),
        MeshItem(Path("rock-grey-empty.glb"), "a rock", 4),
        MeshItem(Path("vase-blue-good.glb"), "A refined vase with artistic patterns.", 5),
    ]
    report = evaluate_meshes(
        items,
        EVALUATOR,  # type: ignore[arg-type]
        settings=SETTINGS,
        output_dir=tmp_path,
        render=_fake_render,
    )
    rates = report["rates"]
    assert (report["num_meshes"], report["num_failed"], report["num_empty"]) == (6, 1, 1)
    # Right: both drawn chairs and the vase; wrong: the rock, the broken and the empty one.
    assert rates["noun_right"]["num"] == 6 and rates["noun_right"]["mean"] == pytest.approx(3 / 6)
    # Only the four red chairs ask for a colour; the blue rock and the broken file have it wrong.
    assert rates["colour_right"]["num"] == 4 and rates["colour_right"]["mean"] == pytest.approx(2 / 4)
    # The drawn Janus and the broken file, among four prompts for chairs.
    assert rates["is_janus"]["num"] == 4 and rates["is_janus"]["mean"] == pytest.approx(2 / 4)
    assert rates["is_foggy"]["num"] == 2 and rates["is_foggy"]["mean"] == pytest.approx(1 / 2)
    assert rates["fog"]["mean"] == pytest.approx(0.26)
    assert [mesh["is_good"] for mesh in report["meshes"]] == [True, False, False, False, False, True]
    assert report["meshes"][3]["error"] == "'chair-red-broken.glb' is damaged"
    assert report["view_confusion"]["back"]["front"] > 0
    assert json.loads((tmp_path / "mesh_quality.json").read_text())["num_failed"] == 1
    table = (tmp_path / "mesh_quality.md").read_text()
    assert "1 could not be rendered and 1 are empty" in table and "wrong object" in table
    assert "| fog | 50.0 %" in table
    assert (tmp_path / "mesh_quality.png").stat().st_size > 0


def test_cameras_are_rings_from_the_front() -> None:
    cameras = evaluation_cameras()
    assert len(cameras) == 24
    assert cameras.azimuth_deg[0] == 0 and cameras.elevation_deg[0] != cameras.elevation_deg[12]
    assert sorted({quadrant(azimuth) for azimuth in cameras.azimuth_deg.tolist()}) == [0, 1, 2, 3]
    with pytest.raises(UsageError, match="multiple of 4"):
        evaluation_cameras(MeshQualitySettings(num_azimuths=6))
    with pytest.raises(UsageError, match="no meshes"):
        evaluate_meshes([], EVALUATOR)  # type: ignore[arg-type]


def test_a_real_glb_is_rendered_unlit_over_grey(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trimesh = pytest.importorskip("trimesh")
    pytest.importorskip("embreex")
    box = trimesh.creation.box(extents=(4, 4, 4))
    blue = trimesh.visual.material.PBRMaterial(baseColorFactor=[0, 0, 255, 255])
    box.visual = trimesh.visual.TextureVisuals(uv=np.zeros((8, 2)), material=blue)
    path = tmp_path / "box.glb"
    box.export(path)
    rendered = render_mesh(path, evaluation_cameras(SETTINGS)[slice(0, 3)], 32, SETTINGS)
    assert rendered.images.shape == (3, 3, 32, 32)
    torch.testing.assert_close(rendered.images[0, :, 0, 0], torch.full((3,), SETTINGS.background))
    torch.testing.assert_close(
        rendered.images[0, :, 16, 16], torch.tensor([0.0, 0.0, 1.0]), atol=0.02, rtol=0
    )
    assert 0.1 < float(rendered.coverage.mean()) < 0.6
    (tmp_path / "broken.glb").write_bytes(path.read_bytes()[:60])
    items = [
        MeshItem(tmp_path / "broken.glb", "a red chair"),
        MeshItem(tmp_path / "missing.glb", "a red chair"),
    ]
    report = evaluate_meshes(items, EVALUATOR, settings=SETTINGS)  # type: ignore[arg-type]
    assert report["num_failed"] == 2 and report["rates"]["noun_right"]["mean"] == 0.0
    for name, message in zip(("broken.glb", "missing.glb"), caplog.messages, strict=True):
        assert message.count(str(tmp_path / name)) == 1
