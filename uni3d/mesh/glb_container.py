"""The container of a GLB file: header, JSON and binary chunk, and the arrays and pictures they hold.

glTF 2.0, sections 3 to 5, with one rule more: everything lies in the file itself. Offsets, counts and
references are checked before memory is asked for. `glb_reader.py` makes triangles of it.
"""

from __future__ import annotations

import base64
import json
import struct
from typing import Any

import numpy as np
from PIL import Image

from uni3d.errors import UsageError
from uni3d.mesh.renderable import open_picture

MAX_ACCESSOR_ELEMENTS = 6_000_000
JSON_CHUNK = 0x4E4F534A
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")

# What is read apart from glTF 2.0 itself; other extensions change looks, not triangles or base colours.
READ_EXTENSIONS = {"KHR_draco_mesh_compression", "KHR_mesh_quantization", "EXT_texture_webp"}
# Required extensions without which triangles and base colours are still right.
HARMLESS_PREFIXES = ("KHR_materials_", "KHR_lights_", "KHR_xmp", "KHR_animation_")

_COMPONENT_TYPES = {5120: "i1", 5121: "u1", 5122: "<i2", 5123: "<u2", 5125: "<u4", 5126: "<f4"}
_COMPONENT_COUNTS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4, "MAT4": 16}


class GlbContainer:
    """One GLB file in memory: `json` its document, `binary` its binary chunk (empty if there is none)."""

    def __init__(self, content: bytes) -> None:
        if len(content) < 20 or content[:4] != b"glTF":
            raise UsageError("it does not start with the glTF binary header; export it as GLB again")
        version, length, json_length, chunk = struct.unpack_from("<IIII", content, 4)
        if length > len(content) or 20 + json_length > len(content):
            raise UsageError("it is shorter than its header says, so it was cut off; copy it again")
        if version != 2 or chunk != JSON_CHUNK:
            raise UsageError(f"it is no glTF 2 file (version {version}); export it as GLB again")
        document: Any = json.loads(content[20 : 20 + json_length])
        if not isinstance(document, dict):
            raise ValueError("its JSON chunk is no object")
        self.json: dict[str, Any] = document
        self.binary = b""
        start = 20 + json_length
        if start + 8 <= len(content):
            length = struct.unpack_from("<I", content, start)[0]
            self.binary = content[start + 8 : start + 8 + length]
        self._check_extensions()

    def _check_extensions(self) -> None:
        for name in map(str, self.json.get("extensionsRequired", [])):
            if name not in READ_EXTENSIONS and not name.startswith(HARMLESS_PREFIXES):
                raise UsageError(
                    f"it needs the glTF extension {name[:60]!r}, which is not read; export it without"
                )

    def extras(self) -> dict[str, Any]:
        """`asset.extras`, where exporters say how the file was made; {} where there is nothing."""
        asset = self.json.get("asset")
        extras = asset.get("extras") if isinstance(asset, dict) else None
        return extras if isinstance(extras, dict) else {}

    def buffer_view(self, index: int) -> bytes:
        view = self.json["bufferViews"][index]
        buffer = self.json["buffers"][view["buffer"]]
        data = self.binary if "uri" not in buffer else _embedded_data(buffer["uri"])
        start, length = view.get("byteOffset", 0), view["byteLength"]
        if start < 0 or length < 0 or start + length > len(data):
            raise ValueError("a buffer view lies outside its buffer")
        return data[start : start + length]

    def count(self, accessor: int) -> int:
        """How many elements an accessor has."""
        count = int(self.json["accessors"][accessor]["count"])
        if not 0 <= count <= MAX_ACCESSOR_ELEMENTS:
            raise ValueError(f"an accessor claims {count} elements")
        return count

    def accessor(self, index: int) -> np.ndarray:
        """[count, components]; normalised integers become float32."""
        spec = self.json["accessors"][index]
        count, width = self.count(index), _COMPONENT_COUNTS[spec["type"]]
        if "bufferView" in spec:
            view = self.json["bufferViews"][spec["bufferView"]]
            values = self._values(spec, spec["componentType"], count, width, view.get("byteStride"))
        else:
            values = np.zeros((count, width), np.dtype(_COMPONENT_TYPES[spec["componentType"]]))
        if "sparse" in spec:
            self._replace_sparsely(values, spec)
        return normalised(values) if spec.get("normalized") else values

    def _values(
        self, spec: dict[str, Any], component_type: int, count: int, width: int, stride: int | None = None
    ) -> np.ndarray:
        """A writable array [count, width] out of the buffer view that `spec` names."""
        dtype = np.dtype(_COMPONENT_TYPES[component_type])
        data, offset = self.buffer_view(spec["bufferView"]), spec.get("byteOffset", 0)
        stride = stride or dtype.itemsize * width
        if count and offset + stride * (count - 1) + dtype.itemsize * width > len(data):
            raise ValueError("an accessor lies outside its buffer view")
        return np.ndarray((count, width), dtype, data, offset, (stride, dtype.itemsize)).copy()

    def _replace_sparsely(self, values: np.ndarray, spec: dict[str, Any]) -> None:
        """Overwrite the rows that a sparse accessor lists (glTF 2.0, section 3.6.2.3)."""
        sparse = spec["sparse"]
        count = int(sparse["count"])
        if not 0 <= count <= len(values):
            raise ValueError("a sparse accessor replaces more elements than there are")
        rows = self._values(sparse["indices"], sparse["indices"]["componentType"], count, 1)[:, 0]
        values[rows] = self._values(sparse["values"], spec["componentType"], count, values.shape[1])

    def picture(self, index: int) -> Image.Image:
        """An image of the file, opened but not decoded."""
        spec = self.json["images"][index]
        if spec.get("mimeType") == "image/ktx2":
            raise UsageError("its textures are KTX2 pictures, which are not read; export them as PNG")
        data = self.buffer_view(spec["bufferView"]) if "bufferView" in spec else _embedded_data(spec["uri"])
        return open_picture(data, PICTURE_FORMATS)

    def texture_source(self, index: int) -> int:
        """The image that a texture shows."""
        texture = self.json["textures"][index]
        if "source" in texture:
            return int(texture["source"])
        for extension in texture.get("extensions", {}).values():
            if isinstance(extension, dict) and "source" in extension:
                return int(extension["source"])
        raise ValueError("a texture has no image")


def normalised(values: np.ndarray) -> np.ndarray:
    """Integers as the fractions they stand for, float32 in [0, 1] or [-1, 1]; floats as they are."""
    if values.dtype.kind == "f":
        return values
    return np.maximum(values.astype(np.float32) / np.iinfo(values.dtype).max, -1.0)


def _embedded_data(uri: str) -> bytes:
    if not uri.startswith("data:"):
        raise UsageError(f"it refers to an external file ({uri[:60]!r}); pack everything into one GLB")
    return base64.b64decode(uri.partition(",")[2])
