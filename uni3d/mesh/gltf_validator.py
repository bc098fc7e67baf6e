"""glTF-Validator of Khronos on a GLB, where it is installed: `npm install gltf-validator`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

# Names the package or the folder that it was installed in.
VALIDATOR_VARIABLE = "UNI3D_GLTF_VALIDATOR"
_TIMEOUT_S = 60.0
_MAX_MESSAGES = 10
_SCRIPT = """
const validator = require(process.argv[1]);
const bytes = new Uint8Array(require("fs").readFileSync(process.argv[2]));
validator.validateBytes(bytes).then(report => console.log(JSON.stringify(report.issues)));
"""


def validator_package() -> Path | None:
    """The npm package that $UNI3D_GLTF_VALIDATOR names; None where it, or node, is missing."""
    root = os.environ.get(VALIDATOR_VARIABLE)
    if not root or shutil.which("node") is None:
        return None
    for candidate in (Path(root), Path(root) / "node_modules" / "gltf-validator"):
        if (candidate / "gltf_validator.dart.js").is_file():
            return candidate.resolve()
    return None


def validate_glb(path: str | Path) -> dict[str, Any] | None:
    """Counts of the validator's errors, warnings, infos and hints about a file, and its first messages.

    None where the validator is not installed or gives no answer within a minute.
    """
    package = validator_package()
    if package is None:
        return None
    command = ["node", "-e", _SCRIPT, str(package), str(path)]
    try:
        done = subprocess.run(command, capture_output=True, timeout=_TIMEOUT_S, check=True)
        issues = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return None
    counts = {
        name: int(issues[f"num{name.capitalize()}"]) for name in ("errors", "warnings", "infos", "hints")
    }
    messages = [str(issue.get("message", issue.get("code"))) for issue in issues["messages"]]
    return {**counts, "messages": messages[:_MAX_MESSAGES]}
