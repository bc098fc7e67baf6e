"""The body of the UV unwrapping process: reads a surface from one .npz file and writes its atlas to another.

Run as a script by `unwrap.py`, which can end it when it takes too long. It imports nothing of this package,
so that it starts fast, and its working arrays leave memory with it.
"""

from __future__ import annotations

import sys

import numpy as np


def main(source: str, target: str, size: int, padding: int) -> None:
    """Unwrap vertices, normals, faces of `source`; write vertex_of [U], uv [U, 2] in texels, faces."""
    import xatlas

    with np.load(source, allow_pickle=False) as surface:
        vertices, normals, faces = surface["vertices"], surface["normals"], surface["faces"]
    atlas = xatlas.Atlas()
    atlas.add_mesh(vertices, faces, normals)
    charts, packing = xatlas.ChartOptions(), xatlas.PackOptions()
    # A second pass over the charts costs as much as the first one and changes them by a few per cent.
    charts.max_iterations = 1
    charts.fix_winding = True
    packing.resolution = size
    packing.padding = padding
    packing.create_image = False
    # xatlas turns charts by swapping their axes, which mirrors the picture on them
    packing.rotate_charts = False
    atlas.generate(charts, packing)
    if atlas.atlas_count != 1:
        raise SystemExit(f"xatlas made {atlas.atlas_count} atlases instead of one")
    vertex_of, corners, uv = atlas[0]
    extent = np.array([atlas.width, atlas.height], dtype=np.float32)
    np.savez(target, vertex_of=vertex_of, uv=uv * extent, faces=corners)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
