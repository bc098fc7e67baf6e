"""Paths that try to read what they should not: spellings of "up" times targets times routes."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import quote

_UPS = (
    "../", "..%2f", "%2e%2e/", "%2e%2e%2f", "%252e%252e%252f", "..%252f", "..\\", "..%5c", "%2e%2e%5c",
    "..%c0%af", "..%ef%bc%8f", "....//", "..;/", "%2e./", ".%2e/", "..//", "./../", "..%00/", "..%0a/",
    "%uff0e%uff0e/",
)  # fmt: skip


def hostile_paths(folder: Path, job: str, secret: Path) -> list[str]:
    """At least 500 request paths; `folder` is the server's, `job` one of the asker's own jobs."""
    inside = str(folder).strip("/")
    paths: list[str] = []
    for up in _UPS:
        for target in ("etc/passwd", str(secret).strip("/"), f"{inside}/jobs.sqlite3", "proc/self/environ"):
            climb = up * 12 + target
            paths += [
                f"/jobs/{job}/{climb}",
                f"/jobs/{climb}",
                f"/gradio_api/file={folder}/jobs/{job}/{climb}",
                f"/gradio_api/file={climb}",
                f"/gradio_api/file/{climb}",
                f"/static/{climb}",
                f"/examples/01-a-yellow-lamp/{climb}",
                f"/examples/{climb}",
                f"/assets/{climb}",
                f"/{climb}",
            ]
    for name in ("jobs.sqlite3", "queue.sqlite3", "worker.log", "made.txt", f"jobs/{job}/config.link"):
        for start in ("/gradio_api/file=", "/file=", "//gradio_api/file=", "/gradio_api//file=", "/jobs/"):
            paths += [f"{start}{folder}/{name}", f"{start}{quote(str(folder), safe='')}%2f{name}"]
            paths += [f"{start}{folder}/jobs/../{name}", f"{start}{folder}/./{name}", f"{start}\\\\?\\{name}"]
            paths.append(f"{start}file://{folder}/{name}")
    for odd in (
        "%00",
        "mesh.glb%00.png",
        "mesh.glb/",
        "mesh.glb/..",
        "MESH.GLB",
        "report.json",
        "~root",
        "C:\\x",
    ):
        paths += [f"/jobs/{job}/{odd}", f"/gradio_api/file={folder}/jobs/{job}/{odd}"]
    for query in ("' OR '1'='1", "%' --", "';DROP TABLE jobs;--", "{{7*7}}", "${jndi:ldap://x}", "a" * 4000):
        paths += [f"/jobs/{quote(query)}/mesh.glb", f"/?job={quote(query)}"]
    return paths
