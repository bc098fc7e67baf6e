"""Meshes that strangers made: read in a process of their own, within limits, or refused with a sentence.

Parsers of mesh and picture formats are large and meet every kind of damage here, so they run in a child
process (`mesh_input_process.py`) that may use so much memory and time and no more, and that hands back plain
arrays. Nothing is ever written to the file or beside it. Legend: V vertices, F faces.
"""

from __future__ import annotations

import json
import logging
import os
import stat
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import uni3d
from uni3d.errors import MissingPackageError, UsageError
from uni3d.mesh.mesh_files import READ_SUFFIXES, MeshFile
from uni3d.mesh.renderable import Material, RenderableMesh

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class InputLimits:
    """How large a stranger's mesh may be, and what reading it may cost.

    The file and each file beside it in bytes; triangles, vertices, materials; of the reading process: address
    space in bytes, seconds of processor time, and seconds on the clock after which it is ended. A picture
    may have `renderable.MAX_IMAGE_PIXELS`.
    """

    file_bytes: int = 512 * 2**20
    faces: int = 2_000_000
    vertices: int = 6_000_000
    materials: int = 4096
    memory_bytes: int = 4 * 2**30
    cpu_s: int = 60
    wall_s: float = 120.0


# Exit codes of the child, apart from 0.
REFUSED, OUT_OF_MEMORY, MISSING_PACKAGE = 10, 11, 12

_Arrays = dict[str, NDArray[Any]]


def read_untrusted_mesh(
    path: str | Path, *, max_texture: int = 2048, limits: InputLimits | None = None
) -> RenderableMesh:
    """The mesh of a GLB, OBJ (with its material library and textures beside it), PLY or STL file.

    Positions as in the file, with the transforms of a GLB's nodes applied. Textures are reduced to
    `max_texture` pixels on their longer side. Triangles without area are left out; an OBJ's missing library
    or texture is named in a warning. Raises UsageError, one sentence with a remedy, for anything else:
    no file, another format, damage, no triangles, references out of the folder, or more than the limits.
    """
    return read_untrusted_file(path, max_texture=max_texture, limits=limits).mesh


def read_untrusted_file(
    path: str | Path, *, max_texture: int = 2048, limits: InputLimits | None = None
) -> MeshFile:
    """As `read_untrusted_mesh`, with what the file says besides the mesh."""
    path, limits = Path(path), limits or InputLimits()
    _check_file(path, limits.file_bytes)
    with tempfile.TemporaryDirectory(prefix="uni3d-mesh-") as folder:
        target = Path(folder) / "mesh.npz"
        _run_reader(path, target, max_texture, limits)
        with np.load(target, allow_pickle=False) as arrays:
            file = unpacked({name: arrays[name] for name in arrays.files})
    if file.missing:
        names = ", ".join(repr(name) for name in file.missing[:5])
        logger.warning("'%s' refers to %s, which is not beside it; the colours in it are lost", path, names)
    return file


def _check_file(path: Path, max_bytes: int) -> None:
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UsageError(f"'{path}' cannot be read: {reason}; pass a file that exists") from error
    if not stat.S_ISREG(status.st_mode):
        what = "a folder" if stat.S_ISDIR(status.st_mode) else "no ordinary file"
        raise UsageError(f"'{path}' is {what}; pass a {', '.join(READ_SUFFIXES)} file")
    if path.suffix.lower() not in READ_SUFFIXES:
        raise UsageError(
            f"'{path}' has the suffix '{path.suffix}'; convert it to one of {', '.join(READ_SUFFIXES)}"
        )
    if status.st_size > max_bytes:
        raise UsageError(
            f"'{path}' has {status.st_size} bytes, more than the limit of {max_bytes}; simplify it"
        )


