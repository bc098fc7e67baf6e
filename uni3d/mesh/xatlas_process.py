"""The body of the UV unwrapping process: reads a surface from one .npz file and writes its atlas to another.

Run as a script by `unwrap.py`, which can end it when it takes too long. It imports nothing of this package,
so that it starts fast, and its working arrays leave memory with it.
"""

from __future__ import annotations

import os
import sys

import numpy as np

MAX_CORES = 4


def use_few_cores() -> None:
    """Keep this process to a few cores, others than its neighbours take.

    xatlas starts a thread for every core it may use, and they wait for work by spinning: on 32 cores it was
    not done after 20 s with surfaces that take 3 s on two.
    """
    if not hasattr(os, "sched_setaffinity"):  # not on macOS and Windows
        return
    cores = sorted(os.sched_getaffinity(0))
    first = os.getpid() * MAX_CORES % len(cores)
    os.sched_setaffinity(0, (cores[first:] + cores[:first])[:MAX_CORES])


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
    use_few_cores()
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
