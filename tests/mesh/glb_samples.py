"""Small GLB files made by hand: a triangle, and whatever a test puts into its document."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np


def glb_bytes(document: dict[str, Any], binary: bytes = b"") -> bytes:
    text = json.dumps(document).encode()
    text += b" " * (-len(text) % 4)
    chunks = struct.pack("<II", len(text), 0x4E4F534A) + text
    if binary:
        chunks += struct.pack("<II", len(binary), 0x004E4942) + binary
    return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def triangle_document(uri: str | None, num_vertices: int = 3) -> dict[str, Any]:
    buffer: dict[str, Any] = {"byteLength": 36}
    if uri is not None:
        buffer["uri"] = uri
    return {
        "asset": {"version": "2.0"},
        "buffers": [buffer],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "accessors": [{"bufferView": 0, "componentType": 5126, "count": num_vertices, "type": "VEC3"}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "nodes": [{"mesh": 0, "scale": [2, 2, 2], "translation": [1, 0, 0]}],
        "scenes": [{"nodes": [0]}],
    }


TRIANGLE = np.array([[0, 0, 0], [1, 0, 0], [0, 1, 0]], "<f4").tobytes()
