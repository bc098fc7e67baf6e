"""What the address shows until gradio is imported, and how the port goes over to the page."""

from __future__ import annotations

import http.client
import re
import signal
import socket
from collections.abc import Iterator
from contextlib import closing
from importlib import util
from pathlib import Path

import pytest
from web_server import Served

from uni3d.errors import UsageError
from uni3d.web.examples import Example
from uni3d.web.first_screen import FREE_PORTS, MARK, FirstScreen
from uni3d.web.orders import Order
from uni3d.web.server import main


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[FirstScreen]:
    (tmp_path / "front.jpg").write_bytes(b"a picture")
    with FirstScreen("127.0.0.1", 0, [Example(Order(prompt="a <b>chair"), tmp_path, {})]) as screen:
        yield screen


def ask(port: int, path: str, method: str = "GET", accept: str = "*/*", body: bytes | None = None):
    """The answer, with its body read."""
    with closing(http.client.HTTPConnection("127.0.0.1", port, timeout=20)) as connection:
        connection.request(method, path, body, {"Accept": accept})
        answer = connection.getresponse()
        return answer, answer.read().decode()


def needs_demo_extra() -> None:
    for package in ("gradio", "huey"):
        pytest.importorskip(package, reason="the demo extra is not installed")


def test_the_page_is_one_file_that_asks_nothing_of_others(screen: FirstScreen) -> None:
    answer, text = ask(screen.port, "/?job=x", accept="text/html")
    assert answer.status == 200 and answer.getheader(MARK) and MARK in text
    assert "a &lt;b&gt;chair" in text and "a <b>" not in text
    sources = re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?([^"'\s>)]+)""", text)
    assert len(sources) == 2 and all(source.startswith("data:") for source in sources)
    assert "://" not in text


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/config"),
        ("HEAD", "/jobs/x/mesh.glb"),
        ("GET", "/gradio_api/heartbeat/x"),
        ("POST", "/gradio_api/run/progress"),
        ("POST", "/"),
    ],
)
def test_what_an_open_page_asks_has_to_wait(method: str, path: str, screen: FirstScreen) -> None:
    answer, text = ask(screen.port, path, method, body=b"x" * 50_000 if method == "POST" else None)
    assert answer.status == 503 and answer.getheader("Retry-After") and "<" not in text


def test_a_person_sees_the_page_at_any_address(screen: FirstScreen) -> None:
    answer, text = ask(screen.port, "/jobs/x/preview.png", accept="text/html,*/*")
    assert answer.status == 503 and "<title>uni3d" in text


def test_the_port_is_free_at_once_whoever_is_still_connected(screen: FirstScreen) -> None:
    with socket.create_connection(("127.0.0.1", screen.port)) as silent:
        silent.sendall(b"GET / HT")
        assert ask(screen.port, "/")[0].status == 200
        screen.close()
        with socket.create_server(("127.0.0.1", screen.port)):  # SO_REUSEADDR, as uvicorn's
            pass
    with pytest.raises(ConnectionRefusedError):
        ask(screen.port, "/")


def test_a_port_in_use_is_one_sentence(
    screen: FirstScreen, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    needs_demo_extra()
    assert main(["--port", str(screen.port), "--folder", str(tmp_path / "data")]) == 2
    assert f"port {screen.port} of 127.0.0.1 is in use; pass another" in capsys.readouterr().err


@pytest.mark.parametrize(("host", "port"), [("192.0.2.1", 0), ("no host", 0), ("127.0.0.1", 65536)])
def test_an_address_that_cannot_be_had_is_one_sentence(host: str, port: int) -> None:
    with pytest.raises(UsageError, match="--port"):
        FirstScreen(host, port, [])


def test_without_a_port_the_first_free_one_is_taken() -> None:
    with FirstScreen("127.0.0.1", None, []) as one, FirstScreen("127.0.0.1", None, []) as two:
        assert FREE_PORTS[0] <= one.port < two.port <= FREE_PORTS[-1]


def test_a_server_that_is_still_starting_leaves_when_told(tmp_path: Path) -> None:
    needs_demo_extra()
    served = Served(tmp_path / "data")
    served.launch()
    assert served.look() == "first screen"
    assert served.stop(signal.SIGTERM) == 143
    assert served.look() is None


@pytest.mark.parametrize("missing", ["gradio", "huey"])
def test_a_missing_package_is_said_before_the_first_screen(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(util, "find_spec", lambda name: None if name == missing else object())
    assert main(["--folder", str(tmp_path / "data")]) == 3
    said = capsys.readouterr()
    assert not said.out and f'needs {missing}: pip install "uni3d[demo]"' in said.err
    assert not (tmp_path / "data").exists()
