"""Which side of its faces a mesh shows to the outside, and how to turn them so that it is the front.

Signed volume answers this for one closed body alone; foreign meshes are open, of several bodies, or wound at
random, so here rays from all around vote. Legend: V vertices, F faces, H half-edges (three per face).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy import sparse

from uni3d.mesh.raycaster import Raycaster
from uni3d.mesh.renderable import Material, RenderableMesh
from uni3d.mesh.surface import Faces, Floats, face_normals
from uni3d.scene.camera import Cameras

# seven directions on each of three circles, and the poles
AZIMUTHS = [(360.0 * index / 7) % 360.0 - 180.0 for index in range(7)]
ELEVATIONS = (-40.0, 5.0, 50.0)
VIEW_PIXELS = 96


def side_votes(vertices: Floats, faces: Faces) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """How often rays from outside meet the front and the back of each face: two counts int64 [F].

    Cameras stand around the bounding box; a face that is hidden from all of them has no votes.
    """
    mesh = RenderableMesh(
        vertices=vertices,
        faces=faces,
        corner_normals=None,
        corner_uv=None,
        corner_colour=None,
        face_material=np.zeros(len(faces), np.int64),
        materials=[Material(np.ones(4, np.float32))],
    ).in_unit_box()
    normals, anchors = face_normals(mesh.vertices, faces), mesh.vertices[faces[:, 0]]
    azimuth = [angle for _ in ELEVATIONS for angle in AZIMUTHS] + [0.0, 0.0]
    elevation = [angle for angle in ELEVATIONS for _ in AZIMUTHS] + [89.0, -89.0]
    caster = Raycaster(mesh)
    front, back = np.zeros(len(faces), np.int64), np.zeros(len(faces), np.int64)
    cameras = Cameras.from_lists(azimuth, elevation)
    for index in range(len(cameras)):
        camera = cameras[index : index + 1]
        eye = (camera.axes()[2][0] * camera.radius[0]).numpy()
        face = caster.render(camera, VIEW_PIXELS, supersample=1).hit_face
        is_front = np.einsum("nc,nc->n", normals[face], eye - anchors[face]) > 0
        front += np.bincount(face[is_front], minlength=len(faces))
        back += np.bincount(face[~is_front], minlength=len(faces))
    return front, back


def oriented_outward(vertices: Floats, faces: Faces) -> tuple[Faces, NDArray[np.bool_]]:
    """The faces wound alike within each patch and each patch with its front outside; and which were turned.

    A patch is what hangs together over edges of exactly two faces. A patch that no ray meets, such as the
    wall of a cavity, keeps the side it had; one that cannot be wound alike (a Moebius strip) is left alone.
    """
    turned, patch = consistent_winding(faces)
    front, back = side_votes(vertices, faces)
    outside = np.where(turned, back, front).astype(np.float64) - np.where(turned, front, back)
    is_inside_out = np.bincount(patch, weights=outside) < 0
    turned = turned ^ is_inside_out[patch]
    return np.where(turned[:, None], faces[:, ::-1], faces), turned


def consistent_winding(faces: Faces) -> tuple[NDArray[np.bool_], NDArray[np.int64]]:
    """Which faces [F] to turn so that neighbours run along their common edge in opposite directions, as few
    as possible, and the patch [F] of each face.

    Every face enters a graph twice, as it is and turned, linked to the state of its neighbour that agrees.
    An orientable patch falls into two mirror images there, a Moebius strip hangs together.
    """
    num = len(faces)
    first, second, is_same = _neighbours(faces)
    # node f: face f as it is; node f + num: turned
    rows = np.concatenate([first, first + num])
    columns = np.concatenate([second + num * is_same, second + num * ~is_same])
    links = sparse.coo_matrix((np.ones(len(rows), np.int8), (rows, columns)), shape=(2 * num,) * 2)
    label = sparse.csgraph.connected_components(links, directed=False)[1]
    plain, mirrored = label[:num], label[num:]
    patch = np.unique(np.minimum(plain, mirrored), return_inverse=True)[1].reshape(-1).astype(np.int64)
    turned = plain > mirrored
    is_mostly_turned = np.bincount(patch, weights=turned) > np.bincount(patch) / 2
    can_turn = plain != mirrored
    return (turned ^ is_mostly_turned[patch]) & can_turn, patch


def _neighbours(faces: Faces) -> tuple[Faces, Faces, NDArray[np.bool_]]:
    """Pairs of faces with a common edge that no third face has, and whether both run along it alike."""
    start, end = faces.reshape(-1), np.roll(faces, -1, axis=1).reshape(-1)
    edge = np.minimum(start, end) * (int(faces.max()) + 1) + np.maximum(start, end)
    order = np.argsort(edge, kind="stable")
    _, where, count = np.unique(edge[order], return_index=True, return_counts=True)
    one = order[where[count == 2]]
    other = order[where[count == 2] + 1]
    return one // 3, other // 3, start[one] == start[other]


def non_manifold_edges(faces: Faces) -> int:
    """Edges of three or more faces."""
    edges = np.sort(np.stack([faces, np.roll(faces, -1, axis=1)], axis=2).reshape(-1, 2), axis=1)
    count = np.unique(edges[:, 0] * (int(faces.max()) + 1) + edges[:, 1], return_counts=True)[1]
    return int(np.sum(count > 2))
