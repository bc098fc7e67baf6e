"""What a mesh file is worth: the measurements behind `uni3d inspect` and the check after every export.

Two questions. Is the file sound (`mesh_report`): closed, outward, one piece, texture without overlaps and
bleeding background, within the limits that shops and engines put on assets? And does it show what the field
showed (`compare_with_field`)? Legend: F faces, S texture size, B views.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage, sparse
from torch import Tensor

from uni3d.mesh.atlas_raster import rasterise
from uni3d.mesh.raycaster import RenderableMesh, load_renderable
from uni3d.mesh.surface import component_labels, face_areas, open_edge_count, signed_volumes
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.scene.regularisers import fog_fraction

Images = Tensor | NDArray[np.floating]

# Limits of the Khronos 3D Commerce asset guidelines, the defaults of its asset auditor.
MAX_FILE_BYTES = 5120 * 1024
MAX_TRIANGLES = 100_000
MAX_MATERIALS = 5
TEXTURE_SIZES = (512, 2048)
LUMINANCE_RANGE = (30.0, 243.0)
# ours: pieces, overlaps and bleeding that a person would see
MIN_LARGEST_AREA_FRACTION = 0.98
MAX_OVERLAP_FRACTION = 1e-4
MIN_GUTTER_SHARE = 8 / 1024
MAX_GUTTER_ERROR = 24.0

# a silhouette this good and colours this close: the mesh is what was rendered
GOOD_IOU, GOOD_PSNR_DB = 0.90, 20.0
MAX_FOG_FRACTION = 0.10


def mesh_report(source: str | Path | TexturedMesh | RenderableMesh) -> dict[str, Any]:
    """Measure a GLB, OBJ or PLY file, or a mesh in memory; the values are plain JSON.

    Geometry, on vertices welded by position: triangles, vertices, open_edges, closed, outward (signed
    volume positive), signed_volume, components, largest_area_fraction, extent, centre, in_unit_box, finite.
    File: file_bytes, extras (GLB), materials. Texture, of the material with the most triangles:
    texture_size, texture_power_of_two, uv_in_range, uv_coverage (share of the texture on triangles),
    uv_overlap_texels, uv_overlap_fraction, uv_mirrored_fraction (area), charts, gutter_texels (smallest
    distance between charts), gutter_error (how far texels beside charts stray from the charts' colours, in
    display levels, 90th percentile), luminance (1st and 99th percentile); None where there is no texture.
    problems: one sentence for each thing that is wrong; sound: there is none.

    Raises UsageError for a file that cannot be read.
    """
    file_facts: dict[str, Any] = {}
    if isinstance(source, str | Path):
        path = Path(source)
        mesh = load_renderable(path, max_texture=8192)
        file_facts = {"path": str(path), "file_bytes": path.stat().st_size}
        if path.suffix.lower() == ".glb":
            file_facts["extras"] = read_extras(path)
    else:
        mesh = source.as_renderable() if isinstance(source, TexturedMesh) else source
    report = file_facts | _geometry(mesh) | _texture(mesh)
    report["problems"] = _problems(report)
    report["sound"] = not report["problems"]
    return report


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


def _geometry(mesh: RenderableMesh) -> dict[str, Any]:
    used = mesh.vertices[mesh.faces.reshape(-1)]
    is_finite = bool(np.isfinite(used).all())
    if not is_finite:
        return {
            "triangles": len(mesh.faces),
            "materials": len(np.unique(mesh.face_material)),
            "finite": False,
        }
    positions, welded = np.unique(used, axis=0, return_inverse=True)
    faces = welded.reshape(-1, 3).astype(np.int64)
    areas = face_areas(positions, faces)
    low, high = positions.min(axis=0).astype(np.float64), positions.max(axis=0).astype(np.float64)
    extent = float((high - low).max())
    num_components, label = component_labels(faces, len(positions))
    by_component = np.bincount(label, weights=areas, minlength=num_components)
    volume = float(signed_volumes(positions - (low + high) / 2, faces).sum())
    open_edges = open_edge_count(faces)
    return {
        "triangles": len(faces),
        "vertices": len(positions),
        "materials": len(np.unique(mesh.face_material)),
        "finite": True,
        "open_edges": open_edges,
        "closed": open_edges == 0,
        "signed_volume": volume,
        "outward": volume > 0,
        "components": num_components,
        "largest_area_fraction": float(by_component.max() / max(float(areas.sum()), 1e-30)),
        "extent": [float(value) for value in high - low],
        "centre": [float(value) for value in (low + high) / 2],
        "in_unit_box": bool(abs(extent - 1) < 1e-3 and np.abs(low + high).max() < 2e-3),
    }


def _texture(mesh: RenderableMesh) -> dict[str, Any]:
    keys = "texture_size texture_power_of_two uv_in_range uv_coverage uv_overlap_texels uv_overlap_fraction"
    keys += " uv_mirrored_fraction charts gutter_texels gutter_error luminance"
    nothing: dict[str, Any] = dict.fromkeys(keys.split())
    counts = np.bincount(mesh.face_material, minlength=len(mesh.materials))
    main = int(np.argmax(counts))
    texture = mesh.materials[main].texture
    if texture is None or mesh.corner_uv is None:
        return nothing
    chosen = mesh.face_material == main
    uv = mesh.corner_uv[chosen].astype(np.float64)
    height, width = texture.shape[:2]
    facts = nothing | {
        "texture_size": [width, height],
        "texture_power_of_two": not (width & (width - 1)) and not (height & (height - 1)),
        "uv_in_range": bool((uv >= -1e-6).all() and (uv <= 1 + 1e-6).all()),
        "uv_mirrored_fraction": _mirrored_fraction(uv),
    }
    if not facts["uv_in_range"] or not np.isfinite(uv).all():
        return facts
    # rasterised at the texture's own size (the longer side, if it is not square)
    size = max(width, height)
    texel, face, _, overlap = rasterise(uv * size, size, margin=0.0)
    chart = _charts(mesh.vertices[mesh.faces[chosen]], uv)
    chart_of_texel = np.full(size * size, -1, np.int64)
    chart_of_texel[texel] = chart[face]
    square = texture[..., :3] if width == height else _stretch(texture[..., :3], size)
    covered = (chart_of_texel >= 0).reshape(size, size)
    luminance = 255 * (square[covered] @ np.array([0.2126, 0.7152, 0.0722])) if covered.any() else np.zeros(1)
    return facts | {
        "uv_coverage": float(covered.mean()),
        "uv_overlap_texels": overlap,
        "uv_overlap_fraction": overlap / max(len(texel), 1),
        "charts": int(chart.max()) + 1,
        "gutter_texels": _gutter(chart_of_texel.reshape(size, size)),
        "gutter_error": _gutter_error(square, covered),
        "luminance": [float(value) for value in np.quantile(luminance, (0.01, 0.99))],
    }


def _mirrored_fraction(uv: NDArray[np.float64]) -> float:
    """Share of the area in texture space whose picture is mirrored on the object."""
    first, second = uv[:, 1] - uv[:, 0], uv[:, 2] - uv[:, 0]
    # v points down, so a triangle that is counter-clockwise from outside has negative area in (u, v)
    area = first[:, 0] * second[:, 1] - first[:, 1] * second[:, 0]
    return float(np.maximum(area, 0).sum() / max(float(np.abs(area).sum()), 1e-30))


def _charts(corners: NDArray[np.floating], uv: NDArray[np.float64]) -> NDArray[np.int64]:
    """Chart of each face: faces that share a corner in space and in the texture hang together."""
    num = len(uv)
    both = np.concatenate([corners.reshape(-1, 3), uv.reshape(-1, 2)], axis=1).astype(np.float32)
    corner = np.unique(both, axis=0, return_inverse=True)[1].reshape(-1)
    rows, columns = np.repeat(np.arange(num), 3), corner + num
    links = sparse.coo_matrix(
        (np.ones(len(rows), np.int8), (rows, columns)), shape=(num + int(corner.max()) + 1,) * 2
    )
    label = sparse.csgraph.connected_components(links, directed=False)[1][:num]
    return np.unique(label, return_inverse=True)[1].reshape(-1).astype(np.int64)


def _gutter(chart: NDArray[np.int64]) -> int | None:
    """Smallest number of free texels between two charts along a path; None with fewer than two charts."""
    if len(np.unique(chart[chart >= 0])) < 2:
        return None
    transform: Any = ndimage.distance_transform_edt(chart < 0, return_indices=True)
    distance, nearest = transform
    owner = chart[tuple(nearest)]
    smallest = np.inf
    for axis in (0, 1):
        here = [slice(None)] * 2
        there = [slice(None)] * 2
        here[axis], there[axis] = slice(None, -1), slice(1, None)
        differs = owner[tuple(here)] != owner[tuple(there)]
        between = (distance[tuple(here)] + distance[tuple(there)])[differs]
        smallest = min(smallest, float(between.min(initial=np.inf)))
    return int(smallest)


def _gutter_error(texture: NDArray[np.floating], covered: NDArray[np.bool_]) -> float:
    """How far the texels beside the charts stray from the charts' own colours, in display levels.

    90th percentile over the texels within the gutter, each against the nearest one on a chart.
    Smaller mip levels mix these texels into the object: hardly anything if they continue it, far if they are
    background.
    """
    reach = max(2, round(MIN_GUTTER_SHARE * len(covered)))
    transform: Any = ndimage.distance_transform_edt(~covered, return_indices=True)
    distance, nearest = transform
    beside = (distance > 0) & (distance <= reach)
    if not covered.any() or not beside.any():
        return 0.0
    own = texture[tuple(index[beside] for index in nearest)]
    return float(np.quantile(np.abs(texture[beside] - own).max(axis=-1) * 255, 0.9))


def _stretch(texture: NDArray[np.floating], size: int) -> NDArray[np.floating]:
    """Nearest-neighbour resize to a square, so that uv * size finds the right texel."""
    rows = np.arange(size) * texture.shape[0] // size
    columns = np.arange(size) * texture.shape[1] // size
    return texture[rows][:, columns]


def _problems(report: dict[str, Any]) -> list[str]:
    """One sentence for each measurement out of its limits."""
    if not report["finite"]:
        return ["some vertices are not finite numbers"]
    checks: list[tuple[bool, str]] = [
        (not report["closed"], f"the surface is not closed ({report['open_edges']} open edges)"),
        (not report["outward"], f"the faces look inward (signed volume {report['signed_volume']:.3g})"),
        (
            report["largest_area_fraction"] < MIN_LARGEST_AREA_FRACTION,
            f"the surface falls into {report['components']} pieces, "
            f"the largest has {100 * report['largest_area_fraction']:.0f} % of the area",
        ),
        (
            report["triangles"] > MAX_TRIANGLES,
            f"{report['triangles']} triangles are more than {MAX_TRIANGLES}",
        ),
        (
            report["materials"] > MAX_MATERIALS,
            f"{report['materials']} materials are more than {MAX_MATERIALS}",
        ),
        (not report["in_unit_box"], "the object is not centred in the unit box"),
        (
            report.get("file_bytes", 0) > MAX_FILE_BYTES,
            f"the file has {report.get('file_bytes', 0)} bytes, more than {MAX_FILE_BYTES}",
        ),
    ]
    return [sentence for is_wrong, sentence in checks if is_wrong] + _texture_problems(report)


def _texture_problems(report: dict[str, Any]) -> list[str]:
    size = report["texture_size"]
    if size is None:
        return []
    low, high = LUMINANCE_RANGE
    smallest, largest = TEXTURE_SIZES
    checks = [
        (not report["texture_power_of_two"], f"the texture's size {size[0]} x {size[1]} is no power of two"),
        (
            min(size) < smallest or max(size) > largest,
            f"the texture's size {size[0]} x {size[1]} is outside of {smallest} to {largest}",
        ),
        (not report["uv_in_range"], "texture coordinates lie outside of [0, 1]"),
        (
            report["uv_mirrored_fraction"] > 0.01,
            f"{100 * report['uv_mirrored_fraction']:.0f} % of the texture is mirrored",
        ),
    ]
    if report["uv_coverage"] is not None:
        gutter, needed = report["gutter_texels"], round(MIN_GUTTER_SHARE * max(size))
        dark, bright = report["luminance"]
        checks += [
            (
                report["uv_overlap_fraction"] > MAX_OVERLAP_FRACTION,
                f"texture coordinates overlap on {report['uv_overlap_texels']} texels",
            ),
            (
                report["gutter_error"] > MAX_GUTTER_ERROR,
                "the texture beside the charts does not continue them, so background bleeds into seams "
                f"({report['gutter_error']:.0f} of 255)",
            ),
            (
                gutter is not None and gutter < needed // 2,
                f"charts are {gutter} texels apart, fewer than {needed // 2}",
            ),
            (
                bright < low or dark > high,
                f"the colours' luminance ({dark:.0f} to {bright:.0f}) is outside of {low:.0f} to {high:.0f}",
            ),
        ]
    return [sentence for is_wrong, sentence in checks if is_wrong]
