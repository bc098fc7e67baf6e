"""Khronos glTF-Validator, where it is installed: the npm package gltf-validator, run by node.

The folder is named by UNI3D_GLTF_VALIDATOR (the package itself, or where npm installed it) and looked for
nowhere else, because what is found is run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

ENVIRONMENT_VARIABLE = "UNI3D_GLTF_VALIDATOR"
TIME_LIMIT_S = 60.0
MAX_MESSAGES = 5

_SCRIPT = """
const validator = require(process.argv[1]);
const bytes = new Uint8Array(require("fs").readFileSync(process.argv[2]));
validator.validateBytes(bytes, {maxIssues: 100}).then(report => console.log(JSON.stringify(report.issues)));
"""


def validator_package() -> Path | None:
    """The folder of the package, None if the variable is not set or names no such package."""
    root = os.environ.get(ENVIRONMENT_VARIABLE)
    if not root:
        return None
    candidates = (Path(root), Path(root) / "node_modules" / "gltf-validator")
    return next((place for place in candidates if (place / "gltf_validator.dart.js").is_file()), None)


def validate_glb(path: str | Path) -> dict[str, Any] | str:
    """What the validator says about a GLB: errors, warnings, infos, hints (counts) and the first messages of
    errors and warnings; or the reason why it was not run, beginning with "not run"."""
    package, node = validator_package(), shutil.which("node")
    if package is None or node is None:
        return f"not run: needs node, and in {ENVIRONMENT_VARIABLE} the folder of npm's gltf-validator"
    command = [node, "--max-old-space-size=2048", "-e", _SCRIPT, str(package.resolve()), str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT_S, check=True)
        issues = json.loads(done.stdout)
    except (subprocess.SubprocessError, ValueError) as error:
        return f"not run: it failed ({type(error).__name__})"
    serious = [message for message in issues["messages"] if message["severity"] <= 1]
    return {
        "errors": issues["numErrors"],
        "warnings": issues["numWarnings"],
        "infos": issues["numInfos"],
        "hints": issues["numHints"],
        "messages": [f"{item['code']}: {item['message']}"[:200] for item in serious[:MAX_MESSAGES]],
    }
