"""The body of the process that reads a stranger's mesh: limits first, then the file, then plain arrays.

Started by `mesh_input.py` as `python -m`, with the path of the mesh, of the .npz to write, the largest
texture side and the limits as JSON. A refusal is the exit code REFUSED and its sentence in a .txt beside the
.npz.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np

from uni3d.errors import MissingPackageError, UsageError
from uni3d.mesh import mesh_input
from uni3d.mesh.mesh_files import load_mesh_file
from uni3d.mesh.mesh_input import InputLimits


def main(source: str, target: Path, max_texture: int, limits: InputLimits) -> int:
    """Read `source` and write `target`; the exit code says what happened."""
    limit_resources(limits)
    try:
        file = load_mesh_file(
            source,
            max_texture=max_texture,
            max_faces=limits.faces,
            max_vertices=limits.vertices,
            max_bytes=limits.file_bytes,
        )
        if file.refused:
            raise UsageError(f"'{source}' cannot be read: {file.refused}")
        if len(file.mesh.materials) > limits.materials:
            number = len(file.mesh.materials)
            raise UsageError(
                f"'{source}' has {number} materials, more than the limit of {limits.materials}; merge them"
            )
        np.savez(target, **mesh_input.packed(file))  # pyright: ignore[reportArgumentType]
    except MemoryError:
        return mesh_input.OUT_OF_MEMORY
    except (UsageError, MissingPackageError) as error:
        if isinstance(error.__cause__, MemoryError):
            return mesh_input.OUT_OF_MEMORY
        target.with_suffix(".txt").write_text(str(error), encoding="utf-8", errors="backslashreplace")
        return mesh_input.REFUSED if isinstance(error, UsageError) else mesh_input.MISSING_PACKAGE
    return 0


def limit_resources(limits: InputLimits) -> None:
    """Lower what this process may use, where the system knows such limits (Linux does)."""
    try:
        import resource
    except ImportError:  # Windows: the parent's clock is the only limit there
        return
    wanted = {
        resource.RLIMIT_AS: limits.memory_bytes,
        resource.RLIMIT_CPU: limits.cpu_s,
        resource.RLIMIT_FSIZE: limits.memory_bytes,
        resource.RLIMIT_CORE: 0,
    }
    for kind, value in wanted.items():
        hard = resource.getrlimit(kind)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        try:
            resource.setrlimit(kind, (value, value))
        except (ValueError, OSError):  # macOS refuses a limit on address space
            continue


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), InputLimits(**json.loads(sys.argv[4]))))
