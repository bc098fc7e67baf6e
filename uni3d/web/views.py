"""What the page says about jobs, as HTML; every word of a visitor is escaped."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

from uni3d.errors import Uni3DError
from uni3d.web.examples import Example
from uni3d.web.jobs import Job, JobStore
from uni3d.web.orders import Order, reproducing_command
from uni3d.web.settings import WebSettings

CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important;}
.u3-status {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px 14px;}
.u3-status p {margin: 0; color: var(--body-text-color); overflow-wrap: anywhere;}
.u3-status .u3-small, .u3-small {font-size: 0.9em; margin-top: 4px;
  color: color-mix(in srgb, var(--body-text-color) 75%, var(--body-background-fill));}
.u3-status progress {width: 100%; height: 10px; margin: 8px 0 4px; appearance: none; border: 0;
  border-radius: 5px; overflow: hidden; background: var(--border-color-primary);}
.u3-status progress::-webkit-progress-bar {background: var(--border-color-primary);}
.u3-status progress::-webkit-progress-value {background: var(--primary-500);}
.u3-status progress::-moz-progress-bar {background: var(--primary-500);}
.u3-notice {border: 1px solid #c62828; border-radius: 8px; padding: 10px 14px;
  color: var(--body-text-color); overflow-wrap: anywhere;}
.u3-status.failed {border-color: #c62828;}
.u3-views {width: 100%; max-height: 420px; object-fit: contain; display: block;
  border-radius: 8px; background: #f2f2f2;}
.u3-result video {width: 100%; max-height: 360px; border-radius: 8px; background: #ededed;}
.u3-links {display: flex; flex-wrap: wrap; gap: 8px; margin: 12px 0;}
.u3-links a {padding: 9px 14px; border-radius: 8px; text-decoration: none; font-weight: 600;
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color) !important;
  border: 1px solid var(--border-color-primary);}
.u3-links a.main {background: var(--button-primary-background-fill);
  color: var(--button-primary-text-color) !important;}
.u3-links a:hover {filter: brightness(0.95);}
.u3-links a:focus-visible, .u3-card:focus-visible, .u3-result pre:focus-visible,
button:focus-visible {outline: 3px solid var(--primary-500);
  outline-offset: 2px;}
.u3-result table {border-collapse: collapse; margin: 4px 0 12px; width: 100%; border: 0 !important;}
.u3-result tr {border: 0 !important;}
.u3-result td, .u3-result th {padding: 4px 10px 4px 0; border: 0; text-align: left; font-weight: 400;
  border-bottom: 1px solid var(--border-color-primary); color: var(--body-text-color);}
.u3-result pre {white-space: pre-wrap; overflow-wrap: anywhere; padding: 10px; border-radius: 8px;
  background: var(--background-fill-secondary); color: var(--body-text-color); font-size: 0.85em;}
/* The viewer stays blank if it is made visible later: it is there, unseen, until it has a mesh. */
.u3-model:not(:has(canvas)) {display: none !important;}
.u3-examples-grid {display: grid !important; grid-template-columns: repeat(4, minmax(0, 1fr)); gap: 8px;}
.u3-example {flex-direction: column; justify-content: flex-start; gap: 0 !important; padding: 0 !important;
  min-width: 0 !important; overflow: hidden; background: #ededed !important; color: #1f2937 !important;
  font-size: 0.75rem !important; font-weight: 500 !important; line-height: 1.25; white-space: normal;
  padding-bottom: 6px !important;}
.u3-example img {width: 100% !important; height: auto !important; margin: 0;}
@media (max-width: 700px) {
  .main.fillable {padding-left: 12px !important; padding-right: 12px !important;}
  .u3-left {display: contents !important;}
  .u3-shown {order: 1;}
  .u3-examples {order: 2;}
}
.u3-cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px;}
.u3-card {border: 1px solid var(--border-color-primary); border-radius: 8px; overflow: hidden; display: block;
  text-decoration: none; background: var(--background-fill-primary);}
.u3-card .u3-thumb {aspect-ratio: 1; background-color: #ededed; overflow: hidden;}
/* The first of eight views. */
.u3-card .u3-thumb img {width: 400%; max-width: none; height: 200%; margin: 0;}
.u3-card .u3-label {text-align: left; padding: 8px 10px; color: var(--body-text-color);
  overflow-wrap: anywhere; font-size: 0.9em;}
"""


