"""Meshes to images, differentiably: which face each pixel sees, where on it, and antialiased silhouettes.

    fragments = rasterise(vertices, faces, cameras, 512, 512)
    colour = interpolate(vertex_colours, faces, fragments)
    maps = torch.cat([colour, fragments.coverage], dim=1)
    maps = antialias(maps, fragments, faces)

Which face is visible has no gradient. Everything else has: barycentric coordinates and depth move with the
vertices inside a surface, antialiasing moves silhouettes. Pixel centres, axes and depth are those of
`Cameras.rays`, the volume renderer and the ray caster. On a CPU, images and gradients are bitwise the same
in every run; on a GPU the gradients' atomic additions may differ in the last bits.
Legend: B cameras, C channels, V vertices, F faces, H W pixels.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from types import ModuleType

import torch
from torch import Tensor

from uni3d.errors import MissingPackageError, UsageError
from uni3d.mesh import edge_functions
from uni3d.mesh.antialias import MeshEdges, blend_silhouettes, mesh_edges
from uni3d.mesh.edge_functions import gather_rows, spread_rows
from uni3d.scene.camera import Cameras

__all__ = [
    "BACKENDS",
    "Fragments",
    "MeshEdges",
    "antialias",
    "choose_backend",
    "interpolate",
    "mesh_edges",
    "rasterise",
]

BACKENDS = ("auto", "torch", "triton", "nvdiffrast")


@dataclass(frozen=True)
class Fragments:
    """What each pixel centre sees.

    `face` int32 [B, H, W], -1 for none. `barycentric` float32 [B, H, W, 3]: weights of the face's corners on
    the surface (perspective correct). `depth` float32 [B, H, W]: distance from the camera along the pixel's
    unit ray in scene units, as in `RenderOutput`. The last two have gradient in the vertices and are 0 where
    nothing is seen. `backend`: the one that made them.
    """

    face: Tensor
    barycentric: Tensor
    depth: Tensor
    backend: str
    projected: Tensor
    """The vertices in homogeneous pixels [B, V, 3], with their gradient."""
    view_depth: Tensor
    """[B, H, W] along the viewing axis, without gradient; counts only where a face is seen."""

    @property
    def coverage(self) -> Tensor:
        """1 where a face is seen, else 0, float [B, 1, H, W]; antialiased it is the opacity."""
        return (self.face >= 0)[:, None].to(self.barycentric.dtype)


def choose_backend(name: str, device: torch.device) -> tuple[str, str]:
    """The backend that `name` means for tensors on `device`, and why.

    "torch" runs everywhere and is made for the CPU, "triton" for CUDA devices. "nvdiffrast" is never chosen
    by "auto": its licence allows non-commercial use only, so whoever sets it has to accept that licence.
    Raises UsageError for a name that is not in `BACKENDS`.
    """
    if name not in BACKENDS:
        raise UsageError(f"unknown rasteriser {name[:80]!r}; expected one of {', '.join(BACKENDS)}")
    if name != "auto":
        return name, "asked for"
    if device.type != "cuda":
        return "torch", f"the vertices are on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "torch", "the vertices are on a CUDA device, but triton is not installed"
    return "triton", "the vertices are on a CUDA device"


def rasterise(
    vertices: Tensor, faces: Tensor, cameras: Cameras, height: int, width: int, *, backend: str = "auto"
) -> Fragments:
    """Find what each pixel of `height` x `width` images sees of a mesh.

    Args:
        vertices: float32 [V, 3] in world space (float64 is computed in float64, but for visibility).
        faces: int [F, 3], both sides visible; F may be 0.
        cameras: on the device of the vertices.
        backend: one of `BACKENDS`, see `choose_backend`.

    Faces nearer than a thousandth of a scene unit, without area, or with vertices that are not finite are
    not seen; a face that reaches behind the camera is seen where it lies before it. Raises UsageError for
    other shapes or types, MissingPackageError for a backend that is not installed.
    """
    _check_mesh(vertices, faces)
    if height < 1 or width < 1:
        raise UsageError(f"an image needs at least 1 x 1 pixels, got {height} x {width}")
    name, _ = choose_backend(backend, vertices.device)
    if faces.shape[0] == 0:
        return _empty_fragments(vertices, (len(cameras), height, width), name)
    projected, faces = cameras.project(vertices, height, width), faces.long()
    with torch.no_grad():
        face = _passes(name).visible_faces(projected.detach().float(), faces, height, width)
    kernels = _kernels(name, projected)
    barycentric, view_depth = (kernels or edge_functions).hit_points(projected, faces, face)
    depth = view_depth * cameras.ray_lengths(height, width).to(view_depth.dtype)
    return Fragments(face, barycentric, depth, name, projected, view_depth.detach())


def interpolate(attributes: Tensor, faces: Tensor, fragments: Fragments) -> Tensor:
    """Attributes at what each pixel sees, [B, C, H, W], 0 where nothing is seen.

    attributes: float [V, C], per vertex, or [F, 3, C], per corner of each face. The gradient reaches the
    attributes and, through the barycentric coordinates, the vertices.
    """
    if attributes.ndim not in (2, 3) or (attributes.ndim == 3 and attributes.shape[:2] != faces.shape):
        raise UsageError(f"attributes must be [V, C] or [F, 3, C], got {list(attributes.shape)}")
    shape = (*fragments.face.shape, attributes.shape[-1])
    if faces.shape[0] == 0:
        return (attributes.new_zeros(shape) + 0 * fragments.depth[..., None]).permute(0, 3, 1, 2)
    kernels = _kernels(fragments.backend, fragments.barycentric, attributes)
    if kernels is not None:
        return kernels.interpolated(attributes, faces, fragments.face, fragments.barycentric)
    face = spread_rows(fragments.face, faces.shape[0])
    if attributes.ndim == 3:
        row = face[..., None] * 3 + torch.arange(3, device=face.device)
    else:
        row = faces.long()[face]
    corners = gather_rows(attributes.reshape(-1, attributes.shape[-1]), row, fragments.face >= 0)
    return (corners * fragments.barycentric[..., None]).sum(-2).permute(0, 3, 1, 2)


def antialias(
    image: Tensor, fragments: Fragments, faces: Tensor, *, edges: MeshEdges | None = None
) -> Tensor:
    """`image` [B, C, H, W] with antialiased silhouettes, whose gradient reaches the vertices of `fragments`.

    Finding the silhouettes is most of the work: put all maps of a render into the channels of one call.
    `edges`: of `mesh_edges(faces)`, which spares sorting the faces when they stay the same. A pixel with
    silhouettes on several sides (a feature thinner than two pixels) can leave the range of its neighbours.
    The fragments must come from the same faces. Raises UsageError if the sizes differ.
    """
    if image.ndim != 4 or (image.shape[0], *image.shape[2:]) != tuple(fragments.face.shape):
        got, expected = list(image.shape), list(fragments.face.shape)
        raise UsageError(
            f"the image is {got}, the fragments are {expected}; expected [B, C, H, W], [B, H, W]"
        )
    if faces.shape[0] == 0:
        return image
    edges = mesh_edges(faces) if edges is None else edges
    projected, face, view_depth = fragments.projected, fragments.face, fragments.view_depth
    kernels = _kernels(fragments.backend, image, projected)
    if kernels is not None:
        return kernels.blend_silhouettes(image, projected, edges, face, view_depth)
    view_depth = torch.where(face >= 0, view_depth.float(), torch.inf)
    return blend_silhouettes(image, projected, edges, face, view_depth, _passes(fragments.backend))


def _check_mesh(vertices: Tensor, faces: Tensor) -> None:
    if vertices.ndim != 2 or vertices.shape[1] != 3 or not vertices.dtype.is_floating_point:
        raise UsageError(f"vertices must be float [V, 3], got {vertices.dtype} {list(vertices.shape)}")
    if faces.ndim != 2 or faces.shape[1] != 3 or faces.dtype.is_floating_point:
        raise UsageError(f"faces must be integer [F, 3], got {faces.dtype} {list(faces.shape)}")


def _passes(backend: str) -> ModuleType:
    """The module with `visible_faces` and `crossing_edges`; imported only when asked for."""
    if backend == "torch":
        from uni3d.mesh import rasteriser_torch as passes
    elif backend == "triton":
        try:
            from uni3d.mesh import rasteriser_triton as passes
        except ImportError as error:
            raise MissingPackageError(
                "the rasteriser triton needs the package triton, which comes with CUDA builds of torch; "
                "install it or use torch"
            ) from error
    else:
        from uni3d.mesh import rasteriser_nvdiffrast as passes
    return passes


def _kernels(backend: str, *values: Tensor) -> ModuleType | None:
    """The module of Triton kernels with gradients, for float32 and its backend."""
    if backend != "triton" or any(value.dtype != torch.float32 for value in values):
        return None
    from uni3d.mesh import surface_kernels

    return surface_kernels


def _empty_fragments(vertices: Tensor, shape: tuple[int, int, int], backend: str) -> Fragments:
    """Nothing seen, with a zero gradient, so that a loss on it can still run backwards."""
    nothing = vertices.sum() * 0
    return Fragments(
        face=torch.full(shape, -1, dtype=torch.int32, device=vertices.device),
        barycentric=vertices.new_zeros(*shape, 3) + nothing,
        depth=vertices.new_zeros(shape) + nothing,
        backend=backend,
        projected=vertices.new_zeros(shape[0], *vertices.shape),
        view_depth=vertices.new_zeros(shape),
    )
