"""What a mesh file is worth: the measurements behind `uni3d inspect` and the check after every export.

Two questions. Is the file sound (`mesh_report`): closed, outward, one piece, texture without overlaps and
bleeding background, within the limits that shops and engines put on assets? And does it show what the field
showed (`compare_with_field`)? Legend: B views.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from uni3d.mesh.geometry_measures import measure_geometry
from uni3d.mesh.gltf_validator import validate_glb
from uni3d.mesh.mesh_checks import checks_of
from uni3d.mesh.mesh_files import MeshFile, load_mesh_file, load_renderable
from uni3d.mesh.mesh_input import read_untrusted_file
from uni3d.mesh.renderable import RenderableMesh
from uni3d.mesh.texture_measures import measure_textures
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.scene.regularisers import fog_fraction

Images = Tensor | NDArray[np.floating]

# A file's textures are measured at most this large; their own size is judged.
MEASURED_TEXTURE = 4096

# a silhouette this good and colours this close: the mesh is what was rendered
GOOD_IOU, GOOD_PSNR_DB = 0.90, 20.0
MAX_FOG_FRACTION = 0.10


def mesh_report(source: str | Path | TexturedMesh | RenderableMesh | MeshFile) -> dict[str, Any]:
    """Measure a mesh file of ours, what was read from a stranger's, or a mesh in memory; plain JSON.

    Geometry, on vertices welded by position: triangles, vertices, open_edges, closed, components,
    largest_area_fraction, non_manifold_edges, degenerate_faces, signed_volume, seen_from_behind (share of
    what is seen from outside that is the back of faces), outward, bounds, extent, centre, in_unit_box,
    finite. File: file_bytes, extras (GLB), materials, picture_sizes, unlit (the material's colours hold the
    light; taken for granted in memory). Texture, the worst over all of them: texture_size (of the one on most
    faces, as measured), texture_power_of_two, uv_in_range, uv_coverage (share of the texture on triangles),
    uv_overlap_texels, uv_overlap_fraction, uv_mirrored_fraction (area), charts, gutter_texels (smallest
    distance between charts), gutter_error (how far texels beside charts stray from the charts' colours, in
    display levels, 90th percentile), luminance (1st and 99th percentile); None where there is no texture.

    limits, information: each check by name, "kept" or a sentence (`mesh_checks.py` says which is which);
    missed: the sentences of limits; problems: all sentences; sound: there is none.

    Raises UsageError for a file that cannot be read.
    """
    facts: dict[str, Any] = {}
    if isinstance(source, str | Path):
        path = Path(source)
        facts = {"path": str(path), "file_bytes": path.stat().st_size if path.is_file() else 0}
        source = load_mesh_file(path, max_texture=MEASURED_TEXTURE)
        if path.suffix.lower() == ".glb":
            facts["extras"] = source.extras
    mesh = source.as_renderable() if isinstance(source, TexturedMesh) else source
    file = mesh if isinstance(mesh, MeshFile) else MeshFile(mesh, _picture_sizes(mesh), is_unlit=True)
    report = facts | measure_geometry(file.mesh) | measure_textures(file.mesh)
    report["picture_sizes"] = [list(size) for size in file.picture_sizes]
    report["degenerate_faces"] = report.get("degenerate_faces", 0) + file.num_dropped
    report["unlit"] = file.is_unlit
    return judged(report)


def judged(report: dict[str, Any]) -> dict[str, Any]:
    """The figures of a report with what its checks say; see `mesh_report`."""
    checks = checks_of(report)
    for kind, name in (("limit", "limits"), ("information", "information")):
        report[name] = {check.name: check.trouble or "kept" for check in checks if check.kind == kind}
    report["missed"] = [check.trouble for check in checks if check.trouble and check.kind == "limit"]
    report["problems"] = [check.trouble for check in checks if check.trouble]
    report["sound"] = not report["problems"]
    return report


def inspect_file(path: str | Path) -> dict[str, Any]:
    """`mesh_report` of a file by anybody, read within limits, with what glTF-Validator says about a GLB.

    Raises UsageError for a file that is refused (`mesh_input.py`).
    """
    path = Path(path)
    file = read_untrusted_file(path)
    report = mesh_report(file)
    facts: dict[str, Any] = {"path": str(path), "file_bytes": path.stat().st_size}
    if path.suffix.lower() == ".glb":
        facts |= {"extras": file.extras, "gltf_validator": validate_glb(path)}
    if file.missing:
        facts["missing_files"] = list(file.missing)
    return judged(facts | report)


def _picture_sizes(mesh: RenderableMesh) -> tuple[tuple[int, int], ...]:
    textures = [material.texture for material in mesh.materials if material.texture is not None]
    return tuple((texture.shape[1], texture.shape[0]) for texture in textures)


def read_extras(path: str | Path) -> dict[str, Any]:
    """`asset.extras` of a GLB file, {} where there is none."""
    with open(path, "rb") as file:
        header = file.read(20)
        length = struct.unpack("<I", header[12:16])[0] if len(header) == 20 else 0
        try:
            document = json.loads(file.read(length).decode("utf-8"))
            extras = document["asset"].get("extras", {})
        except (ValueError, KeyError, TypeError, AttributeError):
            return {}
    return extras if isinstance(extras, dict) else {}


def load_in_scene(path: str | Path) -> RenderableMesh:
    """An exported GLB where its field was: the placement in its extras undone (none: left as it is)."""
    extras = read_extras(path) if Path(path).suffix.lower() == ".glb" else {}
    matrix = np.eye(4)
    matrix[:3, :3] *= float(extras.get("scene_scale", 1.0))
    matrix[:3, 3] = np.asarray(extras.get("scene_centre", (0.0, 0.0, 0.0)), dtype=np.float64)
    return load_renderable(path).transformed(matrix)


def compare_with_field(
    mesh_images: Images,
    field_images: Images,
    mesh_alpha: Images,
    field_alpha: Images,
) -> dict[str, Any]:
    """Compare renders of the mesh with renders of the field it was cut from, from the same cameras.

    images float [B, H, W, 3] in [0, 1], both over the same background; alpha float [B, H, W], the mesh's
    coverage and the field's opacity. Colours are compared where both are more than half opaque, silhouettes
    at one half.

    Returns psnr_db; silhouette_iou (mean over views) and worst_silhouette_iou; fog_fraction (share of the
    field's silhouette whose opacity lies between 0.1 and 0.9); verdict "match" or "mismatch"; explanation,
    one sentence.
    """
    colour_a, colour_b = _array(mesh_images), _array(field_images)
    alpha_a, alpha_b = _array(mesh_alpha), _array(field_alpha)
    solid_a, solid_b = alpha_a > 0.5, alpha_b > 0.5
    both, either = solid_a & solid_b, solid_a | solid_b
    # a view that shows nothing in either stack agrees
    iou = np.where(
        either.any(axis=(1, 2)), both.sum(axis=(1, 2)) / np.maximum(either.sum(axis=(1, 2)), 1), 1.0
    )
    error = ((colour_a - colour_b) ** 2).mean(axis=-1)[both]
    psnr = float(-10 * np.log10(max(float(error.mean()), 1e-10))) if error.size else 0.0
    fog = fog_fraction(alpha_b)
    figures = {
        "psnr_db": psnr,
        "silhouette_iou": float(iou.mean()),
        "worst_silhouette_iou": float(iou.min()),
        "fog_fraction": fog,
    }
    trouble = []
    if figures["silhouette_iou"] < GOOD_IOU:
        size = "large" if solid_a.sum() > solid_b.sum() else "small"
        trouble.append(
            f"its silhouette is too {size} (intersection over union {figures['silhouette_iou']:.2f})"
        )
    if psnr < GOOD_PSNR_DB:
        trouble.append(f"its colours differ ({psnr:.1f} dB)")
    if trouble and fog > MAX_FOG_FRACTION:
        trouble.append(f"the field is foggy ({100 * fog:.0f} % of its silhouette is half transparent)")
    if trouble:
        explanation = "the mesh does not show what the field showed: " + "; ".join(trouble)
    else:
        explanation = f"silhouette IoU {figures['silhouette_iou']:.2f}, colours {psnr:.1f} dB"
    return figures | {"verdict": "mismatch" if trouble else "match", "explanation": explanation}


def _array(values: Images) -> NDArray[np.float64]:
    values = values.detach().cpu().numpy() if isinstance(values, Tensor) else values
    return np.asarray(values, dtype=np.float64)
