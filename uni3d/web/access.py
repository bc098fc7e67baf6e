"""The gate in front of the page: who a visitor is, which routes exist, and which files are whose.

Everything passes here before gradio sees it. A route that the page does not need is answered with 404, among
them gradio's uploads, proxy and component servers. A file is answered only if it is one of the results of a
job of the very visitor who asks, or belongs to the examples. A request that is larger than any order is cut
off, and whoever guesses passwords has to wait.
"""

from __future__ import annotations

import re
import secrets
import time
from collections.abc import Mapping
from http.cookies import CookieError, SimpleCookie
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import FileResponse, PlainTextResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from uni3d.web.examples import EXAMPLE_FILES
from uni3d.web.jobs import JobStore, visitor_of

COOKIE = "uni3d_visitor"
_COOKIE_SECONDS = 365 * 86_400
MAX_REQUEST_BYTES = 65_536
_MAX_LOGINS_PER_MINUTE = 10
_SECRET = re.compile(r"[A-Za-z0-9_-]{43}")
_JOB_ID = re.compile(r"[A-Za-z0-9_-]{32}")

# What a visitor may have of a job, by name; nothing else in its folder is ever sent.
JOB_FILES = {
    "mesh.glb": "model/gltf-binary",
    "model.zip": "application/zip",
    "turntable.mp4": "video/mp4",
    "preview.png": "image/png",
    "progress.png": "image/png",
    "config.yaml": "text/plain; charset=utf-8",
}
_READ = ("GET", "HEAD")
_EXAMPLE_NAME = re.compile(r"[\w-]+")
_DOWNLOADS = ("mesh.glb", "model.zip", "config.yaml")

_GRADIO_ROUTES = re.compile(
    r"/|/(config|theme\.css|favicon\.ico|robots\.txt|manifest\.json|login|logout)/?"
    r"|/(static|assets|svelte|pwa_icon)/[\w./-]+"
    r"|/gradio_api/(info|user|token|app_id|login_check|startup-events|theme\.css|reset|cancel)/?"
    r"|/gradio_api/(run|api|call|queue|heartbeat)/[\w/-]+"
)
_FILE_ROUTE = "/gradio_api/file="

# Everything comes from the server itself; the page of gradio needs inline code, and its 3D viewer blobs.
_POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; "
    "style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; media-src 'self' blob:; font-src 'self' data:; worker-src 'self' blob:; "
    "connect-src 'self' data: blob:; object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)


def address_of(client: Any) -> str:
    """A name for the network address of `client`, a request's (host, port); empty where it tells nothing.

    On this machine itself a proxy may stand for everybody. The address is kept as a digest.
    """
    host = "" if client is None else str(client[0])
    is_here = not host or host in ("localhost", "::1") or host.startswith("127.")
    return "" if is_here else visitor_of(host)


def visitor_from(headers: Any) -> str | None:
    """The visitor whose cookie is in the request headers; None without a well-formed one."""
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return visitor_of(cookie.value) if cookie is not None and _SECRET.fullmatch(cookie.value) else None


class _TooLargeError(Exception):
    """The body of a request is larger than any order."""


