"""A worker whose jobs take a few fast steps without torch, with a checkpoint after every one.

The prompt may steer it: "fail" meets a clear error, "fault" an unforeseen one, "die" ends the process, "slow"
takes a tenth of a second for each step, "very slow" a second. Each finished make is one line of made.txt in
the server's folder.
"""

from __future__ import annotations

import os
import sys
import time
import zipfile
from pathlib import Path

from uni3d.errors import UsageError
from uni3d.web import worker
from uni3d.web.jobs import Job
from uni3d.web.progress import JobProgress
from uni3d.web.settings import WebSettings

PICTURES = Path(__file__).parent


def make(job: Job, settings: WebSettings, folder: Path, progress: JobProgress) -> None:
    progress.enter("loading the teacher")
    checkpoint = folder / "checkpoint"
    start = int(checkpoint.read_text()) if checkpoint.exists() else 0
    pause = 1.0 if "very slow" in job.prompt else 0.1 if "slow" in job.prompt else 0.01
    for step in range(start + 1, job.num_steps + 1):
        time.sleep(pause)
        if "fail" in job.prompt and step == 2:
            raise UsageError(f"the teacher '{settings.folder}/x' is damaged; replace it")
        if "fault" in job.prompt and step == 2:
            raise RuntimeError("CUDA error: out of\nthin air")
        if "die" in job.prompt and step == 2:
            os._exit(9)
        progress.step(step, 1 / step, lambda: (folder / "progress.png").write_bytes(PNG))
        temporary = folder / "checkpoint.tmp"
        temporary.write_text(str(step))
        temporary.replace(checkpoint)
    (folder / "mesh.glb").write_bytes(box())
    (folder / "preview.png").write_bytes(PNG)
    (folder / "config.yaml").write_text("seed: 0\n")
    (folder / "report.json").write_text(
        '{"triangles": 12, "closed": true, "file_bytes": 900, "problems": []}'
    )
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        archive.writestr("mesh.obj", "v 0 0 0\n")
    checkpoint.unlink(missing_ok=True)
    with (settings.folder / "made.txt").open("a") as stream:
        stream.write(f"{job.id}\n")


def box() -> bytes:
    """A GLB with a cube, copied from the one that the tests carry."""
    return (PICTURES / "box.glb").read_bytes()


PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d49484452000000010000000108020000009077"
    "53de0000000c49444154789c63f8cfc0000003010100c9fe92ef0000000049454e44ae426082"
)

if __name__ == "__main__":
    sys.exit(worker.main(make=make))
