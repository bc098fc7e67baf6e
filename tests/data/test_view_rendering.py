"""From a folder of models to view shards and back: captions, masks, resuming, failures, roles."""

from __future__ import annotations

import json
import os
import zipfile
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import trimesh

from uni3d.data.asset_library import Asset, assign_roles, library_summary, load_asset, scan_assets
from uni3d.data.captions import canonical_caption
from uni3d.data.view_rendering import (
    EVALUATOR_VIEWS,
    TEACHER_VIEWS,
    ViewSettings,
    _run_all,
    render_asset,
    render_library,
)
from uni3d.data.view_shards import load_views
from uni3d.errors import UsageError
from uni3d.mesh.renderable import srgb_to_linear

TINY: ViewSettings = replace(TEACHER_VIEWS, num_views=4, size=32, supersample=1)


def write_box(path: Path, rgb: tuple[int, int, int], extents: tuple[float, float, float] = (1, 1, 1)) -> None:
    box = trimesh.creation.box(extents=extents)
    linear = srgb_to_linear(np.array(rgb) / 255)
    material = trimesh.visual.material.PBRMaterial(baseColorFactor=[*linear, 1.0], alphaMode="OPAQUE")
    box.visual = trimesh.visual.TextureVisuals(uv=np.zeros((len(box.vertices), 2)), material=material)
    path.write_bytes(trimesh.Scene(box).export(file_type="glb"))


@pytest.fixture
def library(tmp_path: Path) -> Path:
    folder = tmp_path / "models"
    folder.mkdir()
    write_box(folder / "RedCrate_01.glb", (200, 30, 30))
    write_box(folder / "blue_box.glb", (30, 60, 200), (2, 1, 1))
    (folder / "Broken_Chair.glb").write_bytes(b"glTF not really")
    return folder


def test_a_folder_becomes_views_with_captions_masks_and_cameras(library: Path, tmp_path: Path) -> None:
    report = render_library([library], tmp_path / "views", settings=TINY, num_workers=0)
    assert sorted(report.rendered) == ["models/RedCrate_01", "models/blue_box"]
    views = load_views(tmp_path / "views")
    assert views.images.shape == (8, 32, 32, 4)
    assert views.images.dtype == np.uint8
    assert views.main_masks.shape == (8, 32, 32)
    red = [i for i, record in enumerate(views.records) if record.asset_id == "models/RedCrate_01"]
    record = views.records[red[0]]
    assert canonical_caption(record) == "a red crate"
    np.testing.assert_allclose(record.main_colour, np.array([200, 30, 30]) / 255, atol=0.03)
    opaque = views.images[red][..., 3] == 255
    assert opaque.any()
    mean = views.images[red][..., :3][opaque].mean(axis=0)
    assert mean[0] > 2.5 * mean[1]
    assert (views.main_masks[red][opaque] == 255).mean() > 0.99
    assert all(2.0 <= r.radius <= 2.9 and r.fov_y_deg == 40 for r in views.records)


def test_what_fails_is_listed_with_its_reason(library: Path, tmp_path: Path) -> None:
    report = render_library([library], tmp_path / "views", settings=TINY, num_workers=0)
    assert [item.asset_id for item in report.failed] == ["models/Broken_Chair"]
    listed = json.loads((tmp_path / "views" / "failures.json").read_text())["failed"]
    assert "cut off" in listed[0]["reason"] or "header" in listed[0]["reason"]