class VisitorGate:
    """ASGI middleware around gradio's application."""

    def __init__(self, app: ASGIApp, *, store: JobStore, examples: Path | None = None) -> None:
        self._app = app
        self._store = store
        self._examples = None if examples is None else examples.resolve()
        self._logins: dict[str, list[float]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # the page uses no websockets
        headers = Headers(scope=scope)
        visitor = visitor_from(headers)
        path: str = scope["path"].removeprefix(scope.get("root_path", "").rstrip("/"))
        is_page = path == "/" and scope["method"] == "GET"
        cookie = _new_cookie(headers, scope) if visitor is None and is_page else None
        send = _with_headers(send, cookie)
        if not headers.get("content-length", "0").isdecimal():
            await _refuse(400, "bad request")(scope, receive, send)
        elif int(headers.get("content-length", "0")) > MAX_REQUEST_BYTES:
            await _refuse(413, "too large")(scope, receive, send)
        elif path.rstrip("/") == "/login" and scope["method"] == "POST" and self._is_guessing(scope):
            await _refuse(429, "too many attempts; try again in a minute")(scope, receive, send)
        else:
            answer = self._answer(path, visitor, scope["method"])
            try:
                await answer(scope, _limited(receive), send)
            except _TooLargeError:
                await _refuse(413, "too large")(scope, receive, send)

    def _is_guessing(self, scope: Scope) -> bool:
        """Whether too many passwords have come from this address within a minute; counts this one."""
        now = time.monotonic()
        host = str((scope.get("client") or ("",))[0])
        self._logins = {
            each: recent
            for each, times in self._logins.items()
            if (recent := [moment for moment in times if now - moment < 60.0])
        }
        times = self._logins.setdefault(host, [])
        if len(times) >= _MAX_LOGINS_PER_MINUTE:
            return True
        times.append(now)
        return False

    def _answer(self, path: str, visitor: str | None, method: str) -> ASGIApp:
        if path.startswith("/jobs/"):
            file = self._job_file(path.removeprefix("/jobs/"), visitor)
            return _not_found() if file is None or method not in _READ else self._send(file, JOB_FILES)
        if path.startswith("/examples/"):
            file = self._example_file(path.removeprefix("/examples/"))
            return _not_found() if file is None or method not in _READ else self._send(file, EXAMPLE_FILES)
        if path.startswith(_FILE_ROUTE):
            is_open = self._may_read(path.removeprefix(_FILE_ROUTE), visitor)
            return self._app if is_open and method in _READ else _not_found()
        return self._app if _GRADIO_ROUTES.fullmatch(path) else _not_found()

    def _job_file(self, path: str, visitor: str | None) -> Path | None:
        """The file at ID/NAME if this visitor has such a job and the file may be sent."""
        job_id, _, name = path.partition("/")
        if visitor is None or name not in JOB_FILES or not _JOB_ID.fullmatch(job_id):
            return None
        job = self._store.find(job_id, visitor)
        file = None if job is None else self._store.folder(job.id) / name
        return file if file is not None and file.is_file() and not file.is_symlink() else None

    def _may_read(self, path: str, visitor: str | None) -> bool:
        """Whether gradio may send the file at this absolute path, which must be written in its plain form."""
        jobs_folder = f"{self._store.settings.jobs_folder}/"
        if path.startswith(jobs_folder):
            return self._job_file(path.removeprefix(jobs_folder), visitor) is not None
        if self._examples is not None and path.startswith(f"{self._examples}/"):
            return self._example_file(path.removeprefix(f"{self._examples}/")) is not None
        return False

    def _example_file(self, path: str) -> Path | None:
        """The file at NAME/FILE if it is one of an example."""
        name, _, file = path.partition("/")
        if self._examples is None or file not in EXAMPLE_FILES or not _EXAMPLE_NAME.fullmatch(name):
            return None
        found = self._examples / name / file
        return found if found.is_file() and not found.is_symlink() else None

    @staticmethod
    def _send(file: Path, types: Mapping[str, str]) -> ASGIApp:
        name = file.name if file.name in _DOWNLOADS else None
        response = FileResponse(file, media_type=types[file.name], filename=name)
        response.headers["cache-control"] = "no-store" if file.name == "progress.png" else "private, no-cache"
        return response


def _not_found() -> PlainTextResponse:
    return _refuse(404, "not found")


def _refuse(status: int, reason: str) -> PlainTextResponse:
    return PlainTextResponse(reason, status_code=status)


def _limited(receive: Receive) -> Receive:
    """`receive` for a body that does not say how long it is; beyond the limit, _TooLargeError."""
    received = 0

    async def wrapped() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_REQUEST_BYTES:
            raise _TooLargeError
        return message

    return wrapped


def _new_cookie(headers: Headers, scope: Scope) -> str:
    forwarded = headers.get("x-forwarded-proto", "").split(",")[0].strip()
    is_secure = (forwarded or scope.get("scheme")) == "https"
    secure = "; Secure" if is_secure else ""
    secret = secrets.token_urlsafe(32)
    return f"{COOKIE}={secret}; Max-Age={_COOKIE_SECONDS}; Path=/; HttpOnly; SameSite=Lax{secure}"


def _with_headers(send: Send, cookie: str | None) -> Send:
    async def wrapped(message: Message) -> None:
        if message["type"] == "http.response.start":
            headers = MutableHeaders(scope=message)
            headers["x-content-type-options"] = "nosniff"
            headers["referrer-policy"] = "same-origin"
            headers["content-security-policy"] = _POLICY
            if cookie is not None:
                headers.append("set-cookie", cookie)
                headers["cache-control"] = "no-store"
        await send(message)

    return wrapped
