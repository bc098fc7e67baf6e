"""GLB files into triangles with base colours.

Read here rather than through a scene library because three details decide whether an asset looks right:
skinned meshes must be posed by their joints, Draco buffers decoded, and linear material factors turned into
display colours.
Legend: V vertices, F faces.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from uni3d.errors import MissingPackageError
from uni3d.mesh.glb_container import GlbContainer, normalised
from uni3d.mesh.renderable import (
    Material,
    RenderableMesh,
    TriangleSoup,
    linear_to_srgb,
    opaque_glass,
    srgb_to_linear,
    texture_pixels,
    unit_vectors,
)


def _glb_materials(glb: GlbContainer, max_texture: int) -> tuple[list[Material], list[int]]:
    """Materials and the texture coordinate set each one uses; one white default at the end."""
    images: dict[int, np.ndarray] = {}
    materials: list[Material] = []
    uv_sets: list[int] = []
    for spec in glb.json.get("materials", []):
        pbr = spec.get("pbrMetallicRoughness", {})
        factor = np.asarray(pbr.get("baseColorFactor", [1, 1, 1, 1]), dtype=np.float32)
        alpha_mode = spec.get("alphaMode", "OPAQUE")
        texture, uv_set = None, 0
        if "baseColorTexture" in pbr:
            reference = pbr["baseColorTexture"]
            uv_set = reference.get("texCoord", 0)
            source = glb.texture_source(reference["index"])
            if source not in images:
                images[source] = texture_pixels(glb.picture(source), max_texture)
            texture = images[source]
            if (factor[:3] != 1).any():
                texture = texture.copy()
                texture[..., :3] = linear_to_srgb(srgb_to_linear(texture[..., :3]) * factor[:3])
            if alpha_mode == "OPAQUE" and texture[..., 3].min() < 1:
                texture = texture.copy()
                texture[..., 3] = 1
            colour = np.ones(4, dtype=np.float32)
        else:
            emitted = np.asarray(spec.get("emissiveFactor", [0, 0, 0]), dtype=np.float32)
            alpha = float(factor[3]) if alpha_mode == "BLEND" else 1.0
            colour = np.array([*linear_to_srgb(factor[:3] + emitted), alpha], dtype=np.float32)
        materials.append(Material(opaque_glass(colour), texture, str(spec.get("name", ""))))
        uv_sets.append(int(uv_set))
    # glTF 2.0, section 3.9: no material means the default one, whose base colour is white
    materials.append(Material(np.ones(4, dtype=np.float32)))
    uv_sets.append(0)
    return materials, uv_sets


def _node_matrices(document: dict[str, Any]) -> dict[int, np.ndarray]:
    """World matrix [4, 4] of every node that the default scene shows."""
    nodes = document.get("nodes", [])
    scenes = document.get("scenes") or [{"nodes": list(range(len(nodes)))}]
    world: dict[int, np.ndarray] = {}
    pending = [(index, np.eye(4)) for index in scenes[document.get("scene", 0)].get("nodes", [])]
    while pending:
        index, parent = pending.pop()
        if index in world:
            raise ValueError("the node hierarchy holds a cycle")
        world[index] = parent @ _local_matrix(nodes[index])
        pending.extend((child, world[index]) for child in nodes[index].get("children", []))
    return world


def _local_matrix(node: dict[str, Any]) -> np.ndarray:
    if "matrix" in node:
        return np.asarray(node["matrix"], dtype=np.float64).reshape(4, 4).T
    x, y, z, w = node.get("rotation", [0.0, 0.0, 0.0, 1.0])
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    matrix = np.eye(4)
    matrix[:3, :3] = rotation * np.asarray(node.get("scale", [1, 1, 1]), dtype=np.float64)
    matrix[:3, 3] = node.get("translation", [0, 0, 0])
    return matrix


def _draco_reader(
    glb: GlbContainer, primitive: dict[str, Any]
) -> tuple[np.ndarray, Callable[[str], np.ndarray | None]]:
    try:
        import DracoPy
    except ImportError as error:
        raise MissingPackageError("this GLB is Draco-compressed; install DracoPy to read it") from error
    extension = primitive["extensions"]["KHR_draco_mesh_compression"]
    data = glb.buffer_view(extension["bufferView"])
    try:
        decoded: Any = DracoPy.decode(data)
    except Exception as error:  # its exceptions share no base class
        raise ValueError(f"the Draco data cannot be decoded: {error}") from error
    faces = np.asarray(decoded.faces, dtype=np.int64).reshape(-1, 3)

    def read(name: str) -> np.ndarray | None:
        if name not in extension["attributes"]:
            return None
        values = np.asarray(decoded.get_attribute_by_unique_id(extension["attributes"][name])["data"])
        accessor = primitive["attributes"].get(name)
        is_normalised = accessor is not None and glb.json["accessors"][accessor].get("normalized")
        return normalised(values) if is_normalised else values

    return faces, read


def _plain_reader(
    glb: GlbContainer, primitive: dict[str, Any]
) -> tuple[np.ndarray, Callable[[str], np.ndarray | None]]:
    attributes = primitive["attributes"]
    if "indices" in primitive:
        indices = glb.accessor(primitive["indices"]).astype(np.int64).reshape(-1)
    else:
        indices = np.arange(glb.count(attributes["POSITION"]), dtype=np.int64)
    faces = _triangles(indices, primitive.get("mode", 4))
    return faces, lambda name: glb.accessor(attributes[name]) if name in attributes else None


def _triangles(indices: np.ndarray, mode: int) -> np.ndarray:
    """Triangle list, strip (5) or fan (6) as [F, 3]."""
    if mode == 5:
        faces = np.stack([indices[:-2], indices[1:-1], indices[2:]], axis=1)
        faces[1::2] = faces[1::2][:, ::-1]
        return faces
    if mode == 6:
        return np.stack([np.full(len(indices) - 2, indices[0]), indices[1:-1], indices[2:]], axis=1)
    return indices[: len(indices) // 3 * 3].reshape(-1, 3)


def _skin_matrices(glb: GlbContainer, skin: dict[str, Any], world: dict[int, np.ndarray]) -> np.ndarray:
    """Joint matrices [J, 4, 4] of the default pose (glTF 2.0, section 3.7.3)."""
    joints = skin["joints"]
    inverse_bind = np.tile(np.eye(4), (len(joints), 1, 1))
    if "inverseBindMatrices" in skin:
        inverse_bind = glb.accessor(skin["inverseBindMatrices"]).reshape(-1, 4, 4).transpose(0, 2, 1)
    return np.stack([world.get(joint, np.eye(4)) @ inverse_bind[row] for row, joint in enumerate(joints)])


def read_glb(content: bytes, max_texture: int, soup: TriangleSoup) -> tuple[RenderableMesh, GlbContainer]:
    """All triangles of the default scene in the default pose, gathered in `soup`, and the container they were
    in; damage raises what Python raises."""
    glb = GlbContainer(content)
    materials, uv_sets = _glb_materials(glb, max_texture)
    world = _node_matrices(glb.json)
    for index, matrix in world.items():
        node = glb.json["nodes"][index]
        if "mesh" not in node:
            continue
        for primitive in glb.json["meshes"][node["mesh"]]["primitives"]:
            if primitive.get("mode", 4) not in (4, 5, 6):
                # points and lines have no surface
                soup.num_points += glb.count(primitive["attributes"]["POSITION"])
                continue
            is_draco = "KHR_draco_mesh_compression" in primitive.get("extensions", {})
            faces, read = (_draco_reader if is_draco else _plain_reader)(glb, primitive)
            positions, normals = read("POSITION"), read("NORMAL")
            if positions is None:
                continue
            material = primitive.get("material", len(materials) - 1)
            joints, weights = read("JOINTS_0"), read("WEIGHTS_0")
            if "skin" in node and joints is not None and weights is not None:
                pose = _skin_matrices(glb, glb.json["skins"][node["skin"]], world)
                weights = weights / np.maximum(weights.sum(axis=1, keepdims=True), 1e-9)
                blended = np.einsum("vj,vjrc->vrc", weights, pose[joints.astype(np.int64)])
            else:
                blended = np.broadcast_to(matrix, (len(positions), 4, 4))
            linear = blended[:, :3, :3]
            positions = np.einsum("vrc,vc->vr", linear, positions) + blended[:, :3, 3]
            if normals is not None:
                # Cofactors rather than an inverse: defined for flattened (singular) matrices as well.
                cofactor = np.stack(
                    [np.cross(linear[:, (r + 1) % 3], linear[:, (r + 2) % 3]) for r in range(3)], axis=1
                )
                normals = unit_vectors(np.einsum("vrc,vc->vr", cofactor, normals))
            colour = _vertex_colours(read("COLOR_0"))
            soup.add(positions, faces, material, normals, read(f"TEXCOORD_{uv_sets[material]}"), colour)
    return soup.mesh(materials), glb


def _vertex_colours(values: np.ndarray | None) -> np.ndarray | None:
    """[V, 4] sRGB. Exporters that leave an all-black colour attribute behind mean none."""
    if values is None:
        return None
    values = normalised(values)
    if values[:, :3].mean() < 0.01:
        return None
    rgb = linear_to_srgb(values[:, :3])
    return np.concatenate([rgb, np.ones((len(rgb), 1), np.float32)], axis=1).astype(np.float32)