def duration(seconds: float) -> str:
    """ "40 s", "12 min" or "3 h 20 min", as coarse as an estimate is."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def estimate_text(seconds: float | None) -> str:
    """How long a job takes here; None where that is not known yet."""
    if seconds is None:
        return "How long it takes is being measured on this machine; the time left shows once it runs."
    return f"Takes about {duration(seconds)}, as measured on this machine."


def status_html(job: Job | None, position: int = 0, wait_s: float | None = None) -> str:
    """One box: what happens, how far it is, how long it will take (`wait_s` seconds until it starts)."""
    if job is None:
        return _box("", "Nothing here yet. Say what to make and press Generate, or pick a finished example.")
    if job.state == "queued":
        where = "Next in line" if position == 0 else f"Waiting: {_count(position, 'job')} before this one"
        when = f", about {duration(wait_s)}." if position and wait_s else "."
        resumed = "" if job.num_starts == 0 else f" It goes on near step {job.step}."
        return _box(
            "queued", where + when + resumed, small="You may close the page; the job stays in the queue."
        )
    if job.state == "running":
        return _running_box(job)
    if job.state == "done":
        text = f"Done in {duration(job.seconds_worked)}, {_count(job.num_steps, 'step')}, seed {job.seed}."
        return _box("done", text, small=_sentence(job.message))
    if job.state == "cancelled":
        return _box("cancelled", f"Cancelled at step {job.step} of {job.num_steps}.")
    return _box("failed", f"This job failed: {job.message.rstrip('.')}.")


def _running_box(job: Job) -> str:
    if job.is_cancel_requested:
        return _box("running", "Cancelling after this step.")
    note = _sentence(job.message)
    if job.step == 0:
        waiting = '<progress aria-label="progress"></progress>'
        return _box("running", f"{job.phase.capitalize() or 'Starting'}.", bar=waiting, small=note)
    numbers = [f"step {job.step} of {job.num_steps}"]
    if job.loss is not None:
        numbers.append(f"loss {job.loss:.4g}")
    if job.seconds_left is not None and job.step < job.num_steps:
        numbers.append(f"about {duration(job.seconds_left)} left, then the mesh")
    bar = (
        f'<progress aria-label="progress" max="{job.num_steps}" value="{job.step}">'
        f"{job.step} of {job.num_steps}</progress>"
    )
    small = f"{', '.join(numbers)}. {note}"
    return _box("running", f"{job.phase.capitalize()}.", bar=bar, small=small.strip())


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:].rstrip('.')}." if text else ""


def _box(kind: str, text: str, *, bar: str = "", small: str = "") -> str:
    extra = f'<p class="u3-small">{escape(small)}</p>' if small else ""
    return f'<div class="u3-status {kind}"><p role="status">{escape(text)}</p>{bar}{extra}</div>'


def notice_html(text: str) -> str:
    """Why nothing was started; empty if there is nothing to say."""
    return f'<div class="u3-notice" role="alert">{escape(_sentence(text))}</div>' if text else ""


def preview_html(job: Job | None) -> str:
    """The views of a running job, or the sheet of a finished one."""
    if job is None or job.state not in ("running", "done") or not (job.num_previews or job.state == "done"):
        return ""
    name = "preview.png" if job.state == "done" else "progress.png"
    return _views_html(f"jobs/{job.id}/{name}?v={job.num_previews}", job.prompt)


def _views_html(address: str, prompt: str) -> str:
    return f'<img class="u3-views" src="{address}" alt="{escape(prompt)}, seen from several sides">'


# ---------------------------------------------------------------------- a finished mesh


def result_html(store: JobStore, job: Job | None) -> str:
    """Video, downloads, figures and the way to make it again; empty before the job is done."""
    if job is None or job.state != "done":
        return ""
    folder = store.folder(job.id)
    try:
        figures = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return '<p class="u3-small">The files of this job have been removed to make room.</p>'
    links = [
        ("mesh.glb", "Download GLB"),
        ("model.zip", "Download OBJ (ZIP)"),
        ("config.yaml", "Download config"),
    ]
    has_video = (folder / "turntable.mp4").is_file()
    return _result_html(
        f"jobs/{job.id}",
        job.prompt,
        has_video=has_video,
        downloads=links,
        more=f'<a href="?job={job.id}">Link to this job</a>',
        figures=figures,
        command=_command(job.order, store.settings),
        note="The link opens in this browser alone. A mesh bears the licence of its teacher.",
    )


def example_html(example: Example, settings: WebSettings) -> tuple[str, str, str]:
    """A finished example as the panel shows a finished job: (status, views, result)."""
    order, address = example.order, f"examples/{quote(example.folder.name)}"
    text = f"A finished example: {order.prompt}, {order.method}, {order.quality}, seed {order.seed}."
    as_made = dataclasses.replace(settings, max_steps=None, teachers={order.teacher: order.teacher})
    result = _result_html(
        address,
        order.prompt,
        has_video=True,
        downloads=[("mesh.glb", "Download GLB")],
        more="",
        figures=example.report,
        command=_command(order, as_made),
        note="Made by the teacher that comes with uni3d. A mesh bears the licence of its teacher.",
    )
    return _box("done", text), _views_html(f"{address}/preview.jpg", order.prompt), result


def _command(order: Order, settings: WebSettings) -> str:
    try:
        return reproducing_command(order, settings)
    except Uni3DError as error:  # the server was started again without the teacher, say
        return str(error)


def _result_html(
    address: str,
    prompt: str,
    *,
    has_video: bool,
    downloads: Sequence[tuple[str, str]],
    more: str,
    figures: Mapping[str, Any],
    command: str,
    note: str,
) -> str:
    video = (
        f'<video src="{address}/turntable.mp4" controls loop muted autoplay playsinline '
        f'aria-label="turntable of {escape(prompt)}"></video>'
    )
    links = "".join(
        f'<a class="{"" if number else "main"}" href="{address}/{name}" download>{label}</a>'
        for number, (name, label) in enumerate(downloads)
    )
    return (
        f'<div class="u3-result">{video if has_video else ""}<div class="u3-links">{links}{more}</div>'
        f"{figures_html(figures)}<p>The same again from a command line:</p>"
        f'<pre tabindex="0">{escape(command)}</pre><p class="u3-small">{note}</p></div>'
    )


def figures_html(figures: Mapping[str, Any]) -> str:
    """The mesh report as a small table, problems in words."""
    rows: list[tuple[str, str]] = []
    if "triangles" in figures:
        rows.append(("Triangles", f"{figures['triangles']:,}"))
    if "closed" in figures:
        rows.append(("Closed surface", "yes" if figures["closed"] else "no"))
    if figures.get("texture_size"):
        size = figures["texture_size"]
        rows.append(("Texture", " x ".join(map(str, size)) if isinstance(size, list) else f"{size} px"))
    if figures.get("uv_coverage") is not None:
        overlap = figures.get("uv_overlap_fraction")
        rows.append(
            (
                "UV coordinates",
                f"{figures['uv_coverage']:.0%} of the texture in use"
                + ("" if overlap is None else f", {overlap:.2%} overlap"),
            )
        )
    if "file_bytes" in figures:
        rows.append(("GLB size", f"{figures['file_bytes'] / 1e6:.2f} MB"))
    problems = figures.get("problems") or []
    rows.append(("Checks of the file", "passed" if not problems else "; ".join(map(str, problems))))
    rows.append(("glTF-Validator", _verdict(figures.get("gltf_validator"))))
    cells = "".join(
        f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>' for name, value in rows
    )
    return f'<table aria-label="mesh report">{cells}</table>'


def _verdict(validator: Mapping[str, Any] | str | None) -> str:
    if validator is None or isinstance(validator, str):  # then it says why there are no figures
        return "not installed on this server"
    counts = f"{_count(validator['errors'], 'error')}, {_count(validator['warnings'], 'warning')}"
    return "; ".join([counts, *map(str, validator["messages"][:3])])


def gallery_html(jobs: Iterable[Job]) -> str:
    """Cards of a visitor's jobs, each a link by id."""
    cards = []
    for job in jobs:
        picture = (
            f'<img src="jobs/{job.id}/preview.png" alt="" loading="lazy">' if job.state == "done" else ""
        )
        cards.append(
            f'<a class="u3-card" href="?job={job.id}"><div class="u3-thumb">{picture}</div>'
            f'<div class="u3-label">{escape(job.prompt)}<br><span class="u3-small">{job.state}, {job.method}'
            f", {job.quality}, seed {job.seed}</span></div></a>"
        )
    if not cards:
        return '<p class="u3-small">You have no jobs yet. They will be kept here for this browser.</p>'
    return f'<div class="u3-cards">{"".join(cards)}</div>'


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
