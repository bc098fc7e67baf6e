"""What is asked of a mesh file, and what is only said about it: the figures of a report against limits.

The limits are the defaults of the Khronos asset auditor (3D Commerce guidelines) and a few of ours on what a
person would see. Whether a surface must be closed, of one piece or in the unit box depends on the object: a
sheet is open, a swarm has many pieces. That is information.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from uni3d.mesh.texture_measures import MIN_GUTTER_SHARE

# Khronos asset auditor.
MAX_FILE_BYTES = 5120 * 1024
MAX_TRIANGLES = 100_000
MAX_MATERIALS = 5
TEXTURE_SIZES = (512, 2048)
LUMINANCE_RANGE = (30.0, 243.0)
# ours
MIN_LARGEST_AREA_FRACTION = 0.98
MAX_OVERLAP_FRACTION = 1e-4
MAX_MIRRORED_FRACTION = 0.01
MAX_GUTTER_ERROR = 24.0

Kind = Literal["limit", "information"]


@dataclass(frozen=True)
class Check:
    """One thing that was looked at: `trouble` is a sentence, "" if there is none."""

    name: str
    kind: Kind
    trouble: str


def checks_of(report: dict[str, Any]) -> list[Check]:
    """All checks of a report by `report.mesh_report`, in the order in which they are shown."""
    if not report["finite"]:
        return [Check("finite", "limit", "some vertices are not finite numbers")]
    return [*_geometry_checks(report), *_file_checks(report), *_texture_checks(report)]


def _check(name: str, kind: Kind, is_wrong: bool, sentence: str) -> Check:
    return Check(name, kind, sentence if is_wrong else "")


def _geometry_checks(report: dict[str, Any]) -> list[Check]:
    behind = f"{100 * report['seen_from_behind']:.0f} % of what is seen from outside is the back of faces"
    return [
        Check("finite", "limit", ""),
        _check(
            "closed",
            "information",
            not report["closed"],
            f"the surface is not closed ({report['open_edges']} open edges)",
        ),
        _check(
            "outward",
            "limit",
            not report["outward"],
            f"the faces look inward (signed volume {report['signed_volume']:.3g}; {behind})",
        ),
        _check(
            "one piece",
            "information",
            report["largest_area_fraction"] < MIN_LARGEST_AREA_FRACTION,
            f"the surface falls into {report['components']} pieces, "
            f"the largest has {100 * report['largest_area_fraction']:.0f} % of the area",
        ),
        _check(
            "manifold",
            "information",
            report["non_manifold_edges"] > 0,
            f"{report['non_manifold_edges']} edges have more than two faces",
        ),
        _check(
            "faces with area",
            "information",
            report["degenerate_faces"] > 0,
            f"{report['degenerate_faces']} triangles have no area",
        ),
        _check(
            "in the unit box",
            "information",
            not report["in_unit_box"],
            "the object is not centred in the unit box",
        ),
        _check(
            "triangles",
            "limit",
            report["triangles"] > MAX_TRIANGLES,
            f"{report['triangles']} triangles are more than {MAX_TRIANGLES}",
        ),
        _check(
            "materials",
            "limit",
            report["materials"] > MAX_MATERIALS,
            f"{report['materials']} materials are more than {MAX_MATERIALS}",
        ),
    ]


def _file_checks(report: dict[str, Any]) -> list[Check]:
    checks: list[Check] = []
    if "file_bytes" in report:
        is_large = report["file_bytes"] > MAX_FILE_BYTES
        sentence = f"the file has {report['file_bytes']} bytes, more than {MAX_FILE_BYTES}"
        checks.append(_check("file size", "limit", is_large, sentence))
    if isinstance(report.get("gltf_validator"), dict):
        found = report["gltf_validator"]
        sentence = f"glTF-Validator found {found['errors']} errors and {found['warnings']} warnings"
        sentence += f" ({'; '.join(found['messages'])})" if found["messages"] else ""
        checks.append(_check("glTF-Validator", "limit", found["errors"] + found["warnings"] > 0, sentence))
    return checks


def _texture_checks(report: dict[str, Any]) -> list[Check]:
    sizes = report["picture_sizes"]
    smallest, largest = TEXTURE_SIZES
    odd = [f"{w} x {h}" for w, h in sizes if w & (w - 1) or h & (h - 1)]
    outside = [f"{w} x {h}" for w, h in sizes if min(w, h) < smallest or max(w, h) > largest]
    checks = []
    if sizes:
        checks = [
            _check(
                "texture power of two",
                "limit",
                bool(odd),
                f"the texture's size {', '.join(odd[:3])} is no power of two",
            ),
            _check(
                "texture size",
                "limit",
                bool(outside),
                f"the texture's size {', '.join(outside[:3])} is outside of {smallest} to {largest}",
            ),
        ]
    if report["texture_size"] is None:
        return checks
    mirrored = report["uv_mirrored_fraction"]
    checks += [
        _check(
            "texture coordinates",
            "limit",
            not report["uv_in_range"],
            "texture coordinates lie outside of [0, 1]",
        ),
        _check(
            "charts not mirrored",
            "limit",
            mirrored > MAX_MIRRORED_FRACTION,
            f"{100 * mirrored:.0f} % of the texture is mirrored",
        ),
    ]
    return checks + (_atlas_checks(report) if report["uv_coverage"] is not None else [])


def _atlas_checks(report: dict[str, Any]) -> list[Check]:
    gutter, needed = report["gutter_texels"], round(MIN_GUTTER_SHARE * max(report["texture_size"]))
    (dark, bright), (low, high) = report["luminance"], LUMINANCE_RANGE
    # The range is one of reflectances. Unlit colours hold the light as well: there it is an oddity when all
    # of them are outside.
    is_outside = (bright < low or dark > high) if report["unlit"] else (dark < low or bright > high)
    return [
        _check(
            "charts do not overlap",
            "limit",
            report["uv_overlap_fraction"] > MAX_OVERLAP_FRACTION,
            f"texture coordinates overlap on {report['uv_overlap_texels']} texels",
        ),
        _check(
            "gutter filled",
            "limit",
            report["gutter_error"] > MAX_GUTTER_ERROR,
            "the texture beside the charts does not continue them, so background bleeds into seams "
            f"({report['gutter_error']:.0f} of 255)",
        ),
        _check(
            "gutter width",
            "limit",
            gutter is not None and gutter < needed // 2,
            f"charts are {gutter} texels apart, fewer than {needed // 2}",
        ),
        _check(
            "luminance",
            "information" if report["unlit"] else "limit",
            is_outside,
            f"the colours' luminance ({dark:.0f} to {bright:.0f}) is outside of {low:.0f} to {high:.0f}",
        ),
    ]