def test_a_second_run_renders_only_what_is_missing(library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "views"
    first = render_library([library], folder, settings=TINY, num_workers=0)
    before = {path.name: path.read_bytes() for path in folder.glob("*.npz")}
    write_box(library / "green_barrel.glb", (40, 160, 50))
    second = render_library([library], folder, settings=TINY, num_workers=0)
    assert second.rendered == ["models/green_barrel"]
    assert set(second.already_done) == set(first.rendered)
    assert all((folder / name).read_bytes() == content for name, content in before.items())
    assert len({record.asset_id for record in load_views(folder).records}) == 3


def test_other_settings_are_not_mixed_into_a_folder(library: Path, tmp_path: Path) -> None:
    render_library([library], tmp_path / "views", settings=TINY, num_workers=0)
    with pytest.raises(UsageError, match="quality"):
        render_library([library], tmp_path / "views", settings=replace(TINY, quality=50), num_workers=0)


def test_runs_are_deterministic_and_processes_change_nothing(library: Path, tmp_path: Path) -> None:
    render_library([library], tmp_path / "one", settings=TINY, num_workers=0)
    render_library([library], tmp_path / "two", settings=TINY, num_workers=2)
    one, two = load_views(tmp_path / "one"), load_views(tmp_path / "two")
    order = [[r.asset_id for r in v.records] for v in (one, two)]
    rows = [np.argsort(ids, kind="stable") for ids in order]
    np.testing.assert_array_equal(one.images[rows[0]], two.images[rows[1]])


def test_a_slow_asset_is_given_up(library: Path, tmp_path: Path) -> None:
    hasty = replace(TINY, time_limit_s=1e-4)
    report = render_library([library], tmp_path / "views", settings=hasty, num_workers=0)
    assert not report.rendered
    assert any("longer than" in item.reason for item in report.failed)


class _KillsItsProcess:
    """Stands for a file that crashes a native reader: unpickling it in a worker ends that worker."""

    def __reduce__(self) -> tuple[object, tuple[int]]:
        return os._exit, (1,)


@pytest.mark.slow
def test_an_asset_that_kills_its_process_is_found_and_listed() -> None:
    vases, _ = scan_assets(["procedural:vases:2"])
    killer = replace(vases[0], asset_id="bad/asset", tags=(_KillsItsProcess(),))  # pyright: ignore
    outcomes = {a.asset_id: outcome for a, outcome in _run_all([vases[0], killer, vases[1]], TINY, 1, 2)}
    assert len(outcomes) == 3
    assert isinstance(outcomes["bad/asset"], str)
    assert "killed" in outcomes["bad/asset"]
    assert all(len(outcomes[v.asset_id]) == TINY.num_views for v in vases)


def test_metadata_table_names_assets(library: Path, tmp_path: Path) -> None:
    (library / "metadata.csv").write_text(
        "path,name,noun,creator,licence,tags\nblue_box.glb,Toy Chest,treasure chest,Ann,CC-BY-4.0,toy;wood\n"
    )
    assets, _ = scan_assets([library])
    chest = next(a for a in assets if a.asset_id == "models/blue_box")
    assert (chest.name, chest.noun, chest.creator, chest.tags) == (
        "toy chest",
        "treasure chest",
        "Ann",
        ("toy", "wood"),
    )
    summary = library_summary(assets)
    assert summary["licences"]["CC-BY-4.0"]["creators"] == {"Ann": 1}
    with pytest.raises(UsageError, match="no metadata table"):
        scan_assets([library], metadata=tmp_path / "missing.csv")


def test_a_metadata_table_that_has_no_effect_is_mentioned(
    library: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table = tmp_path / "names.csv"
    table.write_text("path,name\nblue_box.glb,toy chest\n")
    assets, _ = scan_assets(["procedural:vases:2", library], metadata=table)
    assert "toy chest" in {asset.name for asset in assets}
    (warning,) = caplog.messages
    assert "has no effect on 'procedural:vases:2'" in warning
    scan_assets(["procedural:vases:2"])
    assert len(caplog.messages) == 1


def test_a_zip_archive_is_a_library_too(library: Path, tmp_path: Path) -> None:
    archive = tmp_path / "pack.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.write(library / "blue_box.glb", "things/blue_box.glb")
    assets, _ = scan_assets([archive])
    assert [a.asset_id for a in assets] == ["things/blue_box"]
    mesh = load_asset(assets[0])
    extent = np.ptp(mesh.vertices, axis=0)
    np.testing.assert_allclose(extent, [1, 0.5, 0.5], atol=1e-5)


def test_a_furniture_catalogue_is_read(tmp_path: Path) -> None:
    catalogue = tmp_path / "shop.sh3f"
    entries = (
        "license=Creative Commons Attribution 3.0 license\n"
        "id#1=Shop#chair\nname#1=Chair\ntags#1=Seat, Kitchen\ncategory#1=Kitchen\nmodel#1=/shop/chair.obj\n"
        "width#1=40\nheight#1=80\ndepth#1=40\ncreator#1=Ann\n"
        "id#2=Shop#plug\nname#2=Square type G plug\nmodel#2=/shop/plug.obj\n"
    )
    obj = trimesh.creation.box().export(file_type="obj")
    with zipfile.ZipFile(catalogue, "w") as file:
        file.writestr("PluginFurnitureCatalog.properties", entries)
        file.writestr("shop/chair.obj", obj)
    assets, skipped = scan_assets([catalogue])
    assert [(a.name, a.noun, a.licence, a.creator) for a in assets] == [
        ("chair", "chair", "CC-BY-3.0", "Ann")
    ]
    assert len(skipped) == 1
    np.testing.assert_allclose(np.ptp(load_asset(assets[0]).vertices, axis=0), [0.5, 1, 0.5], atol=1e-5)


def test_roles_are_deterministic_and_hold_out_enough() -> None:
    assets = [
        Asset(f"a/{noun}_{i}", f"{noun} {i}", noun)
        for noun, n in (("chair", 30), ("pot", 6), ("key", 3), ("cat", 2), ("ox", 1))
        for i in range(n)
    ]
    roles = {a.asset_id: a.role for a in assign_roles(assets)}
    assert roles == {a.asset_id: a.role for a in assign_roles(assets[::-1])}
    counts: dict[str, list[str]] = defaultdict(list)
    for key, role in roles.items():
        counts[key.split("/")[1].split("_")[0]].append(role)
    assert counts["ox"] == ["both"]
    assert sorted(counts["cat"]) == ["evaluator", "teacher"]
    assert sorted(counts["key"]) == ["evaluator", "teacher", "teacher"]
    assert sorted(counts["pot"]) == ["evaluator"] * 3 + ["neither"] + ["teacher"] * 2
    assert sorted(counts["chair"]) == ["evaluator"] * 14 + ["neither"] * 3 + ["teacher"] * 13


def test_roles_select_what_is_rendered_and_loaded(tmp_path: Path) -> None:
    assets = ["procedural:vases:6"]
    render_library(assets, tmp_path / "views", settings=TINY, roles=["evaluator"], num_workers=0)
    views = load_views(tmp_path / "views", roles=["evaluator"])
    assert len(views) == 3 * TINY.num_views
    assert load_views(tmp_path / "views", limit=3).images.shape[0] == 3
    with pytest.raises(UsageError):
        load_views(tmp_path / "views", roles=["teacher"])


def test_only_what_the_evaluator_trains_on_varies_in_shape(tmp_path: Path) -> None:
    vases, _ = scan_assets(["procedural:vases:1"])
    varied = replace(TINY, num_shapes=2, views_per_shape=3)
    for role in ("evaluator", "both", "teacher", "neither"):
        asset = replace(vases[0], role=role)
        plain, views = render_asset(asset, TINY, 1), render_asset(asset, varied, 1)
        num_extra = 6 if role in ("evaluator", "both") else 0
        assert len(views) == TINY.num_views + num_extra
        assert [view.image for view in views[: TINY.num_views]] == [view.image for view in plain]
        assert [v.image for v in views] == [v.image for v in render_asset(asset, varied, 1)]
        assert len({view.image for view in views}) == len(views)
    assert TEACHER_VIEWS.num_shapes == 0 < EVALUATOR_VIEWS.num_shapes


def test_a_folder_of_before_shapes_varied_goes_on(library: Path, tmp_path: Path) -> None:
    folder = tmp_path / "views"
    render_library([library], folder, settings=TINY, num_workers=0)
    file = folder / "render_settings.json"
    older = {k: v for k, v in json.loads(file.read_text()).items() if "shape" not in k and "dev" not in k}
    file.write_text(json.dumps(older))
    assert not render_library([library], folder, settings=TINY, num_workers=0).rendered
    with pytest.raises(UsageError, match="num_shapes"):
        render_library([library], folder, settings=replace(TINY, num_shapes=1), num_workers=0)


def test_damaged_and_missing_shards_are_user_errors(library: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no view shards"):
        load_views(tmp_path)
    render_library([library], tmp_path / "views", settings=TINY, num_workers=0)
    shard = next((tmp_path / "views").glob("*.npz"))
    shard.write_bytes(shard.read_bytes()[:300])
    with pytest.raises(UsageError, match="damaged"):
        load_views(tmp_path / "views")


def test_bad_paths_are_user_errors(tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("no model")
    for path in (tmp_path / "missing", tmp_path / "x.txt", tmp_path, "procedural:vases:many"):
        with pytest.raises(UsageError):
            scan_assets([path])
