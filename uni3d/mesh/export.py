"""Textured meshes into files: GLB first; OBJ, PLY, STL and USDZ on request.

The last step of the mesh room. The exported object is Y up with its front towards +Z, centred in the unit
box unless its writer says otherwise, its node has no transform, and the file carries where it came from.
Files appear whole or not at all. Legend: V vertices, F faces.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uni3d.errors import UsageError
from uni3d.mesh.glb_writer import check_mesh, json_text, write_bytes, write_glb
from uni3d.mesh.renderable import unit_vectors
from uni3d.mesh.surface import face_normals
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.outputs import MESH_SUFFIXES, obj_companions
from uni3d.training.checkpoint import atomic_write

__all__ = ["TexturedMesh", "write_glb", "write_mesh", "write_obj", "write_ply", "write_stl"]


def write_mesh(
    mesh: TexturedMesh,
    path: str | Path,
    extras: dict[str, Any] | None = None,
    *,
    unlit: bool | None = None,
    unit_box: bool = True,
) -> Path:
    """Write `mesh` in the format of the suffix of `path` (`outputs.MESH_SUFFIXES`); UsageError for another.

    unlit: see `glb_writer.py`. unit_box: centre the object and make its longest side 1; False leaves it where
    it is, as for a mesh that was brought back to its place (`repair.Placement`).
    """
    match Path(path).suffix.lower():
        case ".glb":
            return write_glb(mesh, path, extras, unlit=unlit, unit_box=unit_box)
        case ".obj":
            return write_obj(mesh, path, extras, unit_box=unit_box)
        case ".ply":
            return write_ply(mesh, path, extras, unit_box=unit_box)
        case ".stl":
            return write_stl(mesh, path, unit_box=unit_box)
        case ".usdz":
            from uni3d.mesh.usd_writer import write_usdz

            placed, extras = _placed(mesh, extras, unit_box)
            return write_usdz(placed, path, extras)
        case suffix:
            raise UsageError(
                f"cannot write a mesh as '{suffix or Path(path).name}'; use {', '.join(MESH_SUFFIXES)}"
            )


def _placed(
    mesh: TexturedMesh, extras: dict[str, Any] | None, unit_box: bool
) -> tuple[TexturedMesh, dict[str, Any]]:
    """The mesh as it is written, and the extras with its placement: scene = file * scale + centre."""
    check_mesh(mesh)
    centre, scale = np.zeros(3), 1.0
    if unit_box:
        mesh, centre, scale = mesh.in_unit_box()
    return mesh, (extras or {}) | {"scene_scale": scale, "scene_centre": [float(v) for v in centre]}


def write_obj(
    mesh: TexturedMesh, path: str | Path, extras: dict[str, Any] | None = None, *, unit_box: bool = True
) -> Path:
    """Write a Wavefront OBJ with a material library and a PNG of the same name beside it; returns the OBJ's
    path.

    Y up; the extras and the placement become comment lines. The OBJ comes last, so that whoever sees it
    finds the other two.
    """
    path = Path(path)
    mesh, placed = _placed(mesh, extras, unit_box)
    library, picture = obj_companions(path)
    # illum 0: the colour as it is, without lights
    material = f"newmtl surface\nKa 0 0 0\nKd 1 1 1\nKs 0 0 0\nillum 0\nmap_Kd {picture.name}\n"
    lines = [f"# {key}: {json_text(value)}" for key, value in placed.items()]
    lines += [f"mtllib {library.name}", f"o {library.stem}"]
    lines += [f"v {x:.7g} {y:.7g} {z:.7g}" for x, y, z in mesh.vertices.tolist()]
    lines += [f"vt {u:.7g} {1 - v:.7g}" for u, v in mesh.uv.tolist()]
    lines += [f"vn {x:.5g} {y:.5g} {z:.5g}" for x, y, z in mesh.normals.tolist()]
    lines += ["usemtl surface"]
    lines += [f"f {a}/{a}/{a} {b}/{b}/{b} {c}/{c}/{c}" for a, b, c in (mesh.faces + 1).tolist()]
    text = "\n".join(lines) + "\n"
    atomic_write(picture, lambda temporary: Image.fromarray(mesh.texture).save(temporary, format="PNG"))
    atomic_write(library, lambda temporary: temporary.write_text(material, encoding="utf-8"))
    return atomic_write(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_ply(
    mesh: TexturedMesh, path: str | Path, extras: dict[str, Any] | None = None, *, unit_box: bool = True
) -> Path:
    """Write a binary PLY with one sRGB colour per vertex, without texture and seams. Y up."""
    mesh, placed = _placed(mesh, extras, unit_box)
    positions, first, welded = np.unique(mesh.vertices, axis=0, return_index=True, return_inverse=True)
    layout = [("x", "<f4"), ("y", "<f4"), ("z", "<f4"), ("nx", "<f4"), ("ny", "<f4"), ("nz", "<f4")]
    layout += [("red", "u1"), ("green", "u1"), ("blue", "u1")]
    rows = np.zeros(len(positions), layout)
    for index, axis in enumerate("xyz"):
        rows[axis], rows[f"n{axis}"] = positions[:, index], mesh.normals[first, index]
    for index, channel in enumerate(("red", "green", "blue")):
        rows[channel] = mesh.vertex_colours()[first, index]
    triangles = np.zeros(len(mesh.faces), [("count", "u1"), ("index", "<i4", 3)])
    triangles["count"], triangles["index"] = 3, welded.reshape(-1)[mesh.faces]
    header = ["ply", "format binary_little_endian 1.0"]
    # PLY headers are ASCII
    header += [f"comment {key}: {json_text(value, ascii_only=True)}" for key, value in placed.items()]
    header += [f"element vertex {len(rows)}"]
    header += [f"property {'uchar' if kind == 'u1' else 'float'} {key}" for key, kind in layout]
    header += [f"element face {len(triangles)}", "property list uchar int vertex_indices", "end_header"]
    content = ("\n".join(header) + "\n").encode("ascii") + rows.tobytes() + triangles.tobytes()
    return write_bytes(path, content)


def write_stl(mesh: TexturedMesh, path: str | Path, *, unit_box: bool = True) -> Path:
    """Write a binary STL: triangles and their normals alone, as printers take them. Y up."""
    mesh, _ = _placed(mesh, None, unit_box)
    corners = mesh.vertices[mesh.faces]
    rows = np.zeros(len(corners), [("normal", "<f4", 3), ("corners", "<f4", (3, 3)), ("unused", "<u2")])
    rows["normal"] = unit_vectors(face_normals(mesh.vertices, mesh.faces))
    rows["corners"] = corners
    # a header that began with "solid" would announce the text format
    header = b"uni3d, binary STL, Y up".ljust(80, b"\0")
    return write_bytes(path, header + struct.pack("<I", len(rows)) + rows.tobytes())
