"""`uni3d refine` on a tiny random teacher: what changes, what stays, what is refused."""

from __future__ import annotations

import dataclasses
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh

from uni3d import cli
from uni3d.config.loader import config_to_yaml, load_config
from uni3d.config.refine import RefineConfig
from uni3d.config.stages import GeometryConfig, StageGuidanceConfig, TextureConfig
from uni3d.config.text_to_3d import CheckpointsConfig, DiscriminatorConfig, FakeScoreConfig
from uni3d.diffusion.latent_teacher import LatentDiffusionTeacher
from uni3d.errors import Interrupted, UsageError
from uni3d.mesh.mesh_input import read_untrusted_mesh
from uni3d.mesh.repair import prepare_for_refine
from uni3d.mesh.report import mesh_report
from uni3d.mesh.source_colour import SourceColour
from uni3d.mesh.turntable import render_mesh
from uni3d.scene.camera import ring_cameras
from uni3d.scene.radiance_field import RadianceField
from uni3d.text_to_3d import first_colours
from uni3d.text_to_3d.mesh_optimiser import FieldColour, TextureStudent
from uni3d.text_to_3d.pipeline import RunWatch, TextTo3DPipeline
from uni3d.text_to_3d.refine import refine
from uni3d.text_to_3d.stages import as_surface

SMALL = StageGuidanceConfig(resolution=((0.0, 16.0),))
CENTRE = (30.0, -4.0, 7.0)


