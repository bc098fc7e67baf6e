"""`python app.py`: serves the page and keeps its worker process alive.

The server itself does nothing heavy: no torch, no weights. What it keeps is in one private folder, so a
server that is killed goes on where it stood when it starts again.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import inspect
import os
import signal
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from uni3d.errors import MissingPackageError, Uni3DError, UsageError
from uni3d.web.examples import examples_folder, load_examples
from uni3d.web.first_screen import FirstScreen
from uni3d.web.settings import WebSettings, make_private_folder

LOOPBACK = ("127.0.0.1", "localhost", "::1")
AUTH_VARIABLE = "UNI3D_WEB_AUTH"


def main(arguments: Sequence[str] | None = None, *, worker_command: Sequence[str] | None = None) -> int:
    """Serve the page until Ctrl-C or SIGTERM; returns the exit code."""
    options = _parser().parse_args(arguments)

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    # By an exception, so that the worker is told; SIGTERM alone would end the process on the spot.
    signal.signal(signal.SIGTERM, leave)
    try:
        serve(options, worker_command)
    except KeyboardInterrupt:
        _end_process(0)
    except SystemExit as stop:
        _end_process(stop.code if isinstance(stop.code, int) else 1)
    except Uni3DError as error:
        sys.stderr.write(f"uni3d: error: {error}\n")
        return error.exit_code
    return 0


def _end_process(code: int) -> NoReturn:
    """Leave at once: all is closed, but the connection of an open page would hold up Python's own way out."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def serve(options: argparse.Namespace, worker_command: Sequence[str] | None) -> None:
    """Launch the page with `options` and wait."""
    for package in ("gradio", "huey"):
        if importlib.util.find_spec(package) is None:
            raise MissingPackageError(f'the web page needs {package}: pip install "uni3d[demo]"')
    settings = _settings(options)
    auth = _auth(options.auth or os.environ.get(AUTH_VARIABLE))
    if auth is None and (options.share or options.host not in LOOPBACK):
        sys.stderr.write(
            "uni3d: warning: everyone who reaches this address can use the page and this machine; "
            f"pass --auth USER:PASSWORD or set {AUTH_VARIABLE}\n"
        )
    folder = examples_folder() if options.examples is None else options.examples.resolve()
    examples = load_examples(folder)
    with FirstScreen(options.host, options.port, examples) as first_screen:
        sys.stdout.write(f"uni3d: {first_screen.address} opens the page in a few seconds\n")
        sys.stdout.flush()
        gradio = _import_gradio(settings)
        from starlette.middleware import Middleware

        from uni3d.web import page, views
        from uni3d.web.access import VisitorGate
        from uni3d.web.job_queue import JobQueue
        from uni3d.web.jobs import JobStore
        from uni3d.web.supervisor import WORKER_COMMAND, Supervisor

        store = JobStore(settings)
        if folder is not None:
            gradio.set_static_paths([folder])
        blocks = page.build_page(store, JobQueue(settings.folder), examples)
        gate = Middleware(VisitorGate, store=store, examples=folder)
    # Gradio lets files of the working directory be sent; an empty one holds none.
    with tempfile.TemporaryDirectory(prefix="uni3d-page-") as empty:
        os.chdir(empty)
        try:
            blocks.launch(
                server_name=options.host,
                server_port=first_screen.port,
                share=options.share,
                auth=auth,
                theme=page.theme(),
                css=views.CSS,
                head=page.ONE_CLICK,
                app_kwargs={"middleware": [gate]},
                allowed_paths=[],
                footer_links=[],
                ssr_mode=False,
                mcp_server=False,
                pwa=False,
                enable_monitoring=False,
                prevent_thread_lock=True,
                max_file_size=1,
            )
            # Only now: until the page is there it has the machine to itself.
            with Supervisor(store, worker_command or WORKER_COMMAND):
                threading.Event().wait()
        finally:
            blocks.close(verbose=False)
            os.chdir("/")


def _import_gradio(settings: WebSettings) -> Any:
    """Gradio, which keeps its files in the private folder and reports to nobody."""
    os.environ["GRADIO_TEMP_DIR"] = str(settings.folder)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with _quick_start():
        import gradio
    return gradio


@contextmanager
def _quick_start() -> Iterator[None]:
    """Import gradio in half the time, which until the page is there is most of it.

    It writes type stubs for editors, but leaves out classes whose source file is unknown, so for this long
    its own are. And what an import makes stays: no garbage is found in between.
    """
    getfile = inspect.getfile

    def unknown_for_gradio(thing: Any) -> str:
        if isinstance(thing, type) and thing.__module__.startswith("gradio."):
            raise OSError("no stubs")
        return getfile(thing)

    inspect.getfile = unknown_for_gradio
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        inspect.getfile = getfile


def default_folder() -> Path:
    """Where jobs are kept unless --folder says otherwise."""
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share") / "uni3d" / "web"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="app.py", description="Serve the web page of uni3d.")
    add = parser.add_argument
    add("--host", default="127.0.0.1", help="address to bind to; 0.0.0.0 for all (default: %(default)s)")
    add("--port", type=int, help="port (default: the first free one from 7860)")
    add("--share", action="store_true", help="also open a public address through gradio's relay")
    add("--auth", metavar="USER:PASSWORD", help=f"ask for these; also read from {AUTH_VARIABLE}")
    add("--max-queue", type=int, default=20, help="jobs that may wait in all (default: %(default)s)")
    add(
        "--max-per-visitor",
        type=int,
        default=6,
        help="jobs one visitor may have waiting (default: %(default)s)",
    )
    add(
        "--max-per-hour",
        type=int,
        default=30,
        help="jobs a visitor may order in an hour (default: %(default)s)",
    )
    add("--max-steps", type=int, help="cap on the steps of every job")
    add("--max-minutes", type=float, default=240.0, help="time limit of one job (default: %(default)s)")
    add(
        "--keep-days",
        type=float,
        default=7.0,
        help="finished jobs are removed after this (default: %(default)s)",
    )
    add(
        "--max-gigabytes",
        type=float,
        default=5.0,
        help="the oldest go first beyond this (default: %(default)s)",
    )
    add("--folder", type=Path, help=f"private folder of jobs and results (default: {default_folder()})")
    add("--examples", type=Path, help="folder of finished results to show (default: those of uni3d)")
    add("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    add(
        "--teacher",
        action="append",
        default=[],
        metavar="NAME=SOURCE",
        help="also offer this hub id or directory under a name; may be repeated",
    )
    return parser


def _settings(options: argparse.Namespace) -> WebSettings:
    teachers = {"embedded": "embedded"}
    for text in options.teacher:
        name, separator, source = text.partition("=")
        if not separator or not name or not source:
            raise UsageError(f"--teacher is {text[:80]!r}; expected NAME=SOURCE")
        teachers[name] = str(Path(source).resolve()) if Path(source).is_dir() else source
    return WebSettings(
        folder=make_private_folder((options.folder or default_folder()).absolute()),
        teachers=teachers,
        device=options.device,
        max_steps=options.max_steps,
        max_queue=options.max_queue,
        max_unfinished_per_visitor=options.max_per_visitor,
        max_per_hour=options.max_per_hour,
        max_minutes=options.max_minutes,
        keep_days=options.keep_days,
        max_gigabytes=options.max_gigabytes,
    )


def _auth(text: str | None) -> tuple[str, str] | None:
    if not text:
        return None
    user, separator, password = text.partition(":")
    if not separator or not user or not password:
        raise UsageError("--auth is not USER:PASSWORD; give both, with a colon in between")
    return user, password


if __name__ == "__main__":
    sys.exit(main())
