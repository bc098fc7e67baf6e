"""What the address shows while gradio is still being imported, which takes a few seconds.

The standard library serves one small page at once. It asks for its own address again and again, and opens it
anew as soon as the real page answers there, so a link to a job arrives where it should. Everything else that
is asked of the server meanwhile, by pages that were open before a restart, is told to come back.
"""

from __future__ import annotations

import base64
import errno
import re
import socket
import sys
import threading
import time
from collections.abc import Iterable
from html import escape
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from socketserver import TCPServer
from string import Template
from typing import Any

from uni3d.errors import UsageError
from uni3d.web.examples import Example

PURPOSE = "Say what to make, and a textured 3D mesh grows from noise while you watch."
# The header that tells the first screen from the real page.
MARK = "uni3d-starting"
FREE_PORTS = range(7860, 7960)
_CLIENT_TIMEOUT_S = 5.0
_HAND_OVER_S = 1.0
_POLL_S = 0.05
_SMALL_BODY = re.compile(r"[0-9]{1,5}")
_HEADERS = {
    MARK: "1",
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Content-Security-Policy": "default-src 'none'; img-src data:; style-src 'unsafe-inline'; "
    "script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'; frame-ancestors 'self'",
}

_PAGE = Template("""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>uni3d</title>
<style>
body {max-width: 44rem; margin: 0 auto; padding: 1.5rem 1rem; font: 1rem/1.5 system-ui, sans-serif;
  background: #fafafa; color: #1f2937;}
h1 {margin: 0; font-size: 1.75rem;}
#state {padding: .75rem 1rem; border: 1px solid #a3a3a3; border-radius: 8px;}
ul {display: grid; grid-template-columns: repeat(auto-fill, minmax(8rem, 1fr)); gap: .75rem; padding: 0;
  list-style: none;}
li {border-radius: 8px; overflow: hidden; background: #ededed; color: #1f2937; font-size: .8rem;
  text-align: center; padding-bottom: .4rem;}
img {display: block; width: 100%; height: auto;}
@media (prefers-color-scheme: dark) {
  body {background: #18181b; color: #f4f4f5;}
  #state {border-color: #71717a;}
}
</style>
</head>
<body>
<main>
<h1>uni3d</h1>
<p>$purpose</p>
<p id="state" role="status">The page is starting and opens by itself within seconds.</p>
$examples
</main>
<script>
const state = document.getElementById("state"), starting = state.textContent;
const gone = "The server does not answer. The terminal in which it was started tells why.";
let unanswered = 0;
async function look() {
  let answer = null;
  try { answer = await fetch(location.href, {method: "HEAD", cache: "no-store"}); } catch { /* not there */ }
  const isStarting = answer !== null && answer.headers.has("$mark");
  if (answer !== null && answer.status < 500 && !isStarting) { location.reload(); return; }
  unanswered = isStarting ? 0 : unanswered + 1;
  const words = unanswered > 40 ? gone : starting;
  if (state.textContent !== words) state.textContent = words;
  setTimeout(look, 250);
}
setTimeout(look, 250);
</script>
</body>
</html>
""")


def first_screen_html(examples: Iterable[Example]) -> str:
    """The page, with the pictures of finished examples in it: it needs no second request."""
    cards = "".join(
        f'<li><img alt="" width="256" height="256" src="data:image/jpeg;base64,{_picture(example)}">'
        f"{escape(example.order.prompt)}</li>"
        for example in examples
    )
    listed = f"<p>Made with it:</p>\n<ul>{cards}</ul>" if cards else ""
    return _PAGE.substitute(purpose=escape(PURPOSE), examples=listed, mark=MARK)


def _picture(example: Example) -> str:
    return base64.b64encode((example.folder / "front.jpg").read_bytes()).decode("ascii")