@pytest.fixture(scope="module")
def red_box(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A box of 4 x 2 x 1 away from the origin, red but for a green top."""
    box = trimesh.creation.box((4.0, 2.0, 1.0), transform=trimesh.transformations.translation_matrix(CENTRE))
    colours = np.tile(np.array([200, 30, 30, 255], np.uint8), (len(box.faces), 1))
    colours[box.face_normals[:, 1] > 0.9] = (30, 200, 30, 255)
    box.unmerge_vertices()
    box.visual = trimesh.visual.ColorVisuals(box, vertex_colors=np.repeat(colours, 3, axis=0))
    path = tmp_path_factory.mktemp("meshes") / "box.ply"
    box.export(path)
    return path


def _config(source: Path, teacher: Path, folder: Path, **changes: Any) -> RefineConfig:
    config = RefineConfig(
        source=source,
        prompt="a blue chair",
        teacher=str(teacher),
        runs_folder=folder / "runs",
        method="sds",
        geometry=GeometryConfig(steps=2, resolution=8, guidance=SMALL),
        texture=TextureConfig(steps=3, guidance=SMALL),
        fake_score=FakeScoreConfig(lora_rank=2, warmup_steps=0),
        discriminator=DiscriminatorConfig(num_real_samples=2, sampling_steps=2),
        colour_resolutions=(8, 16),
        texture_size=64,
        turntable_frames=0,
        quiet=True,
    )
    return dataclasses.replace(config, **changes)


def _box_of(path: Path) -> np.ndarray:
    mesh = read_untrusted_mesh(path)
    used = mesh.vertices[mesh.faces.reshape(-1)]
    return np.stack([used.min(axis=0), used.max(axis=0)])


def test_texture_mode_keeps_every_vertex_in_its_place(
    red_box: Path, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    before = hashlib.sha256(red_box.read_bytes()).hexdigest()
    output = tmp_path / "out.glb"
    refine(_config(red_box, tiny_teacher_folder, tmp_path, output=output))
    assert hashlib.sha256(red_box.read_bytes()).hexdigest() == before
    old, new = read_untrusted_mesh(red_box), read_untrusted_mesh(output)
    assert len(new.faces) == len(old.faces)

    def corners(mesh: Any) -> np.ndarray:
        return np.unique(mesh.vertices[mesh.faces.reshape(-1)].round(4), axis=0)

    np.testing.assert_allclose(corners(new), corners(old), atol=2e-4)


def test_without_strength_the_colours_stay(red_box: Path, tiny_teacher_folder: Path, tmp_path: Path) -> None:
    result = refine(_config(red_box, tiny_teacher_folder, tmp_path, strength=0.0))
    old, new = (read_untrusted_mesh(path).in_unit_box() for path in (red_box, result.output))
    cameras = ring_cameras(4, elevation_deg=40.0)
    (first, first_alpha), (second, second_alpha) = (render_mesh(mesh, cameras, 48) for mesh in (old, new))
    seen = (first_alpha > 0.99) & (second_alpha > 0.99)
    assert np.abs(first - second)[seen].mean() < 0.02
    assert np.minimum(first_alpha, second_alpha).sum() / np.maximum(first_alpha, second_alpha).sum() > 0.98


def test_strength_is_spent_on_steps_noise_and_fading() -> None:
    full, half = (RefineConfig(strength=strength).run_settings() for strength in (1.0, 0.5))
    none = RefineConfig(strength=0.0).run_settings()
    assert half.stages.texture.steps == full.stages.texture.steps // 2 and none.stages.texture.steps == 0
    assert half.stages.texture.fading == full.stages.texture.fading / 2
    assert half.stages.texture.first_noise == full.stages.texture.first_noise / 2
    assert half.stages.texture.tint_noise == full.stages.texture.tint_noise / 2 > 0
    assert half.stages.texture.guidance.noise_max[0][1] == full.stages.texture.guidance.noise_max[0][1] / 2
    assert full.stages.geometry.steps == 0, "texture mode has no geometry stage"
    both = RefineConfig(part="both").run_settings()
    assert both.stages.geometry.steps > 0 and both.stages.texture.steps > 0


@pytest.mark.parametrize("part", ["geometry", "both"])
def test_an_optimised_geometry_is_closed_and_stands_where_the_input_stood(
    red_box: Path, tiny_teacher_folder: Path, tmp_path: Path, part: Any
) -> None:
    result = refine(_config(red_box, tiny_teacher_folder, tmp_path, part=part, max_triangles=2000))
    report = mesh_report(result.output)
    assert report["closed"] and report["outward"] and report["triangles"] <= 2000
    np.testing.assert_allclose(_box_of(result.output), _box_of(red_box), atol=0.15)
    assert result.report["field_match"]["psnr_db"] > 25.0


def test_a_stopped_run_goes_on_to_the_same_mesh(
    red_box: Path, tiny_teacher_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = _config(
        red_box,
        tiny_teacher_folder,
        tmp_path,
        part="both",
        checkpoints=CheckpointsConfig(interval_s=0.0),
        texture=TextureConfig(steps=3, fading=1.0, first_views=2, tint_noise=0.9, guidance=SMALL),
    )
    whole = refine(config)

    class StopInTexture(RunWatch):
        def after_step(self, optimiser: Any, values: Any) -> None:
            if optimiser.stage == "texture":
                import os
                import signal

                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="uni3d refine --resume"):
        refine(config, watch=StopInTexture())
    stopped = tmp_path / "runs" / "a-blue-chair-0-2"
    assert (stopped / "mesh.glb").is_file()
    saved = load_config(stopped / "config.yaml", RefineConfig())
    resumed = refine(dataclasses.replace(saved, resume=stopped))
    first, second = (read_untrusted_mesh(result.output) for result in (whole, resumed))
    assert np.array_equal(first.vertices, second.vertices)
    textures = [mesh.materials[mesh.face_material[0]].texture for mesh in (first, second)]
    assert textures[0] is not None and np.array_equal(*textures)


def test_a_run_refuses_another_mesh(red_box: Path, tiny_teacher_folder: Path, tmp_path: Path) -> None:
    result = refine(_config(red_box, tiny_teacher_folder, tmp_path, strength=0.0))
    other = tmp_path / "other.stl"
    trimesh.creation.icosphere(1).export(other)
    saved = load_config(result.run_directory / "config.yaml", RefineConfig())
    with pytest.raises(UsageError, match="not the mesh"):
        refine(dataclasses.replace(saved, resume=result.run_directory, source=other))


def test_the_pipeline_refines_a_mesh_in_memory(
    red_box: Path, tiny_teacher_folder: Path, tmp_path: Path
) -> None:
    pipe = TextTo3DPipeline(LatentDiffusionTeacher.from_pretrained(tiny_teacher_folder))
    config = _config(red_box, tiny_teacher_folder, tmp_path)
    seen: list[int] = []
    result = pipe.refine(
        read_untrusted_mesh(red_box),
        "a blue vase",
        config=config,
        callback_on_step_end=lambda step, values: seen.append(step),
    )
    assert seen == [1, 2, 3]
    for name in ("x.glb", "x.obj", "x.ply"):
        np.testing.assert_allclose(_box_of(result.save(tmp_path / name)), _box_of(red_box), atol=1e-4)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--strength", "1.5"], "strength is 1.5; expected a number from 0 to 1"),
        (["--strength", "nan"], "strength is nan; expected a number from 0 to 1"),
        (["--texture", "--both"], "exclude each other"),
        (["--prompt", " "], "prompt"),
        (["--output", "IN"], "is the input itself"),
        (["--output", "out.fbx"], "use one of"),
    ],
)
def test_bad_orders_are_refused_before_anything_is_read(
    words: list[str],
    sentence: str,
    red_box: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = red_box.read_bytes()
    words = [str(red_box) if word == "IN" else word for word in words]
    assert cli.main(["refine", str(red_box), "--prompt", "a blue chair", *words]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1
    assert red_box.read_bytes() == before and not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["nothing", "points", "noise"])
def test_meshes_of_no_use_are_refused(
    content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "in.ply"
    if content == "points":
        trimesh.PointCloud(np.random.default_rng(0).random((20, 3))).export(path)
    elif content == "noise":
        path.write_bytes(bytes(range(256)))
    assert cli.main(["refine", str(path), "--prompt", "a blue chair"]) == 2
    error = capsys.readouterr().err
    assert "in.ply" in error and error.count("\n") == 1
    assert [item.name for item in tmp_path.iterdir()] == ([] if content == "nothing" else ["in.ply"])


def test_settings_survive_a_file(tmp_path: Path) -> None:
    config = RefineConfig(source=Path("a b.glb"), prompt="a red vase", part="both", strength=0.25)
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config))
    assert load_config(file, RefineConfig()) == config


def test_faded_colours_lose_their_hue_and_keep_their_contrast(red_box: Path) -> None:
    mesh = prepare_for_refine(read_untrusted_mesh(red_box)).mesh
    face = torch.arange(len(mesh.faces))
    middle = torch.full((len(face), 3), 1 / 3)

    def colours(fading: float) -> torch.Tensor:
        return SourceColour(mesh, by_face=True, fading=fading)(middle, face, middle)

    whole, half, none = (colours(fading) for fading in (0.0, 0.5, 1.0))
    chroma = [(c.max(dim=1).values - c.min(dim=1).values).max() for c in (whole, half, none)]
    assert chroma[0] > chroma[1] > 0.05 and chroma[2] < 1e-5
    weights = torch.tensor([0.299, 0.587, 0.114])
    is_light = whole @ weights > (whole @ weights).mean()
    assert none[is_light].min() > 0.5 > none[~is_light].max(), "green is lighter than red, as before"


BLUE = torch.tensor([0.1, 0.2, 0.8])


def _grey_box(red_box: Path) -> TextureStudent:
    """A box in greys, whose colours are to be found."""
    mesh = prepare_for_refine(read_untrusted_mesh(red_box)).mesh
    colour = FieldColour(RadianceField(resolutions=(8, 16)), SourceColour(mesh, by_face=True, fading=1.0))
    return TextureStudent(TextureConfig(), as_surface(mesh), colour)


def _blue_squares(num: int, rim: int) -> torch.Tensor:
    """Pictures [num, 3, 16, 16]: blue within a grey rim of so many pixels."""
    pictures = torch.full((num, 3, 16, 16), 0.7)
    pictures[:, :, rim:-rim, rim:-rim] = BLUE[:, None, None]
    return pictures


def _pixels_of(student: TextureStudent) -> torch.Tensor:
    """Colours [K, 3] of the mesh as seen from all sides."""
    with torch.no_grad():
        cameras = ring_cameras(4, elevation_deg=35.0)
        seen = student.renderer().render(cameras, 16, 0.0, colour=student.colour)
    return seen.image.permute(0, 2, 3, 1)[seen.opacity[:, 0] > 0.99]


def test_first_colours_are_those_of_the_pictures(red_box: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the teacher's pictures are blue, so is the mesh from all sides, before the first step."""
    student = _grey_box(red_box)
    monkeypatch.setattr(first_colours, "NUM_FIT_STEPS", 42)
    cameras = ring_cameras(3, elevation_deg=20.0)
    student.fit(cameras, _blue_squares(3, rim=1), torch.Generator().manual_seed(0))
    red, green, most = _pixels_of(student).median(dim=0).values
    assert most - max(red, green) > (BLUE[2] - BLUE[1]) / 2, "grey before; now most of the pictures' hue"
    assert not student.optimiser.state, "the stage's own optimiser starts fresh"


def test_backgrounds_of_pictures_do_not_colour_the_mesh(red_box: Path) -> None:
    student = _grey_box(red_box)
    before = _pixels_of(student)
    empty = torch.tensor([0.2, 0.7, 0.2])[:, None, None].expand(3, 3, 16, 16)
    cameras = ring_cameras(3, elevation_deg=20.0)
    student.fit(cameras, empty, torch.Generator().manual_seed(0))
    student.take_tint(student.renderer().render(cameras, 16, 0.7, colour=student.colour), empty)
    torch.testing.assert_close(_pixels_of(student), before, atol=0.01, rtol=0)


@pytest.mark.parametrize("rim", [1, 6])
def test_a_tint_colours_all_of_a_mesh_whatever_its_shape(red_box: Path, rim: int) -> None:
    student = _grey_box(red_box)
    before = _pixels_of(student)
    cameras = ring_cameras(3, elevation_deg=20.0)
    with torch.no_grad():
        seen = student.renderer().render(cameras, 16, 0.7, colour=student.colour)
    student.take_tint(seen, _blue_squares(2, rim))
    after = _pixels_of(student)
    assert (after[:, 2] > after[:, :2].amax(dim=1) + 0.2).float().mean() > 0.95
    torch.testing.assert_close(after.median(dim=0).values, BLUE, atol=0.1, rtol=0)
    lighter = before[:, 0] > before[:, 0].median()
    assert after[lighter].mean() > after[~lighter].mean() + 0.02, "light parts stay lighter"
    restored = _grey_box(red_box)
    restored.load_state_dict(student.state_dict())
    assert torch.equal(_pixels_of(restored), after)


def test_changing_colours_can_be_learned_from_any_base() -> None:
    """A black and a white mesh both reach mid grey: no colour is stuck at an end of the range."""
    for level in (0.0, 1.0):
        field = RadianceField(resolutions=(2,))
        colour = FieldColour(field, lambda p, f, b, level=level: torch.full_like(p, level))
        optimiser = torch.optim.Adam(field.colour_grids, lr=0.1)
        points = torch.zeros(1, 3)
        for _ in range(80):
            optimiser.zero_grad()
            (colour(points, points[:, 0].long(), points) - 0.5).square().sum().backward()
            optimiser.step()
        assert (colour(points, points[:, 0].long(), points) - 0.5).abs().max() < 0.05
