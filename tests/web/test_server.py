"""The server over HTTP with a stub worker: visitors, routes, files, and its own death."""

from __future__ import annotations

import http.client
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from traversal import hostile_paths
from web_fixtures import wait_for
from web_server import Served, Visitor

from uni3d.errors import UsageError
from uni3d.web.access import MAX_REQUEST_BYTES

FORM = "application/x-www-form-urlencoded"
pytest.importorskip("gradio", reason="the demo extra is not installed")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    options = ("--max-steps", "20", "--max-queue", "50", "--max-per-visitor", "10")
    with Served(tmp_path_factory.mktemp("web") / "data", *options) as server:
        yield server


@pytest.fixture(scope="module")
def done(served: Served) -> tuple[Visitor, str]:
    """A visitor and a finished job."""
    visitor = Visitor(served).open()
    job = visitor.submit("a red chair")
    wait_for(lambda: visitor.is_finished(job))
    return visitor, job


def test_the_server_needs_no_torch() -> None:
    code = (
        "import sys, uni3d.web.server, uni3d.web.page, uni3d.web.access, uni3d.web.supervisor\n"
        "print(sorted({'torch', 'diffusers', 'transformers', 'trimesh'} & set(sys.modules)))"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "[]"


def test_something_is_there_long_before_the_page(served: Served) -> None:
    assert served.look() == "page"
    assert served.first_screen_s < served.page_ready_s / 2


def test_files_of_a_job_are_for_its_visitor_alone(served: Served, done: tuple[Visitor, str]) -> None:
    visitor, job = done
    names = ("mesh.glb", "model.zip", "preview.png", "config.yaml")
    paths = [f"/jobs/{job}/{name}" for name in names]
    paths.append(f"/gradio_api/file={served.folder.resolve()}/jobs/{job}/mesh.glb")
    for path in paths:
        assert visitor.get(path)[0] == 200, path
        assert Visitor(served).open().get(path)[0] == 404, path
        assert Visitor(served).get(path)[0] == 404, path
    assert visitor.get(f"/jobs/{job}/mesh.glb")[1][:4] == b"glTF"
    assert visitor.get(f"/jobs/{job}/report.json")[0] == 404


def test_another_visitor_learns_and_changes_nothing(served: Served) -> None:
    owner, other = Visitor(served).open(), Visitor(served).open()
    job = owner.submit("a slow secret thing")
    assert other.status(job) == Visitor(served).open().status("x" * 32)
    other.call("cancel", job, "")
    wait_for(lambda: owner.is_finished(job))
    assert owner.status(job).startswith("Done") and "secret" in owner.call("gallery")[0]
    assert "secret" not in other.call("gallery")[0]
    owner.call("cancel", job, "")
    assert owner.status(job).startswith("Done")


def test_without_a_cookie_there_is_no_job(served: Served) -> None:
    with pytest.raises(RuntimeError):
        Visitor(served).submit("a chair")


def test_bad_orders_are_refused_and_odd_ones_do_no_harm(served: Served) -> None:
    visitor = Visitor(served).open()
    for method, prompt, seed in (("dds", "a", 0), ("sds", " ", 0), ("sds", "a", -1), ("sds", "\x07", 0)):
        with pytest.raises(RuntimeError):
            visitor.submit(prompt, method, seed)
    for odd in (None, [], {"path": "/etc/passwd"}, 1e999, {"a": "b" * 10_000}, True):
        try:
            assert "u3-notice" in visitor.call("submit", odd, odd, odd, odd, odd, odd, False, odd)[0]
        except RuntimeError:
            continue  # gradio itself refuses what the component cannot hold
    job = visitor.submit("<script>alert(1)</script> '\"&")
    gallery = visitor.call("gallery")[0]
    assert "<script>" not in gallery and "&lt;script&gt;" in gallery
    wait_for(lambda: visitor.is_finished(job))
    assert "<script>" not in str(visitor.call("progress", job, ""))


def test_a_request_larger_than_any_order_is_cut_off(served: Served) -> None:
    visitor = Visitor(served).open()
    body = b'{"data": ["' + b"a" * MAX_REQUEST_BYTES + b'"]}'
    assert visitor.get("/gradio_api/run/submit", "POST", body)[0] == 413
    connection = http.client.HTTPConnection("127.0.0.1", served.port, timeout=20)
    try:  # without saying how long it is
        connection.request(
            "POST", "/gradio_api/run/submit", iter([b"a" * 40_000] * 3), {"Cookie": visitor.cookie}
        )
        assert connection.getresponse().status in (400, 413)
    except ConnectionError:
        pass  # cut off while it was still sending
    finally:
        connection.close()
    assert visitor.get("/")[0] == 200


def test_no_path_leads_outside(served: Served, done: tuple[Visitor, str]) -> None:
    visitor, job = done
    secret = served.folder.with_name("secret.txt")
    secret.write_text("the-secret-of-the-house")
    (served.folder / "jobs" / job / "config.link").symlink_to(secret)
    paths = hostile_paths(served.folder.resolve(), job, secret)
    assert len(paths) >= 500
    own = {visitor.get(f"/jobs/{job}/{name}")[1] for name in ("mesh.glb", "preview.png", "config.yaml")}
    for path in paths:
        try:
            status, answer = visitor.get(path)
        except (OSError, UnicodeEncodeError, ValueError):
            continue  # the server or the client would not even have it
        assert b"secret-of" not in answer and b"root:" not in answer and b"SQLite" not in answer, path
        assert status >= 400 or answer in own or answer.lstrip().startswith(b"<!doctype html>"), path
    assert served.process is not None and served.process.poll() is None


@pytest.mark.parametrize(
    "path",
    [
        "upload",
        "proxy=http://169.254.169.254/",
        "file=http://127.0.0.1:22/",
        "component_server",
        "vibe-code/",
    ],
)
def test_routes_that_the_page_does_not_need_are_closed(path: str, served: Served) -> None:
    visitor = Visitor(served).open()
    for method in ("GET", "POST"):
        assert visitor.get(f"/gradio_api/{path}", method)[0] == 404
    assert visitor.get("/monitoring")[0] == 404


def test_a_password_closes_page_events_and_files(tmp_path: Path) -> None:
    with Served(tmp_path / "data", "--auth", "ann:secret", "--max-steps", "3") as served:
        visitor = Visitor(served).open()
        with pytest.raises(RuntimeError, match="401"):
            visitor.submit("a chair")
        assert visitor.get("/config")[0] == 401
        form = b"username=ann&password=secret"
        status, _ = visitor.get("/login", "POST", form, content_type=FORM)
        assert status == 200
        job = visitor.submit("a chair")
        wait_for(lambda: visitor.is_finished(job))
        assert visitor.get(f"/jobs/{job}/mesh.glb")[0] == 200
        guesses = [
            Visitor(served).get("/login", "POST", b"username=ann&password=%d" % number, content_type=FORM)[0]
            for number in range(12)
        ]
        assert 200 not in guesses and guesses[-1] == 429


@pytest.mark.slow
def test_jobs_outlive_the_server(tmp_path: Path) -> None:
    served = Served(tmp_path / "data", "--max-steps", "30")
    with served:
        visitor = Visitor(served).open()
        jobs = [visitor.submit(text) for text in ("a slow one", "two", "three")]
        wait_for(lambda: "step" in visitor.status(jobs[0]))
        assert served.stop(signal.SIGKILL) == -signal.SIGKILL
        served.start()
        wait_for(lambda: all(visitor.is_finished(job) for job in jobs))
        assert [visitor.status(job).split()[0] for job in jobs] == ["Done"] * 3
        assert served.stop() == 143
    made = (tmp_path / "data" / "made.txt").read_text().split()
    assert sorted(made) == sorted(jobs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--auth", "nobody"], "--auth is not USER:PASSWORD"),
        (["--teacher", "x"], "expected NAME=SOURCE"),
        (["--max-queue", "0"], "max_queue is 0"),
    ],
)
def test_bad_options_are_one_sentence(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from uni3d.web.server import main

    assert main([*arguments, "--folder", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_an_open_address_without_a_password_warns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from uni3d.web import server

    def far_enough(*arguments: object) -> None:
        raise UsageError("no port today")

    monkeypatch.setattr(server, "FirstScreen", far_enough)
    assert server.main(["--host", "0.0.0.0", "--folder", str(tmp_path)]) == 2
    assert "warning: everyone who reaches this address" in capsys.readouterr().err
