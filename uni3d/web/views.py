"""What the page says about jobs, as HTML; every word of a visitor is escaped."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from html import escape
from typing import Any

from uni3d.web.jobs import Job, JobStore
from uni3d.web.orders import reproducing_command

CSS = """
.gradio-container {max-width: 1180px !important; margin: 0 auto !important;}
.u3-status {border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 12px 14px;}
.u3-status p {margin: 0; color: var(--body-text-color);}
.u3-status .u3-small, .u3-small {color: var(--body-text-color-subdued); font-size: 0.9em;}
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
.u3-links a:focus-visible, .u3-card:focus-visible {outline: 3px solid var(--primary-500);
  outline-offset: 2px;}
.u3-result table {border-collapse: collapse; margin: 4px 0 12px; width: 100%; border: 0 !important;}
.u3-result tr {border: 0 !important;}
.u3-result td {padding: 4px 10px 4px 0; border: 0; border-bottom: 1px solid var(--border-color-primary);
  color: var(--body-text-color);}
.u3-result pre {white-space: pre-wrap; overflow-wrap: anywhere; padding: 10px; border-radius: 8px;
  background: var(--background-fill-secondary); color: var(--body-text-color); font-size: 0.85em;}
.u3-result summary {cursor: pointer; margin: 8px 0; color: var(--body-text-color);}
/* The viewer stays blank if it is made visible later: it is there, unseen, until it has a mesh. */
.u3-model:not(:has(canvas)) {display: none !important;}
@media (max-width: 700px) {
  .u3-left {display: contents !important;}
  .u3-shown {order: 1;}
  .u3-examples {order: 2;}
}
.u3-cards {display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 12px;}
.u3-card {border: 1px solid var(--border-color-primary); border-radius: 8px; overflow: hidden; display: block;
  text-decoration: none; background: var(--background-fill-primary);}
.u3-card .u3-thumb {aspect-ratio: 1; background-color: #ededed; background-size: 400% 200%;
  background-position: 0 0;}
.u3-card .u3-label {padding: 8px 10px; color: var(--body-text-color); overflow-wrap: anywhere;
  font-size: 0.9em;}
"""


def duration(seconds: float) -> str:
    """ "40 s", "12 min" or "3 h 20 min", as coarse as an estimate is."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"


def estimate_text(store: JobStore, quality: str, method: str) -> str:
    """How long a job takes here, by those that were made here."""
    seconds = store.usual_seconds(quality, method) or store.usual_seconds(quality)
    if seconds is None:
        return "Not measured on this machine yet; the time left appears once it runs."
    return f"Takes about {duration(seconds)} on this machine, by the last jobs here."


def status_html(job: Job | None, position: int = 0) -> str:
    """One box: what happens, how far it is, how long it will take."""
    if job is None:
        return _box("", "Nothing here yet. Say what to make, then start.")
    if job.state == "queued":
        where = "Next in line." if position == 0 else f"Waiting: {_count(position, 'job')} before this one."
        resumed = "" if job.num_starts == 0 else f" It goes on near step {job.step}."
        return _box("queued", where + resumed, small="You may close the page; the job stays in the queue.")
    if job.state == "running":
        return _running_box(job)
    if job.state == "done":
        text = f"Done in {duration(job.seconds_worked)}, {_count(job.num_steps, 'step')}, seed {job.seed}."
        return _box("done", text)
    if job.state == "cancelled":
        return _box("cancelled", f"Cancelled at step {job.step} of {job.num_steps}.")
    return _box("failed", f"This job failed: {job.message}.".replace("..", "."))