def _run_reader(path: Path, target: Path, max_texture: int, limits: InputLimits) -> None:
    """Let the child read `path` into `target`; UsageError with its sentence, or with why it was ended."""
    package = str(Path(uni3d.__file__).resolve().parents[1])
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    # one thread: more would only reserve address space, which is limited
    environment |= {"PYTHONPATH": package, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    # -P: the working directory does not become importable
    command = [sys.executable, "-P", "-m", "uni3d.mesh.mesh_input_process", str(path), str(target)]
    try:
        done = subprocess.run(
            [*command, str(max_texture), json.dumps(asdict(limits))],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env=environment,
            timeout=limits.wall_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise UsageError(
            f"'{path}' could not be read within {limits.wall_s:g} s, the limit; simplify it"
        ) from None
    message = target.with_suffix(".txt")
    sentence = message.read_text(encoding="utf-8")[:2000] if message.is_file() else ""
    match done.returncode:
        case 0 if target.is_file():
            return
        case code if code == REFUSED and sentence:
            raise UsageError(sentence)
        case code if code == MISSING_PACKAGE and sentence:
            raise MissingPackageError(sentence)
        case code if code == OUT_OF_MEMORY:
            raise UsageError(
                f"'{path}' needs more than {limits.memory_bytes // 2**20} MB to be read, the limit; "
                f"it is damaged, or has too many triangles or texture pixels"
            )
        case code if code in (-24, -9):  # SIGXCPU, and SIGKILL at the hard limit
            raise UsageError(
                f"'{path}' took more than {limits.cpu_s} s of processor time or too much memory, the limits; "
                f"it is damaged or needs simplifying"
            )
        case code:
            raise UsageError(
                f"'{path}' made the reader fail (exit code {code}); it is damaged, export it again"
            )


def packed(file: MeshFile) -> _Arrays:
    """A mesh file as named arrays without pickles; each texture once, as 8 bits per channel."""
    mesh = file.mesh
    textures = {id(m.texture): m.texture for m in mesh.materials if m.texture is not None}
    order = list(textures)
    facts = {key: value for key, value in asdict(_without_mesh(file)).items() if key != "mesh"}
    facts["names"] = [material.name[:200] for material in mesh.materials]
    arrays: _Arrays = {
        "vertices": mesh.vertices.astype(np.float32),
        "faces": mesh.faces.astype(np.int32),
        "face_material": mesh.face_material.astype(np.int32),
        "material_colour": np.stack([material.colour for material in mesh.materials]).astype(np.float32),
        "texture_of": np.array(
            [-1 if m.texture is None else order.index(id(m.texture)) for m in mesh.materials], np.int32
        ),
        "facts": np.frombuffer(json.dumps(facts).encode(), np.uint8),
    }
    for name in ("corner_normals", "corner_uv", "corner_colour"):
        values = getattr(mesh, name)
        if values is not None:
            arrays[name] = np.asarray(values, dtype=np.float32)
    for index, texture in enumerate(textures.values()):
        arrays[f"texture_{index}"] = np.rint(texture * 255).astype(np.uint8)
    return arrays


def _without_mesh(file: MeshFile) -> MeshFile:
    nothing: Any = None
    return MeshFile(nothing, file.picture_sizes, file.num_dropped, file.is_unlit, file.extras, file.missing)


def unpacked(arrays: _Arrays) -> MeshFile:
    """The inverse of `packed`; UsageError for arrays that no reader of ours makes."""
    vertices, faces = _expect(arrays, "vertices", "f", (-1, 3)), _expect(arrays, "faces", "i", (-1, 3))
    face_material = _expect(arrays, "face_material", "i", (len(faces),))
    colours = _expect(arrays, "material_colour", "f", (-1, 4))
    texture_of = _expect(arrays, "texture_of", "i", (len(colours),))
    facts = json.loads(_expect(arrays, "facts", "u", (-1,)).tobytes())
    for index, end in ((faces, len(vertices)), (face_material, len(colours))):
        if len(index) == 0 or index.min() < 0 or index.max() >= end:
            raise UsageError("the reader handed back a mesh that is inconsistent; the file is damaged")
    corners = {
        name: _expect(arrays, name, "f", (len(faces), 3, width)) if name in arrays else None
        for name, width in (("corner_normals", 3), ("corner_uv", 2), ("corner_colour", 4))
    }
    textures = [
        _expect(arrays, f"texture_{index}", "u", (-1, -1, 4)).astype(np.float32) / 255
        for index in range(int(texture_of.max()) + 1)
    ]
    materials = [
        Material(colour, textures[which] if which >= 0 else None, str(name))
        for colour, which, name in zip(colours, texture_of.tolist(), facts["names"], strict=True)
    ]
    mesh = RenderableMesh(
        vertices=vertices,
        faces=faces.astype(np.int64),
        face_material=face_material.astype(np.int64),
        materials=materials,
        **corners,
    )
    return MeshFile(
        mesh,
        picture_sizes=tuple((int(width), int(height)) for width, height in facts["picture_sizes"]),
        num_dropped=int(facts["num_dropped"]),
        is_unlit=bool(facts["is_unlit"]),
        extras=dict(facts["extras"]),
        missing=tuple(map(str, facts["missing"])),
    )


def _expect(arrays: _Arrays, name: str, kind: str, shape: tuple[int, ...]) -> NDArray[Any]:
    """The array `name` if it has the dtype kind and the shape (-1: any length) that it should have."""
    values = arrays.get(name)
    if (
        values is None
        or values.dtype.kind != kind
        or values.ndim != len(shape)
        or any(wanted not in (-1, got) for wanted, got in zip(shape, values.shape, strict=True))
    ):
        raise UsageError(f"the reader handed back no usable '{name}'; the file is damaged, export it again")
    return values
