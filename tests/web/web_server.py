"""A real server in a process of its own, and visitors who talk to it over HTTP."""

from __future__ import annotations

import http.client
import json
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import uni3d
from uni3d.web.first_screen import MARK

_SERVE = """
import sys
from uni3d.web.server import main
sys.exit(main(sys.argv[2:], worker_command=(sys.executable, sys.argv[1]) if sys.argv[1] else None))
"""
STUB = str(Path(__file__).with_name("stub_worker.py"))


class Served:
    """`app.py` on a free port; `stub` jobs take a moment and need no torch."""

    def __init__(self, folder: Path, *options: str, stub: bool = True) -> None:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.folder = folder
        self.log = folder.with_name(f"{folder.name}.log")
        self._command = [
            *(sys.executable, "-c", _SERVE, STUB if stub else ""),
            *("--port", str(self.port), "--folder", str(folder)),
            *options,
        ]
        self.process: subprocess.Popen[bytes] | None = None
        self.first_screen_s = 0.0
        self.page_ready_s = 0.0
        self._started = 0.0

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}/"

    def launch(self) -> None:
        """Start, and wait for the first screen."""
        package = str(Path(uni3d.__file__).parents[1])
        self._started = time.monotonic()
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self._command, env=os.environ | {"PYTHONPATH": package}, stdout=log, stderr=log
            )
        self._wait_for(lambda: self.look() is not None)
        self.first_screen_s = time.monotonic() - self._started

    def start(self) -> None:
        """Start, and wait for the page itself."""
        self.launch()
        self._wait_for(lambda: self.look() == "page")
        self.page_ready_s = time.monotonic() - self._started

    def look(self) -> str | None:
        """What / shows: "first screen", "page", or None where nothing answers."""
        try:
            connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
            with closing(connection):
                connection.request("GET", "/")
                answer = connection.getresponse()
                answer.read()
        except (OSError, http.client.HTTPException):
            return None
        assert answer.status == 200
        return "page" if answer.getheader(MARK) is None else "first screen"

    def _wait_for(self, is_there: Callable[[], bool]) -> None:
        while time.monotonic() - self._started < 120:
            if is_there():
                return
            assert self.process is not None and self.process.poll() is None, self.log.read_text()
            time.sleep(0.05)
        raise AssertionError(self.log.read_text())

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the server by a signal; returns its exit code."""
        assert self.process is not None
        self.process.send_signal(number)
        try:
            return self.process.wait(30)
        finally:
            self.process.kill()

    def worker(self) -> int | None:
        """The process id of the worker."""
        assert self.process is not None
        try:
            children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children")
            tasks = children.parents[1].glob("*/children")
            found = [pid for task in tasks for pid in task.read_text().split()]
        except OSError:
            return None
        return int(found[0]) if found else None

    def __enter__(self) -> Served:
        self.start()
        return self

    def close(self) -> None:
        """End the server if it still runs."""
        if self.process is not None and self.process.poll() is None:
            self.stop()

    def __exit__(self, *error: object) -> None:
        self.close()


class Visitor:
    """A browser without a screen: keeps its cookie and calls the events of the page."""

    def __init__(self, served: Served) -> None:
        self._port = served.port
        self._session = secrets.token_hex(6)  # of one open page, as a browser has it
        self.cookie = ""

    def get(
        self,
        path: str,
        method: str = "GET",
        body: bytes | None = None,
        *,
        content_type: str = "application/json",
    ) -> tuple[int, bytes]:
        """Ask for `path` exactly as it is written."""
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=60)
        connection._validate_path = lambda url: None  # type: ignore[attr-defined]
        try:
            headers = {"Cookie": self.cookie, "Content-Type": content_type}
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            for line in answer.headers.get_all("Set-Cookie", []):
                self.cookie = "; ".join(filter(None, [self.cookie, line.split(";")[0]]))
            return answer.status, answer.read()
        finally:
            connection.close()

    def open(self) -> Visitor:
        assert self.get("/")[0] == 200 and self.cookie
        return self

    def call(self, event: str, *values: Any) -> list[Any]:
        """What an event of the page answers; RuntimeError with its message where it refuses."""
        body = {"data": list(values), "session_hash": self._session}
        status, answer = self.get(f"/gradio_api/run/{event}", "POST", json.dumps(body).encode())
        if status != 200:
            raise RuntimeError(f"{status}: {answer[:500].decode(errors='replace')}")
        return json.loads(answer)["data"]

    def submit(self, prompt: str, method: str = "sds", seed: int = 0, **fields: Any) -> str:
        """Order a mesh; returns the id of the job."""
        quality = fields.get("quality", "draft")
        answer = self.call("submit", prompt, "", method, None, "embedded", seed, False, quality)
        if answer[0]:
            raise RuntimeError(answer[0])
        return answer[2]

    def status(self, job_id: str) -> str:
        """The words of the status box, without the tags."""
        box = self.call("progress", job_id, "")[2]
        return " ".join(re.sub(r"<[^>]*>", " ", box if isinstance(box, str) else str(box)).split())

    def is_finished(self, job_id: str) -> bool:
        return re.match(r"Done|Cancelled|This job failed", self.status(job_id)) is not None