def _running_box(job: Job) -> str:
    if job.is_cancel_requested:
        return _box("running", "Cancelling after this step.")
    if job.step == 0:
        return _box("running", f"{job.phase.capitalize() or 'Starting'}.", bar="<progress></progress>")
    numbers = [f"step {job.step} of {job.num_steps}"]
    if job.loss is not None:
        numbers.append(f"loss {job.loss:.4g}")
    if job.seconds_left is not None and job.step < job.num_steps:
        numbers.append(f"about {duration(job.seconds_left)} left, then the mesh")
    bar = f'<progress max="{job.num_steps}" value="{job.step}">{job.step} of {job.num_steps}</progress>'
    return _box("running", f"{job.phase.capitalize()}.", bar=bar, small=", ".join(numbers))


def _box(kind: str, text: str, *, bar: str = "", small: str = "") -> str:
    extra = f'<p class="u3-small">{escape(small)}</p>' if small else ""
    return f'<div class="u3-status {kind}"><p role="status">{escape(text)}</p>{bar}{extra}</div>'


def notice_html(text: str) -> str:
    """Why nothing was started; empty if there is nothing to say."""
    return f'<div class="u3-notice" role="alert">{escape(text)}</div>' if text else ""


def preview_html(job: Job | None) -> str:
    """The views of a running job, or the sheet of a finished one."""
    if job is None or job.state not in ("running", "done") or not (job.num_previews or job.state == "done"):
        return ""
    name = "preview.png" if job.state == "done" else "progress.png"
    alt = f"{escape(job.prompt)}, seen from several sides"
    return f'<img class="u3-views" src="jobs/{job.id}/{name}?v={job.num_previews}" alt="{alt}">'


def result_html(store: JobStore, job: Job | None) -> str:
    """Video, downloads, figures and the way to make it again; empty before the job is done."""
    if job is None or job.state != "done":
        return ""
    folder = store.folder(job.id)
    try:
        figures = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return '<p class="u3-small">The files of this job have been removed to make room.</p>'
    video = ""
    if (folder / "turntable.mp4").is_file():
        video = (
            f'<video src="jobs/{job.id}/turntable.mp4" controls loop muted autoplay playsinline '
            f'aria-label="turntable of {escape(job.prompt)}"></video>'
        )
    links = "".join(
        f'<a class="{kind}" href="jobs/{job.id}/{name}" download>{label}</a>'
        for name, label, kind in (
            ("mesh.glb", "Download GLB", "main"),
            ("model.zip", "Download OBJ (ZIP)", ""),
            ("config.yaml", "Download config", ""),
        )
    )
    command = escape(reproducing_command(job.order, store.settings))
    return (
        f'<div class="u3-result">{video}<div class="u3-links">{links}<a href="?job={job.id}">Link to this job'
        f"</a></div>{figures_html(figures)}<p>Make it again:</p><pre>{command}</pre>"
        '<p class="u3-small">The link opens in this browser alone. A mesh bears the licence of its teacher.'
        "</p></div>"
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
        rows.append(("Texture in use (UV)", f"{figures['uv_coverage']:.0%}"))
    if "file_bytes" in figures:
        rows.append(("GLB size", f"{figures['file_bytes'] / 1e6:.2f} MB"))
    problems = figures.get("problems") or []
    rows.append(("Checks of the file", "passed" if not problems else "; ".join(map(str, problems))))
    cells = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f"<table>{cells}</table>"


def gallery_html(jobs: Iterable[Job]) -> str:
    """Cards of a visitor's jobs, each a link by id."""
    cards = []
    for job in jobs:
        picture = f"background-image: url('jobs/{job.id}/preview.png')" if job.state == "done" else ""
        cards.append(
            f'<a class="u3-card" href="?job={job.id}"><div class="u3-thumb" style="{picture}"></div>'
            f'<div class="u3-label">{escape(job.prompt)}<br><span class="u3-small">{job.state}, {job.method}'
            f", seed {job.seed}</span></div></a>"
        )
    if not cards:
        return '<p class="u3-small">You have no jobs yet. They will be kept here for this browser.</p>'
    return f'<div class="u3-cards">{"".join(cards)}</div>'


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
