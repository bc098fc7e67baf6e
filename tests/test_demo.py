"""The web page without a browser: what a run says, cancelling, errors, and that gradio accepts the page."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from uni3d.demo import build_page, run_steps
from uni3d.errors import ConfigError, MissingPackageError, UsageError


class Result:
    def save(self, path: Path) -> Path:
        path.write_bytes(b"glTF")
        return path


def three_steps(
    prompt: str, *, seed: int, config: Any, callback_on_step_end: Callable[..., object]
) -> Result:
    assert config.quality == "draft" and seed == 7
    for step in (1, 2, 3):
        callback_on_step_end(step, {})
    return Result()


def test_a_run_says_its_steps_and_ends_with_a_mesh(tmp_path: Path) -> None:
    said = list(run_steps(three_steps, " a Red chair ", 7, "draft", tmp_path))
    assert [text.partition(" of ")[0] for text, _ in said] == [
        "starting",
        "step 1",
        "step 2",
        "step 3",
        "done",
    ]
    assert [mesh for _, mesh in said] == [None] * 4 + [tmp_path / "a-red-chair-7.glb"]
    assert (tmp_path / "a-red-chair-7.glb").read_bytes() == b"glTF"


class Endless:
    """A run that only cancelling ends; says when it began and that it left without a mesh."""

    def __init__(self) -> None:
        self.num_at_work = self.most_at_work = 0
        self.left = threading.Event()

    def __call__(
        self, prompt: str, *, seed: int, config: Any, callback_on_step_end: Callable[..., object]
    ) -> Result:
        self.num_at_work += 1
        self.most_at_work = max(self.most_at_work, self.num_at_work)
        try:
            while True:
                callback_on_step_end(1, {})
                time.sleep(0.01)
        finally:
            time.sleep(0.1)  # letting go of the teacher takes its time
            self.num_at_work -= 1
            self.left.set()


def test_leaving_the_page_stops_the_run(tmp_path: Path) -> None:
    endless = Endless()
    run = run_steps(endless, "a chair", 7, "draft", tmp_path)
    assert [next(run)[0], next(run)[0].partition(" of")[0]] == ["starting", "step 1"]
    run.close()
    assert endless.left.wait(5)
    assert list(tmp_path.iterdir()) == []


def test_the_next_run_waits_until_a_cancelled_one_has_left(tmp_path: Path) -> None:
    """Two runs on one teacher take each other's adapters away."""
    endless, turn = Endless(), threading.Lock()
    for _ in range(3):
        run = run_steps(endless, "a chair", 7, "draft", tmp_path, turn=turn)
        assert [next(run)[0], next(run)[0].partition(" of")[0]] == ["starting", "step 1"]
        run.close()
    assert endless.most_at_work == 1


def test_bad_input_and_failures_are_raised(tmp_path: Path) -> None:
    def failing(prompt: str, **settings: Any) -> Result:
        raise UsageError("no surface; try another prompt")

    with pytest.raises(UsageError, match="the prompt is empty"):
        next(run_steps(three_steps, " ", 7, "draft", tmp_path))
    with pytest.raises(ConfigError, match="seed is -1"):
        next(run_steps(three_steps, "a", -1, "draft", tmp_path))
    with pytest.raises(UsageError, match="no surface"):
        list(run_steps(failing, "a", 7, "draft", tmp_path))


def test_without_gradio_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(MissingPackageError, match=r'pip install "uni3d\[demo\]"') as caught:
        build_page(lambda: three_steps, tmp_path)
    assert caught.value.exit_code == 3


def test_gradio_accepts_the_page(tmp_path: Path) -> None:
    pytest.importorskip("gradio", reason="the demo extra is not installed")
    assert build_page(lambda: three_steps, tmp_path) is not None


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_server_answers_this_machine_only_and_leaves_nothing(number: int, tmp_path: Path) -> None:
    """A real server: make a mesh through its API, then stop it by a signal."""
    pytest.importorskip("gradio", reason="the demo extra is not installed")
    client = pytest.importorskip("gradio_client")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    environment = os.environ | {
        "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False",
        "TMPDIR": str(tmp_path),
    }
    with (tmp_path.parent / f"{number}.log").open("w+") as log:
        server = subprocess.Popen(
            [sys.executable, "-u", "-c", SERVER], env=environment, stdout=log, stderr=log, text=True
        )
        try:
            page = _connect(client, f"http://127.0.0.1:{port}/", server)
            status, mesh, download = page.predict("a chair", 7, "draft", api_name="/make")
            assert status == "done" and Path(mesh).read_bytes() == Path(download).read_bytes() == b"glTF"
            with pytest.raises(Exception, match="the prompt is empty"):
                page.predict(" ", 7, "draft", api_name="/make")
            assert len(list(tmp_path.iterdir())) > 0
            server.send_signal(number)
            assert server.wait(20) == (0 if number == signal.SIGINT else 143)
        finally:
            server.kill()
        log.seek(0)
        assert f"http://127.0.0.1:{port}" in log.read()
    assert list(tmp_path.iterdir()) == []


SERVER = """
import signal, sys
from uni3d import demo, text_to_3d

class Result:
    def save(self, path):
        path.write_bytes(b"glTF")
        return path

class Pipeline:
    @classmethod
    def from_pretrained(cls, name):
        return lambda prompt, **settings: Result()

signal.signal(signal.SIGINT, signal.default_int_handler)
text_to_3d.TextTo3DPipeline = Pipeline
sys.exit(demo.main())
"""


def _connect(client: Any, address: str, server: subprocess.Popen[str]) -> Any:
    """A client of the server once it is up."""
    deadline = time.monotonic() + 90
    while True:
        try:
            return client.Client(address, verbose=False)
        except Exception:
            if time.monotonic() > deadline or server.poll() is not None:
                raise
            time.sleep(0.3)
