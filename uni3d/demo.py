"""A small web page over the text-to-3D pipeline: prompt in, GLB out, with progress and a cancel button.

One run at a time, on this machine only: the server binds to 127.0.0.1 and shares nothing. The meshes, and the
copies that gradio makes of them, lie in a private folder that is gone when the server stops.
"""

from __future__ import annotations

import os
import queue
import signal
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

from uni3d.config import Quality
from uni3d.config_values import check_range
from uni3d.errors import MissingPackageError, Uni3DError
from uni3d.presets import PRESET_FILES, quality_preset
from uni3d.prompts import check_prompt, prompt_slug
from uni3d.resources import resource_path

MAX_SEED_ON_PAGE = 2**31 - 1
MAX_WAITING = 16
NUM_EXAMPLES = 12


class _Cancelled(Exception):
    """Leaves a run whose page is gone, without building its mesh."""


def run_steps(
    pipeline: Callable[..., Any],
    prompt: str,
    seed: int,
    quality: Quality,
    folder: Path,
    *,
    turn: threading.Lock | None = None,
) -> Iterator[tuple[str, Path | None]]:
    """Run the pipeline in a thread and yield (what to say, the mesh once there is one).

    Closing the iterator stops the run after its step. `turn` is held while the pipeline works, so that a run
    that was cancelled has let go of the teacher before the next one takes it. Raises Uni3DError for bad input
    and failed runs.
    """
    prompt = check_prompt(prompt)
    check_range("seed", seed, 0, MAX_SEED_ON_PAGE)
    config = quality_preset(quality)
    said: queue.Queue[str | Path | Exception] = queue.Queue()
    is_cancelled = threading.Event()

    def on_step(step: int, values: object) -> None:
        if is_cancelled.is_set():
            raise _Cancelled
        said.put(f"step {step} of {config.steps}")

    def work() -> None:
        try:
            with turn or threading.Lock():
                if is_cancelled.is_set():
                    return
                result = pipeline(prompt, seed=seed, config=config, callback_on_step_end=on_step)
                said.put(result.save(folder / f"{prompt_slug(prompt)}-{seed}.glb"))
        except Exception as error:  # handed to the page, which would otherwise wait for ever
            said.put(error)

    threading.Thread(target=work, daemon=True).start()
    try:
        yield "starting", None
        while True:
            news = said.get()
            if isinstance(news, Exception):
                raise news
            if isinstance(news, Path):
                yield "done", news
                return
            yield news, None
    finally:
        is_cancelled.set()


def build_page(load_pipeline: Callable[[], Callable[..., Any]], folder: Path) -> Any:
    """The Gradio page; `load_pipeline` is called when the first prompt arrives, meshes go into `folder`."""
    try:
        import gradio as gr  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise MissingPackageError('the web page needs gradio: pip install "uni3d[demo]"') from error

    loaded: list[Callable[..., Any]] = []
    turn = threading.Lock()

    def make(prompt: str, seed: float, quality: str) -> Iterator[tuple[str, str | None, str | None]]:
        try:
            yield "loading the teacher", None, None
            if not loaded:
                loaded.append(load_pipeline())
            chosen = cast(Quality, quality)
            for status, mesh in run_steps(loaded[0], prompt, int(seed), chosen, folder, turn=turn):
                path = None if mesh is None else str(mesh)
                yield status, path, path
        except Uni3DError as error:
            raise gr.Error(str(error), print_exception=False) from error

    lines = resource_path("assets/prompts/text_to_3d.txt").read_text(encoding="utf-8").splitlines()
    examples = [[line] for line in lines if line and not line.startswith("#")][:NUM_EXAMPLES]
    with gr.Blocks(title="uni3d", delete_cache=(3600, 86_400)) as page:
        gr.Markdown("# uni3d\nText to textured 3D meshes. One run at a time; `draft` is the faster one.")
        prompt = gr.Textbox(label="What to make", max_length=1024)
        with gr.Row():
            seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED_ON_PAGE)
            quality = gr.Radio(list(PRESET_FILES), value="draft", label="Quality")
        with gr.Row():
            start = gr.Button("Make", variant="primary")
            cancel = gr.Button("Cancel")
        status = gr.Textbox(label="Status", interactive=False)
        model = gr.Model3D(label="Mesh", display_mode="solid", clear_color=(0.9, 0.9, 0.9, 1.0))
        download = gr.File(label="Download")
        running = start.click(make, [prompt, seed, quality], [status, model, download], concurrency_limit=1)
        cancel.click(lambda: "cancelled", None, status, cancels=[running], queue=False, api_name="cancel")
        gr.Examples(examples, prompt)
    return page.queue(max_size=MAX_WAITING)


def main() -> int:
    """Serve the page on this machine until Ctrl-C or SIGTERM; returns the exit code."""

    def load_pipeline() -> Callable[..., Any]:
        from uni3d.text_to_3d import TextTo3DPipeline

        return TextTo3DPipeline.from_pretrained("embedded")

    def leave(number: int, frame: object) -> None:
        sys.exit(128 + number)

    # Leaving by an exception lets the folder go; SIGTERM alone would end the process on the spot.
    signal.signal(signal.SIGTERM, leave)
    with tempfile.TemporaryDirectory(prefix="uni3d-page-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        try:
            page = build_page(load_pipeline, Path(folder))
            page.launch(server_name="127.0.0.1", share=False, allowed_paths=[folder])
        except Uni3DError as error:
            sys.stderr.write(f"uni3d: error: {error}\n")
            return error.exit_code
    return 0
