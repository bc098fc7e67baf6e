"""Textured meshes as USDZ, the package that iPhones and USD pipelines open; needs usd-core (`pxr`)."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from uni3d.errors import MissingPackageError, Uni3DError
from uni3d.mesh.glb_writer import check_mesh, json_text
from uni3d.mesh.textured_mesh import TexturedMesh
from uni3d.outputs import USD_IS_MISSING
from uni3d.training.checkpoint import atomic_write


def write_usdz(mesh: TexturedMesh, path: str | Path, extras: dict[str, Any]) -> Path:
    """Write one USDZ package with a mesh, a preview surface and a PNG, and return its path.

    Y up, metres, where the mesh is. UsdPreviewSurface has no word for unlit colours, so the material is
    diffuse without metal or gloss. The extras are JSON text in the layer's custom data. Raises
    MissingPackageError without usd-core.
    """
    try:
        from pxr import UsdUtils  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingPackageError(f"writing '{path}' {USD_IS_MISSING}") from error
    check_mesh(mesh)

    def write(temporary: Path) -> None:
        with tempfile.TemporaryDirectory(prefix="uni3d-usd-") as folder:
            layer = Path(folder) / "mesh.usdc"
            Image.fromarray(mesh.texture).save(layer.with_name("colour.png"))
            _write_stage(mesh, layer, extras)
            if not UsdUtils.CreateNewUsdzPackage(str(layer), str(temporary)):
                raise Uni3DError(f"usd-core could not make the package '{path}'; write a .glb instead")

    return atomic_write(path, write)


def _write_stage(mesh: TexturedMesh, layer: Path, extras: dict[str, Any]) -> None:
    from pxr import Usd, UsdGeom, UsdShade, Vt  # pyright: ignore[reportMissingImports]

    stage = Usd.Stage.CreateNew(str(layer))
    UsdGeom.SetStageUpAxis(stage, UsdGeom.Tokens.y)
    UsdGeom.SetStageMetersPerUnit(stage, 1.0)
    root = UsdGeom.Xform.Define(stage, "/object")
    stage.SetDefaultPrim(root.GetPrim())
    stage.GetRootLayer().customLayerData = {"uni3d": json_text(extras)}
    geometry = UsdGeom.Mesh.Define(stage, "/object/mesh")
    low, high = mesh.vertices.min(axis=0), mesh.vertices.max(axis=0)
    geometry.CreateExtentAttr(Vt.Vec3fArray.FromNumpy(np.stack([low, high]).astype(np.float32)))
    geometry.CreatePointsAttr(Vt.Vec3fArray.FromNumpy(np.ascontiguousarray(mesh.vertices, np.float32)))
    geometry.CreateNormalsAttr(Vt.Vec3fArray.FromNumpy(np.ascontiguousarray(mesh.normals, np.float32)))
    geometry.SetNormalsInterpolation(UsdGeom.Tokens.vertex)
    geometry.CreateFaceVertexCountsAttr(Vt.IntArray.FromNumpy(np.full(len(mesh.faces), 3, np.int32)))
    geometry.CreateFaceVertexIndicesAttr(Vt.IntArray.FromNumpy(mesh.faces.reshape(-1).astype(np.int32)))
    geometry.CreateSubdivisionSchemeAttr(UsdGeom.Tokens.none)
    # v points up in USD
    st = np.stack([mesh.uv[:, 0], 1.0 - mesh.uv[:, 1]], axis=1).astype(np.float32)
    coordinates = UsdGeom.PrimvarsAPI(geometry).CreatePrimvar("st", _types().TexCoord2fArray, "vertex")
    coordinates.Set(Vt.Vec2fArray.FromNumpy(st))
    UsdShade.MaterialBindingAPI.Apply(geometry.GetPrim()).Bind(_material(stage))
    stage.GetRootLayer().Save()


def _material(stage: Any) -> Any:
    """A preview surface with the texture as its diffuse colour."""
    from pxr import UsdShade  # pyright: ignore[reportMissingImports]

    types = _types()
    material = UsdShade.Material.Define(stage, "/object/material")
    reader = UsdShade.Shader.Define(stage, "/object/material/coordinates")
    reader.CreateIdAttr("UsdPrimvarReader_float2")
    reader.CreateInput("varname", types.String).Set("st")
    texture = UsdShade.Shader.Define(stage, "/object/material/texture")
    texture.CreateIdAttr("UsdUVTexture")
    texture.CreateInput("file", types.Asset).Set("colour.png")
    texture.CreateInput("sourceColorSpace", types.Token).Set("sRGB")
    for wrap in ("wrapS", "wrapT"):
        texture.CreateInput(wrap, types.Token).Set("clamp")
    texture.CreateInput("st", types.Float2).ConnectToSource(reader.CreateOutput("result", types.Float2))
    surface = UsdShade.Shader.Define(stage, "/object/material/surface")
    surface.CreateIdAttr("UsdPreviewSurface")
    surface.CreateInput("diffuseColor", types.Color3f).ConnectToSource(
        texture.CreateOutput("rgb", types.Float3)
    )
    surface.CreateInput("roughness", types.Float).Set(1.0)
    surface.CreateInput("metallic", types.Float).Set(0.0)
    material.CreateSurfaceOutput().ConnectToSource(surface.CreateOutput("surface", types.Token))
    return material


def _types() -> Any:
    from pxr import Sdf  # pyright: ignore[reportMissingImports]

    return Sdf.ValueTypeNames