class FirstScreen:
    """Serves the first screen from a thread until it is closed.

    `port` None takes the first free one of FREE_PORTS. UsageError where none can be had.
    """

    def __init__(self, host: str, port: int | None, examples: Iterable[Example]) -> None:
        self.host = host
        bare_host = host.removeprefix("[").removesuffix("]")
        self._server = _listen(bare_host, port, first_screen_html(examples).encode("utf-8"))
        self.port: int = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(_POLL_S,), daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """What to open in a browser."""
        host = f"[{self.host}]" if ":" in self.host and not self.host.startswith("[") else self.host
        return f"http://{host}:{self.port}/"

    def close(self) -> None:
        """Let go of the port, and return when it can be taken."""
        self._server.shutdown()  # first: a socket that a thread waits for stays open
        self._server.server_close()
        self._thread.join()
        deadline = time.monotonic() + _HAND_OVER_S
        while time.monotonic() < deadline:
            try:
                type(self._server)(self._server.server_address[:2], _Handler, b"").server_close()
                return
            except OSError:  # held by a program that is just being started and has a copy of the socket
                time.sleep(_POLL_S)

    def __enter__(self) -> FirstScreen:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def _listen(host: str, port: int | None, page: bytes) -> _Server:
    kind = _Server6 if ":" in host else _Server
    if port is not None and not 0 <= port <= 65535:
        raise UsageError(f"--port is {port}; expected 0 to 65535, 0 for any that is free")
    for candidate in FREE_PORTS if port is None else (port,):
        try:
            _check_loopback(candidate)
            return kind((host, candidate), _Handler, page)
        except OSError as error:
            if error.errno != errno.EADDRINUSE:
                raise UsageError(
                    f"cannot listen on port {candidate} of {host!r} ({error.strerror or error}); "
                    "pass an address of this machine to --host and a port that you may use to --port"
                ) from error
    if port is None:
        raise UsageError(
            f"the ports {FREE_PORTS[0]} to {FREE_PORTS[-1]} of {host} are all in use; pass another to --port"
        )
    raise UsageError(
        f"port {port} of {host} is in use; pass another to --port, or none for the first free one "
        f"from {FREE_PORTS[0]}"
    )


def _check_loopback(port: int) -> None:
    """OSError where gradio would refuse the port later: it looks at the loopback, whatever the host."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(("127.0.0.1", port))


class _Server(ThreadingHTTPServer):
    request_queue_size = 128

    def __init__(self, address: Any, handler: type[_Handler], page: bytes) -> None:
        self.page = page
        super().__init__(address, handler)

    def server_bind(self) -> None:
        TCPServer.server_bind(self)  # HTTPServer's own also asks a name server, which may take seconds

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], OSError):  # a client that left is nothing to report
            super().handle_error(request, client_address)


class _Server6(_Server):
    address_family = socket.AF_INET6


class _Handler(BaseHTTPRequestHandler):
    timeout = _CLIENT_TIMEOUT_S
    server: _Server

    def do_GET(self) -> None:
        """The page at / and, as "not yet", at every address that a person opens; else a few words."""
        is_read = self.command in ("GET", "HEAD")
        is_page = is_read and self.path.partition("?")[0] == "/"
        if is_page or (is_read and "text/html" in self.headers.get("Accept", "")):
            kind, body = "text/html; charset=utf-8", self.server.page
        else:
            kind, body = "text/plain; charset=utf-8", b"starting; try again in a second\n"
        self._discard_body()
        self.send_response(200 if is_page else 503)
        for name, value in _HEADERS.items():
            self.send_header(name, value)
        if not is_page:
            self.send_header("Retry-After", "1")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    do_HEAD = do_POST = do_PUT = do_PATCH = do_DELETE = do_OPTIONS = do_GET

    def _discard_body(self) -> None:
        """Read what an old page sent, or closing the connection would break it off before the answer."""
        length = self.headers.get("Content-Length", "")
        if _SMALL_BODY.fullmatch(length):
            self.rfile.read(int(length))

    def version_string(self) -> str:
        """Tells nobody which Python this is."""
        return "uni3d"

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the real page writes no line for each request either."""
