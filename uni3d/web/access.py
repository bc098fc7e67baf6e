"""The gate in front of the page: who a visitor is, which routes exist, and which files are whose.

Everything passes here before gradio sees it. A route that the page does not need is answered with 404, among
them gradio's uploads, proxy and component servers. A file is answered only if it is one of the results of a
job of the very visitor who asks, or belongs to the examples.
"""

from __future__ import annotations

import re
import secrets
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


def visitor_from(headers: Any) -> str | None:
    """The visitor whose cookie is in the request headers; None without a well-formed one."""
    try:
        cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
    except CookieError:
        return None
    return visitor_of(cookie.value) if cookie is not None and _SECRET.fullmatch(cookie.value) else None


class VisitorGate:
    """ASGI middleware around gradio's application."""

    def __init__(self, app: ASGIApp, *, store: JobStore, examples: Path | None = None) -> None:
        self._app = app
        self._store = store
        self._examples = None if examples is None else examples.resolve()

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
        answer = self._answer(path, visitor, scope["method"])
        await answer(scope, receive, _with_headers(send, cookie))

    def _answer(self, path: str, visitor: str | None, method: str) -> ASGIApp:
        if path.startswith("/jobs/"):
            file = self._job_file(path.removeprefix("/jobs/"), visitor)
            return _not_found() if file is None or method not in ("GET", "HEAD") else self._send(file)
        if path.startswith(_FILE_ROUTE):
            is_open = self._may_read(path.removeprefix(_FILE_ROUTE), visitor)
            return self._app if is_open and method in ("GET", "HEAD") else _not_found()
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
            parts = path.removeprefix(f"{self._examples}/").split("/")
            return len(parts) == 2 and parts[0] not in (".", "..") and parts[1] in EXAMPLE_FILES
        return False

    @staticmethod
    def _send(file: Path) -> ASGIApp:
        name = file.name if file.name in _DOWNLOADS else None
        response = FileResponse(file, media_type=JOB_FILES[file.name], filename=name)
        response.headers["cache-control"] = "no-store" if file.name == "progress.png" else "private, no-cache"
        return response


def _not_found() -> PlainTextResponse:
    return PlainTextResponse("not found", status_code=404)


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
